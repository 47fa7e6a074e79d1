from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.combine_norm.naive import SlotRows
from kernels.quant.naive import GROUP, Fp8Rows
from kernels.quant.triton import quantise_groups
from kernels.sizes import next_power_of_2
from kernels.target import current, overlap, overlaps
from kernels.tl_ops import let_next_begin, wait_ahead


@triton.jit
def _combine_norm(
    residual, first, second, rows, slots, weight, out, coded, scale, eps, hidden,
    PARTS: tl.constexpr, TOPK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    let_next_begin(PDL)
    gain = tl.load(weight + at, mask=inside, other=0.0)
    wait_ahead(PDL)
    slot = ()  # before the rows, one after another of which would wait for its own
    for k in tl.static_range(TOPK):
        slot += (tl.load(slots + t * TOPK + k).to(tl.int64),)  # type: ignore[assignment]
    total = tl.load(residual + t * hidden + at, mask=inside, other=0.0).to(tl.float32)
    if PARTS >= 1:
        total += tl.load(first + t * hidden + at, mask=inside, other=0.0).to(tl.float32)
    if PARTS >= 2:
        total += tl.load(second + t * hidden + at, mask=inside, other=0.0).to(tl.float32)
    if TOPK:
        routed = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(TOPK):
            row = rows + slot[k] * hidden + at
            routed += tl.load(row, mask=inside & (slot[k] >= 0), other=0.0).to(tl.float32)
        total += routed.to(rows.dtype.element_ty).to(tl.float32)
    tl.store(residual + t * hidden + at, total, mask=inside)
    normed = total * tl.rsqrt(tl.sum(total * total) / hidden + eps) * gain
    if out is not None:
        rounded = normed.to(out.dtype.element_ty)
        tl.store(out + t * hidden + at, rounded, mask=inside)
        normed = rounded.to(tl.float32)  # what is coded as well is `out`
    if coded is not None:
        codes, scales = quantise_groups(normed, coded.dtype.element_ty, BLOCK, GROUP)
        tl.store(coded + t * hidden + at, codes, mask=inside)
        groups = tl.arange(0, BLOCK // GROUP)
        tl.store(scale + t * (hidden // GROUP) + groups, scales, mask=groups < hidden // GROUP)


def combine_norm(
    residual: Tensor, parts: tuple[Tensor | SlotRows, ...], weight: Tensor, eps: float, out: Tensor | Fp8Rows,
    coded: Fp8Rows | None = None,
) -> None:  # fmt: skip
    """At most two dense parts, then at most one of slots."""
    dense = [part for part in parts if not isinstance(part, SlotRows)]
    slotted = [part for part in parts if isinstance(part, SlotRows)]
    if len(dense) > 2 or len(slotted) > 1 or list(parts) != dense + slotted:
        raise ValueError("combine_norm takes up to two dense parts, then up to one of slots")
    if isinstance(out, Fp8Rows) and coded is not None:
        raise ValueError("rows in 8 bits alone, or in the residual's type and in 8 bits")
    tokens, hidden = residual.shape
    if not tokens:
        return
    wide, codes = (None, out) if isinstance(out, Fp8Rows) else (out, coded)
    data, scale = (codes.data, codes.scale) if codes is not None else (None, None)
    rows, slots, topk = (slotted[0].rows, slotted[0].slots, slotted[0].slots.shape[1]) if slotted else (None, None, 0)
    # Programs that stand ready take what whoever is waited for may have to run on.
    pdl, early = overlaps(), not any(part.awaited for part in slotted)
    first, second = (*dense, None, None)[:2]
    block = max(next_power_of_2(hidden), GROUP)
    # Few rows wait for memory alone: 8 numbers a thread, so that most of what a row is made of is on its way at once.
    each, most = (256, 32) if tokens <= 2 * current().processors else (512, 16)
    _combine_norm[(tokens,)](
        residual, first, second, rows, slots, weight, wide, data, scale, eps, hidden,
        len(dense), topk, GROUP, block, pdl,
        num_warps=max(1, min(most, block // each)), **overlap(pdl and early),
    )  # fmt: skip
