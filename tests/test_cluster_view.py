"""What the gateway shows of the cluster: heartbeats in, one picture out, with a clock that a test moves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest

from common.clock import FakeClock
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import GatewayBeat, SchedulerBeat, ShardBeat, WorkerBeat, subject
from common.model_config import ModelConfig
from common.settings import Settings
from services.gateway.cluster import KEEP_SECONDS, MISSED_SECONDS, SNAPSHOT_SECONDS, ClusterView
from services.gateway.openapi import Served, document
from services.gateway.page import FILE, policy
from tests.api_front import Front, make_front

CONFIG = ModelConfig.load("models/tiny")
BEAT = 0.25


@dataclass
class World:
    clock: FakeClock
    broker: MemoryBroker
    bus: MemoryBus
    view: ClusterView
    beats: dict[str, Any] = field(default_factory=dict)  # id -> what it says of itself, as long as it lives

    def lives(self, kind: str, actor_id: str, **fields: Any) -> None:
        common = {"id": actor_id, "boot_id": "a", "state": "ready"} | fields
        if kind != "gateway":
            common = {"map_version": 1} | common
        if kind in ("worker", "shard"):
            common = {"node": "n", "model": "m"} | common
        kinds = {"worker": WorkerBeat, "shard": ShardBeat, "scheduler": SchedulerBeat, "gateway": GatewayBeat}
        self.beats[actor_id] = kind, kinds[kind](**common)

    async def passes(self, seconds: float) -> None:
        for _ in range(round(seconds / BEAT)):
            await self.clock.advance(BEAT)
            for kind, beat in self.beats.values():
                self.view.take(subject(kind, beat.id, "beat"), beat)

    @property
    def seen(self) -> dict[str, Any]:
        return json.loads(self.view.snapshot())

    def actor(self, actor_id: str) -> dict[str, Any]:
        (found,) = [actor for actor in self.seen["actors"] if actor["id"] == actor_id]
        return found

    @property
    def told(self) -> list[str]:
        return [f"{h['id']} {h['what']}" for h in self.seen["happenings"]]


@pytest.fixture
async def world() -> World:
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    bus = MemoryBus(broker)
    await bus.connect()
    await clock.advance(100)
    one = World(clock, broker, bus, ClusterView(bus, clock, "gateway-1", "tiny", CONFIG, lambda: "", clock.now))
    one.lives("gateway", "gateway-1")
    return one


async def test_actors_are_in_order_and_as_they_said(world: World) -> None:
    for kind, actor_id in (("shard", "s-10"), ("scheduler", "c"), ("shard", "s-2"), ("worker", "w")):
        world.lives(kind, actor_id)
    world.lives("worker", "w", running=3, waiting=2, pages_used=7, pages_total=64, state="draining", reason="leaves")
    await world.passes(1)
    assert [actor["id"] for actor in world.seen["actors"]] == ["w", "s-2", "s-10", "c", "gateway-1"]
    worker = world.actor("w")
    assert {key: worker[key] for key in ("running", "waiting", "pages_used", "pages_total", "state", "reason")} == {
        "running": 3, "waiting": 2, "pages_used": 7, "pages_total": 64, "state": "draining", "reason": "leaves",
    }  # fmt: skip


async def test_four_missed_heartbeats_are_a_silence_and_it_is_within_two_seconds(world: World) -> None:
    world.lives("worker", "w")
    await world.passes(2)
    del world.beats["w"]
    await world.passes(0.75)
    assert world.actor("w")["state"] == "ready", "late is not dead"
    await world.passes(BEAT)
    assert world.actor("w")["state"] == "silent"
    assert MISSED_SECONDS + SNAPSHOT_SECONDS + 0.5 <= 2, "with a page's own half second"
    await world.passes(5)
    assert world.actor("w")["state"] == "gone"
    await world.passes(KEEP_SECONDS)
    assert "w" not in [actor["id"] for actor in world.seen["actors"]]
    assert world.told[-2:] == ["w has missed its heartbeats", "w is taken for dead"]


async def test_who_said_so_has_left(world: World) -> None:
    world.lives("shard", "s", state="draining")
    await world.passes(1)
    del world.beats["s"]
    await world.passes(6)
    assert world.actor("s")["state"] == "left"


async def test_a_return_is_told_and_counted(world: World) -> None:
    world.lives("worker", "w", generation_tokens=1000)
    await world.passes(2)
    del world.beats["w"]
    await world.passes(2)
    world.lives("worker", "w", boot_id="b", state="starting", generation_tokens=0)
    await world.passes(BEAT)
    world.view.take("moecule.v1.worker.w.beat", WorkerBeat(
        id="w", boot_id="a", node="n", model="m", state="ready", map_version=1,
    ))  # fmt: skip
    assert world.actor("w")["state"] == "starting", "an earlier life's word counts for nothing"
    world.lives("worker", "w", boot_id="b", generation_tokens=10)
    await world.passes(1)
    worker = world.actor("w")
    assert (worker["state"], worker["lives"], worker["tokens_per_second"]) == ("ready", 2, 10.0)
    assert world.told[-2:] == ["w is back in a new life: starting", "w is ready"]


async def test_rates_are_of_the_last_two_seconds(world: World) -> None:
    for second in range(12):
        rate = 100 if second < 8 else 40
        for quarter in range(4):
            before = sum(100 if s < 8 else 40 for s in range(second)) + rate * (quarter + 1) / 4
            world.lives(
                "worker", "w", generation_tokens=int(before), prompt_tokens=int(2 * before), steps=int(before),
                step_seconds=before * 0.005, waited=(("s", 0.25 * (second + (quarter + 1) / 4)),),
            )  # fmt: skip
            world.lives(
                "shard", "s", held=(1, 3), rows=int(before), busy_seconds=before * 0.002,
                expert_tokens=tuple(int(before) if e == 3 else 0 for e in range(CONFIG.experts)),
            )  # fmt: skip
            await world.passes(BEAT)
    worker, shard = world.actor("w"), world.actor("s")
    assert worker["tokens_per_second"] == 40 and worker["prompt_tokens_per_second"] == 80
    assert worker["step_ms"] == 5 and worker["waited"] == [{"shard": "s", "share": 0.25}]
    assert (shard["rows_per_second"], shard["row_us"], shard["busy"]) == (40, 2000, 0.08)
    assert shard["experts"] == [
        {"expert": 1, "tokens_per_second": 0},
        {"expert": 3, "tokens_per_second": 40},
    ]
    del world.beats["w"]
    await world.passes(1)
    assert "tokens_per_second" not in world.actor("w"), "who is silent makes no tokens"


async def test_a_shard_shows_the_worker_that_waits_for_it_the_most(world: World) -> None:
    for shard in ("s-1", "s-2", "s-3"):
        world.lives("shard", shard)
    for tick in range(8):
        world.lives("worker", "w-1", waited=(("s-1", 0.1 * tick * BEAT), ("s-2", 0.3 * tick * BEAT)))
        world.lives("worker", "w-2", waited=(("s-1", 0.2 * tick * BEAT), ("s-2", 0.1 * tick * BEAT)))
        await world.passes(BEAT)
    assert [world.actor(shard).get("awaited") for shard in ("s-1", "s-2", "s-3")] == [0.2, 0.3, None]
    world.lives("worker", "w-1", waited=(("s-2", 9.0),))
    await world.passes(2 * BEAT)
    assert world.actor("w-1")["waited"] == [{"shard": "s-2", "share": 1.0}], "who has left the map is not named"


async def test_a_shard_that_nobody_waits_for_is_told_from_one_of_whom_nobody_knows(world: World) -> None:
    world.lives("shard", "s")
    world.lives("worker", "w", waited=())  # as on a GPU
    await world.passes(1)
    assert "awaited" not in world.actor("s")
    world.lives("worker", "w", waited=(("s", 5.0),))
    await world.passes(3)
    assert world.actor("s")["awaited"] == 0


async def test_our_own_outage_is_nobodys_silence(world: World) -> None:
    world.lives("worker", "w")
    await world.passes(2)
    world.broker.disconnect()
    for _ in range(20):  # while somebody looks
        await world.clock.advance(0.5)
        assert (world.seen["connected"], world.actor("w")["state"]) == (False, "ready")
    world.broker.reconnect()
    await world.clock.advance(MISSED_SECONDS / 2)
    assert (world.seen["connected"], world.actor("w")["state"]) == (True, "ready"), "it has not had the time yet"


async def test_what_came_while_we_stood_still_is_nobodys_silence(world: World) -> None:
    world.lives("worker", "w")
    await world.passes(2)
    await world.clock.advance(3)  # nothing of ours ran
    assert world.actor("w")["state"] == "ready"
    del world.beats["w"]
    await world.passes(MISSED_SECONDS + BEAT)
    assert world.actor("w")["state"] == "silent"


async def test_a_load_shows_how_far_it_is(world: World) -> None:
    world.lives("shard", "s", load_done=3_000_000_000, load_total=40_000_000_000)
    await world.passes(1)
    assert (world.actor("s")["load_done"], world.actor("s")["load_total"]) == (3_000_000_000, 40_000_000_000)


async def test_the_maps_version_is_told_once(world: World) -> None:
    world.lives("scheduler", "c", map_version=3)
    await world.passes(2)
    assert world.seen["map_version"] == 3
    assert world.told.count("c made version 3 of the expert map") == 1


async def test_one_picture_serves_all_who_look(world: World) -> None:
    await world.passes(1)
    first = world.view.snapshot()
    world.lives("worker", "w")
    world.view.take("moecule.v1.worker.w.beat", world.beats["w"][1])
    assert world.view.snapshot() is first
    await world.clock.advance(SNAPSHOT_SECONDS)
    assert world.actor("w")


async def test_a_shard_of_another_model_hides_nobody(world: World) -> None:
    world.lives("shard", "s", held=(0, 1), expert_tokens=(5,), rows=3)
    await world.passes(1)
    assert world.actor("s").get("experts", []) == [] and world.actor("gateway-1")


async def test_a_beat_of_no_known_kind_changes_nothing(world: World) -> None:
    world.view.take("moecule.v1.wizard.x.beat", GatewayBeat(id="x", boot_id="a", state="ready"))
    assert world.seen["actors"] == []


# ---- over HTTP


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.3)):
        yield one


async def test_the_answer_is_as_documented_and_asks_nobody(front: Front) -> None:
    async with asyncio.timeout(5):
        while len((await front.http.get("/cluster")).json()["actors"]) < 3:
            await asyncio.sleep(0.05)
    asked: list[str] = []
    for bus in front.worker.bus, front.scheduler.bus:
        await bus.subscribe("moecule.v1.*.*.metrics", lambda subject, _: asked.append(subject))  # type: ignore
    answer = await front.http.get("/cluster")
    found = document(Served("http://x", "tiny", 2048))
    jsonschema.validate(answer.json(), {"$ref": "#/components/schemas/Cluster", "components": found["components"]})
    assert answer.headers["cache-control"] == "no-store" and asked == []
    assert {(a["kind"], a["id"]) for a in answer.json()["actors"]} >= {("worker", "worker-1"), ("gateway", "gateway-1")}


async def test_the_page_is_one_file_and_allows_nothing_else(front: Front) -> None:
    answer = await front.http.get("/")
    html, allowed = answer.text, answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html") and html == FILE.read_text()
    assert "default-src 'none'" in allowed and "connect-src 'self'" in allowed and "unsafe" not in allowed
    assert allowed.count("'sha256-") == 2, "its style and its script"
    assert "src=" not in html.replace('"data:', "") and "@import" not in html and " on" + "click=" not in html
    assert "style=" not in html, "the policy would drop it"


def test_the_policy_is_of_what_stands_there() -> None:
    one, other = (policy(b"<style>a</style><script>%b</script>" % script) for script in (b"1", b"2"))
    assert one != other and one.partition("style-src")[2] == other.partition("style-src")[2]
