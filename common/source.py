"""Where weights come from, a checkpoint or chance, behind one interface; and the two forms they are wanted in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.model_config import ModelConfig
from kernels.quant import GROUP, Fp8Blocks, dequantise, quantise_blocks

CODED = torch.float8_e4m3fn

Progress = Callable[[int, int], None]
"""(bytes done, bytes to do)."""


@dataclass(frozen=True)
class Read:
    """The tensor `name`, of the shape of `out`, into `out`: as the file has it, [out, in], each part contiguous.

    A weight in blocks of 8 bits is dequantised into a Tensor; one that is not is quantised into Fp8Blocks.
    """

    name: str
    out: Tensor | Fp8Blocks


class Source(Protocol):
    def require(self, name: str) -> None:
        """Raises ConfigError naming `name`, or its scales, if it is missing; reads nothing."""

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """On the CPU, in the dtype of the source, or float32 where that is in blocks of 8 bits. Raises ConfigError
        naming it if it is missing, unreadable or of another shape."""

    def fill(self, reads: Sequence[Read], progress: Progress | None = None) -> None:
        """All of `reads`, in any order, done when it returns. Raises ConfigError as `tensor` does."""


def open_source(folder: str | Path, config: ModelConfig, weights: str) -> Source:
    """`weights`: the setting of that name. Raises ConfigError if there is no checkpoint where one is wanted."""
    if weights == "random":
        from common.random_weights import RandomWeights

        return RandomWeights(fp8=config.fp8)
    from common.checkpoint import Checkpoint

    return Checkpoint(folder)


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, *, fp8: bool = False
) -> Tensor | Fp8Blocks:
    """[..., rows, columns] of `dtype`, or of 8 bits with one scale a block."""
    if not fp8:
        return torch.empty(*shape, dtype=dtype, device=device)
    return Fp8Blocks.empty(shape, device)


def rows_of(weight: Tensor | Fp8Blocks, first: int, end: int) -> Tensor | Fp8Blocks:
    """Rows of a [rows, columns]; of blocks, `first` is a multiple of GROUP and so is `end`, or it is the last row."""
    if isinstance(weight, Tensor):
        return weight[first:end]
    return Fp8Blocks(weight.data[first:end], weight.scale[first // GROUP : -(-end // GROUP)])


def expert_of(stack: Tensor | Fp8Blocks, slot: int) -> Tensor | Fp8Blocks:
    return stack[slot] if isinstance(stack, Tensor) else Fp8Blocks(stack.data[slot], stack.scale[slot])


def transposed(weight: Tensor | Fp8Blocks) -> Tensor | Fp8Blocks:
    """A view: what the file has as [out, in] becomes input-major, [in, out]."""
    return weight.mT if isinstance(weight, Tensor) else Fp8Blocks(weight.data.mT, weight.scale.mT)


def put(value: Tensor | Fp8Blocks, out: Tensor | Fp8Blocks) -> None:
    """out = value, in the form and dtype of `out`."""
    if isinstance(out, Tensor):
        out.copy_(dequantise(value) if isinstance(value, Fp8Blocks) else value)
    elif isinstance(value, Tensor):
        quantise_blocks(value, out)
    else:
        out.copy_(value)
