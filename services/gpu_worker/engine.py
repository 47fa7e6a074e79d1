"""The step loop: take what arrived -> plan -> forward -> sample -> commit -> emit. One thread owns all of it.

Other threads only leave notes (`submit`, `abort`, `fail_all`) and receive what each step produced through `emit`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from structlog.typing import FilteringBoundLogger

from common.errors import ExpertsUnavailable, InternalError, MoeculeError
from common.link import PeerLost
from common.messages import FinishReason, Generate, TokenChunk
from common.model_config import ModelConfig
from services.gpu_worker.model import Model
from services.gpu_worker.planner import Plan, Planner, Sequence
from services.gpu_worker.step import Sampled, build_batch, sample_rows


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


@dataclass(frozen=True)
class StepOutput:
    chunks: dict[str, list[TokenChunk]]  # gateway id -> its streams' tokens
    added: list[bytes]  # page hashes that the prefix cache gained
    evicted: list[bytes]
    stats: Stats


class Engine:
    def __init__(
        self,
        config: ModelConfig,
        model: Model,
        planner: Planner,
        emit: Callable[[StepOutput], None],
        log: FilteringBoundLogger,
    ) -> None:
        self.config = config
        self.model = model
        self.planner = planner
        self.cache = model.new_cache(planner.allocator.total)
        self._emit = emit
        self._log = log
        self._live: dict[str, Sequence] = {}
        self._notes: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._ended: dict[str, list[TokenChunk]] = {}  # what ended outside of sampling, told with the next emit
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

    def submit(self, request: Generate) -> None:
        self._note(lambda: self._add(request))

    def abort(self, request_ids: Iterable[str], error: MoeculeError | None = None) -> None:
        """End these requests; their pages are free at the end of the step in flight. Unknown ones are ignored."""
        ids = tuple(request_ids)
        self._note(lambda: self._end(ids, error))

    def _note(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._notes.append(action)
            self._wake.notify()

    # ---- the engine's thread

    def _loop(self) -> None:
        torch.set_grad_enabled(False)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._take_notes()
                    self.step()
        except BaseException as error:
            self.crashed = error
            self._log.exception("the step loop crashed")
            self._end(tuple(self._live), InternalError("the worker failed; see its log"))
            self._tell({}, Stats(0, 0, 0, 0))
            raise

    def _take_notes(self) -> None:
        with self._wake:
            while not (self._notes or self.planner.running or self.planner.waiting or self._ended):
                self._wake.wait()
            notes, self._notes = self._notes, deque()
        for action in notes:
            action()

    def step(self) -> None:
        started = time.perf_counter()
        plan = self.planner.plan()
        sampled = self._compute(plan) if plan else None
        chunks: dict[str, list[TokenChunk]] = {}
        if sampled is not None:
            self.planner.commit(plan)
            chunks = self._advance(plan, sampled)
        self._tell(chunks, self._stats(plan, time.perf_counter() - started))

    def _compute(self, plan: Plan) -> Sampled | None:
        """Forward and sample. A peer that dies fails the step, which then runs again from its start with a live
        copy (experts are pure and KV rows are overwritten in place), or ends its requests if there is none."""
        batch = build_batch(plan)
        while True:
            try:
                self.model.link.begin_step()
                logits = self.model.forward(batch, self.cache)
                return sample_rows(self.config, plan, logits)
            except PeerLost as lost:
                self._log.warning("a shard was lost in mid step", shard=lost.shard_id)
            except ExpertsUnavailable as error:
                # Whoever waits would meet the same hole: answer all, nothing hangs.
                self._end(tuple(self._live), error)
                return None

    def _advance(self, plan: Plan, sampled: Sampled) -> dict[str, list[TokenChunk]]:
        chunks: dict[str, list[TokenChunk]] = {}
        rows = (chunk.sequence for chunk in plan.chunks if chunk.sampled)
        for row, sequence in enumerate(list(rows)):
            token = sampled.tokens[row]
            index = sequence.outputs
            sequence.tokens.append(token)
            chunk = TokenChunk(
                request_id=sequence.request.request_id,
                index=index,
                tokens=(token,),
                finish=_finish(sequence, token, self.config.eos_ids),
                stop_token=token if _stops(sequence, token, self.config.eos_ids) else None,
                cached_tokens=sequence.cached,
                logprobs=(sampled.logprobs[row],) if row in sampled.logprobs else None,
            )
            chunks.setdefault(sequence.request.gateway_id, []).append(chunk)
            if chunk.finish:
                self._forget(sequence)
        return chunks

    def _add(self, request: Generate) -> None:
        self._live[request.request_id] = self.planner.add(request)

    def _end(self, request_ids: Iterable[str], error: MoeculeError | None) -> None:
        for request_id in request_ids:
            if sequence := self._live.get(request_id):
                chunk = TokenChunk(
                    request_id=request_id,
                    index=sequence.outputs,
                    tokens=(),
                    finish="error" if error else "abort",
                    error=(error.code, error.message) if error else None,
                )
                self._ended.setdefault(sequence.request.gateway_id, []).append(chunk)
                self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.planner.remove(sequence)
        del self._live[sequence.request.request_id]

    def _tell(self, chunks: dict[str, list[TokenChunk]], stats: Stats) -> None:
        ended, self._ended = self._ended, {}
        for gateway_id, more in ended.items():
            chunks.setdefault(gateway_id, []).extend(more)
        added, evicted = self.planner.allocator.take_changes()
        self._emit(StepOutput(chunks, added, evicted, stats))

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


def _stops(sequence: Sequence, token: int, eos_ids: tuple[int, ...]) -> bool:
    sampling = sequence.request.sampling
    return token in sampling.stop_token_ids or (token in eos_ids and not sampling.ignore_eos)


def _finish(sequence: Sequence, token: int, eos_ids: tuple[int, ...]) -> FinishReason | None:
    if _stops(sequence, token, eos_ids):
        return "stop"
    return "length" if sequence.outputs >= sequence.request.sampling.max_tokens else None
