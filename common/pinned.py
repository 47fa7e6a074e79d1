"""Copies between host and device that nobody waits for.

From memory that is not pinned, CUDA copies only when all that was launched before has ended, non_blocking or not.
Pinned memory that is freed early is not given out again before its copy has happened: torch's allocator sees to that.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x`, of the host, there for whatever is launched next."""
    if torch.device(device).type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x).to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """To be read once the device has come so far."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
