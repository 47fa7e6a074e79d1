"""Logprobs of a prompt's own tokens, given those before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages import TokenLogprobs
from kernels.sample import logprobs
from services.gpu_worker.model import Model
from services.gpu_worker.planner import Plan, Sequence

ROWS = 128  # whose logits exist at a time: 64 MB for a vocabulary of 128 thousand tokens


@dataclass(frozen=True)
class Scored:
    """What a step adds to the scores of a sequence."""

    sequence: Sequence
    scores: list[TokenLogprobs]


def score_prompts(model: Model, plan: Plan, hidden: Tensor) -> list[Scored]:
    """`hidden` [T, hidden], of Model.hidden: the rows of the plan's chunks, one chunk after the other."""
    if all(chunk.sequence.scores is None for chunk in plan.chunks):
        return []
    found, first = [], 0
    for chunk in plan.chunks:
        rows = chunk.scored
        if rows:
            at = first - chunk.start
            scores = [
                score
                for start in range(rows.start, rows.stop, ROWS)
                for score in _score(model, hidden, chunk.sequence, range(start, min(start + ROWS, rows.stop)), at)
            ]
            found.append(Scored(chunk.sequence, scores))
        first += chunk.rows
    return found


def _score(model: Model, hidden: Tensor, sequence: Sequence, rows: range, at: int) -> list[TokenLogprobs]:
    """`rows` of the sequence, the i-th of which is hidden[at + i], score the tokens after them."""
    logits = model.logits(hidden, torch.arange(rows.start + at, rows.stop + at, device=hidden.device))
    targets = torch.tensor(sequence.tokens[rows.start + 1 : rows.stop + 1], device=hidden.device)
    top = sequence.request.sampling.prompt_logprobs or 0
    chosen, ids, values = (part.tolist() for part in logprobs(logits.float(), targets, top))
    return [TokenLogprobs(*score) for score in zip(chosen, map(tuple, ids), map(tuple, values), strict=True)]
