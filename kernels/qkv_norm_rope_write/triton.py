from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.latent_cache import Fp8Latent
from kernels.linear import LinearScratch, linear
from kernels.qkv_norm_rope_write.naive import LATENT_EPS, QkvWeights
from kernels.quant.naive import GROUP, Fp8Rows
from kernels.quant.triton import quantise_groups
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import measured_tile, overlap, overlaps
from kernels.tl_ops import let_next_begin, wait_ahead


@dataclass(frozen=True)
class QkvScratch:
    """What lies between the two products, for T rows."""

    a: Tensor  # [T, columns of w.a]
    q_low: Tensor | Fp8Rows | None  # [T, q_lora], as the second product takes its rows; None where there is no q_lora
    linear: LinearScratch | None = None


@triton.jit
def _rotated(source, bias, cos_sin, heads, HEAD: tl.constexpr, HEADS: tl.constexpr, ROPE: tl.constexpr):
    """(offsets [HEADS, ROPE / 2, 2] in a head's rope, whether its head is real, the rotated values)."""
    head = tl.arange(0, HEADS)[:, None, None]
    within = tl.arange(0, ROPE // 2)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    inside = (head < heads) & (within >= 0)
    x = tl.load(source + head * HEAD + within, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + head * HEAD + within, mask=inside, other=0.0).to(tl.float32)
    pair = tl.arange(0, ROPE // 2)[None, :]
    cos, sin = tl.load(cos_sin + 2 * pair), tl.load(cos_sin + 2 * pair + 1)
    real, imaginary = tl.split(x)
    return head, within, inside, tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)


@triton.jit
def _turn(turns, positions, t, ROPE: tl.constexpr):
    """The row of [.., rope / 2] cosines and sines that token t turns by."""
    if positions is not None:
        t = tl.load(positions + t).to(tl.int64)
    return turns + t * ROPE


@triton.jit
def _normed(source, bias, weight, width, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < width, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x) / width + eps) * tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)


