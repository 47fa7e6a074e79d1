"""How the router's launches are cut. A product's tile is BN experts by BM tokens by BK of hidden, `steps` of them a
program; `choose_warps` belongs to the launch after it."""

from __future__ import annotations

import torch

from kernels.route.naive import ROWS
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import current, measured_tile

FEW = 256  # tokens of a decode step


def tile_for(tokens: int, hidden: int, experts: int, x_dtype: torch.dtype, w_dtype: torch.dtype) -> dict[str, int]:
    measured = measured_tile(__file__, shape_name(hidden, experts, w_dtype), tokens)
    return measured or tile_rule(tokens, hidden, experts, max(x_dtype.itemsize, w_dtype.itemsize) > 2)


def shape_name(hidden: int, experts: int, w_dtype: torch.dtype) -> str:
    """As tiles.json knows it."""
    return f"{hidden}x{experts} {str(w_dtype).removeprefix('torch.')}"


def tile_rule(tokens: int, hidden: int, experts: int, wide: bool) -> dict[str, int]:
    """Enough splits of hidden to fill the grid. `wide`: float32 operands."""
    hopper = current().arch == "sm_90"
    if tokens <= FEW:
        bm, bn = (16 if tokens <= 16 else 32 if tokens <= 32 or wide else 64), 64
        bk, stages = (64, 2) if wide else (256, 3) if hopper else (128, 2)
    else:
        bm, bn = 128, min(128, max(64, next_power_of_2(experts)))
        bk, stages = 32 if wide else 64, 4 if hopper else 2
    programs = max(1, current().processors // (cdiv(experts, bn) * cdiv(tokens, bm)))
    if tokens > FEW:  # a kernel each: prefills of any length make do with a few
        programs = 1 << (programs.bit_length() - 1)
    steps = cdiv(cdiv(hidden, bk), programs)
    warps = 8 if wide or bm * bn > 8192 else 4
    return {"BM": bm, "BN": bn, "BK": bk, "steps": steps, "warps": warps, "stages": stages, "choose_warps": 1}


def candidates(tokens: int, hidden: int, experts: int) -> list[dict[str, int]]:
    """What is worth measuring on an H200, in bf16."""
    found = []
    few = tokens <= FEW
    best = max(16, min(64, next_power_of_2(tokens)))
    for bm in {best, max(16, best // 2)} if few else {64, 128}:
        for bn, bk in ((32, 256), (64, 128), (64, 256), (128, 128)) if few else ((128, 64), (256, 64)):
            blocks, tiles = cdiv(hidden, bk), cdiv(experts, bn) * cdiv(tokens, bm)
            for steps in {cdiv(blocks * tiles, programs) for programs in (132, 264)}:
                if bn > 2 * experts or cdiv(blocks, steps) * tokens > ROWS:
                    continue
                tile = {"BM": bm, "BN": bn, "BK": bk, "steps": steps, "warps": 8 if bm * bn > 8192 else 4}
                found += [
                    tile | {"stages": 3 if few else 4, "choose_warps": warps} for warps in ((1, 2) if few else (1,))
                ]
    return found
