"""The residual stream's update and the norm that follows it."""

from torch import Tensor

from kernels.combine_norm import naive
from kernels.combine_norm.naive import SlotRows
from kernels.quant import Fp8Rows

__all__ = ["SlotRows", "combine_norm"]


def combine_norm(
    residual: Tensor,  # [T, hidden], updated
    parts: tuple[Tensor | SlotRows, ...],  # each [T, hidden]; on a GPU up to two tensors, then up to one of slots
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | Fp8Rows,  # [T, hidden]
    coded: Fp8Rows | None = None,  # [T, hidden]
) -> None:
    """residual += parts, in their order; out = residual / rms(residual) * weight, quantised if `out` is. `coded`: the
    rows of `out`, which then is a tensor, in 8 bits as well."""
    if residual.is_cuda:
        from kernels.combine_norm import triton

        triton.combine_norm(residual, parts, weight, eps, out, coded)
    else:
        naive.combine_norm(residual, parts, weight, eps, out, coded)
