"""Which experts a token goes to, and with what weights."""

from torch import Tensor

from kernels.expert_plan.naive import ExpertPlan
from kernels.route import naive
from kernels.route.naive import RouteScratch, Routing

__all__ = ["RouteScratch", "Routing", "route"]


def route(
    x: Tensor,  # [T, hidden]
    w_gate: Tensor,  # [hidden, experts]
    bias: Tensor | None,  # [experts], noaux_tc's correction: it counts in the choice, not in the weight
    rule: Routing,
    ids: Tensor,  # int32 or int64 [T, topk + shared], out
    weights: Tensor,  # [T, topk + shared], out: float32; on a CPU of x's dtype
    plan: ExpertPlan | None = None,  # out: plan_experts(ids, slots, held, plan)
    slots: Tensor | None = None,
    held: int = 0,
    scratch: RouteScratch | None = None,  # needed on a GPU
) -> None:
    """ids = topk(score(x @ w_gate) within the best groups); weights = their scores, normalised if so ruled, scaled."""
    if x.is_cuda:
        from kernels.route import triton

        triton.route(x, w_gate, bias, rule, ids, weights, plan, slots, held, scratch)
    else:
        naive.route(x, w_gate, bias, rule, ids, weights, plan, slots, held)
