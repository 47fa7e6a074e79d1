from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import Checkpoint
from common.errors import ConfigError, InvalidRequest, Unavailable
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import Attach, Attached, ExpertRows, ExpertSums, LoadPartitions, Ok, ShardBeat, WorkerBeat, subject
from common.model_config import ModelConfig
from services.expert_shard.actor import WORKER_GONE_SECONDS, ExpertShard
from services.expert_shard.experts import ExpertStore
from tests.expert_rig import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    TOPK,
    Rig,
    expert_name,
    reference,
    rig,
    rows,
    until,
    write_experts,
)


@pytest.fixture
def folder(tmp_path):
    return write_experts(tmp_path)


@pytest.fixture
async def cluster(folder):
    broker = MemoryBroker()

    async def bus():
        made = MemoryBus(broker)
        await made.connect()
        return made

    async with rig(folder, bus) as made:
        yield made


def store_of(folder) -> ExpertStore:
    return ExpertStore(ModelConfig.load(folder), Checkpoint(folder))


def sums(store: ExpertStore, layer: int, batch) -> tuple[torch.Tensor, bool]:
    out = torch.full_like(batch[0], 99.0)
    complete = store.compute(layer, *batch, out)
    return out, complete


@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize("layer", LAYERS)
def test_partial_sums_are_those_of_a_loop_over_tokens(folder, layer, count):
    store, tensors = store_of(folder), load_file(folder / "model.safetensors")
    store.load(range(EXPERTS))
    x, ids, weights = rows(count)
    ids[0, 1] = -1
    out, complete = sums(store, layer, (x, ids.to(torch.int32), weights))
    assert complete
    torch.testing.assert_close(out, reference(tensors, layer, x, ids, weights), rtol=1e-4, atol=1e-5)


def test_what_is_not_held_adds_nothing_and_is_told(folder):
    store, tensors = store_of(folder), load_file(folder / "model.safetensors")
    store.load([0, 3, 4])
    x, ids, weights = rows(8)
    kept = torch.where(torch.isin(ids, torch.tensor([0, 3, 4])), ids, -1)
    out, complete = sums(store, 1, (x, ids, weights))
    assert not complete
    torch.testing.assert_close(out, reference(tensors, 1, x, kept, weights), rtol=1e-4, atol=1e-5)
    out, complete = sums(store, 1, (x, kept, weights))
    assert complete


def test_partitions_come_and_go_without_changing_the_others(folder):
    store, tensors = store_of(folder), load_file(folder / "model.safetensors")
    x, ids, weights = rows(8)
    for load, drop, held in [
        ([5, 2], [], {2, 5}),
        ([0, 9, 2], [], {0, 2, 5, 9}),
        ([], [2, 9], {0, 5}),
        ([2], [7], {0, 2, 5}),
    ]:
        store.load(load)
        store.drop(drop)
        assert store.held == held
        kept = torch.where(torch.isin(ids, torch.tensor(sorted(held))), ids, -1)
        for layer in LAYERS:
            out, complete = sums(store, layer, (x, kept, weights))
            assert complete
            torch.testing.assert_close(out, reference(tensors, layer, x, kept, weights), rtol=1e-4, atol=1e-5)


def test_a_shard_that_holds_nothing_answers_zeros(folder):
    x, _, weights = rows(4)
    out, complete = sums(store_of(folder), 1, (x, torch.full((4, TOPK), -1), weights))
    assert complete and not out.any()


def test_a_partition_is_the_experts_of_one_remainder(tmp_path):
    few = ModelConfig.load(write_experts(tmp_path, n_routed_experts=EXPERTS))
    assert few.experts_of([3]) == [3]
    many = ModelConfig.load(write_experts(tmp_path, n_routed_experts=160))
    assert many.experts_of([3, 40]) == [3, 40, 67, 104, 131]


