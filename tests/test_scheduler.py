"""The scheduler as an actor, among stand-ins that only beat, load and fetch the map: the real ones need torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from common.actor import SILENT_SECONDS, Actor, Running, running
from common.bus import Bus
from common.clock import Clock, FakeClock, RealClock
from common.errors import ExpertsUnavailable, MoeculeError, NoWorker
from common.expert_map import members, missing, partitions_of
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import (
    Assign,
    Assigned,
    ExpertMap,
    GetMap,
    GetMetrics,
    LoadPartitions,
    Message,
    Metrics,
    Ok,
    PagesChanged,
    SchedulerBeat,
    ShardBeat,
    WorkerBeat,
    decode,
    encode,
    subject,
    subject_of_kind,
)
from common.model_config import ModelConfig
from common.settings import Settings
from services.scheduler.actor import BUCKET, KEY, Scheduler

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 64, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "intermediate_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 256,
    "eos_token_id": 1,
}  # fmt: skip


class StandIn(Actor):
    mute = False

    def __init__(self, bus: Bus, settings: Settings, model: str, **others) -> None:
        super().__init__(bus, settings, **others)
        self.model = model

    async def _on_metrics(self, subject: str, message: Message) -> Message:
        if self.mute:
            await asyncio.Event().wait()
        return await super()._on_metrics(subject, message)


class Shard(StandIn):
    kind = "shard"
    holds_back = False  # loads end when this is false

    async def start(self) -> None:
        self.held: set[int] = set()
        self.told: list[LoadPartitions] = []
        await self.bus.subscribe(subject("shard", self.id, "load"), self._on_load)

    async def drain(self) -> None:
        while self.held:
            await self.clock.sleep(0.05)

    async def _on_load(self, _: str, message: Message) -> Message:
        assert isinstance(message, LoadPartitions)
        self.told.append(message)
        if not self.holds_back:
            self.finish()
        return Ok()

    def finish(self) -> None:
        self.held = set(self.told[-1].partitions)
        self.beat_now()

    def beat(self) -> Message:
        if self.mute:
            return Ok()
        return ShardBeat(
            id=self.id, boot_id=self.boot_id, node=self.node, model=self.model, state=self.state,
            map_version=self.told[-1].version if self.state != "starting" and self.told else 0,
            held=tuple(sorted(self.held)) if self.state != "starting" else (),
        )  # fmt: skip


class Worker(StandIn):
    kind = "worker"
    stubborn = False  # does not take over new maps
    pending_tokens = 0
    map: ExpertMap | None = None

    async def start(self) -> None:
        self.pages: set[bytes] = set()
        self.seq = 0
        self.asked = 0  # how often for all pages
        await self.bus.subscribe(subject("worker", self.id, "allpages"), self._on_get_pages)
        await self.bus.subscribe("moecule.v1.scheduler.*.beat", self._on_scheduler)

    async def _on_scheduler(self, _: str, beat: Message) -> None:
        assert isinstance(beat, SchedulerBeat)
        if beat.map_version > self.version and not self.stubborn:
            with contextlib.suppress(MoeculeError):
                found = await self.bus.request(subject_of_kind("map"), GetMap())
                assert isinstance(found, ExpertMap)
                self.map = found if found.version > self.version else self.map
                self.beat_now()

    async def _on_get_pages(self, _: str, message: Message) -> Message:
        self.asked += 1
        return PagesChanged(
            worker_id=self.id, boot_id=self.boot_id, seq=self.seq, added=tuple(sorted(self.pages)), full=True
        )

    async def learn(self, *hashes: bytes, lost: bool = False, evicted: tuple[bytes, ...] = ()) -> None:
        self.pages = (self.pages | set(hashes)) - set(evicted)
        self.seq += 1
        if not lost:
            change = PagesChanged(worker_id=self.id, boot_id=self.boot_id, seq=self.seq, added=hashes, evicted=evicted)
            await self.bus.publish(subject("worker", self.id, "pages"), change)

    @property
    def version(self) -> int:
        return self.map.version if self.map else 0

    def beat(self) -> Message:
        if self.mute:
            return Ok()
        incomplete = self.map is None or missing(self.map.owners)
        return WorkerBeat(
            id=self.id, boot_id=self.boot_id, node=self.node, model=self.model, state=self.state,
            map_version=self.version, reason="experts are missing" if incomplete else "", queue_limit=2,
            pending_tokens=self.pending_tokens,
        )  # fmt: skip


@dataclass
class World:
    broker: MemoryBroker
    clock: Clock
    settings: Settings
    model: str
    stack: contextlib.AsyncExitStack
    bus: MemoryBus
    started: list[Running] = field(default_factory=list)

    async def start(self, actor: Actor) -> Running:
        self.started.append(await self.stack.enter_async_context(running(actor)))
        return self.started[-1]

    async def scheduler(self, name: str = "s") -> Running:
        return await self.start(Scheduler(MemoryBus(self.broker), self.settings, clock=self.clock, actor_id=name))

    async def shard(self, name: str, *, model: str | None = None, holds_back: bool = False) -> Running:
        shard = Shard(MemoryBus(self.broker), self.settings, model or self.model, clock=self.clock, actor_id=name)
        shard.holds_back = holds_back
        return await self.start(shard)

    async def worker(self, name: str = "w", *, model: str | None = None) -> Running:
        worker = Worker(MemoryBus(self.broker), self.settings, model or self.model, clock=self.clock, actor_id=name)
        return await self.start(worker)

    async def advance(self, seconds: float) -> None:
        """In small pieces: a message and its answer take several turns of the loop, none of them takes time."""
        assert isinstance(self.clock, FakeClock)
        for _ in range(round(seconds / 0.05)):
            await self.clock.advance(0.05)

    async def until(self, true: Callable[[], object], within: float = 3.0) -> float:
        """Seconds that passed until `true`."""
        start = self.clock.now()
        while not true():
            assert self.clock.now() - start < within, "it did not become true in time"
            await self.advance(0.05)
        return self.clock.now() - start

    async def assign(self, tokens: int = 10, hashes: tuple[bytes, ...] = ()) -> str:
        request = Assign(request_id="r", prompt_tokens=tokens, max_tokens=5, page_hashes=hashes)
        reply = await self.bus.request(subject_of_kind("assign"), request)
        assert isinstance(reply, Assigned)
        return reply.worker_id

    def stored(self) -> ExpertMap | None:
        found = self.broker.get(BUCKET, KEY)
        stored = decode(found[0]) if found else None
        assert stored is None or isinstance(stored, ExpertMap)
        return stored


def checkpoint(folder: Path) -> Settings:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"12345678")
    return Settings(model=str(folder), max_batch=2)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = FakeClock()
    settings = checkpoint(tmp_path)
    broker = MemoryBroker(clock=clock)
    bus = MemoryBus(broker)
    await bus.connect()
    async with contextlib.AsyncExitStack() as stack:
        world = World(broker, clock, settings, ModelConfig.load(settings.model).fingerprint, stack, bus)
        yield world
        # Nobody waits for a proper end: on this clock no time passes any more.
        for actor in world.started:
            if not actor.life.done():
                await actor.kill()


class Serving(NamedTuple):
    scheduler: Running
    a: Running
    b: Running
    w: Running


async def serving(world: World) -> Serving:
    """A scheduler, two shards and a worker, all settled."""
    it = Serving(await world.scheduler(), await world.shard("a"), await world.shard("b"), await world.worker())
    await world.until(lambda: it.scheduler.actor.reason() == "" and it.scheduler.actor.keeper.map)
    return it


async def test_a_cluster_comes_up_and_a_request_gets_its_worker(world):
    it = await serving(world)
    assert world.stored() == it.scheduler.actor.keeper.map == it.w.actor.map
    assert it.w.actor.map.version == 1 and it.w.actor.map.owners == (("a",), ("b",)) * 4
    assert [t.partitions for t in it.a.actor.told] == [(0, 2, 4, 6)]
    assert await world.assign() == "w"


async def test_the_reason_is_beaten_and_given_to_who_asks(world):
    beats = []
    await world.bus.subscribe("moecule.v1.scheduler.*.beat", lambda _, beat: collect(beats, beat))
    await world.scheduler()
    await world.advance(0.5)
    assert beats[-1].reason == "no expert shard is running; no worker is running" and beats[-1].map_version == 0
    with pytest.raises(ExpertsUnavailable, match="no expert shard is running"):
        await world.assign()
    with pytest.raises(ExpertsUnavailable):
        await world.bus.request(subject_of_kind("map"), GetMap())
    await world.shard("a")
    await world.until(lambda: beats[-1].map_version == 1)
    assert beats[-1].reason == "no worker is running"
    with pytest.raises(NoWorker, match=r"^no worker is running$"):
        await world.assign()


async def collect(beats: list[Message], beat: Message) -> None:
    beats.append(beat)


async def test_a_killed_shard_is_noticed_within_a_second_and_its_return_mends_the_map(world):
    it = await serving(world)
    await world.advance(3.0)
    await it.b.kill()
    passed = await world.until(lambda: it.w.actor.version == 2)
    assert passed <= 1.2
    assert missing(it.w.actor.map.owners) == (1, 3, 5, 7)
    with pytest.raises(ExpertsUnavailable, match="partitions 1, 3, 5, 7 of 8; gone: b"):
        await world.assign()
    again = await world.shard("b")
    await world.until(lambda: it.scheduler.actor.reason() == "", within=0.5)
    assert it.w.actor.map.shards["b"].boot_id == again.actor.boot_id and await world.assign() == "w"
    assert again.actor.held == {1, 3, 5, 7}


async def test_a_shard_that_restarts_unnoticed_is_known_by_its_boot_id(world):
    it = await serving(world)
    await it.b.kill()
    await world.shard("b", holds_back=True)  # before anyone could have missed a heartbeat
    await world.until(lambda: missing(it.w.actor.map.owners) == (1, 3, 5, 7), within=0.3)


async def test_late_is_not_dead(world):
    it = await serving(world)
    await world.advance(3.0)
    it.b.actor.mute = True
    await world.advance(SILENT_SECONDS - 0.5)
    assert it.scheduler.actor.keeper.map.version == 1
    await world.until(lambda: missing(it.w.actor.map.owners) == (1, 3, 5, 7), within=1.0)
    it.b.actor.mute = False  # the same life speaks again
    await world.until(lambda: it.scheduler.actor.reason() == "", within=1.0)


async def test_nobody_dies_of_our_own_stillness(world):
    it = await serving(world)
    await world.advance(3.0)
    world.clock.jump(60.0)
    await world.advance(1.0)
    assert it.scheduler.actor.keeper.map.version == 1 and it.scheduler.actor.reason() == ""


async def test_nobody_dies_while_our_own_connection_is_gone_and_the_store_is_filled_again(world):
    it = await serving(world)
    before = world.stored()
    world.broker.disconnect()
    await world.advance(60.0)
    world.broker.reconnect()
    assert world.stored() is None
    await world.advance(0.5)
    assert world.stored() == before
    await world.advance(10.0)
    assert it.scheduler.actor.keeper.map == before and await world.assign() == "w"


@pytest.mark.parametrize("store_is_kept", [True, False], ids=["store kept", "store lost"])
async def test_a_restarted_scheduler_finds_the_cluster_as_it_is(world, store_is_kept):
    it = await serving(world)
    before = it.w.actor.map
    await it.scheduler.kill()
    await world.advance(2.0)
    if not store_is_kept:
        world.broker.disconnect()
        world.broker.reconnect()
    second = await world.scheduler()
    await world.until(lambda: second.actor.reason() == "" and second.actor.keeper.map, within=2.0)
    await world.advance(3.0)
    assert it.w.actor.map.owners == before.owners
    assert it.w.actor.version == (before.version if store_is_kept else before.version + 1)
    assert it.a.actor.held == {0, 2, 4, 6} and it.b.actor.held == {1, 3, 5, 7}


async def test_a_newcomer_takes_its_share_and_the_others_drop_it_when_the_worker_knows(world):
    it = await serving(world)
    it.w.actor.stubborn = True
    c = await world.shard("c")
    await world.until(lambda: it.scheduler.actor.keeper.map.version == 2)
    await world.advance(1.0)
    assert len(it.a.actor.held | it.b.actor.held) == 8 and len(c.actor.held) == 2
    it.w.actor.stubborn = False
    await world.until(lambda: it.w.actor.version == 2)
    await world.advance(0.5)
    assert [len(s.actor.held) for s in (it.a, it.b, c)] == [3, 3, 2]
    assert it.a.actor.held == partitions_of(it.w.actor.map.owners, "a")


async def test_a_leaving_shard_is_relieved(world):
    it = await serving(world)
    it.b.leave.set()
    await world.until(it.b.life.done)
    assert members(it.w.actor.map.owners) == {"a"} and not missing(it.w.actor.map.owners)
    assert await world.assign() == "w"


async def test_two_schedulers_agree_and_the_second_takes_over(world):
    it = await serving(world)
    second = await world.scheduler("s2")
    await world.advance(2.0)
    assert second.actor.keeper.map == it.scheduler.actor.keeper.map and not second.actor._leads()
    await world.shard("c")
    await world.until(lambda: members(it.w.actor.map.owners) == {"a", "b", "c"})
    await world.until(lambda: second.actor.keeper.map == it.scheduler.actor.keeper.map == world.stored())
    await it.scheduler.kill()
    await world.advance(3.0)
    await it.a.kill()
    await world.until(lambda: missing(it.w.actor.map.owners))
    assert second.actor._leads() and it.w.actor.map == world.stored()


async def test_two_schedulers_that_both_plan_never_make_two_maps_of_one_version(world, monkeypatch):
    monkeypatch.setattr(Scheduler, "_leads", lambda self: True)
    it = await serving(world)
    second = await world.scheduler("s2")
    seen: dict[int, ExpertMap] = {}

    def agree() -> bool:
        for expert_map in (it.scheduler.actor.keeper.map, second.actor.keeper.map, it.w.actor.map):
            if expert_map:
                assert seen.setdefault(expert_map.version, expert_map) == expert_map
        return True

    await world.advance(2.0)
    await world.shard("c")
    await it.b.kill()
    for _ in range(400):
        await world.advance(0.05)
        agree()
    assert len(seen) >= 3
    assert it.scheduler.actor.keeper.map == second.actor.keeper.map == world.stored() == it.w.actor.map
    assert members(it.w.actor.map.owners) == {"a", "c"} and not missing(it.w.actor.map.owners)


async def test_the_loser_of_a_race_never_gives_the_winners_version_to_another_map(world, monkeypatch):
    it = await serving(world)
    before = it.w.actor.map
    won = ExpertMap(
        version=before.version + 1,
        model=world.model,
        partitions=8,
        owners=(("a",),) * 8,
        shards={"a": before.shards["a"]},
    )
    put, seen = world.broker.put, []

    def put_second(bucket: str, key: str, value: bytes, revision: int) -> int:
        if not seen:
            seen.append(won)
            put(bucket, key, encode(won), revision)
        seen.append(it.scheduler.actor.keeper.map)  # nothing may be given out before it is written
        return put(bucket, key, value, revision)

    monkeypatch.setattr(world.broker, "put", put_second)
    await it.b.kill()
    await world.shard("b")
    for _ in range(60):
        await world.advance(0.05)
        seen += [m for m in (it.scheduler.actor.keeper.map, it.w.actor.map, world.stored()) if m != seen[-1]]
    assert {m.owners for m in seen if m.version == won.version} == {won.owners}
    assert it.w.actor.version > won.version and not missing(it.w.actor.map.owners)


async def test_actors_of_another_checkpoint_are_left_out(world):
    it = await serving(world)
    await world.shard("c", model="other")
    await world.worker("w2", model="other")
    await world.advance(3.0)
    assert it.scheduler.actor.keeper.map.version == 1
    assert {await world.assign() for _ in range(3)} == {"w"}


async def test_a_request_goes_where_its_prefix_is(world):
    it = await serving(world)
    other = await world.worker("w2")
    await world.until(lambda: len(list(it.scheduler.actor.workers)) == 2 and other.actor.version == 1)
    await world.advance(0.5)
    await other.actor.learn(b"1", b"2", b"3")
    await world.advance(0.5)
    assert await world.assign(200, (b"1", b"2", b"3")) == "w2"
    await world.advance(0.5)
    await other.actor.learn(evicted=(b"2",))
    other.actor.pending_tokens = 100
    await world.advance(0.5)
    assert await world.assign(200, (b"1", b"2", b"3")) == "w"  # 200 against 136 + 100


async def test_a_gap_in_the_pages_is_noticed_and_filled(world):
    await serving(world)
    other = await world.worker("w2")
    await world.until(lambda: other.actor.version == 1 and other.actor.asked == 1)
    await other.actor.learn(b"1", lost=True)
    await other.actor.learn(b"2")
    await world.until(lambda: other.actor.asked == 2)
    await world.advance(0.3)
    assert await world.assign(200, (b"1", b"2")) == "w2"


async def test_a_restarted_worker_is_asked_for_its_pages_and_has_none(world):
    await serving(world)
    other = await world.worker("w2")
    await other.actor.learn(b"1", b"2")
    await world.advance(0.5)
    assert await world.assign(200, (b"1", b"2")) == "w2"
    await other.kill()
    again = await world.worker("w2")
    await world.until(lambda: again.actor.asked == 1 and again.actor.version == 1)
    await world.advance(0.3)
    assert await world.assign(200, (b"1", b"2")) == "w"  # equal again: the smaller id


async def test_a_killed_worker_gets_nothing_more(world):
    it = await serving(world)
    await world.advance(3.0)
    await it.w.kill()
    passed = await world.until(lambda: it.scheduler.actor.reason() == "no worker is running")
    assert passed <= 1.2
    assert "w" not in it.scheduler.actor.placement._known  # what is known of the dead is forgotten


async def test_it_counts_what_it_does(world):
    it = await serving(world)
    await world.assign()
    await it.w.kill()
    await world.until(lambda: it.scheduler.actor.reason(), within=7.0)
    with pytest.raises(NoWorker):
        await world.assign()
    metrics = await world.bus.request(subject("scheduler", "s", "metrics"), GetMetrics())
    assert isinstance(metrics, Metrics)
    lines = metrics.text.splitlines()
    for line in (
        'moecule_scheduler_assignments_total{worker="w"} 1.0',
        'moecule_scheduler_refusals_total{code="no_worker"} 1.0',
        "moecule_scheduler_map_version 1.0",
        "moecule_scheduler_workers 0.0",
        "moecule_scheduler_shards 2.0",
    ):
        assert line in lines


async def test_the_map_survives_the_bus(cluster, tmp_path):
    """On both buses and the real clock: come up, lose the server with its store, and have it back."""
    make_bus, outage = cluster
    settings = checkpoint(tmp_path)
    model = ModelConfig.load(settings.model).fingerprint
    bus = await make_bus()

    async def stored() -> Message | None:
        with contextlib.suppress(MoeculeError):
            found = await bus.kv_get(BUCKET, KEY)
            return decode(found[0]) if found else None
        return None

    async def until_stored() -> Message:
        async with asyncio.timeout(10):
            while (found := await stored()) is None:
                await asyncio.sleep(0.02)
        return found

    scheduler = Scheduler(await make_bus(), settings, clock=RealClock(), actor_id="s")
    shard = Shard(await make_bus(), settings, model, actor_id="a")
    async with running(scheduler), running(shard) as kept:
        before = await until_stored()
        assert isinstance(before, ExpertMap) and before.owners == (("a",),) * 8
        outage.down()
        outage.up()
        assert await until_stored() == before == scheduler.keeper.map
        await kept.kill()


def test_it_needs_no_torch():
    code = "import sys, services.scheduler.actor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
