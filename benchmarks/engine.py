"""The engine alone, without HTTP or NATS, on one GPU with random weights: TPOT, prefill, and what bounds them.

python -m benchmarks.engine --shape v2-lite --points 1024x4,1024x16,1024x64,8192x4 --output 1024 --rounds 5
python -m benchmarks.engine --shape r1 --layers 11 --output 192

TPOT = (time of a run - time of the same run with one output token) / (output - 1), the whole batch submitted at once.
`step` is the replay of the captured graphs alone, at the context that the run ended with: TPOT above it is idle GPU.
The floor counts the bytes that a step must read: all weights but the routed experts' that no token chose (counted in
the last layer), and the cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

from benchmarks.kernels.timing import ceilings
from benchmarks.shapes import SHAPES, write_config
from common.messages import Generate, Sampling
from common.model_config import ModelConfig
from common.source import open_source
from kernels.quant import Fp8Blocks
from services.expert_shard.stacks import ExpertStack, load_stack
from services.gpu_worker.engine import Engine, StepOutput
from services.gpu_worker.gpu_engine import make_engine
from services.gpu_worker.graphs import GpuRunner
from services.gpu_worker.weights import Weights, load_weights


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@dataclass
class Run:
    """Requests under way; filled by the engine's thread."""

    left: set[str]
    tokens: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    ended: float = 0.0


class Bench:
    def __init__(self, config: ModelConfig, weights: Weights, stacks: dict[int, ExpertStack], **settings) -> None:
        self.config, self.weights, self.stacks = config, weights, stacks
        self._run = Run(set())
        self.engine: Engine = make_engine(config, weights, stacks, self._emit, prefix_cache=False, **settings)
        self.engine.start()

    def _emit(self, output: StepOutput) -> None:
        run = self._run
        for chunks in output.chunks.values():
            for chunk in chunks:
                run.tokens += len(chunk.tokens)
                if chunk.finish:
                    run.left.discard(chunk.request_id)
        if not run.left and not run.done.is_set():
            run.ended = time.perf_counter()
            run.done.set()

    def seconds(self, inputs: int, concurrency: int, outputs: int, temperature: float) -> float:
        """From the first request's submission to the last one's end."""
        draw = random.Random(f"{inputs} {concurrency}")
        requests = [
            Generate(
                request_id=f"r{i}",
                gateway_id="g",
                prompt=tuple(draw.randrange(self.config.vocab) for _ in range(inputs)),
                sampling=Sampling(max_tokens=outputs, temperature=temperature, seed=i, ignore_eos=True),
            )
            for i in range(concurrency)
        ]
        run = self._run = Run({r.request_id for r in requests})
        started = time.perf_counter()
        for request in requests:
            self.engine.submit(request)
        while not run.done.wait(5.0):
            if self.engine.crashed is not None:
                raise self.engine.crashed
            progress(f"  {run.tokens} of {concurrency * outputs} tokens")
        assert run.tokens == concurrency * outputs, (run.tokens, concurrency * outputs)
        return run.ended - started

    def replay_ms(self, concurrency: int) -> float:
        """A step's graphs one after another, on what the last run left."""
        runner = self.engine._runner
        assert isinstance(runner, GpuRunner)
        graph = runner.graphs[min(rows for rows in runner.graphs if rows >= concurrency)]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        found = []
        for _ in range(5):
            torch.cuda.synchronize()
            start.record()
            for _ in range(10):
                graph.forward.replay()
                graph.random.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 10)
        return statistics.median(found)

    def floor_bytes(self, concurrency: int, context: int) -> tuple[float, int]:
        """(bytes a step must read, experts touched in the last layer)"""
        c, runner = self.config, self.engine._runner
        assert isinstance(runner, GpuRunner)
        bucket = min(rows for rows in runner.graphs if rows >= concurrency)
        ids = runner.works[bucket].ids[:concurrency, : c.topk]
        touched = int(ids.unique().numel())
        fixed = 0.0
        for layer in self.weights.layers:
            parts = [layer.qkv.a, layer.qkv.b, layer.o, layer.w_uk, layer.w_uv, layer.w_gate]
            if layer.index not in self.stacks and layer.mlp is not None:
                parts += [layer.mlp.gate_up, layer.mlp.down]
            fixed += sum(part.data.numel() * part.data.itemsize for part in parts if part is not None)
        fixed += self.weights.head.numel() * self.weights.head.itemsize
        stack = next(iter(self.stacks.values()))
        expert = sum(w.data[0].numel() * w.data.itemsize for w in (stack.gate_up, stack.down))
        experts = len(self.stacks) * (touched + c.shared_experts) * expert
        cache = c.layers * concurrency * context * c.latent * 2
        return fixed + experts + cache, touched


