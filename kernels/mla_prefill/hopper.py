# mypy: ignore-errors
# No `from __future__ import annotations`: aggregates look at their fields' types.
"""Flash attention over expanded keys and values on Hopper, in Gluon (a part of Triton that leaves layouts, barriers and
the roles of warps to the programmer), because the compiler's own pipelining waits for each product before its softmax.

One warp fetches by TMA; two warpgroups of 64 rows each multiply. A warpgroup has the scores of the next keys in flight
before it adds the weighted values of the last ones, and does the next softmax while those are added; the two warpgroups
are not in step, so the tensor cores have work while either is in its softmax. Programs are persistent: the next block's
rows are fetched while the last one is written. Reference: FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from kernels.hopper import box_layout
from kernels.mla_prefill.attention import locate
from kernels.mla_prefill.plan import PrefillPlan
from kernels.sizes import cdiv
from kernels.target import current

BM = 128  # rows of a block, two warpgroups' worth
_ROWS = gl.constexpr(64)  # of a warpgroup
_locate = gluon.jit(locate.fn)


@aggregate
class Work:
    """Which blocks of rows there are; see attention.locate."""

    cu_rows: gl.tensor
    contexts: gl.tensor
    cu_contexts: gl.tensor
    heads: gl.tensor
    chunks: gl.tensor
    most_blocks: gl.tensor
    sweep: gl.tensor

    @gluon.constexpr_function
    def __init__(self, cu_rows, contexts, cu_contexts, heads, chunks, most_blocks, sweep):
        self.cu_rows = cu_rows
        self.contexts = contexts
        self.cu_contexts = cu_contexts
        self.heads = heads
        self.chunks = chunks
        self.most_blocks = most_blocks
        self.sweep = sweep

    @gluon.jit
    def places(self):
        return gl.cdiv(self.heads, self.sweep) * self.sweep * self.chunks * self.most_blocks

    @gluon.jit
    def block(self, turn):
        """This program's block of that turn. Turns run to and fro over the programs: who had the longest of a turn has
        the shortest of the next."""
        programs, program = gl.num_programs(0), gl.program_id(0)
        place = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
        inside = place < self.places()
        head, row, left, sees, end, base = _locate(
            gl.where(inside, place, 0), self.cu_rows, self.contexts, self.cu_contexts,
            self.heads, self.chunks, self.most_blocks, self.sweep, 2 * _ROWS,
        )  # fmt: skip
        return head, row, left, sees, gl.where(inside, end, 0), base


@aggregate
class Shared:
    """Buffers, each with a barrier that says it is full and one that says it is empty."""

    q_nope: gl.shared_memory_descriptor  # [2, 64, nope]
    q_rope: gl.shared_memory_descriptor  # [2, 64, rope]
    k_nope: gl.shared_memory_descriptor  # [stages, BN, nope]
    k_rope: gl.shared_memory_descriptor  # [stages, BN, rope]
    v: gl.shared_memory_descriptor  # [stages, BN, v_dim]
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor  # [stages, 1], as the rest
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q_nope, q_rope, k_nope, k_rope, v, q_full, q_empty, k_full, k_empty, v_full, v_empty):
        self.q_nope = q_nope
        self.q_rope = q_rope
        self.k_nope = k_nope
        self.k_rope = k_rope
        self.v = v
        self.q_full = q_full
        self.q_empty = q_empty
        self.k_full = k_full
        self.k_empty = k_empty
        self.v_full = v_full
        self.v_empty = v_empty


@gluon.jit
def _buffers(box, COUNT: gl.constexpr):
    return gl.allocate_shared_memory(box.dtype, [COUNT] + box.block_shape, box.layout)  # noqa: RUF005


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), ARRIVALS)
    return found


@gluon.jit
def _fetch(work, s, q_nope, q_rope, k_nope, k_rope, v):
    """Fills the buffers, in the order in which they are used."""
    STAGES: gl.constexpr = s.v.shape[0]
    BN: gl.constexpr = s.v.shape[1]
    NOPE: gl.constexpr = s.k_nope.shape[2]
    ROPE: gl.constexpr = s.k_rope.shape[2]
    V_DIM: gl.constexpr = s.v.shape[2]
    BYTES: gl.constexpr = s.v.dtype.primitive_bitwidth // 8
    used = 0  # buffers of keys, and as many of values
    blocks = 0
    for turn in range(gl.cdiv(work.places(), gl.num_programs(0))):
        head, row, _left, _sees, end, base = work.block(turn)
        if end > 0:
            mbarrier.wait(s.q_empty.index(0), (blocks + 1) & 1)
            mbarrier.expect(s.q_full.index(0), 2 * _ROWS * (NOPE + ROPE) * BYTES)
            column = head * (NOPE + ROPE)
            for half in gl.static_range(2):
                at = row + half * _ROWS
                tma.async_copy_global_to_shared(q_nope, [at, column], s.q_full.index(0), s.q_nope.index(half))
                tma.async_copy_global_to_shared(q_rope, [at, column + NOPE], s.q_full.index(0), s.q_rope.index(half))
            blocks += 1
        column = head * (NOPE + V_DIM)
        for key in range(0, end, BN):
            slot = used % STAGES
            phase = (used // STAGES + 1) & 1
            full = s.k_full.index(slot)
            mbarrier.wait(s.k_empty.index(slot), phase)
            mbarrier.expect(full, BN * (NOPE + ROPE) * BYTES)
            tma.async_copy_global_to_shared(k_nope, [base + key, column], full, s.k_nope.index(slot))
            tma.async_copy_global_to_shared(k_rope, [base + key, 0], full, s.k_rope.index(slot))
            full = s.v_full.index(slot)
            mbarrier.wait(s.v_empty.index(slot), phase)
            mbarrier.expect(full, BN * V_DIM * BYTES)
            tma.async_copy_global_to_shared(v, [base + key, column + NOPE], full, s.v.index(slot))
            used += 1


@gluon.jit
def _scores(s, used, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """Starts q k^T of the next keys: [64, BN]"""
    STAGES: gl.constexpr = s.v.shape[0]
    BN: gl.constexpr = s.v.shape[1]
    slot = used % STAGES
    mbarrier.wait(s.k_full.index(slot), used // STAGES & 1)
    none = warpgroup_mma_init(gl.zeros([_ROWS, BN], gl.float32, LAYOUT))
    k_nope, k_rope = s.k_nope.index(slot).permute((1, 0)), s.k_rope.index(slot).permute((1, 0))
    scores = warpgroup_mma(s.q_nope.index(HALF), k_nope, none, use_acc=False, is_async=True)
    return warpgroup_mma(s.q_rope.index(HALF), k_rope, scores, is_async=True)


@gluon.jit
def _add_values(s, used, p, acc, shrink):
    """Starts acc * shrink + p v."""
    STAGES: gl.constexpr = s.v.shape[0]
    slot = used % STAGES
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    mbarrier.wait(s.v_full.index(slot), used // STAGES & 1)
    return warpgroup_mma(p, s.v.index(slot), warpgroup_mma_init(acc), is_async=True)


@gluon.jit
def _softmax(scores, most, total, sees, scale, MASKED: gl.constexpr):
    """(weights, what the sums so far are to be multiplied by, the largest score, the weights' sum)"""
    if MASKED:
        key = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] < sees[:, None], scores, -float("inf"))
    larger = gl.maximum(most, gl.max(scores, 1))
    p = gl.exp2(scores * scale - (larger * scale)[:, None])
    shrink = gl.exp2((most - larger) * scale)
    return p, shrink, larger, total * shrink + gl.sum(p, 1)


