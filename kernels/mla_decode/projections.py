# mypy: allow-incomplete-defs, allow-untyped-defs, no-check-untyped-defs
"""A product for each head: queries absorbed into the latent space, and the latent sums brought back from it, in 8 bits
where the product that follows takes them so.

For decode these are two weights to stream (16.8 MB each for R1). A program asks for its whole tile of them at once,
even while the launch before it still runs (weights never change), and uses it for all tokens. Many tokens beside all of
a head's weights do not fit a processor: then both come in pieces, after the wait.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.quant.naive import GROUP, Fp8Rows
from kernels.quant.triton import quantise_each
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import overlap
from kernels.tl_ops import dot, let_next_begin, wait_ahead


@triton.jit
def _per_head(
    x, w, out, scale, tokens, k, n, x_token, x_head, w_head, w_k, w_n, out_token, out_head,
    TAIL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[t, h, :n] = x[t, h, :k] w[h]; out[t, h, n:] = x[t, h, k:], TAIL columns. With `scale`, a number a token and
    head, `out` is in 8 bits and BN = n. With STAGES weights come BK at a time; BK divides k and BN n then."""
    let_next_begin(PDL)
    tiles = tl.cdiv(n, BN)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    along, column = tl.arange(0, BK), tile * BN + tl.arange(0, BN)
    at = w + head.to(tl.int64) * w_head + along[:, None] * w_k + column[None, :] * w_n
    if not STAGES:
        weight = tl.load(at, mask=(along < k)[:, None] & (column < n)[None, :], other=0.0)
    wait_ahead(PDL)
    for first in range(tl.program_id(1) * BM, tokens, tl.num_programs(1) * BM):
        token = first + tl.arange(0, BM)
        source = x + token.to(tl.int64)[:, None] * x_token + head * x_head
        to = out + token.to(tl.int64)[:, None] * out_token + head * out_head
        product = tl.zeros([BM, BN], tl.float32)
        if STAGES:
            for done in tl.range(0, k, BK, num_stages=STAGES):
                rows = tl.load(source + done + along[None, :], mask=(token < tokens)[:, None], other=0.0)
                product = dot(rows, tl.load(at + done * w_k), product)
        else:
            rows = tl.load(source + along[None, :], mask=(token < tokens)[:, None] & (along < k)[None, :], other=0.0)
            product = dot(rows, weight, product)
        if scale is not None:  # of the product as it would be stored: the codes do not depend on who codes it
            product, scales = quantise_each(product.to(x.dtype.element_ty).to(tl.float32), out.dtype.element_ty)
            tl.store(scale + token * tl.num_programs(0) + head, scales, mask=token < tokens)
        tl.store(to + column[None, :], product, mask=(token < tokens)[:, None] & (column < n)[None, :])
        if TAIL and tile == 0:
            past = tl.arange(0, TAIL)[None, :]
            rest = tl.load(source + k + past, mask=(token < tokens)[:, None])
            tl.store(to + n + past, rest, mask=(token < tokens)[:, None])


def per_head(x, w, out, tile: dict[str, int], pdl: bool) -> None:
    """x [tokens, heads, k + tail], w [heads, k, n], out [tokens, heads, n + tail] or, in 8 bits, [tokens, heads * n];
    the last dimension of x and out is contiguous, w lies as it may."""
    heads, k, n = w.shape
    tokens, tail = len(x), x.shape[2] - k
    scale = None
    if isinstance(out, Fp8Rows):
        if n != GROUP or tile["bn"] != n or tail:
            raise ValueError(f"in 8 bits a head has a scale of its own: {n} columns and {tail} more, {tile}")
        scale, out = out.scale, out.data.view(tokens, heads, n)
    whole = max(16, next_power_of_2(k))
    bk, stages = tile.get("bk", whole), tile.get("stages", 0)
    if stages and (k % bk or n % tile["bn"]):
        raise ValueError(f"{tile} does not divide {k} and {n}")
    if not tokens:
        return
    _per_head[(heads * cdiv(n, tile["bn"]), 1)](
        x, w, out, scale, tokens, k, n, x.stride(0), x.stride(1), *w.stride(), out.stride(0), out.stride(1),
        tail, tile["bm"], tile["bn"], bk, pdl, stages, num_warps=tile["warps"], **overlap(pdl),
    )  # fmt: skip
