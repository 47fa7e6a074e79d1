"""/v1/completions and /v1/chat/completions: one path from the body to the answer, streamed or whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from common.actor import first_leaf
from common.clock import Clock, within
from common.errors import BodyTimeout, BodyTooLarge, Draining, InvalidRequest, MoeculeError, RequestCancelled
from common.tracing import Attributes, Traces, current
from services.gateway.bodies import decode_body
from services.gateway.limits import Caller, Permit
from services.gateway.metrics import GatewayMetrics
from services.gateway.output import Delta, Output
from services.gateway.prepare import Job, Preparer, off_loop
from services.gateway.protocol import AnyBody, Body, ChatBody, check
from services.gateway.responses import DONE, ChatStyle, Style, TextStyle, Usage, Wanted, Writer, error_event
from services.gateway.streams import Streams

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
JSON_HEADERS = [(b"content-type", b"application/json")]
REMEMBERED_FIELDS = 1000  # unknown field names that were warned about

AnyStruct = TypeVar("AnyStruct", bound=msgspec.Struct)
MOST_MILLISECONDS = 86_400_000  # a day
OnDelta = Callable[[int, Delta], Awaitable[None]]


class Plan(NamedTuple):
    """What a body asks for: its choices, what is shown of each, and how."""

    jobs: list[Job]
    outputs: list[Output]
    style: Style


class Generator:
    """Runs the jobs of a request while its client is there."""

    def __init__(
        self, preparer: Preparer, streams: Streams, metrics: GatewayMetrics, clock: Clock, log: Any,
        body_limit: int, receive_seconds: float, traces: Traces,
    ) -> None:  # fmt: skip
        self.preparer = preparer
        self.body_limit = body_limit
        self.receive_seconds = receive_seconds
        self.active = 0  # requests whose answer is not complete
        self.refusal = ""  # why nothing new is taken
        self._streams = streams
        self.metrics = metrics
        self._clock = clock
        self._log = log
        self.traces = traces
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def taking(self, caller: Caller, timeout: float | None = None) -> Iterator[Permit]:
        """A request, until its answer is complete, by whichever door it came. Raises why none is taken. Its span is the
        current one: the door began it, for whatever it refuses itself belongs there, too."""
        if self.refusal:
            raise Draining(self.refusal)
        self.active += 1
        self.metrics.running.set(self.active)
        try:
            span = current()
            span.set({"gen_ai.request.model": self.preparer.name})
            if caller.key.name:
                span.set({"moecule.key": caller.key.name})
            with caller.request(timeout) as permit:
                yield permit
        except MoeculeError as error:
            self.metrics.failed(error.code, caller.key.name)
            raise
        finally:
            self.active -= 1
            self.metrics.running.set(self.active)

    async def plan(self, body: AnyBody, permit: Permit) -> Plan:
        """Raises why the body cannot be answered."""
        check(body)
        preparer = self.preparer
        if isinstance(body, ChatBody):
            jobs = await preparer.chat(body)
            style: Style = ChatStyle(preparer.tokenizer, Wanted.of(body))
        else:
            jobs = await preparer.completion(body)
            style = TextStyle(preparer.tokenizer, Wanted.of(body))
        jobs = permit.take(jobs, body.priority, body.timeout)
        split = isinstance(body, ChatBody) and preparer.tokenizer.reasons
        return Plan(jobs, [Output(job, preparer.pieces(body), split_reasoning=split) for job in jobs], style)

    def warn_unknown(self, names: list[str]) -> None:
        for name in names:
            if name not in self._warned and len(self._warned) < REMEMBERED_FIELDS:
                self._warned.add(name)
                self._log.warning("an unknown field of a request is ignored", field=name)

    async def read_body(self, scope: Scope, receive: Receive, kind: type[AnyStruct]) -> AnyStruct:
        """Raises InvalidRequest, BodyTooLarge, BodyTimeout or RequestCancelled; fields that are unknown are warned
        about once."""
        try:
            data = await within(self._clock, self.receive_seconds, read_all(scope, receive, self.body_limit))
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive within {self.receive_seconds:g} s") from None
        body, unknown = decode_body(data, kind)
        self.warn_unknown(unknown)
        return body

    async def run(self, jobs: list[Job], outputs: list[Output], receive: Receive, on_delta: OnDelta) -> None:
        """Raises RequestCancelled when the client leaves, or the error that ended one of the choices."""
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(_until_gone(receive))
                choices = [
                    group.create_task(self._follow(job, output, on_delta))
                    for job, output in zip(jobs, outputs, strict=True)
                ]
                await asyncio.wait(choices)
                watcher.cancel()
        except BaseExceptionGroup as failures:
            raise first_leaf(failures) from failures
        finally:
            if (span := current()).traceparent:
                span.set(_attributes(jobs, outputs))

    async def run_told(
        self, jobs: list[Job], outputs: list[Output], receive: Receive, on_delta: OnDelta, events: EventStream
    ) -> MoeculeError | None:
        """`run`, whose error is returned once `events` has begun: what remains is to tell of it there. Until the first
        event the answer can still be an HTTP error, which clients retry by themselves."""
        try:
            await self.run(jobs, outputs, receive, on_delta)
        except MoeculeError as error:
            if not events.begun or isinstance(error, RequestCancelled):
                raise
            self.metrics.failed(error.code, jobs[0].tenant)
            current().fail(error)
            return error
        return None

    async def _follow(self, job: Job, output: Output, on_delta: OnDelta) -> None:
        began = last = self._clock.now()
        async with _blaming(job), self._streams.open(job) as stream:
            finish, first = None, True
            while finish is None:
                delta = output.push(await stream.read())
                finish = delta.finish
                now = self._clock.now()
                (self.metrics.first_token if first else self.metrics.next_tokens)(now - last)
                last, first = now, False
                if delta:
                    await on_delta(job.index, delta)
        self.metrics.finished(finish, last - began, len(job.prompt), output.completion_tokens, job.tenant)


class Endpoint(Generic[Body]):
    """An ASGI application for one kind of body."""

    def __init__(self, generator: Generator, kind: type[Body]) -> None:
        self._generator = generator
        self._kind: type[Body] = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generator.taking(scope["moecule.caller"], timeout_of(scope)) as permit:
            await self.answer(permit, scope, receive, send)

    async def answer(self, permit: Permit, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._generator.read_body(scope, receive, self._kind)
        jobs, outputs, style = await self._generator.plan(body, permit)
        include_usage = bool(body.stream) and body.include_usage
        name = self._generator.preparer.name
        writer = Writer(style, scope["moecule.request_id"], name, include_usage=include_usage)
        if body.stream:
            await self._stream(body, jobs, outputs, writer, receive, send)
        else:
            await self._whole(body, jobs, outputs, writer, receive, send)

    async def _whole(
        self, body: Body, jobs: list[Job], outputs: list[Output], writer: Writer, receive: Receive, send: Send
    ) -> None:
        deltas = [Delta() for _ in jobs]

        async def keep(index: int, delta: Delta) -> None:
            deltas[index].add(delta)

        await self._generator.run(jobs, outputs, receive, keep)
        size = sum(map(entries, deltas))
        data = await off_loop(size, writer.whole, deltas, usage_of(body, jobs, outputs))
        await send_json(send, data)

    async def _stream(
        self, body: Body, jobs: list[Job], outputs: list[Output], writer: Writer, receive: Receive, send: Send
    ) -> None:
        events = EventStream(send)

        async def pass_on(index: int, delta: Delta) -> None:
            usage = usage_of(body, jobs, outputs) if body.continuous_usage else None
            await events.send(await off_loop(entries(delta), writer.part, index, delta, usage))

        if error := await self._generator.run_told(jobs, outputs, receive, pass_on, events):
            await events.end(error_event(error))
            return
        if body.include_usage:
            await events.send(writer.usage(usage_of(body, jobs, outputs)))
        await events.end(DONE)


class EventStream:
    """Server-sent events; the response begins with the first one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def send(self, data: bytes, *, more: bool = True) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def end(self, data: bytes) -> None:
        await self.send(data, more=False)


