from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sample import PROMPT, Logprobs, Penalties, SampleParams, logprobs, sample
from kernels.sample.naive import gumbel


def params(rows: int, **fields: float | list[float]) -> SampleParams:
    default = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0)
    whole = {"top_k", "seed", "position"}
    return SampleParams(
        **{
            name: torch.tensor(value, dtype=torch.int64 if name in whole else torch.float32).expand(rows).clone()
            for name, value in (default | fields).items()
        }
    )


def draw(logits: Tensor, given_params: SampleParams | None, **more: Any) -> list[int]:
    out = torch.full((len(logits),), -1)
    before = logits.clone()
    sample(logits, given_params, out, **more)
    assert logits.equal(before)
    return out.tolist()


def textbook(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution that is left after temperature, top_k, top_p and min_p, one step after the other."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        first = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1  # the fewest that hold top_p
        p[order[first:]] = 0
        p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


FILTERS = [
    dict(top_k=3),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(top_k=5, top_p=0.6),
    dict(top_p=0.9, min_p=0.1, temperature=1.7),
    dict(top_k=4, top_p=0.95, min_p=0.15, temperature=0.6),
    dict(),
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_frequencies_are_those_of_the_textbook(filters: dict[str, float]) -> None:
    count = 20_000
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.9, -3.0, 1.4, 0.0])
    want = textbook(logits.numpy(), *(filters.get(n, d) for n, d in
                    [("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)]))  # fmt: skip
    tokens = draw(logits.expand(count, 8), params(count, position=list(range(count)), **filters))
    got = np.bincount(tokens, minlength=8) / count
    assert set(np.flatnonzero(got)) == set(np.flatnonzero(want))
    assert np.abs(got - want).max() < 5 * 0.5 / count**0.5


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 1 << 40),
    vocab=st.sampled_from([1, 2, 50, 300, 3000]),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, 90, 5000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_a_row_is_the_noisy_argmax_of_what_the_textbook_leaves(
    seed: int, vocab: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    p = textbook(logits[0].numpy(), temperature, top_k, top_p, min_p)
    noise = gumbel(torch.tensor([seed]), torch.tensor([9]), torch.arange(vocab))[0].numpy()
    kept = np.where(p > 0, logits[0].double().numpy() / temperature + noise, -np.inf)
    [token] = draw(
        logits, params(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, position=9)
    )
    # A limit that falls between two tokens within rounding may go either way.
    edge = (0 < top_p < 1 or min_p > 0) and p[token] == 0
    assert token == int(kept.argmax()) or (edge and _near_the_limit(logits, token, temperature, top_k, top_p, min_p))


def _near_the_limit(logits: Tensor, token: int, temperature: float, top_k: int, top_p: float, min_p: float) -> bool:
    looser = textbook(logits[0].numpy(), temperature, top_k, min(top_p * (1 + 1e-5), 1.0), min_p * (1 - 1e-5))
    return bool(looser[token] > 0)


def test_a_token_depends_on_its_own_row_alone() -> None:
    torch.manual_seed(0)
    rows = 40
    logits = torch.randn(rows, 2500) * torch.rand(rows, 1) * 6
    limits = dict(
        temperature=[[0.0, 0.5, 1.0, 1.5][i % 4] for i in range(rows)],
        top_k=[[0, 0, 3, 100][i % 4 - i % 3] for i in range(rows)],
        top_p=[[1.0, 0.9, 0.99][i % 3] for i in range(rows)],
        min_p=[[0.0, 0.1][i % 2] for i in range(rows)],
        seed=[i * 7919 for i in range(rows)],
        position=list(range(rows)),
    )
    together = draw(logits, params(rows, **limits))
    order = torch.randperm(rows)
    shuffled = draw(logits[order], params(rows, **limits).rows(order))
    assert [together[i] for i in order] == shuffled
    for i in range(rows):
        index = torch.tensor([i])
        assert draw(logits[index], params(rows, **limits).rows(index)) == [together[i]]


def test_temperature_zero_and_no_params_are_greedy() -> None:
    logits = torch.randn(6, 99)
    best = logits.argmax(-1).tolist()
    assert draw(logits, None) == best
    assert draw(logits, params(6, temperature=0.0, top_p=0.5, seed=3)) == best


def test_seed_and_position_change_the_noise() -> None:
    logits = torch.zeros(1000, 50)
    tokens = draw(logits, params(1000, seed=5, position=list(range(1000))))
    again = draw(logits, params(1000, seed=5, position=list(range(1000))))
    other = draw(logits, params(1000, seed=6, position=list(range(1000))))
    assert tokens == again
    assert len(Counter(tokens)) == 50
    same = sum(a == b for a, b in zip(tokens, other, strict=True))
    assert same < 60  # 20 are expected by chance
    shifted = sum(a == b for a, b in zip(tokens[1:], other, strict=False))
    assert shifted < 60


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(torch.arange(100), torch.arange(100), torch.arange(2000)).flatten()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.03)
    assert noise.isfinite().all()


@pytest.mark.parametrize("limits", [dict(temperature=0.0), dict(), dict(top_p=0.9)], ids=str)
def test_banned_tokens_are_never_sampled(limits: dict[str, float]) -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.0]]).expand(2, 4)
    banned = torch.tensor([1, 1]), torch.tensor([0, 1])
    assert draw(logits, params(2, **limits), banned=banned)[1] in (2, 3)
    assert draw(logits, None, banned=banned) == [0, 2]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    chosen, top_ids, top = logprobs(logits, torch.tensor([1, 2]), 2)
    want = logits.double().softmax(-1).log()
    assert chosen.tolist() == pytest.approx([want[0, 1].item(), want[1, 2].item()], rel=1e-5)
    assert top_ids[0].tolist() == [0, 1] and top_ids[1, 0] == 2
    assert top[0].tolist() == pytest.approx(want[0, :2].tolist(), rel=1e-5)
    assert logprobs(logits, torch.tensor([0, 0]), 0)[2].shape == (2, 0)


