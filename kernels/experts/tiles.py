"""Which tiles the grouped products take.

A tile is {"rows", "gate_up", "down"}: the rows of a block of the plan, and of each launch
  BN, BK    rows of a strip of weights (a tile has two), and elements of K a step
  SWAP      weights on the M side of the product
  TMA, PDL  on sm_90: weights by TMA descriptors; overlap with the launches before and after
  warps, stages
  per_sm    programs a processor, each walking over its tiles; 0: a program a tile, dealt out by the hardware
  prefetch  bytes of each of its first tile's rows that the second launch asks the L2 for while it waits
or, for hopper.py: stages, and deep, how many blocks lie side by side in the order of tiles.
For few.py a tile is {"rows", "both"}: the stages of its one launch, and rows 8, 16, 32 or 64; with 8 there are no more
tokens than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kernels.quant.naive import GROUP
from kernels.sizes import next_power_of_2
from kernels.target import INTERPRETED, current, measured_tile

Tile = dict[str, Any]


def shape_name(topk: int, held: int, hidden: int, inter: int, fp8: bool) -> str:
    """As tiles.json knows it."""
    return f"{'fp8' if fp8 else 'bf16'} {hidden}x{inter}, {held} experts, top {topk}"


def tile_for(
    tokens: int, topk: int, held: int, hidden: int, inter: int, fp8: bool, dtype: torch.dtype = torch.bfloat16,
    shared: int = 0,
) -> Tile:  # fmt: skip
    """What was measured best, else the static rule. `shared` of the held ones are every token's, and of its topk: the
    rest decides."""
    topk, held = topk - shared, held - shared
    if takes_one_launch(tokens, hidden, inter, fp8, dtype) and tokens * topk <= 16 * max(held, 1):
        return one_launch(tokens, fp8)
    measured: Tile | None = None
    if fp8 or dtype.itemsize == 2:
        measured = measured_tile(__file__, shape_name(topk, held, hidden, inter, fp8), tokens)
    return measured or tile_rule(tokens, topk, held, hidden, inter, fp8, dtype)


def takes_one_launch(tokens: int, hidden: int, inter: int, fp8: bool, dtype: torch.dtype) -> bool:
    """Whether few.py can do it, and has been measured: 1.02x to 1.08x of the best two launches (H100)."""
    strip = GROUP if fp8 else 64
    return (
        current().arch == "sm_90" and not INTERPRETED and tokens <= 128
        and hidden % (2 * strip) == inter % strip == 0 and (fp8 or dtype.itemsize == 2)
    )  # fmt: skip


def parts_of(tokens: int, hidden: int, inter: int, fp8: bool, dtype: torch.dtype) -> int:
    """Into how many equal parts an expert that all tokens take is cut: `down` of a whole one has too few tiles, and
    long ones. 1 where no few do."""
    strip, most = GROUP if fp8 else 64, 2048
    if not takes_one_launch(tokens, hidden, inter, fp8, dtype):
        return 1
    fitting = (parts for parts in range(1, 17) if inter % (parts * strip) == 0 and inter <= most * parts)
    return next(fitting, 1)


def tile_rule(
    tokens: int, topk: int, held: int, hidden: int, inter: int, fp8: bool, dtype: torch.dtype = torch.bfloat16
) -> Tile:
    """By the pairs an expert gets where routing is uniform and all of a token's experts are held."""
    mean = tokens * topk / max(held, 1)
    rows = 16 if mean <= 12 else 32 if mean <= 24 else 64 if mean <= 48 else 128
    if current().arch != "sm_90":
        return _amd(rows, fp8)
    if rows >= (64 if fp8 else 128) and takes_gathered(hidden, inter, fp8, dtype):
        # As many as an expert has: 7 % at 4,096 tokens of R1 on an H100.
        deep = 1 if mean < 256 else 2 if mean < 512 else 4
        return _gathered(deep, deep)
    if rows == 128:
        wide = _launch(BN=128, BK=128 if fp8 else 64, SWAP=0, warps=8, stages=4, per_sm=1, prefetch=0)
        return {"rows": rows, "gate_up": wide, "down": wide}
    if rows == 64:
        wide = _launch(BN=128, BK=128 if fp8 else 64, SWAP=0, warps=8, stages=5, per_sm=1, prefetch=0)
        return {"rows": rows, "gate_up": wide, "down": wide}
    narrow = _launch(BN=64, BK=128 if fp8 else 64, stages=5, warps=4, per_sm=2)
    whole_group = _launch(BN=128, BK=128, stages=3, warps=4 if rows == 16 else 8, per_sm=2)
    return {"rows": rows, "gate_up": whole_group if fp8 else narrow, "down": narrow}


def takes_gathered(hidden: int, inter: int, fp8: bool, dtype: torch.dtype) -> bool:
    """Whether hopper.py can do it."""
    return not INTERPRETED and hidden % (2 * GROUP) == inter % GROUP == 0 and (fp8 or dtype.itemsize == 2)


def _amd(rows: int, fp8: bool) -> Tile:
    # 64 KB of shared memory on gfx942, and one buffer where there are two stages.
    launch = _launch(BN=128, BK=GROUP, SWAP=0, TMA=0, warps=4 if rows < 128 else 8, stages=2)
    if not fp8:
        launch |= {"BN": 64, "BK": 64}
    return {"rows": rows, "gate_up": launch, "down": launch | {"BN": 64}}


