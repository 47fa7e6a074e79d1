"""Requests in flight: nothing is lost or shown twice, and a request ends when its worker does, not when it is late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import structlog
from prometheus_client import CollectorRegistry

from common.clock import FakeClock
from common.errors import Draining, InvalidRequest, MoeculeError, NoWorker, Overloaded, Unavailable, WorkerLost
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import Message, Sampling, StepTokens, TokenChunk, WorkerBeat, subject
from services.gateway.metrics import GatewayMetrics
from services.gateway.peers import Peers
from services.gateway.prepare import Job
from services.gateway.streams import Stream, Streams
from tests.stub_worker import StubScheduler, StubWorker

TOKENS = list(range(100, 110))


@dataclass
class World:
    """A gateway's streams with two workers and a scheduler on the in-memory bus; time stands still by itself."""

    clock: FakeClock
    broker: MemoryBroker
    bus: MemoryBus
    streams: Streams
    peers: Peers
    metrics: GatewayMetrics
    one: StubWorker
    two: StubWorker
    scheduler: StubScheduler

    async def settle(self) -> None:
        for _ in range(20):
            await self.clock.advance(0)

    async def pass_time(self, seconds: float, *beating: StubWorker) -> None:
        for _ in range(round(seconds * 10)):
            for worker in beating:
                await worker.beat()
            await self.clock.advance(0.1)
        await self.settle()

    def running(self, job: Job | None = None) -> Request:
        return Request(self, job or a_job())


class Request:
    """One request, read to its end in a task."""

    def __init__(self, world: World, job: Job) -> None:
        self.tokens: list[int] = []
        self.stream: Stream | None = None
        self.task = asyncio.create_task(self._read(world.streams, job))

    async def _read(self, streams: Streams, job: Job) -> str | None:
        async with streams.open(job) as stream:
            self.stream = stream
            while True:
                for chunk in await stream.read():
                    self.tokens += chunk.tokens
                    if chunk.finish:
                        return chunk.finish

    @property
    def error(self) -> BaseException | None:
        return self.task.exception() if self.task.done() else None


def a_job(max_tokens: int = 100) -> Job:
    return Job(0, (1, 2, 3), (), Sampling(max_tokens=max_tokens))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    tasks: set[asyncio.Task[None]] = set()

    async def connected() -> MemoryBus:
        bus = MemoryBus(broker)
        await bus.connect()
        return bus

    def spawn(coro, name: str) -> None:
        task = asyncio.create_task(coro)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    bus = await connected()
    peers = Peers(bus, clock)
    metrics = GatewayMetrics(CollectorRegistry())
    streams = Streams(bus, "gateway-1", peers, metrics, clock, spawn, structlog.get_logger())
    one, two = [StubWorker(await connected(), name, lambda _: TOKENS) for name in ("worker-1", "worker-2")]
    scheduler = StubScheduler(await connected(), one, two)

    async def on_beat(to: str, message: Message) -> None:
        peers.take(to, message)
        if isinstance(message, WorkerBeat):
            streams.take_beat(message)

    await bus.subscribe("moecule.v1.*.*.beat", on_beat)
    await streams.start()
    for stub in (one, two, scheduler):
        await stub.start()
    await clock.advance(10)  # the connection has stood for a while
    yield World(clock, broker, bus, streams, peers, metrics, one, two, scheduler)
    for other in list(broker.buses):
        await other.close()
    for task in list(tasks):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_tokens_come_in_order_and_the_request_ends(world: World) -> None:
    request = world.running()
    await world.settle()
    assert (request.tokens, request.task.result()) == (TOKENS, "stop")
    assert world.one.admitted[0].prompt == (1, 2, 3)
    assert len(world.streams) == 0
    assert world.one.aborted == []


async def test_what_comes_twice_counts_once(world: World) -> None:
    world.one.doubled = {0, 4, 9}
    request = world.running()
    await world.settle()
    assert request.tokens == TOKENS


async def test_a_gap_is_asked_for_at_once(world: World) -> None:
    world.one.lost = {3, 4}
    request = world.running()
    await world.settle()
    assert request.tokens == TOKENS
    assert [ask.index for ask in world.one.resumed] == [3]
    assert world.metrics.gaps._value.get() >= 1


async def test_a_lost_end_is_asked_for_after_half_a_second(world: World) -> None:
    world.one.lost = {8, 9}
    request = world.running()
    await world.settle()
    await world.pass_time(0.4, world.one)
    assert (request.tokens, world.one.resumed) == (TOKENS[:8], [])
    await world.pass_time(0.3, world.one)
    assert (request.tokens, request.task.result()) == (TOKENS, "stop")


