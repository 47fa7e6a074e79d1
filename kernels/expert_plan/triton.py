from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.expert_plan.naive import CHUNK, ExpertPlan
from kernels.sizes import cdiv, next_power_of_2

FEW = 2 * CHUNK  # so many pairs are sorted by a single program


@triton.jit
def slot_of(ids, slots, entries, held):
    """The slots of expert ids, `held` for those that are not held."""
    at = tl.where(ids < 0, entries - 1, ids)  # the table's last entry stands for -1
    return tl.minimum(tl.load(slots + at, mask=at < entries, other=held).to(tl.int32), held)


@triton.jit
def list_blocks(count, blocks, counts, program, programs, HELD: tl.constexpr, ROWS: tl.constexpr):
    """First place of each expert, from how many pairs it has; `programs` of these calls together write the blocks."""
    slot = tl.arange(0, HELD)
    number = (count + ROWS - 1) // ROWS
    first, index = tl.cumsum(count, 0) - count, tl.cumsum(number, 0) - number
    j, most = program, tl.max(number)
    while j < most:
        block, real = blocks + 3 * (index + j), j < number
        tl.store(block, slot, mask=real)
        tl.store(block + 1, first + j * ROWS, mask=real)
        tl.store(block + 2, tl.minimum(count - j * ROWS, ROWS), mask=real)
        j += programs
    if program == 0:
        tl.store(counts, tl.sum(number))
        tl.store(counts + 1, tl.sum(count))
    return first