@triton.jit
def _store_row(row, scale, values, width, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """`values` to `row`, quantised where there is a `scale`."""
    at = tl.arange(0, BLOCK)
    if scale is not None:
        coded, scales = quantise_groups(values, row.dtype.element_ty, BLOCK, GROUP)
        groups = tl.arange(0, BLOCK // GROUP)
        tl.store(row + at, coded, mask=at < width)
        tl.store(scale + groups, scales, mask=groups < width // GROUP)
    else:
        tl.store(row + at, values, mask=at < width)


@triton.jit
def _write_row(
    source, bias, kv_norm, cos_sin, cache, row, eps, KV: tl.constexpr, ROPE: tl.constexpr, GROUP: tl.constexpr
):
    """cache[row] = rmsnorm(latent) | rope(key)"""
    latent, scale, key, page_rows, latent_page, scale_page, key_page, latent_row, key_row = cache
    page, place = row // page_rows, row % page_rows
    latent += page * latent_page + place * latent_row
    if scale is not None:
        scale += page * scale_page + place * (KV // GROUP)
    _store_row(latent, scale, _normed(source, bias, kv_norm, KV, eps, KV), KV, KV, GROUP)
    key_bias = None
    if bias is not None:
        key_bias = bias + KV
    _head, within, _inside, turned = _rotated(source + KV, key_bias, cos_sin, 1, ROPE, 1, ROPE)
    tl.store(key + page * key_page + place * key_row + within, turned)


@triton.jit
def _norm_rope_write(
    rows, queries, stride, row_bias, q_bias, kv_norm, q_norm, turns, positions, write, cache, q, q_scale,
    q_width, heads, eps,
    KV: tl.constexpr, ROPE: tl.constexpr, NOPE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, NOPE_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (t, 0) writes token t's row of the cache; (t, 1) norms its low-rank query, or (t, 1 ..) turn HEADS of its
    queries each."""
    t, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    let_next_begin(PDL)
    cos_sin, row = _turn(turns, positions, t, ROPE), tl.load(write + t).to(tl.int64)  # the step's, written long ago
    wait_ahead(PDL)
    if part == 0:
        if row >= 0:
            _write_row(rows + t * stride, row_bias, kv_norm, cos_sin, cache, row, eps, KV, ROPE, GROUP)
    elif q_norm is not None:
        values = _normed(queries + t * stride, q_bias, q_norm, q_width, eps, BLOCK)
        scale = q_scale
        if q_scale is not None:
            scale = q_scale + t * (q_width // GROUP)
        _store_row(q + t * q_width, scale, values, q_width, BLOCK, GROUP)
    else:
        first = (part - 1) * HEADS
        HEAD: tl.constexpr = NOPE + ROPE
        source, out, bias = queries + t * stride + first * HEAD, q + t * q_width + first * HEAD, q_bias
        if q_bias is not None:
            bias = q_bias + first * HEAD
        _copy_nope(source, bias, out, heads - first, HEAD, NOPE, HEADS, NOPE_BLOCK)
        rope_bias = bias
        if bias is not None:
            rope_bias = bias + NOPE
        head, within, inside, turned = _rotated(source + NOPE, rope_bias, cos_sin, heads - first, HEAD, HEADS, ROPE)
        tl.store(out + NOPE + head * HEAD + within, turned, mask=inside)


@triton.jit
def _copy_nope(
    source, bias, out, heads, HEAD: tl.constexpr, NOPE: tl.constexpr, HEADS: tl.constexpr, NOPE_BLOCK: tl.constexpr
):
    head, within = tl.arange(0, HEADS)[:, None], tl.arange(0, NOPE_BLOCK)[None, :]
    inside = (head < heads) & (within < NOPE)
    x = tl.load(source + head * HEAD + within, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + head * HEAD + within, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + head * HEAD + within, x, mask=inside)


@triton.jit
def _rope_q(
    q, turns, positions, out, heads, out_token, out_head,
    ROPE: tl.constexpr, NOPE: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    HEAD: tl.constexpr = NOPE + ROPE
    source = q + (t * heads + first) * HEAD + NOPE
    let_next_begin(PDL)
    wait_ahead(PDL)
    cos_sin = _turn(turns, positions, t, ROPE)
    head, within, inside, turned = _rotated(source, None, cos_sin, heads - first, HEAD, HEADS, ROPE)
    tl.store(out + t * out_token + (first + head) * out_head + within, turned, mask=inside)


def tile_rule(tokens: int) -> dict[str, int]:
    return {"warps": 4, "heads": 8 if tokens <= 64 else 16}


def candidates(tokens: int) -> list[dict[str, int]]:
    return [{"warps": warps, "heads": heads} for warps in (1, 2, 4, 8) for heads in (4, 8, 16, 32)]


def shape_name(q_width: int, normed: bool) -> str:
    return f"q_lora {q_width}" if normed else f"queries {q_width}"


def norm_rope_write(
    row: Tensor,  # [T, kv_lora + rope]; it and `queries` are views of one product's output, bias not yet added
    queries: Tensor,
    w: QkvWeights,
    turns: Tensor,  # complex64, a row a token, or with `positions` a row a position
    write: Tensor,  # -1: a row that pads the batch, not written
    cache: Tensor | Fp8Latent,
    q: Tensor | Fp8Rows,
    positions: Tensor | None = None,
    tile: dict[str, int] | None = None,
) -> None:
    tokens, q_width = queries.shape
    if not tokens:
        return
    kv_lora = len(w.kv_norm)
    rope, pdl = row.shape[1] - kv_lora, overlaps()
    tile = tile or measured_tile(__file__, shape_name(q_width, w.q_norm is not None), tokens) or tile_rule(tokens)
    out, scale = (q.data, q.scale) if isinstance(q, Fp8Rows) else (q, None)
    heads, head = (1, rope) if w.q_norm is not None else out.shape[1:]
    block = min(tile["heads"], next_power_of_2(heads))
    parts, width = cdiv(heads, block), GROUP
    if w.q_norm is not None:
        width = max(GROUP, next_power_of_2(q_width))
    row_bias, q_bias = (None, None) if w.a_bias is None else (b[0] for b in w.split(w.a_bias[None], row.shape[1]))
    assert row.stride(0) == queries.stride(0) and out.is_contiguous()
    _norm_rope_write[(tokens, 1 + parts)](
        row, queries, row.stride(0), row_bias, q_bias, w.kv_norm, w.q_norm,
        torch.view_as_real(turns), positions, write, _planes(cache, kv_lora), out, scale, q_width, heads, LATENT_EPS,
        kv_lora, rope, head - rope, GROUP, width, block, next_power_of_2(max(1, head - rope)), pdl,
        num_warps=tile["warps"], **overlap(pdl),
    )  # fmt: skip


def rope_q(q: Tensor, turns: Tensor, out: Tensor, positions: Tensor | None = None) -> None:
    """`out` may be the same memory as the part of q that it is made of."""
    tokens, heads, head = q.shape
    rope = out.shape[2]
    assert q.is_contiguous() and out.stride(2) == 1
    block, pdl = min(32, next_power_of_2(heads)), overlaps()
    if tokens:
        # Not early: while a product holds nearly all processors its programs would crowd on the few that are left
        # (25 us at 16 tokens of R1; 4 by themselves).
        _rope_q[(tokens, cdiv(heads, block))](
            q, torch.view_as_real(turns), positions, out, heads, out.stride(0), out.stride(1),
            rope, head - rope, block, pdl, num_warps=max(1, block // 8),
        )  # fmt: skip


def qkv_norm_rope_write(
    x: Tensor | Fp8Rows,
    w: QkvWeights,
    turns: Tensor,
    write: Tensor,
    cache: Tensor | Fp8Latent,
    q: Tensor,
    positions: Tensor | None,
    scratch: QkvScratch,
) -> None:
    width = cache.data.shape[2] + cache.rope.shape[2] if isinstance(cache, Fp8Latent) else cache.shape[2]
    linear(x, w.a, scratch.a, scratch=scratch.linear)
    row, queries = w.split(scratch.a, width)
    if w.b is None:
        norm_rope_write(row, queries, w, turns, write, cache, q, positions)
        return
    assert scratch.q_low is not None
    norm_rope_write(row, queries, w, turns, write, cache, scratch.q_low, positions)
    linear(scratch.q_low, w.b, q.view(len(q), -1), scratch=scratch.linear)
    rope_q(q, turns, q[:, :, q.shape[2] - width + len(w.kv_norm) :], positions)


def _planes(cache: Tensor | Fp8Latent, kv_lora: int) -> tuple:
    """(latent, its scales, key, rows of a page, a page's stride in each, a row's in latent and key)"""
    if isinstance(cache, Fp8Latent):
        latent, scale, key = cache.data, cache.scale, cache.rope
        scale_page = scale.stride(0)
    else:
        latent, scale, key, scale_page = cache[:, :, :kv_lora], None, cache[:, :, kv_lora:], 0
    pages = latent.stride(0), scale_page, key.stride(0)
    return latent, scale, key, latent.shape[1], *pages, latent.stride(1), key.stride(1)
