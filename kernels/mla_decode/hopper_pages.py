# mypy: ignore-errors
"""On sm_90: pages on their way to the two warpgroups that multiply, by one warp and TMA, or, where they are fp8, by a
third warpgroup that widens them: fp8 tensor cores want both operands contiguous along the sum, which for values is the
tokens, and a page holds them token by token."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from common.pages import PAGE
from kernels.quant.naive import GROUP

PAGE_TOKENS = gl.constexpr(PAGE)
_GROUP = gl.constexpr(GROUP)
STAGES = gl.constexpr(2)
# Barriers, by their place.
FULL = gl.constexpr(0)  # of each stage of pages
EMPTY = gl.constexpr(2)
Q_FULL = gl.constexpr(4)
Q_EMPTY = gl.constexpr(5)
SENT = gl.constexpr(6)  # what one warpgroup left for the other; four where both do, for each an even and an odd step
TAKEN = gl.constexpr(7)
BARRIERS = gl.constexpr(10)


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
def _feed_queries(q, q_key, qs, q_keys, bars, request, rows, turn):
    row = request * rows + gl.program_id(0) * qs.shape[0]
    mbarrier.wait(bars.index(Q_EMPTY), (turn & 1) ^ 1)
    mbarrier.expect(bars.index(Q_FULL), q.block_type.nbytes + q_key.block_type.nbytes)
    tma.async_copy_global_to_shared(q, [row, 0], bars.index(Q_FULL), qs)
    tma.async_copy_global_to_shared(q_key, [row, qs.shape[1]], bars.index(Q_FULL), q_keys)


@gluon.jit
def feed(q, q_key, latents, keys, scales, qs, q_keys, pages, page_keys, bars, table, context, begin,
          rows, max_pages, latent_pitch, key_pitch, scale_pitch):  # fmt: skip
    first, first_page, end, cut, cut_page = part_of_program(begin)
    step = 0
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        _feed_queries(q, q_key, qs, q_keys, bars, request, rows, request - first)
        for i in range(page, stop_of(gl.load(context + request), request, cut, cut_page)):
            held = gl.load(table + request * max_pages + i)
            stage = step % STAGES
            full = bars.index(FULL + stage)
            mbarrier.wait(bars.index(EMPTY + stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full, latents.block_type.nbytes + keys.block_type.nbytes)
            tma.async_copy_global_to_shared(latents, [held * latent_pitch, 0], full, pages.index(stage))
            tma.async_copy_global_to_shared(keys, [held * key_pitch, 0], full, page_keys.index(stage))
            step += 1


@gluon.jit
def _fetch(latents, scales, held, pitch, scale_pitch, WIDTH: gl.constexpr, CHUNK: gl.constexpr):
    """A page's latents as they lie in memory, and their scales: by turns, CHUNK columns each."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4 * 128 // CHUNK, CHUNK // 16], [4, 1], [1, 0])
    token = gl.arange(0, PAGE_TOKENS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, CHUNK // 4, gl.SliceLayout(0, LAYOUT))
    chunks = ()
    for k in gl.static_range(WIDTH // CHUNK):
        at = held.to(gl.int64) * pitch + token[:, None] * (WIDTH // 4) + k * (CHUNK // 4) + column[None, :]
        of_scale = held.to(gl.int64) * scale_pitch + token * (WIDTH // _GROUP) + k * CHUNK // _GROUP
        chunks = chunks + (gl.load(latents + at), gl.load(scales + of_scale))  # noqa: RUF005
    return chunks


@gluon.jit
def _unpack(words):
    """int32 [m, n], four e4m3 each, to float32 [m, 4 n]. Eight-bit values of their own would fill a register each."""
    a, b, c, d = gl.inline_asm_elementwise(
        """{
        .reg .b16 h0, h1, h2, h3;
        .reg .b32 low, high;
        mov.b32 {h0, h1}, $4;
        cvt.rn.f16x2.e4m3x2 low, h0;
        cvt.rn.f16x2.e4m3x2 high, h1;
        mov.b32 {h0, h1}, low;
        mov.b32 {h2, h3}, high;
        cvt.f32.f16 $0, h0;
        cvt.f32.f16 $1, h1;
        cvt.f32.f16 $2, h2;
        cvt.f32.f16 $3, h3;
        }""", "=f,=f,=f,=f,r", [words], dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(gl.join(a, c), gl.join(b, d)).reshape([words.shape[0], 4 * words.shape[1]])


@gluon.jit
def widen(q, q_key, latents, keys, scales, qs, q_keys, pages, page_keys, bars, table, context, begin,
           rows, max_pages, latent_pitch, key_pitch, scale_pitch):  # fmt: skip
    """`feed` of an fp8 cache. The next page is on its way to the registers while one is widened."""
    KV_LORA: gl.constexpr = pages.shape[2]
    ROPE: gl.constexpr = page_keys.shape[2]
    CHUNK: gl.constexpr = 128 if KV_LORA >= 256 else 64
    KEY: gl.constexpr = gl.BlockedLayout([1, 8], [4 * 64 // ROPE, ROPE // 8], [4, 1], [1, 0])
    token, column = gl.arange(0, PAGE_TOKENS, gl.SliceLayout(1, KEY)), gl.arange(0, ROPE, gl.SliceLayout(0, KEY))
    of_key = token[:, None] * ROPE + column[None, :]
    first, first_page, end, cut, cut_page = part_of_program(begin)
    step = 0
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        _feed_queries(q, q_key, qs, q_keys, bars, request, rows, request - first)
        stop = stop_of(gl.load(context + request), request, cut, cut_page)
        row = table + request * max_pages
        if page < stop:
            held = gl.load(row + page)
            chunks = _fetch(latents, scales, held, latent_pitch, scale_pitch, KV_LORA, CHUNK)
            for i in range(page, stop):
                stage = step % STAGES
                key = gl.load(keys + held.to(gl.int64) * key_pitch + of_key)
                held = gl.load(row + gl.minimum(i + 1, stop - 1))
                mbarrier.wait(bars.index(EMPTY + stage), ((step // STAGES) & 1) ^ 1)
                for k in gl.static_range(KV_LORA // CHUNK):
                    wide = _unpack(chunks[2 * k])
                    wide *= gl.convert_layout(chunks[2 * k + 1], gl.SliceLayout(1, wide.type.layout), True)[:, None]
                    pages.index(stage).slice(k * CHUNK, CHUNK, 1).store(wide.to(pages.dtype))
                page_keys.index(stage).store(key.to(page_keys.dtype))
                fence_async_shared()
                mbarrier.arrive(bars.index(FULL + stage))
                chunks = _fetch(latents, scales, held, latent_pitch, scale_pitch, KV_LORA, CHUNK)
                step += 1
