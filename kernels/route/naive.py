from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """A router's rule. scoring: softmax or sigmoid; method: greedy, group_limited_greedy or noaux_tc."""

    topk: int
    scoring: str
    method: str
    groups: int
    topk_groups: int
    norm: bool
    scale: float


def route(
    x: Tensor,  # [T, hidden]
    w_gate: Tensor,  # [hidden, experts]
    bias: Tensor | None,  # [experts], noaux_tc's correction: it counts in the choice, not in the weight
    rule: Routing,
    ids: Tensor,  # int64 [T, topk], out
    weights: Tensor,  # [T, topk], out
) -> None:
    """ids = topk(score(x @ w_gate) within the best groups); weights = their scores, normalised if so ruled, scaled.

    References: DeepseekV2TopkRouter and DeepseekV3TopkRouter of transformers.
    """
    logits = torch.mm(x, w_gate)  # [T, experts]
    scores = logits.sigmoid_() if rule.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if rule.method != "greedy" and rule.topk_groups < rule.groups:
        choice = _within_best_groups(choice, rule)
    torch.topk(choice, rule.topk, sorted=False, out=(weights, ids))
    torch.gather(scores, 1, ids, out=weights)
    if rule.norm:
        weights /= weights.sum(-1, keepdim=True).add_(1e-20)
    weights *= rule.scale


def _within_best_groups(choice: Tensor, rule: Routing) -> Tensor:
    """-inf outside of the topk_groups best groups: by their best expert, or for noaux_tc by their best two's sum."""
    grouped = choice.view(len(choice), rule.groups, -1)  # [T, groups, experts / groups]
    if rule.method == "noaux_tc":
        worth = grouped.topk(2, sorted=False).values.sum(-1)  # [T, groups]
    else:
        worth = grouped.amax(-1)
    best = worth.topk(rule.topk_groups, sorted=False).indices  # [T, topk_groups]
    closed = torch.full_like(worth, -torch.inf).scatter_(1, best, 0.0)  # [T, groups]
    return (grouped + closed.unsqueeze(2)).view_as(choice)
