from __future__ import annotations

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
    # The 2-norm is one fused reduction; F.rms_norm is a chain of six operations on a CPU.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
