"""One weight for all tokens: every dense projection."""

from torch import Tensor

from kernels.linear import naive
from kernels.linear.naive import LinearScratch
from kernels.quant import Fp8Blocks, Fp8Rows

__all__ = ["LinearScratch", "linear"]


def linear(
    x: Tensor | Fp8Rows,  # [T, k]
    w: Tensor | Fp8Blocks,  # [k, n], of the same kind as x
    out: Tensor,  # [T, n]
    *,
    add: Tensor | None = None,  # [T, n], may be `out`
    scratch: LinearScratch | None = None,  # without it one program has all of K, which is slow for few tokens
) -> None:
    """out = x @ w (+ add), summed in float32 and rounded once."""
    if out.is_cuda:
        from kernels.linear import triton

        triton.linear(x, w, out, add=add, scratch=scratch)
    else:
        naive.linear(x, w, out, add=add)
