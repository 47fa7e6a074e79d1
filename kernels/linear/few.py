# mypy: ignore-errors
"""Few tokens on sm_90, in Gluon: one warp keeps a ring of shared memory full by TMA, warpgroups multiply.

As in streaming.py weights lie on the M side of the tensor cores, and SPLITS programs may share the K of a tile. A tile
is WIDTH times 64 columns of w by HEIGHT times up to 64 tokens, a warpgroup each. Wide, for every tile reads the
activations again from the L2, and 64 tokens of them are as many bytes as 64 columns of 8-bit weights; but the wider the
more splits, whose sums cross the L2 too. Weights of the first round are asked for before the launches ahead have ended.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from kernels.hopper import descriptor, ring_barriers
from kernels.linear.naive import LinearScratch
from kernels.linear.tiles import HIGH, ROWS

WIDE = 128  # bytes of K in a block: a row of TMA's swizzle, and in 8 bits a block of scales
_ROWS = gl.constexpr(ROWS)


@gluon.jit
def _fetch(matrix, places, ready, stage, row, step, STRIPS: gl.constexpr, DEEP: gl.constexpr):
    """STRIPS blocks from `row` on, of each of the DEEP blocks of K that are `step`."""
    for d in gl.static_range(DEEP):
        at = (step * DEEP + d) * matrix.block_type.shape[1]
        for i in gl.static_range(STRIPS):
            place = places.index((stage * DEEP + d) * STRIPS + i)
            tma.async_copy_global_to_shared(matrix, [row + i * matrix.block_type.shape[0], at], ready, place)


@gluon.jit
def _feed(
    x, w, xs, ws, full, empty, column, first, steps,
    WIDTH: gl.constexpr, HEIGHT: gl.constexpr, DEEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What lies past the ends of x and w arrives as zeros, and is counted."""
    BYTES: gl.constexpr = DEEP * (WIDTH * w.block_type.nbytes + HEIGHT * x.block_type.nbytes)
    early = gl.minimum(steps, STAGES)
    for i in range(early):
        mbarrier.expect(full.index(i), BYTES)
        _fetch(w, ws, full.index(i), i, column, first + i, WIDTH, DEEP)
    cuda.gdc_wait()  # weights never change; all else may be the work of the launches ahead
    for i in range(early):
        _fetch(x, xs, full.index(i), i, 0, first + i, HEIGHT, DEEP)
    for i in range(early, steps):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), BYTES)
        _fetch(w, ws, full.index(stage), stage, column, first + i, WIDTH, DEEP)
        _fetch(x, xs, full.index(stage), stage, 0, first + i, HEIGHT, DEEP)


@gluon.jit
def _load_scales(x_scale, w_scale, row, block, blocks, DEEP: gl.constexpr):
    """(of x, of w) for each block of a step"""
    scales = ()
    for d in gl.static_range(DEEP):
        at = gl.minimum(block + d, blocks - 1)
        scales = scales + (gl.load(x_scale + (row + at)), gl.load(w_scale + at))  # noqa: RUF005
    return scales


