from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quant.naive import Fp8Blocks, Fp8Rows, dequantise


@dataclass(frozen=True)
class LinearScratch:
    """What launches on one stream share. Each launch leaves the tickets at 0 for the next."""

    partials: Tensor  # float32 [PARTIALS]: the splits' sums
    tickets: Tensor  # int32 [TICKETS], zeros: how many splits of a tile have come

    PARTIALS = 1 << 22
    TICKETS = 4096

    @staticmethod
    def empty(device: torch.device | str) -> LinearScratch:
        """16 MiB, whatever the shapes: what is split is small."""
        return LinearScratch(
            torch.empty(LinearScratch.PARTIALS, dtype=torch.float32, device=device),
            torch.zeros(LinearScratch.TICKETS, dtype=torch.int32, device=device),
        )

    @staticmethod
    def check(splits: int, tiles: int, rows: int, columns: int) -> None:
        """Raises ValueError for a launch that is too large: so many splits of so many tiles of this size."""
        tight = tiles > LinearScratch.TICKETS or tiles * splits * rows * columns > LinearScratch.PARTIALS
        if splits > 1 and tight:
            raise ValueError(f"{splits} splits of {tiles} tiles of {rows}x{columns} do not fit LinearScratch")


def linear(x: Tensor | Fp8Rows, w: Tensor | Fp8Blocks, out: Tensor, *, add: Tensor | None = None) -> None:
    """out = x @ w (+ add)"""
    if isinstance(x, Fp8Rows) or isinstance(w, Fp8Blocks):
        x = dequantise(x) if isinstance(x, Fp8Rows) else x.float()
        w = dequantise(w) if isinstance(w, Fp8Blocks) else w.float()
        product = x @ w
        out.copy_(product if add is None else product + add)
    elif add is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(add, x, w, out=out)
