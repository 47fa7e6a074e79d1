"""The tiles worth measuring on sm_90."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.linear.naive import LinearScratch
from kernels.linear.tiles import LIBRARY, STREAMED, many_tile, ring_tiles, ring_time, stream_tile
from kernels.quant.naive import GROUP
from kernels.target import current

RINGS = 12


def candidates(tokens: int, n: int, k: int, dtype: torch.dtype) -> list[dict]:
    found = _ring(tokens, n, k, dtype.itemsize) if tokens <= STREAMED else []
    if tokens <= 2048:
        found += _streaming(tokens, n, k, dtype.itemsize)
    if dtype.itemsize > 1:
        return [LIBRARY, *found]
    if tokens >= STREAMED:
        found += _many(tokens, n)
    return [*found, LIBRARY] if tokens > STREAMED and k % (4 * GROUP) == 0 else found


def _many(tokens: int, n: int) -> Iterator[dict]:
    yield many_tile(tokens, n, current())
    for n0, n1, stages in [(128, 128, 4), (128, 64, 4), (128, 0, 5), (128, 0, 6), (64, 0, 6), (64, 0, 8)]:
        for deep in (4, 8, 16, 32):
            if deep == 4 or deep * GROUP < 2 * tokens:
                yield {"N0": n0, "N1": n1, "stages": stages, "deep": deep}


def _ring(tokens: int, n: int, k: int, itemsize: int) -> list[dict]:
    """Those of the least predicted time, and the first three in steps of one block instead of two."""
    target = current()
    tiles = ring_tiles(tokens, n, k, itemsize, target)
    tiles = sorted(tiles, key=lambda tile: ring_time(tile, tokens, n, k, itemsize, target))[:RINGS]
    return tiles + [tile | {"deep": 1, "ring": 2 * tile["ring"]} for tile in tiles[:3] if tile["deep"] == 2]


def _streaming(tokens: int, n: int, k: int, itemsize: int) -> Iterator[dict]:
    """One to four programs a processor, and no more than a wave of them."""
    target = current()
    rule = stream_tile(tokens, n, k, itemsize, target) | {"prefetch": 0}
    yield rule
    for bn in (64, 128):
        tiles = -(-tokens // rule["BM"]) * -(-n // bn)
        room = LinearScratch.PARTIALS // (tiles * rule["BM"] * bn)
        most = max(1, min(room, k // rule["BK"] // 2))
        for programs in (1, 2, 3, 4):
            splits = min(most, programs * target.processors // tiles)
            if splits < 1 or (programs > 1 and splits == min(most, (programs - 1) * target.processors // tiles)):
                continue
            stage = (rule["BM"] + bn) * GROUP + 4 * rule["BM"] + 32
            fit = (target.shared // programs - 2048) // stage
            for stages in sorted({min(fit, 4), min(fit, 8)}):
                if stages >= 3:
                    yield rule | {"BN": bn, "splits": splits, "stages": stages}
