# mypy: ignore-errors
"""On sm_90: what the two warpgroups that multiply do with a page.

64 rows a program (many heads) are bound by the tensor cores: `lead` scores a page and adds its values to the left half
of the sum; `follow` adds them to the right half, from the weights that `lead` passes on, while `lead` scores the next
page. 16 or 32 rows are bound by the memory: the products are turned (tokens and latent columns on the M side), each
warpgroup takes half the columns of both, and they exchange their halves of the scores.
References: FlashMLA's first Hopper kernel; kernel-notes.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.mla_decode.hopper_pages import (
    EMPTY,
    FULL,
    PAGE_TOKENS,
    Q_EMPTY,
    Q_FULL,
    SENT,
    STAGES,
    TAKEN,
    part_of_program,
    stop_of,
)


@gluon.jit
def _exp2_below(x, top):
    """2^(x - top), also where all of a row is hidden and both are -inf."""
    return gl.exp2(x - gl.where(top == float("-inf"), 0.0, top))


@gluon.jit
def _share(mass):
    return 1.0 / gl.where(mass > 0, mass, 1.0)


@gluon.jit
def _write(
    out, pieces, result, row, column, request, rows, page, stop, length, ROWS: gl.constexpr, WIDTH: gl.constexpr
):
    """`row` and `column` broadcast to the result's shape. Returns (whether it is no piece, the piece's first row)."""
    whole = (page == 0) & (stop * PAGE_TOKENS >= length)
    slot = (2 * gl.program_id(1) + (page == 0).to(gl.int32)).to(gl.int64) * (gl.num_programs(0) * ROWS)
    at = row.to(gl.int64) * WIDTH + column.to(gl.int64)  # in 64 bits, so that a thread's places differ by constants
    to = out + request.to(gl.int64) * rows * WIDTH
    if not whole:
        gl.store(pieces + slot * WIDTH + at, result.to(pieces.dtype.element_ty))
    elif (gl.program_id(0) + 1) * ROWS <= rows:  # a mask would cost a branch at every store
        gl.store(to + at, result.to(out.dtype.element_ty))
    else:
        gl.store(to + at, result.to(out.dtype.element_ty), mask=row < rows)
    return whole, slot


@gluon.jit
def _visible(scores, place, seen, first):
    """-inf for tokens that a row does not see; `place` and `seen` are broadcast, `first` is the page's first token."""
    return gl.where(place < seen - first, scores, float("-inf"))


@gluon.jit
def _score(qs, q_keys, pages, page_keys, bars, step, LAYOUT: gl.constexpr):
    """Starts the scores of a page, as soon as it is there."""
    ROWS: gl.constexpr = qs.shape[0]
    stage = step % STAGES
    mbarrier.wait(bars.index(FULL + stage), (step // STAGES) & 1)
    zero = gl.zeros([ROWS, PAGE_TOKENS], gl.float32, LAYOUT)
    run = warpgroup_mma(qs, pages.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q_keys, page_keys.index(stage).permute((1, 0)), run, is_async=True)


@gluon.jit
def _weigh(scores, top, total, weights, factors, bars, sent):
    """The weights of a page, and what the sum so far is to be multiplied by; `follow` is given both."""
    higher = gl.maximum(top, gl.max(scores, 1))
    fade = _exp2_below(top, higher)
    weight = _exp2_below(scores, higher[:, None])
    coded = weight.to(weights.dtype)
    mbarrier.wait(bars.index(TAKEN), (sent & 1) ^ 1)
    weights.store(coded)
    factors.store(fade)
    fence_async_shared()
    mbarrier.arrive(bars.index(SENT))
    return coded, fade, higher, total * fade + gl.sum(weight, 1)


@gluon.jit
def _add_values(coded, fade, acc, values):
    """Starts acc * fade + weights values, the weights from registers."""
    LAYOUT: gl.constexpr = acc.type.layout
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, LAYOUT))[:, None]
    coded = gl.convert_layout(coded, gl.DotOperandLayout(0, LAYOUT, 2))
    return warpgroup_mma(coded, values, warpgroup_mma_init(acc), is_async=True)


