from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sample import naive, triton
from kernels.sample.naive import PROMPT, Logprobs, Penalties, SampleParams
from kernels.sample.triton import SampleScratch
from tests.kernel_checks import DEVICE, either_device, poison, same_from_graph

TEMPERATURES, TOP_K, TOP_P, MIN_P = (
    (0.0, 0.3, 1.0, 1.7),
    (0, 0, 1, 7, 50, 300),
    (1.0, 1.0, 0.3, 0.95, 0.999, 1e-6),
    (0.0, 0.0, 0.05, 0.5),
)


def drawn(values: tuple, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One of `values` a row."""
    return torch.tensor(values, dtype=dtype, device=DEVICE)[torch.randint(len(values), (rows,), device=DEVICE)]


def random_params(rows: int) -> SampleParams:
    seed, position = torch.randint(-(1 << 62), 1 << 62, (rows,)), torch.randint(1 << 17, (rows,))
    limits = drawn(TEMPERATURES, rows), drawn(TOP_K, rows, torch.int64), drawn(TOP_P, rows), drawn(MIN_P, rows)
    return SampleParams(*limits, seed.to(DEVICE), position.to(DEVICE))


def random_penalties(rows: int, vocab: int) -> Penalties:
    counts = torch.randint(-3, 4, (rows + 1, vocab), device=DEVICE, dtype=torch.int32).clamp_(min=0)
    counts += PROMPT * (torch.rand(counts.shape, device=DEVICE) < 0.2).int()
    slot = torch.randperm(rows + 1, device=DEVICE)[:rows]
    slot[torch.rand(rows, device=DEVICE) < 0.3] = -1
    return Penalties(*torch.rand(2, rows, device=DEVICE), 0.5 + torch.rand(rows, device=DEVICE), counts, slot)


def random_logits(rows: int, vocab: int, spread: float, tied: bool, dtype: torch.dtype) -> Tensor:
    logits = torch.randn(rows, vocab, device=DEVICE) * spread
    return (logits.mul_(2).round_().div_(2) if tied else logits).to(dtype)


def random_bans(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Some rows' best tokens, and padding."""
    which = torch.randint(-1, rows, (6,), device=DEVICE)
    return which, torch.randint(vocab, (6,), device=DEVICE)


def empty_logs(rows: int, most: int) -> Logprobs:
    wanted = torch.randint(-1, most + 1, (rows,), device=DEVICE)
    ids = torch.empty(rows, most, dtype=torch.int64, device=DEVICE)
    logs = Logprobs(wanted, torch.empty(rows, device=DEVICE), ids, torch.empty(rows, most, device=DEVICE))
    poison(logs.chosen, logs.ids, logs.values)
    return logs


def left(x: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which of the scaled logits x [vocab], in double, the filters leave."""
    values, order = x.sort(descending=True)
    worst = values[top_k - 1] if 0 < top_k < len(x) else values[-1]
    mass = torch.where(values >= worst, (values - values[0]).exp(), 0.0)
    better = mass.cumsum(0) - mass
    first = torch.searchsorted(-values, -values)  # of a run of equal ones
    kept = (values >= worst) & (better[first] < top_p * mass.sum()) & (mass >= min_p)
    kept[first == 0] = True
    return torch.zeros_like(kept).scatter(0, order, kept)


def near_tie(logits: Tensor, params: SampleParams, row: int, token: int) -> bool:
    """Whether rounding may decide for `token`: limits moved by 1e-5 leave it, and no certain one has a score that is
    greater by 3e-5."""
    t, k, p, m, seed, position = (getattr(params, field.name)[row].item() for field in fields(params))
    if t == 0:
        return False
    x = logits[row].double() / t
    noise = naive.gumbel(*torch.tensor([[seed], [position]]), torch.arange(len(x)))[0]  # type: ignore[call-arg]
    scores = x + noise.to(x.device)
    possible = left(x, k, p * (1 + 1e-5) if p < 1 else 1.0, m * (1 - 1e-5))
    certain = left(x, k, p * (1 - 1e-5) if p < 1 else 1.0, m * (1 + 1e-5))
    return bool(possible[token]) and float(scores[token]) > float(scores[certain].max()) - 3e-5


def check(
    logits: Tensor,
    params: SampleParams | None,
    banned: tuple[Tensor, Tensor] | None = None,
    penalties: Penalties | None = None,
    mask: Tensor | None = None,
    logs: Logprobs | None = None,
) -> None:
    rows, vocab = logits.shape
    out, want = torch.full((2, rows), -1, device=DEVICE)
    before = logits.clone()
    own = None if penalties is None else replace(penalties, counts=penalties.counts.clone())
    scratch = SampleScratch.empty(rows, vocab, DEVICE)
    poison(*scratch.tensors())
    naive.sample(logits, params, want, banned, penalties=own, mask=mask)
    adjusted = naive._adjusted(logits.float(), banned, penalties, mask)
    counts = None if penalties is None else penalties.counts.clone()
    triton.sample(logits, params, out, banned, penalties, mask, logs, scratch)
    assert logits.equal(before)
    for row in (out != want).nonzero().flatten().tolist():
        assert params is not None and near_tie(adjusted, params, row, int(out[row])), f"row {row}"
    if penalties is not None and counts is not None:
        counted = penalties.slot >= 0
        counts[penalties.slot[counted], out[counted]] += 1
        assert penalties.counts.equal(counts)
    if logs is not None:
        check_logs(logits, out, logs)


def check_logs(logits: Tensor, tokens: Tensor, logs: Logprobs) -> None:
    most = logs.ids.shape[1]
    chosen, _ids, values = naive.logprobs(logits.float(), tokens, most)
    exact = logits.double().log_softmax(-1)
    for row, count in enumerate(logs.wanted.tolist()):
        if count >= 0:
            ids, got = logs.ids[row, :count], logs.values[row, :count]
            assert abs(float(logs.chosen[row] - chosen[row])) < 1e-5
            assert not count or float((got - values[row, :count]).abs().max()) < 1e-5
            assert not count or float((got - exact[row, ids]).abs().max()) < 1e-5
            assert len(set(ids.tolist())) == count
            assert got.equal(got.sort(descending=True).values)


@either_device
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(0, 4),
    vocab=st.sampled_from([1, 40, 600, 2100]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    extras=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(
    rows: int, vocab: int, spread: float, tied: bool, dtype: torch.dtype, extras: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    logits, params = random_logits(rows, vocab, spread, tied, dtype), random_params(rows)
    if extras and rows and vocab > 1:
        mask = torch.randint(-(1 << 31), 1 << 31, (rows, -(-vocab // 32)), device=DEVICE, dtype=torch.int32)
        mask |= 1 << 7 | 1 << 3
        more = random_bans(rows, vocab), random_penalties(rows, vocab), mask, empty_logs(rows, min(20, vocab))
        check(logits, params, *more)
    else:
        check(logits, params)
        check(logits, None)


@either_device
@pytest.mark.parametrize("limits", [(0, 0.95, 0.0), (150, 1.0, 0.0), (700, 0.9, 0.0), (0, 1.0, 0.05)], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["spread", "tied"])
def test_what_the_filters_leave_may_be_any_number(limits: tuple[int, float, float], tied: bool) -> None:
    """More than a chunk of groups, as of a model that is unsure of everything."""
    torch.manual_seed(sum(map(ord, str(limits))))
    rows, vocab = 2, 5000
    top_k, top_p, min_p = (torch.tensor([limit] * rows, device=DEVICE) for limit in limits)
    params = replace(random_params(rows), top_k=top_k, top_p=top_p, min_p=min_p)
    params.temperature.fill_(1.0)
    check(random_logits(rows, vocab, 0.7, tied, torch.float32), params, logs=empty_logs(rows, 5))


@either_device
@pytest.mark.parametrize("top_p", [0.3, 0.95])
@pytest.mark.parametrize("spread", [0.5, 6.0])
def test_top_p_alone(top_p: float, spread: float) -> None:
    """Often it leaves the noisiest token, else the next candidate, and seldom must the slower way find one."""
    torch.manual_seed(round(100 * top_p))
    rows, vocab = (6, 2100) if DEVICE == "cpu" else (200, 9000)
    params = replace(random_params(rows), top_k=torch.zeros(rows, dtype=torch.int64, device=DEVICE))
    params.temperature.fill_(0.7)
    params.top_p.fill_(top_p)
    params.min_p.zero_()
    check(random_logits(rows, vocab, spread, False, torch.float32), params)


@either_device
def test_many_that_might_be_the_noisiest_of_one_lane() -> None:
    rows, vocab = 20, 1100
    params = replace(random_params(rows), top_k=torch.zeros(rows, dtype=torch.int64, device=DEVICE))
    params.temperature.fill_(1.0)
    params.top_p.fill_(1.0)
    params.min_p.zero_()
    logits = torch.zeros(rows, vocab, device=DEVICE)
    logits[:, :4] = 40.0
    logits[:, 1028:1031] = 40.0
    check(logits, params)


@either_device
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's
@pytest.mark.parametrize("kind", ["constant", "one possible", "nan"])
def test_odd_rows_end_in_a_token(kind: str) -> None:
    """No winner by value; one that the mask decides; garbage, which may give any token, but must end."""
    torch.manual_seed(0)
    rows, vocab = 4, 4500
    logits, out = torch.zeros(rows, vocab, device=DEVICE), torch.full((rows,), -1, device=DEVICE)
    params = replace(random_params(rows), top_k=torch.tensor([0, 5, 0, 5], device=DEVICE))
    params.temperature.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    params.top_p.copy_(torch.tensor([1.0, 1.0, 0.5, 0.5]))
    mask = torch.full((rows, -(-vocab // 32)), -1, device=DEVICE, dtype=torch.int32)
    if kind == "one possible":
        mask.zero_()[:, 3] = 1 << 9
    if kind == "nan":
        logits.fill_(torch.nan)
        triton.sample(logits, params, out, None, None, mask, None, SampleScratch.empty(rows, vocab, DEVICE))
        assert ((out >= 0) & (out < vocab)).all()
        return
    check(logits, params, mask=mask, logs=empty_logs(rows, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 129280), (64, 129280), (256, 129280), (64, 102400)])
def test_equals_naive_at_full_size(rows: int, vocab: int, spread: float, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    logits, params = random_logits(rows, vocab, spread, False, dtype), random_params(rows)
    check(logits, params, logs=empty_logs(rows, 20))
    mask = torch.full((rows, vocab // 32), 0x5BFF7FFF, device=DEVICE, dtype=torch.int32)
    check(logits, params, random_bans(rows, vocab), random_penalties(rows, vocab), mask)


@pytest.mark.gpu
def test_one_graph_serves_any_parameters() -> None:
    rows, vocab = 16, 102400
    logits, params, logs = torch.empty(rows, vocab, device=DEVICE), random_params(rows), empty_logs(rows, 5)
    penalties, out = random_penalties(rows, vocab), torch.empty(rows, dtype=torch.int64, device=DEVICE)
    banned, scratch = random_bans(rows, vocab), SampleScratch.empty(rows, vocab, DEVICE)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        logits.normal_(0, 3)
        for field in fields(params):
            getattr(params, field.name).copy_(getattr(random_params(rows), field.name))
        logs.wanted.random_(-1, 6)
        penalties.counts.random_(0, 2)
        banned[1].random_(0, vocab)

    def launch() -> None:
        triton.sample(logits, params, out, banned, penalties, None, logs, scratch)

    same_from_graph(launch, refill, (out, logs.chosen, logs.ids, logs.values))
