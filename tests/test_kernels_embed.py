from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.embed import naive, triton
from tests.kernel_checks import DEVICE, either_device, poisoned, same_from_graph


def check(tokens: int, sampled: int, hidden: int, vocab: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    table = torch.randn(vocab, hidden, device=DEVICE).to(dtype)
    ids = torch.randint(vocab, (tokens,), device=DEVICE).to(kind)
    source = torch.randint(-1, sampled, (tokens,), device=DEVICE, dtype=torch.int32)
    ids[source >= 0] = -1  # nothing that the host knew
    last = torch.randint(vocab, (sampled,), device=DEVICE)
    want, want_ids = torch.empty(tokens, hidden, device=DEVICE, dtype=dtype), ids.int()
    naive.embed(ids, source, last, table, want, want_ids)
    out, got_ids = poisoned(tokens, hidden, dtype=dtype), poisoned(tokens, dtype=torch.int32)
    triton.embed(ids, source, last, table, out, got_ids)
    assert out.equal(want) and got_ids.equal(want_ids)
    triton.embed(ids, source, last, table, out.fill_(torch.nan))
    assert out.equal(want)


@either_device
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 6),
    sampled=st.integers(0, 4),
    hidden=st.sampled_from([1, 128, 384, 2176]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(tokens: int, sampled: int, hidden: int, dtype: torch.dtype, kind: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    check(tokens, sampled, hidden, 50, dtype, kind)


def test_naive_takes_what_was_sampled() -> None:
    table, out, ids = torch.arange(20.0).view(10, 2), torch.empty(3, 2), torch.empty(3, dtype=torch.int32)
    source = torch.tensor([-1, 1, 0], dtype=torch.int32)
    naive.embed(torch.tensor([4, 0, 0]), source, torch.tensor([7, 9]), table, out, ids)
    assert ids.tolist() == [4, 9, 7]
    assert out.tolist() == [[8, 9], [18, 19], [14, 15]]


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [7168, 2048], ids=["R1", "V2-Lite"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_equals_naive_at_full_size(tokens: int, hidden: int) -> None:
    check(tokens, 64, hidden, 102400, torch.bfloat16, torch.int64)


@pytest.mark.gpu
def test_the_same_from_a_graph() -> None:
    table = torch.randn(5000, 2048, device=DEVICE).bfloat16()
    ids, last = torch.zeros(2, 64, device=DEVICE, dtype=torch.int64)
    source, used = torch.zeros(2, 64, device=DEVICE, dtype=torch.int32)
    out = poisoned(64, 2048, dtype=torch.bfloat16)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        ids.random_(0, 5000)
        last.random_(0, 5000)
        source.random_(0, 65).sub_(1)

    same_from_graph(lambda: triton.embed(ids, source, last, table, out, used), refill, (out, used))
