from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.quant.naive import Fp8Rows, quantise_rows


@dataclass(frozen=True)
class SlotRows:
    """Rows of the routed experts, already weighted, where the grouped products left them: row t is the sum over k of
    rows[slots[t, k]], in float32 and in the order of k, rounded as it would be on its way over a link."""

    rows: Tensor  # [slots, hidden]
    slots: Tensor  # int32 [T, topk], -1: none
    awaited: bool = False  # the launch ahead waits for another process, which may need this GPU

    def sum(self) -> Tensor:
        """[T, hidden] in the rows' dtype."""
        padded = torch.cat((self.rows, self.rows.new_zeros(1, self.rows.shape[1])))
        total = torch.zeros(len(self.slots), self.rows.shape[1], device=self.rows.device)
        for column in self.slots.long().unbind(1):
            total += padded[column]
        return total.to(self.rows.dtype)


def combine_norm(
    residual: Tensor,  # [T, hidden], updated
    parts: tuple[Tensor | SlotRows, ...],  # each [T, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | Fp8Rows,  # [T, hidden]
    coded: Fp8Rows | None = None,  # [T, hidden]
) -> None:
    """residual += parts, in their order; out = residual / rms(residual) * weight. `coded`: `out` in 8 bits as well."""
    for part in parts:
        residual += part.sum() if isinstance(part, SlotRows) else part
    if isinstance(out, Fp8Rows):
        quantise_rows(residual * inverse_rms(residual, eps) * weight, out)
        return
    torch.mul(residual, inverse_rms(residual, eps), out=out)
    out *= weight
    if coded is not None:
        quantise_rows(out, coded)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[..., n] -> [..., 1]: 1 / sqrt(mean(x^2) + eps)."""
    # Three cheap operations where F.rms_norm is a chain of six on a CPU; a Python scalar costs as much as one of them.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)
