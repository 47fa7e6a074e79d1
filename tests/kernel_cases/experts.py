from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.experts.tiles import candidates, one_launch, tile_rule
from kernels.experts.triton import grouped_ffn, sum_slots
from kernels.experts.work import ExpertWork
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows
from kernels.target import current
from tests.kernel_cases import Case

HELD = 2  # of the tensors; tiles are those of the shape that a case names


def stack(rows: int, columns: int, fp8: bool) -> Tensor | Fp8Blocks:
    if not fp8:
        return torch.empty(HELD, columns, rows, dtype=torch.bfloat16).mT
    scale = torch.empty(HELD, columns // GROUP, rows // GROUP).mT
    return Fp8Blocks(torch.empty(HELD, columns, rows, dtype=current().fp8).mT, scale)


def launch(hidden: int, inter: int, topk: int, fp8: bool, tile: dict, shared: int = 0, parts: int = 1) -> None:
    """`inter` and `topk` of a part."""
    tokens = tile["rows"] if "both" in tile else 16
    x: Tensor | Fp8Rows = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    work = ExpertWork.empty(tokens, topk, HELD, hidden, inter, False, "cpu", tile=tile, shared=shared)
    if fp8:
        x = Fp8Rows.empty(tokens, hidden, "cpu", current().fp8)
        act = Fp8Rows.empty(tokens * topk, inter, "cpu", current().fp8)
        gathered = torch.empty(tokens * topk, hidden, dtype=current().fp8)
        work = replace(work, act=act, gathered=gathered)
    gate_up, down = stack(hidden, 2 * inter * parts, fp8), stack(inter * parts, hidden, fp8)
    part = grouped_ffn(x, torch.empty(tokens, topk), gate_up, down, work)
    sum_slots(part, torch.empty(tokens, hidden, dtype=torch.bfloat16))


R1 = 7168, 2048, 8, True
V2_LITE = 2048, 1408, 6, False


def case(name: str, shape: tuple[int, int, int, bool], experts: int, tokens: int) -> Case:
    hidden, inter, topk, fp8 = shape
    hot = tokens * topk <= 24 * experts
    return Case(
        f"{name}, {tokens} tokens", lambda: launch(*shape, tile_rule(tokens, topk, experts, hidden, inter, fp8), 1), hot
    )


CASES = [case("R1", R1, 256, tokens) for tokens in (1, 512, 1024, 4096)]
CASES += [case("V2-Lite", V2_LITE, 64, tokens) for tokens in (1, 256, 512, 1024)]
if current().arch == "sm_90":
    CASES += [
        Case(
            f"{name}, one launch of {rows}",
            lambda shape=shape, rows=rows: launch(*shape, one_launch(rows, shape[3], rows=rows), 1),
            hot=True,
        )
        for name, shape, most in (("R1", R1, 32), ("V2-Lite", V2_LITE, 64))
        for rows in (8, 16, 32, 64)
        if rows <= most
    ]
    CASES += [
        Case(
            f"{name}, in parts",
            lambda shape=shape, rows=rows: launch(*shape, one_launch(rows, shape[3], every=True), 1, parts=9),
            hot=True,
        )
        for name, shape in (("R1", (7168, 2048, 9, True)), ("V2-Lite", (2048, 1216, 9, False)))
        for rows in (8, 32)
    ]


def candidate_cases() -> list[Case]:
    """Every tile that the tuner would measure, to be compiled when `candidates` is changed."""
    return [
        Case(f"{name} {tile}", lambda shape=shape, tile=tile: launch(*shape, tile))
        for name, shape, experts in (("R1", R1, 256), ("V2-Lite", V2_LITE, 64))
        for tokens in (1, 128, 1024, 4096)
        for tile in candidates(tokens, shape[2], experts, shape[3])
    ]
