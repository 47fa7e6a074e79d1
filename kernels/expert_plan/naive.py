from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024  # pairs that one program of the Triton version sorts, where there are many


@dataclass(frozen=True)
class ExpertPlan:
    """The order in which the grouped products take their (token, k) pairs. Sizes are bounds known on the host, counts
    live on the device, so a captured graph serves any routing.

    Pairs of one expert lie together, experts in the order of their slots, pairs of one expert in the order of tokens.
    A block is up to `block_rows` places of one expert; only real blocks are listed.
    """

    pairs: Tensor  # int32 [T * topk], place -> t * topk + k; entries past the placed ones are undefined
    places: Tensor  # int32 [T, topk], pair -> place, -1 where the expert is not held
    blocks: Tensor  # int32 [most_blocks, 3]: slot of the expert, first place, rows in 1..block_rows
    counts: Tensor  # int32 [2]: how many blocks, how many placed pairs
    block_rows: int
    scratch: Tensor  # int32 [chunks + 1, held]: each chunk's pairs of each expert, of the Triton version

    @staticmethod
    def most_blocks(tokens: int, topk: int, held: int, block_rows: int) -> int:
        """A block is full, or the last of its expert."""
        pairs = tokens * topk
        return min(pairs, held + pairs // block_rows)

    @staticmethod
    def empty(tokens: int, topk: int, held: int, block_rows: int, device: torch.device | str) -> ExpertPlan:
        def indices(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        pairs, blocks = tokens * topk, ExpertPlan.most_blocks(tokens, topk, held, block_rows)
        scratch = indices(-(-pairs // CHUNK) + 1, held)
        return ExpertPlan(indices(pairs), indices(tokens, topk), indices(blocks, 3), indices(2), block_rows, scratch)


def plan_experts(
    ids: Tensor,  # int32 or int64 [T, topk], -1: not for you
    slots: Tensor,  # [experts + 1], of experts.slot_table: id -> slot, or `held` where it is not held
    held: int,
    plan: ExpertPlan,  # out
) -> None:
    """Sort the pairs by the slot of their expert, and cut each expert's into blocks."""
    slot = slots.long()[ids.long()].flatten()
    order = slot.argsort(stable=True)
    placed = int((slot < held).sum())
    plan.pairs[:placed] = order[:placed].int()
    places = torch.full_like(order, -1)
    places[order[:placed]] = torch.arange(placed, device=ids.device)
    plan.places.copy_(places.view_as(ids))
    blocks, first = [], 0
    for s, count in enumerate(torch.bincount(slot, minlength=held + 1).tolist()[:held]):
        starts = range(0, count, plan.block_rows)
        blocks += [(s, first + start, min(plan.block_rows, count - start)) for start in starts]
        first += count
    if blocks:
        plan.blocks[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32, device=ids.device)
    plan.counts.copy_(torch.tensor([len(blocks), placed], dtype=torch.int32))
