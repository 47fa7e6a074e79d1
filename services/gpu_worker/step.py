"""From a plan to the tensors that the model takes."""

from __future__ import annotations

import torch

from common.pages import PAGE
from services.gpu_worker.batch import Batch, Chunk
from services.gpu_worker.planner import Plan


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