def test_only_the_bytes_of_its_own_experts_are_read(folder):
    read: list[str] = []

    class Watched(Checkpoint):
        def tensor(self, name, shape=None):
            read.append(name)
            return super().tensor(name, shape)

    store = ExpertStore(ModelConfig.load(folder), Watched(folder))
    store.check()
    assert read == []
    store.load([1, 4])
    store.load([1, 6])
    parts = [(layer, expert, part) for layer in LAYERS for expert in (1, 4, 6) for part in ("gate", "up", "down")]
    assert sorted(read) == sorted(expert_name(*part) for part in parts)


def test_progress_ends_at_the_bytes_that_are_held(folder):
    seen = []
    store_of(folder).load([0, 1], lambda done, total: seen.append((done, total)))
    total = 2 * len(LAYERS) * 3 * 24 * HIDDEN * 4
    assert seen == [(total * n // 4, total) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("spoil", ["missing", "shape"])
def test_a_bad_tensor_is_named(folder, spoil):
    name = expert_name(2, 7, "up")
    tensors = load_file(folder / "model.safetensors")
    if spoil == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    store = store_of(folder)
    with pytest.raises(ConfigError, match=name):
        if spoil == "missing":
            store.check()
        store.load([7])


async def test_a_missing_tensor_ends_the_start_of_the_actor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[expert_name(1, 0, "gate")]
    save_file(tensors, folder / "model.safetensors")
    broker = MemoryBroker()

    async def bus():
        made = MemoryBus(broker)
        await made.connect()
        return made

    with pytest.raises(ConfigError, match=expert_name(1, 0, "gate")):
        async with rig(folder, bus) as made:
            await made.shard("s", [])


async def test_it_loads_what_is_named_beats_at_once_and_drops_what_is_named_no_more(cluster: Rig):
    bus = await cluster.bus()
    beats: list[ShardBeat] = []

    async def on_beat(_, beat):
        beats.append(beat)

    await bus.subscribe("moecule.v1.shard.*.beat", on_beat)
    shard = await cluster.shard("s", [])
    await until(lambda: bool(beats) and beats[-1].state == "ready")
    assert beats[-1].held == () and beats[-1].model == cluster.config.fingerprint
    await cluster.hold(shard, [1, 2])
    await until(lambda: beats[-1].held == (1, 2))
    assert beats[-1].load_done == beats[-1].load_total > 0
    await cluster.hold(shard, [2, 8])
    await until(lambda: beats[-1].held == (2, 8))
    assert beats[-1].map_version == cluster.version
    # An order of an older map changes nothing.
    reply = await bus.request(subject("shard", "s", "load"), LoadPartitions(version=1, partitions=()))
    assert reply == Ok() and shard._wanted.partitions == (2, 8)
    with pytest.raises(InvalidRequest, match="10"):
        await bus.request(subject("shard", "s", "load"), LoadPartitions(version=99, partitions=(10,)))


def message(shard: ExpertShard, batch, **changes) -> ExpertRows:
    x, ids, weights = batch
    fields = dict(
        worker_id="w", boot_id=shard.boot_id, layer=1, rows=len(x), x=x.numpy().tobytes(),
        ids=ids.to(torch.int32).numpy().tobytes(), weights=weights.numpy().tobytes(),
    )  # fmt: skip
    return ExpertRows(**fields | changes)


async def test_rows_that_come_over_the_bus(cluster: Rig):
    shard = await cluster.shard("s")
    bus, where = await cluster.bus(), subject("shard", "s", "experts")
    batch = rows(5)
    reply = await bus.request(where, message(shard, batch))
    assert isinstance(reply, ExpertSums) and reply.boot_id == shard.boot_id
    got = torch.frombuffer(bytearray(reply.sums), dtype=torch.float32).view(5, HIDDEN)
    expected = reference(load_file(cluster.folder / "model.safetensors"), 1, *batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


async def test_bad_rows_are_refused_and_the_next_ones_served(cluster: Rig):
    shard = await cluster.shard("s", [0, 1])
    bus, where = await cluster.bus(), subject("shard", "s", "experts")
    x, _, weights = rows(2)
    good = x, torch.tensor([[0, 1, -1], [1, -1, -1]]), weights
    with pytest.raises(Unavailable, match="another life"):
        await bus.request(where, message(shard, good, boot_id="earlier"))
    with pytest.raises(Unavailable, match="does not hold"):
        await bus.request(where, message(shard, (x, torch.tensor([[0, 1, 2], [1, -1, -1]]), weights)))
    with pytest.raises(Unavailable):
        await bus.request(where, message(shard, (x, torch.tensor([[0, 1, 10_000], [1, -1, -1]]), weights)))
    with pytest.raises(Unavailable):
        await bus.request(where, message(shard, good, layer=77))
    with pytest.raises(InvalidRequest, match="3 rows"):
        await bus.request(where, message(shard, good, rows=3))
    assert isinstance(await bus.request(where, message(shard, good)), ExpertSums)


async def test_a_mailbox_is_offered_only_inside_the_node(cluster: Rig):
    shard = await cluster.shard("s", [])
    bus, where = await cluster.bus(), subject("shard", "s", "attach")
    hello = dict(worker_id="w", worker_boot_id="b", layout=1, decode_rows=8, prefill_rows=8)
    here = await bus.request(where, Attach(node=shard.node, **hello))
    assert isinstance(here, Attached) and here.boot_id == shard.boot_id and shard.boot_id in here.socket
    there = await bus.request(where, Attach(node="elsewhere", **hello))
    assert isinstance(there, Attached) and there.socket == ""
    newer = await bus.request(where, Attach(node=shard.node, **hello | dict(layout=2)))
    assert isinstance(newer, Attached) and newer.socket == ""


async def test_a_thread_that_crashes_ends_the_actor(cluster: Rig, monkeypatch: pytest.MonkeyPatch):
    shard = await cluster.shard("s")
    monkeypatch.setattr(shard.server, "_experts", None)
    bus = await cluster.bus()
    with pytest.raises(Unavailable, match="failed"):
        await bus.request(subject("shard", "s", "experts"), message(shard, rows(3)))
    await until(shard.life.life.done)
    shard.life.killed = True  # else the rig asks too how it ended
    with pytest.raises(AttributeError, match="compute"):
        shard.life.life.result()


async def test_a_leaving_shard_serves_until_it_is_released(cluster: Rig):
    shard = await cluster.shard("s")
    links = await cluster.links()
    await links.set_map(cluster.map([shard]))
    threads = threading.active_count()
    live = shard.life
    object.__setattr__(shard.settings, "drain_seconds", 60.0)
    live.leave.set()
    await until(lambda: shard.state == "draining")
    bus = await cluster.bus()
    assert isinstance(await bus.request(subject("shard", "s", "experts"), message(shard, rows(3))), ExpertSums)
    assert not live.life.done()
    await bus.request(subject("shard", "s", "load"), LoadPartitions(version=99, partitions=()))
    await until(live.life.done)
    assert links.reason
    assert threading.active_count() < threads


async def test_a_leaving_shard_waits_for_a_worker_of_the_bus_as_long_as_that_is_heard(cluster: Rig):
    shard = await cluster.shard("s")
    bus, where = await cluster.bus(), subject("shard", "s", "experts")
    assert isinstance(await bus.request(where, message(shard, rows(3))), ExpertSums)
    assert shard._asked_over_bus()
    shard._bus_workers["w"] -= WORKER_GONE_SECONDS
    assert not shard._asked_over_bus()
    beat = WorkerBeat(id="w", boot_id="b", node="n", model="m", state="ready", map_version=1)
    await bus.publish(subject("worker", "w", "beat"), beat)
    await until(shard._asked_over_bus)


async def test_a_leaving_shard_that_nobody_uses_leaves_at_once(cluster: Rig):
    shard = await cluster.shard("s")
    object.__setattr__(shard.settings, "drain_seconds", 60.0)
    live = shard.life
    live.leave.set()
    await until(live.life.done)
