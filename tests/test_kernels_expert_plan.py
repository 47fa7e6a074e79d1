from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.expert_plan import naive, triton
from kernels.expert_plan.naive import ExpertPlan
from kernels.experts import slot_table
from tests.kernel_checks import DEVICE, either_device, poison, same_from_graph


def poisoned_plan(tokens: int, topk: int, held: int, block_rows: int) -> ExpertPlan:
    plan = ExpertPlan.empty(tokens, topk, held, block_rows, DEVICE)
    poison(plan.pairs, plan.places, plan.blocks, plan.counts, plan.scratch)
    return plan


def assert_same(got: ExpertPlan, want: ExpertPlan) -> None:
    """Bitwise, in all that is defined."""
    assert torch.equal(got.counts, want.counts)
    blocks, placed = want.counts.tolist()
    assert torch.equal(got.places, want.places)
    assert torch.equal(got.pairs[:placed], want.pairs[:placed])
    assert torch.equal(got.blocks[:blocks], want.blocks[:blocks])


def table(experts: int, held: int) -> Tensor:
    return slot_table({int(e): i for i, e in enumerate(torch.randperm(experts)[:held])}, experts).to(DEVICE)


def check(
    ids: Tensor, experts: int, held: int, block_rows: int, seed: int = 0, tile: dict[str, int] | None = None
) -> None:
    torch.manual_seed(seed)
    got, want = poisoned_plan(*ids.shape, held, block_rows), poisoned_plan(*ids.shape, held, block_rows)
    if tile is not None:
        got = replace(
            got, scratch=torch.empty(ids.numel() // tile["chunk"] + 2, held, dtype=torch.int32, device=DEVICE)
        )
    slots = table(experts, held)
    naive.plan_experts(ids, slots, held, want)
    triton.plan_experts(ids, slots, held, got, tile)
    assert_same(got, want)


@either_device
@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(0, 50),
    topk=st.integers(1, 9),
    experts=st.integers(1, 40),
    held=st.floats(0, 1),
    block_rows=st.sampled_from([1, 8, 16, 64]),
    chunk=st.sampled_from([0, 0, 32, 128]),
    wide=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(
    tokens: int, topk: int, experts: int, held: float, block_rows: int, chunk: int, wide: bool, seed: int
) -> None:
    """Ids at random, of one token equal ones too; `chunk` pairs a program, 0: all of them."""
    torch.manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, topk), device=DEVICE).to(torch.int64 if wide else torch.int32)
    check(ids, experts, round(held * experts), block_rows, seed, {"chunk": chunk, "warps": 4} if chunk else None)


@either_device
@pytest.mark.parametrize("tile", [None, {"chunk": 32, "warps": 4}], ids=["one-program", "chunks"])
def test_all_pairs_of_one_expert(tile: dict[str, int] | None) -> None:
    check(torch.full((70, 2), 3, device=DEVICE), 7, 5, 4, 0, tile)


def distinct(tokens: int, topk: int, experts: int) -> Tensor:
    return torch.rand(tokens, experts, device=DEVICE).topk(topk).indices.int()


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "held", "topk"), [(257, 257, 9), (64, 64, 6), (256, 13, 8)])
@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 300, 4096, 16384, 65536])
def test_equals_naive_at_full_size(tokens: int, experts: int, held: int, topk: int) -> None:
    torch.manual_seed(tokens)
    check(distinct(tokens, topk, experts), experts, held, 16 if tokens <= 128 else 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "runs"), [(64, 1000), (4096, 50)])
def test_the_same_from_a_graph(tokens: int, runs: int) -> None:
    ids, slots = distinct(tokens, 8, 256), table(256, 200)
    plan = poisoned_plan(tokens, 8, 200, 16)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        ids.copy_(distinct(tokens, 8, 256))

    # Places past the last pair or block keep the poison, the same each time.
    outputs = plan.pairs, plan.places, plan.blocks, plan.counts
    same_from_graph(lambda: triton.plan_experts(ids, slots, 200, plan), refill, outputs, runs)
