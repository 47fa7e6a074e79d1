"""Another service on NATS: a plain client, and the raw protocol where that would not send such a thing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

from common.nats_bus import OrderedClient

SECONDS = 10.0
GENERATE = "moecule.v1.generate"


class Inbox:
    """The answers to one request, in the order in which they came."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.messages: list[Msg] = []
        self.answers: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    async def take(self, message: Msg) -> None:
        self.messages.append(message)
        self.answers.append(json.loads(message.data) if message.data else {"type": message.headers["Status"]})
        self._changed.set()

    async def until(self, *kinds: str, count: int = 1) -> dict[str, Any]:
        """The newest answer of one of these kinds, once there are so many."""
        async with asyncio.timeout(SECONDS):
            while len(found := [one for one in self.answers if one["type"] in kinds]) < count:
                self._changed.clear()
                await self._changed.wait()
        return found[-1]

    async def last(self) -> dict[str, Any]:
        last = await self.until("end", "error")
        assert [one["seq"] for one in self.answers] == list(range(len(self.answers))), "numbered without a gap"
        assert len({one["request_id"] for one in self.answers}) == 1
        return last

    async def error(self) -> dict[str, Any]:
        """What the request was refused with; the headers say it, too."""
        last = await self.last()
        assert last["type"] == "error", last
        error: dict[str, Any] = last["error"]
        headers = self.messages[-1].headers
        assert headers is not None
        assert headers["Nats-Service-Error-Code"] == error["code"]
        assert headers["Nats-Service-Error"] == " ".join(error["message"].split())[:256]
        return error

    def batches(self, choice: int = 0) -> list[dict[str, Any]]:
        return [one for one in self.answers if one["type"] == "tokens" and one["choice"] == choice]

    def said(self, what: str = "text", choice: int = 0) -> str:
        return "".join(batch[what] for batch in self.batches(choice))

    def tokens(self, choice: int = 0) -> list[int]:
        tokens: list[int] = []
        for batch in self.batches(choice):
            assert batch["index"] == len(tokens), "each token once"
            tokens += batch["tokens"]
        return tokens


class Service:
    def __init__(self, client: Client) -> None:
        self.client = client

    async def ask(self, body: Any, subject: str = "") -> Inbox:
        """`body`: what becomes JSON, or bytes as they are."""
        inbox = Inbox(subject or self.client.new_inbox())
        await self.client.subscribe(inbox.subject, cb=inbox.take)
        await self.publish(body, inbox.subject)
        return inbox

    async def publish(self, body: Any, reply: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({"model": "tiny"} | body).encode()
        await self.client.publish(GENERATE, data, reply=reply)

    async def request(self, subject: str, data: bytes = b"") -> Any:
        return json.loads((await self.client.request(subject, data, timeout=SECONDS)).data)

    async def ask_all(self, subject: str, seconds: float = 0.3) -> list[Any]:
        """What everyone answers who does within `seconds`."""
        inbox = Inbox(self.client.new_inbox())
        await self.client.subscribe(inbox.subject, cb=inbox.take)
        await self.client.publish(subject, b"", reply=inbox.subject)
        await asyncio.sleep(seconds)
        return inbox.answers


@contextlib.asynccontextmanager
async def service(url: str) -> AsyncIterator[Service]:
    client = OrderedClient()  # of nats-py alone a flush may come before what it should follow
    await client.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    try:
        yield Service(client)
    finally:
        await client.close()


async def say(url: str, lines: bytes) -> bytes:
    """Send protocol lines as they are; what the server said until it had read them."""
    host, port = url.removeprefix("nats://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n' + lines + b"PING\r\n")
        async with asyncio.timeout(SECONDS):
            return await reader.readuntil(b"PONG\r\n")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
