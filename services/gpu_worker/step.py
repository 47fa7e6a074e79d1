"""From a plan to the tensors that the model takes."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch

from common.pages import PAGE
from services.gpu_worker.batch import Batch, Chunk
from services.gpu_worker.planner import Plan


def build_batch(plan: Plan) -> Batch:
    """A prefill has thousands of rows: all of them at once, by numpy."""
    chunks = plan.chunks
    tokens = list(chain.from_iterable(c.sequence.tokens[c.start : c.end] for c in chunks))
    tables = [c.sequence.pages[: -(-c.end // PAGE)] for c in chunks]
    pages = np.array(list(chain.from_iterable(tables)), np.int64)
    rows, starts, widths = (
        np.array(column, np.int64)
        for column in ([c.rows for c in chunks], [c.start for c in chunks], [len(table) for table in tables])
    )
    firsts = rows.cumsum() - rows  # a chunk's first row in the batch
    positions = np.arange(len(tokens)) + np.repeat(starts - firsts, rows)
    page = pages[np.repeat(widths.cumsum() - widths, rows) + positions // PAGE]
    contexts = [chunk.end for chunk in plan.decodes]
    widest = -(-max(contexts, default=0) // PAGE)
    padded = [(c.sequence.pages + [0] * widest)[:widest] for c in plan.decodes]
    return Batch(
        tokens=torch.from_numpy(np.array(tokens, np.int64)),
        positions=torch.from_numpy(positions),
        write=torch.from_numpy(page * PAGE + positions % PAGE),
        n_decode=len(plan.decodes),
        block_table=torch.tensor(padded, dtype=torch.int64).view(len(contexts), widest),
        context=torch.tensor(contexts, dtype=torch.int64),
        prefill=tuple(
            Chunk(first, chunk.rows, chunk.end, torch.tensor(table))
            for first, chunk, table in zip(firsts.tolist(), chunks, tables, strict=True)
            if chunk.rows > 1
        ),
        logit_rows=torch.from_numpy((firsts + rows - 1)[np.array([c.sampled for c in chunks], bool)]),
    )
