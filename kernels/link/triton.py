from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, int32

from kernels.combine_norm.naive import SlotRows
from kernels.link.flags import BASE, COLUMNS, FLAG, LIVE, NEAR, all_heard, region_at, signal, word_at
from kernels.link.layout import Region, SlabLayout
from kernels.link.views import STEP, Peers
from kernels.quant.naive import Fp8Rows
from kernels.sizes import next_power_of_2
from kernels.target import INTERPRETED, current, measured_tile, overlap
from kernels.tl_ops import let_next_begin, to_l1, wait_ahead

WORKER, SHARD = 0, 1  # how many signals of the other side a wait wants beyond those we have given
ONE_LAUNCH = 128  # tokens: up to here every program finds the place of its rows by itself


@triton.jit
def _asks(ids, owner, t, inside, peer, TOPK: tl.constexpr):
    """Of tokens `t`: whether the peer owns one of its experts, and whether nobody owns one. Columns in turn and not as
    a tile of two dimensions, which would pass through shared memory three times."""
    mine, nobody = (t < 0) & inside, (t < 0) & inside
    for k in tl.static_range(TOPK):
        chosen = tl.load(ids + t * TOPK + k, mask=inside, other=-1)
        by = tl.load(owner + chosen, mask=chosen >= 0, other=-1)
        mine |= by == peer
        nobody |= (chosen >= 0) & (by < 0)
    return mine.to(tl.int32), nobody.to(tl.int32)


@triton.jit
def _load_ids(ids, weights, t, inside, k, TOPK: tl.constexpr):
    """Token t's ids and weights."""
    inside = inside & (k < TOPK)
    return (
        tl.load(ids + t * TOPK + k, mask=inside, other=-1),
        tl.load(weights + t * TOPK + k, mask=inside),
    )


@triton.jit
def _write_ids(chosen, weight, owner, to_ids, to_weights, row, shown, inside, peer, k, TOPK: tl.constexpr):
    """A token's ids and weights as row `row`: only the ids that are the peer's, none if it is not `shown`."""
    inside = inside & (k < TOPK)
    by = tl.load(owner + chosen, mask=chosen >= 0, other=-1)
    tl.store(to_ids + row * TOPK + k, tl.where((by == peer) & shown, chosen, -1), mask=inside)
    tl.store(to_weights + row * TOPK + k, weight, mask=inside)


@triton.jit
def _load_row(words, scales, t, width, groups, at, group, wanted):
    row = tl.load(words + t.to(tl.int64) * width + at, mask=(at < width) & wanted)
    scale = row  # of rows that are not quantised, nobody asks for it
    if scales is not None:
        scale = tl.load(scales + t.to(tl.int64) * groups + group, mask=(group < groups) & wanted)
    return row, scale


