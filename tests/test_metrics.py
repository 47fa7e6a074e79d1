"""What every actor counts, against what really happened to a cluster in this process."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.actor import running
from common.loading import TELL_SECONDS, Loading
from common.memory_bus import MemoryBus
from common.messages import ShardBeat, WorkerBeat
from common.telemetry import Tally
from services.gateway.actor import Gateway
from services.gateway.metrics import everyones_metrics
from tests.compose import Composed, compose, greedy

LAYERS, TOPK = 4, 4  # of models/tiny: those with experts, and how many a token goes to
PROMPT = [0, 3, *range(20, 90)]

# vLLM's names, under our own prefix.
NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries",
    "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_success", "request_prompt_tokens",
    "request_generation_tokens",
}  # fmt: skip
OWN = {
    "kv_pages", "kv_pages_used", "step_seconds", "map_version", "loaded_bytes", "load_total_bytes",
    "link_round_trip_seconds", "link_wait_seconds", "expert_tokens", "shard_rows", "shard_busy_seconds",
    "shard_partitions",
}  # fmt: skip


class Page:
    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}

    def total(self, sample: str, **labels: str) -> float:
        found = [
            s.value
            for family in self.families.values()
            for s in family.samples
            if s.name == f"moecule_{sample}" and labels.items() <= s.labels.items()
        ]
        assert found, sample
        return sum(found)


@pytest.fixture
async def cluster() -> AsyncIterator[Composed]:
    async with compose(workers=1, shards=2) as one:
        yield one


async def page(cluster: Composed) -> Page:
    peers = [(actor.kind, actor.id) for actor in (cluster.scheduler, *cluster.workers, *cluster.shards)]
    bus = MemoryBus(cluster.broker)
    await bus.connect()
    gateway = Gateway(bus, cluster.settings.__class__(port=0), actor_id="gateway-1")
    async with running(gateway):
        own = (await gateway._on_metrics("", None)).text  # type: ignore[attr-defined, arg-type]
        return Page(await everyones_metrics(bus, peers, ("gateway-1", own)))


async def test_every_name_that_dashboards_know_is_there(cluster: Composed) -> None:
    await cluster.client.ask(PROMPT, greedy(2))
    assert {f"moecule_{name}" for name in NAMES | OWN} - set((await page(cluster)).families) == set()


async def test_tokens_are_counted_where_they_are_computed(cluster: Composed) -> None:
    for _ in range(2):
        await cluster.client.ask(PROMPT, greedy(5, ignore_eos=True))
    seen = await page(cluster)
    assert seen.total("generation_tokens_total") == 10
    assert seen.total("prefix_cache_hits_total") == 64  # the second time, one whole page
    assert seen.total("prompt_tokens_total") == 2 * len(PROMPT) - 64
    assert seen.total("prefix_cache_queries_total") == 2 * len(PROMPT)
    # Each token but the last of an answer went through every layer, to so many experts in each.
    computed = 2 * (len(PROMPT) + 4) - 64
    assert seen.total("expert_tokens_total") == computed * LAYERS * TOPK
    held = {shard.id: {str(e) for e in shard.store.held} for shard in cluster.shards}
    for sample in seen.families["moecule_expert_tokens"].samples:
        assert sample.labels["expert"] in held[sample.labels["actor"]], "an expert is counted where it lives"


async def test_a_heartbeat_tells_the_same(cluster: Composed) -> None:
    await cluster.client.ask(PROMPT, greedy(5, ignore_eos=True))
    seen, worker, shards = await page(cluster), cluster.workers[0].beat(), [s.beat() for s in cluster.shards]
    assert isinstance(worker, WorkerBeat)
    assert (worker.prompt_tokens, worker.generation_tokens) == (len(PROMPT), 5)
    assert worker.steps == seen.total("step_seconds_count") and worker.step_seconds > 0
    assert {shard for shard, _ in worker.waited} == {s.id for s in cluster.shards}
    assert all(seconds > 0 for _, seconds in worker.waited)
    assert seen.total("loaded_bytes", actor=worker.id) == seen.total("load_total_bytes", actor=worker.id) > 0
    for beat in shards:
        assert isinstance(beat, ShardBeat)
        assert sum(beat.expert_tokens) == seen.total("expert_tokens_total", actor=beat.id) > 0
        assert beat.rows == seen.total("shard_rows_total", actor=beat.id) and beat.busy_seconds > 0


async def test_a_request_is_timed_from_its_coming_to_its_end(cluster: Composed) -> None:
    await cluster.client.ask(PROMPT, greedy(8, ignore_eos=True))
    seen = await page(cluster)
    parts = [f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode")]
    assert [seen.total(f"{part}_count") for part in parts] == [1, 1, 1]
    queue, prefill, decode = (seen.total(f"{part}_sum") for part in parts)
    steps = seen.total("step_seconds_sum")
    assert 0 < queue < 0.1 and prefill > 0 and decode > 0
    assert 0.8 * steps < prefill + decode < 1.1 * steps, "no other request was there"


async def test_an_answer_of_one_token_has_no_decode(cluster: Composed) -> None:
    await cluster.client.ask(PROMPT, greedy(1))
    assert (await page(cluster)).total("request_decode_time_seconds_sum") == 0


@pytest.mark.parametrize("which", [0, 1], ids=["first by name", "last by name"])
async def test_a_shard_that_is_slow_is_the_one_that_is_waited_for(cluster: Composed, which: int) -> None:
    slow, quick = cluster.shards[which], cluster.shards[1 - which]
    compute = slow.server._experts.compute

    def late(*arguments):  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        return compute(*arguments)

    slow.server._experts.compute = late  # type: ignore[method-assign]
    await cluster.client.ask(PROMPT, greedy(8, ignore_eos=True))
    seen = await page(cluster)
    waited = {shard.id: seen.total("link_wait_seconds_total", shard=shard.id) for shard in cluster.shards}
    busy = {shard.id: seen.total("shard_busy_seconds_total", actor=shard.id) for shard in cluster.shards}
    for by_shard in (waited, busy):
        assert by_shard[slow.id] > 3 * by_shard[quick.id], by_shard
    trips = seen.total("link_round_trip_seconds_count", shard=slow.id)
    assert 4 * LAYERS < trips <= 8 * LAYERS, "a token may have none of its experts there"


async def test_a_shard_that_has_left_is_not_told_of_any_more(cluster: Composed) -> None:
    await cluster.client.ask(PROMPT, greedy(5, ignore_eos=True))
    (leaving, staying), worker = cluster.shards, cluster.workers[0]
    before = dict(worker.beat().waited)  # type: ignore[attr-defined]
    cluster.lives[leaving.id].leave.set()
    async with asyncio.timeout(20):
        while leaving.id in dict(worker.beat().waited):  # type: ignore[attr-defined]
            await asyncio.sleep(0.02)
    families = (await page(cluster)).families
    for name in ("moecule_link_wait_seconds", "moecule_link_round_trip_seconds"):
        assert {sample.labels["shard"] for sample in families[name].samples} == {staying.id}
    after = dict(worker.beat().waited)  # type: ignore[attr-defined]
    assert after.keys() == {staying.id} and after[staying.id] >= before[staying.id] > 0


async def test_all_follow_one_map(cluster: Composed) -> None:
    seen = await page(cluster)
    version = cluster.scheduler.beat().map_version  # type: ignore[attr-defined]
    assert seen.total("map_version", actor="worker-1") == seen.total("scheduler_map_version") == version > 0


# ---- the dashboard

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana.json"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


async def test_every_query_of_the_dashboard_names_what_is_there(cluster: Composed) -> None:
    await cluster.client.ask(PROMPT, greedy(3))
    families = (await page(cluster)).families.values()
    there = {f.name + suffix for f in families for suffix in SUFFIXES.get(f.type, ("",))}
    labels = {f.name: {label for s in f.samples for label in s.labels} for f in families}
    for panel in panels():
        for target in panel["targets"]:
            names = re.findall(r"moecule_\w+", target["expr"])
            assert names and set(names) - there == set(), (panel["title"], target["expr"])
            wanted = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            for by in re.findall(r"by \(([^)]*)\)", target["expr"]):
                assert wanted <= set(by.split(", ")), panel["title"]
            family = re.sub("_(total|bucket|sum|count)$", "", names[0])
            if labels[family]:  # some have no sample yet: nothing failed
                assert wanted <= labels[family] | {"le"}, (panel["title"], wanted, labels[family])


def test_the_dashboard_shows_all_that_is_measured_for_it() -> None:
    shown = "".join(target["expr"] for panel in panels() for target in panel["targets"])
    assert [name for name in NAMES | OWN if f"moecule_{name}" not in shown] == []


def test_no_two_panels_overlap_or_share_a_number() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [(p["x"] + x, p["y"] + y) for p in places for x in range(p["w"]) for y in range(p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(ids) == len(set(ids))


def test_a_tally_is_a_histogram() -> None:
    tally = Tally((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        tally.add(value)
    assert tally.buckets == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert (tally.count, tally.sum) == (4, 12.0)


class Lines:
    def __init__(self) -> None:
        self.said: list[int] = []

    def info(self, event: str, **fields: object) -> None:
        assert event == "loading" and fields["what"] == "experts"
        self.said.append(fields["percent"])  # type: ignore[arg-type]


def test_a_long_load_is_told_of_now_and_then() -> None:
    now, lines = 0.0, Lines()
    loading = Loading(lines, lambda: now)
    told = loading.of("experts")
    for percent in range(1, 101):
        now += TELL_SECONDS / 4
        told(percent, 100)
    assert lines.said == list(range(4, 101, 4))
    assert (loading.what, loading.done, loading.total) == ("experts", 100, 100)


def test_a_short_load_is_not_worth_a_line() -> None:
    lines = Lines()
    loading = Loading(lines, lambda: 0.0)
    told = loading.of("experts")
    for done in range(100):
        told(done, 100)
    assert lines.said == [] and loading.percent == 99
