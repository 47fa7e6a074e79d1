"""The 8-bit format of DeepSeek's checkpoints: e4m3 with one float32 scale a 128x128 block of a weight, a 1x128 group of
an activation."""

import torch
from torch import Tensor

from kernels.quant import naive
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows, dequantise, scale_shape

__all__ = ["GROUP", "Fp8Blocks", "Fp8Rows", "dequantise", "quantise_blocks", "quantise_rows", "scale_shape"]


def quantise_rows(x: Tensor, out: Fp8Rows) -> None:
    """`x` [T, width] to one scale a group of 128 columns."""
    if x.is_cuda:
        from kernels.quant import triton

        triton.quantise_rows(x, out)
    else:
        naive.quantise_rows(x, out)


def quantise_blocks(w: Tensor, out: Fp8Blocks | None = None) -> Fp8Blocks:
    """`w` [..., in, out] of any lengths, to one scale a block of GROUP x GROUP, the last of a row or column smaller; in
    `out`, or in the memory order of `w`. The codes are the same on every device; NaN makes its block's scale NaN."""
    if w.is_cuda and w.dim() == 2 and w.stride(1) == 1 and _codes_e4m3():
        from kernels.quant import triton

        out = out or Fp8Blocks.empty(w.shape, w.device)
        triton.quantise_blocks(w, out)
        return out
    blocks = naive.quantise_blocks(w)
    if out is None:
        return blocks
    out.copy_(blocks)
    return out


def _codes_e4m3() -> bool:
    """Whether this GPU's own 8 bits are those of checkpoints."""
    from kernels.target import current

    return current().fp8 is torch.float8_e4m3fn
