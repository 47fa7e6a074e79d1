"""The engine alone, without HTTP or NATS, on one GPU with random weights: TPOT, prefill, and what bounds them.

python -m benchmarks.engine --shape v2-lite --points 1024x4,1024x16,1024x64,8192x4 --output 1024 --rounds 5
python -m benchmarks.engine --shape r1 --layers 11 --output 192 [--peer after]
python -m benchmarks.engine --points 1024x16,1024x64 --link mailbox --shards 2 [--workers 2]

TPOT = (time of a run - time of the same run with one output token) / (output - 1), the whole batch submitted at once.
A stream's TPOT is the median of what its client would measure, from its own first token to its last, with the prompts
of others in between: what benchmarks.serve is to be compared with.
GPU idle is the share of the time between the end of one decode step's launches and the next step's forward graph.
The floor counts the bytes that a step must read: all weights but the routed experts' that no token chose (counted in
the last layer, in every step), and the cache at the starting context.

`--peer`: vLLM too, half of the GPU each, in turn in every round; `--peer after`: after ours, where both do not fit
(R1). `--link mailbox`: then the same with the experts in processes of their own, all on this GPU under MPS, and with
`--workers 2` beside a second worker, which is stopped in the middle of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch
import triton

from benchmarks.kernels.timing import ceilings, need_gpu
from benchmarks.link_rig import mps
from benchmarks.shapes import SHAPES, write_config
from benchmarks.timing import tpot
from common.loading import Loading
from common.messages import Generate, Sampling, TokenChunk
from common.model_config import ModelConfig
from common.source import open_source
from kernels.quant import Fp8Blocks
from services.expert_shard.stacks import ExpertStack, load_stacks
from services.gpu_worker.engine import Engine, StepOutput
from services.gpu_worker.gpu_engine import make_engine
from services.gpu_worker.graphs import GpuRunner, UnderWay
from services.gpu_worker.planner import Plan
from services.gpu_worker.weights import Weights, load_weights


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@dataclass
class Run:
    """Requests under way; filled by the engine's thread."""

    left: set[str]
    tokens: int = 0
    first: dict[str, float] = field(default_factory=dict)  # when each request's first token came
    last: dict[str, float] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def ended(self) -> float:
        return max(self.last.values())

    def hear(self, chunks: Iterable[TokenChunk], now: float) -> None:
        for chunk in chunks:
            self.tokens += len(chunk.tokens)
            self.first.setdefault(chunk.request_id, now)
            self.last[chunk.request_id] = now
            if chunk.finish:
                self.left.discard(chunk.request_id)
        if not self.left:
            self.done.set()

    def stream_tpot(self) -> float:
        """Milliseconds, the median of the streams, which all have as many tokens; NaN with one token."""
        tokens = self.tokens // len(self.first)
        return 1e3 * statistics.median(tpot((self.first[r], self.last[r]), tokens) for r in self.first)


MOST_STEPS = 4096  # whose routing is kept


class Timed:
    """A graph, and when the GPU came to it each time."""

    def __init__(self, graph: torch.cuda.CUDAGraph, times: list[torch.cuda.Event]) -> None:
        self._graph, self._times = graph, times

    def replay(self) -> None:
        self._times.append(event())
        self._graph.replay()


def event() -> torch.cuda.Event:
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    return now


