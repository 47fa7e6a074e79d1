from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.expert_plan.naive import ExpertPlan
from kernels.quant.naive import Fp8Blocks, Fp8Rows


@dataclass(frozen=True)
class ExpertWork:
    """Scratch of one layer's routed experts for a bucket of tokens; layers and steps take turns in it."""

    plan: ExpertPlan
    act: Tensor | Fp8Rows  # [pairs, inter], by place
    rows: Tensor  # [pairs, hidden], by place, weighted; before that, hopper.py's gathered rows of x
    progress: Tensor  # int32 [1 + 2 * most_blocks], of few.py, whose launches leave it ready for the next
    tile: Mapping[str, Any]  # of tiles.tile_rule
    gathered: Tensor | None = None  # [pairs, hidden], few.py's rows of x by place
    shared: int = 0  # of the held, the first ones, which every token chooses

    @staticmethod
    def empty(
        tokens: int,
        topk: int,
        held: int,
        hidden: int,
        inter: int,
        fp8: bool,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        tile: Mapping[str, Any] | None = None,
        shared: int = 0,
        new: Callable[..., Tensor] = torch.empty,
    ) -> ExpertWork:
        """`fp8`: of the activations between the two products; `dtype`: of the rows, and of those if not `fp8`;
        `shared`: how many of `held`, the first ones, and of `topk` every token chooses; `new`: instead of torch.empty,
        for what keeps nothing from one launch to the next."""
        pairs, coded = tokens * topk, torch.float8_e4m3fn
        if torch.device(device).type == "cuda":
            from kernels.experts.tiles import tile_for
            from kernels.target import current

            coded = current().fp8
            tile = tile or tile_for(tokens, topk, held, hidden, inter, fp8, dtype, shared)
        tile = tile or {"rows": 16}
        act: Tensor | Fp8Rows
        if fp8:
            act = Fp8Rows.empty(pairs, inter, device, coded, new)
        else:
            act = new(pairs, inter, dtype=dtype, device=device)
        rows = new(pairs, hidden, dtype=dtype, device=device)
        plan = ExpertPlan.empty(tokens, topk, held, tile["rows"], device)
        progress = torch.zeros(1 + 2 * len(plan.blocks), dtype=torch.int32, device=device)
        gathered = None
        if "both" in tile and tile["rows"] > EIGHT and shared < held:
            gathered = new(pairs, hidden, dtype=coded if fp8 else dtype, device=device)
        return ExpertWork(plan, act, rows, progress, tile, gathered, shared)


EIGHT = 8  # rows at a time: what the swizzle of TMA repeats after
AHEAD = 24 << 20  # bytes, half of an H200's L2
CHUNK = 32 << 10


def bytes_ahead(stack: Tensor | Fp8Blocks, shared: int) -> int:
    """How much of the first `shared` experts' weights is asked for before the plan is known, in whole CHUNKs."""
    weights = stack.data[:shared]
    return min(AHEAD, weights.numel() * weights.itemsize) // CHUNK * CHUNK


def rows_and_scale(stack: Tensor | Fp8Blocks) -> tuple[Tensor, Tensor | None]:
    """A stack as it lies in memory, [held * n, k], and its scales; raises where it is not a transposed view."""
    held, k, n = stack.data.shape
    scale = stack.scale.mT if isinstance(stack, Fp8Blocks) else None
    if scale is not None and not scale.is_contiguous():
        raise ValueError("scales lie as their weights: a transposed view")
    return stack.data.mT.view(held * n, k), scale
