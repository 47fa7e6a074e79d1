"""Which kernels a worker on a GPU launches for passes of prompts, on a machine without one: for
tests/test_prefill_sizes.py, which starts it as a process of its own.

python -m tests.worker_kinds SHAPE LAYERS [SEED]

prints a JSON object: what was launched -> the names of its kernels that were not compiled ahead.
"""

from __future__ import annotations

import json
import random
import sys

from tests.prefill_sizes import OnCpu, blank_model, watch_launches

BATCH, CHUNK, CONTEXT = 64, 4096, 16384


def main(shape: str, layers: int, seed: int) -> None:
    known = watch_launches()
    import torch

    from common.pages import PAGE
    from kernels.sizes import holding
    from services.gpu_worker.batch import Batch, Chunk
    from services.gpu_worker.gpu_engine import compile_kernels
    from services.gpu_worker.graphs import PrefillGraph, prefill_buckets
    from services.gpu_worker.sampler import Sampler
    from services.gpu_worker.scoring import ROWS
    from services.gpu_worker.work import Arena

    found: dict[str, list[str]] = {}

    def launched(what: str) -> None:
        if new := sorted({name for name, _ in known - ahead}):
            found[what] = new
        ahead.update(known)

    with OnCpu(), torch.inference_mode():
        model = blank_model(shape, layers)
        sampler = Sampler(model.config, max_batch=BATCH, threads=1, device="cuda")
        compile_kernels(model.abridged(), sampler, BATCH, CONTEXT, CHUNK, fp8_cache=False, links=None)
        ahead, draw = set(known), random.Random(seed)
        cache, arena, graphs = model.new_cache(CONTEXT // PAGE), Arena(), {}
        for rows in reversed(prefill_buckets(CHUNK)):
            graphs[rows] = PrefillGraph(rows, model, cache, arena)
            for _ in graphs[rows]._around():
                pass
            launched(f"around the attention of {rows} rows")
        scratch = model.prefill_scratch(CONTEXT)
        for _ in range(30):
            some = [draw.choice((2, 3, 16, 100, draw.randrange(2, 1500))) for _ in range(draw.choice((1, 1, 2, 3, 9)))]
            chunks, first = [], 0
            for rows in some:
                context = rows + draw.choice((0, PAGE, PAGE * draw.randrange(CONTEXT // PAGE // 2)))
                chunks.append(Chunk(first, rows, context, torch.zeros(-(-context // PAGE), dtype=torch.int64)))
                first += rows
            if first > CHUNK:
                continue
            none = torch.zeros(0, 0, dtype=torch.int32)
            batch = Batch(none, none, none, 0, none, none[:0], tuple(chunks), none)
            graph = graphs[holding(graphs, first)]
            model.attention(batch, cache, graph.work, scratch)(0)
            launched(f"attention of {[(c.rows, c.context) for c in chunks]}")
        hidden = graphs[CHUNK].work.x
        for rows in range(1, max(BATCH, ROWS) + 1):
            model.logits(hidden, torch.arange(rows))
            launched(f"logits of {rows} rows")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["1"])[0]))
