"""Two launches for a decode step: the router's product, split over hidden among enough programs to read w_gate at the
memory's speed, then everything else, a program a token; the last of them to finish makes the plan of all."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.expert_plan.naive import ExpertPlan
from kernels.expert_plan.triton import padded_held, plan_experts, plan_from_bits, plan_one_token, slot_of
from kernels.route.naive import WORDS, RouteScratch, Routing
from kernels.route.tiles import tile_for
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import overlap, overlaps
from kernels.tl_ops import dot, let_next_begin, wait_ahead

LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _load(pointers, row, rows, column, columns):
    return tl.load(pointers, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def _product(
    x, w, partials, tokens, hidden, experts, x_stride, w_stride,
    STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partials[split, t, e] = w[e, a part of hidden] . x[t, it], weights on the M side of the tensor cores."""
    split = tl.program_id(0)
    e, t = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2) * BM + tl.arange(0, BM)
    k = split * STEPS * BK + tl.arange(0, BK)
    w_at, x_at = w + e[:, None] * w_stride + k[None, :], x + t.to(tl.int64)[:, None] * x_stride + k[None, :]
    wide: tl.constexpr = x.dtype != w.dtype
    acc = tl.zeros([BN, BM], tl.float32)
    let_next_begin(PDL)
    if STEPS == 1:
        # Weights never change: they may come while the launch before this one still runs.
        weight = _load(w_at, e, experts, k, hidden)
        wait_ahead(PDL)
        row = _load(x_at, t, tokens, k, hidden)
        if wide:
            weight, row = weight.to(tl.float32), row.to(tl.float32)
        acc = dot(weight, row.T, acc)
    else:
        wait_ahead(PDL)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            weight = _load(w_at + step * BK, e, experts, k + step * BK, hidden)
            row = _load(x_at + step * BK, t, tokens, k + step * BK, hidden)
            if wide:
                weight, row = weight.to(tl.float32), row.to(tl.float32)
            acc = dot(weight, row.T, acc)
    out = partials + (split * tokens + t).to(tl.int64)[None, :] * experts + e[:, None]
    tl.store(out, acc, mask=(e < experts)[:, None] & (t < tokens)[None, :])


@triton.jit
def _add_splits(partials, t, tokens, experts, expert, real, SPLITS: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr):
    """[E]: the logits of token t, the parts added in the order of the splits, STEP of them at a time."""
    logits = tl.zeros([E], tl.float32)
    for start in tl.static_range(0, SPLITS, STEP):
        split = start + tl.arange(0, STEP)
        at = partials + (split[:, None] * tokens + t) * experts + expert[None, :]
        logits += tl.sum(tl.load(at, mask=(split < SPLITS)[:, None] & real[None, :], other=0.0), 0)
    return logits


@triton.jit
def _within_best_groups(choice, OPEN: tl.constexpr, TWO: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr):
    """-inf outside of the OPEN best groups: by their best expert, or by their best two's sum."""
    grouped = tl.reshape(choice, [G, SIZE])
    worth = tl.max(grouped, 1)
    if TWO:
        member = tl.arange(0, SIZE)[None, :]
        first = tl.min(tl.where(grouped == worth[:, None], member, SIZE), 1)
        worth += tl.max(tl.where(member == first[:, None], -float("inf"), grouped), 1)
    g = tl.arange(0, G)
    ahead = (worth[None, :] > worth[:, None]) | ((worth[None, :] == worth[:, None]) & (g[None, :] < g[:, None]))
    is_open = tl.sum(ahead.to(tl.int32), 1) < OPEN
    return tl.reshape(tl.where(is_open[:, None], grouped, -float("inf")), [G * SIZE])


