"""The same movement of rows within one process, without flags: what the kernels must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.combine_norm.naive import SlotRows
from kernels.link.layout import Region, SlabLayout
from kernels.link.views import Requests
from kernels.quant.naive import Fp8Rows


def dispatch(
    x: Tensor | Fp8Rows,  # [T, hidden]
    ids: Tensor,  # int32 [T, topk], -1: nobody's
    weights: Tensor,  # float32 [T, topk]
    owner: Tensor,  # int32 [experts]: which peer is asked for it
    into: Sequence[Requests],  # of each peer, of one region
    layout: SlabLayout,
    region: Region,
    slots: Tensor,  # int32 [T, peers], out
) -> None:
    """A row to each peer that owns one of its experts, in the order of the tokens, with that peer's ids alone;
    slots[t, peer] is where the peer's partial sum will lie in the reply slab, or -1."""
    tokens = len(ids)
    owners = torch.where(ids >= 0, owner[ids.long().clamp_min(0)], -1)  # [T, topk]
    slots.fill_(-1)
    for peer, there in enumerate(into):
        mine = owners == peer
        rows = mine.any(1).nonzero().squeeze(1)
        count = len(rows)
        first = peer * layout.block_rows + layout.region(region).reply
        slots[rows, peer] = torch.arange(first, first + count, dtype=torch.int32, device=slots.device)
        for source, target in zip(_parts(x), _parts(there.x), strict=True):
            target[:count] = source[rows]
        there.ids[:tokens] = -1
        there.ids[:count] = torch.where(mine, ids, -1)[rows]
        there.weights[:count] = weights[rows]
        there.count[0] = count


def give_back(parts: Tensor | SlotRows, count: Tensor, into: Tensor) -> None:
    """The first `count` partial sums to the worker; `into` is the region's part of our block, bf16 [rows, hidden]."""
    sums = parts.sum() if isinstance(parts, SlotRows) else parts
    into[: int(count)] = sums[: int(count)]


def combine(replies: Tensor, slots: Tensor, out: Tensor) -> None:
    """out[t] = sum over the peers, in their order and in float32, of replies[slots[t, peer]]."""
    out.copy_(SlotRows(replies, slots).sum())


def _parts(x: Tensor | Fp8Rows) -> tuple[Tensor, ...]:
    # Bytes: not every operation knows the 8-bit types.
    return (x.data.view(torch.uint8), x.scale) if isinstance(x, Fp8Rows) else (x,)
