from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.sample.finish import finish
from kernels.sample.naive import Logprobs, Penalties, SampleParams
from kernels.sample.nucleus import TRIES, weigh
from kernels.sample.scan import scan
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import INTERPRETED, current, measured_tile, overlap, overlaps

GROUP = 32  # tokens whose maximum is kept: one line of memory, one word of a mask
CHUNK = 128  # groups that the last launch holds in registers
LEAST_BLOCK = 1024
BANS = 128  # of all rows: up to so many do not make a kernel compile anew


@dataclass(frozen=True)
class SampleScratch:
    """What a launch leaves for the next ones, for up to S rows."""

    best: Tensor  # float32 [S, blocks]: a block's best score, or of a filtered row its best logit
    best_id: Tensor  # int32 [S, blocks], and its token
    mass: Tensor  # float32 [S, blocks]: of a filtered row, relative to its best
    maxima: Tensor  # float32 [S, groups]: of a filtered row
    raw_best: Tensor  # the same of the model's own logits, where logprobs are wanted
    raw_mass: Tensor
    raw_maxima: Tensor
    found: Tensor  # int32 [S, groups], of the last launch alone
    scores: Tensor  # float32 [S, blocks]: of a row with top_p alone, the best score of each block
    values: Tensor  # and its logit
    above: Tensor  # float32 [S, parts, TRIES], see nucleus.py

    @staticmethod
    def empty(rows: int, vocab: int, device: torch.device | str) -> SampleScratch:
        def numbers(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        blocks, groups = cdiv(vocab, LEAST_BLOCK), cdiv(vocab, GROUP)
        return SampleScratch(
            numbers(blocks), numbers(blocks, torch.int32), numbers(blocks), numbers(groups),
            numbers(blocks), numbers(blocks), numbers(groups), numbers(groups, torch.int32),
            numbers(blocks), numbers(blocks), numbers(blocks * TRIES.value),
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def tile_rule() -> dict[str, int]:
    """The same for any number of rows, so that a row's sums do not depend on the batch. A block of one warp needs no
    barrier. PART: tokens that a program of nucleus.py weighs."""
    return {"BLOCK": 1024, "warps": 1, "maxnreg": 168, "PART": 8192, "weigh_warps": 8, "finish_warps": 8}


def candidates() -> list[dict[str, int]]:
    first = [(1024, 1, 128), (1024, 1, 168), (1024, 2, 128), (2048, 2, 168), (2048, 4, 128)]
    last = [(4096, 4, 8), (8192, 8, 8), (4096, 4, 4), (4096, 4, 16)]
    names = "BLOCK", "warps", "maxnreg", "PART", "weigh_warps", "finish_warps"
    return [dict(zip(names, (*a, *b), strict=True)) for a in first for b in last]


def shape_name(logits: Tensor) -> str:
    return f"vocab {logits.shape[1]} {str(logits.dtype).removeprefix('torch.')}"


def sample(
    logits: Tensor,
    params: SampleParams | None,
    out: Tensor,
    banned: tuple[Tensor, Tensor] | None,
    penalties: Penalties | None,
    mask: Tensor | None,
    logs: Logprobs | None,
    scratch: SampleScratch,
    tile: dict[str, int] | None = None,
) -> None:
    rows, vocab = logits.shape
    if not rows:
        return
    tile = tile or measured_tile(__file__, shape_name(logits), 0) or tile_rule()
    blocks, groups = cdiv(vocab, tile["BLOCK"]), cdiv(vocab, GROUP)
    bans = None if banned is None or not len(banned[0]) else (*banned, 2 * len(banned[0]) + 1)
    most_bans = max(BANS, next_power_of_2(len(banned[0]))) if banned is not None and bans else 1
    inputs = (
        logits, logits.stride(0), vocab,
        None if penalties is None else tuple(getattr(penalties, field.name) for field in fields(penalties)), mask, bans,
    )  # fmt: skip
    rules = None if params is None else tuple(getattr(params, field.name) for field in fields(params))
    wanted = tops = None
    if logs is not None:
        wanted, tops = logs.wanted, (logs.chosen, logs.ids, logs.values, logs.ids.shape[1])
    approx, pdl = not INTERPRETED and current().arch.startswith("sm"), overlaps()
    block, padded = tile["BLOCK"], next_power_of_2(blocks)
    part = max(1, tile["PART"] // block)  # blocks
    parts = cdiv(blocks, part)
    early: dict = {"PDL": pdl} | overlap(pdl)
    scan[(blocks, rows)](
        inputs, rules, wanted, scratch.tensors(), most_bans, approx, GROUP, block,
        min(32 * tile["warps"], block // 4), num_warps=tile["warps"], **early,
        **({"maxnreg": tile["maxnreg"]} if pdl and penalties is None and mask is None else {}),
    )  # fmt: skip
    if rules is not None:
        weigh[(rows, parts)](
            inputs, rules, scratch.tensors(), blocks, most_bans, block, padded, part,
            num_warps=tile["weigh_warps"], **early,
        )  # fmt: skip
    finish[(rows,)](
        inputs, rules, out, wanted, tops, scratch.tensors(), blocks, parts, most_bans, approx, GROUP, block, padded,
        next_power_of_2(parts), next_power_of_2(groups), CHUNK, num_warps=tile["finish_warps"], **early,
    )  # fmt: skip
