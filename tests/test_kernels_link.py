from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.link_rig import Setup, Variant, both_ends, captured, check_shard, check_worker, in_processes, mps
from kernels.combine_norm.naive import SlotRows
from kernels.link import ipc, naive, views
from kernels.link.layout import ABORT_AT, ALIGN, FLAGS_AT, Region, SlabLayout
from kernels.link.triton import combine, dispatch, give_back, take, tile_rule, wait
from kernels.link.views import ABORT, SENT, STEP, Peers, Requests
from kernels.quant.naive import Fp8Rows, quantise_rows
from tests.kernel_checks import DEVICE, TOLERANCE, either_device, error_ratio, poison, same

EXPERTS = 12
BOOT = 0x1234567
FOREVER = 3_600_000_000_000  # ns

layouts = st.builds(
    SlabLayout, hidden=st.integers(1, 60).map(lambda n: 128 * n), topk=st.integers(1, 9),
    decode_rows=st.integers(1, 300), prefill_rows=st.integers(1, 5000), peers=st.integers(1, 9),
    quantised=st.booleans(),
)  # fmt: skip


@given(layout=layouts)
def test_nothing_of_a_request_slab_overlaps(layout: SlabLayout) -> None:
    pieces = [(0, FLAGS_AT), (layout.flag_at(), 4)]
    for region in Region:
        at, rows = layout.region(region), layout.rows(region)
        width, scales = (layout.hidden, layout.hidden // 128 * 4) if layout.quantised else (2 * layout.hidden, 0)
        ids = rows * layout.topk * 4
        pieces += [(at.count, 4), (at.ids, ids), (at.weights, ids), (at.data, rows * width), (at.scale, rows * scales)]
    pieces.append((layout.request_bytes(), 0))
    for (start, size), (following, _) in itertools.pairwise(pieces):
        assert start + size <= following
        assert following % ALIGN == 0


@given(layout=layouts)
def test_regions_and_peers_share_no_row_of_a_reply_slab(layout: SlabLayout) -> None:
    ends = [layout.region(region).reply + layout.rows(region) for region in Region]
    assert [layout.region(region).reply for region in Region] == [0, *ends[:2]]
    assert ends[2] == layout.block_rows
    assert layout.flag_at(layout.peers) == layout.replies_at
    block = layout.block_rows * layout.hidden * 2
    assert [layout.block_at(p + 1) - layout.block_at(p) for p in range(layout.peers)] == [block] * layout.peers
    assert layout.reply_bytes() == layout.block_at(layout.peers)
    assert layout.bytes() == layout.peers * layout.request_bytes() + layout.reply_bytes()


@pytest.mark.parametrize(
    "change", [{"hidden": 100}, {"topk": 0}, {"decode_rows": 0}, {"prefill_rows": 0}, {"peers": 0}]
)
def test_a_layout_without_room_is_refused(change: dict[str, int]) -> None:
    sizes = {"hidden": 256, "topk": 2, "decode_rows": 4, "prefill_rows": 8, "peers": 1} | change
    with pytest.raises(ValueError, match="a link"):
        SlabLayout(**sizes, quantised=True)


def test_a_slab_of_another_life_is_refused() -> None:
    slab = torch.empty(4096, dtype=torch.uint8)
    views.format_slab(slab, BOOT)
    views.check_slab(slab, BOOT)
    with pytest.raises(ValueError, match="boot"):
        views.check_slab(slab, BOOT + 1)


# ---- one process is both ends ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """A worker and its shards, each shard with a slab of its own."""

    layout: SlabLayout
    worker: Peers
    shards: tuple[Peers, ...]  # each one's end of its link
    requests: tuple[Tensor, ...]  # slabs, uint8
    reply: Tensor  # slab, uint8

    def into(self, region: Region) -> list[Requests]:
        return [views.requests(slab, self.layout, region) for slab in self.requests]

    def block(self, peer: int, region: Region) -> Tensor:
        at = self.layout.region(region)
        return views.block(self.reply, self.layout, peer)[at.reply : at.reply + at.rows]

    def sent(self) -> list[int]:
        return [int(views.flag_word(slab, self.layout)) for slab in self.requests]


def ends_of(layout: SlabLayout, budget: int = FOREVER) -> Ends:
    reply = torch.empty(layout.reply_bytes(), dtype=torch.uint8, device=DEVICE)
    views.format_slab(reply, BOOT)
    worker, slabs, shards = Peers.empty(layout.peers, budget, DEVICE), [], []
    for peer in range(layout.peers):
        slab = torch.empty(layout.request_bytes(), dtype=torch.uint8, device=DEVICE)
        views.format_requests(slab, layout, BOOT)
        there, here = slab.data_ptr(), reply.data_ptr()
        worker.attach(
            peer, there, there + layout.flag_at(), here + layout.flag_at(peer), here + ABORT_AT, near=peer != 1
        )
        shard = Peers.empty(1, budget, DEVICE)
        shard.attach(
            0, here + layout.block_at(peer), here + layout.flag_at(peer), there + layout.flag_at(), there + ABORT_AT,
            near=peer != 1,
        )  # fmt: skip
        slabs.append(slab)
        shards.append(shard)
    return Ends(layout, worker, tuple(shards), tuple(slabs), reply)


@dataclass(frozen=True)
class Batch:
    x: Tensor | Fp8Rows
    ids: Tensor
    weights: Tensor
    owner: Tensor

    def slots(self, layout: SlabLayout) -> Tensor:
        slots = torch.empty(len(self.ids), layout.peers, dtype=torch.int32, device=DEVICE)
        poison(slots)
        return slots


def batch_of(layout: SlabLayout, tokens: int) -> Batch:
    x: Tensor | Fp8Rows = torch.randn(tokens, layout.hidden, device=DEVICE).to(torch.bfloat16)
    if layout.quantised:
        rows = Fp8Rows.empty(tokens, layout.hidden, DEVICE)
        quantise_rows(x.float(), rows)  # type: ignore[union-attr]
        x = rows
    ids = torch.rand(tokens, EXPERTS, device=DEVICE).topk(layout.topk, 1).indices.int()
    ids[torch.rand(tokens, layout.topk, device=DEVICE) < 0.2] = -1
    owner = torch.randint(layout.peers, (EXPERTS,), dtype=torch.int32, device=DEVICE)
    return Batch(x, ids, torch.rand(tokens, layout.topk, device=DEVICE), owner)


def check_requests(got: Requests, want: Requests, tokens: int) -> None:
    count = int(want.count)
    assert int(got.count) == count
    assert torch.equal(got.ids[:tokens], want.ids[:tokens])
    assert torch.equal(got.weights[:count], want.weights[:count])
    if isinstance(got.x, Fp8Rows):
        assert isinstance(want.x, Fp8Rows)
        assert same(got.x.data[:count], want.x.data[:count])
        assert torch.equal(got.x.scale[:count], want.x.scale[:count])
    else:
        assert same(got.x[:count], want.x[:count])  # type: ignore[index]


shapes = given(
    tokens=st.integers(1, 7),
    hidden=st.sampled_from([128, 256, 640]),
    topk=st.integers(1, 4),
    peers=st.integers(1, 3),
    quantised=st.booleans(),
    region=st.sampled_from(Region),
    tile=st.fixed_dictionaries(
        {"programs": st.integers(1, 9), "ticket": st.integers(0, 1), "places": st.sampled_from([0, 4])}
    ),
    seed=st.integers(0, 1 << 30),
)


@either_device
@settings(deadline=None, max_examples=25)
@shapes
def test_dispatch_equals_naive(
    tokens: int, hidden: int, topk: int, peers: int, quantised: bool, region: Region, tile: dict[str, int], seed: int
) -> None:
    torch.manual_seed(seed)
    check_dispatch(SlabLayout(hidden, topk, 8, 12, peers, quantised), tokens, region, tile)


def check_dispatch(layout: SlabLayout, tokens: int, region: Region, tile: dict[str, int]) -> None:
    ends, plain = ends_of(layout), ends_of(layout)
    for use in (1, 2):
        batch = batch_of(layout, tokens)
        slots, want_slots = batch.slots(layout), batch.slots(layout)
        naive.dispatch(batch.x, batch.ids, batch.weights, batch.owner, plain.into(region), layout, region, want_slots)
        dispatch(
            batch.x, batch.ids, batch.weights, batch.owner, ends.worker, layout, region, slots,
            tile_rule(layout, tokens) | tile,
        )  # fmt: skip
        assert torch.equal(slots, want_slots)
        for got, want in zip(ends.into(region), plain.into(region), strict=True):
            check_requests(got, want, tokens)
        assert ends.sent() == [use * STEP] * layout.peers
        assert ends.worker.table[:, SENT].tolist() == [use] * layout.peers
        assert not ends.worker.tickets.any()
        assert ends.worker.ok.item() == 1


@either_device
@settings(deadline=None, max_examples=25)
@shapes
def test_sums_come_back(
    tokens: int, hidden: int, topk: int, peers: int, quantised: bool, region: Region, tile: dict[str, int], seed: int
) -> None:
    """take, give_back, wait and combine, with every flag set before it is waited for."""
    torch.manual_seed(seed)
    layout = SlabLayout(hidden, topk, 8, 12, peers, quantised)
    ends, plain = ends_of(layout), ends_of(layout)
    whole = tile_rule(layout, tokens) | tile
    batch = batch_of(layout, tokens)
    slots = batch.slots(layout)
    dispatch(batch.x, batch.ids, batch.weights, batch.owner, ends.worker, layout, region, slots, whole)
    poison(views.replies(ends.reply, layout))
    for peer, (shard, asked) in enumerate(zip(ends.shards, ends.into(region), strict=True)):
        take(shard, layout, tokens, whole)
        dense = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
        places = torch.randint(-1, tokens, (tokens, topk), dtype=torch.int32, device=DEVICE)
        parts = dense if peer % 2 else SlotRows(dense, places)
        count = int(asked.count)
        naive.give_back(parts, asked.count, plain.block(peer, region))
        places[count:] = 1 << 30  # of rows that nobody asked for, and that nothing may follow
        give_back(parts, asked.count, shard, layout, region, whole)
        got, want = ends.block(peer, region)[:count], plain.block(peer, region)[:count]
        assert error_ratio(got.float(), want.float()) < TOLERANCE[torch.bfloat16]
        assert shard.ok.item() == 1
        assert int(views.flag_word(ends.reply, layout, peer)) == STEP
        assert ends.block(peer, region)[count:].isnan().all()
    plain.reply.copy_(ends.reply)
    out, want = torch.empty(2, tokens, hidden, device=DEVICE).bfloat16()
    naive.combine(views.replies(plain.reply, layout), slots, want)
    poison(out)
    wait(ends.worker, layout, tokens, whole)
    combine(views.replies(ends.reply, layout), slots, out, whole)
    assert error_ratio(out.float(), want.float()) < TOLERANCE[torch.bfloat16]
    assert ends.worker.ok.item() == 1


@either_device
@pytest.mark.parametrize("places", [0, 4])
def test_a_failed_step_sends_no_rows_but_keeps_in_step(places: int) -> None:
    layout = SlabLayout(128, 2, 8, 8, 2, True)
    ends, batch = ends_of(layout), batch_of(layout, 5)
    tile, slots = tile_rule(layout, 5) | {"places": places}, batch.slots(layout)
    ends.worker.ok.zero_()
    dispatch(batch.x, batch.ids, batch.weights, batch.owner, ends.worker, layout, Region.EVEN, slots, tile)
    assert (slots == -1).all()
    for there in ends.into(Region.EVEN):
        assert int(there.count) == 0
        assert (there.ids == -1).all()
    assert ends.sent() == [STEP, STEP]


@either_device
@pytest.mark.parametrize("places", [0, 4])
@pytest.mark.parametrize("needed", [True, False])
def test_a_peer_that_is_gone_is_left_alone(places: int, needed: bool) -> None:
    layout = SlabLayout(128, 2, 8, 8, 2, False)
    ends, batch = ends_of(layout), batch_of(layout, 5)
    tile, slots = tile_rule(layout, 5) | {"places": places}, batch.slots(layout)
    batch.owner.zero_()
    batch.ids[0, 0], batch.owner[7] = (7, 1) if needed else (-1, 1)
    if not needed:
        batch.ids[batch.ids == 7] = -1
    ends.worker.detach(1)
    before = ends.requests[1].clone()
    dispatch(batch.x, batch.ids, batch.weights, batch.owner, ends.worker, layout, Region.EVEN, slots, tile)
    assert torch.equal(ends.requests[1], before)
    assert ends.sent() == [STEP, 0]
    assert ends.worker.ok.item() == (0 if needed else 1)


@either_device
@pytest.mark.parametrize("places", [0, 4])
def test_an_expert_of_nobody_fails_the_step(places: int) -> None:
    layout = SlabLayout(128, 2, 8, 8, 2, False)
    ends, batch = ends_of(layout), batch_of(layout, 5)
    batch.ids[4, 1], batch.owner[3] = 3, -1
    tile = tile_rule(layout, 5) | {"places": places}
    dispatch(batch.x, batch.ids, batch.weights, batch.owner, ends.worker, layout, Region.ODD, batch.slots(layout), tile)
    assert ends.worker.ok.item() == 0


def set_flags(ends: Ends, uses: int) -> None:
    """All shards have answered `uses` uses; flags wrap."""
    for peer in range(ends.layout.peers):
        views.flag_word(ends.reply, ends.layout, peer).fill_((uses * STEP + (1 << 31)) % (1 << 32) - (1 << 31))


@either_device
@pytest.mark.parametrize("uses", [0, 1, (1 << 19) - 1, 1 << 19, 1 << 20, (1 << 20) + 1])
def test_flags_may_wrap(uses: int) -> None:
    ends = ends_of(SlabLayout(128, 2, 8, 8, 2, True), budget=0)
    ends.worker.table[:, SENT] = uses
    set_flags(ends, uses)
    wait(ends.worker, ends.layout, 1)
    assert ends.worker.ok.item() == 1
    ends.worker.table[1, SENT] = uses + 1
    wait(ends.worker, ends.layout, 1)  # the budget of 0 is used up
    assert ends.worker.ok.item() == 0


@either_device
def test_a_wait_is_over_when_the_host_aborts_and_nothing_is_given_back() -> None:
    layout = SlabLayout(128, 2, 8, 8, 1, True)
    ends = ends_of(layout)
    views.abort_word(ends.requests[0]).fill_(1)
    take(ends.shards[0], layout, 4)
    assert ends.shards[0].ok.item() == 0
    views.abort_word(ends.requests[0]).zero_()
    take(ends.shards[0], layout, 4)  # at once: the step has failed already
    parts = torch.ones(4, 128, device=DEVICE).bfloat16()
    give_back(parts, torch.full((1,), 4, dtype=torch.int32, device=DEVICE), ends.shards[0], layout, Region.EVEN)
    assert int(views.flag_word(ends.reply, layout)) == 0
    assert not ends.block(0, Region.EVEN).any()


def test_rows_that_do_not_fit_are_refused() -> None:
    layout = SlabLayout(128, 2, 4, 8, 1, False)
    ends, batch = ends_of(layout), batch_of(layout, 5)
    with pytest.raises(ValueError, match="5 tokens in a region of 4 rows"):
        dispatch(batch.x, batch.ids, batch.weights, batch.owner, ends.worker, layout, Region.ODD, batch.slots(layout))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def variants_of(tokens: int) -> list[Variant]:
    tile = {"programs": tokens, "warps": 8, "ticket": 0, "places": 0, "pdl": 1, "early": 1}
    return [
        Variant(tokens, tile, launches=2),
        Variant(tokens, tile | {"early": 0}, launches=2),
        Variant(tokens, tile | {"pdl": 0, "ticket": 1, "programs": 5, "places": 16}, launches=3),
    ]


SETUP = Setup(rows=16, layers=4, inputs=4, peers=2, budget_ns=20_000_000_000)


@pytest.mark.gpu
@pytest.mark.parametrize("ticket", [0, 1])
@pytest.mark.parametrize(("hidden", "topk", "quantised"), [(7168, 8, True), (2048, 6, False)], ids=["R1", "V2-Lite"])
@pytest.mark.parametrize("tokens", [1, 64, 128, 4096])
def test_dispatch_at_full_size(tokens: int, hidden: int, topk: int, quantised: bool, ticket: int) -> None:
    layout = SlabLayout(hidden, topk, 128, 4096, 4, quantised)
    check_dispatch(layout, tokens, Region.PREFILL if tokens > 128 else Region.ODD, {"ticket": ticket})


@pytest.mark.gpu
@pytest.mark.parametrize("variant", variants_of(16), ids=["early", "late", "three launches"])
def test_replays_within_one_process(variant: Variant) -> None:
    worker, shard = both_ends(SETUP)
    shard_graph = captured(shard.build(variant), shard.stream)
    worker_graph = captured(worker.build(variant), worker.stream)
    worker.wrong_layers()
    worker.reset()
    shard.reset()
    for seed in range(1000):
        worker.refill(seed)
        torch.cuda.synchronize()
        for side, graph in ((shard, shard_graph), (worker, worker_graph)):
            with torch.cuda.stream(side.stream):
                graph.replay()
        torch.cuda.synchronize()
        assert worker.ok
        assert shard.ok
        assert worker.wrong_layers() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("near", [True, False])
def test_replays_between_two_processes(near: bool) -> None:
    variants = variants_of(16)[: None if near else 1]
    with mps():
        arguments = (dataclasses.replace(SETUP, near=near), variants, 1000)
        found = list(in_processes([check_worker, check_shard], arguments, seconds=300))
    assert found == [{"wrong": 0, "ok": True}] * len(variants)


def waiting(budget: int) -> tuple[Ends, ipc.HostWords]:
    """A worker whose shard never answers, with what its waits need compiled and loaded."""
    ends, words = ends_of(SlabLayout(7168, 8, 64, 64, 1, True), budget), ipc.HostWords(1)
    ends.worker.table[0, ABORT] = words.address(0)
    ends.worker.table[0, SENT] = 1
    ends.worker.ok.zero_()
    wait(ends.worker, ends.layout, 64)
    ends.worker.ok.fill_(1)
    torch.cuda.synchronize()
    return ends, words


def milliseconds_of(launch: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@pytest.mark.gpu
def test_the_host_ends_a_wait() -> None:
    ends, words = waiting(FOREVER)
    done = torch.cuda.Event()
    wait(ends.worker, ends.layout, 64)
    done.record()
    time.sleep(0.02)
    assert not done.query()
    began = time.perf_counter()
    words[0] = 1
    done.synchronize()
    assert time.perf_counter() - began < 0.010
    assert ends.worker.ok.item() == 0
    words[0] = 0
    assert milliseconds_of(lambda: [wait(ends.worker, ends.layout, 64) for _ in range(100)]) < 20
    words.close()


@pytest.mark.gpu
def test_a_wait_has_an_end_of_its_own() -> None:
    ends, words = waiting(20_000_000)
    took = milliseconds_of(lambda: wait(ends.worker, ends.layout, 64))
    assert 19 < took < 30
    assert ends.worker.ok.item() == 0
    words.close()
