"""The 8-bit format of DeepSeek's checkpoints: e4m3 with one float32 scale a 128x128 block of a weight, a 1x128 group of
an activation."""

from torch import Tensor

from kernels.quant import naive
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows, dequantise, quantise_blocks

__all__ = ["GROUP", "Fp8Blocks", "Fp8Rows", "dequantise", "quantise_blocks", "quantise_rows"]


def quantise_rows(x: Tensor, out: Fp8Rows) -> None:
    """`x` [T, width] to one scale a group of 128 columns."""
    if x.is_cuda:
        from kernels.quant import triton

        triton.quantise_rows(x, out)
    else:
        naive.quantise_rows(x, out)