async def test_chunks_that_overlap_are_joined() -> None:
    stream = Stream("r", 0.0)
    assert stream.take(TokenChunk(request_id="r", index=0, tokens=(1, 2)), 0.0)
    assert stream.take(TokenChunk(request_id="r", index=1, tokens=(2, 3, 4), finish="stop"), 0.0)
    assert [chunk.tokens for chunk in await stream.read()] == [(1, 2), (3, 4)]


async def test_a_reader_that_comes_late_gets_all_at_once() -> None:
    stream = Stream("r", 0.0)
    for i in range(5):
        stream.take(TokenChunk(request_id="r", index=i, tokens=(i,)), 0.0)
    assert [chunk.tokens for chunk in await stream.read()] == [(i,) for i in range(5)]


async def test_an_error_comes_after_the_tokens_before_it(world: World) -> None:
    world.one.end = {"finish": "error", "error": ("experts_unavailable", "shard 2 died")}
    request = world.running()
    await world.settle()
    assert request.tokens == TOKENS[:9]
    assert (type(request.error).__name__, str(request.error)) == ("ExpertsUnavailable", "shard 2 died")
    assert world.one.aborted == [], "the worker knows that it ended"


async def test_a_request_that_the_worker_gave_up_is_lost_not_cancelled(world: World) -> None:
    """A worker that heard nothing from us for a while aborts what it runs for us; the client may still be there."""
    world.one.end = {"finish": "abort"}
    request = world.running()
    await world.settle()
    assert isinstance(request.error, WorkerLost)


# ---- death, and what is not death


async def test_a_dead_worker_ends_its_requests_within_two_seconds_and_no_others(world: World) -> None:
    world.one.pause_at = world.two.pause_at = 4
    lost, other = world.running(), world.running()
    await world.pass_time(1.0, world.one, world.two)
    await world.one.die()
    await world.pass_time(1.9, world.two)
    assert isinstance(lost.error, WorkerLost)
    assert lost.tokens == TOKENS[:4]
    assert not other.task.done()
    world.two.resume_sending()
    await world.settle()
    assert other.tokens == TOKENS


@pytest.mark.parametrize("quiet_seconds", [0.3, 1.2, 3.7, 8.0])
async def test_a_worker_that_dies_after_a_long_silence_is_noticed_as_soon(world: World, quiet_seconds: float) -> None:
    world.one.pause_at = 0
    request = world.running()
    await world.pass_time(quiet_seconds, world.one)
    assert not request.task.done()
    await world.one.die()
    await world.pass_time(1.2)
    assert isinstance(request.error, WorkerLost)


async def test_a_worker_with_a_new_life_has_lost_the_requests_of_the_earlier_one(world: World) -> None:
    world.one.pause_at = 4
    request = world.running()
    await world.settle()
    world.one.boot_id = "boot-2"
    await world.one.beat()
    await world.settle()
    assert isinstance(request.error, WorkerLost)
    assert "restarted" in str(request.error)


async def test_a_worker_that_does_not_know_the_request_has_lost_it(world: World) -> None:
    world.one.pause_at = 4
    request = world.running()
    await world.settle()
    world.one._known.clear()
    await world.pass_time(0.7, world.one)
    assert isinstance(request.error, WorkerLost)


async def test_late_is_not_dead_while_heartbeats_come(world: World) -> None:
    world.one.pause_at, world.one.deaf = 4, True
    request = world.running()
    await world.pass_time(30, world.one)
    assert not request.task.done()
    assert len(world.one.resumed) >= 3, "it asks again and again"
    world.one.resume_sending()
    await world.settle()
    assert request.tokens == TOKENS


async def test_a_deaf_worker_without_heartbeats_is_dead_after_five_seconds(world: World) -> None:
    world.one.pause_at, world.one.deaf = 4, True
    request = world.running()
    await world.pass_time(1.0, world.one)
    await world.pass_time(4.8)
    assert not request.task.done()
    await world.pass_time(0.5)
    assert isinstance(request.error, WorkerLost)


async def test_a_gateway_that_stood_still_itself_declares_nobody_dead(world: World) -> None:
    world.one.pause_at, world.one.deaf = 4, True
    request = world.running()
    await world.pass_time(1.0, world.one)
    world.clock.jump(20)
    await world.pass_time(4.5)
    assert not request.task.done()
    await world.pass_time(1.0)
    assert isinstance(request.error, WorkerLost), "it still tells a death"


async def test_a_stream_that_waits_long_asks_less_often(world: World) -> None:
    world.one.pause_at = 0
    request = world.running()
    await world.pass_time(10, world.one)
    assert 5 <= len(world.one.resumed) <= 8
    request.task.cancel()


async def test_streams_outlive_a_restart_of_nats(world: World) -> None:
    world.one.pause_at = 4
    request = world.running()
    await world.pass_time(1.0, world.one)
    world.broker.disconnect()
    await world.pass_time(8.0)
    assert not request.task.done(), "silence does not count while our own connection is gone"
    world.broker.reconnect()
    world.one.resume_sending()
    await world.settle()
    assert request.tokens == TOKENS


