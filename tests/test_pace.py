"""The pace on simulated machines: a step takes what its decodes take, and beside them a fixed part, a part a prompt
token and a part for each position that a token attends to, all with noise; or what its host takes to launch it. Some
compute certain numbers of tokens only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest

from services.gpu_worker.graphs import prefill_buckets
from services.gpu_worker.pace import ANYWAY, GROWTH, ROUND, Costs, Pace, Room

BOUND, MOST, DECODES = 0.05, 4096, 32


@dataclass(frozen=True)
class Machine:
    decode: float
    fixed: float
    token: float
    pair: float
    noise: float = 0.03
    host: float = 0.0  # to launch a step with prompts, however large
    tail: float = 0.2  # half as much again in one of fifty
    sizes: tuple[int, ...] = ()

    def seconds(self, rng: Random, decodes: int, prompts: list[tuple[int, int]]) -> float:
        seconds = self.decode if decodes else 0.0
        if prompts:
            pairs = sum(rows * (start + rows / 2) for start, rows in prompts)
            tokens = sum(rows for _, rows in prompts)
            tokens = min((size for size in self.sizes if size >= tokens), default=tokens)
            seconds += self.fixed + self.token * tokens + self.pair * pairs
        seconds *= rng.lognormvariate(0, self.noise)
        return max(seconds, self.host * rng.lognormvariate(0, self.tail)) if prompts and self.host else seconds


def launched_by(host: float, tail: float = 0.2) -> Machine:
    return Machine(0.011, 0.01, 9e-6, 0.55e-9, host=host, tail=tail)


MACHINES = {
    "small model": Machine(0.0116, 0.019, 9e-6, 0.55e-9),
    "attention is dear": Machine(0.0116, 0.008, 5e-6, 3e-9),
    "slow": Machine(0.025, 0.008, 25e-6, 1e-9, noise=0.04),
    "tokens only": Machine(0.01, 0.0, 10e-6, 0.0, noise=0.05),
    "slow host": launched_by(0.026),
    "in sizes": Machine(0.011, 0.01, 9e-6, 0.55e-9, sizes=tuple(prefill_buckets(MOST))),
}
machines = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
seeds = pytest.mark.parametrize("seed", range(3))


@dataclass
class Served:
    """Steps that a pace planned beside 32 decodes. Where they overlap one is planned before the last is known."""

    pace: Pace
    rng: Random
    steps: list[list[tuple[int, int]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)  # the seconds of those that left some of a prompt to the next

    def alone(self, machine: Machine, steps: int = 10) -> None:
        for _ in range(steps):
            self.pace.learn(DECODES, [], machine.seconds(self.rng, DECODES, []))

    def prompts(self, machine: Machine, lengths: list[int], at_once: int = 1) -> int:
        """Serves them in their order, so many at a time; in how many steps."""
        waiting, begun, before = [[0, length] for length in lengths], list[list[int]](), len(self.steps)
        while waiting or begun:
            while waiting and len(begun) < at_once:
                begun.append(waiting.pop(0))
            room, step = self.pace.room(DECODES), []
            for prompt in begun:
                if room and (rows := room.take(prompt[1] - prompt[0], prompt[0])):
                    step.append((prompt[0], rows))
                    prompt[0] += rows
            begun = [prompt for prompt in begun if prompt[0] < prompt[1]]
            if len(self.steps) > before:
                self.pace.learn(DECODES, self.steps[-1], self.seconds[-1])
            self.seconds.append(machine.seconds(self.rng, DECODES, step))
            self.steps.append(step)
            self.full += self.seconds[-1:] if begun else []
        self.pace.learn(DECODES, self.steps[-1], self.seconds[-1])
        return len(self.steps) - before

    def tokens(self) -> list[int]:
        return [sum(rows for _, rows in step) for step in self.steps]


def served(machine: Machine, seed: int = 0, *, taught: bool = True) -> Served:
    pace, rng = Pace(MOST, BOUND, machine.sizes), Random(seed)
    if taught:
        decode = machine.seconds(rng, DECODES, [])
        pace.rehearse(lambda: decode, lambda rows, end: machine.seconds(rng, 0, [(end - rows, rows)]), 16384)
    run = Served(pace, rng)
    run.alone(machine)
    return run


def lengths(count: int, longest: int, seed: int) -> list[int]:
    return [Random(f"{seed}/{i}").randrange(longest * 4 // 5, longest) for i in range(count)]


@seeds
@machines
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize(("count", "longest", "at_once"), [(40, 8192, 1), (40, 8192, 3), (200, 1500, 6), (8, 32768, 1)])
def test_the_bound_is_kept_and_the_room_is_used(
    machine: Machine, seed: int, taught: bool, count: int, longest: int, at_once: int
) -> None:
    run = served(machine, seed, taught=taught)
    run.prompts(machine, lengths(count, longest, seed), at_once)
    assert np.quantile(run.seconds, 0.99) <= BOUND
    assert np.mean(run.full) >= 0.75 * BOUND


@seeds
@machines
def test_once_taught_the_first_prompt_is_through_in_hardly_more_steps_than_later_ones(
    machine: Machine, seed: int
) -> None:
    run = served(machine, seed)
    first = run.prompts(machine, [8192])
    assert max(run.seconds) <= 1.05 * BOUND
    run.prompts(machine, [8192] * 20)
    assert first <= 1 + 1.4 * run.prompts(machine, [8192])


def test_what_is_rehearsed_fits_into_the_context_and_its_first_run_counts_for_nothing() -> None:
    pace, ran = Pace(300, BOUND), list[tuple[int, int]]()

    def prefill(rows: int, context: int) -> float:
        ran.append((rows, context))
        return 2.0 if ran.count((rows, context)) == 1 else 0.01

    pace.rehearse(lambda: 0.01, prefill, 640)
    assert set(ran) == {(300, 300), (300, 640)}
    assert pace.room(DECODES).take(640, 0) == 300


def test_the_first_rehearsed_step_of_decodes_counts_for_nothing() -> None:
    pace, decodes = Pace(MOST, BOUND), iter((2.0, 0.01))
    pace.rehearse(lambda: next(decodes), lambda rows, context: 1e-4 * rows, MOST)
    assert 1e-4 * pace.room(DECODES).take(8192, 0) <= BOUND - 0.01


@seeds
@machines
def test_what_nobody_has_measured_begins_small_and_grows_step_by_step(machine: Machine, seed: int) -> None:
    run = served(machine, seed, taught=False)
    run.prompts(machine, [8192] * 8)
    tokens = run.tokens()
    assert tokens[0] == ROUND
    for i, count in enumerate(tokens[1:], 1):
        assert count <= max(ROUND, GROWTH * max(tokens[:i]))
    assert max(run.seconds) <= 1.25 * BOUND and sum(took > BOUND for took in run.seconds) <= 3


@seeds
def test_a_small_step_that_takes_long_does_not_make_tokens_look_dear(seed: int) -> None:
    """Most of it is its fixed part: half of them would be all that the room has."""
    machine = Machine(0.0116, 0.023, 3e-6, 0.1e-9)
    run = served(machine, seed, taught=False)
    assert run.prompts(machine, [8192]) <= 14


def test_one_noisy_step_says_nothing_of_much_larger_ones() -> None:
    pace = Pace(MOST, BOUND)
    pace.learn(DECODES, [], 0.01)
    pace.learn(DECODES, [(0, ROUND)], 0.01)
    assert pace.room(DECODES).take(8192, ROUND) == GROWTH * ROUND


@seeds
def test_chunks_shrink_along_a_prompt_as_attention_grows(seed: int) -> None:
    machine = MACHINES["attention is dear"]
    run = served(machine, seed)
    run.prompts(machine, [32768] * 3)
    for told in (run.steps, run.seconds, run.full):
        told.clear()
    run.prompts(machine, [32768])
    rows = run.tokens()[:-1]
    fifth = len(rows) // 5
    parts = [np.mean(rows[i * fifth : (i + 1) * fifth]) for i in range(5)]
    assert parts == sorted(parts, reverse=True) and parts[0] > 2.5 * parts[-1]
    assert max(run.seconds) <= 1.05 * BOUND and np.mean(run.full) >= 0.75 * BOUND


@seeds
@pytest.mark.parametrize("times", [0.7, 1.5, 2.0])
def test_costs_that_change_are_followed(seed: int, times: float) -> None:
    machine = MACHINES["small model"]
    run = served(machine, seed)
    run.prompts(machine, [8192] * 20)
    changed = replace(machine, fixed=0.5 * times * machine.fixed, token=times * machine.token)
    run.prompts(changed, [8192] * 3)
    before = len(run.steps)
    run.prompts(changed, [8192] * 30)
    settled = run.seconds[before:]
    assert np.quantile(settled, 0.99) <= BOUND
    assert np.mean(run.full[-60:]) >= 0.7 * BOUND


@seeds
def test_decodes_that_become_dearer_while_prompts_come_without_a_pause_are_followed(seed: int) -> None:
    few, many = Machine(0.005, 0.012, 9e-6, 0.55e-9), Machine(0.015, 0.012, 9e-6, 0.55e-9)
    run = served(few, seed)
    run.prompts(few, [8192] * 20)
    before = len(run.steps)
    run.prompts(many, [8192] * 40)
    assert sum(took > BOUND for took in run.seconds[before:]) <= 4
    assert np.mean(run.seconds[-60:]) >= 0.75 * BOUND


def test_noise_narrows_the_room_and_its_end_widens_it() -> None:
    calm = Machine(0.0116, 0.012, 9e-6, 0.55e-9, noise=0.01)
    rough = replace(calm, noise=0.1)
    run = served(calm)

    def rows(machine: Machine) -> float:
        run.prompts(machine, [8192] * 40)
        return float(np.mean([run.pace.room(DECODES).take(MOST, start) for start in (0, 2048, 4096)]))

    first, worst, last = rows(calm), rows(rough), rows(calm)
    assert worst < 0.85 * min(first, last) and last == pytest.approx(first, rel=0.1)


@seeds
def test_a_mishap_changes_little(seed: int) -> None:
    machine = MACHINES["small model"]
    run = served(machine, seed)
    run.prompts(machine, [8192] * 20)
    before = run.pace.room(DECODES).take(MOST, 0)
    run.pace.learn(DECODES, [(0, before)], 3.0)
    run.pace.learn(DECODES, [], 3.0)
    run.alone(machine)
    assert run.pace.room(DECODES).take(MOST, 0) >= 0.6 * before
    run.full.clear()
    run.prompts(machine, [8192] * 4)
    assert np.mean(run.full) >= 0.75 * BOUND


def test_without_decodes_or_bound_a_step_is_as_large_as_it_may_be() -> None:
    bounded, free = Pace(4000, bound=BOUND), Pace(4000)
    for pace in (bounded, free):
        pace.learn(8, [], 0.01)
        pace.learn(8, [(0, 1024)], 0.2)
    for room in (bounded.room(0), free.room(64)):
        assert [room.take(left, 0) for left in (300, 5000)] == [300, 3700] and not room


@seeds
@pytest.mark.parametrize(("host", "tail"), [(0.03, 0.35), (0.034, 0.2), (0.038, 0.2), (0.042, 0.2), (0.055, 0.2)])
def test_prompts_do_not_crawl_where_it_is_the_host_that_breaks_the_bound(seed: int, host: float, tail: float) -> None:
    """Smaller chunks would break it as often."""
    machine, rng = launched_by(host, tail), Random(seed)
    run = served(machine, seed)
    run.prompts(machine, [8192] * 20)
    settled = len(run.steps)
    assert run.prompts(machine, [8192] * 20) <= 20 * 20
    least = [machine.seconds(rng, DECODES, [(4096, ROUND)]) for _ in range(2000)]
    assert np.quantile(run.seconds[settled:], 0.95) <= (1 + ANYWAY) * max(BOUND, np.quantile(least, 0.95))


@seeds
def test_where_the_bound_cannot_be_kept_prompts_add_a_share_to_what_steps_take_anyway(seed: int) -> None:
    machine = Machine(0.06, 0.02, 1e-5, 1e-9)
    run = served(machine, seed)
    run.prompts(machine, [8192] * 10)
    assert 0.8 * (1 + ANYWAY) <= np.mean(run.full[10:]) / 0.08 <= 1.1 * (1 + ANYWAY)


@seeds
def test_a_prompt_goes_on_even_where_there_is_no_time_for_the_least(seed: int) -> None:
    machine = Machine(0.06, 0.02, 2e-4, 1e-9)
    run = served(machine, seed)
    run.prompts(machine, [1000, 1000], at_once=2)
    assert {rows for step in run.steps for _, rows in step} == {ROUND, 1000 % ROUND}
    assert all(len(step) == 1 for step in run.steps)


@seeds
def test_costs_that_leave_no_room_do_not_make_tokens_seem_free(seed: int) -> None:
    """The window then knows of large steps that were fast and of small ones that are slow."""
    machine = MACHINES["small model"]
    run = served(machine, seed)
    run.prompts(machine, [8192] * 20)
    before = len(run.steps)
    run.prompts(replace(machine, fixed=0.048, token=36e-6, pair=2.2e-9), [8192] * 2)
    assert max(run.tokens()[before + 5 :]) <= 4 * ROUND


def test_only_the_first_prompt_of_a_step_gets_more_than_there_is_time_for() -> None:
    costs = Costs(token=1e-6)
    room = Room(MOST, 200e-6, costs)
    assert [room.take(100, 0), room.take(500, 0)] == [100, 0] and not room
    room = Room(MOST, 50e-6, costs)
    assert room.take(500, 0) == ROUND and not room


@seeds
@machines
def test_chunks_are_round_but_for_a_prompts_last(machine: Machine, seed: int) -> None:
    run, prompts = served(machine, seed), [5000, 300, 700, 3333] * 10
    run.prompts(machine, prompts, at_once=4)
    assert max(run.tokens()) <= MOST
    for step, tokens in zip(run.steps, run.tokens(), strict=True):
        if tokens % ROUND and tokens not in machine.sizes:  # as large as it may be it is round as a whole
            assert all((rows % ROUND == 0 and not machine.sizes) or start + rows in prompts for start, rows in step)
