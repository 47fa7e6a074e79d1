from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.expert_plan import naive as expert_plan
from kernels.route import naive, triton
from kernels.route.naive import RouteScratch, Routing
from tests.kernel_checks import DEVICE, TOLERANCE, either_device, error_ratio, poisoned, same_from_graph
from tests.test_kernels_expert_plan import assert_same, poisoned_plan, table

R1 = 7168, 256, Routing(8, "sigmoid", "noaux_tc", 8, 4, True, 2.5, shared=1)
V2_LITE = 2048, 64, Routing(6, "softmax", "greedy", 1, 1, False, 1.0)
V2 = 5120, 160, Routing(6, "softmax", "group_limited_greedy", 8, 3, False, 16.0, shared=2)
SCRATCH = RouteScratch.empty(4096, 258, DEVICE)  # one for all, so that what a launch leaves there meets the next


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, int]:
    """A rule and its number of experts."""
    scoring = draw(st.sampled_from(["softmax", "sigmoid"]))
    method = draw(st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"]))
    groups, a_group = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    topk_groups = draw(st.integers(1, groups))
    topk = draw(st.integers(1, min(8, a_group * (groups if method == "greedy" else topk_groups))))
    scale, shared = draw(st.sampled_from([1.0, 2.5])), draw(st.integers(0, 2))
    return Routing(topk, scoring, method, groups, topk_groups, draw(st.booleans()), scale, shared), groups * a_group


def clear(x: Tensor, w_gate: Tensor, bias: Tensor | None, rule: Routing) -> Tensor:
    """bool [T]: the choice does not hang on a difference that rounding makes; between equals the versions may differ
    (Triton's takes the lower id)."""

    def apart(values: Tensor, k: int) -> Tensor:
        best = values.sort(-1, descending=True).values
        return (
            best[:, k - 1] - best[:, k] > 1e-5 if k < values.shape[1] else torch.ones_like(best[:, 0], dtype=torch.bool)
        )

    logits = x.double() @ w_gate.double()
    choice = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(-1)
    choice = choice if bias is None else choice + bias.double()
    if rule.method == "greedy" or rule.topk_groups == rule.groups:
        return apart(choice, rule.topk)
    best = choice.unflatten(1, (rule.groups, -1)).sort(-1, descending=True).values
    worth = best[..., :2].sum(-1) if rule.method == "noaux_tc" else best[..., 0]
    return apart(worth, rule.topk_groups) & apart(naive._within_best_groups(choice, rule), rule.topk)


def inputs(
    tokens: int, hidden: int, experts: int, rule: Routing, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(tokens, hidden, device=DEVICE).to(dtypes[0])
    w_gate = (torch.randn(experts, hidden, device=DEVICE) * 1.5 * hidden**-0.5).to(dtypes[1]).T
    return x, w_gate, torch.rand(experts, device=DEVICE) if rule.method == "noaux_tc" else None


def check(
    tokens: int, hidden: int, experts: int, rule: Routing, held: int, ids_type: torch.dtype = torch.int32,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.bfloat16), tile: dict[str, int] | None = None,
) -> None:  # fmt: skip
    x, w_gate, bias = inputs(tokens, hidden, experts, rule, dtypes)
    columns, slots = rule.topk + rule.shared, table(experts + rule.shared, held)
    ids, weights = poisoned(tokens, columns, dtype=ids_type), poisoned(tokens, columns, dtype=torch.float32)
    plan, want_plan = poisoned_plan(tokens, columns, held, 16), poisoned_plan(tokens, columns, held, 16)
    triton.route(x, w_gate, bias, rule, ids, weights, plan, slots, held, SCRATCH, tile)
    want_ids, want = torch.empty_like(ids), torch.empty(tokens, columns, dtype=torch.float64, device=DEVICE)
    bias = None if bias is None else bias.double()
    naive.route(x.double(), w_gate.double(), bias, rule, want_ids, want)

    (ids_in_order, order), (want_ids, want_order) = ids.sort(1), want_ids.sort(1)
    rows = clear(x, w_gate, bias, rule)
    assert torch.equal(ids_in_order[rows], want_ids[rows])
    assert error_ratio(weights.gather(1, order)[rows], want.gather(1, want_order)[rows]) < TOLERANCE[torch.float32]
    assert rows.float().mean() > 0.9 or tokens < 50  # of few tokens some may all have a near tie
    assert bool((ids_in_order >= 0).all()) and bool((ids_in_order.diff(dim=1) > 0).all())
    expert_plan.plan_experts(ids, slots, held, want_plan)
    assert_same(plan, want_plan)
    assert not SCRATCH.bits.any() and not SCRATCH.ticket.any()


@either_device
@settings(deadline=None, max_examples=15)
@given(
    drawn=routings(),
    tokens=st.one_of(st.integers(0, 6), st.sampled_from([1, 33])),
    hidden=st.sampled_from([128, 384]),
    held=st.floats(0, 1),
    wide_ids=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
    steps=st.sampled_from([0, 1, 2, 100]),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(
    drawn: tuple[Routing, int], tokens: int, hidden: int, held: float, wide_ids: bool,
    dtypes: tuple[torch.dtype, torch.dtype], steps: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    rule, experts = drawn
    tile = {"BM": 16, "BN": 16, "BK": 64, "steps": steps, "warps": 4, "stages": 2, "choose_warps": 1} if steps else None
    held_count = round(held * (experts + rule.shared))
    check(tokens, hidden, experts, rule, held_count, torch.int64 if wide_ids else torch.int32, dtypes, tile)


@either_device
def test_many_words_of_bits() -> None:
    check(70, 128, 12, Routing(3, "sigmoid", "noaux_tc", 3, 2, True, 2.5, shared=1), 11)


@either_device
def test_more_tokens_than_one_launch_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "WORDS", 1)
    check(35, 128, 12, Routing(3, "softmax", "greedy", 1, 1, True, 1.0, shared=1), 9)


@either_device
def test_equals_go_to_the_lower_id() -> None:
    rule = Routing(4, "sigmoid", "noaux_tc", 4, 2, True, 1.0)
    x, w_gate = torch.zeros(2, 128, device=DEVICE), torch.zeros(20, 128, device=DEVICE).T
    ids, weights = poisoned(2, 4, dtype=torch.int32), poisoned(2, 4, dtype=torch.float32)
    triton.route(x, w_gate, None, rule, ids, weights, scratch=SCRATCH)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    assert torch.equal(weights, torch.full_like(weights, 0.25))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [R1, V2_LITE, V2], ids=["R1", "V2-Lite", "V2"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 128, 256, 1024, 4096])
@pytest.mark.parametrize("share", [1.0, 0.3], ids=["all-held", "some-held"])
def test_equals_naive_at_full_size(shape: tuple[int, int, Routing], tokens: int, share: float) -> None:
    torch.manual_seed(tokens)
    hidden, experts, rule = shape
    check(tokens, hidden, experts, rule, int(share * (experts + rule.shared)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [R1, V2_LITE], ids=["R1", "V2-Lite"])
@pytest.mark.parametrize(("tokens", "runs"), [(1, 1000), (64, 1000), (1024, 50)])
def test_the_same_from_a_graph(shape: tuple[int, int, Routing], tokens: int, runs: int) -> None:
    hidden, experts, rule = shape
    x, w_gate, bias = inputs(tokens, hidden, experts, rule, (torch.bfloat16, torch.bfloat16))
    held, columns = experts + rule.shared, rule.topk + rule.shared
    slots, plan = table(held, held), poisoned_plan(tokens, columns, held, 16)
    ids, weights = poisoned(tokens, columns, dtype=torch.int32), poisoned(tokens, columns, dtype=torch.float32)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        x.normal_()

    same_from_graph(
        lambda: triton.route(x, w_gate, bias, rule, ids, weights, plan, slots, held, SCRATCH),
        refill, (ids, weights, plan.pairs, plan.places, plan.blocks, plan.counts), runs,
    )  # fmt: skip
