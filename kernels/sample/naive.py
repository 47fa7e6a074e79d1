from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CANDIDATES = (64, 1024)  # how many of the best tokens are tried to hold top_p of the mass, before all are sorted
GOLDEN = -0x61C8864680B583EB  # splitmix64's increment and multipliers, as int64
MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
PROMPT = 1 << 30  # the bit of a count that says: the prompt holds this token


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


@dataclass(frozen=True)
class Penalties:
    """logit of a token that was seen, in the prompt or since: divided by `repetition` where it is positive, else
    multiplied; then minus frequency * (times it was output) and minus presence if it was. `counts` is kept by sample():
    the sampled token is counted."""

    presence: Tensor  # float32 [S], 0: none
    frequency: Tensor  # float32 [S], 0: none
    repetition: Tensor  # float32 [S], 1: none
    counts: Tensor  # int32 [slots, vocab]: how often a token was output, plus PROMPT where the prompt holds it
    slot: Tensor  # int64 [S], each row's of `counts`, no two the same; -1: no penalties, nothing is counted


@dataclass(frozen=True)
class Logprobs:
    """Out: of the model's own distribution, before penalties, bans, temperature and filters."""

    wanted: Tensor  # int64 [S], in: how many of the best to list, at most N; -1: this row wants nothing
    chosen: Tensor  # float32 [S], of the sampled token
    ids: Tensor  # int64 [S, N], best first; past what was wanted undefined, as are `values`
    values: Tensor  # float32 [S, N]


def sample(
    logits: Tensor,  # float32 or bfloat16 [S, vocab], left as they are
    params: SampleParams | None,  # None: every row is greedy
    out: Tensor,  # int64 [S]
    banned: tuple[Tensor, Tensor] | None = None,  # int64 (rows, token ids), pairs that may not be sampled; row -1: none
    *,
    penalties: Penalties | None = None,
    mask: Tensor | None = None,  # int32 [S, ceil(vocab / 32)]: bit i of word w lets token 32 w + i be sampled
    logs: Logprobs | None = None,
) -> None:
    """out = argmax(logits / temperature + gumbel noise) over the tokens that top_k, then top_p, then min_p leave.

    top_k leaves the tokens with fewer than k better ones, top_p those whose better ones hold less than top_p of the
    mass of what top_k leaves: equal tokens stay or go together, whatever their order. The noise is a function of
    (seed, position, token id), so a row's token depends neither on the batch around it nor on how its candidates were
    found.
    """
    raw, logits = logits, _adjusted(logits.float(), banned, penalties, mask)
    torch.argmax(logits, -1, out=out)
    if params is not None:
        random = params.temperature > 0
        limited = (params.top_k > 0) | (params.top_p < 1)
        for rows, pick in ((random & limited, _pick_limited), (random & ~limited, _pick_any)):
            index = rows.nonzero().squeeze(1)
            if len(index):
                chosen = params.rows(index)
                out[index] = pick(logits[index] / chosen.temperature.unsqueeze(1), chosen)
    if penalties is not None:
        counted = penalties.slot >= 0
        penalties.counts[penalties.slot[counted], out[counted]] += 1
    if logs is not None:
        index = (logs.wanted >= 0).nonzero().squeeze(1)
        parts = logprobs(raw[index].float(), out[index], logs.ids.shape[1])
        logs.chosen[index], logs.ids[index], logs.values[index] = parts


def logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the model's own distribution, before temperature and filters: ([S], top ids [S, top], their [S, top])."""
    logs = logits.log_softmax(-1)
    best = logs.topk(top, -1)
    return logs.gather(1, tokens.unsqueeze(1)).squeeze(1), best.indices, best.values


def _adjusted(
    logits: Tensor, banned: tuple[Tensor, Tensor] | None, penalties: Penalties | None, mask: Tensor | None
) -> Tensor:
    never = logits.new_tensor(-torch.inf)
    if penalties is not None:
        rows = (penalties.slot >= 0).nonzero().squeeze(1)
        logits = logits.index_copy(0, rows, _penalised(logits[rows], penalties, rows))
    if mask is not None:
        bits = (mask.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=mask.device)) & 1
        logits = torch.where(bits.flatten(1)[:, : logits.shape[1]] == 0, never, logits)
    if banned is not None:
        real = banned[0] >= 0
        logits = logits.index_put((banned[0][real], banned[1][real]), never)
    return logits


def _penalised(logits: Tensor, penalties: Penalties, rows: Tensor) -> Tensor:
    presence, frequency, repetition = (
        field[rows].unsqueeze(1) for field in (penalties.presence, penalties.frequency, penalties.repetition)
    )
    counts = penalties.counts[penalties.slot[rows]]
    output = counts & (PROMPT - 1)
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(counts > 0, scaled, logits) - frequency * output - presence * (output > 0)


def _pick_any(logits: Tensor, params: SampleParams) -> Tensor:
    ids = torch.arange(logits.shape[1], device=logits.device)
    floor = params.min_p.log().unsqueeze(1) + logits.amax(1, keepdim=True)
    scores = logits + gumbel(params.seed, params.position, ids)
    return scores.masked_fill_(logits < floor, -torch.inf).argmax(1)


def _pick_limited(logits: Tensor, params: SampleParams) -> Tensor:
    vocab = logits.shape[1]
    enough = int(params.top_k.max()) + 1  # one more shows whether equal ones follow
    for count in (*(max(count, enough) for count in CANDIDATES), vocab):
        values, ids = logits.topk(min(count, vocab), -1)  # [S, count], best first
        kept, complete = _keep(values, logits, params)
        if complete:
            break
    scores = values + gumbel(params.seed, params.position, ids)
    return ids.gather(1, scores.masked_fill_(~kept, -torch.inf).argmax(1, keepdim=True)).squeeze(1)


def _keep(values: Tensor, logits: Tensor, params: SampleParams) -> tuple[Tensor, bool]:
    """Which of the sorted best `values` [S, count] the filters leave, and whether they leave nothing beyond them."""
    top_k, top_p, min_p = (limit.unsqueeze(1) for limit in (params.top_k, params.top_p, params.min_p))
    best, lowest = values[:, :1], values[:, -1:]
    ratio = (values - best).exp_()  # to the best one's probability
    kth = values.gather(1, (top_k - 1).clamp_(0, values.shape[1] - 1))
    ratio.masked_fill_((values < kth) & (top_k > 0), 0.0)
    # A running sum does not depend on how many candidates follow, so neither does what is kept.
    mass = ratio.cumsum(1)
    whole = torch.where(top_k > 0, mass[:, -1:], (logits.logsumexp(1, keepdim=True) - best).exp_())
    within = (F.pad(mass[:, :-1], (1, 0)) < top_p * whole).sum(1, keepdim=True)
    last = values.gather(1, (within - 1).clamp_(min=0))  # the least that top_p leaves: its equals stay too
    kept = ((values >= last) | (top_p >= 1)) & (ratio >= min_p) & (ratio > 0)
    kept[:, 0] = True
    complete = torch.where(top_k > 0, lowest < kth, (mass[:, -1:] >= top_p * whole) & (lowest < last))
    return kept, bool(complete.all()) or values.shape == logits.shape


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