@triton.jit
def _place(
    ids, weights, owner, slots, table, ok, tokens, ids_at, weights_at, count_at, first_reply, block_rows,
    PEERS: tl.constexpr, TOPK: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For many tokens: all that `_dispatch` writes but the rows, by one program a peer."""
    peer = tl.program_id(0)
    wait_ahead(PDL)
    entry = table + peer * COLUMNS
    live, base = tl.load(entry + LIVE) != 0, tl.load(entry + BASE)
    sends = live & (tl.load(ok) != 0)
    to_ids, to_weights = region_at(base, ids_at, tl.int32), region_at(base, weights_at, tl.float32)
    placed, start = 0, 0
    while start < tokens:
        t = start + tl.arange(0, BLOCK)
        mine, nobody = _asks(ids, owner, t, t < tokens, peer, TOPK)
        if tl.sum(nobody + mine * (live == 0)) != 0:
            tl.store(ok, 0)
        goes = mine * sends
        place = placed + tl.cumsum(goes, 0) - goes
        placed += tl.sum(goes)
        slot = tl.where(goes != 0, first_reply + peer * block_rows + place, -1)
        tl.store(slots + t * PEERS + peer, slot, mask=t < tokens)
        if live:
            row = tl.where(goes != 0, place, tokens - 1 - t + place)  # tokens that stay fill the rows from the end
            k, at, inside = tl.arange(0, K)[None, :], t[:, None], t[:, None] < tokens
            chosen, weight = _load_ids(ids, weights, at, inside, k, TOPK)
            shown = goes[:, None] != 0
            _write_ids(chosen, weight, owner, to_ids, to_weights, row[:, None], shown, inside, peer, k, TOPK)
        start += BLOCK
    if live:
        tl.store(region_at(base, count_at, tl.int32), placed)


@triton.jit
def _dispatch(
    words, scales, ids, weights, owner, slots, table, tickets, ok,
    tokens, experts, width, groups, data_at, scale_at, ids_at, weights_at, count_at, first_reply, block_rows,
    PEERS: tl.constexpr, TOPK: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    GROUPS: tl.constexpr, EXPERTS: tl.constexpr, TICKET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows to the peers. TOKENS 0: `_place` has found their places; else, for few, each program does by itself."""
    index, peer, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    entry = table + peer * COLUMNS
    live, near = tl.load(entry + LIVE) != 0, tl.load(entry + NEAR) != 0  # all this is the same for all a step
    base, flag = tl.load(entry + BASE), word_at(entry, FLAG)
    if PDL and TOKENS:
        to_l1(owner, experts, EXPERTS)
    wait_ahead(PDL)
    let_next_begin(PDL)
    sends = live & (tl.load(ok) != 0)
    first_slot = first_reply + peer * block_rows
    at, group, k = tl.arange(0, WORDS), tl.arange(0, GROUPS), tl.arange(0, K)
    t = index
    while t < tokens:
        if TOKENS:
            row, scale = _load_row(words, scales, t, width, groups, at, group, True)
            chosen, weight = _load_ids(ids, weights, t, k >= 0, k, TOPK)
            tl.debug_barrier()  # all this is on its way while its place is looked for: ptxas would load it later
            every = tl.arange(0, TOKENS)
            mine, nobody = _asks(ids, owner, every, every <= t, peer, TOPK)
            # How many of the tokens before go too, and of this one both answers, in one sum.
            asks = tl.sum(tl.where(every < t, mine, mine * 0x1000 + nobody * 0x10000))
            goes = (asks & 0x1000 != 0) & sends
            place = tl.where(sends, asks & 0xFFF, 0)
        else:
            slot = tl.load(slots + t * PEERS + peer)
            goes, place = slot >= 0, slot - first_slot
            row, scale = _load_row(words, scales, t, width, groups, at, group, goes)
        if goes:
            to_row = region_at(base, data_at, tl.int32) + place.to(tl.int64) * width
            tl.store(to_row + at, row, mask=at < width)
            if scales is not None:
                to_scale = region_at(base, scale_at, tl.float32) + place.to(tl.int64) * groups
                tl.store(to_scale + group, scale, mask=group < groups)
        if TOKENS:
            if asks >= tl.where(live, 0x10000, 0x1000):
                tl.store(ok, 0)  # an expert of a peer that is gone, or of nobody: this step cannot be right
            tl.store(slots + t * PEERS + peer, tl.where(goes, first_slot + place, -1))
            if live:
                to_ids, to_weights = region_at(base, ids_at, tl.int32), region_at(base, weights_at, tl.float32)
                to = tl.where(goes, place, tokens - 1 - t + place)  # tokens that stay fill the rows from the end
                _write_ids(chosen, weight, owner, to_ids, to_weights, to, goes, k >= 0, peer, k, TOPK)
                if t == tokens - 1:
                    tl.store(region_at(base, count_at, tl.int32), place + goes.to(tl.int32))
        t += programs
    if live:
        signal(entry, flag, near, tickets + peer, index, programs, TICKET)


@triton.jit
def _wait(
    table, ok, budget, PEERS: tl.constexpr, LEAD: tl.constexpr, ARCH: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_ahead(PDL)
    let_next_begin(PDL and EARLY)
    all_heard(table, PEERS, LEAD, ok, budget, ARCH)
    let_next_begin(PDL and not EARLY)


@triton.jit
def _combine(rows, slots, out, hidden, PEERS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    slot = ()
    for peer in tl.static_range(PEERS):  # of `dispatch`, which has ended; before our own wait only the L2 is sure of it
        place = tl.load(slots + t * PEERS + peer, cache_modifier=".cg")
        slot = slot + (place.to(tl.int64),)  # type: ignore[assignment]  # noqa: RUF005
    wait_ahead(PDL)
    let_next_begin(PDL)
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(PEERS):
        inside = (at < hidden) & (slot[peer] >= 0)
        total += tl.load(rows + slot[peer] * hidden + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * hidden + at, total, mask=at < hidden)


@triton.jit
def _sum_of(rows, places, row, held, hidden, at, TOPK: tl.constexpr):
    """Row `row`'s partial sum. A row that nobody asked for may have any places, so none past `held` rows is read."""
    if TOPK:
        total = (at < 0).to(tl.float32)
        for k in tl.static_range(TOPK):
            place = tl.load(places + row * TOPK + k).to(tl.int64)
            inside = (at < hidden) & (place >= 0) & (place < held)
            total += tl.load(rows + place * hidden + at, mask=inside, other=0.0).to(tl.float32)
    else:
        total = tl.load(rows + row * hidden + at, mask=at < hidden).to(tl.float32)
    return total


@triton.jit
def _give_back(
    rows, places, count, table, tickets, ok, bound, held, hidden, reply_at,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, TICKET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    index, programs = tl.program_id(0), tl.num_programs(0)
    live, near = tl.load(table + LIVE) != 0, tl.load(table + NEAR) != 0  # all this is the same for all a step
    base, flag = tl.load(table + BASE), word_at(table, FLAG)
    wait_ahead(PDL)
    let_next_begin(PDL)
    at, row = tl.arange(0, BLOCK), index.to(tl.int64)
    asked, answers = tl.minimum(tl.load(count), bound), live & (tl.load(ok) != 0)
    going = True
    while going:
        total = _sum_of(rows, places, row, held, hidden, at, TOPK)
        tl.debug_barrier()  # the first row is on its way before it is known whether anyone asks for it
        there = region_at(base, reply_at, tl.bfloat16) + row * hidden
        tl.store(there + at, total.to(tl.bfloat16), mask=(at < hidden) & (row < asked) & answers)
        row += programs
        going = (row < asked) & answers
    if answers:
        signal(table, flag, near, tickets, index, programs, TICKET)


def dispatch(
    x: Tensor | Fp8Rows,  # [T, hidden], as the layout has it
    ids: Tensor,  # int32 [T, topk], -1: nobody's
    weights: Tensor,  # float32 [T, topk]
    owner: Tensor,  # int32 [experts]: which peer is asked for it, -1 where nobody can be
    peers: Peers,  # the worker's end
    layout: SlabLayout,
    region: Region,
    slots: Tensor,  # int32 [T, peers], out: where the sums will lie in the reply slab, or -1
    tile: dict | None = None,
) -> None:
    """A row to each peer that owns one of its experts, in the order of the tokens, with that peer's ids alone; then a
    signal to every live peer. After a failed wait the signals go on, with no rows, so that all ends stay in step."""
    tokens, topk = ids.shape
    there = layout.region(region)
    if tokens > there.rows:
        raise ValueError(f"{tokens} tokens in a region of {there.rows} rows")
    if isinstance(x, Fp8Rows) != layout.quantised or len(peers) != layout.peers:
        raise ValueError("the rows or the peers are not of this layout")
    if not tokens:
        return
    tile = tile or tile_rule(layout, tokens)
    data, scale = (x.data, x.scale) if isinstance(x, Fp8Rows) else (x, None)
    words = data.view(int32)  # the copy knows no formats
    width, groups = words.shape[1], scale.shape[1] if scale is not None else 1
    block, k, pdl = tile["places"], next_power_of_2(topk), bool(tile["pdl"])
    places = (there.ids, there.weights, there.count, there.reply, layout.block_rows)
    if block:
        _place[(len(peers),)](
            ids, weights, owner, slots, peers.table, peers.ok, tokens, *places,
            len(peers), topk, k, block, pdl, num_warps=8, **overlap(pdl),
        )  # fmt: skip
    programs = min(tile["programs"], tokens)
    ticket = bool(tile["ticket"]) and programs > 1
    _dispatch[(programs, len(peers))](
        words, scale, ids, weights, owner, slots, peers.table, peers.tickets, peers.ok,
        tokens, len(owner), width, groups, there.data, there.scale, *places,
        len(peers), topk, k, 0 if block else next_power_of_2(tokens), next_power_of_2(width),
        next_power_of_2(groups), next_power_of_2(len(owner)), ticket, pdl, num_warps=tile["warps"], **overlap(pdl),
    )  # fmt: skip


def wait(peers: Peers, layout: SlabLayout, tokens: int, tile: dict | None = None) -> None:
    """The worker: until every live peer has answered the last dispatch. What follows it on the stream sees the sums.

    One program waits, in a launch of its own: where the programs of `combine` waited themselves they kept a shard on
    the same GPU from running (1,300 us a layer at 16 rows on an H200, 10 so)."""
    tile = tile or tile_rule(layout, tokens)
    _launch_wait(peers, WORKER, bool(tile["early"]), bool(tile["pdl"]))


def take(peers: Peers, layout: SlabLayout, tokens: int, tile: dict | None = None) -> None:
    """The shard: until the worker has sent the next rows. What follows on the stream reads them in place.

    The next launch must be a small one, if it may begin early: its programs take their places already while this waits,
    and ones that held much of a processor could keep a worker on the same GPU from sending the very rows."""
    tile = tile or tile_rule(layout, tokens)
    _launch_wait(peers, SHARD, bool(tile["early"]), bool(tile["pdl"]))


def combine(
    replies: Tensor,  # [rows, hidden], of views.replies
    slots: Tensor,  # int32 [T, peers], of dispatch
    out: Tensor,  # [T, hidden]
    tile: dict | None = None,
) -> None:
    """out[t] = sum over the peers, in their order and in float32, of replies[slots[t, peer]]. Where the residual and
    a norm follow, kernels.combine_norm takes the same as SlotRows(replies, slots), after `wait`."""
    tokens, count = slots.shape
    if not tokens:
        return
    hidden, pdl = out.shape[1], bool(tile and tile["pdl"])
    _combine[(tokens,)](
        replies, slots, out, hidden, count, next_power_of_2(hidden), pdl,
        num_warps=tile["warps"] if tile else 8, **overlap(pdl),
    )  # fmt: skip


def give_back(
    parts: Tensor | SlotRows,  # [rows, hidden]: the partial sums, or the experts' rows already weighted
    count: Tensor,  # int32 [1], of Requests
    peers: Peers,  # the shard's end: one worker
    layout: SlabLayout,
    region: Region,
    tile: dict | None = None,
) -> None:
    """The first `count` partial sums, in bf16, into our block of the worker's reply slab; then the signal. Nothing
    after a failed wait: an answer to rows that never came would be taken for a good one."""
    rows, places = (parts.rows, parts.slots) if isinstance(parts, SlotRows) else (parts, None)
    topk = places.shape[1] if places is not None else 0
    bound, hidden = len(rows if places is None else places), rows.shape[1]
    if not bound:
        return
    tile = tile or tile_rule(layout, bound)
    pdl, programs = bool(tile["pdl"]), min(tile["programs"], bound)
    ticket = bool(tile["ticket"]) and programs > 1
    _give_back[(programs,)](
        rows, places, count, peers.table, peers.tickets, peers.ok, bound, len(rows), hidden,
        layout.region(region).reply * hidden * 2, topk, next_power_of_2(hidden), ticket, pdl,
        num_warps=tile["warps"], **overlap(pdl),
    )  # fmt: skip


def _launch_wait(peers: Peers, lead: int, early: bool, pdl: bool) -> None:
    _wait[(1,)](
        peers.table, peers.ok, peers.budget, len(peers), lead, current().arch, early, pdl, num_warps=1, **overlap(pdl)
    )


def tile_rule(layout: SlabLayout, tokens: int) -> dict[str, int]:
    """programs: of dispatch (a peer) and of give_back, at most STEP; warps: of each. ticket: the last program
    signals, else all share in it. places: how many tokens at a time one program a peer places before the rows go out,
    or 0: each program of `dispatch` finds the places of its rows itself. pdl: a kernel's programs take their places
    while the one before it ends; early: even while `wait` waits."""
    name = f"{layout.hidden}x{layout.peers}{' fp8' if layout.quantised else ' bf16'}"
    if tile := measured_tile(__file__, name, tokens):
        return tile
    nvidia = current().arch.startswith("sm") and not INTERPRETED
    # Programs that stand ready must leave room for those they wait for: half of the processors at most.
    few = tokens <= current().processors // 2
    programs = min(2 * current().processors, STEP)
    warps = max(1, min(4 if few else 8, layout.hidden // 512))
    return {
        "programs": programs, "warps": warps, "ticket": 0, "places": 256 * (tokens > ONE_LAUNCH),
        "pdl": int(nvidia), "early": int(few),
    }  # fmt: skip


def candidates(tokens: int) -> list[dict[str, int]]:
    few = tokens <= 64
    places = 256 * (tokens > ONE_LAUNCH)
    waits = ((1, 1), (1, 0), (0, 0)) if few else ((1, 0), (0, 0))
    return [
        {"programs": programs, "warps": warps, "ticket": ticket, "places": places, "pdl": pdl, "early": early}
        for pdl, early in waits
        for programs, warps, ticket in (
            ((64, 8, 0), (64, 8, 1), (64, 4, 0), (64, 16, 0), (32, 8, 0)) if few
            else ((132, 8, 0), (264, 8, 0), (264, 8, 1), (264, 4, 0), (528, 4, 0))
        )
    ]  # fmt: skip