def load(shape: str, layers: int) -> tuple[ModelConfig, Weights, dict[int, ExpertStack]]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(shape, layers, Path(folder))
        config = ModelConfig.load(path, weights="random")
        source = open_source(path, config, "random")
        weights = load_weights(config, source, "cuda", shared=False)
        stacks = {}
        for layer in config.moe_layers:
            stacks[layer] = load_stack(
                config, source, layer, range(config.experts), "cuda", shared=True, fp8=config.fp8
            )  # fmt: skip
            progress(f"layer {layer}: {torch.cuda.memory_allocated() / 1e9:.1f} GB held")
    torch.cuda.synchronize()
    progress(f"weights drawn in {time.perf_counter() - started:.1f} s")
    return config, weights, stacks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="v2-lite")
    parser.add_argument("--layers", type=int, default=0, help="0: all; the first ones are dense")
    parser.add_argument(
        "--points", default="1024x4,1024x8,1024x16,1024x32,1024x64,8192x4,8192x16", help="input x concurrency"
    )
    parser.add_argument("--output", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens a step")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    points = [tuple(map(int, point.split("x"))) for point in arguments.points.split(",")]
    ceiling = ceilings()
    config, weights, stacks = load(arguments.shape, arguments.layers)
    started = time.perf_counter()
    bench = Bench(
        config, weights, stacks,
        max_batch=max(n for _, n in points),
        max_context=max(inputs for inputs, _ in points) + arguments.output + 64,
        chunk_tokens=arguments.chunk,
    )  # fmt: skip
    progress(f"engine ready after {time.perf_counter() - started:.1f} s")
    fp8 = isinstance(next(iter(stacks.values())).down, Fp8Blocks)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{time.strftime('%Y-%m-%d')}; read ceiling here {ceiling['read']:.2f} TB/s\n"
        f"{arguments.shape}, {config.layers} layers, {'fp8' if fp8 else 'bf16'}, random weights, "
        f"{arguments.output} output tokens, temperature {arguments.temperature:g}; medians of {arguments.rounds}\n\n"
        "| input x streams | TPOT ms | least | step ms | idle | floor ms | touched | prefill s | tok/s |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        flush=True,
    )
    rows = []
    for inputs, concurrency in points:
        bench.seconds(inputs, concurrency, 8, arguments.temperature)  # warm
        prefills, tpots = [], []
        for _ in range(arguments.rounds):
            prefills.append(bench.seconds(inputs, concurrency, 1, arguments.temperature))
            total = bench.seconds(inputs, concurrency, arguments.output, arguments.temperature)
            tpots.append(1e3 * (total - prefills[-1]) / (arguments.output - 1))
            progress(f"{inputs} x {concurrency}: {tpots[-1]:.3f} ms, prefill {prefills[-1]:.3f} s")
        step = bench.replay_ms(concurrency)
        size, touched = bench.floor_bytes(concurrency, inputs)
        floor = size / ceiling["read"] / 1e9
        tpot, prefill = statistics.median(tpots), statistics.median(prefills)
        rows.append({"input": inputs, "concurrency": concurrency, "tpot": tpots, "prefill": prefills, "step": step,
                     "floor": floor, "touched": touched})  # fmt: skip
        print(
            f"| {inputs} x {concurrency} | {tpot:.2f} | {min(tpots):.2f} | {step:.2f} | "
            f"{max(0.0, 1 - step / tpot):.2f} | {floor:.2f} | {touched} | {prefill:.3f} | "
            f"{inputs * concurrency / prefill:.0f} |",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
    bench.engine.stop()


if __name__ == "__main__":
    main()
