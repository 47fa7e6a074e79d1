"""Which tile a product gets where none was measured."""

from __future__ import annotations

import torch

from kernels.linear.naive import LinearScratch
from kernels.quant.naive import GROUP
from kernels.target import INTERPRETED, Target, current

MOST_SPLITS = 16
STREAMED = 128  # tokens up to which reading the weights bounds an fp8 product
PREFETCHED = 16 << 20  # bytes that a launch may ask the L2 for before its turn
LIBRARY = {"library": 1}
ROWS = 64  # columns of w that are a warpgroup's in the ring's kernel
HIGH = 64  # tokens that one takes there at most


def tile_rule(
    tokens: int, n: int, k: int, dtype: torch.dtype, stored_by_tma: bool = True, ring_takes: bool = True
) -> dict:
    """The tile where none was measured."""
    target = current()
    if INTERPRETED:
        return stream_tile(tokens, n, k, dtype.itemsize, target) | {"tma": 0, "pdl": 0, "prefetch": 0}
    hopper = target.arch == "sm_90"
    if hopper and ring_takes and tokens <= (HIGH if dtype.itemsize == 1 else 16):
        return ring_tile(tokens, n, k, dtype.itemsize, target)
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


def ring_tile(tokens: int, n: int, k: int, itemsize: int, target: Target) -> dict:
    """What `ring_time` thinks fastest."""
    tiles = ring_tiles(tokens, n, k, itemsize, target)
    return min(tiles, key=lambda tile: ring_time(tile, tokens, n, k, itemsize, target))


def ring_tiles(tokens: int, n: int, k: int, itemsize: int, target: Target) -> list[dict]:
    """One program a processor, or room for two: then the next launch's fill their rings while this one's still run."""
    bm = max(8, 1 << (tokens - 1).bit_length())
    high = min(bm, HIGH)
    found: list[dict] = []
    for width in (1, 2, 3, 4):
        groups, columns = width * (bm // high), -(-n // (width * ROWS))
        if groups > (4 if bm <= 16 else 3):
            continue  # the accumulators would not fit
        for resident in (2, 1) if groups == 1 or (groups < 4 and bm <= 16) else (1,):
            block = GROUP * (width * ROWS + bm)
            fit = (target.shared // resident - 1024 - 2300 * groups) // (block + 16)
            deep = 2 if fit >= 8 and (groups < 3 or bm <= 32) else 1  # both products of a step are in registers
            blocks = -(-k * itemsize // (GROUP * deep))
            most = min(MOST_SPLITS, blocks, LinearScratch.PARTIALS // (columns * width * ROWS * bm))
            slots = resident * target.processors // columns
            found += [
                {"ring": min(fit // deep, -(-blocks // splits)), "BM": bm, "width": width, "splits": splits,
                 "deep": deep, "resident": resident}
                for splits in sorted({max(1, min(most, part)) for part in (slots, slots // 2, slots // 4)})
            ]  # fmt: skip
    return found


def ring_time(tile: dict, tokens: int, n: int, k: int, itemsize: int, target: Target) -> float:
    """Microseconds on an H200: what one processor fetches at 45 KB/us, or all weights at 4.4 TB/s; a new start for each
    further wave; and where K is split, the partial sums to the L2 and back and three turns that wait for each other."""
    width, splits = tile["width"], tile["splits"]
    programs = -(-n // (width * ROWS)) * splits
    share = -(-k * itemsize // (GROUP * tile["deep"] * splits)) * GROUP * tile["deep"]
    fetched = -(-programs // target.processors) * (width * ROWS + tokens) * share
    waves = -(-programs // (target.processors * tile["resident"]))
    tail = 2.1 + splits * 4 * width * ROWS * tile["BM"] / 45e3 if splits > 1 else 0.0
    return max(fetched / 45e3, n * k * itemsize / 4.4e6) + 1.5 * (waves - 1) + tail
