"""Logprobs of a prompt's own tokens, given those before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages import TokenLogprobs
from common.pinned import to_device, to_host
from kernels.sample import logprobs
from services.gpu_worker.model import Model
from services.gpu_worker.planner import Plan, Sequence

ROWS = 128  # whose logits exist at a time: 64 MB for a vocabulary of 128 thousand tokens


@dataclass(frozen=True)
class Scored:
    """What a step adds to the scores of a sequence."""

    sequence: Sequence
    scores: list[TokenLogprobs]


@dataclass(frozen=True)
class Scoring:
    """The same while the step is under way."""

    sequence: Sequence
    parts: list[tuple[Tensor, ...]]  # kernels.sample.logprobs of up to ROWS rows each, where the host can read them

    def read(self) -> Scored:
        """Once the step has ended."""
        scores = [
            TokenLogprobs(chosen, tuple(ids), tuple(values))
            for part in self.parts
            for chosen, ids, values in zip(*(column.tolist() for column in part), strict=True)
        ]
        return Scored(self.sequence, scores)


def score_prompts(model: Model, plan: Plan, hidden: Tensor) -> list[Scoring]:
    """`hidden` [T, hidden], of Model.hidden: the rows of the plan's chunks, one chunk after the other."""
    if all(chunk.sequence.scores is None for chunk in plan.chunks):
        return []
    found, first = [], 0
    for chunk in plan.chunks:
        rows = chunk.scored
        if rows:
            at = first - chunk.start
            parts = [
                _score(model, hidden, chunk.sequence, range(start, min(start + ROWS, rows.stop)), at)
                for start in range(rows.start, rows.stop, ROWS)
            ]
            found.append(Scoring(chunk.sequence, parts))
        first += chunk.rows
    return found


def _score(model: Model, hidden: Tensor, sequence: Sequence, rows: range, at: int) -> tuple[Tensor, ...]:
    """`rows` of the sequence, the i-th of which is hidden[at + i], score the tokens after them."""
    logits = model.logits(hidden, torch.arange(rows.start + at, rows.stop + at, device=hidden.device))
    targets = to_device(torch.tensor(sequence.tokens[rows.start + 1 : rows.stop + 1]), hidden.device)
    top = sequence.request.sampling.prompt_logprobs or 0
    return tuple(map(to_host, logprobs(logits.float(), targets, top)))
