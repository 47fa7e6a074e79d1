"""The engine alone, without HTTP or NATS, on one GPU with random weights: TPOT, prefill, and what bounds them.

python -m benchmarks.engine --shape v2-lite --points 1024x4,1024x16,1024x64,8192x4 --output 1024 --rounds 5
python -m benchmarks.engine --shape r1 --layers 11 --output 192
python -m benchmarks.engine --points 1024x16,1024x64 --link mailbox --shards 2

TPOT = (time of a run - time of the same run with one output token) / (output - 1), the whole batch submitted at once.
`step` is the replay of the captured graphs alone, at the context that the run ended with: TPOT above it is idle GPU.
The floor counts the bytes that a step must read: all weights but the routed experts' that no token chose (counted in
the last layer), and the cache.

With `--link mailbox` the local link is measured first, then the same engine with its experts in processes of their own,
all on this GPU under MPS.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernels.timing import ceilings
from benchmarks.link_rig import mps
from benchmarks.shapes import SHAPES, write_config
from common.messages import Generate, Sampling
from common.model_config import ModelConfig
from common.pages import PAGE
from common.source import open_source
from kernels.link import SlabLayout
from services.expert_shard.stacks import ExpertStack, load_stack
from services.gpu_worker.engine import Engine, StepOutput
from services.gpu_worker.gpu_engine import make_engine
from services.gpu_worker.graphs import GpuRunner, buckets
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
    def __init__(
        self, config: ModelConfig, weights: Weights, stacks: dict[int, ExpertStack] | None, **settings: Any
    ) -> None:
        self.config, self.weights, self.stacks = config, weights, stacks or {}
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
            if layer.mlp is not None:
                parts += [layer.mlp.gate_up, layer.mlp.down]
            fixed += sum(part.data.numel() * part.data.itemsize for part in parts if part is not None)
        fixed += self.weights.head.numel() * self.weights.head.itemsize
        stack = next(iter(self.stacks.values()))
        expert = sum(w.data[0].numel() * w.data.itemsize for w in (stack.gate_up, stack.down))
        riding = len(stack.down.data) - c.experts  # shared experts
        experts = len(self.stacks) * (touched + riding) * expert
        cache = c.layers * concurrency * context * c.latent * 2
        return fixed + experts + cache, touched


def load(
    folder: Path, config: ModelConfig, *, apart: bool = False, experts: bool = True
) -> tuple[Weights, dict[int, ExpertStack]]:
    """`apart`: the shared experts among the worker's own weights, as beside a link."""
    started = time.perf_counter()
    source, stacks = open_source(folder, config, "random"), {}
    weights = load_weights(config, source, "cuda", shared=apart)
    for layer in config.moe_layers if experts else ():
        stacks[layer] = load_stack(
            config, source, layer, range(config.experts), "cuda", shared=not apart, fp8=config.fp8
        )  # fmt: skip
        progress(f"layer {layer}: {torch.cuda.memory_allocated() / 1e9:.1f} GB held")
    torch.cuda.synchronize()
    progress(f"weights drawn in {time.perf_counter() - started:.1f} s")
    return weights, stacks


@dataclass
class Point:
    input: int
    concurrency: int
    prefills: list[float] = field(default_factory=list)
    tpots: list[float] = field(default_factory=list)
    step: float = 0.0  # of the graphs alone; 0: not measured
    floor: float = 0.0
    touched: int = 0

    def line(self, link: str) -> str:
        tpot, prefill = statistics.median(self.tpots), statistics.median(self.prefills)
        idle = f"{self.step:.2f} | {max(0.0, 1 - self.step / tpot):.2f}" if self.step else "- | -"
        return (
            f"| {link} | {self.input} x {self.concurrency} | {tpot:.2f} | {min(self.tpots):.2f} | {idle} | "
            f"{self.floor:.2f} | {self.touched} | {prefill:.3f} | {self.input * self.concurrency / prefill:.0f} |"
        )


def measure(bench: Bench, point: Point, outputs: int, rounds: int, temperature: float) -> None:
    inputs, concurrency = point.input, point.concurrency
    bench.seconds(inputs, concurrency, 8, temperature)  # warm
    for _ in range(rounds):
        point.prefills.append(bench.seconds(inputs, concurrency, 1, temperature))
        total = bench.seconds(inputs, concurrency, outputs, temperature)
        point.tpots.append(1e3 * (total - point.prefills[-1]) / (outputs - 1))
        progress(f"{inputs} x {concurrency}: {point.tpots[-1]:.3f} ms, prefill {point.prefills[-1]:.3f} s")


