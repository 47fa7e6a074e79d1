"""One tenant's thousand requests do not starve another's one: in the batch, the pages, the queue, and before it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from common.clock import FakeClock
from common.errors import Overloaded
from common.fairness import NOBODY, has_room, why_no_room
from common.messages import Assign, WorkerBeat
from common.pages import PAGE
from services.gpu_worker.planner import Planner, Sequence
from services.gpu_worker.turns import Turns
from services.gpu_worker.waits import TenantWaits
from services.scheduler.placement import Placement
from tests.test_planner import planner, request, step

STEP = 0.01  # seconds


class Served:
    """A worker's steps by a clock that is passed in; each takes STEP, whoever arrives in it waits for the next plan."""

    def __init__(self, **sizes) -> None:
        self.clock = FakeClock()
        self.planner: Planner = planner(**sizes)
        self.names = itertools.count()
        self.first: dict[str, float] = {}  # when a request had its first token

    def add(self, tenant: str, prompt: int, *, out: int = 8, priority: int = 0) -> Sequence:
        number = next(self.names)
        fields = dict(max_tokens=out, tenant=tenant, name=f"{tenant}{number}", priority=priority)
        return self.planner.add(request([number] * prompt, **fields))

    async def steps(self, count: int = 1) -> None:
        for _ in range(count):
            await self.clock.advance(STEP)
            step(self.planner)
            for s in list(self.planner.running):
                if s.outputs:
                    self.first.setdefault(s.request.request_id, self.clock.now())
                if s.outputs >= s.request.sampling.max_tokens:
                    self.planner.remove(s)

    async def wait_of(self, sequence: Sequence) -> float:
        """Until its first token. Where a step is under way it came just after that was planned."""
        since, name = self.clock.now(), sequence.request.request_id
        if self.planner.running:
            since -= STEP
        while name not in self.first:
            await self.steps()
        return self.first[name] - since


