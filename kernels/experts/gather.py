# mypy: allow-incomplete-defs, allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.expert_plan.naive import ExpertPlan
from kernels.sizes import next_power_of_2
from kernels.target import overlap, overlaps
from kernels.tl_ops import let_next_begin, wait_ahead


@triton.jit
def _gather(x, pairs, counts, out, width, topk, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a place."""
    let_next_begin(PDL)
    wait_ahead(PDL)
    place = tl.program_id(0)
    if place < tl.load(counts + 1):
        token = tl.load(pairs + place) // topk
        at = tl.arange(0, BLOCK)
        row = tl.load(x + token.to(tl.int64) * width + at, mask=at < width)
        tl.store(out + place.to(tl.int64) * width + at, row, mask=at < width)


def gather(x: Tensor, plan: ExpertPlan, topk: int, out: Tensor) -> None:
    """out[place] = x[token], rows of whole words of 4 bytes."""
    words = x.shape[1] * x.itemsize // 4
    pdl = overlaps()
    _gather[(len(plan.pairs),)](
        x.view(torch.int32), plan.pairs, plan.counts, out.view(torch.int32), words, topk, next_power_of_2(words), pdl,
        num_warps=4, **overlap(pdl),
    )  # fmt: skip
