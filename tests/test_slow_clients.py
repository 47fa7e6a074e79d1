"""Clients that owe the gateway a part of a request and do not send it, on a clock that the tests move."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import pytest
from starlette.types import Receive, Scope, Send

from common.clock import FakeClock
from common.settings import Settings
from services.gateway.generate import send_json
from services.gateway.server import HttpServer
from tests.api_front import Front, make_front

LIMIT = 60.0
TAKE_LIMIT = 30.0
HEADERS_WITHOUT_END = b"GET / HTTP/1.1\r\nhost: x\r\n"
WHOLE = HEADERS_WITHOUT_END + b"\r\n"
BODY_TO_COME = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"


class Rig:
    """A server whose application answers without a look at the body; at /wait it never does."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.server = HttpServer(self, "127.0.0.1", 0, self.clock, LIMIT, TAKE_LIMIT)
        self.waits = asyncio.Event()

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        if scope["path"] == "/wait":
            self.waits.set()
            await asyncio.Event().wait()
        await send_json(send, b"{}")

    async def connect(self, first: bytes, then: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Sends `then` when `first` was answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(first)
        if then:
            assert (await reader.readuntil(b"\r\n\r\n{}")).startswith(b"HTTP/1.1 200")
            writer.write(then)
        return reader, writer

    async def tick(self) -> None:
        await self.server.on_tick(0)
        await asyncio.sleep(0)  # the end of a connection is told a turn of the loop later

    async def until_owing(self) -> None:
        async with asyncio.timeout(5):
            while not self.server.owing:
                await self.tick()
                await asyncio.sleep(0.001)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)


AnyRig = TypeVar("AnyRig", bound=Rig)


async def serving(rig: AnyRig) -> AsyncIterator[AnyRig]:
    task = asyncio.create_task(rig.server.run_until_finished())
    yield rig
    await rig.server.finish()
    await task


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async for one in serving(Rig()):
        yield one


@pytest.mark.parametrize(
    ("first", "then"),
    [(b"", b""), (HEADERS_WITHOUT_END, b""), (WHOLE, HEADERS_WITHOUT_END), (BODY_TO_COME, b"x")],
    ids=["nothing", "headers without end", "those of a second request", "a body that nobody asked for"],
)
async def test_a_connection_that_owes_headers_is_cut(rig: Rig, first: bytes, then: bytes) -> None:
    _, writer = await rig.connect(first, then)
    await rig.until_owing()
    await rig.clock.advance(LIMIT - 0.1)
    await rig.tick()
    assert rig.connections == 1
    await rig.clock.advance(0.1)
    await rig.tick()
    assert rig.connections == 0
    writer.close()


async def test_bytes_now_and_then_do_not_put_it_off(rig: Rig) -> None:
    _, writer = await rig.connect(HEADERS_WITHOUT_END)
    await rig.until_owing()
    [connection] = rig.server.server_state.connections
    for _ in range(4):
        connection.data_received(b"x: y\r\n")
        await rig.clock.advance(LIMIT / 4)
        await rig.tick()
    assert rig.connections == 0
    writer.close()


async def test_who_waits_for_an_answer_or_between_requests_is_not_cut(rig: Rig) -> None:
    """uvicorn's own timer, in real time, ends the silence between requests."""
    _, waiting = await rig.connect(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n")
    reader, silent = await rig.connect(WHOLE)
    await reader.readuntil(b"{}")
    await rig.waits.wait()
    for _ in range(3):
        await rig.tick()
        await rig.clock.advance(LIMIT)
    assert rig.connections == 2
    waiting.close()
    silent.close()


async def test_each_request_of_a_connection_has_the_whole_time(rig: Rig) -> None:
    reader, writer = await rig.connect(HEADERS_WITHOUT_END)
    await rig.until_owing()
    await rig.clock.advance(LIMIT - 1)
    writer.write(b"\r\n")
    await reader.readuntil(b"{}")
    [connection] = rig.server.server_state.connections
    connection.data_received(HEADERS_WITHOUT_END)
    await rig.tick()
    await rig.clock.advance(LIMIT - 1)
    await rig.tick()
    assert rig.connections == 1
    writer.close()


# ---- answers that nobody takes


class Flood(Rig):
    """Answers with bytes without end, and counts what it could send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(self._until_gone(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 4096, "more_body": True})
            self.sent += 4096
            await asyncio.sleep(0)
        self.ended.set()

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def until_stuck(self) -> None:
        """As far as the kernel's buffers go, which takes a moment."""
        async with asyncio.timeout(5):
            before = -1
            while before != self.sent or not self.server.stuck:
                before = self.sent
                await asyncio.sleep(0.05)
                await self.tick()


@pytest.fixture
async def flood() -> AsyncIterator[Flood]:
    async for one in serving(Flood()):
        yield one


async def test_a_client_that_takes_nothing_is_cut_and_its_request_ends(flood: Flood) -> None:
    reader, writer = await flood.connect(WHOLE)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await flood.until_stuck()
    assert flood.sent < 8 << 20
    await flood.clock.advance(TAKE_LIMIT - 0.1)
    await flood.tick()
    assert flood.connections == 1 and not flood.ended.is_set()
    await flood.clock.advance(0.1)
    await flood.tick()
    async with asyncio.timeout(5):
        await flood.ended.wait()
    assert flood.connections == 0
    writer.close()


async def test_one_that_takes_a_little_now_and_then_is_not_cut(flood: Flood) -> None:
    reader, writer = await flood.connect(WHOLE)
    transport = reader._transport  # type: ignore[attr-defined]
    for _ in range(4):
        transport.pause_reading()
        await flood.until_stuck()
        await flood.clock.advance(0.6 * TAKE_LIMIT)
        sent = flood.sent
        transport.resume_reading()
        async with asyncio.timeout(5):
            while flood.sent == sent:
                await reader.read(1 << 20)
                await flood.tick()
    assert flood.connections == 1
    writer.transport.abort()


# ---- bodies


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def front(clock: FakeClock) -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0, receive_seconds=LIMIT), clock=clock):
        yield one


@contextlib.asynccontextmanager
async def connection(front: Front) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """At its end its request has ended too: a gateway that leaves would wait for it, on a clock that stands still."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.gateway.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await until(lambda: not front.gateway.server.server_state.tasks)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
async def test_a_body_that_does_not_arrive_is_refused(front: Front, clock: FakeClock, path: str) -> None:
    async with connection(front) as (reader, writer):
        writer.write(f'POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{"model":'.encode())
        await until(lambda: front.gateway.server.server_state.tasks)
        await clock.advance(LIMIT - 0.1)
        assert front.gateway.server.server_state.tasks
        await clock.advance(0.1)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            error = json.loads(await reader.readuntil(b"}}"))["error"]
    assert head.startswith(b"HTTP/1.1 408 ")
    assert (error["code"], error["message"]) == ("body_timeout", "the body did not arrive within 60 s")
