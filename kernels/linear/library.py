"""The products of well-kept libraries: cuBLAS through torch, hipBLASLt on AMD."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from kernels.linear.naive import LinearScratch
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows


def scales_fit(tokens: int, k: int, add: Tensor | None, scratch: LinearScratch | None) -> bool:
    """Whether `scaled_product` can be called: cuBLAS takes no residual, and tokens and blocks of K in fours."""
    fours = tokens % 4 == 0 and k % (4 * GROUP) == 0
    return add is None and scratch is not None and fours and tokens * k // GROUP <= scratch.PARTIALS


def product(x: Tensor, w: Tensor, out: Tensor, add: Tensor | None) -> None:
    if add is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(add, x, w, out=out)


def scaled_product(x: Fp8Rows, w: Fp8Blocks, out: Tensor, scratch: LinearScratch) -> None:
    """cuBLAS's block scales (sm_90, CUDA 12.9 on). It wants those of x with the tokens contiguous."""
    tokens, groups = x.scale.shape
    scale = scratch.partials[: tokens * groups].view(groups, tokens)
    scale.copy_(x.scale.T)
    rows, blocks = ScalingType.BlockWise1x128.value, ScalingType.BlockWise128x128.value
    # What torch.nn.functional.scaled_mm calls, which has no `out`.
    torch.ops.aten._scaled_mm_v2.out(
        x.data, w.data, [scale.T], [rows], [], [w.scale], [blocks], [], None, out.dtype, out=out
    )
