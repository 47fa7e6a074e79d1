"""The routed experts' FFN for many tokens on sm_90, in Gluon, after kernels/linear/hopper.py: one warp feeds shared
memory by TMA, two warpgroups multiply. In fp8 they promote too, one of them while the other's products run.

Rows of x are gathered first, each expert's together, because TMA fetches neighbours alone. A tile is a block of up to
128 places by two strips of 128 weight rows: gate and up of the same columns, which are one group of what is quantised
for the second product, or two neighbours of `down`. A warpgroup has 64 of the places; where a block has no more, the
second one only keeps step. Blocks of one expert are neighbours in the order of tiles, and the hardware deals out a
program a tile in that order: they start together, so that its weights come from memory once. Programs that stayed and
walked over tiles drifted apart, and read them again for every block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.experts.gather import gather
from kernels.experts.work import ExpertWork, rows_and_scale
from kernels.hopper import descriptor, ring_barriers
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows

BLOCK = 128  # rows of a block of the plan
_HALF = gl.constexpr(64)  # of them, a warpgroup's
_GROUP = gl.constexpr(GROUP)  # columns of a strip, and in fp8 elements of K a step
_STEP = gl.constexpr(128)  # bytes of K a step: a row of TMA's swizzle
_FP8_MAX = gl.constexpr(448.0)
_CODED = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GROUP, 32]))  # a warpgroup's [64, 128] of fp8
_PLAIN = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GROUP, 16]))  # of 16 bits


@gluon.jit
def _tile(index, blocks, count, across, DEEP: gl.constexpr):
    """(slot, first place, places, strip): DEEP blocks side by side, then the next strip."""
    first = index // (DEEP * across) * DEEP
    deep = gl.minimum(count - first, DEEP)
    inside = index % (DEEP * across)
    block = blocks + (first + inside % deep) * 3
    return gl.load(block), gl.load(block + 1), gl.load(block + 2), inside // deep


@gluon.jit
def _feed(
    x, w, xs, ws, full, empty, blocks, counts, k, n, apart, across, wide, STAGES: gl.constexpr, DEEP: gl.constexpr
):
    """Where the second half has no places, its rows are neither fetched nor expected."""
    BK: gl.constexpr = xs.shape[2]
    count, step = gl.load(counts), 0
    for index in range(gl.program_id(0), count * across, gl.num_programs(0)):
        slot, place, places, strip = _tile(index, blocks, count, across, DEEP)
        row, both = slot * n + strip * wide, places > _HALF
        for at in range(0, k, BK):
            stage = step % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(ready, (2 * _HALF + 2 * _GROUP) * _STEP, pred=both)
            mbarrier.expect(ready, (_HALF + 2 * _GROUP) * _STEP, pred=places <= _HALF)
            tma.async_copy_global_to_shared(x, [place, at], ready, xs.index(2 * stage))
            tma.async_copy_global_to_shared(x, [place + _HALF, at], ready, xs.index(2 * stage + 1), pred=both)
            tma.async_copy_global_to_shared(w, [row, at], ready, ws.index(2 * stage))
            tma.async_copy_global_to_shared(w, [row + apart, at], ready, ws.index(2 * stage + 1))
            step += 1


@gluon.jit
def _product(x, w):
    zero = gl.zeros([_HALF, _GROUP], gl.float32, _CODED)
    run = warpgroup_mma(x, w.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(run,))


@gluon.jit
def _accumulate_coded(
    xs, ws, full, empty, x_scale, w_scale0, w_scale1, step, steps, WARPGROUP: gl.constexpr, STAGES: gl.constexpr
):
    """The tile's two sums; `step` is the count of steps before it."""
    acc0 = gl.zeros([_HALF, _GROUP], gl.float32, _CODED)
    acc1 = gl.zeros([_HALF, _GROUP], gl.float32, _CODED)
    for i in range(steps):
        stage = step % STAGES
        sx, s0, s1 = gl.load(x_scale + i), gl.load(w_scale0 + i), gl.load(w_scale1 + i)
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mine = xs.index(2 * stage + WARPGROUP)
        part = _product(mine, ws.index(2 * stage))
        acc0 += part * (sx * s0)[:, None]
        acc0 = warpgroup_mma_wait(0, deps=(acc0,))  # else ptxas starts the next product early, and spills
        part = _product(mine, ws.index(2 * stage + 1))
        mbarrier.arrive(empty.index(stage), count=1)
        acc1 += part * (sx * s1)[:, None]
        step += 1
    return acc0, acc1


