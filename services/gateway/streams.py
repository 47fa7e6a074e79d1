"""The gateway's side of requests in flight: they are assigned, admitted, followed, and ended when their worker is.

A worker numbers the tokens of a request. What is missing is asked for with Resume: at once when a later token comes,
after every reconnect, and when nothing came for a while. Late is not dead: a request is lost only when its worker has
another boot id, does not know the request, has nobody listening on its subject, or sent no heartbeat for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec

from common.actor import SILENT_SECONDS
from common.bus import Bus, Subscription
from common.clock import Clock, within
from common.errors import (
    BusTimeout,
    BusUnavailable,
    DeadlineExceeded,
    Draining,
    ExpertsUnavailable,
    MoeculeError,
    NoResponders,
    NotFound,
    NoWorker,
    Overloaded,
    WorkerLost,
    from_code,
)
from common.messages import (
    Abort,
    Assign,
    Assigned,
    Generate,
    Message,
    Resume,
    StepTokens,
    TokenChunk,
    WorkerBeat,
    subject,
    subject_of_kind,
)
from common.tracing import current
from services.gateway.metrics import GatewayMetrics
from services.gateway.peers import Peers
from services.gateway.prepare import Job

TICK_SECONDS = 0.1
QUIET_SECONDS = 0.5  # without tokens for so long, a stream asks; then after twice as long, up to SLOWEST
SLOWEST_SECONDS = 2.0
MISSED_SECONDS = 0.75  # three heartbeats of a worker are missing: its streams ask often
STOOD_STILL_SECONDS = 1.0  # heartbeats that came while we stood still are not read yet: their silence is ours
SETTLE_SECONDS = 2.0  # after a NATS restart subscriptions come back one by one: nobody listening means nothing yet
OVERDUE_SECONDS = 0.5  # after its deadline a request that its worker has not ended is ended here
ABORT_AGAIN_SECONDS = 0.5  # between two aborts of a request that goes on sending
FORGET_SECONDS = 10.0  # after which an ended request is not remembered

Spawn = Callable[[Coroutine[Any, Any, None], str], object]


class Stream:
    """One request's chunks, in order and each token once; those not read yet wait together (at most max_tokens)."""

    def __init__(self, request_id: str, opened: float, deadline: float | None = None) -> None:
        self.request_id = request_id
        self.worker_id = ""
        self.boot_id = ""
        self.opened = opened
        self.deadline = deadline
        self.admitted = False
        self.heard = opened  # when tokens last came
        self.next_index = 0
        self.ended = False
        self.asking = False
        self.ask_after = QUIET_SECONDS
        self.asked = opened
        self._chunks: list[TokenChunk] = []
        self.error: MoeculeError | None = None
        self._wake = asyncio.Event()

    def take(self, chunk: TokenChunk, now: float) -> bool:
        """Whether the chunk joins on; False: tokens before it are missing."""
        if self.ended:
            return True
        if chunk.index > self.next_index:
            return False
        fresh = _after(chunk, self.next_index)
        if fresh.tokens or fresh.finish:
            self.next_index += len(fresh.tokens)
            self.heard, self.ask_after = now, QUIET_SECONDS
            if fresh.finish in ("error", "abort"):
                given_up = WorkerLost(
                    f"worker {self.worker_id} gave the request up: it had not heard from this gateway"
                )
                self.fail(from_code(*fresh.error) if fresh.error else given_up)
            else:
                self._chunks.append(fresh)
                self.ended = fresh.finish is not None
                self._wake.set()
        return True

    def fail(self, error: MoeculeError) -> None:
        """End with `error`, after the chunks that came before it."""
        if not self.ended:
            self.error, self.ended = error, True
            self._wake.set()

    async def read(self) -> list[TokenChunk]:
        """All chunks that wait, at least one; raises what ended the stream early."""
        while not self._chunks:
            if self.error:
                raise self.error
            self._wake.clear()
            await self._wake.wait()
        chunks, self._chunks = self._chunks, []
        return chunks