LOADS = {
    "the batch is full of long answers": dict(prompt=15, out=2000),
    "prompts come all the time": dict(prompt=15, out=2),
    "its prompts take several steps each": dict(prompt=900, out=20),
    "it has all the pages": dict(prompt=3 * PAGE - 1, out=300),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("after", [0, 1, 7, 40], ids="after {} steps".format)
async def test_the_others_one_waits_hardly_longer_than_on_an_idle_queue(load: dict, after: int) -> None:
    sizes = dict(pages=200 if load["out"] == 300 else 4000, max_batch=64, chunk=256)
    idle = Served(**sizes)
    alone = await idle.wait_of(idle.add("b", 40))
    busy = Served(**sizes)
    for _ in range(1000):
        busy.add("a", load["prompt"], out=load["out"])
    await busy.steps(after + 1)
    waited = await busy.wait_of(busy.add("b", 40))
    assert waited <= 1.5 * alone + STEP + 1e-9, f"{waited / STEP:.0f} steps against {alone / STEP:.0f}"


async def test_without_tenants_who_came_first_is_first() -> None:
    served = Served(max_batch=2)
    for _ in range(4):
        served.add("", 4, out=3)
    await served.steps(20)
    assert sorted(served.first, key=served.first.__getitem__) == list(served.first)
    assert served.planner.take_preemptions() == 0


async def test_two_tenants_get_the_same_number_of_tokens_however_many_requests_they_send() -> None:
    served = Served(pages=4000, max_batch=8, chunk=64)
    for _ in range(300):
        served.add("a", 100, out=1)
    for _ in range(30):
        served.add("b", 500, out=1)
    await served.steps(150)
    a, b = (served.planner.turns.of(tenant) for tenant in "ab")
    assert abs(a - b) <= 2 * 64 and a > 4000


async def test_a_tenant_that_was_away_makes_nothing_up() -> None:
    turns = Turns()
    turns.comes("a", ())
    turns.had("a", 1000)
    turns.comes("b", {"a"})
    assert turns.of("b") == 1000
    turns.had("b", 500)
    turns.comes("c", {"b"})  # a has gone, with less than those that are there
    turns.comes("a", {"b", "c"})
    assert turns.of("a") == 1500
    turns.comes("d", ())
    assert turns.of("a") == turns.of("d") == 0


async def test_a_tenant_with_one_request_keeps_its_pages_when_anothers_grow() -> None:
    served = Served(pages=12, max_batch=8, chunk=1000)
    for _ in range(5):
        served.add("a", 2 * PAGE - 3, out=200)
    await served.steps()
    lone = served.add("b", PAGE, out=100)
    await served.steps(60)
    assert lone.preemptions == 0 and lone.outputs == 60
    assert served.planner.take_preemptions() > 0


async def test_a_prompt_under_way_goes_on_while_the_next_one_finds_no_room() -> None:
    served = Served(pages=8, max_batch=8, chunk=50)
    first = served.add("a", 5 * PAGE, out=2)
    await served.steps()
    served.add("b", 6 * PAGE)
    await served.steps(6)
    assert first.outputs == 1


async def test_nobody_takes_a_place_back_and_forth() -> None:
    served = Served(max_batch=2)
    for tenant in "aab":
        served.add(tenant, 4, out=50)
    await served.steps()
    assert {s.tenant for s in served.planner.running} == {"a", "b"}
    for tenant in "abcd":
        served.add(tenant, 4, out=50)
    await served.steps(40)
    assert served.planner.take_preemptions() == 0
    assert {s.tenant for s in served.planner.running} == {"a", "b"}
    await served.steps(20)
    assert {s.tenant for s in served.planner.running} == {"c", "d"}


async def test_a_place_is_not_taken_from_a_tenants_only_request() -> None:
    served = Served(max_batch=1)
    first = served.add("a", 4, out=20)
    await served.steps()
    served.add("b", 4)
    await served.steps(10)
    assert served.planner.running == [first]


async def test_pages_are_not_taken_from_who_has_no_more_than_its_share() -> None:
    served = Served(pages=8, max_batch=8, chunk=1000)
    small = [served.add("a", PAGE + 2, out=30) for _ in range(2)]
    await served.steps()
    large = served.add("b", 5 * PAGE)
    await served.steps(5)
    assert served.planner.running == small and not large.pages
    late = served.add("a", 4)
    await served.steps(5)
    assert not late.outputs, "what becomes free is kept for the one that is next"
    await served.steps(20)
    assert large.outputs


async def test_how_long_each_waits_is_told() -> None:
    served, registry, waits = Served(max_batch=2, pages=100), CollectorRegistry(), TenantWaits()
    registry.register(waits)
    for tenant, arrived in (("a", 1.0), ("a", 2.0), ("a", 2.5), ("b", 3.0)):
        served.add(tenant, 4, out=3).arrived = arrived
    for now in (4.0, 5.0, 6.0):
        await served.steps(3)  # one of a's makes place for b's, and comes back: that is no second wait
        waits.add(served.planner.take_started(), now)
    name = "moecule_tenant_queue_time_seconds"
    told = {t: [registry.get_sample_value(f"{name}_{w}", {"tenant": t}) for w in ("count", "sum")] for t in "ab"}
    assert told == {"a": [3, 3 + 2 + 3.5], "b": [1, 1]}


# ---- priorities


async def test_the_more_urgent_is_earlier() -> None:
    served = Served(max_batch=1)
    names = {}
    for priority in (5, 0, 5, -1, 0):
        names[served.add("a", 4, out=1, priority=priority).request.request_id] = priority
    await served.steps(10)
    assert [names[name] for name in sorted(served.first, key=served.first.__getitem__)] == [-1, 0, 0, 5, 5]
    assert list(served.first) == ["a3", "a1", "a4", "a0", "a2"]


@pytest.mark.parametrize("full", ["batch", "pages"])
async def test_the_more_urgent_takes_the_place_of_the_youngest_of_the_least_urgent(full: str) -> None:
    served = Served(max_batch=3 if full == "batch" else 9, pages=100 if full == "batch" else 3)
    urgent, old, young = (served.add("a", 4, out=40, priority=p) for p in (1, 2, 2))
    await served.steps(2)
    more = served.add("b", 4, out=40, priority=0)
    await served.steps()
    assert served.planner.running == [urgent, old, more] and young.preemptions == 1


async def test_the_less_urgent_waits_for_another_tenant() -> None:
    served = Served(max_batch=2)
    running = [served.add("a", 4, out=30) for _ in range(2)]
    await served.steps()
    served.add("b", 4, priority=1)
    await served.steps(10)
    assert served.planner.running == running


async def test_the_more_urgent_grows_at_the_cost_of_the_older() -> None:
    served = Served(pages=3, max_batch=4)
    old = served.add("a", PAGE + 1, out=60, priority=1)
    await served.steps(2)
    urgent = served.add("a", PAGE - 2, out=60)
    await served.steps(10)
    assert old.preemptions == 1 and urgent.preemptions == 0 and urgent.outputs == 10


# ---- before the planner


@given(st.integers(1, 400), st.integers(1, 12))
def test_however_many_tenants_flood_a_queue_the_next_one_finds_a_place(limit: int, floods: int) -> None:
    held = [0] * floods
    for _ in range(2 * limit):
        for i in range(floods):
            held[i] += has_room(f"t{i}", held[i], sum(held), limit)
    assert has_room("next", 0, sum(held), limit) or limit <= floods
    assert max(held) - min(held) <= 1
    assert sum(held) >= limit * floods // (floods + 1)


def test_nobody_in_particular_may_fill_it() -> None:
    assert has_room(NOBODY, 9, 9, 10) and not has_room(NOBODY, 10, 10, 10)
    assert why_no_room("a", 10, 10, 10, "it") == "it is full (10 requests)"
    assert why_no_room("a", 6, 6, 10, "it") == "it keeps its 4 free places for others: 'a' has 6 requests in it"


def beat(**fields) -> WorkerBeat:
    default = dict(id="w", boot_id="1", node="n", model="m", state="ready", map_version=1, queue_limit=8)
    return WorkerBeat(**default | fields)


def assign(tenant: str) -> Assign:
    return Assign(request_id="r", prompt_tokens=4, max_tokens=4, tenant=tenant)


def test_a_tenant_that_asks_on_and_on_leaves_places_at_the_scheduler() -> None:
    placement, worker, refused = Placement(max_batch=2), beat(), 0
    for _ in range(1000):
        try:
            placement.pick(assign("a"), [worker])
        except Overloaded as error:
            refused += 1
            assert "keeps its 5 free places for others: 'a' has 5 requests" in error.message
    assert refused == 995
    assert placement.pick(assign("b"), [worker]).worker_id == "w"


def test_the_scheduler_counts_what_a_worker_tells_of_a_tenant() -> None:
    placement = Placement(max_batch=2)
    full = beat(running=2, waiting=3, tenants={"a": 5})
    with pytest.raises(Overloaded):
        placement.pick(assign("a"), [full])
    assert placement.pick(assign("a"), [full, beat(id="x")]).worker_id == "x"
    assert placement.pick(assign("b"), [full]).worker_id == "w"


def test_a_beat_starts_the_count_anew() -> None:
    placement, worker = Placement(max_batch=2), beat()
    for _ in range(5):
        placement.pick(assign("a"), [worker])
    placement.heard(worker)
    placement.pick(assign("a"), [worker])