class Watch:
    """What the runner does in a run: how long the GPU has nothing to do between decode steps, how long the host works
    on a step, and which experts the last layer chose."""

    def __init__(self, runner: GpuRunner, topk: int) -> None:
        self._runner, self._launch = runner, runner.launch
        self._topk = topk
        rows = max(runner.graphs)
        columns = next(iter(runner.works.values())).ids.shape[1]
        self._ids = torch.zeros(MOST_STEPS, rows, columns, dtype=torch.int32, device="cuda")
        self._decodes: list[int] = []
        self._began: list[torch.cuda.Event] = []  # of the step that is being launched
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event] | None] = []  # None: one with prompts
        self._host: list[float] = []  # CPU seconds of the engine's thread, at each launch
        self._own = 0.0  # of those, what went on here
        for size, graph in runner.graphs.items():
            runner.graphs[size] = replace(graph, forward=Timed(graph.forward, self._began))  # type: ignore[arg-type]
        runner.launch = self.launch  # type: ignore[method-assign]

    def reset(self) -> None:
        for noted in (self._decodes, self._steps, self._host):
            noted.clear()

    def launch(self, plan: Plan, late: bool = False) -> UnderWay:
        self._began.clear()
        self._host.append(time.thread_time() - self._own)
        launched = self._launch(plan, late)
        ended = time.thread_time()
        self._steps.append(None if plan.prefills or not self._began else (self._began[0], event()))
        if plan.decodes and len(self._decodes) < MOST_STEPS:
            count = len(plan.decodes)
            bucket = self._runner.bucket(count)
            self._ids[len(self._decodes), :count] = self._runner.works[bucket].ids[:count]
            self._decodes.append(count)
        self._own += time.thread_time() - ended
        return launched

    def idle(self) -> float:
        """The share of the time in which the GPU had nothing of a step to do, where steps are decodes alone. At least:
        what the host needs to launch a graph counts as the graph's."""
        torch.cuda.synchronize()
        gaps = whole = 0.0
        for one, after in itertools.pairwise(self._steps):
            if one is not None and after is not None:
                gaps += one[1].elapsed_time(after[0])
                whole += one[0].elapsed_time(after[0])
        return gaps / whole if whole else float("nan")

    def host_us(self) -> float:
        """Microseconds of the engine's thread from one launch of decodes alone to the next, in the median."""
        steps = zip(itertools.pairwise(self._steps), itertools.pairwise(self._host), strict=True)
        found = [1e6 * (after - one) for (a, b), (one, after) in steps if a is not None and b is not None]
        return statistics.median(found) if found else float("nan")

    def touched(self, decodes: int) -> float:
        """Experts that a step of so many decodes touched, on average."""
        steps = [i for i, count in enumerate(self._decodes) if count == decodes]
        ids = self._ids[:, :, : self._topk].cpu()
        return statistics.mean(int(ids[i, :decodes].unique().numel()) for i in steps)


class Bench:
    """The engine, and requests to it."""

    def __init__(self, config: ModelConfig, weights: Weights, stacks: dict[int, ExpertStack], **settings: Any) -> None:
        self.config, self.weights, self.stacks = config, weights, stacks
        self.run = Run(set())  # the last one
        self.steps: list[float] = []  # when each step of the last run was told
        self.engine: Engine = make_engine(config, weights, stacks, self._emit, prefix_cache=False, **settings)
        assert isinstance(self.engine.runner, GpuRunner)
        self.runner, self.sampling, self.greedy = self.engine.runner, dict[str, Any](), False
        self.watch = Watch(self.runner, config.topk)
        self.engine.start()

    def _emit(self, output: StepOutput) -> None:
        if output.chunks:
            now = time.perf_counter()
            self.steps.append(now)
            self.run.hear(itertools.chain(*output.chunks.values()), now)

    def seconds(self, inputs: int, concurrency: int, outputs: int, temperature: float) -> float:
        """From the first request's submission to the last one's end."""
        draw = random.Random(f"{inputs} {concurrency}")
        requests = [
            Generate(
                request_id=f"r{i}",
                gateway_id="g",
                prompt=tuple(draw.randrange(self.config.vocab) for _ in range(inputs)),
                sampling=Sampling(
                    **dict(max_tokens=outputs, temperature=temperature, seed=i, ignore_eos=True) | self.sampling
                ),
            )
            for i in range(concurrency)
        ]
        self.watch.reset()
        self.steps.clear()
        run = self.run = Run({r.request_id for r in requests})
        started = time.perf_counter()
        for request in requests:
            self.engine.submit(request)
        while not run.done.wait(5.0):
            if self.engine.crashed is not None:
                raise self.engine.crashed
            progress(f"  {run.tokens} of {concurrency * outputs} tokens")
        assert run.tokens == concurrency * outputs, (run.tokens, concurrency * outputs)
        return run.ended - started

    def profile(self, concurrency: int, replays: int = 5) -> list[tuple[str, float, float]]:
        """(kernel, launches a step, us a step) of a decode step's graphs, the longest first."""
        graph = self.runner.graphs[self.runner.bucket(concurrency)]

        def steps() -> None:
            for _ in range(replays):
                graph.forward.replay()
                (graph.greedy if self.greedy else graph.random).replay()

        return [(name, count / replays, us / replays) for name, count, us in kernels_of(steps)]

    def profile_prefill(self, inputs: int, concurrency: int) -> list[tuple[str, float, float]]:
        """The same of all prompts together."""
        return kernels_of(lambda: self.seconds(inputs, concurrency, 1, 1.0))

    def floor_bytes(self, concurrency: int, context: int, touched: float) -> float:
        """What a step must read where its layers touch so many routed experts."""
        c = self.config
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
        return fixed + experts + c.layers * concurrency * context * c.latent * 2


