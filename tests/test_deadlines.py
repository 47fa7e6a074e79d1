"""A request ends when its deadline passes: while the scheduler is asked, in a worker's queue, and while it runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from common.clock import FakeClock, RealClock
from common.errors import DeadlineExceeded, Overloaded
from common.messages import Generate, Grammar, Sampling
from services.gateway.streams import OVERDUE_SECONDS
from services.gpu_worker.actor import ADMISSIONS
from services.gpu_worker.streams import Streams
from tests.compose import compose, greedy
from tests.test_gateway_streams import World, a_job, world

__all__ = ["world"]


# ---- the gateway


async def test_a_worker_is_told_how_long_is_left(world: World) -> None:
    await world.clock.advance(7)
    request = world.running(replace(a_job(), deadline=world.clock.now() + 3, tenant="t", priority=4))
    await world.settle()
    (sent,) = world.one.admitted
    assert (sent.deadline, sent.tenant, sent.priority) == (3, "t", 4)
    assert world.scheduler.asked[0].tenant == "t"
    assert await request.task == "stop"
    world.running()
    await world.settle()
    assert world.two.admitted[0].deadline is None


async def test_it_passes_while_the_scheduler_is_silent(world: World) -> None:
    world.scheduler.deaf = True
    request = world.running(replace(a_job(), deadline=world.clock.now() + 0.3))
    await world.clock.advance(0.29)
    assert not request.task.done()
    await world.clock.advance(0.02)
    assert isinstance(request.error, DeadlineExceeded) and "before a worker took it" in str(request.error)
    assert len(world.streams) == 0


async def test_one_that_has_passed_is_not_sent(world: World) -> None:
    request = world.running(replace(a_job(), deadline=world.clock.now()))
    await world.clock.advance(0.01)
    assert isinstance(request.error, DeadlineExceeded) and world.one.admitted == []


async def test_a_worker_that_does_not_keep_it_is_not_waited_for(world: World) -> None:
    world.one.pause_at = 3
    deadline = world.clock.now() + 5
    request = world.running(replace(a_job(), deadline=deadline))
    while world.clock.now() < deadline + OVERDUE_SECONDS - 0.1:
        await world.pass_time(0.1, world.one)
    assert request.tokens == [100, 101, 102] and not request.task.done()
    await world.pass_time(0.4, world.one)
    assert isinstance(request.error, DeadlineExceeded) and world.one.aborted == [request.stream.request_id]


# ---- the worker


def generate(name: str) -> Generate:
    return Generate(request_id=name, gateway_id="g", prompt=(1,), sampling=Sampling(max_tokens=1))


async def test_each_is_told_once_when_it_is_overdue() -> None:
    clock = FakeClock()
    streams = Streams(clock)
    for name, deadline in (("a", 2.0), ("b", None), ("c", 1.0)):
        streams.open(generate(name), deadline)
    await clock.advance(0.99)
    assert streams.take_overdue() == []
    await clock.advance(0.01)
    assert streams.take_overdue() == ["c"]
    await clock.advance(100)
    assert streams.take_overdue() == ["a"] and streams.take_overdue() == []


class Ahead(RealClock):
    """The real time and `by` seconds."""

    by = 0.0

    def now(self) -> float:
        return super().now() + self.by


async def test_it_passes_in_the_queue_and_while_it_runs() -> None:
    clock = Ahead()
    async with compose(clock=clock, max_batch=1) as cluster:
        client, engine = cluster.client, cluster.workers[0].engine
        long = greedy(3000, ignore_eos=True)
        running = await client.send([5], long, deadline=300.0)
        queued = await client.send([6], long, deadline=100.0)
        other = await client.send([7], long)
        while not client.results[running].tokens:
            await asyncio.sleep(0.01)
        for passed, request in ((100, queued), (300, running)):
            # A gateway's silence counts by the same clock: it has spoken just now, as far as the worker knows.
            cluster.workers[0]._gateways[client.id] = ("boot", clock.now() + 400)
            clock.by = passed
            last = (await client.wait(request, 10)).last
            assert last.finish == "error" and last.error[0] == "deadline_exceeded", last
        assert client.results[queued].tokens == []
        while not client.results[other].tokens:
            await asyncio.sleep(0.01)  # the place is free
        with pytest.raises(DeadlineExceeded):
            await client.send([8], long, deadline=0.0)
        await client.abort(other)
        await client.wait(other, 10)
        assert engine.planner.allocator.owned == 0


# ---- a worker's queue


async def test_a_tenant_leaves_places_in_the_queue_and_a_lone_request_does_not_wait_for_its_many() -> None:
    async with compose(max_batch=2, queue_limit=8) as cluster:
        client, long = cluster.client, greedy(3000, ignore_eos=True)
        many = [await client.send([n + 5], long, worker="worker-1", tenant="a") for n in range(5)]
        with pytest.raises(Overloaded, match="keeps its 5 free places for others: 'a' has 5 requests"):
            await client.send([4], long, worker="worker-1", tenant="a")
        assert cluster.workers[0].beat().tenants == {"a": 5}
        one = await client.send([3], greedy(4, ignore_eos=True), worker="worker-1", tenant="b")
        assert len((await client.wait(one, 20)).tokens) == 4
        assert all(not client.results[request].done.is_set() for request in many)
        for request in many:
            await client.abort(request)
            await client.wait(request, 20)
        assert cluster.workers[0].beat().tenants == {}


async def test_grammars_of_one_tenant_leave_admissions_for_others() -> None:
    async with compose() as cluster:
        client, compiled = cluster.client, asyncio.Event()

        async def compile_for_long(_: Grammar) -> None:
            await compiled.wait()

        cluster.workers[0].grammars.constraint = compile_for_long
        held = greedy(4, grammar=Grammar("regex", "a+"))
        tasks = [asyncio.create_task(client.send([n + 5], held, worker="worker-1", tenant="a")) for n in range(40)]
        async with asyncio.timeout(5):
            while sum(task.done() for task in tasks) < 40 - ADMISSIONS // 2:
                await asyncio.sleep(0.001)
        for task in tasks:
            assert not task.done() or "'a' has 8 requests in it" in str(task.exception())
        one = await asyncio.wait_for(client.send([3], greedy(4), worker="worker-1", tenant="b"), 5)
        assert (await client.wait(one, 20)).last.finish
        compiled.set()
        await asyncio.wait(tasks)
        assert not cluster.workers[0]._compiling
