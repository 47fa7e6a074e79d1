"""Muon for the hidden matrices, AdamW for the rest, with fp32 masters of bf16 parameters."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz: [n, rows, cols] to nearly orthogonal matrices of the same row and column spaces."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    """Updates parameters of any type through fp32 masters; every matrix update has the root mean square of Adam's."""

    def __init__(self, model: nn.Module, weight_decay: float = 0.05) -> None:
        groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        others: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            is_hidden = p.ndim >= 2 and not any(part in name for part in ("embed", "lm_head", "gate.weight"))
            if is_hidden:
                groups[tuple(p.shape[-2:])].append(p)  # type: ignore[index]
            else:
                others.append(p)
        self.groups = list(groups.values())
        self.masters = [torch.cat([_stacked(p.detach()).float() for p in group]) for group in self.groups]
        self.momenta = [torch.zeros_like(m) for m in self.masters]
        self.others = others
        self.other_masters = [p.detach().float().clone() for p in others]
        self.adam = torch.optim.AdamW(self.other_masters, betas=(0.9, 0.95), weight_decay=0.0,
                                      fused=others[0].is_cuda)  # fmt: skip
        self.weight_decay = weight_decay
        self.orthogonalize = torch.compile(orthogonalize, dynamic=False) if others[0].is_cuda else orthogonalize

    @torch.no_grad()
    def step(self, lr: float, momentum: float = 0.95) -> None:
        for group, master, momentum_buffer in zip(self.groups, self.masters, self.momenta, strict=True):
            grad = torch.cat([_stacked(p.grad) for p in group if p.grad is not None]).float()
            momentum_buffer.lerp_(grad, 1 - momentum)
            update = self.orthogonalize(grad.lerp(momentum_buffer, momentum))
            scale = 0.2 * max(update.shape[1:]) ** 0.5
            master.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * scale)
            for p, value in zip(group, master.split([_stacked(p).size(0) for p in group]), strict=True):
                p.copy_(value.view_as(p))
                p.grad = None
        for p, master in zip(self.others, self.other_masters, strict=True):
            master.grad = None if p.grad is None else p.grad.float()
            p.grad = None
        for adam_group in self.adam.param_groups:
            adam_group["lr"] = lr
        self.adam.step()
        torch._foreach_copy_(self.others, self.other_masters)


def _stacked(p: torch.Tensor) -> torch.Tensor:
    return p if p.ndim == 3 else p.unsqueeze(0)
