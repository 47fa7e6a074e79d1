from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.expert_plan.naive import ExpertPlan, plan_experts

ROWS = 16384  # of partial sums: few tokens take many splits
WORDS = 8  # of 32 tokens each: so many tokens at most are planned in the router's own launch


@dataclass(frozen=True)
class Routing:
    """A router's rule. scoring: softmax or sigmoid; method: greedy, group_limited_greedy or noaux_tc.

    `shared` experts follow a token's topk ones, with ids after the routed experts' and weight 1.
    """

    topk: int
    scoring: str
    method: str
    groups: int
    topk_groups: int
    norm: bool
    scale: float
    shared: int = 0

    def __post_init__(self) -> None:
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring is softmax or sigmoid, not {self.scoring}")
        if self.method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise ValueError(f"method is greedy, group_limited_greedy or noaux_tc, not {self.method}")


@dataclass(frozen=True)
class RouteScratch:
    """What the Triton version works in; one serves all layers. `bits` and `ticket` are zero between launches."""

    partials: Tensor  # float32 [rows, experts]: the logits of each token, of each split of hidden
    bits: Tensor  # int32 [WORDS, experts]: which tokens chose an expert
    firsts: Tensor  # int32 [experts]: their first places
    ticket: Tensor  # int32 [1]: how many tokens are routed

    @staticmethod
    def empty(
        tokens: int, experts: int, device: torch.device | str, new: Callable[..., Tensor] = torch.empty
    ) -> RouteScratch:
        """For up to `tokens` tokens and `experts` experts, shared ones included. `new`: instead of torch.empty, for
        what keeps nothing from one launch to the next."""
        return RouteScratch(
            new(max(ROWS, tokens), experts, dtype=torch.float32, device=device),
            torch.zeros(WORDS, experts, dtype=torch.int32, device=device),
            torch.empty(experts, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )


def route(
    x: Tensor,  # [T, hidden]
    w_gate: Tensor,  # [hidden, experts]
    bias: Tensor | None,  # [experts], noaux_tc's correction: it counts in the choice, not in the weight
    rule: Routing,
    ids: Tensor,  # int32 or int64 [T, topk + shared], out
    weights: Tensor,  # [T, topk + shared], out, of x's dtype
    plan: ExpertPlan | None = None,  # out: plan_experts(ids, slots, held, plan)
    slots: Tensor | None = None,
    held: int = 0,
) -> None:
    """ids = topk(score(x @ w_gate) within the best groups); weights = their scores, normalised if so ruled, scaled.

    References: DeepseekV2TopkRouter and DeepseekV3TopkRouter of transformers.
    """
    if ids.dtype == torch.int64 and not rule.shared:
        routed, gains = ids, weights
    else:
        routed, gains = ids.new_empty(len(ids), rule.topk, dtype=torch.int64), weights[:, : rule.topk]
    logits = torch.mm(x, w_gate)  # [T, experts]
    scores = logits.sigmoid_() if rule.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if rule.method != "greedy" and rule.topk_groups < rule.groups:
        choice = _within_best_groups(choice, rule)
    torch.topk(choice, rule.topk, sorted=False, out=(gains, routed))
    torch.gather(scores, 1, routed, out=gains)
    if rule.norm:
        gains /= gains.sum(-1, keepdim=True).add_(1e-20)
    gains *= rule.scale
    if routed is not ids:
        ids[:, : rule.topk] = routed
        ids[:, rule.topk :] = torch.arange(w_gate.shape[1], w_gate.shape[1] + rule.shared, device=ids.device)
        weights[:, rule.topk :] = 1.0
    if plan is not None:
        if slots is None:
            raise ValueError("a plan needs slots")
        plan_experts(ids, slots, held, plan)


def _within_best_groups(choice: Tensor, rule: Routing) -> Tensor:
    """-inf outside of the topk_groups best groups: by their best expert, or for noaux_tc by their best two's sum."""
    grouped = choice.view(len(choice), rule.groups, choice.shape[1] // rule.groups)  # [T, groups, experts / groups]
    if rule.method == "noaux_tc":
        worth = grouped.topk(2, sorted=False).values.sum(-1)  # [T, groups]
    else:
        worth = grouped.amax(-1)
    best = worth.topk(rule.topk_groups, sorted=False).indices  # [T, topk_groups]
    closed = torch.full_like(worth, -torch.inf).scatter_(1, best, 0.0)  # [T, groups]
    return (grouped + closed.unsqueeze(2)).view_as(choice)
