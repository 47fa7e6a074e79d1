# mypy: ignore-errors
"""On sm_90: pages on their way to the two warpgroups that multiply, by one warp and TMA, or, where they are fp8, by a
third warpgroup that widens them: fp8 tensor cores want both operands contiguous along the sum, which for values is the
tokens, and a page holds them token by token."""

from __future__ import annotations

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from common.pages import PAGE
from kernels.quant.naive import GROUP

PAGE_TOKENS = gl.constexpr(PAGE)
_GROUP = gl.constexpr(GROUP)
_PART = gl.constexpr(64)  # columns that are widened at once: a thread has registers for no more
STAGES = gl.constexpr(2)
# A page's columns come in chunks, each with barriers of its own: the first products start while the last chunk is still
# on its way, and a chunk's place is filled again as soon as its values are added. The key comes with the first chunk.
CHUNKS = gl.constexpr(4)  # at most
# Barriers, by their place.
FULL = gl.constexpr(0)  # of each chunk of each stage
EMPTY = gl.constexpr(8)
Q_FULL = gl.constexpr(16)
Q_EMPTY = gl.constexpr(17)
SENT = gl.constexpr(18)  # what one warpgroup left for the other; four where both do, for each an even and an odd step
TAKEN = gl.constexpr(19)
BARRIERS = gl.constexpr(22)


@gluon.jit
def part_of_program(begin):
    """(first request, page in it, request after the last, last request if it is cut, page where it is cut)"""
    at = begin + 2 * gl.program_id(1)
    cut, stop = gl.load(at + 2), gl.load(at + 3)
    return gl.load(at), gl.load(at + 1), cut + (stop > 0).to(gl.int32), cut, stop


@gluon.jit
def stop_of(length, request, cut, stop):
    return gl.where(request == cut, stop, gl.cdiv(length, PAGE_TOKENS))


