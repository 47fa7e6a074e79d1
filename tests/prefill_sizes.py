"""Which kernels prefills of many sizes launch, on a machine without a GPU: for tests/test_prefill_sizes.py, which
starts it as a process of its own.

python -m tests.prefill_sizes SHAPE LAYERS [SEED]

prints a JSON object: size -> the names of its kernels that no rehearsed size has.

Tensors that would be on a GPU are on the CPU and say that they are not; a launch is only looked at.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import compute_cache_key

from tests.compiling import pretend

if TYPE_CHECKING:
    from services.gpu_worker.model import Model

LONGEST = 8192


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda or (func is torch.Tensor.to and "cuda" in map(str, args[1:])):
            return args[0]
        return func(*args, **kwargs)


def watch_launches() -> set[tuple[str, str]]:
    """From now on launches are only looked at: the kernels, and what each was compiled for, that there were."""
    pretend("sm_90")
    known: set[tuple[str, str]] = set()

    def look(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        _, keys, _, _, binder = self.device_caches[0]
        _, specialization, options = binder(*args, **kwargs, debug=False, instrumentation_mode="")
        known.add((self.fn.__name__, compute_cache_key(keys, specialization, options)))

    triton.JITFunction.run = look
    torch.Tensor.is_cuda = property(lambda _: True)
    torch.cuda.synchronize = lambda *_: None
    return known


def blank_model(shape: str, layers: int) -> Model:
    """Of one process, with whatever its memory holds as weights. Within OnCpu, after `watch_launches`."""
    from benchmarks.shapes import write_config
    from common.model_config import ModelConfig
    from common.random_weights import RandomWeights
    from common.source import open_source
    from services.expert_shard.stacks import load_stacks
    from services.gpu_worker.model import Model
    from services.gpu_worker.weights import load_weights

    RandomWeights.fill = lambda *_, **__: None
    folder = write_config(shape, layers, Path(tempfile.mkdtemp()))
    config = ModelConfig.load(folder, weights="random")
    source = open_source(folder, config, "random")
    weights = load_weights(config, source, "cuda", shared=False)
    stacks = load_stacks(config, source, range(config.experts), "cuda", shared=True, fp8=config.fp8)
    return Model(config, weights, stacks=stacks)


def main(shape: str, layers: int, seed: int) -> None:
    known = watch_launches()
    from kernels.ahead import prefill_sizes
    from services.gpu_worker.gpu_engine import rehearse_prefill
    from services.gpu_worker.graphs import prefill_buckets

    with OnCpu():
        model = blank_model(shape, layers)
        rehearse_prefill(model, LONGEST, 2 * LONGEST, False)
        for rows in prefill_sizes(LONGEST):
            rehearse_prefill(model, rows, rows, False)
        found = {}
        draw = random.Random(seed)
        sizes = {*prefill_buckets(LONGEST), *range(2, 40), *(1 << n for n in range(6, 13))}
        sizes |= {draw.randrange(40, LONGEST) for _ in range(30)}
        sizes |= {16 * draw.randrange(3, LONGEST // 16) for _ in range(20)}
        for rows in sorted(sizes):
            before = set(known)
            rehearse_prefill(model, rows, min(2 * LONGEST, rows * draw.choice((1, 2, 5))), False)
            if new := sorted({name for name, _ in known - before}):
                found[rows] = new
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["1"])[0]))
