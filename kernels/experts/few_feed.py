"""What feeds few.py's ring of stages: a warp that takes tiles and fetches their weights, and one that fetches the rows
to multiply them by. The first tells the other one, and whoever multiplies, which tile a stage belongs to."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra import cuda

from kernels.experts.work import CHUNK, EIGHT

_EIGHT = gl.constexpr(EIGHT)
LINE = gl.constexpr(128)  # bytes of K a step
_CHUNK = gl.constexpr(CHUNK)
_ODD = gl.constexpr(1 << 30)  # on top of the counter of tiles in every other launch


@gluon.jit
def deal(progress):
    """The next tile's number, and which launch this is: odd (1) or even. Not a plain load, which might find what an
    earlier launch left in the processor's own cache."""
    dealt = gl.atomic_add(progress, 1, sem="relaxed", scope="gpu")
    return dealt % _ODD, dealt // _ODD


@gluon.jit
def _slot(blocks, block, most):
    """Of a block that may not exist."""
    return gl.load(
        blocks + gl.minimum(block, most - 1) * 3, volatile=True
    )  # volatile: now, not when it is known to exist


@gluon.jit
def _tell(indices, told, empty, step, index, STAGES: gl.constexpr):
    """Claims a stage for a step of tile `index`."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    indices.index(stage).store(gl.full([1], index, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    gl.thread_barrier()
    mbarrier.arrive(told.index(stage), count=1)
    return stage


@gluon.jit
def hear(indices, barriers, step, STAGES: gl.constexpr):
    stage = step % STAGES
    mbarrier.wait(barriers.index(stage), (step // STAGES) & 1)
    return gl.max(indices.index(stage).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _feed_tile(
    w, row, column, apart, index, ring, indices, told, full, empty, step, K: gl.constexpr, STAGES: gl.constexpr
):
    STRIP: gl.constexpr = w.block_type.shape[0]
    BK: gl.constexpr = w.block_type.shape[1]
    for at in range(0, K, BK):
        stage = _tell(indices, told, empty, step, index, STAGES)
        ready = full.index(stage)
        mbarrier.expect(ready, 2 * STRIP * LINE)
        tma.async_copy_global_to_shared(w, [row, column + at], ready, ring.index(2 * stage))
        tma.async_copy_global_to_shared(w, [row + apart, column + at], ready, ring.index(2 * stage + 1))
        step += 1
    return step


@gluon.jit
def _fetch_ahead(weights, size):
    """Asks the L2 for this program's part of the first `size` bytes."""
    EACH: gl.constexpr = _CHUNK // 32
    lane, at = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])), gl.program_id(0) * _CHUNK
    while at < size:
        gl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
            [weights + (at + lane * EACH), gl.full_like(lane, EACH)], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        at += gl.num_programs(0) * _CHUNK


@gluon.jit
def feed_weights(
    up, down, ring, indices, told, full, empty, progress, index, odd, blocks, counts, most, weights, ahead,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Takes tiles and tells the others which; `index` is the first. A number past the last tile means the end. A slot
    is one of the PARTS of an expert, columns of its `up` and rows of its `down`, INTER of each."""
    STRIP: gl.constexpr = up.block_type.shape[0]
    UPS: gl.constexpr = INTER // STRIP
    DOWNS: gl.constexpr = HIDDEN // (2 * STRIP)
    _fetch_ahead(weights, ahead)
    cuda.gdc_wait()
    slot, count, step = _slot(blocks, index // UPS, most), gl.load(counts), 0
    ups, total = count * UPS, count * (UPS + DOWNS)
    while index < ups:
        row = (slot // PARTS * (2 * PARTS) + slot % PARTS) * INTER + index % UPS * STRIP
        step = _feed_tile(up, row, 0, PARTS * INTER, index, ring, indices, told, full, empty, step, HIDDEN, STAGES)
        index, _ = deal(progress)
        slot = _slot(blocks, index // UPS, most)
    while index < total:
        slot = _slot(blocks, (index - ups) // DOWNS, most)
        row, column = slot // PARTS * HIDDEN + (index - ups) % DOWNS * (2 * STRIP), slot % PARTS * INTER
        step = _feed_tile(down, row, column, STRIP, index, ring, indices, told, full, empty, step, INTER, STAGES)
        index, _ = deal(progress)
    mbarrier.arrive(full.index(_tell(indices, told, empty, step, index, STAGES)), count=1)
    if index == total + gl.num_programs(0) - 1:  # nobody will ask again: make ready for the next launch
        lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        for first in range(0, most, 32):
            block = first + lane
            gl.store(progress + 1 + (1 - odd) * most + block, gl.zeros_like(block), mask=block < most)
        gl.thread_barrier()
        gl.atomic_xchg(progress, (1 - odd) * _ODD, sem="release", scope="gpu")
    cuda.gdc_launch_dependents()


@gluon.jit
def _feed_tile_rows(source, row, rows, xs, told, full, step, K: gl.constexpr, STAGES: gl.constexpr):
    """Eight at a time, no more than there are; what lies in the place of the others is multiplied and dropped."""
    BK: gl.constexpr = source.block_type.shape[1]
    EIGHTS: gl.constexpr = xs.shape[1] // _EIGHT
    for at in range(0, K, BK):
        stage = step % STAGES
        ready = full.index(stage)
        mbarrier.wait(told.index(stage), (step // STAGES) & 1)
        for i in gl.static_range(EIGHTS):
            last = (rows > i * _EIGHT) & (rows <= (i + 1) * _EIGHT)
            mbarrier.expect(ready, (i + 1) * _EIGHT * LINE, pred=last)
        for i in gl.static_range(EIGHTS):
            to = xs.index(stage).slice(i * _EIGHT, _EIGHT)
            tma.async_copy_global_to_shared(source, [row + i * _EIGHT, at], ready, to, pred=rows > i * _EIGHT)
        step += 1
    return step


@gluon.jit
def feed_rows(
    x, act, xs, indices, told, full, blocks, counts, done, x_rows,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, UPS: gl.constexpr, DOWNS: gl.constexpr, ALL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """What weights are multiplied by: rows of x, or a block's activations once all of them are there."""
    cuda.gdc_wait()
    count, step = gl.load(counts), 0
    ups, total = count * UPS, count * (UPS + DOWNS)
    index = hear(indices, told, step, STAGES)
    while index < ups:
        row, rows = 0, x_rows
        if not ALL:
            block = blocks + index // UPS * 3
            row, rows = gl.load(block + 1) % x_rows, gl.load(block + 2)
        step = _feed_tile_rows(x, row, rows, xs, told, full, step, HIDDEN, STAGES)
        index = hear(indices, told, step, STAGES)
    while index < total:
        b = (index - ups) // DOWNS
        first, rows = gl.load(blocks + b * 3 + 1), gl.load(blocks + b * 3 + 2)
        finished = gl.atomic_add(done + b, 0, sem="acquire", scope="gpu")
        while finished < UPS:
            finished = gl.atomic_add(done + b, 0, sem="acquire", scope="gpu")
        fence_proxies(gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])))
        step = _feed_tile_rows(act, first, rows, xs, told, full, step, INTER, STAGES)
        index = hear(indices, told, step, STAGES)
    mbarrier.arrive(full.index(step % STAGES), count=1)


@gluon.jit
def fence_proxies(lanes):
    """Between what threads store and what TMA reads, in global memory. `lanes`: one number a thread."""
    gl.inline_asm_elementwise(
        "fence.proxy.async; mov.b32 $0, $1;", "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1
    )
