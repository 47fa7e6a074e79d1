from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CANDIDATES = (64, 1024)  # how many of the best tokens are tried to hold top_p of the mass, before all are sorted
GOLDEN = -0x61C8864680B583EB  # splitmix64's increment and multipliers, as int64
MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


@dataclass(frozen=True)
class SampleParams:
    """One entry a row. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 mean no limit."""

    temperature: Tensor  # float32 [S]
    top_k: Tensor  # int64 [S]
    top_p: Tensor  # float32 [S]
    min_p: Tensor  # float32 [S]
    seed: Tensor  # int64 [S]
    position: Tensor  # int64 [S], of the token to be sampled

    def rows(self, index: Tensor) -> SampleParams:
        fields = (self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.position)
        return SampleParams(*(field[index] for field in fields))


def sample(
    logits: Tensor,  # float32 [S, vocab], left as they are
    params: SampleParams | None,  # None: every row is greedy
    out: Tensor,  # int64 [S]
    banned: tuple[Tensor, Tensor] | None = None,  # int64 (rows, token ids), pairs that may not be sampled
) -> None:
    """out = argmax(logits / temperature + gumbel noise) over the tokens that top_k, then top_p, then min_p leave.

    The noise is a function of (seed, position, token id), so a row's token depends neither on the batch around it nor
    on how its candidates were found. top_p counts mass among what top_k leaves.
    """
    if banned is not None:
        logits = logits.index_put(banned, logits.new_tensor(-torch.inf))
    torch.argmax(logits, -1, out=out)
    if params is None:
        return
    random = params.temperature > 0
    limited = (params.top_k > 0) | (params.top_p < 1)
    for rows, pick in ((random & limited, _pick_limited), (random & ~limited, _pick_any)):
        index = rows.nonzero().squeeze(1)
        if len(index):
            chosen = params.rows(index)
            out[index] = pick(logits[index] / chosen.temperature.unsqueeze(1), chosen)


def logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the model's own distribution, before temperature and filters: ([S], top ids [S, top], their [S, top])."""
    logs = logits.log_softmax(-1)
    best = logs.topk(top, -1)
    return logs.gather(1, tokens.unsqueeze(1)).squeeze(1), best.indices, best.values


def _pick_any(logits: Tensor, params: SampleParams) -> Tensor:
    ids = torch.arange(logits.shape[1])
    floor = params.min_p.log().unsqueeze(1) + logits.amax(1, keepdim=True)
    scores = logits + gumbel(params.seed, params.position, ids)
    return scores.masked_fill_(logits < floor, -torch.inf).argmax(1)


def _pick_limited(logits: Tensor, params: SampleParams) -> Tensor:
    vocab = logits.shape[1]
    top_k = int(params.top_k.max())
    for count in (*(max(count, top_k) for count in CANDIDATES), vocab):
        values, ids = logits.topk(min(count, vocab), -1)  # [S, count], best first
        kept, complete = _keep(values, logits, params)
        if complete:
            break
    scores = values + gumbel(params.seed, params.position, ids)
    return ids.gather(1, scores.masked_fill_(~kept, -torch.inf).argmax(1, keepdim=True)).squeeze(1)


def _keep(values: Tensor, logits: Tensor, params: SampleParams) -> tuple[Tensor, bool]:
    """Which of the sorted best `values` [S, count] the filters leave, and whether they leave nothing beyond them."""
    top_k, top_p, min_p = (limit.unsqueeze(1) for limit in (params.top_k, params.top_p, params.min_p))
    best = values[:, :1]
    ratio = (values - best).exp_()  # to the best one's probability
    ratio.masked_fill_((torch.arange(values.shape[1]) >= top_k) & (top_k > 0), 0.0)
    # A running sum does not depend on how many candidates follow, so neither does what is kept.
    mass = ratio.cumsum(1)
    whole = torch.where(top_k > 0, mass[:, -1:], (logits.logsumexp(1, keepdim=True) - best).exp_())
    kept = (F.pad(mass[:, :-1], (1, 0)) < top_p * whole) & (ratio >= min_p) & (ratio > 0)
    kept[:, 0] = True
    complete = bool(((top_k > 0) | (mass[:, -1:] >= top_p * whole)).all()) or values.shape == logits.shape
    return kept, complete


def gumbel(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """float64 [S, n] for ids [n] or [S, n]: standard Gumbel noise, hashed from (seed, position, id) by splitmix64."""
    key = _mix(_mix(seed) + position * GOLDEN).unsqueeze(1)
    bits = _mix(key + (ids + 1) * GOLDEN)
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53  # in (0, 1)
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX[0]
    x = (x ^ _shift(x, 27)) * MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Right, as unsigned."""
    return (x >> by) & ((1 << (64 - by)) - 1)
