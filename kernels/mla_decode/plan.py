# mypy: allow-incomplete-defs, allow-untyped-defs, no-check-untyped-defs
"""Which program reads which pages: computed on the device once a step, the same for every layer.

A part is what one program a head tile does: a range of (request, page) that may begin and end in the middle of a
request. A request that lies in one part is written at once; of one that spans several, every part leaves a piece (the
normalised sum over its pages and their log-sum-exp) and `join` adds the pieces in the order of the pages.

After FlashMLA's tile schedule, but for the payload, which here is the smallest one for which the parts suffice: short
contexts spread over all processors evenly. One that cuts nothing may be `join` larger: nothing is to be joined then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.pages import PAGE
from kernels.sizes import cdiv, next_power_of_2

_PAGE = tl.constexpr(PAGE)
_CANDIDATES = tl.constexpr(32)
_NEVER = tl.constexpr(1 << 30)


@dataclass(frozen=True)
class DecodePlan:
    """The schedule of a step, and the scratch of its launches. `tile` holds for all launches that use the plan."""

    tile: dict[str, int]
    begin: Tensor  # int32 [parts + 1, 2]: the (request, page) at which a part begins; the next one's ends it
    joins: Tensor  # int32 [parts, 3]: (request, its first part, its last part) of each request in pieces
    count: Tensor  # int32 [1], how many `joins` there are
    pieces: Tensor  # [2 * parts, rows, kv_lora]; 2k: part k entered its request midway, 2k + 1: it left one midway
    lse: Tensor  # float32 [2 * parts, rows], base 2
    absorbed: Tensor  # [n, q_tokens, heads, kv_lora + rope]
    latent: Tensor  # [n, q_tokens, heads, kv_lora]

    @property
    def parts(self) -> int:
        return len(self.joins)

    @staticmethod
    def empty(
        n: int, q_tokens: int, heads: int, kv_lora: int, rope: int, tile: dict[str, int], processors: int,
        device: torch.device | str, dtype: torch.dtype, piece: torch.dtype | None = None,
    ) -> DecodePlan:  # fmt: skip
        """For up to `n` requests. Pieces are kept in `piece`: by default as the output would be, so that a request in
        pieces moves half the bytes that float32 would and is rounded once more."""
        tiles = cdiv(q_tokens * heads, tile["rows"])
        parts = max(1, processors * tile["programs"] // tiles)
        rows = tiles * tile["rows"]

        def make(*shape: int, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        return DecodePlan(
            tile, make(parts + 1, 2), make(parts, 3), make(1),
            make(2 * parts, rows, kv_lora, kind=piece or dtype), make(2 * parts, rows, kind=torch.float32),
            make(n, q_tokens, heads, kv_lora + rope, kind=dtype), make(n, q_tokens, heads, kv_lora, kind=dtype),
        )  # fmt: skip


@triton.jit
def _place(room, part, pages, payload, setup, least):
    """Put a request after what a part holds already: (the part it begins in, pages there, further parts, pages in the
    last of those, room left in the last).

    Each part that touches the request pays `setup`; a piece has `least` pages, if the request has.
    """
    part += (room < setup + tl.minimum(pages, least)).to(tl.int32)
    room = tl.where(room < setup + tl.minimum(pages, least), payload, room)
    here = tl.minimum(pages, room - setup)
    rest = pages - here
    more = tl.cdiv(rest, payload - setup)
    tail = rest - (more - 1) * (payload - setup)
    left = tl.where(more > 0, payload - setup - tail, room - setup - here)
    return part, here, more, tail, left


@triton.jit
def _plan(context, begin, joins, count, n, parts, setup, least, join, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for at in range(0, n, BLOCK):
        i = at + tl.arange(0, BLOCK)
        total += tl.where(i < n, tl.cdiv(tl.load(context + i, mask=i < n, other=0), _PAGE) + setup, 0)
    # The smallest payload that would do if nothing were cut; a cut costs `setup` once more and leaves less than
    # setup + least unused, so one of the candidates suffices.
    payload = tl.maximum(tl.cdiv(tl.sum(total), parts), setup + least) + tl.arange(0, _CANDIDATES)
    last = tl.zeros([_CANDIDATES], tl.int32)
    cuts = tl.zeros([_CANDIDATES], tl.int32)
    room = payload
    for i in range(n):
        pages = tl.cdiv(tl.load(context + i), _PAGE)
        last, _, more, _, room = _place(room, last, pages, payload, setup, least)
        last += more
        cuts += more
    with_cuts = tl.min(tl.where(last < parts, payload, _NEVER))
    without = tl.min(tl.where((last < parts) & (cuts == 0), payload, _NEVER))
    payload = tl.where(without <= with_cuts + join, without, with_cuts)

    k = tl.arange(0, PARTS)
    tl.store(begin + 2 * k, tl.zeros([PARTS], tl.int32), mask=k == 0)
    tl.store(begin + 2 * k + 1, tl.zeros([PARTS], tl.int32), mask=k == 0)
    part = 0
    room = payload
    found = 0
    for i in range(n):
        pages = tl.cdiv(tl.load(context + i), _PAGE)
        first, here, more, _, room = _place(room, part, pages, payload, setup, least)
        begins = (k > part) & (k <= first + more)
        tl.store(begin + 2 * k, tl.zeros([PARTS], tl.int32) + i, mask=begins)
        page = tl.where(k > first, here + (k - first - 1) * (payload - setup), 0)
        tl.store(begin + 2 * k + 1, page, mask=begins)
        part = first + more
        if more > 0:
            tl.store(joins + 3 * found, i)
            tl.store(joins + 3 * found + 1, first)
            tl.store(joins + 3 * found + 2, part)
            found += 1
    ended = (k > part) & (k <= parts)
    tl.store(begin + 2 * k, tl.zeros([PARTS], tl.int32) + n, mask=ended)
    tl.store(begin + 2 * k + 1, tl.zeros([PARTS], tl.int32), mask=ended)
    tl.store(count, found)


def plan_decode(context: Tensor, plan: DecodePlan) -> None:
    """Fill `plan` for requests of these lengths, int32 [n], the new tokens included. 0: a row that only pads the batch;
    its output is zeros."""
    tile = plan.tile
    block = next_power_of_2(plan.parts + 1)
    _plan[(1,)](
        context, plan.begin, plan.joins, plan.count, len(context), plan.parts, tile["setup"], tile["least"],
        tile["join"], block, 256, num_warps=1,
    )  # fmt: skip
