"""Steps that overlap change no token: the engine with a runner that hides each step's tokens until the next has been
launched, as a GPU's does, against the one that does not overlap."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import structlog
import torch

from common.checkpoint import Checkpoint
from common.errors import InternalError
from common.link import LocalLink
from common.messages import Generate, Grammar, TokenChunk, TokenLogprobs
from common.model_config import ModelConfig
from common.pages import page_hashes
from kernels.sample import Logprobs
from services.expert_shard.experts import ExpertStore
from services.gpu_worker.engine import Engine, StepOutput
from services.gpu_worker.model import Model
from services.gpu_worker.pace import Pace
from services.gpu_worker.pages import PageAllocator
from services.gpu_worker.planner import UNKNOWN, Plan, Planner, Sequence
from services.gpu_worker.runner import Computed, CpuRunner
from services.gpu_worker.sampler import Sampled, Sampler, logprobs_of
from services.gpu_worker.scoring import score_prompts
from services.gpu_worker.step import build_batch
from services.gpu_worker.weights import load_weights
from tests.engine_rig import TINY, Told, ask


@functools.cache
def tiny() -> tuple[ModelConfig, Model]:
    config, checkpoint = ModelConfig.load(TINY), Checkpoint(TINY)
    store = ExpertStore(config, checkpoint)
    store.load(range(config.partitions))
    return config, Model(config, load_weights(config, checkpoint), LocalLink(store.compute))


@dataclass
class Launched:
    computed: Computed
    rest: list[Callable[[], None]]  # how its decodes are sampled, if that is still to come


class LateRunner(CpuRunner):
    """Knows the tokens of the step before, which the sequences do not show yet."""

    overlaps = True
    _found: dict[Sequence, int]

    def launch(self, plan: Plan, late: bool = False) -> Launched:
        unknown = [chunk for chunk in plan.chunks if chunk.sequence.tokens[chunk.end - 1] == UNKNOWN]
        for chunk in unknown:
            chunk.sequence.tokens[chunk.end - 1] = self._found[chunk.sequence]
        if late:
            launched = self._launch_late(plan)
        else:
            launched = Launched(super().launch(plan), [])
            self._find(plan, launched)
        for chunk in unknown:
            chunk.sequence.tokens[chunk.end - 1] = UNKNOWN
        return launched

    def _launch_late(self, plan: Plan) -> Launched:
        """Prompts are sampled now, as on a GPU."""
        model, sampler, sampled = self._model, self._sampler, plan.sampled
        batch, count = build_batch(plan), sum(sequence.left == 1 for sequence in sampled)
        hidden = model.hidden(batch, self._cache)
        logits, out = model.logits(hidden, batch.logit_rows), torch.empty(len(sampled), dtype=torch.int64)
        decodes, prompts = sampled[:count], sampled[count:]
        found = sampler.sample(prompts, logits[count:], out[count:], sampler.begin(prompts))
        logs = {count + row: told for row, told in logprobs_by_row(prompts, found).items()}
        sample = sampler.later(decodes, logits[:count], out[:count])
        outputs = tuple(sequence.outputs for sequence in decodes)
        scored = [scoring.read() for scoring in score_prompts(model, plan, hidden)]
        launched = Launched(Computed(Sampled([], logs), scored), [])

        def rest() -> None:
            logs.update(logprobs_by_row(decodes, sample(sampler.begin(decodes, outputs))))
            launched.computed.sampled.tokens[:] = out.tolist()
            self._find(plan, launched)

        launched.rest.append(rest)
        return launched

    def _find(self, plan: Plan, launched: Launched) -> None:
        self._found = dict(zip(plan.sampled, launched.computed.sampled.tokens, strict=True))

    def complete(self, launched: Launched) -> None:
        launched.rest.pop()()

    def finish(self, launched: Launched) -> Computed:
        assert not launched.rest
        return launched.computed


def logprobs_by_row(sequences: tuple[Sequence, ...], logs: Logprobs | None) -> dict[int, TokenLogprobs]:
    return {} if logs is None else logprobs_of(sequences, logs)


class Run(Told):
    def __init__(self, runner: type[CpuRunner], *, pages: int = 64, max_batch: int = 6, chunk: int = 96) -> None:
        super().__init__()
        config, model = tiny()
        sampler = Sampler(config, max_batch=max_batch, threads=1)
        planner = Planner(
            PageAllocator(pages), config.fingerprint, max_batch=max_batch, pace=Pace(chunk), prefix_cache=True
        )
        log = structlog.get_logger()
        self.runner = runner(model, model.new_cache(pages), sampler, log)
        self.engine = Engine(config, self.runner, planner, sampler, self.emit, log)

    def run(self, requests: list[Generate]) -> dict[str, list[TokenChunk]]:
        for request in requests:
            self.submit(request)
        self.engine.start()
        self.wait(requests)
        self.engine.stop()
        self.engine.planner.check()
        assert self.engine.planner.allocator.owned == 0
        return self.chunks


def load(seed: int, count: int = 9) -> list[Generate]:
    """Requests of every kind, some of which share a prefix."""
    draw = Random(seed)
    shared = [draw.randrange(3, 2000) for _ in range(130)]
    requests = []
    for i in range(count):
        own = [draw.randrange(3, 2000) for _ in range(draw.randrange(1, 150))]
        kind: dict[str, Any] = draw.choice([
            dict(temperature=0.0),
            dict(temperature=1.0, top_p=0.9, seed=i),
            dict(temperature=1.0, seed=i, frequency_penalty=0.8, repetition_penalty=1.2),
            dict(temperature=1.0, seed=i, min_tokens=6, logprobs=2),
            dict(temperature=1.0, seed=i, prompt_logprobs=1),
        ])  # fmt: skip
        stops = tuple(draw.sample(range(3, 2000), 150))
        requests.append(
            ask(f"r{i}", (shared if draw.random() < 0.5 else []) + own, max_tokens=draw.choice([0, 1, 2, 17, 40]),
                stop_token_ids=stops, **kind)
        )  # fmt: skip
    return requests


def constrained(seed: int) -> list[Generate]:
    """Among others: some that end by their grammar, by max_tokens, and some that may think before."""
    draw = Random(seed)
    kinds: list[dict[str, Any]] = [
        dict(grammar=Grammar("regex", "(yes|no|perhaps){2,9}")),
        dict(grammar=Grammar("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}}}')),
        dict(grammar=Grammar("regex", "[a-z ]{30,}"), frequency_penalty=0.5, logprobs=1),
        dict(grammar=Grammar("regex", "[0-9]+", after=7), min_tokens=4),
        dict(grammar=Grammar("regex", "[a-f]*"), logit_bias=((17, 4.0),)),
    ]
    own = [
        ask(f"c{i}", [draw.randrange(3, 2000) for _ in range(draw.randrange(1, 150))], max_tokens=draw.choice([3, 20]),
            temperature=draw.choice([0.0, 1.0]), seed=i, **kind)
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    both = own + load(seed, 5)
    draw.shuffle(both)
    return both


@pytest.mark.parametrize("kind", [load, constrained])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pages", [64, 9])
def test_overlapping_changes_nothing_that_is_told(kind: Callable[[int], list[Generate]], seed: int, pages: int) -> None:
    """With nine pages requests are preempted, some of them while their last token is unknown. What a grammar lets
    follow is known only once the step before has been seen, which a late one does not wait for."""
    requests = kind(seed)
    late = Run(LateRunner, pages=pages).run(requests)
    plain = Run(CpuRunner, pages=pages).run(requests)
    for request in requests:
        name = request.request_id
        assert [_told(c) for c in late[name]] == [_told(c) for c in plain[name]], name
        assert [c.index for c in late[name]] == list(range(len(late[name])))
        assert late[name][-1].finish and not any(c.finish for c in late[name][:-1])


def _told(chunk: TokenChunk) -> tuple:
    """All but cached_tokens, which depends on what was published when another one came, and logprobs' last digits."""
    scored = None if chunk.prompt_logprobs is None else len(chunk.prompt_logprobs)
    return chunk.index, chunk.tokens, chunk.finish, chunk.stop_token, scored, chunk.logprobs is None


