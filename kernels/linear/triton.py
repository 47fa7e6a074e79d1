from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kernels.linear.library import product, scaled_product, scales_fit
from kernels.linear.naive import LinearScratch
from kernels.linear.streaming import streaming
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows
from kernels.target import INTERPRETED, Target, current, measured_tile

MOST_SPLITS = 16
STREAMED = 128  # tokens up to which reading the weights bounds an fp8 product
PREFETCHED = 16 << 20  # bytes that a launch may ask the L2 for before its turn
LIBRARY = {"library": 1}


def linear(
    x: Tensor | Fp8Rows,  # [T, k], rows may lie apart
    w: Tensor | Fp8Blocks,  # [k, n], k contiguous
    out: Tensor,  # [T, n], rows may lie apart
    *,
    add: Tensor | None = None,
    scratch: LinearScratch | None = None,
    tile: dict | None = None,
) -> None:
    """Three ways, which a tile's keys tell apart: a library's product ("library"), the kernel for many tokens on sm_90
    ("N0"), and the one that streams the weights ("splits")."""
    if isinstance(x, Fp8Rows) is not isinstance(w, Fp8Blocks):
        raise TypeError(f"both operands in 8 bits or neither: {type(x).__name__}, {type(w).__name__}")
    rows = x.data if isinstance(x, Fp8Rows) else x
    (tokens, k), n = rows.shape, out.shape[1]
    if not tokens:
        return
    if tile is None:
        tile = measured_tile(Path(__file__).parent, shape_name(n, k, rows.dtype), tokens)
        if tile is None or not _takes(tile, x, out, add, scratch):
            tile = tile_rule(tokens, n, k, rows.dtype, _stored_by_tma(out))
    if isinstance(x, Tensor) or isinstance(w, Tensor):
        assert isinstance(x, Tensor) and isinstance(w, Tensor)
        if "library" in tile:
            product(x, w, out, add)
        else:
            streaming(x, None, w.T, None, out, add, scratch, tile)
    elif "library" in tile:
        assert scratch is not None
        scaled_product(x, w, out, scratch)
    elif "N0" in tile:
        from kernels.linear.hopper import many_tokens  # Gluon, which neither the interpreter nor AMD runs

        many_tokens(x, w, out, add, tile, current().processors)
    else:
        streaming(x.data, x.scale, w.data.T, w.scale.T, out, add, scratch, tile)


def shape_name(n: int, k: int, dtype: torch.dtype) -> str:
    """The key of tiles.json."""
    return f"{n}x{k} {str(dtype).removeprefix('torch.')}"


def _takes(tile: dict, x: Tensor | Fp8Rows, out: Tensor, add: Tensor | None, scratch: LinearScratch | None) -> bool:
    """Whether a tile that was measured without residual, on whole tensors, serves here."""
    if "N0" in tile:
        return _stored_by_tma(out)
    if "library" in tile and isinstance(x, Fp8Rows):
        return scales_fit(len(x.data), x.data.shape[1], add, scratch)
    return True


def _stored_by_tma(out: Tensor) -> bool:
    return out.dtype.itemsize == 2 and out.stride(0) % 8 == 0 and out.data_ptr() % 16 == 0


def tile_rule(tokens: int, n: int, k: int, dtype: torch.dtype, stored_by_tma: bool = True) -> dict:
    """The tile where none was measured."""
    target = current()
    if INTERPRETED:
        return stream_tile(tokens, n, k, dtype.itemsize, target) | {"tma": 0, "pdl": 0, "prefetch": 0}
    hopper = target.arch == "sm_90"
    if dtype.itemsize > 1:
        streamed = hopper and tokens <= 16 and dtype.itemsize == 2
        return stream_tile(tokens, n, k, dtype.itemsize, target) if streamed else LIBRARY
    full = -(-tokens // 128) * -(-n // 128) >= 0.75 * target.processors
    if hopper and tokens > STREAMED and full and stored_by_tma:
        return many_tile(tokens, n, target)
    return stream_tile(tokens, n, k, 1, target)


def many_tile(tokens: int, n: int, target: Target) -> dict:
    """The width whose waves leave the fewest processors idle; narrow tiles ask more of the L2."""

    def time(width: int) -> float:
        waves = -(-(-(-tokens // 128) * -(-n // width)) // target.processors)
        return waves * (width + 16) * {256: 1.0, 192: 1.03, 128: 1.1}[width]

    width = min((256, 192, 128), key=time)
    n0, n1 = {256: (128, 128), 192: (128, 64), 128: (128, 0)}[width]
    return {"N0": n0, "N1": n1, "stages": 5 if width == 128 else 4, "deep": 16}


def stream_tile(tokens: int, n: int, k: int, itemsize: int, target: Target) -> dict:
    """One wave of at most two programs a processor, each with the same share of the weights."""
    slots = 2 * target.processors
    bk = GROUP // itemsize  # 128 bytes, a row of TMA's swizzle
    bm = min(max(16, 1 << (tokens - 1).bit_length()), 128)
    deep = -(-tokens // bm)
    bn = 64 if deep * -(-n // 64) <= slots else 128
    tiles = deep * -(-n // bn)
    room = LinearScratch.PARTIALS // (tiles * bm * bn)
    splits = max(1, min(MOST_SPLITS, slots // tiles, room, k // bk // 4))
    if not target.arch.startswith("sm"):
        return {"BM": bm, "BN": bn, "BK": bk, "splits": splits, "stages": 2, "warps": 4}
    stages = min(8, (target.shared // 2 - 2048) // ((bm + bn) * GROUP + 4 * bm + 32))
    ahead = PREFETCHED // (n * splits * GROUP) * bk
    return {"BM": bm, "BN": bn, "BK": bk, "splits": splits, "stages": stages, "warps": 8 if bm == 128 else 4,
            "tma": 1, "pdl": 1, "prefetch": ahead}  # fmt: skip