@triton.jit
def _best(choice, real, TOPK: tl.constexpr, K: tl.constexpr, E: tl.constexpr):
    """(rank [E], outside of 0 .. TOPK - 1 where not chosen; index of the k-th best [K]). Of equals, the lower index."""
    # Numbers as integers of the same order: a warp finds the largest of those in one instruction. The 2^23 - 1 lowest
    # integers are no finite number nor an infinity: they tell what is taken already, and when.
    bits = choice.to(tl.int32, bitcast=True)
    key = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST + E)
    at, k, chosen = tl.arange(0, E), tl.arange(0, K), tl.zeros([K], tl.int32)
    for i in tl.static_range(TOPK):
        first = tl.min(tl.where(key == tl.max(key, 0), at, E), 0)
        key = tl.where(at == first, LOWEST + i, key)
        chosen = tl.where(k == i, first, chosen)
    return key ^ LOWEST, chosen


@triton.jit(do_not_specialize=["tokens"])
def _choose(
    partials, bias, ids, weights, slots, bits, firsts, ticket, pairs, places, blocks, counts,
    tokens, experts, entries, held, scale,
    SPLITS: tl.constexpr, STEP: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr,
    OPEN: tl.constexpr, TWO: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr, MEMBERS: tl.constexpr,
    TOPK: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr,
    PLAN: tl.constexpr, WORDS: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token. Experts lie as [G groups, SIZE], both padded to powers of two; MEMBERS of a group are real.
    PLAN: 0 none, 1 of the only token, 2 of all tokens by whoever comes last."""
    t = tl.program_id(0)
    let_next_begin(PDL)
    at, k = tl.arange(0, G * SIZE), tl.arange(0, K)
    expert = at // SIZE * MEMBERS + at % SIZE
    real = (at % SIZE < MEMBERS) & (expert < experts)
    shared = (k >= TOPK) & (k < TOPK + SHARED)
    correction = tl.zeros([G * SIZE], tl.float32)
    if bias is not None:
        correction = tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    if PLAN:
        slot = slot_of(expert, slots, entries, held)
        shared_slot = slot_of(experts + k - TOPK, slots, entries, held)
    wait_ahead(PDL)

    logits = _add_splits(partials, t, tokens, experts, expert, real, SPLITS, STEP, G * SIZE)
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        scores = tl.where(real, tl.exp(logits - tl.max(tl.where(real, logits, -float("inf")), 0)), 0.0)
        scores /= tl.sum(scores, 0)
    choice = tl.where(real, scores + correction, -float("inf"))
    if OPEN:
        choice = _within_best_groups(choice, OPEN, TWO, G, SIZE)
    rank, chosen = _best(choice, real, TOPK, K, G * SIZE)

    mine, first = (rank >= 0) & (rank < TOPK), t * (TOPK + SHARED)
    gains = scores * scale
    if NORM:
        gains = scores / (tl.sum(tl.where(mine, scores, 0.0), 0) + 1e-20) * scale
    tl.store(ids + first + rank, expert, mask=mine)
    tl.store(weights + first + rank, gains, mask=mine)
    if SHARED:
        tl.store(ids + first + k, experts + k - TOPK, mask=shared)
        tl.store(weights + first + k, 1.0, mask=shared)
    if PLAN == 1:
        own = tl.where(k < TOPK, tl.gather(slot, chosen, 0), tl.where(shared, shared_slot, held))
        plan_one_token(own, pairs, places, blocks, counts, held, TOPK + SHARED, K)
    if PLAN == 2:
        word, bit = bits + t // 32 * held, 1 << (t % 32)
        tl.store(places + first + rank, tl.where(slot < held, slot, -1), mask=mine)
        tl.atomic_or(word + slot, bit, mask=mine & (slot < held), sem="relaxed")
        if SHARED:
            tl.store(places + first + k, tl.where(shared_slot < held, shared_slot, -1), mask=shared)
            tl.atomic_or(word + shared_slot, bit, mask=shared & (shared_slot < held), sem="relaxed")
        tl.debug_barrier()  # every thread's part is written before one of them takes the ticket
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tokens - 1:
            plan_from_bits(
                bits, firsts, pairs, places, blocks, counts, held, tokens * (TOPK + SHARED),
                TOPK + SHARED, WORDS, HELD, ROWS, 512,
            )  # fmt: skip
            tl.store(ticket, 0)


def _options(tile: dict[str, int], warps: str) -> dict:
    pdl = overlaps()
    return {"PDL": pdl, "num_warps": tile[warps]} | overlap(pdl)


def product(x: Tensor, w_gate: Tensor, scratch: RouteScratch, tile: dict[str, int]) -> int:
    """The router's product into scratch.partials, [splits, T, experts]; returns how many splits."""
    (tokens, hidden), experts, bk, steps = x.shape, w_gate.shape[1], tile["BK"], tile["steps"]
    most = scratch.partials.numel() // (tokens * experts)
    if w_gate.stride(0) != 1 or x.stride(1) != 1 or not most:
        raise ValueError("w_gate is a transposed [experts, hidden], and scratch holds at least a row a token")
    blocks = cdiv(hidden, bk)
    steps = max(steps, cdiv(blocks, most))
    splits = cdiv(blocks, steps)
    grid = splits, cdiv(experts, tile["BN"]), cdiv(tokens, tile["BM"])
    _product[grid](
        x, w_gate, scratch.partials, tokens, hidden, experts, x.stride(0), w_gate.stride(1),
        steps, tile["BM"], tile["BN"], bk, tile["stages"], **_options(tile, "warps"),
    )  # fmt: skip
    return splits


def choose(
    splits: int, experts: int, bias: Tensor | None, rule: Routing, ids: Tensor, weights: Tensor,
    plan: ExpertPlan | None, slots: Tensor | None, held: int, scratch: RouteScratch, tile: dict[str, int],
) -> None:  # fmt: skip
    """Everything after the product, and the plan with it where the tokens are few."""
    tokens, columns = ids.shape
    limited = rule.method != "greedy" and rule.topk_groups < rule.groups
    groups = rule.groups if limited else 1
    g = next_power_of_2(groups)
    size = max(next_power_of_2(experts // groups), 128 // g)  # four numbers a thread at least: else no redux
    step = min(next_power_of_2(splits), max(1, 4096 * tile["choose_warps"] // (g * size)))
    planned = 0 if plan is None or tokens > 32 * WORDS else 1 if tokens == 1 else 2
    outputs = (plan.pairs, plan.places, plan.blocks, plan.counts) if plan is not None and planned else (None,) * 4
    _choose[(tokens,)](
        scratch.partials, bias, ids, weights, slots, scratch.bits, scratch.firsts, scratch.ticket, *outputs,
        tokens, experts, 0 if slots is None else len(slots), held, rule.scale,
        splits, min(16, step), rule.scoring == "sigmoid", rule.norm,
        rule.topk_groups if limited else 0, rule.method == "noaux_tc", g, size, experts // groups,
        rule.topk, rule.shared, next_power_of_2(columns),
        planned, next_power_of_2(cdiv(tokens, 32)) if planned else 0, padded_held(held),
        plan.block_rows if plan is not None else 1, **_options(tile, "choose_warps"),
    )  # fmt: skip
    if plan is not None and not planned:
        assert slots is not None
        plan_experts(ids, slots, held, plan)


def route(
    x: Tensor, w_gate: Tensor, bias: Tensor | None, rule: Routing, ids: Tensor, weights: Tensor,
    plan: ExpertPlan | None = None, slots: Tensor | None = None, held: int = 0, scratch: RouteScratch | None = None,
    tile: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """w_gate, bias and slots may not be written by launches just ahead of this one: they are read before those end."""
    (tokens, hidden), experts = x.shape, w_gate.shape[1]
    if scratch is None or (plan is not None and slots is None):
        raise ValueError("route on a GPU needs scratch, and a plan needs slots")
    if not tokens:
        if plan is not None:
            assert slots is not None
            plan_experts(ids, slots, held, plan)
        return
    tile = tile or tile_for(tokens, hidden, experts, x.dtype, w_gate.dtype)
    splits = product(x, w_gate, scratch, tile)
    choose(splits, experts, bias, rule, ids, weights, plan, slots, held, scratch, tile)
