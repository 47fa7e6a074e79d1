"""From logits to tokens and their logprobs."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages import TokenLogprobs
from common.model_config import ModelConfig
from kernels.sample import SampleParams, logprobs, sample
from services.gpu_worker.grammar import Masks
from services.gpu_worker.penalties import Biases, Counts, penalised
from services.gpu_worker.planner import Plan, Sequence


@dataclass(frozen=True)
class Sampled:
    """The token of each sampled row, and logprobs of the rows that asked for them."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """One step: `begin` before its forward pass, `sample` after it.

    `add` and `forget` tell of a sequence's begin and end. What changes logits costs nothing while no sequence asks.
    """

    def __init__(self, config: ModelConfig, *, max_batch: int, threads: int) -> None:
        self._eos_ids = config.eos_ids
        self._counts = Counts(config.vocab, max_batch)
        self._biases = Biases()
        self._masks = Masks(config, threads)
        self._adjusted: set[Sequence] = set()  # whose logits are changed before they are sampled

    def add(self, sequence: Sequence) -> None:
        sampling = sequence.request.sampling
        if sequence.constraint is not None or sampling.logit_bias or penalised(sampling):
            self._adjusted.add(sequence)

    def forget(self, sequence: Sequence) -> None:
        if sequence in self._adjusted:
            self._adjusted.remove(sequence)
            self._counts.forget(sequence)
            self._biases.forget(sequence)

    def begin(self, plan: Plan) -> Future[Tensor] | None:
        return self._masks.begin(plan.sampled) if self._adjusted else None

    def sample(self, plan: Plan, logits: Tensor, mask: Future[Tensor] | None) -> Sampled:
        """`logits` [S, vocab] float32: one row for each of plan.sampled. `mask`: what `begin` returned."""
        sequences = plan.sampled
        if not sequences:
            return Sampled([], {})
        out = torch.empty(len(sequences), dtype=torch.int64)
        params, banned = _params(sequences), self._banned(sequences)
        if self._adjusted:
            biased, penalties = self._biases.add(logits, sequences), self._counts.penalties(sequences)
            sample(biased, params, out, banned, penalties=penalties, mask=mask.result() if mask else None)
        else:
            sample(logits, params, out, banned)
        return Sampled(out.tolist(), _logprobs(logits, out, sequences))

    def close(self) -> None:
        self._masks.close()

    def _banned(self, sequences: tuple[Sequence, ...]) -> tuple[Tensor, Tensor] | None:
        """(row, token) pairs: what would end an output before min_tokens. (With a grammar its mask sees to that.)"""
        pairs = [
            (row, token)
            for row, s in enumerate(sequences)
            if s.outputs < s.request.sampling.min_tokens and s.constraint is None
            for token in (*self._eos_ids, *s.request.sampling.stop_token_ids)
        ]
        if not pairs:
            return None
        rows, tokens = zip(*pairs, strict=True)
        return torch.tensor(rows), torch.tensor(tokens)


def _params(sequences: tuple[Sequence, ...]) -> SampleParams | None:
    wanted = [s.request.sampling for s in sequences]
    if all(sampling.temperature == 0 for sampling in wanted):
        return None
    return SampleParams(
        temperature=torch.tensor([s.temperature for s in wanted]),
        top_k=torch.tensor([s.top_k for s in wanted]),
        top_p=torch.tensor([s.top_p for s in wanted]),
        min_p=torch.tensor([s.min_p for s in wanted]),
        seed=torch.tensor([_int64(s.seed) for s in wanted]),
        position=torch.tensor([len(s.tokens) for s in sequences]),
    )


def _logprobs(logits: Tensor, tokens: Tensor, sequences: tuple[Sequence, ...]) -> dict[int, TokenLogprobs]:
    counts = {row: n for row, s in enumerate(sequences) if (n := s.request.sampling.logprobs) is not None}
    if not counts:
        return {}
    rows = torch.tensor(list(counts))
    chosen, ids, values = logprobs(logits[rows], tokens[rows], max(counts.values()))
    return {
        row: TokenLogprobs(chosen[i].item(), tuple(ids[i, :n].tolist()), tuple(values[i, :n].tolist()))
        for i, (row, n) in enumerate(counts.items())
    }


def _int64(seed: int) -> int:
    """Any integer, as the 64 bits that the noise is hashed from."""
    return (seed + 2**63) % 2**64 - 2**63