def run_local(folder: Path, config: ModelConfig, arguments: argparse.Namespace, settings: dict) -> list[Point]:
    ceiling, points = ceilings(), []
    weights, stacks = load(folder, config, apart=arguments.apart)
    bench = Bench(config, weights, stacks, **settings)
    print_head(arguments, config, ceiling["read"])
    for inputs, concurrency in arguments.points:
        points.append(point := Point(inputs, concurrency))
        measure(bench, point, arguments.output, arguments.rounds, arguments.temperature)
        point.step = bench.replay_ms(concurrency)
        size, point.touched = bench.floor_bytes(concurrency, inputs)
        point.floor = size / ceiling["read"] / 1e9
        print(point.line("local, apart" if arguments.apart else "local"), flush=True)
    bench.engine.stop()
    return points


def run_split(
    folder: Path, config: ModelConfig, arguments: argparse.Namespace, settings: dict, local: list[Point]
) -> list[Point]:
    """The same with the experts in `shards` processes; the floor is the local run's."""
    from benchmarks.shards import Shards

    layout = SlabLayout(
        config.hidden, config.topk, settings["max_batch"], settings["chunk_tokens"], arguments.shards, config.fp8
    )
    shards = Shards(folder, layout, buckets(settings["max_batch"]), arguments.shards, weights="random")
    weights, _ = load(folder, config, apart=True, experts=False)
    # Their experts lie on this GPU too, and come when this engine has taken its memory.
    pages = settings["max_batch"] * -(-settings["max_context"] // PAGE)
    bench = Bench(config, weights, None, links=shards.links, pages=pages, **settings)
    shards.attach()
    points = []
    for before in local:
        points.append(point := Point(before.input, before.concurrency, floor=before.floor, touched=before.touched))
        measure(bench, point, arguments.output, arguments.rounds, arguments.temperature)
        ratio = statistics.median(point.tpots) / statistics.median(before.tpots)
        print(f"{point.line(f'mailbox, {arguments.shards} shards')} {ratio:.3f}x the local link's", flush=True)
    bench.engine.stop()
    shards.close()
    return points


def print_head(arguments: argparse.Namespace, config: ModelConfig, read: float) -> None:
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{time.strftime('%Y-%m-%d')}; read ceiling here {read:.2f} TB/s\n"
        f"{arguments.shape}, {config.layers} layers, {'fp8' if config.fp8 else 'bf16'}, random weights, "
        f"{arguments.output} output tokens, temperature {arguments.temperature:g}; medians of {arguments.rounds}\n\n"
        "| link | input x streams | TPOT ms | least | step ms | idle | floor ms | touched | prefill s | tok/s |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        flush=True,
    )


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
    parser.add_argument("--apart", action="store_true", help="locally too, compute the shared experts by themselves")
    parser.add_argument("--link", choices=("local", "mailbox"), default="local", help="mailbox: after the local link")
    parser.add_argument("--shards", type=int, default=2, help="processes that hold the experts, with --link mailbox")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.points = [tuple(map(int, point.split("x"))) for point in arguments.points.split(",")]
    settings = dict(
        max_batch=max(n for _, n in arguments.points),
        max_context=max(inputs for inputs, _ in arguments.points) + arguments.output + 64,
        chunk_tokens=arguments.chunk,
    )
    with contextlib.ExitStack() as stack:
        if arguments.link == "mailbox":
            stack.enter_context(mps())
        folder = write_config(
            arguments.shape, arguments.layers, Path(stack.enter_context(tempfile.TemporaryDirectory()))
        )
        config = ModelConfig.load(folder, weights="random")
        found = {"local": run_local(folder, config, arguments, settings)}
        if arguments.link == "mailbox":
            gc.collect()
            torch.cuda.empty_cache()
            found["mailbox"] = run_split(folder, config, arguments, settings, found["local"])
        if arguments.json:
            rows = {link: [vars(point) for point in points] for link, points in found.items()}
            arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