@gluon.jit
def _accumulate_plain(xs, ws, full, empty, step, steps, WARPGROUP: gl.constexpr, STAGES: gl.constexpr):
    """The same of 16 bits, whose sums stay where products add to them: a step's run while the next one is awaited."""
    acc0 = warpgroup_mma_init(gl.zeros([_HALF, _GROUP], gl.float32, _PLAIN))
    acc1 = warpgroup_mma_init(gl.zeros([_HALF, _GROUP], gl.float32, _PLAIN))
    for i in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mine = xs.index(2 * stage + WARPGROUP)
        acc0 = warpgroup_mma(mine, ws.index(2 * stage).permute((1, 0)), acc0, is_async=True)
        acc1 = warpgroup_mma(mine, ws.index(2 * stage + 1).permute((1, 0)), acc1, is_async=True)
        left, right = warpgroup_mma_wait(2, deps=(acc0, acc1))  # the step before has ended
        acc0, acc1 = warpgroup_mma_init(left), warpgroup_mma_init(right)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
        step += 1
    left, right = warpgroup_mma_wait(0, deps=(acc0, acc1))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return left, right


@gluon.jit
def _keep_step(full, empty, step, steps, STAGES: gl.constexpr):
    """Waits too: whoever ran ahead would release a stage twice."""
    for _ in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1


@gluon.jit
def _store(out, to, staged, value, place, column, places, width):
    """The places of this half: all 64 by TMA, which would overwrite another block's."""
    if places >= _HALF:
        tma.store_wait(0)  # `staged` has been read
        staged.store(value)
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [place, column], staged)
    else:
        r = gl.arange(0, _HALF, gl.SliceLayout(1, value.type.layout))
        c = gl.arange(0, _GROUP, gl.SliceLayout(0, value.type.layout))
        to += place.to(gl.int64) * width + column
        gl.store(to + (r * width)[:, None] + c[None, :], value, mask=(r < places)[:, None])


@gluon.jit
def _activation(gate, up):
    return gate / (1 + gl.exp(-gate)) * up


@gluon.jit
def _coded(act, dtype: gl.constexpr):
    """In 8 bits, and the scales."""
    scale = gl.maximum(gl.max(gl.abs(act), 1), 1e-10) / _FP8_MAX
    coded = gl.minimum(gl.maximum(act / scale[:, None], -_FP8_MAX), _FP8_MAX)
    return coded.to(dtype), scale


@gluon.jit
def _multiply(
    out, to, out_scale, xs, ws, staged, full, empty, x_scale, w_scale, gates, pairs, blocks, counts,
    k, n, apart, across, wide, width, topk,
    WARPGROUP: gl.constexpr, GATE_UP: gl.constexpr, SCALED: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr,
):  # fmt: skip
    PART: gl.constexpr = _CODED if SCALED else _PLAIN
    mine, count, steps, step = staged.index(WARPGROUP), gl.load(counts), k // xs.shape[2], 0
    for index in range(gl.program_id(0), count * across, gl.num_programs(0)):
        slot, place, places, strip = _tile(index, blocks, count, across, DEEP)
        place, places, column = place + WARPGROUP * _HALF, places - WARPGROUP * _HALF, strip * wide
        if places > 0:
            r = gl.arange(0, _HALF, gl.SliceLayout(1, PART))
            source = place + gl.minimum(r, places - 1)
            pair = gl.load(pairs + source)
            if SCALED:
                if GATE_UP:
                    source = pair // topk
                s0 = w_scale + (slot * n + column) // _GROUP * steps
                s1 = s0 + apart // _GROUP * steps
                acc0, acc1 = _accumulate_coded(
                    xs, ws, full, empty, x_scale + source * steps, s0, s1, step, steps, WARPGROUP, STAGES
                )
            else:
                acc0, acc1 = _accumulate_plain(xs, ws, full, empty, step, steps, WARPGROUP, STAGES)
            if GATE_UP:
                act = _activation(acc0, acc1)
                if SCALED:
                    coded, scale = _coded(act, out.dtype)
                    gl.store(out_scale + (place + r) * across + strip, scale, mask=r < places)
                    _store(out, to, mine, coded, place, column, places, width)
                else:
                    _store(out, to, mine, act.to(out.dtype), place, column, places, width)
            else:
                gate = gl.load(gates + pair)[:, None]
                _store(out, to, mine, (acc0 * gate).to(out.dtype), place, column, places, width)
                _store(out, to, mine, (acc1 * gate).to(out.dtype), place, column + _GROUP, places, width)
        else:
            _keep_step(full, empty, step, steps, STAGES)
        step += steps
    tma.store_wait(0)