@gluon.jit
def _product(
    xs, ws, stage, d, acc,
    WARPGROUP: gl.constexpr, WIDTH: gl.constexpr, HEIGHT: gl.constexpr, DEEP: gl.constexpr, USE_ACC: gl.constexpr,
):  # fmt: skip
    wt = ws.index((stage * DEEP + d) * WIDTH + WARPGROUP // HEIGHT)
    xt = xs.index((stage * DEEP + d) * HEIGHT + WARPGROUP % HEIGHT)
    return warpgroup_mma(wt, xt.permute((1, 0)), acc, use_acc=USE_ACC, is_async=True)


@gluon.jit
def _sum(
    xs, ws, full, empty, x_scale, w_scale, row, first, steps, blocks, zero,
    WARPGROUP: gl.constexpr, WIDTH: gl.constexpr, HEIGHT: gl.constexpr, DEEP: gl.constexpr, STAGES: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """This warpgroup's columns of w by its tokens, over this split of K."""
    acc = zero
    if SCALED:
        scales = _load_scales(x_scale, w_scale, row, first * DEEP, blocks, DEEP)
        for i in range(steps):
            stage = i % STAGES
            coming = _load_scales(x_scale, w_scale, row, (first + i + 1) * DEEP, blocks, DEEP)
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            runs = ()
            for d in gl.static_range(DEEP):
                runs = runs + (_product(xs, ws, stage, d, zero, WARPGROUP, WIDTH, HEIGHT, DEEP, False),)  # noqa: RUF005
            for d in gl.static_range(DEEP):
                part = warpgroup_mma_wait(DEEP - 1 - d, deps=(runs[d],))
                if d == DEEP - 1:
                    mbarrier.arrive(empty.index(stage), count=1)
                acc += part * (scales[2 * d] * scales[2 * d + 1])[None, :]  # while the next block's product runs
            scales = coming
    else:
        for i in range(steps):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            for d in gl.static_range(DEEP):
                acc = _product(xs, ws, stage, d, acc, WARPGROUP, WIDTH, HEIGHT, DEEP, True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(stage), count=1)
    return acc


@gluon.jit
def _add_splits(partials, ticket, acc, split, SPLITS: gl.constexpr, TOGETHER: gl.constexpr):
    """(the sum over the splits, whether this warpgroup came last and holds it), as in streaming.py; what it has in
    registers it does not read back. TOGETHER parts are on their way at once."""
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    r = gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    c = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    at = partials + r[:, None] * acc.shape[1] + c[None, :]
    gl.store(at + split * SIZE, acc, cache_modifier=".cg")
    gl.thread_barrier()  # the warpgroup has written before one of its threads takes the ticket
    last = gl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        mine = acc
        acc = gl.zeros_like(acc)
        for some in range(0, gl.num_programs(1), TOGETHER):
            for i in gl.static_range(TOGETHER):
                other = some + i
                there = (other < SPLITS) & (other != split)
                theirs = gl.load(at + other * SIZE, mask=(r >= 0)[:, None] & there, other=0.0, cache_modifier=".cg")
                acc += gl.where(other == split, mine, theirs)
        gl.store(ticket, 0)
    return acc, last


@gluon.jit
def _multiply(
    xs, ws, full, empty, x_scale, w_scale, add, out, partials, tickets, column, first, steps, blocks, split,
    tokens, n, x_scale_stride, w_scale_stride, add_stride, out_stride,
    WARPGROUP: gl.constexpr, WIDTH: gl.constexpr, HEIGHT: gl.constexpr, DEEP: gl.constexpr, STAGES: gl.constexpr,
    SPLITS: gl.constexpr, SCALED: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = xs.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32 // (xs.dtype.primitive_bitwidth // 8)])
    WRITTEN: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])  # 16 bytes of a row a thread
    column += WARPGROUP // HEIGHT * _ROWS
    token = WARPGROUP % HEIGHT * BM
    c = column + gl.arange(0, _ROWS, gl.SliceLayout(1, WRITTEN))
    t = (token + gl.arange(0, BM, gl.SliceLayout(0, WRITTEN))).to(gl.int64)
    inside = (c < n)[:, None] & (t < tokens)[None, :]
    cuda.gdc_wait()
    if ADD:  # early, so that nobody waits for it
        residual = gl.load(add + (c[:, None] + t[None, :] * add_stride), mask=inside, other=0.0)
    row = gl.minimum(token + gl.arange(0, BM, gl.SliceLayout(0, ACC)), tokens - 1) * x_scale_stride
    if SCALED:
        w_scale += gl.minimum(column, n - 1) // 128 * w_scale_stride
    zero = gl.zeros([_ROWS, BM], gl.float32, ACC)
    acc = _sum(xs, ws, full, empty, x_scale, w_scale, row, first, steps, blocks, zero,
               WARPGROUP, WIDTH, HEIGHT, DEEP, STAGES, SCALED)  # fmt: skip
    holds = True
    if SPLITS > 1:
        part = gl.program_id(0) * (WIDTH * HEIGHT) + WARPGROUP
        TOGETHER: gl.constexpr = min(SPLITS, 8 if BM <= 16 else 4 if WIDTH * HEIGHT < 3 else 2)  # as registers allow
        acc, holds = _add_splits(partials + part * (SPLITS * _ROWS * BM), tickets + part, acc, split, SPLITS, TOGETHER)
    if holds:
        if ADD:
            acc += gl.convert_layout(residual, ACC).to(gl.float32)
        sums = gl.convert_layout(acc.to(out.dtype.element_ty), WRITTEN)
        gl.store(out + (c[:, None] + t[None, :] * out_stride), sums, mask=inside)


@gluon.jit
def _part(
    x, w, xs, ws, full, empty, x_scale, w_scale, add, out, partials, tickets, column, first, steps, blocks, split,
    tokens, n, x_scale_stride, w_scale_stride, add_stride, out_stride,
    PART: gl.constexpr, WIDTH: gl.constexpr, HEIGHT: gl.constexpr, DEEP: gl.constexpr, STAGES: gl.constexpr,
    SPLITS: gl.constexpr, SCALED: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    if PART < WIDTH * HEIGHT:
        _multiply(xs, ws, full, empty, x_scale, w_scale, add, out, partials, tickets,
                  column, first, steps, blocks, split,
                  tokens, n, x_scale_stride, w_scale_stride, add_stride, out_stride,
                  PART, WIDTH, HEIGHT, DEEP, STAGES, SPLITS, SCALED, ADD)  # fmt: skip
    else:
        _feed(x, w, xs, ws, full, empty, column, first, steps, WIDTH, HEIGHT, DEEP, STAGES)


@gluon.jit
def _few_tokens(
    x, w, x_scale, w_scale, add, out, partials, tickets,
    tokens, n, k, x_scale_stride, w_scale_stride, add_stride, out_stride,
    SCALED: gl.constexpr, ADD: gl.constexpr, WIDTH: gl.constexpr, HEIGHT: gl.constexpr, DEEP: gl.constexpr,
    STAGES: gl.constexpr, SPLITS: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = x.block_type.shape[0]
    BK: gl.constexpr = x.block_type.shape[1]
    cuda.gdc_launch_dependents()
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * DEEP * HEIGHT, BM, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES * DEEP * WIDTH, _ROWS, BK], w.layout)
    full, empty = ring_barriers(STAGES, 1, WIDTH * HEIGHT)
    fence_async_shared()
    split, blocks = gl.program_id(1), k // BK
    column = gl.program_id(0) * (WIDTH * _ROWS)
    whole = gl.cdiv(blocks, DEEP)
    first = split * whole // SPLITS
    steps = (split + 1) * whole // SPLITS - first
    gl.warp_specialize(
        [(_part, (x, w, xs, ws, full, empty, x_scale, w_scale, add, out, partials, tickets,
                  column, first, steps, blocks, split,
                  tokens, n, x_scale_stride, w_scale_stride, add_stride, out_stride,
                  part, WIDTH, HEIGHT, DEEP, STAGES, SPLITS, SCALED, ADD))
         for part in (0, 1, 2, 3, 4)[: WIDTH * HEIGHT + 1]],
        WARPS, REGISTERS,
    )  # fmt: skip


FEEDER = 32  # registers a thread of it


def few_tokens(
    x: Tensor,  # [T, k]
    x_scale: Tensor | None,  # [T, k / 128]
    w: Tensor,  # [n, k], as it lies in memory
    w_scale: Tensor | None,  # [ceil(n / 128), k / 128]
    out: Tensor,  # [T, n]
    add: Tensor | None,
    scratch: LinearScratch | None,
    tile: dict,
) -> None:
    """Rows of x and w must lie multiples of 16 bytes apart."""
    (tokens, k), n = x.shape, len(w)
    bm, height, width, resident = min(tile["BM"], HIGH), -(-tile["BM"] // HIGH), tile["width"], tile["resident"]
    columns = WIDE // x.itemsize
    tiles, splits = -(-n // (width * ROWS)), 1 if scratch is None else tile["splits"]
    parts = tiles * width * height
    if tokens > bm * height or k % columns:
        raise ValueError(f"a tile of {tile['BM']} tokens does not take {tokens}, or blocks of {WIDE} bytes not K = {k}")
    LinearScratch.check(splits, parts, bm, ROWS)
    # Four warps of registers for each warpgroup, and four that only the feeder uses.
    groups = width * height
    each = min(248, (1 << 16) // (resident * 128 * (groups + 1)) // 8 * 8)
    most = min(240, ((groups + 1) * each - FEEDER) // groups // 8 * 8)
    _few_tokens[(tiles, splits)](
        descriptor(x, bm, columns), descriptor(w, ROWS, columns), x_scale, w_scale, add, out,
        scratch.partials if scratch else None, scratch.tickets if scratch else None, tokens, n, k,
        0 if x_scale is None else x_scale.stride(0), 0 if w_scale is None else w_scale.stride(0),
        0 if add is None else add.stride(0), out.stride(0),
        x_scale is not None, add is not None, width, height, tile["deep"], tile["ring"], splits,
        (4,) * (groups - 1) + (1,), (most,) * (groups - 1) + (FEEDER,),
        num_warps=4, maxnreg=each, launch_pdl=True,
    )  # fmt: skip
