"""How a planned step is computed. A runner whose steps overlap lets the next be launched before this one has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from structlog.typing import FilteringBoundLogger

from common.link import PeerLost
from services.gpu_worker.model import Cache, Model
from services.gpu_worker.planner import Plan
from services.gpu_worker.sampler import Sampled, Sampler
from services.gpu_worker.scoring import Scored, score_prompts
from services.gpu_worker.step import build_batch


class StepFailed(Exception):
    """A shard did not answer in this step, so nothing that it computed holds, nor what was launched behind it."""


@dataclass(frozen=True)
class Computed:
    """What a step found out, before anything is changed by it."""

    sampled: Sampled  # of plan.samples
    scored: list[Scored] = field(default_factory=list)
    seconds: float = 0.0  # that the step took, on the device where there is one


class Runner(Protocol):
    overlaps: bool

    def begin(self) -> None:
        """By the thread that will launch, before the first step."""
        ...

    def launch(self, plan: Plan, late: bool = False) -> Any:
        """Start a step, as its sequences stand. Raises ExpertsUnavailable where it cannot be computed; then nothing has
        changed. `late`: its decodes are sampled by `complete`, once the step before has been seen, for what a grammar
        lets follow. Where steps overlap only."""
        ...

    def complete(self, launched: Any) -> None:
        """The rest of a step that was launched `late`."""
        ...

    def finish(self, launched: Any) -> Computed:
        """Wait for the oldest step that is under way, which `launched` is of. Raises StepFailed."""
        ...

    def discard(self, launched: Any) -> None:
        """Wait for it, whose results nobody wants."""
        ...


class CpuRunner:
    """Forward, then sample; nothing overlaps."""

    overlaps = False

    def __init__(self, model: Model, cache: Cache, sampler: Sampler, log: FilteringBoundLogger) -> None:
        self._model, self._cache, self._sampler, self._log = model, cache, sampler, log

    def begin(self) -> None:
        pass

    def launch(self, plan: Plan, late: bool = False) -> Computed:
        """A peer that dies fails the step, which then runs again from its start with a live copy (experts are pure and
        KV rows are overwritten in place)."""
        started = time.perf_counter()
        model, batch, mask = self._model, build_batch(plan), self._sampler.begin(plan.sampled)
        assert model.link is not None
        while True:
            try:
                model.link.begin_step()
                hidden = model.hidden(batch, self._cache)
                logits = model.logits(hidden, batch.logit_rows)
                out = torch.empty(len(logits), dtype=torch.int64)
                logs = self._sampler.sample(plan.sampled, logits, out, mask)
                sampled = Sampled.of(plan.sampled, out.tolist(), logs)
                scored = [scoring.read() for scoring in score_prompts(model, plan, hidden)]
                return Computed(sampled, scored, time.perf_counter() - started)
            except PeerLost as lost:
                self._log.warning("a shard was lost in mid step", shard=lost.shard_id)

    def complete(self, launched: Computed) -> None:
        pass

    def finish(self, launched: Computed) -> Computed:
        return launched

    def discard(self, launched: Computed) -> None:
        pass
