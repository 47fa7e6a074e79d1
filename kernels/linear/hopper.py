"""Many tokens on sm_90, in Gluon: one warp feeds shared memory by TMA, two warpgroups multiply and promote.

A block-scaled product must leave the tensor cores every 128 of K, to be scaled and added in float32. While one
warpgroup does that, the other's products run: they share the operands and wait for nobody but the feeder. A tile is 128
tokens, 64 a warpgroup, by N0 + N1 columns, whose products take turns in the same registers; wide tiles because the L2
gives about 6 TB/s and 128 x 128 would ask for 8.
References: DeepGEMM's promotion, CUTLASS's persistent warp-specialised schedule.
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

from kernels.hopper import descriptor, ring_barriers
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows

BM = 128
_HALF = gl.constexpr(64)  # tokens of a warpgroup
_BM = gl.constexpr(BM)
_BK = gl.constexpr(GROUP)


@gluon.jit
def _tiles(tokens, n, BN: gl.constexpr):
    return gl.cdiv(tokens, _BM) * gl.cdiv(n, BN)


@gluon.jit
def _tile(index, tokens, n, BN: gl.constexpr, DEEP: gl.constexpr):
    """(first token, first column): DEEP tiles of tokens side by side, so that both operands are read from the L2."""
    wide = gl.cdiv(n, BN)
    first = index // (DEEP * wide) * DEEP
    deep = gl.minimum(gl.cdiv(tokens, _BM) - first, DEEP)
    inside = index % (DEEP * wide)
    return (first + inside % deep) * _BM, inside // deep * BN


@gluon.jit
def _parts(column):
    """Where the tile's two parts start. A part's columns have one scale: where a tile of 192 starts in the middle of a
    block of 128, its narrow part comes first."""
    odd = column % 128
    return column + odd, gl.where(odd == 0, column + 128, column)


@gluon.jit
def _feed(
    x, w0, w1, xs, ws0, ws1, full, empty, tokens, n, k,
    N0: gl.constexpr, N1: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr,
):  # fmt: skip
    step = 0
    for index in range(gl.program_id(0), _tiles(tokens, n, N0 + N1), gl.num_programs(0)):
        token, column = _tile(index, tokens, n, N0 + N1, DEEP)
        c0, c1 = _parts(column) if N1 else (column, column)
        for at in range(0, k, _BK):
            stage = step % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(ready, (_BM + N0 + N1) * _BK)
            tma.async_copy_global_to_shared(x, [token, at], ready, xs.index(2 * stage))
            tma.async_copy_global_to_shared(x, [token + _HALF, at], ready, xs.index(2 * stage + 1))
            tma.async_copy_global_to_shared(w0, [c0, at], ready, ws0.index(stage))
            if N1:
                tma.async_copy_global_to_shared(w1, [c1, at], ready, ws1.index(stage))
            step += 1


@gluon.jit
def _product(x, w, N: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    zero = gl.zeros([_HALF, N], gl.float32, LAYOUT)
    run = warpgroup_mma(x, w.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(run,))


@gluon.jit
def _multiply(
    out0, out1, xs, ws0, ws1, staged0, staged1, full, empty, x_scale, w_scale, add,
    tokens, n, k, x_scale_stride, w_scale_stride, add_stride,
    WARPGROUP: gl.constexpr, ADD: gl.constexpr, N0: gl.constexpr, N1: gl.constexpr, STAGES: gl.constexpr,
    DEEP: gl.constexpr,
):  # fmt: skip
    LAYOUT0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N0, 32])
    LAYOUT1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N1 if N1 else N0, 32])
    step = 0
    for index in range(gl.program_id(0), _tiles(tokens, n, N0 + N1), gl.num_programs(0)):
        token, column = _tile(index, tokens, n, N0 + N1, DEEP)
        token += WARPGROUP * _HALF
        c0, c1 = _parts(column) if N1 else (column, column)
        t = gl.minimum(token + gl.arange(0, _HALF, gl.SliceLayout(1, LAYOUT0)), tokens - 1)
        sx_at = x_scale + t * x_scale_stride
        s0_at = w_scale + gl.minimum(c0, n - 1) // 128 * w_scale_stride
        s1_at = w_scale + gl.minimum(c1, n - 1) // 128 * w_scale_stride
        acc0 = gl.zeros([_HALF, N0], gl.float32, LAYOUT0)
        acc1 = gl.zeros([_HALF, N1 if N1 else 1], gl.float32, LAYOUT1)
        for i in range(k // _BK):
            stage = step % STAGES
            sx = gl.load(sx_at + i)
            s0 = gl.load(s0_at + i)
            s1 = gl.load(s1_at + i) if N1 else s0
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            mine = xs.index(2 * stage + WARPGROUP)
            part = _product(mine, ws0.index(stage), N0)
            if N1 == 0:
                mbarrier.arrive(empty.index(stage), count=1)
            acc0 += part * (sx * s0)[:, None]
            if N1:
                if N1 == N0:
                    acc0 = warpgroup_mma_wait(0, deps=(acc0,))  # else ptxas starts the next product early, and spills
                part1 = _product(mine, ws1.index(stage), N1)
                mbarrier.arrive(empty.index(stage), count=1)
                acc1 += part1 * gl.convert_layout(sx * s1, gl.SliceLayout(1, LAYOUT1), assert_trivial=True)[:, None]
            step += 1
        _write(out0, staged0.index(WARPGROUP), acc0, add, token, c0, tokens, n, add_stride, ADD)
        if N1:
            _write(out1, staged1.index(WARPGROUP), acc1, add, token, c1, tokens, n, add_stride, ADD)
    tma.store_wait(0)


@gluon.jit
def _write(out, staged, acc, add, token, column, tokens, n, add_stride, ADD: gl.constexpr):
    if ADD:
        t = token + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
        c = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        inside = (t < tokens)[:, None] & (c < n)[None, :]
        at = t.to(gl.int64)[:, None] * add_stride + c[None, :]
        acc += gl.load(add + at, mask=inside, other=0.0).to(gl.float32)
    tma.store_wait(0)  # `staged` has been read
    staged.store(acc.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [token, column], staged)


@gluon.jit
def _many_tokens(
    x, w0, w1, out0, out1, x_scale, w_scale, add, tokens, n, k, x_scale_stride, w_scale_stride, add_stride,
    ADD: gl.constexpr, N0: gl.constexpr, N1: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, _HALF, _BK], x.layout)
    ws0 = gl.allocate_shared_memory(w0.dtype, [STAGES, N0, _BK], w0.layout)
    staged0 = gl.allocate_shared_memory(out0.dtype, [2, _HALF, N0], out0.layout)
    ws1, staged1 = ws0, staged0
    if N1:
        ws1 = gl.allocate_shared_memory(w1.dtype, [STAGES, N1, _BK], w1.layout)
        if N1 != N0:
            staged1 = gl.allocate_shared_memory(out1.dtype, [2, _HALF, N1], out1.layout)
    full, empty = ring_barriers(STAGES, 1, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out0, out1, xs, ws0, ws1, staged0, staged1, full, empty, x_scale, w_scale, add, tokens, n, k,
                         x_scale_stride, w_scale_stride, add_stride, 0, ADD, N0, N1, STAGES, DEEP)),
            (_multiply, (out0, out1, xs, ws0, ws1, staged0, staged1, full, empty, x_scale, w_scale, add, tokens, n, k,
                         x_scale_stride, w_scale_stride, add_stride, 1, ADD, N0, N1, STAGES, DEEP)),
            (_feed, (x, w0, w1, xs, ws0, ws1, full, empty, tokens, n, k, N0, N1, STAGES, DEEP)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def many_tokens(x: Fp8Rows, w: Fp8Blocks, out: Tensor, add: Tensor | None, tile: dict, processors: int) -> None:
    """Rows of `out` must lie a multiple of 16 bytes apart."""
    (tokens, k), n = x.data.shape, out.shape[1]
    n0, n1 = tile["N0"], tile["N1"]
    weights = w.data.T  # [n, k]
    programs = min(processors, -(-tokens // BM) * -(-n // (n0 + n1)))
    _many_tokens[(programs,)](
        descriptor(x.data, BM // 2, GROUP), descriptor(weights, n0, GROUP), descriptor(weights, n1 or n0, GROUP),
        descriptor(out, BM // 2, n0), descriptor(out, BM // 2, n1 or n0), x.scale, w.scale, add, tokens, n, k,
        x.scale.stride(0), w.scale.stride(1), 0 if add is None else add.stride(0), add is not None, n0, n1,
        tile["stages"], tile["deep"], num_warps=4,
    )  # fmt: skip