@triton.jit
def plan_one_token(slot, pairs, places, blocks, counts, held, TOPK: tl.constexpr, K: tl.constexpr):
    """The plan of one token whose experts have the slots `slot` [K], `held` past TOPK: each pair is a block."""
    k = tl.arange(0, K)
    key, mine = slot * K + k, slot < held
    place = tl.sum((key[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(pairs + place, k, mask=mine)
    tl.store(places + k, tl.where(mine, place, -1), mask=k < TOPK)
    tl.store(blocks + 3 * place, slot, mask=mine)
    tl.store(blocks + 3 * place + 1, place, mask=mine)
    tl.store(blocks + 3 * place + 2, 1, mask=mine)
    placed = tl.sum(mine.to(tl.int32))
    tl.store(counts, placed)
    tl.store(counts + 1, placed)


@triton.jit
def popcount(x):
    """Bits set in each int32, in the form that LLVM knows and makes one instruction of."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def plan_from_bits(
    bits, firsts, pairs, places, blocks, counts, held, total,
    TOPK: tl.constexpr, WORDS: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The plan of tokens whose experts differ, by one program, from `places` that hold slots (-1: not held).

    Bit t % 32 of `bits` [WORDS, held] at [t // 32, slot] tells whether token t chose that expert, so the place of a
    pair among its expert's is a count of bits. Clears them.
    """
    slot = tl.arange(0, HELD)
    count = tl.zeros([HELD], tl.int32)
    for w in tl.static_range(WORDS):
        count += popcount(tl.load(bits + w * held + slot, mask=slot < held, other=0))
    tl.store(firsts + slot, list_blocks(count, blocks, counts, 0, 1, HELD, ROWS), mask=slot < held)
    tl.debug_barrier()  # through memory, since a gather of one warp is hundreds of shuffles
    start = 0
    while start < total:
        pair = start + tl.arange(0, STEP)
        chosen = tl.load(places + pair, mask=pair < total, other=-1)
        mine = chosen >= 0
        place = tl.load(firsts + chosen, mask=mine, other=0)
        for w in tl.static_range(WORDS):
            before = pair // TOPK - 32 * w  # tokens of this word that come earlier
            earlier = tl.where(before < 32, (1 << tl.minimum(tl.maximum(before, 0), 31)) - 1, -1)
            place += popcount(tl.load(bits + w * held + chosen, mask=mine, other=0) & earlier)
        tl.store(places + pair, place, mask=mine)
        tl.store(pairs + place, pair, mask=mine)
        start += STEP
    tl.debug_barrier()  # every thread has read what is cleared now
    for w in tl.static_range(WORDS):
        tl.store(bits + w * held + slot, 0, mask=slot < held)


@triton.jit(do_not_specialize=["total"])
def _count(ids, slots, chunk_counts, entries, held, total, HELD: tl.constexpr, CHUNK: tl.constexpr):
    """chunk_counts[c] = how many pairs of chunk c each expert has."""
    c = tl.program_id(0)
    pair, slot = c * CHUNK + tl.arange(0, CHUNK), tl.arange(0, HELD)
    chosen = slot_of(tl.load(ids + pair, mask=pair < total, other=0), slots, entries, held)
    mine = (chosen < held) & (pair < total)
    tl.store(chunk_counts + c * held + slot, tl.histogram(chosen, HELD, mask=mine), mask=slot < held)


@triton.jit(do_not_specialize=["chunks"])
def _add_up(chunk_counts, held, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each column's exclusive running sum, in place; its total in the row after the last chunk's."""
    slot = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.int32)
    start = 0
    while start < chunks:
        c = start + tl.arange(0, ROWS)
        at = chunk_counts + c[:, None] * held + slot[None, :]
        inside = (c[:, None] < chunks) & (slot[None, :] < held)
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
        start += ROWS
    tl.store(chunk_counts + chunks * held + slot, total, mask=slot < held)


@triton.jit(do_not_specialize=["total", "chunks"])
def _place(
    ids, slots, chunk_counts, pairs, places, blocks, counts, entries, held, total, chunks,
    ONE: tl.constexpr, HELD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sorts a chunk by (slot, pair): a pair's place is its expert's first one, plus that expert's pairs in the chunks
    before, plus those before it in this one."""
    c = tl.program_id(0)
    at, slot = tl.arange(0, CHUNK), tl.arange(0, HELD)
    pair = c * CHUNK + at
    chosen = slot_of(tl.load(ids + pair, mask=pair < total, other=0), slots, entries, held)
    chosen = tl.where(pair < total, chosen, held)
    mine = tl.histogram(chosen, HELD, mask=chosen < held)
    order = tl.sort(chosen * CHUNK + at)
    chosen, pair = order // CHUNK, c * CHUNK + order % CHUNK
    if ONE:
        list_blocks(mine, blocks, counts, 0, 1, HELD, ROWS)
        place = at
    else:
        count = tl.load(chunk_counts + chunks * held + slot, mask=slot < held, other=0)
        before = tl.load(chunk_counts + c * held + slot, mask=slot < held, other=0)
        first = list_blocks(count, blocks, counts, c, chunks, HELD, ROWS)
        place = at + tl.gather(first + before - (tl.cumsum(mine, 0) - mine), tl.minimum(chosen, HELD - 1), 0)
    tl.store(pairs + place, pair, mask=chosen < held)
    tl.store(places + pair, tl.where(chosen < held, place, -1), mask=pair < total)


def padded_held(held: int) -> int:
    return max(32, next_power_of_2(held))


def tile_rule(pairs: int) -> dict[str, int]:
    """chunk: pairs that a program sorts, all of them if they are few."""
    if pairs <= FEW:
        chunk = max(32, next_power_of_2(pairs))
        return {"chunk": chunk, "warps": max(1, min(8, chunk // 128))}
    return {"chunk": CHUNK, "warps": 8}


def plan_experts(ids: Tensor, slots: Tensor, held: int, plan: ExpertPlan, tile: dict[str, int] | None = None) -> None:
    """One launch for at most FEW pairs, else three."""
    total, entries = ids.numel(), len(slots)
    tile = tile or tile_rule(total)
    chunks, width, options = cdiv(total, tile["chunk"]), padded_held(held), {"num_warps": tile["warps"]}
    if chunks > 1:
        if plan.scratch.numel() < (chunks + 1) * held:
            raise ValueError(f"plan has scratch of {plan.scratch.numel()} numbers, {chunks} chunks x {held} experts")
        _count[(chunks,)](ids, slots, plan.scratch, entries, held, total, width, tile["chunk"], **options)
        _add_up[(max(1, cdiv(held, 8)),)](plan.scratch, held, chunks, 128, 8, num_warps=4)
    _place[(max(1, chunks),)](
        ids, slots, plan.scratch, plan.pairs, plan.places, plan.blocks, plan.counts, entries, held, total, chunks,
        chunks <= 1, width, tile["chunk"], plan.block_rows, **options,
    )  # fmt: skip
