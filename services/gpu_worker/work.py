"""Everything that a forward pass writes beside the cache, for one number of rows. Layers and steps take turns in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.model_config import ModelConfig
from common.pinned import to_device
from kernels.expert_plan.naive import ExpertPlan, plan_experts
from kernels.experts import ExpertWork, slot_table
from kernels.linear import LinearScratch
from kernels.mla_prefill import PrefillScratch
from kernels.quant import Fp8Rows
from kernels.route import RouteScratch

if TYPE_CHECKING:
    from kernels.mla_decode.plan import DecodePlan
    from kernels.qkv_norm_rope_write.triton import QkvScratch

ALIGNED = 512  # bytes, as torch's allocator has them


class Arena:
    """Memory on the GPU for works of which one is in use at a time: the largest is made first, the others lie in it."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def turn(self) -> Callable[..., Tensor]:
        """A torch.empty that begins at the start of the memory again."""
        free = [(0, block) for block in self._blocks]

        def empty(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
            size = math.prod(shape) * dtype.itemsize
            for i, (at, block) in enumerate(free):
                if at + size <= len(block):
                    free[i] = at + -(-size // ALIGNED) * ALIGNED, block
                    return block[at : at + size].view(dtype).view(shape)
            self._blocks.append(torch.empty(size, dtype=torch.uint8, device=device))
            free.append((size, self._blocks[-1]))
            return self._blocks[-1].view(dtype).view(shape)

        return empty


@dataclass(frozen=True)
class MlpWork:
    """An FFN that all tokens take, on a GPU: an expert, or its equal parts, all chosen by every token, so that its plan
    never changes."""

    experts: ExpertWork
    weights: Tensor  # float32 [T, parts], ones

    @staticmethod
    def empty(
        rows: int, hidden: int, inter: int, fp8: bool, dtype: torch.dtype, parts: int = 1,
        new: Callable[..., Tensor] = torch.empty,
    ) -> MlpWork:  # fmt: skip
        from kernels.experts.tiles import one_launch

        tile = one_launch(rows, fp8, every=True) if parts > 1 else None
        work = ExpertWork.empty(
            rows, parts, parts, hidden, inter // parts, fp8, "cuda", dtype, tile, parts if parts > 1 else 0, new
        )
        ids = torch.arange(parts).expand(rows, parts)
        plan = ExpertPlan.empty(rows, parts, parts, work.plan.block_rows, "cpu")
        plan_experts(ids, slot_table({part: part for part in range(parts)}, parts), parts, plan)
        for part in ("pairs", "places", "blocks", "counts"):
            getattr(work.plan, part).copy_(to_device(getattr(plan, part), "cuda"))
        return MlpWork(work, torch.ones(rows, parts, device="cuda"))


@dataclass(frozen=True)
class GpuWork:
    """The kernels' scratch."""

    linear: LinearScratch
    qkv: QkvScratch
    route: RouteScratch | None
    decode: DecodePlan | None
    prefill: PrefillScratch | None
    dense: MlpWork | None  # a dense layer's FFN
    shared: MlpWork | None  # the shared expert's, where it is not one of the stacks'
    experts: ExpertWork | None  # where the routed experts are in this process
    slots: Tensor | None  # int32 [T, peers], where they are not: where the shards' sums will lie
    coded: Fp8Rows | None  # [T, hidden], the normed rows in 8 bits
    attended: Fp8Rows | None  # [T, heads * v_dim], Work.out in 8 bits, or instead of it


@dataclass(frozen=True)
class Work:
    h: Tensor  # [T, hidden], the residual stream
    x: Tensor  # [T, hidden], normed
    q: Tensor  # [T, heads, nope + rope]
    out: Tensor  # [T, heads, v_dim], attention's, where it is not in 8 bits from the start
    ids: Tensor  # [T, topk (+ shared)], int32 on a GPU
    weights: Tensor  # float32 [T, topk (+ shared)]
    gpu: GpuWork | None = None

    @staticmethod
    def empty(
        rows: int, config: ModelConfig, dtype: torch.dtype, chosen: int, device: str, gpu: GpuWork | None = None,
        new: Callable[..., Tensor] = torch.empty,
    ) -> Work:  # fmt: skip
        """`chosen`: experts a token goes to; `new`: instead of torch.empty."""

        def room(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return new(rows, *shape, dtype=kind, device=device)

        c = config
        return Work(
            room(c.hidden), room(c.hidden), room(c.heads, c.nope + c.rope), room(c.heads, c.v_dim),
            room(chosen, kind=torch.int64 if gpu is None else torch.int32), room(chosen, kind=torch.float32), gpu,
        )  # fmt: skip
