"""The weights stream through once: what counts is how many of their bytes are on the way.

Swapped, weights on the M side of the tensor cores: a tile is BN columns of w by BM tokens, and 16 tokens are enough for
a native fp8 product. The grid is one wave of equal programs, all resident at once, so that none waits for a second
wave: where the tiles alone are too few, SPLITS programs share the K of one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.linear.naive import LinearScratch
from kernels.quant.naive import GROUP
from kernels.sizes import cdiv
from kernels.target import overlap
from kernels.tl_ops import dot, let_next_begin, prefetch, wait_ahead

DEEP = tl.constexpr(8)  # tiles of tokens side by side, where there are several: they share the weights in the L2


@triton.jit
def _tile(index, tokens, n, BM: tl.constexpr, BN: tl.constexpr):
    """(first token, first column)"""
    wide = tl.cdiv(n, BN)
    first = index // (DEEP * wide) * DEEP
    deep = tl.minimum(tl.cdiv(tokens, BM) - first, DEEP)
    inside = index % (DEEP * wide)
    return (first + inside % deep) * BM, inside // deep * BN


@triton.jit
def _load(source, stride, rows, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, COLUMNS] of a row-major matrix, zeros past its last row; `source` is its descriptor or its address."""
    if TMA:
        return source.load([row, column])
    else:
        at = row + tl.arange(0, ROWS)
        pointers = source + at.to(tl.int64)[:, None] * stride + column + tl.arange(0, COLUMNS)[None, :]
        return tl.load(pointers, mask=at[:, None] < rows, other=0.0)


@triton.jit
def _prefetch_rows(w, stride, n, row, column, columns, ROWS: tl.constexpr):
    """Ask the L2 for columns column .. column + columns of ROWS rows, multiples of 16 bytes."""
    at = tl.minimum(row + tl.arange(0, ROWS), n - 1)
    bytes = columns * (w.dtype.element_ty.primitive_bitwidth // 8)
    prefetch(w + at.to(tl.int64) * stride + column, bytes)


@triton.jit
def _add_splits(partials, tickets, acc, tile, split, at, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """(the sum of the tile's splits, whether this program came last and holds it).

    Summed in the order of the splits, whoever comes last. The ticket goes back to 0 for the next launch.
    """
    base = partials + tile * SPLITS * SIZE + at
    tl.store(base + split * SIZE, acc, cache_modifier=".cg")
    tl.debug_barrier()  # all threads have written before one of them takes the ticket
    last = tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        acc = tl.load(base, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(base + other * SIZE, cache_modifier=".cg")
        tl.store(tickets + tile, 0)
    return acc, last


@triton.jit
def _streaming(
    x, x_scale, w, w_scale, weights, add, out, partials, tickets,
    tokens, n, k, x_stride, x_scale_stride, w_stride, w_scale_stride, add_stride, out_stride,
    SCALED: tl.constexpr, ADD: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    token, column = _tile(tile, tokens, n, BM, BN)
    first, last = split * (k // BK) // SPLITS, (split + 1) * (k // BK) // SPLITS
    let_next_begin(PDL)
    if PREFETCH:
        _prefetch_rows(weights, w_stride, n, column, first * BK, tl.minimum((last - first) * BK, PREFETCH), BN)
    wait_ahead(PDL)  # only weights, which never change, are touched before the launches ahead of this one end
    t, c = token + tl.arange(0, BM), column + tl.arange(0, BN)
    acc = tl.zeros([BN, BM], tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        wt = _load(w, w_stride, n, column, i * BK, BN, BK, TMA)
        xt = _load(x, x_stride, tokens, token, i * BK, BM, BK, TMA)
        if SCALED:
            sw = tl.load(w_scale + (column // BK) * w_scale_stride + i)
            sx = tl.load(x_scale + t.to(tl.int64) * x_scale_stride + i, mask=t < tokens, other=0.0)
            acc += tl.dot(wt, xt.T) * (sx * sw)[None, :]
        else:
            acc = dot(wt, xt.T, acc)
    holds = True
    if SPLITS > 1:
        inner = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        acc, holds = _add_splits(partials, tickets, acc, tile, split, inner, SPLITS, BN * BM)
    if holds:
        inside = (c < n)[:, None] & (t < tokens)[None, :]
        if ADD:
            residual = add + c[:, None] + t.to(tl.int64)[None, :] * add_stride
            acc += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + c[:, None] + t.to(tl.int64)[None, :] * out_stride, acc, mask=inside)


def streaming(
    x: Tensor,  # [T, k]
    x_scale: Tensor | None,  # [T, k / 128]
    w: Tensor,  # [n, k], as it lies in memory
    w_scale: Tensor | None,  # [ceil(n / 128), k / 128]
    out: Tensor,  # [T, n]
    add: Tensor | None,
    scratch: LinearScratch | None,
    tile: dict,
) -> None:
    (tokens, k), n = x.shape, len(w)
    bm, bn, bk = tile["BM"], tile["BN"], tile["BK"]
    tiles = cdiv(tokens, bm) * cdiv(n, bn)
    splits = 1 if scratch is None else tile["splits"]
    LinearScratch.check(splits, tiles, bm, bn)
    if k % bk or (x_scale is not None and (bk != GROUP or GROUP % bn)):
        raise ValueError(f"a tile of {bn} columns by {bk} of K does not fit K = {k} and its scales")
    tma, pdl = bool(tile.get("tma")) and loaded_by_tma(x) and loaded_by_tma(w), bool(tile.get("pdl"))
    operands = (TensorDescriptor.from_tensor(x, [bm, bk]), TensorDescriptor.from_tensor(w, [bn, bk])) if tma else (x, w)
    _streaming[(tiles, splits)](
        operands[0], x_scale, operands[1], w_scale, w, add, out,
        scratch.partials if scratch else None, scratch.tickets if scratch else None, tokens, n, k,
        x.stride(0), 0 if x_scale is None else x_scale.stride(0),
        w.stride(0), 0 if w_scale is None else w_scale.stride(0), 0 if add is None else add.stride(0), out.stride(0),
        x_scale is not None, add is not None, tma, pdl, tile.get("prefetch", 0),
        bm, bn, bk, splits, tile["stages"], num_warps=tile["warps"], **overlap(pdl),
    )  # fmt: skip


def loaded_by_tma(matrix: Tensor) -> bool:
    return matrix.stride(0) * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0
