# mypy: allow-incomplete-defs, no-check-untyped-defs
"""Flash attention over expanded keys and values, for any target: pointers alone."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import tl_ops
from kernels.mla_prefill.plan import PrefillPlan
from kernels.sizes import cdiv, next_power_of_2


@triton.jit
def locate(place, cu_rows, contexts, cu_contexts, heads, chunks, most_blocks, sweep, BM: tl.constexpr):
    """Place in the order of work -> (head, the block's first row, rows left in the chunk from there, how many keys that
    row sees, how many its last row sees or 0 if there is no such block, the context's first row of keys).

    `sweep` heads are taken at a time, as many as the L2 holds keys and values of; within them the longest blocks first,
    so that the short ones fill the end.
    """
    before = place // (sweep * chunks * most_blocks)
    place = place % (sweep * chunks * most_blocks)
    head = before * sweep + place % sweep
    chunk = place // sweep % chunks
    block = most_blocks - 1 - place // (sweep * chunks)
    first = tl.load(cu_rows + chunk)
    left = tl.load(cu_rows + chunk + 1) - first - block * BM
    context = tl.load(contexts + chunk)
    sees = context - left + 1
    end = tl.minimum(context, sees + BM - 1)
    return (
        head,
        first + block * BM,
        left,
        sees,
        tl.where((left > 0) & (head < heads), end, 0),
        tl.load(cu_contexts + chunk),
    )


@triton.jit
def _columns(base, rows, row_stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED], zeros past WIDTH and outside."""
    at = tl.arange(0, PADDED)
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + at[None, :]
    if WIDTH == PADDED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    return tl.load(pointers, mask=inside[:, None] & (at < WIDTH)[None, :], other=0.0)


# What varies from step to step must not make it compile anew.
@triton.jit(do_not_specialize=["chunks", "most_blocks", "sweep"])
def _attend(
    q, kv, rope, out, cu_rows, contexts, cu_contexts, scale, q_row, kv_row, out_row, heads, chunks, most_blocks, sweep,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V_DIM: tl.constexpr, NOPE_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head, row, left, sees, end, base = locate(
        tl.program_id(0), cu_rows, contexts, cu_contexts, heads, chunks, most_blocks, sweep, BM
    )
    if end == 0:
        return
    line, key = tl.arange(0, BM), tl.arange(0, BN)
    q += head * (NOPE + ROPE)
    kv += head * (NOPE + V_DIM)
    q_nope = _columns(q, row + line, q_row, line < left, NOPE, NOPE_PAD)
    q_rope = _columns(q + NOPE, row + line, q_row, line < left, ROPE, ROPE)
    acc = tl.zeros([BM, V_PAD], tl.float32)
    most = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for at in range(0, end, BN):
        held = at + key < end
        k_nope = _columns(kv, base + at + key, kv_row, held, NOPE, NOPE_PAD)
        k_rope = _columns(rope, base + at + key, ROPE, held, ROPE, ROPE)
        scores = tl_ops.dot(q_rope, k_rope.T, tl_ops.dot(q_nope, k_nope.T, tl.zeros([BM, BN], tl.float32)))
        if at + BN > sees:
            scores = tl.where(at + key[None, :] < sees + line[:, None], scores, -float("inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores * scale - (larger * scale)[:, None])
        shrink = tl.exp2((most - larger) * scale)
        total = total * shrink + tl.sum(p, 1)
        v = _columns(kv + NOPE, base + at + key, kv_row, held, V_DIM, V_PAD)
        acc = tl_ops.dot(p.to(v.dtype), v, acc * shrink[:, None])
        most = larger
    column = tl.arange(0, V_PAD)
    pointers = out + (row + line).to(tl.int64)[:, None] * out_row + head * V_DIM + column[None, :]
    tl.store(pointers, acc / total[:, None], mask=(line < left)[:, None] & (column < V_DIM)[None, :])


def attend(
    q: Tensor,  # [R, heads, nope + rope]
    kv: Tensor,  # [tokens, heads, nope + v_dim]
    rope: Tensor,  # [tokens, rope]
    plan: PrefillPlan,
    scale: float,  # times log2(e)
    out: Tensor,  # [R, heads, v_dim]
    tile: dict,
) -> None:
    heads, v_dim, bm = q.shape[1], out.shape[2], tile["BM"]
    nope = kv.shape[2] - v_dim
    chunks, most_blocks = len(plan.contexts), cdiv(plan.most_rows, bm)
    grid = cdiv(heads, tile["sweep"]) * tile["sweep"] * chunks * most_blocks
    _attend[(grid,)](
        q, kv, rope, out, plan.cu_rows, plan.contexts, plan.cu_contexts, scale,
        q.stride(0), kv.stride(0), out.stride(0), heads, chunks, most_blocks, tile["sweep"],
        nope, rope.shape[1], v_dim, next_power_of_2(nope), next_power_of_2(v_dim),
        bm, tile["BN"], num_warps=tile["warps"], num_stages=tile["stages"],
    )  # fmt: skip
