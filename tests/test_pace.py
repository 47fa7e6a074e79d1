from __future__ import annotations

import pytest

from services.gpu_worker.pace import ROUND, Pace


def engine(pace: Pace, steps: int, decodes: int, decode: float, token: float) -> float:
    """The longest of the last half of `steps` on a machine where a decode step takes `decode` seconds and a prompt
    token adds `token`."""
    took = []
    for step in range(steps):
        tokens = pace.tokens(decodes) if step % 4 else 0
        took.append(decode + tokens * token)
        pace.learn(decodes, tokens, took[-1])
    return max(took[steps // 2 :])


@pytest.mark.parametrize("token", [2e-6, 1e-5, 5e-5])
def test_the_bound_is_kept_and_used(token: float) -> None:
    pace = Pace(8192, bound=0.05)
    worst = engine(pace, 60, 32, 0.01, token)
    assert worst <= 0.05
    assert worst >= 0.8 * min(0.05, 0.01 + 8192 * token) - ROUND * token


def test_without_decodes_or_bound_a_step_is_as_large_as_it_may_be() -> None:
    assert Pace(4096, bound=0.05).tokens(0) == 4096
    assert Pace(4096).tokens(64) == 4096


def test_a_prompt_goes_on_even_where_the_bound_cannot_be_kept() -> None:
    pace = Pace(4096, bound=0.001)
    engine(pace, 20, 8, 0.01, 1e-5)
    assert pace.tokens(8) == ROUND


def test_what_nobody_has_measured_begins_small() -> None:
    assert Pace(8192, bound=0.05).tokens(3) == ROUND


def test_costs_that_grow_are_followed() -> None:
    pace = Pace(8192, bound=0.05)
    engine(pace, 40, 8, 0.01, 5e-6)
    assert engine(pace, 40, 8, 0.01, 2e-5) <= 0.05
