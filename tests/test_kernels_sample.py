from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sample import SampleParams, logprobs, sample
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


def draw(logits: Tensor, given_params: SampleParams | None, **more: tuple[Tensor, Tensor]) -> list[int]:
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