def kernels_of(launches: Callable[[], object]) -> list[tuple[str, float, float]]:
    """(kernel, launches, us), the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        launches()
        torch.cuda.synchronize()
    found = [(e.key, float(e.count), e.self_device_time_total) for e in profiled.key_averages()]
    return sorted((one for one in found if one[2] > 0), key=lambda one: -one[2])


class Peer:
    """vLLM in a process of its own on the same GPU, idle while we run."""

    def __init__(self, folder: Path, *settings: object) -> None:
        command = [sys.executable, "-m", "benchmarks.vllm_peer", str(folder), *map(str, settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        word, _, seconds = self._answer().partition(" ")
        assert word == "ready", word
        progress(f"vLLM ready after {seconds} s")

    def seconds(self, inputs: int, concurrency: int, outputs: int, temperature: float) -> float:
        assert self._process.stdin is not None
        print(inputs, concurrency, outputs, temperature, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with {self._process.wait()}; what it said is above")
        return line.strip()


def load(shape: str, layers: int, apart: bool) -> tuple[ModelConfig, Weights, dict[int, ExpertStack]]:
    """`apart`: the shared experts are the worker's own, as beside a link."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(shape, layers, Path(folder))
        config = ModelConfig.load(path, weights="random")
        source = open_source(path, config, "random")
        weights = load_weights(config, source, "cuda", shared=apart)
        told = Loading(structlog.get_logger()).of("experts")
        stacks = load_stacks(
            config, source, range(config.experts), "cuda", shared=not apart, fp8=config.fp8, progress=told
        )
    torch.cuda.synchronize()
    progress(f"weights drawn in {time.perf_counter() - started:.1f} s")
    return config, weights, stacks


def points(text: str) -> list[tuple[int, int]]:
    """(input, streams) of each."""
    try:
        found = [(int(inputs), int(streams)) for inputs, streams in (one.split("x") for one in text.split(","))]
    except ValueError:
        found = []
    if not found or min(map(min, found)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} names no points: use INPUTxSTREAMS, as 1024x16")
    return found


def outputs(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of 2 or more: the first token is the prefill's, and TPOT is the time of the others"
        )
    return int(text)


