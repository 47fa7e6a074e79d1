"""Weights drawn at random, for work on speed: nothing but config.json is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from common.source import Progress, Read, put
from kernels.quant import Fp8Blocks, quantise_blocks

STD = 0.02
KEPT_WIDE = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")  # in an fp8 model, as DeepSeek publishes it


class RandomWeights:
    """Matrices N(0, STD), norms 1, biases 0. A tensor's values follow from its name, its shape and the kind of device,
    so every actor draws the same."""

    def __init__(self, *, fp8: bool) -> None:
        self.fp8 = fp8

    def require(self, name: str) -> None:
        pass

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        out = torch.empty(*shape)
        self.fill([Read(name, out)])
        return out

    def fill(self, reads: Sequence[Read], progress: Progress | None = None) -> None:
        done, total = 0, sum(read.out.data.nbytes for read in reads)
        for read in reads:
            put(self._draw(read.name, read.out.data), read.out)
            done += read.out.data.nbytes
            if progress is not None:
                progress(done, total)

    def _draw(self, name: str, like: Tensor) -> Tensor | Fp8Blocks:
        """One at a time: a stack of experts needs the memory of one matrix more than its own."""
        drawn = torch.empty(like.shape, dtype=torch.bfloat16, device=like.device)
        if "norm" in name:
            return drawn.fill_(1)
        if name.endswith("bias"):
            return drawn.zero_()
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
        drawn.normal_(0, STD, generator=torch.Generator(like.device).manual_seed(seed))
        return quantise_blocks(drawn) if self.fp8 and not name.endswith(KEPT_WIDE) else drawn
