from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128


@dataclass(frozen=True)
class Fp8Rows:
    """Activations: row[i] = data[i] * scale[i // GROUP]."""

    data: Tensor  # e4m3 [..., width], width a multiple of GROUP
    scale: Tensor  # float32 [..., width / GROUP]

    @staticmethod
    def empty(
        rows: int, width: int, device: torch.device | str, dtype: torch.dtype = torch.float8_e4m3fn,
        new: Callable[..., Tensor] = torch.empty,
    ) -> Fp8Rows:  # fmt: skip
        return Fp8Rows(
            new(rows, width, dtype=dtype, device=device),
            new(rows, width // GROUP, dtype=torch.float32, device=device),
        )

    def __getitem__(self, rows: slice) -> Fp8Rows:
        return Fp8Rows(self.data[rows], self.scale[rows])


@dataclass(frozen=True)
class Fp8Blocks:
    """A weight, input-major as all weights here: w[i, o] = data[i, o] * scale[i // GROUP, o // GROUP].

    On a GPU both are transposed views of what the checkpoint holds ([out, in], `weight_scale_inv`): the input's
    dimension is the contiguous one. A leading dimension holds a stack of experts.
    """

    data: Tensor  # e4m3 [..., in, out]
    scale: Tensor  # float32 [..., ceil(in / GROUP), ceil(out / GROUP)]

    @staticmethod
    def empty(shape: Sequence[int], device: torch.device | str) -> Fp8Blocks:
        return Fp8Blocks(
            torch.empty(*shape, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(*scale_shape(shape), dtype=torch.float32, device=device),
        )

    def copy_(self, other: Fp8Blocks) -> None:
        self.data.copy_(other.data)
        self.scale.copy_(other.scale)


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the scales of [..., in, out]."""
    *stack, rows, columns = shape
    return *stack, -(-rows // GROUP), -(-columns // GROUP)


def quantise_rows(x: Tensor, out: Fp8Rows) -> None:
    """out.scale = max |group| / the format's largest number; out.data = x / scale, rounded to nearest even.

    Reference: the 1x128 activation tiles of DeepSeek-V3's report, section 3.3.2.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    # A group of zeros has any scale; this one keeps the division finite.
    scale = groups.abs().amax(-1).clamp_min(1e-10) / torch.finfo(out.data.dtype).max
    out.scale.copy_(scale)
    out.data.copy_((groups / scale.unsqueeze(-1)).flatten(-2))


def quantise_blocks(w: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Fp8Blocks:
    """[..., in, out], both of any length: the edge blocks are smaller. The result has the memory order of `w`."""
    rows, columns = w.shape[-2:]
    padded = F.pad(w.float(), (0, -columns % GROUP, 0, -rows % GROUP))
    blocks = padded.unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, GROUP))  # [..., R, GROUP, C, GROUP]
    # A tensor's division: CUDA multiplies by the reciprocal of a number, and a checkpoint's codes shall be the same.
    largest = blocks.abs().amax((-3, -1)).clamp_min(1e-10)
    scale = largest / torch.full_like(largest, torch.finfo(dtype).max)  # [..., R, C]
    data = torch.empty_like(w, dtype=dtype)
    data.copy_((padded / _spread(scale))[..., :rows, :columns])
    order = torch.empty_like(w[..., :1, :1].expand_as(scale), dtype=torch.float32)
    return Fp8Blocks(data, order.copy_(scale) if w.is_contiguous() else scale.mT.contiguous().mT)


def dequantise(w: Fp8Blocks | Fp8Rows) -> Tensor:
    """float32"""
    if isinstance(w, Fp8Rows):
        return (w.data.float().unflatten(-1, (-1, GROUP)) * w.scale.unsqueeze(-1)).flatten(-2)
    rows, columns = w.data.shape[-2:]
    return w.data.float() * _spread(w.scale)[..., :rows, :columns]


def _spread(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(GROUP, -1).repeat_interleave(GROUP, -2)
