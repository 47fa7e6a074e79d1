from __future__ import annotations

import torch
from torch import Tensor

from kernels.sample.naive import Logprobs, Penalties, SampleParams
from kernels.sample.triton import SampleScratch, sample
from tests.kernel_cases import Case


def launch(rows: int, vocab: int, dtype: torch.dtype, params: bool, everything: bool, bans: int = 0) -> None:
    def numbers(kind: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape or (rows,), dtype=kind)

    whole, real = torch.int64, torch.float32
    rule = SampleParams(*map(numbers, (real, whole, real, real, whole, whole))) if params else None
    bans = bans or (16 if everything else 0)
    banned = (numbers(whole, bans), numbers(whole, bans)) if bans else None
    counts = numbers(torch.int32, rows, vocab)
    penalties = Penalties(numbers(real), numbers(real), numbers(real), counts, numbers(whole)) if everything else None
    mask = numbers(torch.int32, rows, -(-vocab // 32)) if everything else None
    logs = Logprobs(numbers(whole), numbers(real), numbers(whole, rows, 20), numbers(real, rows, 20))
    sample(
        numbers(dtype, rows, vocab), rule, numbers(whole), banned, penalties, mask, logs if params else None,
        SampleScratch.empty(rows, vocab, "cpu"),
    )  # fmt: skip


CASES = [
    Case("greedy alone", lambda: launch(64, 129280, torch.float32, False, False), hot=True),
    Case("64 rows", lambda: launch(64, 129280, torch.float32, True, False), hot=True),
    Case("1 row, bf16", lambda: launch(1, 102400, torch.bfloat16, True, False), hot=True),
    Case("a single ban", lambda: launch(2, 2048, torch.bfloat16, True, False, bans=1)),
    Case("everything", lambda: launch(64, 129280, torch.float32, True, True), hot=True),
]
