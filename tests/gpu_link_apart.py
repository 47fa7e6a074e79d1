"""A worker whose shards are processes of their own, for tests/test_gpu_link.py, which starts it under MPS:

python -m tests.gpu_link_apart same|stopped

Prints what it found as a line of JSON. A process of its own, since the one that runs the tests has used the GPU without
MPS by then.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.shards import Shards
from common.model_config import ModelConfig
from common.source import open_source
from kernels.link import SlabLayout
from services.gpu_worker.graphs import buckets
from services.gpu_worker.weights import load_weights
from tests.test_gpu_link import KIND, TINY, Local, Steady, ask, asked, prompts


class Apart(Steady):
    def __init__(self, folder: Path, shards: int, *, bound: float = 20.0) -> None:
        config = ModelConfig.load(folder)
        layout = SlabLayout(config.hidden, config.topk, KIND["max_batch"], KIND["chunk_tokens"], shards, config.fp8)
        self.shards = Shards(folder, layout, buckets(KIND["max_batch"]), shards, bound=bound)
        source = open_source(folder, config, "checkpoint")
        weights = load_weights(config, source, "cuda")
        self._make(config, weights, None, KIND | {"links": self.shards.links})
        self.shards.attach()

    def stop(self) -> None:
        self.engine.stop()
        self.shards.close()


def same() -> dict[str, Any]:
    """Whether the tokens are the local link's with one shard; and that all come with two."""
    requests = asked(2048)
    local = Local(TINY)
    want = local.run(*requests)
    local.engine.stop()
    found: dict[str, Any] = {}
    for count in (1, 2):
        apart = Apart(TINY, count)
        got = apart.run(*requests)
        apart.stop()
        found[f"same {count}"] = sum(a == b for a, b in zip(got, want, strict=True))
        found[f"all {count}"] = [len(tokens) for tokens in got] == [len(tokens) for tokens in want]
    return found | {"of": len(requests)}


def stopped(bound: float = 2.0) -> dict[str, Any]:
    """A shard is stopped in the middle of a text."""
    apart = Apart(TINY, 2, bound=bound)
    apart.run(ask("warm", prompts(1, 80, 2048)[0], max_tokens=8, ignore_eos=True))
    requests = [ask(f"r{i}", p, max_tokens=500, ignore_eos=True) for i, p in enumerate(prompts(4, 60, 2048))]
    told: list[float] = []

    def stop_when_running() -> None:
        while not all(apart.chunks[r.request_id] for r in requests):
            time.sleep(0.005)
        apart.shards.stand_still("s1")
        told.append(time.monotonic())

    stopper = threading.Thread(target=stop_when_running)
    stopper.start()
    apart.run(*requests)
    took = time.monotonic() - told[0] if told else -1.0
    stopper.join()
    ends = [apart.chunks[r.request_id][-1] for r in requests]
    apart.stop()
    return {"took": took, "finish": [e.finish for e in ends], "errors": [e.error for e in ends], "bound": bound}


if __name__ == "__main__":
    print(json.dumps({"same": same, "stopped": stopped}[sys.argv[1]]()), flush=True)