@gluon.jit
def lead(qs, q_keys, pages, page_keys, weights, factors, bars, context, begin, out, pieces, lse,
         scale, rows, heads, KV_LORA: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = qs.shape[0]
    HALF: gl.constexpr = KV_LORA // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAGE_TOKENS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    first, first_page, end, cut, cut_page = part_of_program(begin)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    ahead = rows // heads - 1 - row // heads  # tokens of this step that come after the row's own
    place = gl.arange(0, PAGE_TOKENS, gl.SliceLayout(0, SCORES))[None, :]
    step, sent = gl.to_tensor(0), gl.to_tensor(0)
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        length = gl.load(context + request)
        stop = stop_of(length, request, cut, cut_page)
        top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        mbarrier.wait(bars.index(Q_FULL), (request - first) & 1)
        if page < stop:
            seen = (length - ahead)[:, None]
            run = _score(qs, q_keys, pages, page_keys, bars, step, SCORES)
            scores = warpgroup_mma_wait(0, deps=(run,)) * scale
            for i in range(page, stop - 1):
                if rows > heads:  # else only the last page has hidden tokens
                    scores = _visible(scores, place, seen, i * PAGE_TOKENS)
                coded, fade, top, total = _weigh(scores, top, total, weights, factors, bars, sent)
                adding = _add_values(coded, fade, acc, pages.index(step % STAGES).slice(0, HALF, 1))
                run = _score(qs, q_keys, pages, page_keys, bars, step + 1, SCORES)
                acc = warpgroup_mma_wait(2, deps=(adding,))
                mbarrier.arrive(bars.index(EMPTY + step % STAGES))
                scores = warpgroup_mma_wait(0, deps=(run,)) * scale
                step += 1
                sent += 1
            scores = _visible(scores, place, seen, (stop - 1) * PAGE_TOKENS)
            coded, fade, top, total = _weigh(scores, top, total, weights, factors, bars, sent)
            adding = _add_values(coded, fade, acc, pages.index(step % STAGES).slice(0, HALF, 1))
            acc = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(bars.index(EMPTY + step % STAGES))
            step += 1
            sent += 1
        mbarrier.arrive(bars.index(Q_EMPTY))
        share = _share(total)
        mbarrier.wait(bars.index(TAKEN), (sent & 1) ^ 1)
        factors.store(share)
        mbarrier.arrive(bars.index(SENT))
        sent += 1
        acc = acc * gl.convert_layout(share, gl.SliceLayout(1, SUMS))[:, None]
        line = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))[:, None]
        column = gl.arange(0, HALF, gl.SliceLayout(0, SUMS))[None, :]
        whole, slot = _write(out, pieces, acc, line, column, request, rows, page, stop, length, ROWS, KV_LORA)
        gl.store(lse + slot + row, top + gl.log2(total), mask=(row >= 0) & (whole == 0))


