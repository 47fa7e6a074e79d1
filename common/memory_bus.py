"""The bus inside one process, for tests: the promises of NatsBus without a server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from common.bus import NO_RESPONDERS, Conflict, Handler, RawMessage, Taker
from common.clock import Clock, RealClock, within
from common.errors import BodyTooLarge, BusTimeout, BusUnavailable, NoResponders
from common.messages import Message
from common.pump import HEADROOM, Pump, encode_within, read_reply

BUFFER_BYTES = 2 << 20  # what a disconnected NATS client keeps


def matches(pattern: str, subject: str) -> bool:
    words, parts = pattern.split("."), subject.split(".")
    if words[-1] == ">":
        if len(parts) < len(words):
            return False
        words, parts = words[:-1], parts[: len(words) - 1]
    return len(words) == len(parts) and all(w in ("*", p) for w, p in zip(words, parts, strict=True))


class MemoryBroker:
    """What the NATS server is: it routes messages and holds the key-value store. `disconnect` is its death."""

    def __init__(self, *, clock: Clock | None = None, max_payload: int = 8 << 20) -> None:
        self.clock = clock or RealClock()
        self.max_payload = max_payload
        self.up = True
        self.buses: list[MemoryBus] = []
        self._subscriptions: list[MemorySubscription | MemoryListener] = []
        self._inboxes: dict[str, asyncio.Future[bytes]] = {}
        self._turn: dict[tuple[str, str], int] = {}  # of each queue group
        self._names = itertools.count(1)
        self._stores: dict[str, dict[str, tuple[bytes, int]]] = {}
        self._revisions: dict[str, int] = {}

    def disconnect(self) -> None:
        self.up = False
        for bus in self.buses:
            bus.disconnect()

    def reconnect(self, *, keep_store: bool = False) -> None:
        """As a restarted NATS: its in-memory key-value store is empty, unless it is to be kept."""
        self.up = True
        if not keep_store:
            self._stores.clear()
            self._revisions.clear()
        for bus in self.buses:
            bus.reconnect()

    def route(self, subject: str, data: bytes, reply_to: str = "", headers: Mapping[str, str] | None = None) -> int:
        """How many subscriptions got the message."""
        if future := self._inboxes.get(subject):
            if not future.done():
                future.set_result(data)
            return 1
        chosen: list[MemorySubscription | MemoryListener] = []
        groups: dict[tuple[str, str], list[MemorySubscription | MemoryListener]] = {}
        for subscription in self._subscriptions:
            if subscription.bus.connected and matches(subscription.pattern, subject):
                if subscription.queue:
                    groups.setdefault((subscription.pattern, subscription.queue), []).append(subscription)
                else:
                    chosen.append(subscription)
        for group, members in groups.items():
            turn = self._turn[group] = self._turn.get(group, -1) + 1
            chosen.append(members[turn % len(members)])
        for subscription in chosen:
            subscription.take(RawMessage(subject, data, reply_to, headers or {}))
        return len(chosen)

    def add(self, subscription: MemorySubscription | MemoryListener) -> None:
        self._subscriptions.append(subscription)

    def remove(self, subscription: MemorySubscription | MemoryListener) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def new_inbox(self) -> tuple[str, asyncio.Future[bytes]]:
        name = f"_INBOX.{next(self._names)}"
        self._inboxes[name] = asyncio.get_running_loop().create_future()
        return name, self._inboxes[name]

    def drop_inbox(self, name: str) -> None:
        del self._inboxes[name]

    def get(self, bucket: str, key: str) -> tuple[bytes, int] | None:
        return self._stores.get(bucket, {}).get(key)

    def put(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        store = self._stores.setdefault(bucket, {})
        held = store[key][1] if key in store else 0
        if held != revision:
            raise Conflict(f"{bucket}/{key} has revision {held}, not {revision}")
        self._revisions[bucket] = self._revisions.get(bucket, 0) + 1
        store[key] = (value, self._revisions[bucket])
        return self._revisions[bucket]


@dataclass(eq=False)
class MemorySubscription:
    bus: MemoryBus
    pattern: str
    queue: str
    pump: Pump

    def take(self, message: RawMessage) -> None:
        self.pump.put_nowait(message.subject, message.data, message.reply_to)

    def cancel(self) -> None:
        self.pump.cancel()

    async def drain(self) -> None:
        self.bus.broker.remove(self)
        await self.pump.drain()


@dataclass(eq=False)
class MemoryListener:
    bus: MemoryBus
    pattern: str
    queue: str
    taker: Taker

    def take(self, message: RawMessage) -> None:
        asyncio.get_running_loop().call_soon(self.taker, message)

    def cancel(self) -> None:
        pass

    async def drain(self) -> None:
        self.bus.broker.remove(self)
        await asyncio.sleep(0)


@dataclass(eq=False)
class MemoryBus:
    broker: MemoryBroker
    closed: bool = False
    _since: float | None = None
    _buffer: list[RawMessage] = field(default_factory=list)
    _buffered: int = 0
    _subscriptions: list[MemorySubscription | MemoryListener] = field(default_factory=list)
    _callbacks: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    _tasks: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def connected(self) -> bool:
        return self._since is not None

    @property
    def max_payload(self) -> int:
        return self.broker.max_payload

    def connected_for(self) -> float:
        return 0.0 if self._since is None else self.broker.clock.now() - self._since

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._callbacks.append(callback)

    async def connect(self) -> None:
        if not self.broker.up:
            raise BusUnavailable("NATS does not answer at memory://")
        self.closed, self._since = False, self.broker.clock.now()
        self.broker.buses.append(self)

    async def close(self) -> None:
        self.closed, self._since = True, None
        for subscription in self._subscriptions:
            self.broker.remove(subscription)
            subscription.cancel()
        if self in self.broker.buses:
            self.broker.buses.remove(self)

    def disconnect(self) -> None:
        """Only this bus: the others still reach each other."""
        self._since = None

    def reconnect(self) -> None:
        if self.closed or self.connected:
            return
        self._since = self.broker.clock.now()
        buffer, self._buffer, self._buffered = self._buffer, [], 0
        for message in buffer:
            self._route(message)
        for callback in self._callbacks:
            task = asyncio.ensure_future(callback())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def publish(self, subject: str, message: Message) -> None:
        await self.send(subject, encode_within(message, self.max_payload))

    async def send(
        self, subject: str, data: bytes, *, reply_to: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        if len(data) + HEADROOM > self.max_payload:
            raise BodyTooLarge(f"a message of {len(data)} bytes is over the limit")
        message = RawMessage(subject, data, reply_to, headers or {})
        if self.closed:
            raise BusUnavailable("the connection to NATS is closed")
        if self.connected:
            self._route(message)
        elif self._buffered + len(data) > BUFFER_BYTES:
            raise BusUnavailable("NATS is gone, and the buffer for what is published is full")
        else:
            self._buffer.append(message)
            self._buffered += len(data)

    def _route(self, message: RawMessage) -> None:
        reached = self.broker.route(message.subject, message.data, message.reply_to, message.headers)
        if message.reply_to and not reached:
            for subscription in self._subscriptions:
                if matches(subscription.pattern, message.reply_to):
                    subscription.take(RawMessage(message.reply_to, b"", headers={"Status": NO_RESPONDERS}))

    async def request(self, subject: str, message: Message, timeout: float = 2.0) -> Message:
        data = encode_within(message, self.max_payload)
        self._need_connection()
        name, reply = self.broker.new_inbox()
        try:
            if not self.broker.route(subject, data, name):
                raise NoResponders(f"nobody listens on {subject}")
            return read_reply(await within(self.broker.clock, timeout, reply))
        except TimeoutError:
            raise BusTimeout(f"no answer on {subject} within {timeout:g} s") from None
        finally:
            self.broker.drop_inbox(name)

    async def subscribe(
        self, subject: str, handler: Handler, *, concurrency: int = 1, queue: str = ""
    ) -> MemorySubscription:
        if self.closed:
            raise BusUnavailable("the connection to NATS is closed")
        subscription = MemorySubscription(self, subject, queue, Pump(handler, self.send, concurrency=concurrency))
        self._subscriptions.append(subscription)
        self.broker.add(subscription)
        return subscription

    async def listen(self, subject: str, taker: Taker, *, queue: str = "") -> MemoryListener:
        if self.closed:
            raise BusUnavailable("the connection to NATS is closed")
        listener = MemoryListener(self, subject, queue, taker)
        self._subscriptions.append(listener)
        self.broker.add(listener)
        return listener

    async def kv_get(self, bucket: str, key: str) -> tuple[bytes, int] | None:
        self._need_connection()
        return self.broker.get(bucket, key)

    async def kv_put(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        self._need_connection()
        return self.broker.put(bucket, key, value, revision)

    def _need_connection(self) -> None:
        if not self.connected:
            raise BusUnavailable("there is no connection to NATS")