def test_penalties_weigh_what_was_seen_and_count_what_is_sampled() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0, -1.1], [3.0, 2.9, -1.0, -1.1]])

    def best(presence: float, frequency: float, repetition: float, counts: list[int]) -> int:
        table = torch.tensor([counts, [0] * 4], dtype=torch.int32)
        fields = (torch.full((2,), value) for value in (presence, frequency, repetition))
        before = table.clone()
        first, other = draw(logits, None, penalties=Penalties(*fields, table, torch.tensor([0, -1])))
        before[0, first] += 1
        assert other == 0 and table.equal(before)
        return first

    assert best(0.0, 0.0, 1.0, [9, 0, 0, 0]) == 0
    assert best(0.2, 0.0, 1.0, [1, 0, 0, 0]) == 1
    assert best(0.0, 0.04, 1.0, [2, 0, 0, 0]) == 0
    assert best(0.0, 0.04, 1.0, [3, 0, 0, 0]) == 1
    assert best(0.2, 0.2, 1.0, [PROMPT, 0, 0, 0]) == 0  # only the output counts
    assert best(0.0, 0.0, 1.1, [PROMPT, 0, 0, 0]) == 1
    assert best(0.0, 0.0, 9.0, [PROMPT, 1, PROMPT, 0]) == 0  # 0.33 beats -1.1: what is negative is multiplied


@pytest.mark.parametrize("limits", [dict(temperature=0.0), dict(), dict(top_p=0.5), dict(top_k=40)], ids=str)
def test_a_mask_leaves_its_bits(limits: dict[str, float]) -> None:
    mask = torch.zeros(3, 3, dtype=torch.int32)
    mask[0, 0], mask[1, 1], mask[2, 2] = 1 << 5, -(1 << 31), 3
    tokens = draw(torch.randn(3, 66), params(3, **limits), mask=mask)
    assert tokens[:2] == [5, 63] and tokens[2] in (64, 65)


@pytest.mark.parametrize("filters", [dict(top_k=2), dict(top_p=0.4)], ids=str)
def test_equal_tokens_stay_together(filters: dict[str, float]) -> None:
    logits = torch.tensor([3.0, 1.0, 2.9, 2.9, 2.9, 0.0])
    tokens = draw(logits.expand(2000, 6), params(2000, position=list(range(2000)), **filters))
    assert set(tokens) == {0, 2, 3, 4}


def test_logprobs_of_the_rows_that_want_them() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 2.0, 0.0]])
    logs = Logprobs(torch.tensor([1, -1, 0]), torch.empty(3), torch.empty(3, 2, dtype=torch.int64), torch.empty(3, 2))
    tokens = draw(logits, params(3, temperature=0.5), banned=(torch.tensor([0, -1]), torch.tensor([0, 2])), logs=logs)
    want = logits.log_softmax(-1)
    assert logs.chosen[[0, 2]].tolist() == pytest.approx([want[0, tokens[0]].item(), want[2, tokens[2]].item()])
    assert logs.ids[0, 0] == 0 and logs.values[0, 0].item() == pytest.approx(want[0, 0].item())
