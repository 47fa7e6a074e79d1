"""What a step's prefill needs beside the model's tensors: where its chunks lie, and room for their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.pinned import to_device

MOST_CHUNKS = 256  # of a plan: more would make a kernel compile anew
MOST_BYTES = 1 << 30  # of expanded keys and values; more heads than fit are taken in turns


@dataclass(frozen=True)
class PrefillPlan:
    """The chunks of a step, the same for all layers. Chunk i is rows cu_rows[i] to cu_rows[i + 1] of the step's prefill
    rows: the last tokens of its context. Sizes are bounds known on the host, what varies lives on the device."""

    cu_rows: Tensor  # int32 [chunks + 1], 0 first
    contexts: Tensor  # int32 [chunks], tokens in the cache once the chunk is written
    cu_contexts: Tensor  # int32 [chunks + 1], 0 first
    block_table: Tensor  # int32 [chunks, most pages]; entries past a context are undefined
    most_rows: int  # of one chunk
    tokens: int  # of all contexts

    @staticmethod
    def of(
        rows: Sequence[int], contexts: Sequence[int], pages: Sequence[Tensor], device: torch.device | str = "cpu"
    ) -> PrefillPlan:
        """pages[i]: integers [ceil(contexts[i] / PAGE)]"""

        def running(sizes: Sequence[int]) -> Tensor:
            return torch.tensor([0, *sizes]).cumsum(0).int()

        table = pad_sequence([p.int() for p in pages], batch_first=True) if pages else torch.empty(0, 0).int()
        return PrefillPlan(
            to_device(running(rows), device),
            to_device(torch.tensor(contexts, dtype=torch.int32), device),
            to_device(running(contexts), device),
            to_device(table, device),
            max(rows, default=0),
            sum(contexts),
        )


@dataclass(frozen=True)
class PrefillScratch:
    """Where the GPU expands latents to keys and values; one serves all layers."""

    latent: Tensor  # [tokens, kv_lora]
    rope: Tensor  # [tokens, rope]
    expanded: Tensor  # flat; used as [tokens, some heads, nope + v_dim]

    @staticmethod
    def empty(
        tokens: int, heads: int, width: int, kv_lora: int, rope: int, dtype: torch.dtype, device: torch.device | str,
    ) -> PrefillScratch:  # fmt: skip
        """For steps of up to `tokens` tokens of context; `width` is nope + v_dim."""
        a_head = max(tokens, 1) * width
        some = max(1, min(heads, MOST_BYTES // (a_head * dtype.itemsize)))

        def room(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return PrefillScratch(room(tokens, kv_lora), room(tokens, rope), room(a_head * some))

    def head_groups(self, tokens: int, heads: int, width: int) -> list[tuple[int, int]]:
        """(first, end) of the heads that are taken together, evenly."""
        fit = self.expanded.numel() // (tokens * width)
        if fit < 1:
            raise ValueError(f"no room for {tokens} tokens of context in a scratch of {len(self.latent)}")
        turns = -(-heads // fit)
        each = -(-heads // turns)
        return [(first, min(first + each, heads)) for first in range(0, heads, each)]