class Streams:
    def __init__(
        self,
        bus: Bus,
        gateway_id: str,
        peers: Peers,
        metrics: GatewayMetrics,
        clock: Clock,
        spawn: Spawn,
        log: Any,
    ) -> None:
        self._bus = bus
        self._gateway_id = gateway_id
        self._peers = peers
        self._metrics = metrics
        self._clock = clock
        self._spawn = spawn
        self._log = log
        self._live: dict[str, Stream] = {}
        self._awake_since = 0.0  # when this process last began to run again, after it stood still
        self._aborted: dict[str, float] = {}  # request id -> when its abort was last sent

    async def start(self) -> Subscription:
        self._bus.on_reconnect(self._ask_all)
        subscription = await self._bus.subscribe(subject("gateway", self._gateway_id, "tokens"), self._on_tokens)
        self._spawn(self._watch(), "watch")
        return subscription

    def __len__(self) -> int:
        return len(self._live)

    def fail_all(self, error: MoeculeError) -> None:
        for stream in list(self._live.values()):
            self._end(stream, error)

    @contextlib.asynccontextmanager
    async def open(self, job: Job) -> AsyncIterator[Stream]:
        """The job's stream, admitted by a worker; leaving before its end aborts it. Raises why it was refused."""
        stream = Stream(secrets.token_hex(8), self._clock.now(), job.deadline)
        self._live[stream.request_id] = stream
        try:
            await self._admit_in_time(stream, job)
            yield stream
        finally:
            del self._live[stream.request_id]
            if stream.worker_id and not stream.ended:
                self._abort(stream.worker_id, stream.request_id)

    # ---- a request's way to a worker

    async def _admit_in_time(self, stream: Stream, job: Job) -> None:
        if job.deadline is None:
            await self._admit(stream, job)
            return
        try:
            if (left := job.deadline - self._clock.now()) <= 0:
                raise TimeoutError
            await within(self._clock, left, self._admit(stream, job))
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed before a worker took it") from None

    async def _admit(self, stream: Stream, job: Job) -> None:
        """A worker may have gone, filled up or begun to leave since the scheduler last heard it: ask once more then."""
        for attempt in (1, 2):
            await self._assign(stream, job)
            try:
                await self._bus.request(subject("worker", stream.worker_id, "admit"), self._generate(stream, job))
                break
            except (NoResponders, Overloaded, Draining, ExpertsUnavailable) as error:
                refused_by, stream.worker_id = stream.worker_id, ""
                if attempt == 2:
                    raise _refusal(error, refused_by) from error
            except MoeculeError as error:
                if not isinstance(error, BusUnavailable):
                    stream.worker_id = ""  # refused for good; after a time-out it may have been admitted: abort it
                raise
        stream.admitted = True
        stream.heard = self._clock.now()

    def _generate(self, stream: Stream, job: Job) -> Generate:
        return Generate(
            request_id=stream.request_id,
            gateway_id=self._gateway_id,
            prompt=job.prompt,
            sampling=job.sampling,
            tenant=job.tenant,
            priority=job.priority,
            traceparent=current().traceparent,
            deadline=None if job.deadline is None else job.deadline - self._clock.now(),
            salt=job.salt,
        )

    async def _assign(self, stream: Stream, job: Job) -> None:
        with current().child("assign") as span:
            ask = Assign(
                request_id=stream.request_id,
                prompt_tokens=len(job.prompt),
                max_tokens=job.sampling.max_tokens,
                page_hashes=job.page_hashes,
                tenant=job.tenant,
                traceparent=span.traceparent,
            )
            try:
                assigned = await self._bus.request(subject_of_kind("assign"), ask)
            except (NoResponders, BusTimeout) as error:
                raise NoWorker("the scheduler does not answer") from error
        assert isinstance(assigned, Assigned)
        stream.worker_id, stream.boot_id = assigned.worker_id, assigned.worker_boot_id

    # ---- tokens

    async def _on_tokens(self, _: str, message: Message) -> None:
        if isinstance(message, StepTokens):
            self._take(message)

    def _take(self, message: StepTokens) -> None:
        now = self._clock.now()
        for chunk in message.chunks:
            stream = self._live.get(chunk.request_id)
            if stream is None:
                self._abort_stray(message.worker_id, chunk, now)
            elif stream.boot_id == message.boot_id and not stream.take(chunk, now):
                self._metrics.gaps.inc()
                self._ask(stream)

    def _abort_stray(self, worker_id: str, chunk: TokenChunk, now: float) -> None:
        """An abort may get lost, or overtake the admission it means: whoever goes on sending is told again."""
        if chunk.finish is None and now - self._aborted.get(chunk.request_id, -FORGET_SECONDS) > ABORT_AGAIN_SECONDS:
            self._abort(worker_id, chunk.request_id)

    def _abort(self, worker_id: str, request_id: str) -> None:
        self._aborted[request_id] = self._clock.now()
        self._spawn(self._publish_abort(worker_id, request_id), "abort")

    async def _publish_abort(self, worker_id: str, request_id: str) -> None:
        try:
            await self._bus.publish(subject("worker", worker_id, "abort"), Abort(request_ids=(request_id,)))
        except BusUnavailable as error:
            self._log.warning("an abort was not sent", worker=worker_id, why=error.message)

    # ---- what is missing, and who is gone

    def take_beat(self, beat: WorkerBeat) -> None:
        """A new life of a worker knows nothing of the requests of its earlier one."""
        for stream in list(self._live.values()):
            if stream.worker_id == beat.id and stream.admitted and stream.boot_id < beat.boot_id:
                self._lose(stream, "it was restarted")

    async def _watch(self) -> None:
        before = self._clock.now()
        while True:
            await self._clock.sleep(TICK_SECONDS)
            now = self._clock.now()
            if now - before > STOOD_STILL_SECONDS:
                self._awake_since = now
            before = now
            for stream in list(self._live.values()):
                if stream.admitted and not stream.ended:
                    self._watch_one(stream, now)
            self._aborted = {i: at for i, at in self._aborted.items() if now - at < FORGET_SECONDS}

    def _watch_one(self, stream: Stream, now: float) -> None:
        silence = self._peers.silence(stream.worker_id, max(stream.opened, self._awake_since))
        wait = min(stream.ask_after, QUIET_SECONDS) if silence > MISSED_SECONDS else stream.ask_after
        if stream.deadline is not None and now - stream.deadline > OVERDUE_SECONDS:
            self._end(stream, DeadlineExceeded("the request's deadline passed, and its worker did not say so"))
        elif silence > SILENT_SECONDS:
            self._lose(stream, f"it sent no heartbeat for {silence:.1f} s")
        elif now - max(stream.heard, stream.asked) >= wait:
            stream.ask_after = min(2 * stream.ask_after, SLOWEST_SECONDS)
            self._ask(stream)

    async def _ask_all(self) -> None:
        for stream in list(self._live.values()):
            if stream.admitted and not stream.ended:
                self._ask(stream)

    def _ask(self, stream: Stream) -> None:
        if not stream.asking and self._bus.connected:
            stream.asking = True
            stream.asked = self._clock.now()
            self._spawn(self._resume(stream), "resume")

    async def _resume(self, stream: Stream) -> None:
        """Ask the stream's worker for the tokens from the next one on."""
        ask = Resume(request_id=stream.request_id, index=stream.next_index)
        try:
            reply = await self._bus.request(subject("worker", stream.worker_id, "resume"), ask)
        except NotFound:
            self._lose(stream, "it does not know the request")
        except NoResponders:
            if self._bus.connected_for() > SETTLE_SECONDS:
                self._lose_all(stream.worker_id, stream.boot_id, "nobody listens on its subject")
        except MoeculeError as error:
            self._log.info("asked in vain for tokens", worker=stream.worker_id, why=error.message)
        else:
            if isinstance(reply, StepTokens) and reply.boot_id != stream.boot_id:
                self._lose(stream, "it was restarted")
            elif isinstance(reply, StepTokens):
                self._take(reply)
        finally:
            stream.asking = False

    def _lose_all(self, worker_id: str, boot_id: str, why: str) -> None:
        for stream in list(self._live.values()):
            if (stream.worker_id, stream.boot_id) == (worker_id, boot_id) and stream.admitted:
                self._lose(stream, why)

    def _lose(self, stream: Stream, why: str) -> None:
        if not stream.ended:
            self._metrics.lost.inc()
            self._log.warning("worker lost", worker=stream.worker_id, request=stream.request_id, why=why)
            self._end(stream, WorkerLost(f"worker {stream.worker_id} is gone: {why}"))

    def _end(self, stream: Stream, error: MoeculeError) -> None:
        """The worker may be alive after all (or we leave it): it is told, so that the pages are free."""
        if not stream.ended:
            stream.fail(error)
            if stream.worker_id:
                self._abort(stream.worker_id, stream.request_id)


def _after(chunk: TokenChunk, index: int) -> TokenChunk:
    """The part of a chunk from output index `index` on."""
    skip = index - chunk.index
    if skip <= 0:
        return chunk
    logprobs = chunk.logprobs[skip:] if chunk.logprobs else None
    return msgspec.structs.replace(chunk, index=index, tokens=chunk.tokens[skip:], logprobs=logprobs)


def _refusal(error: MoeculeError, worker_id: str) -> MoeculeError:
    if isinstance(error, NoResponders):
        return NoWorker(f"worker {worker_id} does not answer")
    return error
