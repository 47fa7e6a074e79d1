from __future__ import annotations

import torch

from kernels.linear import LinearScratch
from kernels.linear.hopper import many_tokens
from kernels.linear.streaming import streaming
from kernels.linear.triton import LIBRARY, stream_tile, tile_rule
from kernels.quant.naive import Fp8Blocks, Fp8Rows
from kernels.target import current
from tests.kernel_cases import Case


def fp8(tokens: int, n: int, k: int, residual: bool = False, tile: dict | None = None) -> None:
    """The static rule's tile; none of the shapes exists in memory twice, so that a big one costs nothing."""
    e4m3 = current().fp8
    x = Fp8Rows.empty(tokens, k, "cpu", e4m3)
    w = Fp8Blocks(torch.empty(n, k, dtype=e4m3).T, torch.empty(-(-n // 128), k // 128).T)
    out = torch.empty(tokens, n, dtype=torch.bfloat16)
    tile = tile or tile_rule(tokens, n, k, e4m3)
    if "N0" in tile:
        many_tokens(x, w, out, out if residual else None, tile, current().processors)
    else:
        add = out if residual else None
        streaming(x.data, x.scale, w.data.T, w.scale.T, out, add, LinearScratch.empty("cpu"), tile)


def bf16(tokens: int, n: int, k: int) -> None:
    x, w = torch.empty(tokens, k, dtype=torch.bfloat16), torch.empty(n, k, dtype=torch.bfloat16)
    out = torch.empty(tokens, n, dtype=torch.bfloat16)
    tile = tile_rule(tokens, n, k, torch.bfloat16)
    if tile == LIBRARY:  # AMD; it must compile there all the same
        tile = stream_tile(tokens, n, k, 2, current())
    streaming(x, None, w, None, out, out, LinearScratch.empty("cpu"), tile)


CASES = [
    *(
        Case(f"{n}x{k}, {tokens} tokens", lambda t=tokens, n=n, k=k: fp8(t, n, k, residual=t == 64), hot=True)  # type: ignore[misc]
        for n, k in [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168)]
        for tokens in (1, 64)
    ),
    Case("2112x7168, 128 tokens", lambda: fp8(128, 2112, 7168)),
    Case("2112x7168, 4096 tokens", lambda: fp8(4096, 2112, 7168)),
    Case("7168x16384, 4096 tokens, residual", lambda: fp8(4096, 7168, 16384, residual=True)),
    Case("24576x1536, 4096 tokens", lambda: fp8(4096, 24576, 1536)),
    Case("bf16 2048x2048, 16 tokens", lambda: bf16(16, 2048, 2048), hot=True),
    Case("bf16 576x2048, 1 token", lambda: bf16(1, 576, 2048), hot=True),
]
