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
def _place(pieces, request, rows, page, stop, length, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """(whether it is no piece, the piece's first row)"""
    whole = (page == 0) & (stop * PAGE_TOKENS >= length)
    return whole, (2 * gl.program_id(1) + (page == 0).to(gl.int32)).to(gl.int64) * (gl.num_programs(0) * ROWS)


@gluon.jit
def _store(out, pieces, result, row, column, whole, slot, request, rows, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """`row` and `column` broadcast to the result's shape."""
    at = row.to(gl.int64) * WIDTH + column.to(gl.int64)  # in 64 bits, so that a thread's places differ by constants
    to = out + request.to(gl.int64) * rows * WIDTH
    if not whole:
        gl.store(pieces + slot * WIDTH + at, result.to(pieces.dtype.element_ty))
    elif (gl.program_id(0) + 1) * ROWS <= rows:  # a mask would cost a branch at every store
        gl.store(to + at, result.to(out.dtype.element_ty))
    else:
        gl.store(to + at, result.to(out.dtype.element_ty), mask=row < rows)


@gluon.jit
def _write(
    out, pieces, sums, share, row, column, request, rows, page, stop, length,
    ROWS: gl.constexpr, CHUNK: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """The sums of CHUNK columns each, times `share`; `row` and the first one's `column` are broadcast, as share is.
    Returns what _place does."""
    whole, slot = _place(pieces, request, rows, page, stop, length, ROWS, WIDTH)
    for k in gl.static_range(len(sums)):
        at = column + k * CHUNK
        _store(out, pieces, sums[k] * share, row, at, whole, slot, request, rows, ROWS, WIDTH)
    return whole, slot


@gluon.jit
def _visible(scores, place, seen, first):
    """-inf for tokens that a row does not see; `place` and `seen` are broadcast, `first` is the page's first token."""
    return gl.where(place < seen - first, scores, float("-inf"))


@gluon.jit
def _wait_for_chunk(bars, step, chunk, COUNT: gl.constexpr):
    """Its place among the pages' chunks."""
    place = step % STAGES * COUNT + chunk
    mbarrier.wait(bars.index(FULL + place), (step // STAGES) & 1)
    return place


@gluon.jit
def _score(run, qs, q_keys, pages, page_keys, bars, step, FIRST: gl.constexpr, LAST: gl.constexpr):
    """Starts what chunks FIRST to LAST add to the scores of a page, each as soon as it is there."""
    CHUNK: gl.constexpr = pages.shape[2]
    for chunk in gl.static_range(FIRST, LAST):
        place = _wait_for_chunk(bars, step, chunk, pages.shape[0] // STAGES)
        q = qs.slice(chunk * CHUNK, CHUNK, 1)
        run = warpgroup_mma(q, pages.index(place).permute((1, 0)), run, use_acc=chunk > 0, is_async=True)
        if chunk == 0:
            run = warpgroup_mma(q_keys, page_keys.index(step % STAGES).permute((1, 0)), run, is_async=True)
    return run


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
def _zeros(ROWS: gl.constexpr, WIDTH: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    sums = ()
    for _ in gl.static_range(COUNT):
        sums = sums + (gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT),)  # noqa: RUF005
    return sums


@gluon.jit
def _faded(sums, fade):
    """All sums times `fade`, before any product starts: none may be touched while one runs."""
    faded = ()
    for k in gl.static_range(len(sums)):
        faded = faded + (warpgroup_mma_init(sums[k] * fade),)  # noqa: RUF005
    return faded


@gluon.jit
def _add_values(weights, fade, sums, pages, step, FIRST: gl.constexpr):
    """Starts sums * fade + weights values, for the chunks FIRST and on of a page."""
    faded = _faded(sums, fade[:, None])
    runs = ()
    for k in gl.static_range(len(sums)):
        values = pages.index(step % STAGES * (pages.shape[0] // STAGES) + FIRST + k)
        runs = runs + (warpgroup_mma(weights, values, faded[k], is_async=True),)  # noqa: RUF005
    return runs


@gluon.jit
def _values_added(runs, bars, step, FIRST: gl.constexpr, COUNT: gl.constexpr, LATER: gl.constexpr):
    """The sums, once only LATER products are still under way; the chunks may be filled again."""
    sums = ()
    for k in gl.static_range(len(runs)):
        sums = sums + (warpgroup_mma_wait(LATER + len(runs) - 1 - k, deps=(runs[k],)),)  # noqa: RUF005
        mbarrier.arrive(bars.index(EMPTY + step % STAGES * COUNT + FIRST + k))
    return sums


@gluon.jit
def lead(qs, q_keys, pages, page_keys, weights, factors, bars, context, begin, out, pieces, lse,
         scale, rows, heads, KV_LORA: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = qs.shape[0]
    CHUNK: gl.constexpr = pages.shape[2]
    COUNT: gl.constexpr = KV_LORA // CHUNK
    MINE: gl.constexpr = COUNT // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAGE_TOKENS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    FACTORS: gl.constexpr = gl.SliceLayout(1, SUMS)
    first, first_page, end, cut, cut_page = part_of_program(begin)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    ahead = rows // heads - 1 - row // heads  # tokens of this step that come after the row's own
    place = gl.arange(0, PAGE_TOKENS, gl.SliceLayout(0, SCORES))[None, :]
    line = gl.program_id(0) * ROWS + gl.arange(0, ROWS, FACTORS)[:, None]
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, SUMS))[None, :]
    zero = gl.zeros([ROWS, PAGE_TOKENS], gl.float32, SCORES)
    step, sent, asked = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        length = gl.load(context + request)
        stop = stop_of(length, request, cut, cut_page)
        top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        sums = _zeros(ROWS, CHUNK, MINE, SUMS)
        if page < stop:
            mbarrier.wait(bars.index(Q_FULL), asked & 1)
            asked += 1
            seen = (length - ahead)[:, None]
            run = _score(zero, qs, q_keys, pages, page_keys, bars, step, 0, COUNT)
            scores = warpgroup_mma_wait(0, deps=(run,)) * scale
            for i in range(page, stop - 1):
                if rows > heads:  # else only the last page has hidden tokens
                    scores = _visible(scores, place, seen, i * PAGE_TOKENS)
                weight, fade, top, total = _weigh(scores, top, total, weights, factors, bars, sent)
                weight, fade = gl.convert_layout(weight, WEIGHTS), gl.convert_layout(fade, FACTORS)
                adding = _add_values(weight, fade, sums, pages, step, 0)
                run = _score(zero, qs, q_keys, pages, page_keys, bars, step + 1, 0, MINE)
                sums = _values_added(adding, bars, step, 0, COUNT, MINE + 1)
                run = _score(run, qs, q_keys, pages, page_keys, bars, step + 1, MINE, COUNT)
                scores = warpgroup_mma_wait(0, deps=(run,)) * scale
                step += 1
                sent += 1
            mbarrier.arrive(bars.index(Q_EMPTY))
            scores = _visible(scores, place, seen, (stop - 1) * PAGE_TOKENS)
            weight, fade, top, total = _weigh(scores, top, total, weights, factors, bars, sent)
            weight, fade = gl.convert_layout(weight, WEIGHTS), gl.convert_layout(fade, FACTORS)
            adding = _add_values(weight, fade, sums, pages, step, 0)
            sums = _values_added(adding, bars, step, 0, COUNT, 0)
            step += 1
            sent += 1
        share = _share(total)
        mbarrier.wait(bars.index(TAKEN), (sent & 1) ^ 1)
        factors.store(share)
        mbarrier.arrive(bars.index(SENT))
        sent += 1
        share = gl.convert_layout(share, FACTORS)[:, None]
        whole, slot = _write(
            out, pieces, sums, share, line, column, request, rows, page, stop, length, ROWS, CHUNK, KV_LORA
        )
        gl.store(lse + slot + row, top + gl.log2(total), mask=(row >= 0) & (whole == 0))


@gluon.jit
def follow(pages, weights, factors, bars, context, begin, out, pieces, rows, KV_LORA: gl.constexpr):
    ROWS: gl.constexpr = weights.shape[0]
    CHUNK: gl.constexpr = pages.shape[2]
    COUNT: gl.constexpr = KV_LORA // CHUNK
    FIRST: gl.constexpr = COUNT // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    FACTORS: gl.constexpr = gl.SliceLayout(1, SUMS)
    first, first_page, end, cut, cut_page = part_of_program(begin)
    line = gl.program_id(0) * ROWS + gl.arange(0, ROWS, FACTORS)[:, None]
    column = FIRST * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, SUMS))[None, :]
    step, taken = gl.to_tensor(0), gl.to_tensor(0)
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        length = gl.load(context + request)
        stop = stop_of(length, request, cut, cut_page)
        sums = _zeros(ROWS, CHUNK, COUNT - FIRST, SUMS)
        for _ in range(page, stop):
            mbarrier.wait(bars.index(SENT), taken & 1)
            for chunk in gl.static_range(FIRST, COUNT):
                _wait_for_chunk(bars, step, chunk, COUNT)
            adding = _add_values(weights, factors.load(FACTORS), sums, pages, step, FIRST)
            sums = _values_added(adding, bars, step, FIRST, COUNT, 0)
            mbarrier.arrive(bars.index(TAKEN))
            step += 1
            taken += 1
        mbarrier.wait(bars.index(SENT), taken & 1)
        share = factors.load(FACTORS)[:, None]
        mbarrier.arrive(bars.index(TAKEN))
        taken += 1
        _write(out, pieces, sums, share, line, column, request, rows, page, stop, length, ROWS, CHUNK, KV_LORA)


@gluon.jit
def _score_half(q, q_keys, pages, page_keys, bars, step, FIRST: gl.constexpr, LAST: gl.constexpr,
                LAYOUT: gl.constexpr):  # fmt: skip
    """Starts the scores, [tokens, rows], that chunks FIRST to LAST of the columns give; the first's with the key's."""
    ROWS: gl.constexpr = q.shape[0]
    CHUNK: gl.constexpr = pages.shape[2]
    run = gl.zeros([PAGE_TOKENS, ROWS], gl.float32, LAYOUT)
    for chunk in gl.static_range(FIRST, LAST):
        place = _wait_for_chunk(bars, step, chunk, pages.shape[0] // STAGES)
        part = q.slice(chunk * CHUNK, CHUNK, 1).permute((1, 0))
        run = warpgroup_mma(pages.index(place), part, run, use_acc=chunk > FIRST, is_async=True)
        if chunk == 0:
            run = warpgroup_mma(page_keys.index(step % STAGES), q_keys.permute((1, 0)), run, is_async=True)
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
def _add_turned(weights, fade, sums, pages, step, FIRST: gl.constexpr):
    """`_add_values`, [latent columns, rows]."""
    faded = _faded(sums, fade[None, :])
    runs = ()
    for k in gl.static_range(len(sums)):
        values = pages.index(step % STAGES * (pages.shape[0] // STAGES) + FIRST + k).permute((1, 0))
        runs = runs + (warpgroup_mma(values, weights, faded[k], is_async=True),)  # noqa: RUF005
    return runs


@gluon.jit
def side(qs, q_keys, pages, page_keys, weights, halves, bars, context, begin, out, pieces, lse,
         scale, rows, heads, KV_LORA: gl.constexpr, RIGHT: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = qs.shape[0]
    CHUNK: gl.constexpr = pages.shape[2]
    COUNT: gl.constexpr = KV_LORA // CHUNK
    FIRST: gl.constexpr = RIGHT * (COUNT // 2)
    LAST: gl.constexpr = FIRST + COUNT // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])  # of scores and sums
    first, first_page, end, cut, cut_page = part_of_program(begin)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    ahead = rows // heads - 1 - row // heads  # tokens of this step that come after the row's own
    place = gl.arange(0, PAGE_TOKENS, gl.SliceLayout(1, LAYOUT))[:, None]
    column = FIRST * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))[:, None]
    mine = weights.index(RIGHT).permute((1, 0))  # [tokens, rows]
    step, asked = gl.to_tensor(0), gl.to_tensor(0)
    for request in range(first, end):
        page = gl.where(request == first, first_page, 0)
        length = gl.load(context + request)
        stop = stop_of(length, request, cut, cut_page)
        top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
        total = gl.zeros([PAGE_TOKENS, ROWS], gl.float32, LAYOUT)
        sums = _zeros(CHUNK, ROWS, LAST - FIRST, LAYOUT)
        mbarrier.wait(bars.index(Q_FULL), asked & 1, pred=page < stop)
        asked += (page < stop).to(gl.int32)
        seen = (length - ahead)[None, :]
        for i in range(page, stop):
            run = _score_half(qs, q_keys, pages, page_keys, bars, step, FIRST, LAST, LAYOUT)
            scores = _add_halves(warpgroup_mma_wait(0, deps=(run,)), halves, bars, step, RIGHT) * scale
            mbarrier.arrive(bars.index(Q_EMPTY), pred=i == stop - 1)
            if (rows > heads) | (i == stop - 1):  # else only the last page has hidden tokens
                scores = _visible(scores, place, seen, i * PAGE_TOKENS)
            fade, top, total = _weigh_turned(scores, top, total, mine)
            adding = _add_turned(mine, fade, sums, pages, step, FIRST)
            sums = _values_added(adding, bars, step, FIRST, COUNT, 0)
            step += 1
        mass = gl.sum(total, 0)
        share = _share(mass)[None, :]
        whole, slot = _write(
            out, pieces, sums, share, row[None, :], column, request, rows, page, stop, length, ROWS, CHUNK, KV_LORA
        )
        if not RIGHT:
            gl.store(lse + slot + row, top + gl.log2(mass), mask=(row >= 0) & (whole == 0))