def sampling(text: str) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
        asked = msgspec.convert({"max_tokens": 1} | fields, Sampling)
        return {name: getattr(asked, name) for name in fields}
    except (AttributeError, msgspec.MsgspecError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON of sampling parameters: {error}") from error


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="v2-lite", help="(default %(default)s)")
    parser.add_argument(
        "--layers", type=int, default=0,
        help="0, the default: all; the first ones are dense. All of R1's fit on no single card: 11 do on an H200, 5 on "
        "an H100 of 80 GB",
    )  # fmt: skip
    parser.add_argument(
        "--points", type=points, default="1024x4,1024x8,1024x16,1024x32,1024x64,8192x4,8192x16",
        help="INPUTxSTREAMS: prompt tokens of each, and how many at once (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=outputs, default=1024, help="tokens of each stream (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each point; medians count (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens a step (default %(default)s)")
    parser.add_argument(
        "--peer", nargs="?", choices=("beside", "after"), const="beside",
        help="measure vLLM too, where it can be imported: in turn with ours (beside: what --peer alone is), or after",
    )  # fmt: skip
    parser.add_argument("--memory", type=float, default=0.0, help="share of the GPU, default 0.92, beside a peer 0.47")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default %(default)s)")
    parser.add_argument(
        "--sampling", type=sampling, default={}, metavar="JSON",
        help="""what else ours are asked for, as common.messages.Sampling names it: '{"logprobs": 5}'""",
    )  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", help="list the kernels of a step and of the prompts on stderr"
    )
    parser.add_argument("--apart", action="store_true", help="compute the shared experts by themselves, as with a link")
    parser.add_argument("--link", choices=("local", "mailbox"), default="local", help="mailbox: after the local link")
    beside = "with --link mailbox (default %(default)s)"
    parser.add_argument("--shards", type=int, default=2, help=f"processes that hold the experts, {beside}")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1, help=beside)
    parser.add_argument("--json", type=Path, help="write all figures there too")
    return parser