def test_a_request_aborted_while_its_step_is_under_way_ends_once() -> None:
    told = Run(LateRunner)
    requests = [ask("gone", [5] * 40, max_tokens=200, temperature=1.0, seed=1, ignore_eos=True),
                ask("stays", [6] * 40, max_tokens=60, temperature=1.0, seed=2, ignore_eos=True)]  # fmt: skip
    alone = Run(LateRunner).run([requests[1]])["stays"]
    emit = told.engine._emit

    def aborting(output: StepOutput) -> None:
        emit(output)
        if len(told.chunks["gone"]) == 5:
            told.engine.abort(["gone"])

    told.engine._emit = aborting
    told.run(requests)
    assert [c.finish for c in told.chunks["gone"] if c.finish] == ["abort"]
    assert told.chunks["gone"][-1].index == len(told.chunks["gone"]) - 1
    assert [c.tokens for c in told.chunks["stays"]] == [c.tokens for c in alone]


@pytest.mark.parametrize("on_device", [0.001, 5.0], ids=["the host was late", "the host rested before"])
def test_a_step_takes_what_its_streams_wait_for_it(on_device: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(LateRunner):
        def finish(self, launched: Launched) -> Computed:
            time.sleep(0.02)
            return replace(super().finish(launched), seconds=on_device)

    run, known = Run(Late), list[tuple[int, list[tuple[int, int]], float]]()
    monkeypatch.setattr(run.engine.planner.pace, "learn", lambda *step: known.append(step))
    run.run([ask("a", [5] * 130, max_tokens=4, temperature=0.0, ignore_eos=True)])
    assert [step[:2] for step in known] == [(0, [(0, 96)]), (0, [(96, 34)]), (1, []), (1, []), (1, [])]
    for _, _, seconds in known:
        assert 0.02 <= seconds < 4.0 if on_device < 0.02 else seconds == on_device


def test_the_pages_of_what_ended_late_are_known_to_those_that_come_after() -> None:
    """Tokens of a page become known after it was filled: it is found all the same."""
    prompt = [7] * 100
    told = Run(LateRunner)
    first = told.run([ask("a", prompt, max_tokens=60, temperature=1.0, seed=3, ignore_eos=True)])["a"]
    allocator = told.engine.planner.allocator
    tokens = prompt + [t for c in first for t in c.tokens]
    assert [allocator.knows(h) for h in page_hashes(tokens, tiny()[0].fingerprint)] == [True, True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_answers_who_asked_to_forget_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the worker waits for that before it ends."""
    run, asked = Run(CpuRunner), []

    def fails(plan: Plan, late: bool = False) -> None:
        asked.append(run.engine.forget_pages())
        raise ZeroDivisionError

    monkeypatch.setattr(run.runner, "launch", fails)
    run.submit(load(1, 1)[0])
    run.engine.start()
    run.engine._thread.join(10)
    assert isinstance(run.engine.crashed, ZeroDivisionError)
    for forgotten in (*asked, run.engine.forget_pages()):
        with pytest.raises(InternalError, match="failed"):
            forgotten.result(10)
