from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.sizes import cdiv, next_power_of_2


@triton.jit
def _embed(tokens, source, sampled, table, out, ids, hidden, BLOCK: tl.constexpr):
    t, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(source + t)
    token = tl.load(tokens + t).to(tl.int64)
    token = tl.load(sampled + place, mask=place >= 0, other=token)
    row = tl.load(table + token * hidden + at, mask=at < hidden)
    tl.store(out + t * hidden + at, row, mask=at < hidden)
    if ids is not None and part == 0:
        tl.store(ids + t, token.to(tl.int32))


def embed(
    tokens: Tensor, source: Tensor, sampled: Tensor, table: Tensor, out: Tensor, ids: Tensor | None = None
) -> None:
    rows, hidden = out.shape
    block = min(2048, next_power_of_2(hidden))
    if rows:
        grid = rows, cdiv(hidden, block)
        _embed[grid](tokens, source, sampled, table, out, ids, hidden, block, num_warps=max(1, block // 512))
