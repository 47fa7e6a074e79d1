"""What the step loop makes of steps that fail while the next one is under way: the text is as if they had not been."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ExpertsUnavailable
from common.messages import Generate, Sampling, TokenChunk
from common.model_config import ModelConfig
from services.gpu_worker.engine import Engine, StepOutput
from services.gpu_worker.pace import Pace
from services.gpu_worker.pages import PageAllocator
from services.gpu_worker.planner import UNKNOWN, Plan, Planner
from services.gpu_worker.runner import Computed, StepFailed
from services.gpu_worker.sampler import Sampled, Sampler

CONFIG = ModelConfig.load(Path(__file__).parent.parent / "models" / "tiny")


@dataclass
class Launched:
    plan: Plan
    tokens: list[int]
    ok: bool
    complete: bool


class Constraint:
    """A grammar that anything follows: what it was told of."""

    complete = free = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, token: int) -> None:
        self.taken.append(token)


class Runner:
    """Its tokens are a function of request and position. A step fails with all that are launched behind it, until the
    failed ones have been seen."""

    overlaps = True

    def __init__(self, failing: set[int], gone_after: int = 1 << 30) -> None:
        self._failing, self._gone_after = failing, gone_after
        self.launches, self.under_way, self._ok = 0, 0, True
        self.late = 0  # launches

    def launch(self, plan: Plan, late: bool = False) -> Launched:
        assert self.under_way or not late
        self.late += late
        if not self.under_way:
            self._ok = True
        if self.launches >= self._gone_after:
            raise ExpertsUnavailable("no shard")
        self.launches += 1
        self.under_way += 1
        self._ok = self._ok and self.launches not in self._failing
        for chunk in plan.chunks:
            assert len(chunk.sequence.pages) * 64 >= chunk.end
            known = chunk.sequence.tokens[chunk.start : chunk.end]
            assert UNKNOWN not in known[:-1] and (self.under_way > 1 or UNKNOWN not in known)
        tokens = [token_of(s.request.request_id, len(s.tokens)) for s in plan.sampled]
        return Launched(plan, tokens, self._ok, not late)

    def complete(self, launched: Launched) -> None:
        assert not launched.complete and self.under_way == 1, "the step before has been seen"
        launched.complete = True

    def finish(self, launched: Launched) -> Computed:
        assert launched.complete
        self.under_way -= 1
        if not launched.ok:
            raise StepFailed("a shard did not answer")
        return Computed(Sampled(launched.tokens, {}))

    def discard(self, launched: Launched) -> None:
        self.under_way -= 1
        assert not launched.ok


def token_of(request_id: str, at: int) -> int:
    return 3 + hash((request_id, at)) % 2000


class Run:
    def __init__(self, runner: Runner, pages: int, requests: list[Generate], grammars: int = 0) -> None:
        """The first `grammars` of them follow one."""
        self.constraints = [Constraint() for _ in range(grammars)]
        self.told: dict[str, list[TokenChunk]] = defaultdict(list)
        planner = Planner(PageAllocator(pages), "m", max_batch=4, pace=Pace(96), prefix_cache=True)
        sampler = Sampler(CONFIG, max_batch=4, threads=1)
        self.engine = Engine(CONFIG, runner, planner, sampler, self._emit, structlog.get_logger())
        for request, constraint in itertools.zip_longest(requests, self.constraints):
            self.engine.submit(request, constraint)
        self.engine._take_notes()
        while planner.running or planner.waiting or self.engine._under_way:
            self.engine.step()
        self.engine.step()
        planner.check()
        assert planner.allocator.owned == 0 and runner.under_way == 0

    def _emit(self, output: StepOutput) -> None:
        for chunks in output.chunks.values():
            for chunk in chunks:
                self.told[chunk.request_id].append(chunk)


def requests_of(lengths: list[tuple[int, int]]) -> list[Generate]:
    return [
        Generate(request_id=f"r{i}", gateway_id="g", prompt=tuple(range(3, 3 + prompt)),
                 sampling=Sampling(max_tokens=outputs, ignore_eos=True))
        for i, (prompt, outputs) in enumerate(lengths)
    ]  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 80)), min_size=1, max_size=6),
    failing=st.sets(st.integers(1, 60), max_size=12),
    pages=st.integers(5, 20),
    grammars=st.integers(0, 2),
)
def test_no_token_is_lost_or_told_twice(
    lengths: list[tuple[int, int]], failing: set[int], pages: int, grammars: int
) -> None:
    grammars = min(grammars, len(lengths))
    runner = Runner(failing)
    run = Run(runner, pages, requests_of(lengths), grammars)
    assert bool(runner.late) == any(outputs > 1 for _, outputs in lengths[:grammars])
    for (prompt, outputs), constraint, i in zip(lengths, run.constraints, itertools.count(), strict=False):
        assert constraint.taken == [token_of(f"r{i}", prompt + n) for n in range(outputs)]
    for i, (prompt, outputs) in enumerate(lengths):
        chunks = run.told[f"r{i}"]
        assert [chunk.index for chunk in chunks] == list(range(outputs))
        assert [chunk.tokens[0] for chunk in chunks] == [token_of(f"r{i}", prompt + n) for n in range(outputs)]
        assert [chunk.finish for chunk in chunks] == [None] * (outputs - 1) + ["length"]


@settings(deadline=None, max_examples=40)
@given(gone_after=st.integers(0, 30), failing=st.sets(st.integers(1, 30), max_size=6))
def test_when_no_shard_is_left_all_requests_end_with_a_reason(gone_after: int, failing: set[int]) -> None:
    run = Run(Runner(failing, gone_after), 12, requests_of([(70, 90), (3, 90), (150, 90)]))
    for i in range(3):
        last = run.told[f"r{i}"][-1]
        assert last.finish == "error" and last.error == ("experts_unavailable", "no shard")
        assert last.index == len(run.told[f"r{i}"]) - 1
