from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.combine_norm import combine_norm
from kernels.experts import experts, slot_table
from kernels.mla_decode import mla_decode, plan_decode
from kernels.mla_prefill import PrefillPlan, mla_prefill
from kernels.route import Routing, route


def error_ratio(got: Tensor, want: Tensor) -> float:
    return float((got - want).double().square().mean().sqrt() / want.double().square().mean().sqrt())


# ---- route


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, int]:
    """A rule and its number of experts."""
    scoring, method = draw(
        st.sampled_from([("softmax", "greedy"), ("softmax", "group_limited_greedy"), ("sigmoid", "noaux_tc")])
    )
    groups, a_group = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    topk_groups = draw(st.integers(1, groups))
    reachable = groups * a_group if method == "greedy" else topk_groups * a_group
    topk = draw(st.integers(1, min(reachable, 8)))
    rule = Routing(topk, scoring, method, groups, topk_groups, draw(st.booleans()), draw(st.sampled_from([1.0, 2.5])))
    return rule, groups * a_group


def route_one(scores: list[float], bias: list[float], rule: Routing) -> dict[int, float]:
    """expert -> weight for one token, as one would write it on a blackboard."""
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // rule.groups
    if rule.method != "greedy":
        worth = []
        for g in range(rule.groups):
            group = sorted(choice[g * size : (g + 1) * size], reverse=True)
            worth.append(group[0] + group[1] if rule.method == "noaux_tc" else group[0])
        best = sorted(range(rule.groups), key=lambda g: -worth[g])[: rule.topk_groups]
        candidates = [e for e in range(len(scores)) if e // size in best]
    else:
        candidates = list(range(len(scores)))
    chosen = sorted(candidates, key=lambda e: -choice[e])[: rule.topk]
    total = sum(scores[e] for e in chosen) if rule.norm else 1.0
    return {e: scores[e] / total * rule.scale for e in chosen}


@settings(deadline=None, max_examples=150)
@given(routings(), st.integers(1, 6), st.integers(0, 1 << 30))
def test_route_equals_a_loop_over_tokens(drawn: tuple[Routing, int], tokens: int, seed: int) -> None:
    rule, count = drawn
    torch.manual_seed(seed)
    x, w_gate = torch.randn(tokens, 9), torch.randn(9, count)
    bias = torch.randn(count) if rule.method == "noaux_tc" else None
    ids, weights = torch.empty(tokens, rule.topk, dtype=torch.int64), torch.empty(tokens, rule.topk)
    route(x, w_gate, bias, rule, ids, weights)
    logits = x @ w_gate
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(-1)
    for t in range(tokens):
        want = route_one(scores[t].tolist(), [0.0] * count if bias is None else bias.tolist(), rule)
        got = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-5)


# ---- experts


@pytest.mark.parametrize("held", [[], [3], [0, 2, 5, 7], list(range(8))], ids=lambda held: f"{len(held)}-held")
@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 100])
def test_experts_equal_a_loop_over_pairs(rows: int, ids_type: torch.dtype, held: list[int]) -> None:
    hidden, inter, count, topk = 24, 10, 8, 3
    torch.manual_seed(rows)
    x, weights = torch.randn(rows, hidden), torch.rand(rows, topk)
    ids = torch.stack([torch.randperm(count)[:topk] for _ in range(rows)]).to(ids_type)
    ids[::2, 1] = -1
    gate_up, down = torch.randn(len(held), hidden, 2 * inter), torch.randn(len(held), inter, hidden)
    out = torch.full((rows, hidden), torch.nan)
    experts(x, ids, weights, gate_up, down, slot_table({e: i for i, e in enumerate(held)}, count), out)
    want = torch.zeros(rows, hidden)
    for t in range(rows):
        for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
            if expert in held:
                slot = held.index(expert)
                gate, up = (x[t] @ gate_up[slot]).split(inter)
                want[t] += weight * ((torch.nn.functional.silu(gate) * up) @ down[slot])
    assert torch.allclose(out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 40])
def test_experts_do_not_depend_on_the_order_of_ids(rows: int) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(rows, 24), torch.rand(rows, 3)
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(rows)])
    gate_up, down, slots = torch.randn(8, 24, 20), torch.randn(8, 10, 24), slot_table({e: e for e in range(8)}, 8)
    one, two = torch.empty(2, rows, 24)
    experts(x, ids, weights, gate_up, down, slots, one)
    experts(x, ids.flip(1), weights.flip(1), gate_up, down, slots, two)
    assert one.equal(two)


# ---- norms and attention


def test_combine_norm_updates_the_residual_and_norms_it() -> None:
    torch.manual_seed(0)
    residual, parts, weight = torch.randn(5, 17), (torch.randn(5, 17), torch.randn(5, 17)), torch.randn(17)
    total = residual + parts[0] + parts[1]
    out = torch.empty(5, 17)
    combine_norm(residual, parts, weight, 1e-2, out)
    assert torch.allclose(residual, total)
    assert torch.allclose(out, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-2) * weight, atol=1e-6)


def attention(q: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """One query [heads, nope + rope] over rows [L, kv_lora + rope], in double."""
    nope, kv_lora = w_uk.shape[1:]
    q, rows, w_uk, w_uv = q.double(), rows.double(), w_uk.double(), w_uv.double()
    out = []
    for head in range(len(q)):
        keys = torch.cat((rows[:, :kv_lora] @ w_uk[head].T, rows[:, kv_lora:]), 1)
        out.append((scale * (keys @ q[head])).softmax(0) @ (rows[:, :kv_lora] @ w_uv[head]))
    assert q.shape[1] == nope + rows.shape[1] - kv_lora
    return torch.stack(out)


@pytest.fixture
def mla() -> dict[str, Tensor]:
    torch.manual_seed(0)
    heads, nope, rope, kv_lora, v_dim = 3, 6, 4, 14, 5
    return dict(
        q=torch.randn(130, heads, nope + rope),
        w_uk=torch.randn(heads, nope, kv_lora),
        w_uv=torch.randn(heads, kv_lora, v_dim),
        cache=torch.randn(9, 64, kv_lora + rope),
    )


def test_decode_attends_to_each_context_and_no_further(mla: dict[str, Tensor]) -> None:
    q, w_uk, w_uv, cache = mla.values()
    table, contexts = torch.tensor([[4, 0, 0], [2, 7, 1], [5, 3, 0]]), [64, 130, 65]
    lengths = torch.tensor(contexts)
    out = torch.full((3, 3, 5), torch.nan)
    mla_decode(q[:3], w_uk, w_uv, cache, table, lengths, plan_decode(lengths, 3), 0.3, out)
    for i, length in enumerate(contexts):
        rows = cache[table[i]].flatten(0, 1)[:length]
        assert error_ratio(out[i], attention(q[i], rows, w_uk, w_uv, 0.3)) < 1e-5


@pytest.mark.parametrize(("rows", "context"), [(1, 1), (64, 64), (130, 130), (10, 140), (1, 129), (66, 128)])
def test_prefill_is_causal(mla: dict[str, Tensor], rows: int, context: int) -> None:
    q, w_uk, w_uv, cache = mla.values()
    pages = torch.tensor([8, 0, 3])[: -(-context // 64)]
    out = torch.full((rows, 3, 5), torch.nan)
    mla_prefill(q[:rows], w_uk, w_uv, cache, PrefillPlan.of([rows], [context], [pages]), 0.3, out)
    held = cache[pages].flatten(0, 1)
    want = [attention(q[i], held[: context - rows + 1 + i], w_uk, w_uv, 0.3) for i in range(rows)]
    assert error_ratio(out, torch.stack(want)) < 1e-5
