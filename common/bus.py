"""The bus: messages between actors, and a small key-value store with compare-and-set.

Two implementations pass one conformance suite: `NatsBus` (common/nats_bus.py) and `MemoryBus` (common/memory_bus.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from common.errors import MoeculeError
from common.messages import Message

Handler = Callable[[str, Message], Awaitable[Message | None]]
"""(subject, message) -> the reply, or None for no reply. A MoeculeError that it raises is sent as a Failed reply."""


NO_RESPONDERS = "503"


@dataclass(frozen=True, slots=True)
class RawMessage:
    """As it came, from whoever does not speak our messages. `reply_to` is empty where no answer is wanted; anyone may
    write anything into it."""

    subject: str
    data: bytes
    reply_to: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def nobody_listened(self) -> bool:
        """It is the server's word that what we sent with this reply subject reached nobody."""
        return self.headers.get("Status") == NO_RESPONDERS and not self.data


Taker = Callable[[RawMessage], None]
"""Called in order, one message at a time: it must return at once, and raise nothing."""


class Conflict(MoeculeError):
    """Compare-and-set: the key has another revision."""

    code = "conflict"


class Subscription(Protocol):
    async def drain(self) -> None:
        """Take nothing new; return when the handlers under way have ended and their replies are sent."""
        ...


class Bus(Protocol):
    @property
    def connected(self) -> bool: ...

    @property
    def closed(self) -> bool:
        """Left for good: by `close`, or because the server threw us out. It never connects again."""
        ...

    @property
    def max_payload(self) -> int:
        """Bytes; an encoded message must stay 4 KiB under it."""
        ...

    def connected_for(self) -> float:
        """Seconds since the connection was (re)made; 0 while there is none."""
        ...

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call this after every reconnect (the server may have forgotten its key-value store)."""
        ...

    async def connect(self) -> None:
        """Raises BusUnavailable with a sentence that names the URL."""
        ...

    async def close(self) -> None:
        """Flush what was published, then leave. Subscriptions are drained by their owners before."""
        ...

    async def publish(self, subject: str, message: Message) -> None:
        """At most once, in order for one publisher. While disconnected a bounded amount is buffered.

        Raises BusUnavailable when the buffer is full, BodyTooLarge when the message is over max_payload.
        """
        ...

    async def request(self, subject: str, message: Message, timeout: float = 2.0) -> Message:
        """The reply. Raises NoResponders at once if nobody listens, BusTimeout, or the error of a Failed reply."""
        ...

    async def subscribe(self, subject: str, handler: Handler, *, concurrency: int = 1, queue: str = "") -> Subscription:
        """Run `handler` for each message; `*` matches one word of a subject, `>` the rest.

        With concurrency 1 messages are handled in order; above it up to that many run at once. Members of one `queue`
        group share the messages. Returns once the server knows the subscription. A message that cannot be decoded is
        answered with a Failed reply (if one is wanted), logged, and skipped.
        """
        ...

    async def listen(self, subject: str, taker: Taker, *, queue: str = "") -> Subscription:
        """`subscribe`, for messages that are not ours: `taker` gets them as they came."""
        ...

    async def send(
        self, subject: str, data: bytes, *, reply_to: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """`publish`, of bytes. Where nobody listens on `subject`, our own `listen` on `reply_to` is told so
        (`RawMessage.nobody_listened`)."""
        ...

    async def kv_get(self, bucket: str, key: str) -> tuple[bytes, int] | None:
        """(value, revision), or None if there is no such key or bucket."""
        ...

    async def kv_put(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        """The new revision, if the key still has `revision` (0: does not exist); else raises Conflict."""
        ...
