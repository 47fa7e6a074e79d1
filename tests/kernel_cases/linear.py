from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear import LinearScratch
from kernels.linear.few import few_tokens
from kernels.linear.hopper import many_tokens
from kernels.linear.streaming import streaming
from kernels.linear.tiles import LIBRARY, stream_tile, tile_rule
from kernels.quant.naive import Fp8Blocks, Fp8Rows
from kernels.target import current
from tests.kernel_cases import Case


def launch(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, out: Tensor, residual: bool, tile: dict
) -> None:
    run = few_tokens if "ring" in tile else streaming
    run(x, x_scale, w, w_scale, out, out if residual else None, LinearScratch.empty("cpu"), tile)


def fp8(tokens: int, n: int, k: int, residual: bool = False, portable: bool = False) -> None:
    """The static rule's tile; none of the shapes exists in memory twice, so that a big one costs nothing."""
    e4m3 = current().fp8
    x = Fp8Rows.empty(tokens, k, "cpu", e4m3)
    w = Fp8Blocks(torch.empty(n, k, dtype=e4m3).T, torch.empty(-(-n // 128), k // 128).T)
    out = torch.empty(tokens, n, dtype=torch.bfloat16)
    tile = stream_tile(tokens, n, k, 1, current()) if portable else tile_rule(tokens, n, k, e4m3)
    if "N0" in tile:
        many_tokens(x, w, out, out if residual else None, tile, current().processors)
    else:
        launch(x.data, x.scale, w.data.T, w.scale.T, out, residual, tile)


def bf16(tokens: int, n: int, k: int, portable: bool = False) -> None:
    x, w = torch.empty(tokens, k, dtype=torch.bfloat16), torch.empty(n, k, dtype=torch.bfloat16)
    out = torch.empty(tokens, n, dtype=torch.bfloat16)
    tile = tile_rule(tokens, n, k, torch.bfloat16)
    if portable or tile == LIBRARY:  # AMD's; the portable kernel must compile there all the same
        tile = stream_tile(tokens, n, k, 2, current())
    launch(x, None, w, None, out, True, tile)


CASES = [
    *(
        Case(f"{n}x{k}, {tokens} tokens", lambda t=tokens, n=n, k=k: fp8(t, n, k, residual=t == 64), hot=True)  # type: ignore[misc]
        for n, k in [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168)]
        for tokens in (1, 64)
    ),
    Case("2112x7168, 1 token, portable", lambda: fp8(1, 2112, 7168, portable=True), hot=True),
    Case("7168x16384, 64 tokens, portable, residual", lambda: fp8(64, 7168, 16384, True, portable=True), hot=True),
    Case("2112x7168, 128 tokens", lambda: fp8(128, 2112, 7168)),
    Case("2112x7168, 4096 tokens", lambda: fp8(4096, 2112, 7168)),
    Case("7168x16384, 4096 tokens, residual", lambda: fp8(4096, 7168, 16384, residual=True)),
    Case("24576x1536, 4096 tokens", lambda: fp8(4096, 24576, 1536)),
    Case("bf16 2048x2048, 16 tokens", lambda: bf16(16, 2048, 2048), hot=True),
    Case("bf16 576x2048, 1 token", lambda: bf16(1, 576, 2048), hot=True),
    Case("bf16 10944x2048, 16 tokens", lambda: bf16(16, 10944, 2048), hot=True),
    Case("bf16 2048x2048, 16 tokens, portable", lambda: bf16(16, 2048, 2048, portable=True), hot=True),
]