@gluon.jit
def _many_rows(
    x, w, out, to, x_scale, w_scale, out_scale, gates, pairs, blocks, counts, k, width, topk,
    GATE_UP: gl.constexpr, SCALED: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr,
):  # fmt: skip
    """GATE_UP: out[place] = silu(x[place] @ gate) * (x[place] @ up); else out[place] = x[place] @ w * gates[pair].

    `to` is the address of `out`; x_scale lies by token in the first case, and by place in the second. Not SCALED: 16
    bits, no scales.
    """
    n = 2 * width if GATE_UP else width  # weight rows of an expert
    apart = width if GATE_UP else 128  # between a tile's two strips
    wide: gl.constexpr = _GROUP if GATE_UP else 2 * _GROUP  # columns of a tile
    across = width // wide
    BK: gl.constexpr = 1024 // x.dtype.primitive_bitwidth
    xs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, _HALF, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [2 * STAGES, _GROUP, BK], w.layout)
    staged = gl.allocate_shared_memory(out.dtype, [2, _HALF, _GROUP], out.layout)
    full, empty = ring_barriers(STAGES, 1, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out, to, out_scale, xs, ws, staged, full, empty, x_scale, w_scale, gates, pairs, blocks,
                         counts, k, n, apart, across, wide, width, topk, 0, GATE_UP, SCALED, STAGES, DEEP)),
            (_multiply, (out, to, out_scale, xs, ws, staged, full, empty, x_scale, w_scale, gates, pairs, blocks,
                         counts, k, n, apart, across, wide, width, topk, 1, GATE_UP, SCALED, STAGES, DEEP)),
            (_feed, (x, w, xs, ws, full, empty, blocks, counts, k, n, apart, across, wide, STAGES, DEEP)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def grouped_ffn(
    x: Tensor | Fp8Rows, weights: Tensor, gate_up: Tensor | Fp8Blocks, down: Tensor | Fp8Blocks, work: ExpertWork
) -> None:
    """Fills work.rows; until the second product does, the rows of x lie there."""
    plan, source, pairs = work.plan, x.data, len(work.plan.pairs)
    assert plan.block_rows == BLOCK
    size, hidden = source.itemsize, source.shape[1]
    room = work.rows.view(torch.uint8).view(-1)[: pairs * hidden * size].view(pairs, hidden * size)
    rows = room.view(source.dtype)
    gather(source, plan, weights.shape[1], rows)
    _launch(True, Fp8Rows(rows, x.scale) if isinstance(x, Fp8Rows) else rows, gate_up, work.act, weights, work)
    _launch(False, work.act, down, work.rows, weights, work)


def _launch(
    is_gate_up: bool, x: Tensor | Fp8Rows, stack: Tensor | Fp8Blocks, out: Tensor | Fp8Rows, gates: Tensor,
    work: ExpertWork,
) -> None:  # fmt: skip
    plan, tile = work.plan, work.tile["gate_up" if is_gate_up else "down"]
    x_scale = x.scale if isinstance(x, Fp8Rows) else None
    to, out_scale = (out.data, out.scale) if isinstance(out, Fp8Rows) else (out, None)
    k, width, bk = stack.data.shape[1], to.shape[1], _STEP.value // x.data.itemsize
    w, scale = rows_and_scale(stack)
    programs = len(plan.blocks) * (width // (GROUP if is_gate_up else 2 * GROUP))
    _many_rows[(programs,)](
        descriptor(x.data, BLOCK // 2, bk), descriptor(w, GROUP, bk), descriptor(to, BLOCK // 2, GROUP), to,
        x_scale, scale, out_scale, gates, plan.pairs, plan.blocks, plan.counts, k, width, gates.shape[1],
        is_gate_up, scale is not None, tile["stages"], tile["deep"], num_warps=4,
    )  # fmt: skip