def _gathered(gate_up: int, down: int) -> Tile:
    """For hopper.py: how deep each launch is. Stages of 48 KB."""
    return {"rows": 128, "gate_up": {"stages": 4, "deep": gate_up}, "down": {"stages": 4, "deep": down}}


def one_launch(tokens: int, fp8: bool, *, every: bool = False, rows: int = 0, stages: int = 0) -> Tile:
    """For few.py. `every`: all tokens take every expert, so that blocks of more rows read weights less often; in 8 bits
    the sums of more than 32 do not fit. A stage has two strips of weights and `rows`, each 128 bytes wide."""
    if not rows:
        most = (32 if fp8 else 64) if every else 16 if fp8 or tokens <= 32 else 32
        rows = max(8, min(most, next_power_of_2(tokens)))
    stages = stages or min(6 if fp8 else 13, (220 << 10) // ((256 if fp8 else 128) + rows) // 128)
    return {"rows": rows, "both": {"stages": stages}}


def _launch(**knobs: int) -> Tile:
    return {"SWAP": 1, "TMA": 1, "PDL": 1, "warps": 4, "per_sm": 2, "prefetch": 512} | knobs


def fit(
    tile: Mapping[str, int], rows: int, k: int, n: int, is_gate_up: bool, dtype: torch.dtype, fp8: bool
) -> dict[str, int]:
    """BN and BK cut down to powers of two that divide the shape, so that nothing is masked. In fp8 they are whole
    groups where one scale must serve a tile. On sm_90 no more stages of `rows` rows than shared memory holds: of
    float32 that is half as many."""
    width = n // 2
    bn, bk = min(tile["BN"], width & -width), min(tile["BK"], k & -k)
    if fp8:
        bk, bn = GROUP, GROUP if is_gate_up else bn
    stages, target = tile["stages"], current()
    if target.arch == "sm_90":
        stages = max(1, min(stages, target.shared // ((2 * bn + rows) * bk * dtype.itemsize)))
    return {**tile, "BN": bn, "BK": bk, "stages": stages}


def candidates(tokens: int, topk: int, held: int, fp8: bool) -> list[Tile]:
    """Tiles worth measuring on sm_90: every pair of one launch's with the other's."""
    mean = tokens * topk / max(held, 1)
    if mean > 24:
        blocks = [rows for rows in (64, 128) if mean / 4 <= rows < 8 * mean]
        if fp8:  # past 48 rows an expert hopper.py's alone
            blocks = [64] if mean <= 48 else []
        found = [(rows, _many_rows(rows, fp8, True), _many_rows(rows, fp8, False)) for rows in blocks]
    elif fp8:
        found = [(16, _fp8_gate_ups(), _streams(128))]
    else:
        found = [(16, _streams(64)[:6], _streams(64)[:6])]
        if mean > 6:
            found += [(32, _streams(64)[:4], _streams(64)[:4])]
    many = [_gathered(up, down) for up in (1, 4, 16) for down in (1, 4, 16)] if mean > 24 else []
    pairs = [(rows, up, down) for rows, ups, downs in found for up in ups for down in downs]
    return many + [{"rows": rows, "gate_up": up, "down": down} for rows, up, down in pairs]


def _fp8_gate_ups() -> list[Tile]:
    """Whole groups of 128 columns: 34 KB a stage with 16 tokens."""
    return [
        _launch(BN=128, BK=128, stages=3, per_sm=2),
        _launch(BN=128, BK=128, stages=3, per_sm=0),
        _launch(BN=128, BK=128, stages=6, per_sm=1),
        _launch(BN=128, BK=128, stages=2, per_sm=3),
        _launch(BN=128, BK=128, stages=3, per_sm=2, TMA=0),
    ]


def _streams(bk: int) -> list[Tile]:
    """18 KB a stage with 16 tokens and strips of 64 rows."""
    return [
        _launch(BN=64, BK=bk, stages=5, per_sm=2),
        _launch(BN=64, BK=bk, stages=5, per_sm=0),
        _launch(BN=128, BK=bk, stages=3, per_sm=2),
        _launch(BN=64, BK=bk, stages=3, per_sm=4),
        _launch(BN=64, BK=bk, stages=5, per_sm=2, prefetch=0),
        _launch(BN=64, BK=bk, stages=10, per_sm=1, prefetch=1024),
        _launch(BN=64, BK=bk, stages=5, per_sm=2, TMA=0),
    ]


def _many_rows(rows: int, fp8: bool, is_gate_up: bool) -> list[Tile]:
    """Strips of 128: the L2 gives about 6 TB/s, and smaller tiles would ask for more of it."""
    bk, deep = 128 if fp8 else 64, 4 if rows == 128 else 5
    found = [
        _launch(BN=128, BK=bk, SWAP=0, warps=8, stages=deep, per_sm=1, prefetch=0),
        _launch(BN=128, BK=bk, SWAP=0, warps=8, stages=3, per_sm=1, prefetch=0),
        _launch(BN=128, BK=bk, SWAP=0, warps=8, stages=deep, per_sm=0, prefetch=0),
    ]
    if rows == 64:
        found.append(_launch(BN=128, BK=bk, SWAP=1, warps=8, stages=deep, per_sm=1, prefetch=0))
    if rows == 64 and fp8:
        found.append(_launch(BN=128, BK=bk, SWAP=0, warps=4, stages=2, per_sm=2, prefetch=0))
    if not (fp8 and is_gate_up):
        found.append(_launch(BN=64, BK=bk, SWAP=0, warps=4, stages=3, per_sm=2, prefetch=0))
    return found
