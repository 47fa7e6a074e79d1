from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def combine_norm(
    residual: Tensor,  # [T, hidden], updated
    parts: tuple[Tensor, ...],  # each [T, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor,  # [T, hidden]
) -> None:
    """residual += parts, in their order; out = residual / rms(residual) * weight."""
    for part in parts:
        residual += part
    torch.mul(residual, inverse_rms(residual, eps), out=out)
    out *= weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[..., n] -> [..., 1]: 1 / sqrt(mean(x^2) + eps)."""
    # Three cheap operations where F.rms_norm is a chain of six on a CPU; a Python scalar costs as much as one of them.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value)
