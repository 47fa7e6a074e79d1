from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import overlap, overlaps
from kernels.tl_ops import fp8_max, let_next_begin, to_fp8, wait_ahead


@triton.jit
def quantise_each(groups, dtype: tl.constexpr):
    """[N, SIZE] float32 to (e4m3 [N, SIZE], float32 [N])."""
    scale = tl.maximum(tl.max(tl.abs(groups), 1), 1e-10) / fp8_max(dtype)
    return to_fp8(groups / scale[:, None], dtype), scale


@triton.jit
def quantise_groups(x, dtype: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """[WIDTH] float32 to (e4m3 [WIDTH], float32 [WIDTH / SIZE])."""
    coded, scale = quantise_each(tl.reshape(x, [WIDTH // SIZE, SIZE]), dtype)
    return tl.reshape(coded, [WIDTH]), scale


@triton.jit
def _quantise_rows(
    x, data, scale, width, stride, GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    let_next_begin(PDL)
    wait_ahead(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    coded, scales = quantise_groups(values, data.dtype.element_ty, BLOCK, GROUP)
    tl.store(data + row * width + at, coded, mask=at < width)
    groups = part * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(scale + row * (width // GROUP) + groups, scales, mask=groups < width // GROUP)


def quantise_rows(x: Tensor, out: Fp8Rows) -> None:
    rows, width = x.shape
    if width % GROUP or x.stride(1) != 1:
        raise ValueError(f"rows of {width}, {x.stride(1)} apart: {GROUP} must divide them, and they lie side by side")
    block, pdl = min(1024, next_power_of_2(width)), overlaps()
    if rows:
        _quantise_rows[(rows, cdiv(width, block))](
            x, out.data, out.scale, width, x.stride(0), GROUP, block, pdl, num_warps=4, **overlap(pdl)
        )


@triton.jit
def _quantise_blocks(w, data, scale, rows, columns, row, data_row, scale_row, GROUP: tl.constexpr):
    """A block a program. Divisions round as IEEE has it: a checkpoint's codes are the same wherever they are made."""
    part, column = tl.program_id(0), tl.program_id(1)
    down = part * GROUP + tl.arange(0, GROUP)[:, None].to(tl.int64)
    across = column * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (down < rows) & (across < columns)
    values = tl.load(w + down * row + across, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = data.dtype.element_ty
    largest = tl.maximum(tl.max(tl.max(tl.abs(values), 1), 0), 1e-10)
    own = tl.div_rn(largest, fp8_max(dtype))
    # A maximum passes NaN over: a damaged weight would become a number.
    damaged = tl.max(tl.max((values != values).to(tl.int32), 1), 0) > 0
    own = tl.where(damaged, float("nan"), own)
    coded = to_fp8(tl.div_rn(values, tl.zeros_like(values) + own), dtype)
    tl.store(data + down * data_row + across, coded, mask=inside)
    tl.store(scale + part * scale_row + column, own)


def quantise_blocks(w: Tensor, out: Fp8Blocks) -> None:
    """[rows, columns], whose columns lie side by side as those of `out` do."""
    rows, columns = w.shape
    if not w.stride(1) == out.data.stride(1) == out.scale.stride(1) == 1:
        raise ValueError("quantise_blocks wants columns that lie side by side")
    _quantise_blocks[(cdiv(rows, GROUP), cdiv(columns, GROUP))](
        w, out.data, out.scale, rows, columns, w.stride(0), out.data.stride(0), out.scale.stride(0), GROUP, num_warps=8
    )
