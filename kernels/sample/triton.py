from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import triton
from torch import Tensor

from kernels.sample.finish import finish
from kernels.sample.naive import Logprobs, Penalties, SampleParams
from kernels.sample.scan import scan
from kernels.target import INTERPRETED, current, measured_tile

GROUP = 32  # tokens whose maximum is kept: one line of memory, one word of a mask
CHUNK = 128  # groups that the second launch holds in registers
LEAST_BLOCK = 1024


@dataclass(frozen=True)
class SampleScratch:
    """What the first launch leaves for the second, for up to S rows."""

    best: Tensor  # float32 [S, blocks]: a block's best score, or of a filtered row its best logit
    best_id: Tensor  # int32 [S, blocks], and its token
    mass: Tensor  # float32 [S, blocks]: of a filtered row, relative to its best
    maxima: Tensor  # float32 [S, groups]: of a filtered row
    raw_best: Tensor  # the same of the model's own logits, where logprobs are wanted
    raw_mass: Tensor
    raw_maxima: Tensor
    found: Tensor  # int32 [S, groups], of the second launch alone

    @staticmethod
    def empty(rows: int, vocab: int, device: torch.device | str) -> SampleScratch:
        def numbers(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        blocks, groups = triton.cdiv(vocab, LEAST_BLOCK), triton.cdiv(vocab, GROUP)
        return SampleScratch(
            numbers(blocks), numbers(blocks, torch.int32), numbers(blocks), numbers(groups),
            numbers(blocks), numbers(blocks), numbers(groups), numbers(groups, torch.int32),
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def tile_rule(rows: int, vocab: int) -> dict[str, int]:
    """Blocks small enough that every processor has one, large enough that a row leaves few."""
    block = 4096
    while block > LEAST_BLOCK and rows * triton.cdiv(vocab, block) < 2 * current().processors:
        block //= 2
    return {"BLOCK": block, "warps": max(4, block // 512), "finish_warps": 8}


def candidates(rows: int, vocab: int) -> list[dict[str, int]]:
    shapes = ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16))
    return [
        {"BLOCK": block, "warps": warps, "finish_warps": finish_warps}
        for block, warps in shapes
        for finish_warps in (8, 16)
        if block <= max(vocab, LEAST_BLOCK)
    ]


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
    tile = tile or measured_tile(Path(__file__).parent, shape_name(logits), rows) or tile_rule(rows, vocab)
    blocks, groups = triton.cdiv(vocab, tile["BLOCK"]), triton.cdiv(vocab, GROUP)
    bans = None if banned is None or not len(banned[0]) else (*banned, len(banned[0]))
    most_bans = triton.next_power_of_2(len(banned[0])) if banned is not None and bans else 1
    inputs = (
        logits, logits.stride(0), vocab,
        None if penalties is None else tuple(getattr(penalties, field.name) for field in fields(penalties)), mask, bans,
    )  # fmt: skip
    rules = None if params is None else tuple(getattr(params, field.name) for field in fields(params))
    wanted = tops = None
    if logs is not None:
        wanted, tops = logs.wanted, (logs.chosen, logs.ids, logs.values, logs.ids.shape[1])
    approx = not INTERPRETED and current().arch.startswith("sm")
    scan[(blocks, rows)](
        inputs, rules, wanted, scratch.tensors(), most_bans, approx, GROUP, tile["BLOCK"], num_warps=tile["warps"]
    )
    finish[(rows,)](
        inputs, rules, out, wanted, tops, scratch.tensors(), blocks, most_bans, approx, GROUP,
        triton.next_power_of_2(blocks), triton.next_power_of_2(groups), CHUNK, num_warps=tile["finish_warps"],
    )  # fmt: skip
