"""The tiles worth measuring on sm_90."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.linear.naive import LinearScratch
from kernels.linear.triton import LIBRARY, STREAMED, many_tile, stream_tile
from kernels.quant.naive import GROUP
from kernels.target import current


def candidates(tokens: int, n: int, k: int, dtype: torch.dtype) -> list[dict]:
    found = list(_streaming(tokens, n, k, dtype.itemsize)) if tokens <= 2048 else []
    if dtype.itemsize > 1:
        return [LIBRARY, *found]
    if tokens >= STREAMED:
        found += list(_many(tokens, n))
    return [*found, LIBRARY] if tokens > STREAMED and k % (4 * GROUP) == 0 else found


def _many(tokens: int, n: int) -> Iterator[dict]:
    yield many_tile(tokens, n, current())
    for n0, n1, stages in [(128, 128, 4), (128, 64, 4), (128, 0, 5), (128, 0, 6), (64, 0, 6), (64, 0, 8)]:
        for deep in (4, 8, 16, 32):
            if deep == 4 or deep * GROUP < 2 * tokens:
                yield {"N0": n0, "N1": n1, "stages": stages, "deep": deep}


def _streaming(tokens: int, n: int, k: int, itemsize: int) -> Iterator[dict]:
    target = current()
    rule = stream_tile(tokens, n, k, itemsize, target)
    yield rule
    for bn in (64, 128):
        tiles = -(-tokens // rule["BM"]) * -(-n // bn)
        room = LinearScratch.PARTIALS // (tiles * rule["BM"] * bn)
        most = max(1, min(room, k // rule["BK"] // 2))
        # One to four programs a processor, and no more than a wave of them.
        for programs in (1, 2, 3, 4):
            splits = min(most, programs * target.processors // tiles)
            if splits < 1 or (programs > 1 and splits == min(most, (programs - 1) * target.processors // tiles)):
                continue
            stage = (rule["BM"] + bn) * GROUP + 4 * rule["BM"] + 32
            fit = (target.shared // programs - 2048) // stage
            for stages in sorted({min(fit, 4), min(fit, 8)}):
                if stages < 3:
                    continue
                ahead = (16 << 20) // (n * splits * GROUP) * rule["BK"]
                for pdl, prefetch in ((1, ahead), (1, 0), (0, 0)):
                    yield rule | {"BN": bn, "splits": splits, "stages": stages, "pdl": pdl, "prefetch": prefetch}