def main() -> None:
    parser = command_line()
    arguments = parser.parse_args()
    if arguments.peer and importlib.util.find_spec("vllm") is None:
        parser.error(
            "--peer needs vLLM in this environment (0.25.1 was measured), and it is not installed: "
            "leave --peer out to measure ours alone"
        )
    with contextlib.ExitStack() as stack:
        if arguments.link == "mailbox":
            try:
                stack.enter_context(mps())
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                remedy = "leave --link out to measure the local link"
                parser.error(f"--link mailbox shares the GPU through MPS, and {error}: {remedy}")
        need_gpu(parser)
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    ceiling, batch = ceilings(), max(n for _, n in arguments.points)
    context = max(inputs for inputs, _ in arguments.points) + arguments.output + 64
    memory = arguments.memory or (0.47 if arguments.peer == "beside" else 0.92)
    config, weights, stacks = load(arguments.shape, arguments.layers, arguments.apart)
    started = time.perf_counter()
    settings: dict[str, Any] = dict(max_batch=batch, max_context=context, chunk_tokens=arguments.chunk, memory=memory)
    bench = Bench(config, weights, stacks, **settings)
    bench.sampling, bench.greedy = arguments.sampling, arguments.temperature == 0
    progress(f"engine ready after {time.perf_counter() - started:.1f} s")

    def new_peer() -> Peer:
        folder = write_config(arguments.shape, arguments.layers, Path(tempfile.mkdtemp()))
        return Peer(folder, batch, context, arguments.chunk, memory)

    peer = new_peer() if arguments.peer == "beside" else None
    print(head(config, arguments, ceiling["read"], stacks), flush=True)
    rows = []
    sides: dict[str, Bench | Peer] = {"ours": bench} | ({"vllm": peer} if peer is not None else {})
    for inputs, concurrency in arguments.points:
        row = measure(sides, inputs, concurrency, arguments)
        row["floor"] = bench.floor_bytes(concurrency, inputs, row["touched"])
        rows.append(row)
        print(line(row, ceiling["read"]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
        if arguments.profile:
            report(f"decode, {concurrency} streams", bench.profile(concurrency))
            report(f"prefill of {concurrency} x {inputs}", bench.profile_prefill(inputs, concurrency))
    for row in rows:  # last, for a profiler leaves launches slower than they were
        if arguments.link == "local" and not arguments.sampling:  # MPS and it have not been tried together
            row["launches"] = sum(count for _, count, _ in bench.profile(row["concurrency"], 1))
    print("\n" + "\n".join(map(steps_line, rows)) + "\n", flush=True)
    bench.engine.stop()
    if peer is not None:
        peer.close()
    stacks.clear()
    sides.clear()
    del bench, weights
    gc.collect()
    torch.cuda.empty_cache()
    if arguments.peer == "after":
        peer = new_peer()
        print("\nand vLLM after ours:\n")
        for row in rows:
            row["vllm"] = measure({"vllm": peer}, row["input"], row["concurrency"], arguments)["vllm"]
            print(line(row, ceiling["read"]), flush=True)
        peer.close()
    if arguments.link == "mailbox":
        from benchmarks.split import run_split

        rows += run_split(arguments, settings, list(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def measure(
    sides: Mapping[str, Bench | Peer], inputs: int, concurrency: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Rounds of each side in turn."""
    row: dict[str, Any] = {"input": inputs, "concurrency": concurrency, "touched": 0.0}
    row |= {"idle": [], "host_us": [], "stream": []}
    for name, side in sides.items():
        side.seconds(inputs, concurrency, 8, arguments.temperature)  # warm
        row[name] = {"prefill": [], "tpot": []}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            prefill = side.seconds(inputs, concurrency, 1, arguments.temperature)
            total = side.seconds(inputs, concurrency, arguments.output, arguments.temperature)
            row[name]["prefill"].append(prefill)
            row[name]["tpot"].append(1e3 * (total - prefill) / (arguments.output - 1))
            if isinstance(side, Bench):
                row["idle"].append(side.watch.idle())
                row["host_us"].append(side.watch.host_us())
                row["touched"] = side.watch.touched(concurrency)
                row["stream"].append(side.run.stream_tpot())
            latest = row[name]["tpot"][-1]
            progress(f"{inputs} x {concurrency}, {name}: {latest:.3f} ms, prefill {prefill:.3f} s")
    return row


def head(config: ModelConfig, arguments: argparse.Namespace, read: float, stacks: dict[int, ExpertStack]) -> str:
    fp8 = isinstance(next(iter(stacks.values())).down, Fp8Blocks)
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{time.strftime('%Y-%m-%d')}; read ceiling here {read:.2f} TB/s\n"
        f"{arguments.shape}, {config.layers} layers, {'fp8' if fp8 else 'bf16'}, random weights, "
        f"{arguments.output} output tokens, temperature {arguments.temperature:g}; medians of {arguments.rounds}\n\n"
        "| input x streams | TPOT ms | least | a stream's | GPU idle | floor ms | TPOT / floor | touched | prefill s | "
        "tok/s | vLLM TPOT ms (ours is faster by) | vLLM prefill s |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )


def line(row: dict, read: float) -> str:
    inputs, concurrency = row["input"], row["concurrency"]
    ours, prefill = statistics.median(row["ours"]["tpot"]), statistics.median(row["ours"]["prefill"])
    floor = row["floor"] / read / 1e9
    cells = [
        f"{inputs} x {concurrency}", f"{ours:.2f}", f"{min(row['ours']['tpot']):.2f}",
        f"{statistics.median(row['stream']):.2f}", f"{statistics.median(row['idle']):.3f}", f"{floor:.2f}",
        f"{ours / floor:.2f}", f"{row['touched']:.1f}",
        f"{prefill:.3f}", f"{inputs * concurrency / prefill:.0f}",
    ]  # fmt: skip
    if "vllm" in row:
        theirs = statistics.median(row["vllm"]["tpot"]), statistics.median(row["vllm"]["prefill"])
        cells += [f"{theirs[0]:.2f} ({theirs[0] / ours:.2f}x)", f"{theirs[1]:.3f} ({theirs[1] / prefill:.2f}x)"]
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def steps_line(row: dict) -> str:
    launches = f"{row['launches']:.0f} launches in its graphs, " if "launches" in row else ""
    host = statistics.median(row["host_us"])
    return f"a step of {row['concurrency']} streams at {row['input']}: {launches}{host:.0f} us of the engine's thread"


def report(what: str, kernels: list[tuple[str, float, float]]) -> None:
    progress(f"{what}: {sum(us for _, _, us in kernels) / 1e3:.2f} ms of kernels")
    for name, launches, us in kernels[:20]:
        progress(f"  {us:10.1f} us {launches:7.1f} launches  {name[:90]}")


if __name__ == "__main__":
    main()