async def test_after_a_reconnect_what_got_lost_meanwhile_is_asked_for(world: World) -> None:
    world.one.pause_at, world.one.lost = 4, {4, 5, 6, 7, 8, 9}
    request = world.running()
    await world.settle()
    world.bus.disconnect()
    world.one.resume_sending()
    await world.settle()
    world.bus.reconnect()
    await world.settle()
    assert request.tokens == TOKENS


async def test_nobody_listening_just_after_a_reconnect_means_nothing(world: World) -> None:
    world.one.pause_at = 4
    request = world.running()
    await world.settle()
    world.broker.disconnect()
    await world.pass_time(0.5)
    world.broker.up = True
    world.bus.reconnect()  # the worker's own connection is not back yet
    await world.pass_time(1.5)
    assert not request.task.done()
    world.one.bus.reconnect()
    world.one.resume_sending()
    await world.pass_time(1.0)
    assert request.tokens == TOKENS


# ---- admission


@pytest.mark.parametrize("refusal", [Overloaded("full"), Draining("leaving")], ids=["full", "leaving"])
async def test_a_worker_that_refuses_is_replaced_once(world: World, refusal: MoeculeError) -> None:
    world.one.refusals = [refusal]
    request = world.running()
    await world.settle()
    assert request.tokens == TOKENS
    assert (len(world.one.admitted), len(world.two.admitted)) == (0, 1)


async def test_a_worker_that_is_gone_is_replaced_once(world: World) -> None:
    await world.one.die()
    request = world.running()
    await world.settle()
    assert request.tokens == TOKENS


async def test_two_refusals_are_the_answer(world: World) -> None:
    world.one.refusals, world.two.refusals = [Overloaded("full")], [Overloaded("full too")]
    request = world.running()
    await world.settle()
    assert (type(request.error), str(request.error)) == (Overloaded, "full too")
    assert len(world.scheduler.asked) == 2
    assert len(world.streams) == 0


async def test_a_request_the_worker_finds_wrong_is_not_tried_again(world: World) -> None:
    world.one.refusals = [InvalidRequest("too large for my cache")]
    request = world.running()
    await world.settle()
    assert isinstance(request.error, InvalidRequest)
    assert len(world.scheduler.asked) == 1


async def test_without_a_scheduler_there_is_no_worker(world: World) -> None:
    await world.scheduler.bus.close()
    request = world.running()
    await world.settle()
    assert isinstance(request.error, NoWorker)
    assert str(request.error) == "the scheduler does not answer"


async def test_an_admission_without_an_answer_fails_and_is_aborted(world: World) -> None:
    forever = asyncio.Event()

    async def hang(_: str, message: Message) -> Message:
        await forever.wait()
        raise AssertionError

    await world.one._subscriptions[0].drain()
    await world.one.bus.subscribe(subject("worker", "worker-1", "admit"), hang)
    request = world.running()
    await world.pass_time(2.1, world.one)
    assert isinstance(request.error, Unavailable)
    assert len(world.one.aborted) == 1


# ---- leaving


async def test_leaving_early_aborts_at_once(world: World) -> None:
    world.one.pause_at = 4
    request = world.running()
    await world.settle()
    request.task.cancel()
    await world.settle()
    assert request.stream and world.one.aborted == [request.stream.request_id]
    assert len(world.streams) == 0


async def test_leaving_before_the_admission_is_answered_aborts_too(world: World) -> None:
    world.one.pause_at = 0
    request = world.running()
    while not world.scheduler.asked:
        await asyncio.sleep(0)
    for _ in range(4):
        await asyncio.sleep(0)
    request.task.cancel()
    await world.settle()
    sent = [generate.request_id for generate in world.one.admitted]
    assert world.one.aborted == sent


async def test_tokens_of_a_request_nobody_knows_abort_it_but_not_for_each_token(world: World) -> None:
    async def stray(index: int) -> None:
        chunk = TokenChunk(request_id="stray", index=index, tokens=(1,))
        message = StepTokens(worker_id="worker-1", boot_id="boot-1", chunks=(chunk,))
        await world.one.bus.publish(subject("gateway", "gateway-1", "tokens"), message)

    for i in range(5):
        await stray(i)
    await world.settle()
    assert world.one.aborted == ["stray"]
    await world.pass_time(1.0)
    await stray(5)
    await world.settle()
    assert world.one.aborted == ["stray", "stray"], "the first abort may have been lost"


async def test_the_rest_is_told_at_the_end(world: World) -> None:
    world.one.pause_at = 4
    request = world.running()
    await world.settle()
    world.streams.fail_all(Draining("the gateway is leaving"))
    await world.settle()
    assert isinstance(request.error, Draining)
    assert len(world.one.aborted) == 1
