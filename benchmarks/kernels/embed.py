from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.kernels import KernelCase, Launch
from kernels.embed.triton import embed

SETS = 8
TOKENS = 64


def case(name: str, vocab: int, hidden: int) -> KernelCase:
    table = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(vocab, (TOKENS,), device="cuda")
        return ids, torch.empty(TOKENS, hidden, device="cuda", dtype=torch.bfloat16)

    def make(tile: dict | None) -> list[Launch]:
        def one() -> Launch:
            (ids, out), (sampled, _) = inputs(), inputs()
            source = torch.randint(-1, TOKENS, (TOKENS,), device="cuda", dtype=torch.int32)
            used = torch.empty(TOKENS, device="cuda", dtype=torch.int32)
            return lambda: embed(ids, source, sampled, table, out, used)

        return [one() for _ in range(SETS)]

    def torch_embedding() -> list[Launch]:
        return [partial(F.embedding, inputs()[0], table) for _ in range(SETS)]

    moved = 2 * TOKENS * hidden * 2
    peers = {"torch, without the choice": torch_embedding}
    return KernelCase("embed", f"{name}, {TOKENS} tokens", make, bytes=moved, peers=peers)


def cases() -> list[KernelCase]:
    return [case("R1", 129280, 7168), case("V2-Lite", 102400, 2048)]
