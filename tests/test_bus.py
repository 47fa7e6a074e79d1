"""One conformance suite for both buses: what is promised in common/bus.py, also across an outage."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

import nats.errors
import pytest

from common.bus import Bus, Conflict, RawMessage
from common.errors import (
    BodyTooLarge,
    BusTimeout,
    BusUnavailable,
    ConfigError,
    InternalError,
    NoResponders,
    Overloaded,
)
from common.memory_bus import MemoryBus, matches
from common.messages import Abort, GetMap, GetPages, Message, Metrics, Ok, Resume
from common.nats_bus import CLOSE_SECONDS, STALLED_SECONDS, NatsBus, kept_cancellable
from tests.conftest import BusMaker, NatsServer, Outage
from tests.outside import say


class Inbox:
    """A handler that keeps what came."""

    def __init__(self) -> None:
        self.subjects: list[str] = []
        self.messages: list[Message] = []
        self._changed = asyncio.Event()

    async def __call__(self, subject: str, message: Message) -> None:
        self.subjects.append(subject)
        self.messages.append(message)
        self._changed.set()

    async def wait(self, count: int) -> list[Message]:
        async with asyncio.timeout(5):
            while len(self.messages) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.messages


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def aborts(count: int) -> list[Abort]:
    return [Abort(request_ids=(f"r{n}",)) for n in range(count)]


async def send_raw(bus: Bus, subject: str, data: bytes) -> None:
    if isinstance(bus, MemoryBus):
        bus.broker.route(subject, data)
    else:
        assert isinstance(bus, NatsBus)
        await bus._client.publish(subject, data)


# ---- messages that are not ours


async def test_a_listener_gets_messages_as_they_came(make_bus: BusMaker):
    sender, receiver = await make_bus(), await make_bus()
    came: list[RawMessage] = []
    listener = await receiver.listen("moecule.v1.any.*", came.append)
    await sender.send("moecule.v1.any.1", b"\xff", reply_to="here", headers={"a": "b"})
    await sender.send("moecule.v1.any.2", b"")
    await until(lambda: len(came) == 2)
    assert came == [RawMessage("moecule.v1.any.1", b"\xff", "here", {"a": "b"}), RawMessage("moecule.v1.any.2", b"")]
    await listener.drain()
    await sender.send("moecule.v1.any.3", b"")
    await listener.drain()
    assert len(came) == 2


async def test_listeners_of_one_queue_share_messages(make_bus: BusMaker):
    sender, *receivers = [await make_bus() for _ in range(3)]
    came: list[list[RawMessage]] = [[], []]
    for receiver, messages in zip(receivers, came, strict=True):
        await receiver.listen("moecule.v1.shared", messages.append, queue="all")
    for _ in range(40):
        await sender.send("moecule.v1.shared", b"")
    await until(lambda: len(came[0]) + len(came[1]) == 40)
    assert came[0] and came[1]


async def test_a_sender_is_told_that_nobody_listened(make_bus: BusMaker):
    sender, receiver = await make_bus(), await make_bus()
    told: list[RawMessage] = []
    await sender.listen("moecule.v1.back.*", told.append)
    listener = await receiver.listen("moecule.v1.there", lambda _: None)
    await sender.send("moecule.v1.there", b"1", reply_to="moecule.v1.back.1")
    await sender.send("moecule.v1.elsewhere", b"2", reply_to="moecule.v1.back.2")
    await sender.send("moecule.v1.elsewhere", b"3")
    await until(lambda: told)
    assert [(m.subject, m.nobody_listened) for m in told] == [("moecule.v1.back.2", True)]
    await listener.drain()
    await sender.send("moecule.v1.there", b"4", reply_to="moecule.v1.back.4")
    await until(lambda: len(told) == 2)
    assert told[1].subject == "moecule.v1.back.4"
    assert not RawMessage("a", b"", "", {"Status": "404"}).nobody_listened


async def test_what_is_sent_in_an_outage_arrives_after_it(cluster: tuple[BusMaker, Outage]):
    make_bus, outage = cluster
    sender, receiver = await make_bus(), await make_bus()
    came: list[RawMessage] = []
    await receiver.listen("moecule.v1.any", came.append)
    outage.down()
    await until(lambda: not sender.connected and not receiver.connected)
    outage.up()
    await until(lambda: sender.connected and receiver.connected)
    await sender.send("moecule.v1.any", b"after", headers={"a": "b"})
    await until(lambda: came)
    assert (came[-1].data, came[-1].headers) == (b"after", {"a": "b"})


async def test_what_is_too_large_to_send_is_refused(make_bus: BusMaker):
    bus = await make_bus()
    with pytest.raises(BodyTooLarge):
        await bus.send("moecule.v1.any", b"x" * bus.max_payload)


@pytest.mark.parametrize(
    "lines",
    [
        b"PUB moecule.v1.\xff 0\r\n\r\n",
        b"PUB moecule.v1.any \xff\xfe 0\r\n\r\n",
        b"HPUB moecule.v1.any 16 16\r\nNATS/1.0 \xff\xff\xff\r\n\r\n\r\n",
        b"HPUB moecule.v1.any 8 8\r\nNATS/1.0\r\n",
    ],
    ids=["a subject", "a reply subject", "a status", "headers without an end"],
)
async def test_what_is_no_text_does_not_end_the_connection(nats_server: NatsServer, lines: bytes):
    bus = NatsBus(nats_server.url, "test")
    await bus.connect()
    came: list[RawMessage] = []
    await bus.listen("moecule.v1.>", came.append)
    await say(nats_server.url, lines)
    await bus.send("moecule.v1.any", b"after")
    await until(lambda: came and came[-1].data == b"after")
    await bus.close()


# ---- publishing


async def test_messages_of_one_publisher_arrive_in_order(make_bus: BusMaker):
    sender, receiver, inbox = await make_bus(), await make_bus(), Inbox()
    await receiver.subscribe("moecule.v1.gateway.a.tokens", inbox)
    for message in aborts(200):
        await sender.publish("moecule.v1.gateway.a.tokens", message)
    assert await inbox.wait(200) == aborts(200)


async def test_a_handler_with_concurrency_1_is_not_entered_twice(make_bus: BusMaker):
    bus, inside, most, done = await make_bus(), 0, 0, Inbox()

    async def handler(subject: str, message: Message) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        await done(subject, message)

    await bus.subscribe("a.b", handler)
    for message in aborts(20):
        await bus.publish("a.b", message)
    assert await done.wait(20) == aborts(20) and most == 1


async def test_a_handler_with_concurrency_4_runs_4_at_once_and_no_more(make_bus: BusMaker):
    bus, inside, gate, full = await make_bus(), [], asyncio.Event(), asyncio.Event()

    async def handler(_: str, message: Message) -> Message:
        inside.append(message)
        if len(inside) == 4:
            full.set()
        await gate.wait()
        return Ok()

    await bus.subscribe("a.b", handler, concurrency=4)
    requests = [asyncio.create_task(bus.request("a.b", message)) for message in aborts(6)]
    await asyncio.wait_for(full.wait(), 5)
    await asyncio.sleep(0.02)
    assert len(inside) == 4
    gate.set()
    assert await asyncio.gather(*requests) == [Ok()] * 6


@pytest.mark.parametrize(
    ("pattern", "subject", "fits"),
    [
        ("a.b", "a.b", True),
        ("a.*.c", "a.x.c", True),
        ("a.*.c", "a.x.y", False),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        ("a.b", "a", False),
    ],
)
async def test_wildcards(make_bus: BusMaker, pattern: str, subject: str, fits: bool):
    assert matches(pattern, subject) == fits
    bus, inbox, all_of_it = await make_bus(), Inbox(), Inbox()
    await bus.subscribe(pattern, inbox)
    await bus.subscribe(subject, all_of_it)
    await bus.publish(subject, Ok())
    await all_of_it.wait(1)
    # One connection delivers in the order of publishing: what comes later shows that nothing is on the way.
    await bus.publish(subject, Ok())
    await all_of_it.wait(2)
    assert inbox.subjects == [subject] * (2 if fits else 0)


async def test_everyone_hears_but_a_queue_group_shares(make_bus: BusMaker):
    sender, inboxes, members = await make_bus(), [Inbox(), Inbox()], [Inbox(), Inbox()]
    for inbox in inboxes:
        await (await make_bus()).subscribe("x", inbox)
    for member in members:
        await (await make_bus()).subscribe("x", member, queue="group")
    for message in aborts(40):
        await sender.publish("x", message)
    for inbox in inboxes:
        assert await inbox.wait(40) == aborts(40)
    await until(lambda: sum(len(m.messages) for m in members) >= 40)
    shared = [message.request_ids for member in members for message in member.messages]
    assert sorted(shared) == sorted(a.request_ids for a in aborts(40))
    assert all(member.messages for member in members)


# ---- requests


async def test_a_request_is_answered(make_bus: BusMaker):
    asker, answerer = await make_bus(), await make_bus()

    async def handler(subject: str, message: Message) -> Message:
        assert isinstance(message, Resume)
        return Metrics(text=f"{subject} {message.request_id} {message.index}")

    await answerer.subscribe("moecule.v1.worker.*.resume", handler, concurrency=8)
    replies = await asyncio.gather(
        *(asker.request("moecule.v1.worker.w.resume", Resume(request_id="r", index=n)) for n in range(50))
    )
    assert replies == [Metrics(text=f"moecule.v1.worker.w.resume r {n}") for n in range(50)]


async def test_an_error_travels_as_itself(make_bus: BusMaker):
    bus = await make_bus()

    async def handler(_: str, message: Message) -> Message:
        raise Overloaded("the queue is full", param="prompt")

    await bus.subscribe("a", handler)
    with pytest.raises(Overloaded) as caught:
        await bus.request("a", Ok())
    assert (caught.value.message, caught.value.param, caught.value.status) == ("the queue is full", "prompt", 429)


async def test_a_bug_in_a_handler_is_an_answer_without_its_details(make_bus: BusMaker):
    bus, calls = await make_bus(), []

    async def handler(_: str, message: Message) -> Message:
        calls.append(message)
        if len(calls) == 1:
            raise ValueError("secret")
        return Ok()

    await bus.subscribe("a", handler)
    with pytest.raises(InternalError) as caught:
        await bus.request("a", Ok())
    assert "secret" not in caught.value.message
    assert await bus.request("a", Ok()) == Ok()


async def test_nobody_listens_is_known_at_once(make_bus: BusMaker):
    bus = await make_bus()
    began = time.monotonic()
    with pytest.raises(NoResponders):
        await bus.request("nobody", Ok(), timeout=30)
    assert time.monotonic() - began < 2


async def test_a_late_answer_is_a_timeout_and_is_not_taken_for_the_next(make_bus: BusMaker):
    bus, gate = await make_bus(), asyncio.Event()

    async def handler(_: str, message: Message) -> Message:
        if isinstance(message, GetMap):
            await gate.wait()
            return Metrics(text="late")
        return Ok()

    await bus.subscribe("a", handler, concurrency=2)
    with pytest.raises(BusTimeout):
        await bus.request("a", GetMap(), timeout=0.05)
    gate.set()
    assert await bus.request("a", GetPages()) == Ok()


@pytest.mark.parametrize("data", [b"", b"\xc1 not msgpack", b"\x81\xa4type\xa6Wicked"], ids=["empty", "noise", "tag"])
async def test_what_cannot_be_read_is_skipped(make_bus: BusMaker, data: bytes):
    bus, inbox = await make_bus(), Inbox()
    await bus.subscribe("a", inbox)
    await send_raw(bus, "a", data)
    await bus.publish("a", Ok())
    assert await inbox.wait(1) == [Ok()]


async def test_a_message_over_the_limit_is_refused_and_the_connection_lives(make_bus: BusMaker):
    bus, inbox = await make_bus(), Inbox()
    await bus.subscribe("a", inbox)
    assert bus.max_payload == 8_000_000 or bus.max_payload == 8 << 20
    fits, over = "x" * (bus.max_payload - 5000), "x" * (bus.max_payload - 4090)
    for call in (bus.publish, bus.request):
        with pytest.raises(BodyTooLarge):
            await call("a", Metrics(text=over))
    await bus.publish("a", Metrics(text=fits))
    (message,) = await inbox.wait(1)
    assert isinstance(message, Metrics) and len(message.text) == len(fits) and bus.connected


async def test_a_reply_over_the_limit_is_an_error_for_the_asker(make_bus: BusMaker):
    bus = await make_bus()

    async def handler(_: str, message: Message) -> Message:
        return Metrics(text="x" * bus.max_payload)

    await bus.subscribe("a", handler)
    with pytest.raises(BodyTooLarge):
        await bus.request("a", Ok())


# ---- leaving


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_drain_ends_what_was_taken_and_takes_nothing_new(make_bus: BusMaker, concurrency: int):
    asker, answerer, gate, entered = await make_bus(), await make_bus(), asyncio.Event(), Inbox()

    async def handler(subject: str, message: Message) -> Message:
        await entered(subject, message)
        await gate.wait()
        return Ok()

    subscription = await answerer.subscribe("a", handler, concurrency=concurrency)
    requests = [asyncio.create_task(asker.request("a", Ok(), timeout=10)) for _ in range(4)]
    await entered.wait(concurrency)
    with pytest.raises(NoResponders):
        await asker.request("nobody", Ok())  # its answer comes when the server has seen all that was asked before
    draining = asyncio.create_task(subscription.drain())
    async with asyncio.timeout(5):
        while True:  # until the subscription is gone at the server
            try:
                await asker.request("a", GetMap(), timeout=0.02)
            except NoResponders:
                break
            except BusTimeout:
                continue
    assert not draining.done()
    gate.set()
    assert await asyncio.gather(*requests) == [Ok()] * 4
    await asyncio.wait_for(draining, 5)


async def test_drain_twice_and_after_close_is_harmless(make_bus: BusMaker):
    bus = await make_bus()
    subscription = await bus.subscribe("a", Inbox())
    await subscription.drain()
    await subscription.drain()
    other = await bus.subscribe("b", Inbox())
    await bus.close()
    await bus.close()
    await asyncio.wait_for(other.drain(), 2)
    assert bus.closed and not bus.connected and bus.connected_for() == 0


async def test_what_was_published_before_close_arrives(make_bus: BusMaker):
    sender, receiver, inbox = await make_bus(), await make_bus(), Inbox()
    await receiver.subscribe("a", inbox)
    for message in aborts(50):
        await sender.publish("a", message)
    await sender.close()
    assert await inbox.wait(50) == aborts(50)
    with pytest.raises(BusUnavailable):
        await sender.publish("a", Ok())


async def test_a_subscription_is_known_when_subscribe_returns(make_bus: BusMaker):
    """By others too, each time: 50 new subscriptions, and a message to each from another connection."""
    sender, receiver = await make_bus(), await make_bus()
    for n in range(50):
        inbox = Inbox()
        await receiver.subscribe(f"new.{n}", inbox)
        await sender.publish(f"new.{n}", Ok())
        await inbox.wait(1)


async def test_no_request_is_lost_while_its_answerer_drains(make_bus: BusMaker):
    """Each of the requests sent meanwhile is answered, or knows at once that nobody listens."""
    asker = await make_bus()

    async def handler(_: str, message: Message) -> Message:
        return Ok()

    async def ask(subject: str) -> str:
        try:
            return type(await asker.request(subject, Ok(), timeout=5)).__name__
        except NoResponders:
            return "NoResponders"

    for n in range(20):
        answerer = await make_bus()
        subscription = await answerer.subscribe(f"s.{n}", handler)
        asking = [asyncio.create_task(ask(f"s.{n}")) for _ in range(20)]
        await asyncio.sleep(0)
        await subscription.drain()
        asking += [asyncio.create_task(ask(f"s.{n}")) for _ in range(5)]
        await answerer.close()
        answers = await asyncio.gather(*asking)
        assert set(answers) <= {"Ok", "NoResponders"} and answers[-5:] == ["NoResponders"] * 5


# ---- the key-value store


async def test_compare_and_set(make_bus: BusMaker):
    one, other = await make_bus(), await make_bus()
    assert await one.kv_get("maps", "map") is None
    first = await one.kv_put("maps", "map", b"1", 0)
    assert await other.kv_get("maps", "map") == (b"1", first)
    second = await other.kv_put("maps", "map", b"2", first)
    assert second > first
    for stale in (0, first, second + 7):
        with pytest.raises(Conflict):
            await one.kv_put("maps", "map", b"x", stale)
    assert await one.kv_get("maps", "map") == (b"2", second)
    assert await one.kv_get("maps", "other") is None


async def test_one_of_many_writers_wins(make_bus: BusMaker):
    buses = [await make_bus() for _ in range(4)]
    await buses[0].kv_get("maps", "map")
    results = await asyncio.gather(
        *(bus.kv_put("maps", "map", str(n).encode(), 0) for n, bus in enumerate(buses)), return_exceptions=True
    )
    winners = [n for n, result in enumerate(results) if isinstance(result, int)]
    assert len(winners) == 1 and all(isinstance(r, int | Conflict) for r in results)
    held = await buses[0].kv_get("maps", "map")
    assert held is not None and held[0] == str(winners[0]).encode()


# ---- the server goes away


async def test_an_outage(cluster: tuple[BusMaker, Outage]):
    make_bus, outage = cluster
    sender, receiver, inbox, called = await make_bus(), await make_bus(), Inbox(), asyncio.Event()

    async def on_reconnect() -> None:
        assert sender.connected
        called.set()

    sender.on_reconnect(on_reconnect)
    await receiver.subscribe("a", inbox)
    await sender.kv_put("maps", "map", b"1", 0)
    await until(lambda: sender.connected_for() > 0.02)

    outage.down()
    await until(lambda: not sender.connected and not receiver.connected)
    assert sender.connected_for() == 0 and not sender.closed
    await sender.publish("a", Abort(request_ids=("kept",)))
    with pytest.raises(BusUnavailable) as refused:
        await sender.request("a", GetMap())
    assert refused.type is BusUnavailable, "at once, and not kept to be carried out later"
    with pytest.raises(BusUnavailable):
        await sender.kv_get("maps", "map")
    with pytest.raises(BusUnavailable):
        for _ in range(5):
            await sender.publish("elsewhere", Metrics(text="x" * 500_000))

    outage.up()
    await asyncio.wait_for(called.wait(), 10)
    await until(lambda: receiver.connected)
    assert sender.connected_for() < 5
    assert await sender.kv_get("maps", "map") is None
    assert await sender.kv_put("maps", "map", b"2", 0) > 0
    await sender.publish("a", Abort(request_ids=("new",)))
    await until(lambda: Abort(request_ids=("new",)) in inbox.messages)
    assert GetMap() not in inbox.messages


async def test_a_subscription_drains_while_the_server_is_gone(cluster: tuple[BusMaker, Outage]):
    make_bus, outage = cluster
    bus = await make_bus()
    subscription = await bus.subscribe("a", Inbox())
    outage.down()
    await until(lambda: not bus.connected)
    await asyncio.wait_for(subscription.drain(), 2)


async def test_leaving_while_the_server_is_gone(cluster: tuple[BusMaker, Outage]):
    make_bus, outage = cluster
    idle, buffering = await make_bus(), await make_bus()
    for bus in (idle, buffering):
        await bus.subscribe("a", Inbox())
    outage.down()
    await until(lambda: not idle.connected and not buffering.connected)
    await buffering.publish("a", Ok())
    for bus in (idle, buffering):
        await asyncio.wait_for(bus.close(), 2)
        assert bus.closed


# ---- NATS alone


async def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("common.nats_bus.CONNECT_SECONDS", 0.3)
    bus = NatsBus("nats://user:secret@127.0.0.1:1", "test")
    with pytest.raises(BusUnavailable, match=r"NATS does not answer at nats://127\.0\.0\.1:1: .+") as caught:
        await bus.connect()
    assert "secret" not in caught.value.message
    await bus.close()


async def test_a_url_that_is_none_is_a_configuration_error():
    bus = NatsBus("nats://", "test")
    with pytest.raises(ConfigError, match="MOECULE_NATS_URL"):
        await bus.connect()
    await bus.close()


async def test_it_waits_for_a_server_that_comes_up_late(nats_server: NatsServer):
    nats_server.kill()
    bus = NatsBus(nats_server.url, "test")
    connecting = asyncio.create_task(bus.connect())
    await asyncio.sleep(0.2)
    assert not connecting.done()
    await asyncio.to_thread(nats_server.start)
    await asyncio.wait_for(connecting, 5)
    assert bus.connected
    await bus.close()


@pytest.mark.parametrize(
    "says", [b"x" * 70_000, b'INFO {"version":"2"}\r\n', b"INFO []\r\n"], ids=["no line", "then gone", "no object"]
)
async def test_a_stranger_on_the_servers_port_does_not_end_the_attempts(nats_server: NatsServer, says: bytes):
    bus = NatsBus(nats_server.url, "test")
    await bus.connect()
    visits = 0

    async def stranger(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        visits += 1
        writer.write(says)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.transport.abort()

    nats_server.kill()
    async with await asyncio.start_server(stranger, "127.0.0.1", nats_server.port), asyncio.timeout(10):
        while visits < 3:
            await asyncio.sleep(0.05)
    await asyncio.to_thread(nats_server.start)
    async with asyncio.timeout(10):
        while not bus.connected:
            await asyncio.sleep(0.05)
    await bus.close()


async def test_a_server_that_stands_still_holds_up_no_publisher(nats_server: NatsServer):
    sender, receiver, inbox = NatsBus(nats_server.url, "a"), NatsBus(nats_server.url, "b"), Inbox()
    await sender.connect()
    await receiver.connect()
    await receiver.subscribe("a", inbox)
    published: list[Message] = []

    async def publish() -> None:
        published.append(Metrics(text=f"{len(published)}" + "x" * 200_000))
        await asyncio.wait_for(sender.publish("a", published[-1]), 1)

    nats_server.signal(signal.SIGSTOP)
    while sender._client.pending_data_size == 0:  # the sockets take no more
        await publish()
    for _ in range(5):
        await publish()
    nats_server.signal(signal.SIGCONT)
    await until(lambda: inbox.messages == published)
    await sender.close()
    await receiver.close()


async def test_silence_proves_nothing_while_the_server_stands_still(nats_server: NatsServer):
    bus = NatsBus(nats_server.url, "a")
    await bus.connect()
    try:
        nats_server.signal(signal.SIGSTOP)
        async with asyncio.timeout(2 * STALLED_SECONDS):
            while bus.connected_for() > 0:
                await asyncio.sleep(0.01)
        nats_server.signal(signal.SIGCONT)
        async with asyncio.timeout(5):
            while bus.connected_for() == 0:
                await asyncio.sleep(0.01)
        assert bus.connected and bus.connected_for() < 1.0
    finally:
        nats_server.signal(signal.SIGCONT)
        await bus.close()


@pytest.mark.parametrize("ending", ["the reply", "an error"])
async def test_a_cancellation_is_not_forgotten(ending: str):
    async def forgetful() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        if ending == "an error":
            raise nats.errors.FlushTimeoutError
        return "reply"

    task = asyncio.create_task(kept_cancellable(forgetful()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_close_that_never_ends_is_not_waited_for(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch):
    bus, let_go = NatsBus(nats_server.url, "a"), asyncio.Event()
    await bus.connect()
    close = bus._client.close

    async def for_ever() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)
        await let_go.wait()  # the cancellation was lost
        await close()
        let_go.clear()

    monkeypatch.setattr(bus._client, "close", for_ever)
    async with asyncio.timeout(CLOSE_SECONDS + 5):
        await bus.close()
    let_go.set()
    async with asyncio.timeout(5):
        while let_go.is_set():
            await asyncio.sleep(0.01)
