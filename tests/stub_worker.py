"""Stand-ins for a worker and a scheduler: they speak the real subjects, and misbehave on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.bus import Bus
from common.errors import MoeculeError, NotFound
from common.messages import (
    Abort,
    Assign,
    Assigned,
    Generate,
    Message,
    Ok,
    Resume,
    SchedulerBeat,
    StepTokens,
    TokenChunk,
    TokenLogprobs,
    WorkerBeat,
    subject,
    subject_of_kind,
)

Script = Callable[[Generate], list[int]]


class StubWorker:
    """Answers each request with `script(request)`, a token a message; the last token ends it.

    `pause_at`: it stops before the token of this index until `resume_sending`. `lost` and `doubled`: indices of the
    tokens whose message gets lost, or comes twice.
    """

    def __init__(self, bus: Bus, worker_id: str, script: Script, *, boot_id: str = "boot-1") -> None:
        self.bus, self.id, self.boot_id, self.script = bus, worker_id, boot_id, script
        self.refusals: list[MoeculeError] = []  # of the next admissions
        self.admitted: list[Generate] = []
        self.pages_total = 0  # 0: not known
        self.aborted: list[str] = []
        self.resumed: list[Resume] = []
        self.pause_at: int | None = None
        self.lost: set[int] = set()
        self.doubled: set[int] = set()
        self.cached_tokens = 0
        self.end: dict[str, object] = {"finish": "stop"}  # fields of the last chunk
        self.deaf = False  # it has a subscription, and answers nothing
        self.abort_seen = asyncio.Event()
        self._go_on = asyncio.Event()
        self._known: dict[str, list[TokenChunk]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions = []

    async def start(self) -> None:
        for verb, handler in (("admit", self._on_admit), ("abort", self._on_abort), ("resume", self._on_resume)):
            self._subscriptions.append(
                await self.bus.subscribe(subject("worker", self.id, verb), handler, concurrency=4)
            )

    async def beat(self) -> None:
        beat = WorkerBeat(
            id=self.id, boot_id=self.boot_id, node="node", model="model", state="ready", map_version=1,
            pages_total=self.pages_total,
        )  # fmt: skip
        await self.bus.publish(subject("worker", self.id, "beat"), beat)

    def resume_sending(self) -> None:
        self._go_on.set()

    async def die(self) -> None:
        """As kill -9: nobody listens any more, and nothing more is sent."""
        await self.bus.close()
        for task in self._tasks:
            task.cancel()

    async def _on_admit(self, _: str, message: Message) -> Message:
        assert isinstance(message, Generate)
        if self.refusals:
            raise self.refusals.pop(0)
        self.admitted.append(message)
        self._known[message.request_id] = []
        task = asyncio.create_task(self._send_all(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return Ok()

    async def _on_abort(self, _: str, message: Message) -> None:
        assert isinstance(message, Abort)
        self.aborted += message.request_ids
        self.abort_seen.set()

    async def _on_resume(self, _: str, message: Message) -> Message:
        assert isinstance(message, Resume)
        self.resumed.append(message)
        if self.deaf:
            await asyncio.Event().wait()
        if message.request_id not in self._known:
            raise NotFound("this worker does not know the request")
        sent = [c for c in self._known[message.request_id] if c.index >= message.index]
        return StepTokens(worker_id=self.id, boot_id=self.boot_id, chunks=tuple(sent))

    async def _send_all(self, request: Generate) -> None:
        tokens = self.script(request)[: request.sampling.max_tokens]
        for i, token in enumerate(tokens):
            if i == self.pause_at:
                await self._go_on.wait()
            if request.request_id in self.aborted:
                return
            await self._send(request, i, token, last=i + 1 == len(tokens))
            for _ in range(10):  # turns of the loop, in which a gateway that keeps up passes the token on
                await asyncio.sleep(0)

    async def _send(self, request: Generate, index: int, token: int, last: bool) -> None:
        logprobs = None
        if request.sampling.logprobs is not None:
            top = (token, 331, 273)[: request.sampling.logprobs]
            logprobs = (TokenLogprobs(logprob=-0.5, top_ids=top, top_logprobs=(-0.5, -1.5, float("-inf"))[: len(top)]),)
        ending = self.end if last else {}
        if ending and len(self.script(request)) > request.sampling.max_tokens:
            ending = {"finish": "length"}
        chunk = TokenChunk(
            request_id=request.request_id,
            index=index,
            tokens=(token,),
            cached_tokens=self.cached_tokens,
            logprobs=logprobs,
            **ending,
        )
        self._known[request.request_id].append(chunk)
        message = StepTokens(worker_id=self.id, boot_id=self.boot_id, chunks=(chunk,))
        for _ in range(0 if index in self.lost else 2 if index in self.doubled else 1):
            await self.bus.publish(subject("gateway", request.gateway_id, "tokens"), message)


class StubScheduler:
    """Names the given workers in turn."""

    def __init__(self, bus: Bus, *workers: StubWorker) -> None:
        self.bus, self.workers = bus, list(workers)
        self.asked: list[Assign] = []
        self.refusal: MoeculeError | None = None
        self.deaf = False  # it has a subscription, and answers nothing
        self.reason = ""

    async def start(self) -> None:
        await self.bus.subscribe(subject_of_kind("assign"), self._on_assign)

    async def beat(self) -> None:
        beat = SchedulerBeat(id="scheduler", boot_id="boot", state="ready", map_version=1, reason=self.reason)
        await self.bus.publish(subject("scheduler", "scheduler", "beat"), beat)

    async def _on_assign(self, _: str, message: Message) -> Message:
        assert isinstance(message, Assign)
        self.asked.append(message)
        if self.deaf:
            await asyncio.Event().wait()
        if self.refusal:
            raise self.refusal
        worker = self.workers[(len(self.asked) - 1) % len(self.workers)]
        return Assigned(worker_id=worker.id, worker_boot_id=worker.boot_id)
