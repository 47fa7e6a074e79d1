from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear.library import product, scaled_product, scales_fit
from kernels.linear.naive import LinearScratch
from kernels.linear.streaming import loaded_by_tma, streaming
from kernels.linear.tiles import tile_rule
from kernels.quant.naive import Fp8Blocks, Fp8Rows
from kernels.target import current, measured_tile


def linear(
    x: Tensor | Fp8Rows,  # [T, k], rows may lie apart
    w: Tensor | Fp8Blocks,  # [k, n], k contiguous
    out: Tensor,  # [T, n], rows may lie apart
    *,
    add: Tensor | None = None,
    scratch: LinearScratch | None = None,
    tile: dict | None = None,
) -> None:
    """Four ways, which a tile's keys tell apart: a library's product ("library"), the kernels for many and for few
    tokens on sm_90 ("N0", "ring"), and the portable one, which streams the weights ("BN")."""
    if isinstance(x, Fp8Rows) is not isinstance(w, Fp8Blocks):
        raise TypeError(f"both operands in 8 bits or neither: {type(x).__name__}, {type(w).__name__}")
    rows = x.data if isinstance(x, Fp8Rows) else x
    (tokens, k), n = rows.shape, out.shape[1]
    given = w.data.shape if isinstance(w, Fp8Blocks) else w.shape
    if given != (k, n) or len(out) != tokens:
        raise ValueError(f"[{tokens}, {k}] x {list(given)} does not give {list(out.shape)}")
    if not tokens:
        return
    if tile is None:
        tile = measured_tile(__file__, shape_name(n, k, rows.dtype), tokens)
        if tile is None or not _takes(tile, x, w, out, add, scratch):
            tile = tile_rule(tokens, n, k, rows.dtype, _stored_by_tma(out), _ring_takes(x, w, out, add))
    if isinstance(x, Tensor) or isinstance(w, Tensor):
        assert isinstance(x, Tensor) and isinstance(w, Tensor)
        if "library" in tile:
            product(x, w, out, add)
        else:
            _stream(x, None, w.T, None, out, add, scratch, tile)
    elif "library" in tile:
        assert scratch is not None
        scaled_product(x, w, out, scratch)
    elif "N0" in tile:
        from kernels.linear.hopper import many_tokens  # Gluon, which neither the interpreter nor AMD runs

        many_tokens(x, w, out, add, tile, current().processors)
    else:
        _stream(x.data, x.scale, w.data.T, w.scale.T, out, add, scratch, tile)


def _stream(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, out: Tensor, add: Tensor | None,
    scratch: LinearScratch | None, tile: dict,
) -> None:  # fmt: skip
    if "ring" in tile:
        from kernels.linear.few import few_tokens  # Gluon too

        few_tokens(x, x_scale, w, w_scale, out, add, scratch, tile)
    else:
        streaming(x, x_scale, w, w_scale, out, add, scratch, tile)


def shape_name(n: int, k: int, dtype: torch.dtype) -> str:
    """The key of tiles.json."""
    return f"{n}x{k} {str(dtype).removeprefix('torch.')}"


def _takes(
    tile: dict, x: Tensor | Fp8Rows, w: Tensor | Fp8Blocks, out: Tensor, add: Tensor | None,
    scratch: LinearScratch | None,
) -> bool:  # fmt: skip
    """Whether a tile that was measured without residual, on whole tensors, serves here."""
    if "ring" in tile:
        return _ring_takes(x, w, out, add)
    if "N0" in tile:
        return _stored_by_tma(out)
    if "library" in tile and isinstance(x, Fp8Rows):
        return scales_fit(len(x.data), x.data.shape[1], add, scratch)
    return True


def _ring_takes(x: Tensor | Fp8Rows, w: Tensor | Fp8Blocks, out: Tensor, add: Tensor | None) -> bool:
    rows, columns = (x.data if isinstance(x, Fp8Rows) else x), (w.data if isinstance(w, Fp8Blocks) else w)
    narrow = rows.itemsize <= 2 and out.itemsize == 2 and (add is None or add.itemsize == 2)
    return narrow and loaded_by_tma(rows) and loaded_by_tma(columns.T)


def _stored_by_tma(out: Tensor) -> bool:
    return out.dtype.itemsize == 2 and loaded_by_tma(out)
