"""A client of streaming completions that costs little: 64 streams of 300 tokens/s take a third of a core.

A protocol on uvloop, not streams and tasks: the moment of a chunk is taken where its bytes arrive, and nothing is woken
for it.
"""

from __future__ import annotations

import asyncio
import time
import urllib.parse
from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import msgspec

from benchmarks.sse import BadAnswer, Events, Response
from benchmarks.timing import spread_tokens

SHOWN = 200  # characters of what a server says when it refuses


class Details(msgspec.Struct):
    cached_tokens: int | None = 0


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Details | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


decode = msgspec.json.Decoder(Chunk).decode


class Endpoint(NamedTuple):
    host: str
    port: int
    path: str
    tls: bool
    key: str

    @classmethod
    def of(cls, url: str, key: str = "none") -> Endpoint:
        """`url` as the openai SDK takes it: http://HOST:PORT/v1."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"no URL of an endpoint: {url}")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/"), tls, key)

    def post(self, body: bytes) -> bytes:
        head = (
            f"POST {self.path}/completions HTTP/1.1\r\nhost: {self.host}:{self.port}\r\nconnection: close\r\n"
            f"authorization: Bearer {self.key}\r\naccept: text/event-stream\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Request(NamedTuple):
    body: bytes
    tokens: int
    """What the answer must have; with ignore_eos it has."""


@dataclass
class Record:
    """What came of a request. Times are of time.perf_counter()."""

    began: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))  # of the chunks that brought tokens
    counts: array[int] = field(default_factory=lambda: array("q"))  # tokens so far after each
    usage: Usage | None = None  # the last one told
    error: str = ""
    complete: bool = False

    def take(self, chunk: Chunk, now: float) -> None:
        """Where each chunk tells the usage so far, that says how many tokens it brought; else it counts as one."""
        so_far = self.tokens
        if chunk.usage is not None:
            self.usage = chunk.usage
        if not chunk.choices:
            return
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens or 0
        else:
            last = chunk.choices[0]
            count = so_far + bool(last.text or not last.finish_reason)
        if count > so_far:
            self.times.append(now)
            self.counts.append(count)

    @property
    def tokens(self) -> int:
        return self.counts[-1] if self.counts else 0

    def end(self, wanted: int) -> None:
        """The stream ended as it should; now it shows whether all is in it that was asked for."""
        told = (self.usage.completion_tokens or 0) if self.usage else self.tokens
        if not self.usage:
            self.error = "the stream tells no usage"
        elif told != wanted:
            self.error = f"{told} tokens instead of {wanted}"
        elif not self.times:
            self.error = "the usage tells of tokens, and no chunk brought one"
        else:
            self.counts = array("q", spread_tokens(self.counts, told))
            self.complete = True


class Stream(asyncio.Protocol):
    def __init__(self, request: bytes, record: Record) -> None:
        self._request, self._record = request, record
        self._response, self._events = Response(), Events()
        self._refusal = b""
        self._heard = time.perf_counter()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def ended(self, silence: float) -> str:
        """Why it failed; empty when the stream was told to its end. It fails when nothing comes for so long."""
        while not self._ended.done():
            if (left := self._heard + silence - time.perf_counter()) <= 0:
                return f"nothing came for {silence:.0f} s"
            await asyncio.wait({self._ended}, timeout=left)
        return self._ended.result()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's are of no class of asyncio's

    def data_received(self, data: bytes) -> None:
        now = self._heard = time.perf_counter()
        try:
            body = self._response.feed(data)
            if self._response.status == 200:
                for event in self._events.feed(body):
                    self._take(event, now)
            else:
                self._refusal += body
        except (BadAnswer, msgspec.MsgspecError) as error:
            self._end(f"it cannot be read: {error}")
        if self._response.ended:
            self._end(self._why_early())

    def connection_lost(self, error: Exception | None) -> None:
        self._end(f"the connection broke: {error}" if error else self._why_early())

    def _take(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self._end("")
            return
        chunk = decode(event)
        if chunk.error is not None:
            self._end(f"the stream says: {msgspec.json.encode(chunk.error).decode()[:SHOWN]}")
        self._record.take(chunk, now)

    def _why_early(self) -> str:
        if self._response.status in (0, 200):
            return "the answer ended early"
        return f"HTTP {self._response.status}: {self._refusal.decode(errors='replace')[:SHOWN]}"

    def _end(self, why: str) -> None:
        if not self._ended.done():
            self._ended.set_result(why)


async def ask(endpoint: Endpoint, request: Request, record: Record, silence: float) -> None:
    """Fills `record` while the answer comes; never raises for what the server does."""
    record.began = time.perf_counter()
    loop, data = asyncio.get_running_loop(), endpoint.post(request.body)
    try:
        async with asyncio.timeout(silence):
            transport, stream = await loop.create_connection(
                lambda: Stream(data, record), endpoint.host, endpoint.port, ssl=endpoint.tls or None
            )
    except OSError as error:  # a time-out is one
        record.error = f"no connection: {error or 'too slow'}"
        return
    try:
        record.error = await stream.ended(silence)
    finally:
        transport.abort()
    if not record.error:
        record.end(request.tokens)
