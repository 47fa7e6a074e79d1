"""The routed experts' FFN over an ExpertPlan, in two launches of one kernel and a sum over k.

A tile is one block of pairs times two strips of BN weight rows: gate and up of the same columns in the first launch,
two neighbours in the second. A program walks its tiles in one flat loop over steps of K, so that the loads of the next
tile are in flight while the last one is finished.

Few tokens: the products are swapped, weights on the M side of the tensor cores, where 16 tokens are enough for native
fp8. Blocks of one expert are neighbours in the order of tiles, so its weights come from memory once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.combine_norm.naive import SlotRows
from kernels.expert_plan.naive import ExpertPlan
from kernels.experts.tiles import fit
from kernels.experts.work import CHUNK, ExpertWork, bytes_ahead, rows_and_scale
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows
from kernels.quant.triton import quantise_each
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import current, overlap, overlaps
from kernels.tl_ops import dot, let_next_begin, prefetch, wait_ahead

EARLY = tl.constexpr(4)  # steps before a program's end at which the next launch may start to fetch its weights


@triton.jit
def _prefetch_chunks(weights, size, CHUNK: tl.constexpr, LANES: tl.constexpr):
    """Ask the L2 for this program's part of the first `size` bytes."""
    at = tl.program_id(0) * CHUNK
    while at < size:
        prefetch(weights.to(tl.pointer_type(tl.uint8)) + (at + tl.arange(0, LANES) * (CHUNK // LANES)), CHUNK // LANES)
        at += tl.num_programs(0) * CHUNK


@triton.jit
def _load_strip(weights, row, column, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, COLUMNS] of the stack's rows; `weights` is its descriptor or its address."""
    if TMA:
        return weights.load([row, column])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None] * k
        return tl.load(weights + rows + column + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _add_product(acc, w, x, scale, SCALED: tl.constexpr, SWAP: tl.constexpr):
    """acc [BN, BM] if SWAP, else [BM, BN]. Scaled ones leave the tensor cores every 128 of K, as DeepSeek-V3's report
    asks (section 3.3.2): these keep 14 bits of a sum."""
    if SWAP:
        return acc + tl.dot(w, x.T) * scale[None, :] if SCALED else dot(w, x.T, acc)
    else:
        return acc + tl.dot(x, w.T) * scale[:, None] if SCALED else dot(x, w.T, acc)


@triton.jit
def _store_activation(gate, up, out, out_scale, row, column, rows, width, SCALED: tl.constexpr):
    """silu(gate) * up, quantised if SCALED: the tile's columns are one group then."""
    BM: tl.constexpr = gate.shape[0]
    BN: tl.constexpr = gate.shape[1]
    r = row.to(tl.int64) + tl.arange(0, BM)
    inside = tl.arange(0, BM) < rows
    act = gate / (1 + tl.exp(-gate)) * up
    if SCALED:
        act, scale = quantise_each(act, out.dtype.element_ty)
        tl.store(out_scale + r * (width // BN) + column // BN, scale, mask=inside)
    tl.store(out + r[:, None] * width + column + tl.arange(0, BN)[None, :], act, mask=inside[:, None])


@triton.jit
def _store_weighted(left, right, out, gates, pairs, row, column, rows, width):
    """Each pair's row times its gate weight."""
    BM: tl.constexpr = left.shape[0]
    BN: tl.constexpr = left.shape[1]
    r = row.to(tl.int64) + tl.arange(0, BM)
    inside = tl.arange(0, BM) < rows
    pair = tl.load(pairs + r, mask=inside, other=0)
    gate = tl.load(gates + pair, mask=inside, other=0.0)[:, None]
    to = out + r[:, None] * width + column + tl.arange(0, BN)[None, :]
    tl.store(to, left * gate, mask=inside[:, None])
    tl.store(to + BN, right * gate, mask=inside[:, None])


@triton.jit
def _grouped_product(
    x, x_scale, weights, w, w_scale, gates, pairs, blocks, counts, out, out_scale,
    k, width, topk,
    GATE_UP: tl.constexpr, SCALED: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    GROUP: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """GATE_UP: out[place] = silu(x[token] @ gate) * (x[token] @ up); else out[place] = x[place] @ w * gates[pair].

    `w` is what tiles are loaded from, the descriptor or the address of `weights` [held * n, k], n = 2 * width or width.
    The first AHEAD bytes of those are asked for before the launches ahead have ended.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    tile_width: tl.constexpr = BN if GATE_UP else 2 * BN
    n = 2 * width if GATE_UP else width
    apart = width if GATE_UP else BN  # between a tile's two strips
    across = width // tile_width
    steps = k // BK
    if PDL and AHEAD > 0:
        _prefetch_chunks(weights, AHEAD, CHUNK, LANES)
    wait_ahead(PDL and GATE_UP)
    # Of the plan, which an earlier launch than the last one wrote; before the wait only the L2 is sure to have it.
    tiles = tl.load(counts, cache_modifier=".cg") * across
    if PDL and not GATE_UP:
        if PREFETCH > 0 and program < tiles:
            slot = tl.load(blocks + program // across * 3, cache_modifier=".cg")
            rows = (slot * n + program % across * tile_width + tl.arange(0, tile_width)).to(tl.int64)
            prefetch(weights + rows * k, PREFETCH)
        wait_ahead(PDL)
    last = tl.cdiv(tl.maximum(tiles - program, 0), programs) * steps
    # Where the loads are, and, some steps behind them, the products.
    tile, i, row, source = program - programs, -1, 0, tl.zeros([BM], tl.int32)
    done_tile, done = program, 0
    first = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    second = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for step in tl.range(0, last, num_stages=STAGES):
        i = tl.where(i == steps - 1, 0, i + 1)
        if i == 0:
            tile += programs
            block = blocks + tile // across * 3
            row = tl.load(block) * n + tile % across * tile_width
            source = tl.load(block + 1) + tl.minimum(tl.arange(0, BM), tl.load(block + 2) - 1)
            if GATE_UP:
                source = tl.load(pairs + source) // topk
        w0 = _load_strip(w, row, i * BK, k, BN, BK, TMA)
        w1 = _load_strip(w, row + apart, i * BK, k, BN, BK, TMA)
        rows = tl.load(x + source.to(tl.int64)[:, None] * k + (i * BK + tl.arange(0, BK))[None, :])
        s0, s1 = 1.0, 1.0
        if SCALED:
            s = tl.load(x_scale + source.to(tl.int64) * steps + i)
            s0 = s * tl.load(w_scale + (row // GROUP).to(tl.int64) * steps + i)
            s1 = s * tl.load(w_scale + ((row + apart) // GROUP).to(tl.int64) * steps + i)
        # Reset before an accumulating product, after a promoted one: so that nobody touches what one still writes.
        if not SCALED and done == 0:
            first, second = tl.zeros_like(first), tl.zeros_like(second)
        first = _add_product(first, w0, rows, s0, SCALED, SWAP)
        second = _add_product(second, w1, rows, s1, SCALED, SWAP)
        done += 1
        if done == steps:
            block = blocks + done_tile // across * 3
            place, count, column = tl.load(block + 1), tl.load(block + 2), done_tile % across * tile_width
            one, two = first.T if SWAP else first, second.T if SWAP else second  # [BM, BN]
            if GATE_UP:
                _store_activation(one, two, out, out_scale, place, column, count, width, SCALED)
            else:
                _store_weighted(one, two, out, gates, pairs, place, column, count, width)
            if SCALED:
                first, second = tl.zeros_like(first), tl.zeros_like(second)
            done = 0
            done_tile += programs
        if step == last - EARLY:
            let_next_begin(PDL)


@triton.jit
def _sum_slots(rows, places, out, hidden, TOPK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[t] = sum over k, in order, of rows[places[t, k]]."""
    t = tl.program_id(0).to(tl.int64)
    wait_ahead(PDL)
    let_next_begin(PDL)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOPK):
        place = tl.load(places + t * TOPK + k).to(tl.int64)
        inside = (at < hidden) & (place >= 0)
        total += tl.load(rows + place * hidden + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * hidden + at, total, mask=at < hidden)


def grouped_ffn(
    x: Tensor | Fp8Rows, weights: Tensor, gate_up: Tensor | Fp8Blocks, down: Tensor | Fp8Blocks, work: ExpertWork
) -> SlotRows:
    part = SlotRows(work.rows, work.plan.places)
    if not len(gate_up.data) or not work.plan.pairs.numel():
        return part
    if "both" in work.tile:
        from kernels.experts import few  # Gluon, which neither the interpreter nor AMD runs

        few.grouped_ffn(x, weights, gate_up, down, work)
    elif "deep" in work.tile["gate_up"]:
        from kernels.experts import hopper

        hopper.grouped_ffn(x, weights, gate_up, down, work)
    else:
        launch_gate_up(x, weights, gate_up, work)
        launch_down(weights, down, work)
    return part


def launch_gate_up(x: Tensor | Fp8Rows, weights: Tensor, gate_up: Tensor | Fp8Blocks, work: ExpertWork) -> None:
    """work.act"""
    ahead = bytes_ahead(gate_up, work.shared)
    _launch(True, x, weights, gate_up, work.plan, work.act, work.tile["gate_up"], ahead)


def launch_down(weights: Tensor, down: Tensor | Fp8Blocks, work: ExpertWork) -> None:
    """work.rows"""
    _launch(False, work.act, weights, down, work.plan, work.rows, work.tile["down"])


def _launch(
    is_gate_up: bool,
    x: Tensor | Fp8Rows,
    gates: Tensor,
    stack: Tensor | Fp8Blocks,
    plan: ExpertPlan,
    out: Tensor | Fp8Rows,
    tile: dict,
    ahead: int = 0,
) -> None:
    rows, x_scale = (x.data, x.scale) if isinstance(x, Fp8Rows) else (x, None)
    w, scale = rows_and_scale(stack)
    to, out_scale = (out.data, out.scale) if isinstance(out, Fp8Rows) else (out, None)
    held, k, n = stack.data.shape
    if scale is not None and k % GROUP:
        raise ValueError(f"rows of {k} in fp8: {GROUP} must divide it")
    tile = fit(tile, plan.block_rows, k, n, is_gate_up, w.dtype, scale is not None)
    width, target, hopper = to.shape[1], current(), overlaps()
    tma, pdl = hopper and bool(tile["TMA"]), hopper and bool(tile["PDL"])
    across = width // (tile["BN"] if is_gate_up else 2 * tile["BN"])
    programs = len(plan.blocks) * across
    if tile["per_sm"]:
        programs = min(programs, tile["per_sm"] * target.processors)
    source = TensorDescriptor(w, [held * n, k], [k, 1], [tile["BN"], tile["BK"]]) if tma else w
    _grouped_product[(programs,)](
        rows, x_scale, w, source, scale, gates, plan.pairs, plan.blocks, plan.counts, to, out_scale,
        k, width, gates.shape[1],
        GATE_UP=is_gate_up, SCALED=scale is not None, SWAP=tile["SWAP"], TMA=tma, PDL=pdl,
        BM=plan.block_rows, BN=tile["BN"], BK=tile["BK"], STAGES=tile["stages"],
        PREFETCH=min(tile["prefetch"], k * w.element_size()), GROUP=GROUP, AHEAD=ahead, CHUNK=CHUNK,
        LANES=32 * tile["warps"], num_warps=tile["warps"], **overlap(pdl),
    )  # fmt: skip


def sum_slots(part: SlotRows, out: Tensor) -> None:
    """out [T, hidden] = the sums of `part`, zero rows where nothing is held."""
    tokens, hidden = out.shape
    if not tokens:
        return
    block = min(1024, next_power_of_2(hidden))
    pdl = overlaps()
    _sum_slots[(tokens, cdiv(hidden, block))](
        part.rows, part.slots, out, hidden, part.slots.shape[1], block, pdl, num_warps=4, **overlap(pdl)
    )