@gluon.jit
def _after(total):
    """Keeps what follows behind the computation of `total`, which is never negative: a warp-wide barrier of the threads
    whose total is not. ptxas would else move the exponentials behind the wait that they are to be hidden in."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred no; .reg .b32 all; setp.lt.f32 no, $1, 0f00000000; selp.b32 all, 0, -1, no; bar.warp.sync all; "
        "mov.b32 $0, $1; }",
        "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _step(
    s, used, p, shrink, acc, most, total, sees, scale, HALF: gl.constexpr, MASKED: gl.constexpr, LAYOUT: gl.constexpr
):
    """Adds the values that p weighs to the shrunk sums, and finds the weights of the keys after them."""
    STAGES: gl.constexpr = s.v.shape[0]
    scores = _scores(s, used + 1, HALF, LAYOUT)
    acc = _add_values(s, used, p, acc, shrink)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(s.k_empty.index((used + 1) % STAGES))
    weights, shrink, most, total = _softmax(scores, most, total, sees, scale, MASKED)
    total = _after(total)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(s.v_empty.index(used % STAGES))
    return gl.convert_layout(weights.to(p.dtype), p.type.layout), shrink, acc, most, total


@gluon.jit
def _multiply(work, s, out, out_row, scale, HALF: gl.constexpr):
    """One warpgroup: rows 64 * HALF to 64 * HALF + 63 of every block."""
    STAGES: gl.constexpr = s.v.shape[0]
    BN: gl.constexpr = s.v.shape[1]
    V_DIM: gl.constexpr = s.v.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    row_of_score = gl.arange(0, _ROWS, gl.SliceLayout(1, SCORES)) + HALF * _ROWS
    line = gl.arange(0, _ROWS, gl.SliceLayout(1, SUMS)) + HALF * _ROWS
    column = gl.arange(0, V_DIM, gl.SliceLayout(0, SUMS))
    used = 0
    blocks = 0
    for turn in range(gl.cdiv(work.places(), gl.num_programs(0))):
        head, row, left, first_sees, end, _base = work.block(turn)
        if end > 0:
            sees = first_sees + row_of_score
            acc = gl.zeros([_ROWS, V_DIM], gl.float32, SUMS)
            most = gl.full([_ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.full([_ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
            mbarrier.wait(s.q_full.index(0), blocks & 1)
            scores = warpgroup_mma_wait(0, deps=(_scores(s, used, HALF, SCORES),))
            mbarrier.arrive(s.k_empty.index(used % STAGES))
            p, shrink, most, total = _softmax(scores, most, total, sees, scale, True)
            p = gl.convert_layout(p.to(s.v.dtype), WEIGHTS)
            unmasked = gl.maximum(first_sees // BN * BN, BN)
            for _ in range(BN, unmasked, BN):
                p, shrink, acc, most, total = _step(
                    s, used, p, shrink, acc, most, total, sees, scale, HALF, False, SCORES
                )
                used += 1
            for key in range(unmasked, end, BN):
                p, shrink, acc, most, total = _step(
                    s, used, p, shrink, acc, most, total, sees - key, scale, HALF, True, SCORES
                )
                used += 1
            mbarrier.arrive(s.q_empty.index(0))
            acc = warpgroup_mma_wait(0, deps=(_add_values(s, used, p, acc, shrink),))
            mbarrier.arrive(s.v_empty.index(used % STAGES))
            used += 1
            blocks += 1
            acc = acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
            pointers = out + (row + line).to(gl.int64)[:, None] * out_row + head * V_DIM + column[None, :]
            gl.store(pointers, acc.to(s.v.dtype), mask=(line < left)[:, None])


# What varies from step to step must not make it compile anew; nor may a 1 become a constant, which Work does not take.
@gluon.jit(do_not_specialize=["heads", "chunks", "most_blocks", "sweep"])
def _attend(
    q_nope, q_rope, k_nope, k_rope, v, out, cu_rows, contexts, cu_contexts, out_row, scale,
    heads, chunks, most_blocks, sweep, STAGES: gl.constexpr,
):  # fmt: skip
    work = Work(cu_rows, contexts, cu_contexts, heads, chunks, most_blocks, sweep)
    s = Shared(
        _buffers(q_nope, 2),
        _buffers(q_rope, 2),
        _buffers(k_nope, STAGES),
        _buffers(k_rope, STAGES),
        _buffers(v, STAGES),
        _barriers(1, 1), _barriers(1, 2), _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(STAGES, 1),
        _barriers(STAGES, 2),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (work, s, out, out_row, scale, 0)),
            (_multiply, (work, s, out, out_row, scale, 1)),
            (_fetch, (work, s, q_nope, q_rope, k_nope, k_rope, v)),
        ],
        [4, 1],
        [240, 24],
    )


def _boxes(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of x [n, ...] seen as a matrix of n rows."""
    shape, layout = [len(x), x[0].numel()], box_layout(rows, columns, x.dtype)
    return TensorDescriptor(x, shape, [x.stride(0), 1], [rows, columns], layout)


def attend(q: Tensor, kv: Tensor, rope: Tensor, plan: PrefillPlan, scale: float, out: Tensor, tile: dict) -> None:
    """As attention.attend. What a box holds past a context is other keys, which are masked, or zeros past the tensor:
    values there must be finite, since weights of zero multiply them."""
    heads, v_dim, bn = q.shape[1], out.shape[2], tile["BN"]
    nope = kv.shape[2] - v_dim
    chunks, most_blocks = len(plan.contexts), cdiv(plan.most_rows, BM)
    places = cdiv(heads, tile["sweep"]) * tile["sweep"] * chunks * most_blocks
    _attend[(min(places, current().processors),)](
        _boxes(q, 64, nope), _boxes(q, 64, rope.shape[1]), _boxes(kv, bn, nope), _boxes(rope, bn, rope.shape[1]),
        _boxes(kv, bn, v_dim), out, plan.cu_rows, plan.contexts, plan.cu_contexts, out.stride(0), scale,
        heads, chunks, most_blocks, tile["sweep"], tile["stages"], num_warps=4, maxnreg=168,
    )  # fmt: skip
