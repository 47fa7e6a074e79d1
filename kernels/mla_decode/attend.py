# mypy: allow-incomplete-defs, allow-untyped-defs, no-check-untyped-defs
"""The attention of a step's parts, and the joining of requests in pieces.

A page's latents are loaded once and serve as keys and as values. 64 query rows (head and query token) a program, scores
[rows, tokens]; with few rows the products are turned, tokens and latent columns on the M side of the tensor cores,
which take 16 rows there. An fp8 page is widened before the products: fp8 tensor cores of sm_90 want both operands
contiguous along the sum, which for values is the tokens, and a page holds them token by token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.quant.naive import GROUP
from kernels.tl_ops import dot, let_next_begin, wait_ahead

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _load_rows(source, page, page_stride, first, row_stride, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """[TOKENS, WIDTH], rows `first` and on of a page."""
    at = (first + tl.arange(0, TOKENS))[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(source + page.to(tl.int64) * page_stride + at)


@triton.jit
def _widen(coded, scale, page, page_stride, first, dtype: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of an fp8 page as `dtype`."""
    GROUPS: tl.constexpr = WIDTH // _GROUP
    at = (first + tl.arange(0, TOKENS))[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    scales = tl.load(scale + page.to(tl.int64) * page_stride + at)
    wide = tl.reshape(coded.to(tl.float32), [TOKENS, GROUPS, _GROUP]) * scales[:, :, None]
    return tl.reshape(wide, [TOKENS, WIDTH]).to(dtype)


@triton.jit
def _queries(q, row, rows, KV_LORA: tl.constexpr, ROPE: tl.constexpr):
    """([rows, KV_LORA], [rows, ROPE]) of one request; zeros past its last row."""
    at = q + row[:, None] * (KV_LORA + ROPE)
    inside = row[:, None] < rows
    latent = tl.load(at + tl.arange(0, KV_LORA)[None, :], mask=inside, other=0.0)
    return latent, tl.load(at + KV_LORA + tl.arange(0, ROPE)[None, :], mask=inside, other=0.0)


@triton.jit
def exp2_below(x, top):
    """2^(x - top), also where all of a row is hidden and both are -inf."""
    return tl.exp2(x - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def attention(
    q, latents, keys, scales, table, context, begin, out, pieces, lse,
    scale, rows, heads, max_pages, page_l, row_l, page_k, row_k, page_s,
    KV_LORA: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, TURNED: tl.constexpr,
    FP8: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    wait_ahead(PDL)
    let_next_begin(PDL)
    request, page = tl.load(begin + 2 * part), tl.load(begin + 2 * part + 1)
    end, end_page = tl.load(begin + 2 * part + 2), tl.load(begin + 2 * part + 3)
    row = tile * ROWS + tl.arange(0, ROWS)
    ahead = rows // heads - 1 - row // heads  # tokens of this step that come after the row's own
    token = tl.arange(0, TOKENS)
    dtype: tl.constexpr = q.dtype.element_ty
    AXIS: tl.constexpr = 0 if TURNED else 1  # of the tokens
    STEPS: tl.constexpr = PAGE // TOKENS
    while (request < end) | ((request == end) & (page < end_page)):
        length = tl.load(context + request)
        stop = tl.where(request == end, end_page, tl.cdiv(length, PAGE))
        q_latent, q_key = _queries(q + request.to(tl.int64) * rows * (KV_LORA + ROPE), row, rows, KV_LORA, ROPE)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        if TURNED:
            acc = tl.zeros([KV_LORA, ROWS], tl.float32)
            total = tl.zeros([TOKENS, ROWS], tl.float32)
        else:
            acc = tl.zeros([ROWS, KV_LORA], tl.float32)
            total = tl.zeros([ROWS], tl.float32)
        for i in tl.range(page * STEPS, stop * STEPS, num_stages=STAGES):
            held, inner = tl.load(table + request * max_pages + i // STEPS), (i % STEPS) * TOKENS
            latent = _load_rows(latents, held, page_l, inner, row_l, TOKENS, KV_LORA)
            key = _load_rows(keys, held, page_k, inner, row_k, TOKENS, ROPE)
            if FP8:
                latent = _widen(latent, scales, held, page_s, inner, dtype, TOKENS, KV_LORA)
                key = key.to(dtype)
            seen = length - ahead - i * TOKENS
            if TURNED:
                scores = dot(latent, q_latent.T, tl.zeros([TOKENS, ROWS], tl.float32))
                scores = dot(key, q_key.T, scores)
                scores = tl.where(token[:, None] < seen[None, :], scores * scale, float("-inf"))
            else:
                scores = dot(q_latent, latent.T, tl.zeros([ROWS, TOKENS], tl.float32))
                scores = dot(q_key, key.T, scores)
                scores = tl.where(token[None, :] < seen[:, None], scores * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, AXIS))
            fade = exp2_below(top, higher)
            if TURNED:
                weight = exp2_below(scores, higher[None, :])
                total = total * fade[None, :] + weight  # summed over tokens once, at the end
                acc = dot(latent.T, weight.to(dtype), acc * fade[None, :])
            else:
                weight = exp2_below(scores, higher[:, None])
                total = total * fade + tl.sum(weight, 1)
                acc = dot(weight.to(dtype), latent, acc * fade[:, None])
            top = higher
        mass = tl.sum(total, 0) if TURNED else total
        share = 1.0 / tl.where(mass > 0, mass, 1.0)
        result = (acc * share[None, :]).T if TURNED else acc * share[:, None]
        whole = (page == 0) & (stop * PAGE >= length)
        if whole:
            _store(out + request.to(tl.int64) * rows * KV_LORA, row, rows, result, KV_LORA)
        else:
            slot = (2 * part + (page == 0).to(tl.int32)).to(tl.int64) * (tl.num_programs(0) * ROWS)
            _store(pieces + slot * KV_LORA, row, row + 1, result, KV_LORA)
            tl.store(lse + slot + row, top + tl.log2(mass))
        request, page = request + 1, page * 0  # still a tensor where the kernel is interpreted


@triton.jit
def _store(to, row, rows, result, WIDTH: tl.constexpr):
    at = to + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(at, result.to(to.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit
def _piece(k, first):
    """The slot of what part k left of a request that begins in part `first`."""
    return 2 * k + (k == first).to(tl.int32)


@triton.jit
def _join(joins, item, items, tiles):
    """(request, its first part, its last part) of an item, none past the last."""
    at, inside = joins + 3 * (item // tiles), item < items
    return (
        tl.load(at, mask=inside, other=0),
        tl.load(at + 1, mask=inside, other=0),
        tl.load(at + 2, mask=inside, other=-1),
    )


@triton.jit
def join(
    joins, count, pieces, lse, out, rows, padded_rows,
    KV_LORA: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = the mean of a request's pieces, weighted by 2^lse. A program does ROWS rows, DEEP pieces at a time."""
    let_next_begin(PDL)
    tiles = tl.cdiv(rows, ROWS)
    item, items = tl.program_id(0), tl.load(count) * tiles
    request, first, last = _join(joins, item, items, tiles)
    wait_ahead(PDL)  # `attention` lets this launch begin only after its own wait: the plan was there
    column = tl.arange(0, KV_LORA)[None, :]
    while item < items:
        row = item % tiles * ROWS + tl.arange(0, ROWS)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, KV_LORA], tl.float32)
        for at in range(first, last + 1, DEEP):
            higher = top
            for k in tl.static_range(DEEP):
                higher = tl.maximum(higher, _lse(lse, at + k, first, last, row, padded_rows))
            fade = exp2_below(top, higher)
            total, mass, top = total * fade[:, None], mass * fade, higher
            for k in tl.static_range(DEEP):
                part = at + k
                weight = exp2_below(_lse(lse, part, first, last, row, padded_rows), higher)
                place = (_piece(part, first).to(tl.int64) * padded_rows + row)[:, None] * KV_LORA + column
                piece = tl.load(pieces + place, mask=(part <= last) & (column >= 0), other=0.0)
                total += piece.to(tl.float32) * weight[:, None]
                mass += weight
        total *= (1.0 / tl.where(mass > 0, mass, 1.0))[:, None]
        at = (request.to(tl.int64) * rows + row)[:, None] * KV_LORA + column
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < rows)[:, None])
        item += tl.num_programs(0)
        request, first, last = _join(joins, item, items, tiles)


@triton.jit
def _lse(lse, part, first, last, row, padded_rows):
    at = lse + _piece(part, first).to(tl.int64) * padded_rows + row
    return tl.load(at, mask=(part <= last) & (row >= 0), other=float("-inf"))