@gluon.jit
def _feed_queries(q, q_key, qs, q_keys, bars, request, rows, turn, pred=True):
    row = request * rows + gl.program_id(0) * qs.shape[0]
    full = bars.index(Q_FULL)
    mbarrier.wait(bars.index(Q_EMPTY), (turn & 1) ^ 1, pred=pred)
    mbarrier.expect(full, q.block_type.nbytes + q_key.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(q, [row, 0], full, qs, pred=pred)
    tma.async_copy_global_to_shared(q_key, [row, qs.shape[1]], full, q_keys, pred=pred)


@constexpr_function
def _chunk_of_turn(turn, count, many):
    """Chunks in the order in which they are wanted: where each warpgroup wants one half, by turns."""
    return turn if many else turn % 2 * (count // 2) + turn // 2


@gluon.jit
def _feed_chunk(latents, keys, row, key_row, pages, page_keys, bars, step, chunk: gl.constexpr, COUNT: gl.constexpr):
    place = step % STAGES * COUNT + chunk
    full = bars.index(FULL + place)
    mbarrier.wait(bars.index(EMPTY + place), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full, latents.block_type.nbytes + (keys.block_type.nbytes if chunk == 0 else 0))
    tma.async_copy_global_to_shared(latents, [row, chunk * pages.shape[2]], full, pages.index(place))
    if chunk == 0:
        tma.async_copy_global_to_shared(keys, [key_row, 0], full, page_keys.index(step % STAGES))


@gluon.jit
def feed(q, q_key, latents, keys, scales, qs, q_keys, pages, page_keys, bars, table, context, begin,
          rows, max_pages, latent_pitch, key_pitch, scale_pitch, MANY: gl.constexpr):  # fmt: skip
    COUNT: gl.constexpr = pages.shape[0] // STAGES
    first, first_page, end, cut, cut_page = part_of_program(begin)
    step, turn = gl.to_tensor(0), gl.to_tensor(0)
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        row = table + request * max_pages
        held = gl.load(row + gl.minimum(page, max_pages - 1))  # while `context` is read; each next one a page ahead
        stop = stop_of(gl.load(context + request), request, cut, cut_page)
        for i in range(page, stop):
            following = gl.load(row + gl.minimum(i + 1, max_pages - 1))
            for k in gl.static_range(COUNT):
                _feed_chunk(
                    latents, keys, held * latent_pitch, held * key_pitch, pages, page_keys, bars, step,
                    _chunk_of_turn(k, COUNT, MANY), COUNT,
                )  # fmt: skip
            step += 1
            held = following
            # A page's place is free before that of the last request's queries.
            _feed_queries(q, q_key, qs, q_keys, bars, request, rows, turn, i == page)
        turn += (page < stop).to(gl.int32)


@gluon.jit
def _fetch(latents, scales, held, pitch, scale_pitch, chunk, CHUNK: gl.constexpr, WIDTH: gl.constexpr):
    """A chunk of a page's latents as they lie in memory, and their scales: by turns, _PART columns each."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    token = gl.arange(0, PAGE_TOKENS, gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, _PART // 4, gl.SliceLayout(0, LAYOUT))
    parts = ()
    for k in gl.static_range(CHUNK // _PART):
        first = chunk * CHUNK + k * _PART
        at = held.to(gl.int64) * pitch + token[:, None] * (WIDTH // 4) + first // 4 + word[None, :]
        of_scale = held.to(gl.int64) * scale_pitch + token * (WIDTH // _GROUP) + first // _GROUP
        parts = parts + (gl.load(latents + at), gl.load(scales + of_scale))  # noqa: RUF005
    return parts


def _decoding(shift: int, mask: str, kind: str) -> str:
    """Of four e4m3 in a word: each shifted to where the wider type has exponent and mantissa, and times a factor that
    makes up for the bias. Conversions would be four times slower."""
    halves = "".join(
        f"prmt.b32 x, $4, 0, {picked}; and.b32 sign, x, 0x80008000; shr.b32 x, x, {shift}; and.b32 x, x, {mask};"
        f"or.b32 x, x, sign; mul.rn.{kind} x, x, $5; mov.b32 {{{left}, {right}}}, x;"
        for picked, left, right in (("0x1404", "$0", "$1"), ("0x3424", "$2", "$3"))
    )
    return "{ .reg .b32 x, sign; " + halves + " }"


_TO_BF16 = gl.constexpr(_decoding(4, "0x07f007f0", "bf16x2"))
_TO_FP16 = gl.constexpr(_decoding(1, "0x3f803f80", "f16x2"))


@gluon.jit
def _decode(words, scale, dtype: gl.constexpr):
    """int32 [m, n], four e4m3 each, times scale [m], as `dtype` [m, 4 n]."""
    FACTOR: gl.constexpr = 2.0**120 if dtype == gl.bfloat16 else 2.0**8
    factor = (scale * FACTOR).to(dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    factor = gl.convert_layout((factor << 16) | factor, gl.SliceLayout(1, words.type.layout), True)[:, None]
    if dtype == gl.bfloat16:
        a, b, c, d = gl.inline_asm_elementwise(
            _TO_BF16, "=h,=h,=h,=h,r,r", [words, factor],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            _TO_FP16, "=h,=h,=h,=h,r,r", [words, factor],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    return gl.join(gl.join(a, c), gl.join(b, d)).reshape([words.shape[0], 4 * words.shape[1]])


@gluon.jit
def _widen_chunk(
    parts, key, pages, page_keys, bars, step, TURN: gl.constexpr, chunk: gl.constexpr, COUNT: gl.constexpr
):
    PARTS: gl.constexpr = pages.shape[2] // _PART
    place = step % STAGES * COUNT + chunk
    mbarrier.wait(bars.index(EMPTY + place), ((step // STAGES) & 1) ^ 1)
    for k in gl.static_range(PARTS):
        words, scale = parts[2 * (TURN * PARTS + k)], parts[2 * (TURN * PARTS + k) + 1]
        pages.index(place).slice(k * _PART, _PART, 1).store(_decode(words, scale, pages.dtype))
    if chunk == 0:
        page_keys.index(step % STAGES).store(key.to(page_keys.dtype))
    fence_async_shared()
    mbarrier.arrive(bars.index(FULL + place))


@gluon.jit
def widen(q, q_key, latents, keys, scales, qs, q_keys, pages, page_keys, bars, table, context, begin,
           rows, max_pages, latent_pitch, key_pitch, scale_pitch, MANY: gl.constexpr):  # fmt: skip
    """`feed` of an fp8 cache. The next page is on its way to the registers while one is widened."""
    CHUNK: gl.constexpr = pages.shape[2]
    COUNT: gl.constexpr = pages.shape[0] // STAGES
    KV_LORA: gl.constexpr = COUNT * CHUNK
    ROPE: gl.constexpr = page_keys.shape[2]
    KEY: gl.constexpr = gl.BlockedLayout([1, 8], [4 * 64 // ROPE, ROPE // 8], [4, 1], [1, 0])
    token, column = gl.arange(0, PAGE_TOKENS, gl.SliceLayout(1, KEY)), gl.arange(0, ROPE, gl.SliceLayout(0, KEY))
    of_key = token[:, None] * ROPE + column[None, :]
    first, first_page, end, cut, cut_page = part_of_program(begin)
    step, turn = gl.to_tensor(0), gl.to_tensor(0)
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        stop = stop_of(gl.load(context + request), request, cut, cut_page)
        row = table + request * max_pages
        if page < stop:
            _feed_queries(q, q_key, qs, q_keys, bars, request, rows, turn)
            turn += 1
            held, later = gl.load(row + page), gl.load(row + gl.minimum(page + 1, stop - 1))
            key = gl.load(keys + held.to(gl.int64) * key_pitch + of_key)
            parts = ()
            for k in gl.static_range(COUNT):
                chunk = _chunk_of_turn(k, COUNT, MANY)
                parts = parts + _fetch(latents, scales, held, latent_pitch, scale_pitch, chunk, CHUNK, KV_LORA)
            for i in range(page, stop):
                held, later = later, gl.load(row + gl.minimum(i + 2, stop - 1))
                next_key = gl.load(keys + held.to(gl.int64) * key_pitch + of_key)
                next_parts = ()
                for k in gl.static_range(COUNT):
                    chunk = _chunk_of_turn(k, COUNT, MANY)
                    _widen_chunk(parts, key, pages, page_keys, bars, step, k, chunk, COUNT)
                    more = _fetch(latents, scales, held, latent_pitch, scale_pitch, chunk, CHUNK, KV_LORA)
                    next_parts = next_parts + more
                parts, key = next_parts, next_key
                step += 1
