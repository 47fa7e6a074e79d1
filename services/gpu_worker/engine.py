"""The step loop: take what arrived -> plan -> launch -> take in what the step before found -> emit. One thread owns
all of it.

Other threads only leave notes (`submit`, `abort`, `fail_all`) and receive what each step produced through `emit`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from structlog.typing import FilteringBoundLogger

from common.errors import ExpertsUnavailable, InternalError, InvalidRequest, MoeculeError
from common.messages import FinishReason, Generate, TokenChunk, TokenLogprobs
from common.model_config import ModelConfig
from common.promises import Promises
from services.gpu_worker.planner import Plan, Planner, Sequence
from services.gpu_worker.runner import Computed, Runner, StepFailed
from services.gpu_worker.sampler import Sampler
from services.gpu_worker.waits import TenantWaits

if TYPE_CHECKING:
    from services.gpu_worker.grammar import Constraint


@dataclass(frozen=True)
class Stats:
    """What one step did, for metrics and heartbeats."""

    running: int
    waiting: int
    pending_tokens: int
    pages_used: int
    prefill_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """A request that ended: when it came, when a step first computed of it, when its first token was known and when its
    last, all of perf_counter(). 0: it ended before."""

    request_id: str
    arrived: float
    started: float
    answered: float
    ended: float
    preemptions: int

    @property
    def queue(self) -> float:
        return self.started - self.arrived

    @property
    def prefill(self) -> float:
        return self.answered - self.started

    @property
    def decode(self) -> float:
        return self.ended - self.answered


@dataclass(frozen=True)
class StepOutput:
    chunks: dict[str, list[TokenChunk]]  # gateway id -> its streams' tokens
    added: list[bytes]  # page hashes that the prefix cache gained
    evicted: list[bytes]
    stats: Stats
    ended: list[RequestTimes] = field(default_factory=list)
    cut: list[RequestTimes] = field(default_factory=list)  # those that did not come to their end


@dataclass(frozen=True)
class Step:
    """One under way."""

    plan: Plan
    launched: Any  # the runner's


class Engine:
    def __init__(
        self,
        config: ModelConfig,
        runner: Runner,
        planner: Planner,
        sampler: Sampler,
        emit: Callable[[StepOutput], None],
        log: FilteringBoundLogger,
    ) -> None:
        self.config = config
        self.planner = planner
        self.runner = runner
        self.waits = TenantWaits()
        self._sampler = sampler
        self._under_way: Step | None = None
        self._told = time.perf_counter()  # when the last step ended
        self._emit = emit
        self._log = log
        self._live: dict[str, Sequence] = {}
        self._notes: deque[Callable[[], None]] = deque()
        self._promises = Promises()
        self._wake = threading.Condition()
        self._stopping = False
        self._ended: dict[str, list[TokenChunk]] = {}  # what ended outside of sampling, told with the next emit
        self._times: list[RequestTimes] = []  # of requests that came to their end since the last emit
        self._cut: list[RequestTimes] = []  # and of those that did not
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.crashed: BaseException | None = None

    # ---- called from any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Return when the step in flight has ended. Requests that are left end silently."""
        self._stopping = True
        self._note(lambda: None)
        if self._thread.is_alive():
            self._thread.join()
        self._sampler.close()

    def submit(self, request: Generate, constraint: Constraint | None = None) -> None:
        arrived = time.perf_counter()  # not when it is taken up: that is when the step under way has ended
        self._note(lambda: self._add(request, constraint, arrived))

    def abort(self, request_ids: Iterable[str], error: MoeculeError | None = None) -> None:
        """End these requests; their pages are free at the end of the step in flight. Unknown ones are ignored."""
        ids = tuple(request_ids)
        self._note(lambda: self._end(ids, error))

    def forget_pages(self) -> Future[None]:
        """Empty the prefix cache between two steps; done when that has happened."""
        done: Future[None] = Future()

        def forget() -> None:
            self.planner.allocator.forget()
            if done.set_running_or_notify_cancel():  # else who asked has gone
                done.set_result(None)

        self._promises.add(done)
        self._note(forget)
        return done

    def _note(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._notes.append(action)
            self._wake.notify()

    # ---- the engine's thread

    def _loop(self) -> None:
        torch.set_grad_enabled(False)
        try:
            with torch.inference_mode():
                self.runner.begin()
                while not self._stopping:
                    self._take_notes()
                    self.step()
        except BaseException as error:
            self.crashed = error
            self._log.exception("the step loop crashed")
            failed = InternalError("the worker failed; see its log")
            self._promises.refuse(failed)
            self._end(tuple(self._live), failed)
            self._tell({}, Stats(0, 0, 0, 0))
            raise

    def _take_notes(self) -> None:
        with self._wake:
            while not (self._notes or self._under_way or self.planner.running or self.planner.waiting or self._ended):
                self._wake.wait()
                self._told = time.perf_counter()
            notes, self._notes = self._notes, deque()
        for action in notes:
            action()

    def step(self) -> None:
        """Launch the next step, then take in the one before it; or, where steps do not overlap, this one itself."""
        before, self._under_way = self._under_way, None
        chunks: dict[str, list[TokenChunk]] = {}
        plan = self.planner.plan()
        # What these may sample depends on tokens that have not been seen: what a grammar lets follow.
        late = any(c.sequence.constraint is not None and c.sequence.unknown for c in plan.decodes)
        self._note_started(time.perf_counter())
        if plan:
            self._under_way = self._launch(plan, late)
        if not self.runner.overlaps:
            before, self._under_way = self._under_way, None
        if before is not None:
            chunks = self._finish(before)
        if late and self._under_way is not None:
            self.runner.complete(self._under_way.launched)
        now = time.perf_counter()
        self._tell(chunks, self._stats(plan, now - self._told))
        self._told = now

    def _note_started(self, now: float) -> None:
        started = self.planner.take_started()
        for sequence in started:
            sequence.started = now
        self.waits.add(started, now)

    def _launch(self, plan: Plan, late: bool) -> Step | None:
        try:
            launched = self.runner.launch(plan, late)
        except ExpertsUnavailable as error:
            # Whoever waits would meet the same hole: answer all, nothing hangs.
            self._end(tuple(self._live), error)
            return None
        self.planner.advance(plan)
        return Step(plan, launched)

    def _finish(self, step: Step) -> dict[str, list[TokenChunk]]:
        try:
            computed, planner = self.runner.finish(step.launched), self.planner
        except StepFailed as failed:
            self._undo(step, failed)
            return {}
        prompts = [(chunk.start, chunk.rows) for chunk in step.plan.prefills]
        # A running stream waits from the end of one step to that of the next, also where the device did for the host.
        seconds = max(computed.seconds, time.perf_counter() - self._told)
        planner.pace.learn(len(step.plan.decodes), prompts, seconds)
        planner.publish(step.plan)
        return self._take_in(step.plan, computed)

    def _undo(self, step: Step, failed: StepFailed) -> None:
        """As if `step`, and the one launched behind it, had never been: what they were to compute is planned again."""
        behind, self._under_way = self._under_way, None
        self._log.warning("a step failed and runs again", why=str(failed), rows=len(step.plan.chunks))
        if behind is not None:
            self.runner.discard(behind.launched)
            self.planner.undo(behind.plan)
        self.planner.undo(step.plan)

    def _take_in(self, plan: Plan, computed: Computed) -> dict[str, list[TokenChunk]]:
        chunks: dict[str, list[TokenChunk]] = {}
        for scored in computed.scored:
            assert scored.sequence.scores is not None
            scored.sequence.scores += scored.scores
        sampled, now = computed.sampled, time.perf_counter()
        for row, (chunk, token) in enumerate(zip(plan.samples, sampled.tokens, strict=True)):
            sequence = chunk.sequence
            if self._live.get(sequence.request.request_id) is not sequence:
                continue  # it ended while this step was under way
            try:
                told = self._take(sequence, chunk.end, token, sampled.logprobs.get(row))
            except InvalidRequest as error:
                self._end((sequence.request.request_id,), error)
                continue
            chunks.setdefault(sequence.request.gateway_id, []).append(told)
            sequence.answered = sequence.answered or now
            if told.finish:
                self._times.append(_times(sequence, now))
                self._forget(sequence)
        return chunks

    def _take(self, sequence: Sequence, at: int, token: int, logprobs: TokenLogprobs | None) -> TokenChunk:
        """The token at `at` is known; what is told of it. Raises InvalidRequest if the grammar cannot be followed."""
        index = at - sequence.prompt_len
        if sequence.request.sampling.max_tokens == 0:
            return TokenChunk(
                request_id=sequence.request.request_id,
                index=index,
                tokens=(),
                finish="length",
                cached_tokens=sequence.cached,
                prompt_logprobs=_prompt_logprobs(sequence),
            )
        if sequence.constraint is not None:
            sequence.constraint.take(token)
        sequence.tokens[at] = token
        return TokenChunk(
            request_id=sequence.request.request_id,
            index=index,
            tokens=(token,),
            finish=_finish(sequence, index + 1, token, self.config.eos_ids),
            stop_token=token if _stops(sequence, token, self.config.eos_ids) else None,
            cached_tokens=sequence.cached,
            logprobs=(logprobs,) if logprobs is not None else None,
            prompt_logprobs=None if index else _prompt_logprobs(sequence),
        )

    def _add(self, request: Generate, constraint: Constraint | None, arrived: float) -> None:
        sequence = self._live[request.request_id] = self.planner.add(request, constraint)
        sequence.arrived = arrived
        self._sampler.add(sequence)

    def _end(self, request_ids: Iterable[str], error: MoeculeError | None) -> None:
        for request_id in request_ids:
            if sequence := self._live.get(request_id):
                chunk = TokenChunk(
                    request_id=request_id,
                    index=sequence.outputs - sequence.unknown,
                    tokens=(),
                    finish="error" if error else "abort",
                    error=(error.code, error.message) if error else None,
                )
                self._ended.setdefault(sequence.request.gateway_id, []).append(chunk)
                self._cut.append(_times(sequence, time.perf_counter()))
                self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.planner.remove(sequence)
        self._sampler.forget(sequence)
        del self._live[sequence.request.request_id]

    def _tell(self, chunks: dict[str, list[TokenChunk]], stats: Stats) -> None:
        ended, self._ended = self._ended, {}
        for gateway_id, more in ended.items():
            chunks.setdefault(gateway_id, []).extend(more)
        added, evicted = self.planner.allocator.take_changes()
        times, self._times = self._times, []
        cut, self._cut = self._cut, []
        self._emit(StepOutput(chunks, added, evicted, stats, times, cut))

    def _stats(self, plan: Plan, seconds: float) -> Stats:
        planner = self.planner
        first = [c.sequence for c in plan.prefills if c.start == c.sequence.cached and not c.sequence.preemptions]
        return Stats(
            running=len(planner.running),
            waiting=planner.waiting,
            pending_tokens=sum(len(s.tokens) - s.computed for s in planner.sequences()),
            pages_used=planner.allocator.owned,
            prefill_tokens=sum(c.rows for c in plan.prefills),
            cached_tokens=sum(s.cached for s in first),
            preemptions=planner.take_preemptions(),
            seconds=seconds,
        )


def _times(sequence: Sequence, now: float) -> RequestTimes:
    marks = sequence.arrived, sequence.started, sequence.answered
    return RequestTimes(sequence.request.request_id, *marks, now, sequence.preemptions)


def _stops(sequence: Sequence, token: int, eos_ids: tuple[int, ...]) -> bool:
    sampling = sequence.request.sampling
    return token in sampling.stop_token_ids or (token in eos_ids and not sampling.ignore_eos)


def _finish(sequence: Sequence, outputs: int, token: int, eos_ids: tuple[int, ...]) -> FinishReason | None:
    if _stops(sequence, token, eos_ids):
        return "stop"
    if sequence.constraint is not None and sequence.constraint.complete:
        return "stop"
    return "length" if outputs >= sequence.request.sampling.max_tokens else None


def _prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
    """Nothing comes before the first token that could predict it."""
    return None if sequence.scores is None else (None, *sequence.scores)
