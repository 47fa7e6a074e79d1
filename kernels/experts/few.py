"""The routed experts' FFN for up to 128 tokens on sm_90 in one launch, in Gluon, so that memory never falls idle
between the two products: a warp that feeds weights by TMA runs ahead into `down` while `gate_up` is being finished.

A tile is a block of the plan by two strips of weight rows, on the M side of the tensor cores: gate and up of the same
columns, or two neighbours of `down`. The N side has the block's places, whose rows of x were gathered by a small launch
ahead. Up to 8 tokens need none: all of them are on the N side of the first product, and those that the tile has no use
for are dropped.

Tiles are numbered, gate_up's first, and dealt out in that order by a counter. So whoever waits for a block's
activations waits for programs that run already and that need nothing of anybody: no launch that shares the processor
can keep them from finishing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from kernels.experts.few_feed import deal, feed_rows, feed_weights, fence_proxies, hear
from kernels.experts.gather import gather
from kernels.experts.work import EIGHT, ExpertWork, bytes_ahead, rows_and_scale
from kernels.hopper import descriptor, ring_barriers
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows
from kernels.target import current

_FP8_MAX = gl.constexpr(448.0)


@gluon.jit
def _accumulate(
    ring, xs, full, empty, x_scale, w_scale, sx, s0, s1, inside, step,
    STEPS: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """The tile's two sums, [strip, tokens]. Scaled ones leave the tensor cores every 128 of K: these keep 14 bits.
    sx, s0, s1: where the scales of the tokens and the strips begin."""
    STRIP: gl.constexpr = ring.shape[1]
    N: gl.constexpr = xs.shape[1]
    zero = gl.zeros([STRIP, N], gl.float32, PART)
    acc0, acc1 = zero, zero
    for i in range(STEPS):
        stage = step % STAGES
        w0, w1, x = ring.index(2 * stage), ring.index(2 * stage + 1), xs.index(stage).permute((1, 0))
        if SCALED:
            scale = gl.load(x_scale + sx + i, mask=inside, other=0.0)
            scale0, scale1 = scale * gl.load(w_scale + s0 + i), scale * gl.load(w_scale + s1 + i)
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            part0 = warpgroup_mma(w0, x, zero, use_acc=False, is_async=True)
            part1 = warpgroup_mma(w1, x, zero, use_acc=False, is_async=True)
            part0, part1 = warpgroup_mma_wait(0, deps=(part0, part1))
            mbarrier.arrive(empty.index(stage), count=1)
            acc0 += part0 * scale0[None, :]
            acc1 += part1 * scale1[None, :]
        else:
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            acc0 = warpgroup_mma(w0, x, acc0, is_async=True)
            acc1 = warpgroup_mma(w1, x, acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
            mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return acc0, acc1


@gluon.jit
def _place_of(places, token, tokens, first, count, TOPK: gl.constexpr):
    """Each token's place among a block's, or -1."""
    found = gl.full_like(token, -1)
    for k in gl.static_range(TOPK):
        place = gl.load(places + token * TOPK + k, mask=token < tokens, other=-1)
        found = gl.where((place >= first) & (place < first + count), place, found)
    return found


@gluon.jit
def _multiply(
    ring, xs, indices, full, empty, x_scale, up_scale, act, act_scale, down_scale, out, gates,
    pairs, places, blocks, counts, done, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, UPS: gl.constexpr, DOWNS: gl.constexpr, TOPK: gl.constexpr,
    PARTS: gl.constexpr, ALL: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    STRIP: gl.constexpr = ring.shape[1]
    BK: gl.constexpr = ring.shape[2]
    N: gl.constexpr = xs.shape[1]
    UP_STEPS: gl.constexpr = HIDDEN // BK
    DOWN_STEPS: gl.constexpr = INTER // BK
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, BK // 4])
    n = gl.arange(0, N, gl.SliceLayout(0, PART))
    r = gl.arange(0, STRIP, gl.SliceLayout(1, PART))
    cuda.gdc_wait()
    count, step = gl.load(counts), 0
    ups, total = count * UPS, count * (UPS + DOWNS)
    index = hear(indices, full, step, STAGES)
    while index < ups:
        b, strip = index // UPS, index % UPS
        slot, first, rows = gl.load(blocks + b * 3), gl.load(blocks + b * 3 + 1), gl.load(blocks + b * 3 + 2)
        if ALL:
            token, inside = n, n < tokens
            place = _place_of(places, n, tokens, first, rows, TOPK)
        else:
            inside = n < rows
            token = gl.load(pairs + first + n, mask=inside, other=0) // TOPK
            place = gl.where(inside, first + n, -1)
        s0 = ((slot // PARTS * (2 * PARTS) + slot % PARTS) * UPS + strip) * UP_STEPS
        gate, up = _accumulate(
            ring, xs, full, empty, x_scale, up_scale, token * UP_STEPS, s0, s0 + PARTS * UPS * UP_STEPS, inside, step,
            UP_STEPS, STAGES, SCALED, PART,
        )  # fmt: skip
        step += UP_STEPS
        value = gate / (1 + gl.exp(-gate)) * up
        if SCALED:  # a strip is one group
            scale = gl.maximum(gl.max(gl.abs(value), 0), 1e-10) / _FP8_MAX
            gl.store(act_scale + place * UPS + strip, scale, mask=place >= 0)
            value = gl.minimum(gl.maximum(value / scale[None, :], -_FP8_MAX), _FP8_MAX)
        to = act + (place * INTER + strip * STRIP)[None, :] + r[:, None]
        gl.store(to, value.to(act.dtype.element_ty), mask=(place >= 0)[None, :])
        fence_proxies(gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])))
        gl.thread_barrier()  # all have stored before one of them tells it
        gl.atomic_add(done + b, 1, sem="release", scope="gpu")
        index = hear(indices, full, step, STAGES)
    while index < total:
        b, strip = (index - ups) // DOWNS, (index - ups) % DOWNS
        slot, first, rows = gl.load(blocks + b * 3), gl.load(blocks + b * 3 + 1), gl.load(blocks + b * 3 + 2)
        gate = gl.load(gates + gl.load(pairs + first + n, mask=n < rows, other=0), mask=n < rows, other=0.0)
        s0 = ((slot // PARTS * DOWNS + strip) * 2 * PARTS + slot % PARTS) * DOWN_STEPS
        left, right = _accumulate(
            ring, xs, full, empty, act_scale, down_scale, (first + n) * DOWN_STEPS, s0, s0 + PARTS * DOWN_STEPS,
            n < rows, step, DOWN_STEPS, STAGES, SCALED, PART,
        )  # fmt: skip
        step += DOWN_STEPS
        to = out + ((first + n) * HIDDEN + strip * 2 * STRIP)[None, :] + r[:, None]
        gl.store(to, (left * gate[None, :]).to(out.dtype.element_ty), mask=(n < rows)[None, :])
        gl.store(to + STRIP, (right * gate[None, :]).to(out.dtype.element_ty), mask=(n < rows)[None, :])
        index = hear(indices, full, step, STAGES)


@gluon.jit(do_not_specialize=["tokens", "most", "ahead"])
def _few_rows(
    x, act, up, down, to_act, act_scale, x_scale, up_scale, down_scale, out, gates, pairs, places, blocks, counts,
    progress, tokens, most, weights, ahead,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOPK: gl.constexpr, PARTS: gl.constexpr, N: gl.constexpr,
    ALL: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """act[place] = silu(x[token] @ gate) * (x[token] @ up); out[place] = act[place] @ down * gates[pair].

    A block has at most N places. `tokens`: rows of x. ALL: those are at most N, in the order of tokens; else place p
    finds its own in row p, modulo `tokens` where x is not gathered. PARTS: see feed_weights.
    `ahead`: bytes of the first experts' `weights`, which are asked for before the launches ahead have ended.
    `progress`: how many tiles have been dealt out; then, for even launches and for odd ones, how many tiles of each
    block's activations are finished. A launch leaves behind what the next one finds at its start.
    """
    STRIP: gl.constexpr = up.block_type.shape[0]
    BK: gl.constexpr = up.block_type.shape[1]
    UPS: gl.constexpr = INTER // STRIP
    DOWNS: gl.constexpr = HIDDEN // (2 * STRIP)
    ring = gl.allocate_shared_memory(up.dtype, [2 * STAGES, STRIP, BK], up.layout)
    xs = gl.allocate_shared_memory(up.dtype, [STAGES, N, BK], x.layout)
    indices = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(told.index(stage), count=1)
    full, empty = ring_barriers(STAGES, 2, 1)
    fence_async_shared()
    index, odd = deal(progress)
    # All warps have read what was dealt before what the partitions are given is stored, in the same place: Triton 3.6
    # puts no barrier there, and a warp that came late took the index for the whole number, an even launch's.
    gl.thread_barrier()
    done = progress + 1 + odd * most
    gl.warp_specialize(
        [
            (_multiply, (ring, xs, indices, full, empty, x_scale, up_scale, to_act, act_scale, down_scale, out, gates,
                         pairs, places, blocks, counts, done, tokens, HIDDEN, INTER, UPS, DOWNS, TOPK, PARTS, ALL,
                         STAGES, SCALED)),
            (feed_weights, (up, down, ring, indices, told, full, empty, progress, index, odd, blocks, counts, most,
                            weights, ahead, HIDDEN, INTER, PARTS, STAGES)),
            (feed_rows, (x, act, xs, indices, told, full, blocks, counts, done, tokens, HIDDEN, INTER, UPS, DOWNS, ALL,
                         STAGES)),
        ],
        [1, 1],
        [40, 40],
    )  # fmt: skip


def grouped_ffn(
    x: Tensor | Fp8Rows, weights: Tensor, gate_up: Tensor | Fp8Blocks, down: Tensor | Fp8Blocks, work: ExpertWork
) -> None:
    """Fills work.rows. An activation may be narrower than the expert: then the plan's slots are the equal parts of the
    only one, which every token takes all of."""
    plan, act = work.plan, work.act
    topk, hidden, n = weights.shape[1], gate_up.data.shape[1], plan.block_rows
    scaled, inter, most = isinstance(act, Fp8Rows), act.data.shape[1], len(plan.blocks)
    parts = down.data.shape[1] // inter
    strip, wide = (GROUP, GROUP) if scaled else (64, 64)  # wide: elements of a step
    every = n == EIGHT and parts == 1
    if hidden % (2 * strip) or inter % strip or n % EIGHT or (every and len(weights) > n):
        raise ValueError(f"no tile for {len(weights)} tokens of {hidden} and {inter}")
    x_scale, rows = getattr(x, "scale", None), x.data
    if parts == 1 and not every:
        assert work.gathered is not None
        gather(x.data, plan, topk, work.gathered)
        rows = work.gathered
    programs = min(current().processors, most * (inter // strip + hidden // (2 * strip)))
    (up, up_scale), (out, down_scale) = rows_and_scale(gate_up), rows_and_scale(down)
    ahead = bytes_ahead(gate_up, work.shared)
    _few_rows[(programs,)](
        descriptor(rows, EIGHT, wide), descriptor(act.data, EIGHT, wide),
        descriptor(up, strip, wide), descriptor(out, strip, wide),
        act.data, getattr(act, "scale", None), x_scale, up_scale, down_scale, work.rows, weights,
        plan.pairs, plan.places, plan.blocks, plan.counts, work.progress, len(rows), most,
        up.view(torch.uint8), ahead,
        hidden, inter, topk, parts, n, every, work.tile["both"]["stages"], scaled,
        num_warps=4, maxnreg=128 if n <= 16 else 192, launch_pdl=True,
    )  # fmt: skip