async def send_json(send: Send, data: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """A whole answer."""
    length = (b"content-length", str(len(data)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*JSON_HEADERS, length, *headers]})
    await send({"type": "http.response.body", "body": data})


def usage_of(body: AnyBody, jobs: list[Job], outputs: list[Output]) -> Usage:
    """A prompt counts once, however many choices it has."""
    firsts = range(0, len(jobs), body.n or 1)
    prompt_tokens = sum(len(jobs[i].prompt) for i in firsts)
    return Usage.of(prompt_tokens, outputs, cached_tokens=sum(outputs[i].cached_tokens for i in firsts))


def _attributes(jobs: list[Job], outputs: list[Output]) -> Attributes:
    """By the names that OpenTelemetry has for them; the choices of a prompt share it."""
    prompts = {id(job.prompt): len(job.prompt) for job in jobs}
    return {
        "gen_ai.usage.input_tokens": sum(prompts.values()),
        "gen_ai.usage.output_tokens": sum(output.completion_tokens for output in outputs),
        "gen_ai.response.finish_reasons": [output.finish for output in outputs if output.finish],
    }


def timeout_of(scope: Scope) -> float | None:
    """Seconds that the header x-request-deadline-ms gives a request. Raises InvalidRequest."""
    text = scope["moecule.headers"].get(b"x-request-deadline-ms")
    if text is None:
        return None
    if not (text.isdigit() and len(text) < 10 and 1 <= int(text) <= MOST_MILLISECONDS):
        raise InvalidRequest(f"the header x-request-deadline-ms must be a whole number from 1 to {MOST_MILLISECONDS}")
    return int(text) / 1e3


async def read_all(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The request's body. Raises BodyTooLarge, or RequestCancelled when the client leaves meanwhile."""
    announced = scope["moecule.headers"].get(b"content-length", b"0")
    if not announced.isdigit():
        raise InvalidRequest("the content-length header is not a number")
    body, size, more = bytearray(), int(announced), True
    while more and size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestCancelled("the client left")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        size = max(size, len(body))
    if size > limit:
        raise BodyTooLarge(f"the body is larger than the limit of {limit} bytes")
    return bytes(body)


@contextlib.asynccontextmanager
async def _blaming(job: Job) -> AsyncIterator[None]:
    """Whatever field asked for the grammar, workers call it response_format."""
    try:
        yield
    except InvalidRequest as error:
        if error.param == "response_format" and job.grammar_field:
            error.param = job.grammar_field
        raise


def entries(delta: Delta) -> int:
    """Tokens whose logprobs or ids are to be written."""
    return len(delta.scored) + (len(delta.prompt.tokens) if delta.prompt else 0)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise RequestCancelled("the client left")
