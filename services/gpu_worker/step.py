"""From a plan to tensors, and from logits to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages import TokenLogprobs
from common.model_config import ModelConfig
from common.pages import PAGE
from kernels.sample import SampleParams, logprobs, sample
from services.gpu_worker.batch import Batch, Chunk
from services.gpu_worker.planner import Plan, Sequence


def build_batch(plan: Plan) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    write: list[int] = []
    logit_rows: list[int] = []
    prefill: list[Chunk] = []
    for chunk in plan.chunks:
        sequence, first = chunk.sequence, len(tokens)
        tokens += sequence.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        write += [sequence.pages[at // PAGE] * PAGE + at % PAGE for at in range(chunk.start, chunk.end)]
        if chunk.rows > 1:
            pages = torch.tensor(sequence.pages[: -(-chunk.end // PAGE)])
            prefill.append(Chunk(first, chunk.rows, chunk.end, pages))
        if chunk.sampled:
            logit_rows.append(len(tokens) - 1)
    contexts = [chunk.end for chunk in plan.decodes]
    widest = -(-max(contexts, default=0) // PAGE)
    table = [(c.sequence.pages + [0] * widest)[:widest] for c in plan.decodes]
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        write=torch.tensor(write),
        n_decode=len(plan.decodes),
        block_table=torch.tensor(table, dtype=torch.int64).view(len(contexts), widest),
        context=torch.tensor(contexts, dtype=torch.int64),
        prefill=tuple(prefill),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )


@dataclass(frozen=True)
class Sampled:
    """The token of each sampled row, and logprobs of the rows that asked for them."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]


def sample_rows(config: ModelConfig, plan: Plan, logits: Tensor) -> Sampled:
    """`logits` [S, vocab] float32: one row for each chunk that is sampled, in the plan's order."""
    sequences = [chunk.sequence for chunk in plan.chunks if chunk.sampled]
    if not sequences:
        return Sampled([], {})
    out = torch.empty(len(sequences), dtype=torch.int64)
    sample(logits, _params(sequences), out, _banned(config, sequences))
    return Sampled(out.tolist(), _logprobs(logits, out, sequences))


def _params(sequences: list[Sequence]) -> SampleParams | None:
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


def _banned(config: ModelConfig, sequences: list[Sequence]) -> tuple[Tensor, Tensor] | None:
    """(row, token) pairs: what would end an output that has not reached min_tokens."""
    pairs = [
        (row, token)
        for row, sequence in enumerate(sequences)
        if sequence.outputs < sequence.request.sampling.min_tokens
        for token in (*config.eos_ids, *sequence.request.sampling.stop_token_ids)
    ]
    if not pairs:
        return None
    rows, tokens = zip(*pairs, strict=True)
    return torch.tensor(rows), torch.tensor(tokens)


def _logprobs(logits: Tensor, tokens: Tensor, sequences: list[Sequence]) -> dict[int, TokenLogprobs]:
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