@gluon.jit
def follow(pages, weights, factors, bars, context, begin, out, pieces, rows, KV_LORA: gl.constexpr):
    ROWS: gl.constexpr = weights.shape[0]
    HALF: gl.constexpr = KV_LORA // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    first, first_page, end, cut, cut_page = part_of_program(begin)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))[:, None]
    column = HALF + gl.arange(0, HALF, gl.SliceLayout(0, SUMS))[None, :]
    step, taken = gl.to_tensor(0), gl.to_tensor(0)
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        length = gl.load(context + request)
        stop = stop_of(length, request, cut, cut_page)
        acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        for _ in range(page, stop):
            stage = step % STAGES
            mbarrier.wait(bars.index(SENT), taken & 1)
            acc = acc * factors.load(gl.SliceLayout(1, SUMS))[:, None]
            mbarrier.wait(bars.index(FULL + stage), (step // STAGES) & 1)
            run = warpgroup_mma(weights, pages.index(stage).slice(HALF, HALF, 1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(run,))
            mbarrier.arrive(bars.index(TAKEN))
            mbarrier.arrive(bars.index(EMPTY + stage))
            step += 1
            taken += 1
        mbarrier.wait(bars.index(SENT), taken & 1)
        acc = acc * factors.load(gl.SliceLayout(1, SUMS))[:, None]
        mbarrier.arrive(bars.index(TAKEN))
        taken += 1
        _write(out, pieces, acc, row, column, request, rows, page, stop, length, ROWS, KV_LORA)


@gluon.jit
def _score_half(q_half, q_keys, pages, page_keys, bars, step, HALF: gl.constexpr, RIGHT: gl.constexpr,
                LAYOUT: gl.constexpr):  # fmt: skip
    """Starts the scores, [tokens, rows], that half of the columns give; the left half's with the keys' columns."""
    ROWS: gl.constexpr = q_half.shape[1]
    stage = step % STAGES
    mbarrier.wait(bars.index(FULL + stage), (step // STAGES) & 1)
    zero = gl.zeros([PAGE_TOKENS, ROWS], gl.float32, LAYOUT)
    half = pages.index(stage).slice(RIGHT * HALF, HALF, 1)
    run = warpgroup_mma(half, q_half, zero, use_acc=False, is_async=True)
    if not RIGHT:
        run = warpgroup_mma(page_keys.index(stage), q_keys.permute((1, 0)), run, is_async=True)
    return run


@gluon.jit
def _add_halves(scores, halves, bars, step, RIGHT: gl.constexpr):
    """With the other warpgroup's. The barriers of even and odd steps are others: one side may be a step ahead."""
    own, other = 2 * RIGHT + (step & 1), 2 * (1 - RIGHT) + (step & 1)
    halves.index(own).store(scores)
    mbarrier.arrive(bars.index(SENT + own))
    mbarrier.wait(bars.index(SENT + other), (step // 2) & 1)
    return scores + halves.index(other).load(scores.type.layout)


@gluon.jit
def _weigh_turned(scores, top, total, weights):
    """Puts a page's weights into `weights` [tokens, rows]: (what the sum so far is to be multiplied by, the highest
    scores, the weights' sums, not yet over tokens)"""
    higher = gl.maximum(top, gl.max(scores, 0))
    fade = _exp2_below(top, higher)
    weight = _exp2_below(scores, higher[None, :])
    weights.store(weight.to(weights.dtype))
    fence_async_shared()
    return fade, higher, total * fade[None, :] + weight


@gluon.jit
def side(qs, q_keys, pages, page_keys, weights, halves, bars, context, begin, out, pieces, lse,
         scale, rows, heads, KV_LORA: gl.constexpr, RIGHT: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = qs.shape[0]
    HALF: gl.constexpr = KV_LORA // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])  # of scores and sums
    first, first_page, end, cut, cut_page = part_of_program(begin)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    ahead = rows // heads - 1 - row // heads  # tokens of this step that come after the row's own
    place = gl.arange(0, PAGE_TOKENS, gl.SliceLayout(1, LAYOUT))[:, None]
    q_half = qs.slice(RIGHT * HALF, HALF, 1).permute((1, 0))
    mine = weights.index(RIGHT).permute((1, 0))  # [tokens, rows]
    step = gl.to_tensor(0)
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        length = gl.load(context + request)
        stop = stop_of(length, request, cut, cut_page)
        top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
        total = gl.zeros([PAGE_TOKENS, ROWS], gl.float32, LAYOUT)
        acc = gl.zeros([HALF, ROWS], gl.float32, LAYOUT)
        mbarrier.wait(bars.index(Q_FULL), (request - first) & 1)
        if page < stop:
            seen = (length - ahead)[None, :]
            run = _score_half(q_half, q_keys, pages, page_keys, bars, step, HALF, RIGHT, LAYOUT)
            scores = _add_halves(warpgroup_mma_wait(0, deps=(run,)), halves, bars, step, RIGHT) * scale
            for i in range(page, stop - 1):
                if rows > heads:  # else only the last page has hidden tokens
                    scores = _visible(scores, place, seen, i * PAGE_TOKENS)
                fade, top, total = _weigh_turned(scores, top, total, mine)
                values = pages.index(step % STAGES).slice(RIGHT * HALF, HALF, 1).permute((1, 0))
                adding = warpgroup_mma(values, mine, warpgroup_mma_init(acc * fade[None, :]), is_async=True)
                run = _score_half(q_half, q_keys, pages, page_keys, bars, step + 1, HALF, RIGHT, LAYOUT)
                acc = warpgroup_mma_wait(1 if RIGHT else 2, deps=(adding,))
                mbarrier.arrive(bars.index(EMPTY + step % STAGES))
                step += 1
                scores = _add_halves(warpgroup_mma_wait(0, deps=(run,)), halves, bars, step, RIGHT) * scale
            scores = _visible(scores, place, seen, (stop - 1) * PAGE_TOKENS)
            fade, top, total = _weigh_turned(scores, top, total, mine)
            values = pages.index(step % STAGES).slice(RIGHT * HALF, HALF, 1).permute((1, 0))
            adding = warpgroup_mma(values, mine, warpgroup_mma_init(acc * fade[None, :]), is_async=True)
            acc = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(bars.index(EMPTY + step % STAGES))
            step += 1
        mbarrier.arrive(bars.index(Q_EMPTY))
        mass = gl.sum(total, 0)
        column = RIGHT * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))[:, None]
        acc = acc * _share(mass)[None, :]
        whole, slot = _write(out, pieces, acc, row[None, :], column, request, rows, page, stop, length, ROWS, KV_LORA)
        if not RIGHT:
            gl.store(lse + slot + row, top + gl.log2(mass), mask=(row >= 0) & (whole == 0))
