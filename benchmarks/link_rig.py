"""Both ends of an expert link on one GPU, in two processes (under MPS) or in one: for its test and its benchmark.

The shard's experts are an echo: partial sum = row * sum over its ids of weight * (id + 1), which shows rows, ids and
weights and is exact. A layer on the worker is dispatch -> wait and combine, on the shard take -> echo -> give_back.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.link import ipc, naive, views
from kernels.link.flags import BASE, FLAG, LIVE, NEAR, region_at, signal, word_at
from kernels.link.layout import Region, SlabLayout
from kernels.link.triton import combine, dispatch, give_back, take, wait
from kernels.link.views import SENT, Peers, Requests
from kernels.quant import Fp8Rows, dequantise, quantise_rows
from kernels.tl_ops import let_next_begin, wait_ahead

BOOT = 0x600D
HANDSHAKE_SECONDS = 120.0  # the other side may be compiling


@dataclass(frozen=True)
class Setup:
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    rows: int = 64
    layers: int = 58
    inputs: int = 2  # batches that the layers take in turn
    peers: int = 1
    near: bool = True  # the two sides know that they are on one GPU
    budget_ns: int = 2_000_000_000

    @property
    def layout(self) -> SlabLayout:
        return SlabLayout(self.hidden, self.topk, self.rows, self.rows, self.peers, True)


@dataclass(frozen=True)
class Variant:
    tokens: int
    tile: dict[str, int]
    launches: int  # of the shard a layer. 2: take, then echo and give back in one; 3: take, echo, give_back


# ---- the echo -------------------------------------------------------------------------------------------------------


@triton.jit
def _echo(
    data, scales, ids, weights, count, out, table, tickets, ok, bound, hidden, reply_at,
    TOPK: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, SENDS: tl.constexpr, TICKET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    index, programs = tl.program_id(0), tl.num_programs(0)
    live, near = tl.load(table + LIVE) != 0, tl.load(table + NEAR) != 0
    base, flag = tl.load(table + BASE), word_at(table, FLAG)
    wait_ahead(PDL)
    let_next_begin(PDL)
    group, k, groups = tl.arange(0, GROUPS), tl.arange(0, K), hidden // 128
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    row = index.to(tl.int64)
    asked, answers = tl.minimum(tl.load(count), bound), live & (tl.load(ok) != 0)
    while (row < bound) & answers:
        chosen = tl.load(ids + row * TOPK + k, mask=k < TOPK, other=-1)
        weight = tl.load(weights + row * TOPK + k, mask=k < TOPK, other=0.0)
        x = tl.load(data + row * hidden + at, mask=at < hidden, other=0.0).to(tl.float32)
        scale = tl.load(scales + row * groups + group, mask=group < groups, other=0.0)
        factor = tl.sum(tl.where(chosen >= 0, weight * (chosen + 1).to(tl.float32), 0.0))
        total = (x * scale[:, None] * factor).to(tl.bfloat16)
        to = region_at(base, reply_at, tl.bfloat16) if SENDS else out
        tl.store(to + row * hidden + at, total, mask=(at < hidden) & (row < asked))
        row += programs
    if SENDS and answers:
        signal(table, flag, near, tickets, index, programs, TICKET)


def echo(requests: Requests, peers: Peers, layout: SlabLayout, region: Region, variant: Variant, out: Tensor) -> None:
    assert isinstance(requests.x, Fp8Rows)
    tile, tokens, hidden = variant.tile, variant.tokens, layout.hidden
    programs = min(tile["programs"], tokens)
    ticket = bool(tile["ticket"]) and programs > 1
    pdl = {"launch_pdl": True} if tile["pdl"] else {}
    _echo[(programs,)](
        requests.x.data, requests.x.scale, requests.ids, requests.weights, requests.count, out, peers.table,
        peers.tickets, peers.ok, tokens, hidden, layout.region(region).reply * hidden * 2,
        layout.topk, triton.next_power_of_2(layout.topk), triton.next_power_of_2(hidden // 128), variant.launches == 2,
        ticket, bool(tile["pdl"]), num_warps=tile["warps"], **pdl,
    )  # fmt: skip


def plain_echo(requests: Requests, tokens: int) -> Tensor:
    """bf16 [tokens, hidden]"""
    assert isinstance(requests.x, Fp8Rows)
    ids, weights = requests.ids[:tokens], requests.weights[:tokens]
    factor = torch.where(ids >= 0, weights * (ids + 1), 0.0).sum(1, keepdim=True)
    return (dequantise(requests.x[:tokens]) * factor).bfloat16()


# ---- the two ends ---------------------------------------------------------------------------------------------------


def region_of(layer: int) -> Region:
    return Region(layer % 2)


class Worker:
    """`reply` is its slab, `there` the addresses of its peers' request slabs."""

    def __init__(self, setup: Setup, reply: Tensor, there: list[int]) -> None:
        self.setup, self.layout = setup, setup.layout
        self.reply, self.peers = reply, Peers.empty(setup.peers, setup.budget_ns, "cuda")
        self.abort = ipc.HostWords(setup.peers)
        for peer, base in enumerate(there):
            inbox = reply.data_ptr() + self.layout.flag_at(peer)
            self.peers.attach(peer, base, base + self.layout.flag_at(), inbox, self.abort.address(peer), setup.near)
        self.owner = (torch.arange(setup.experts, device="cuda") % setup.peers).int()
        self.stream = torch.cuda.Stream()

    def build(self, variant: Variant) -> Callable[[], None]:
        """Batches, outputs and the launches of all layers. The waits return at once until `reset`."""
        tokens, setup = variant.tokens, self.setup
        self.peers.ok.zero_()
        self.batches = [self._batch(tokens) for _ in range(setup.inputs)]
        self.slots = [torch.empty(tokens, setup.peers, dtype=torch.int32, device="cuda") for _ in range(setup.layers)]
        self.outs = torch.empty(setup.layers, tokens, setup.hidden, dtype=torch.bfloat16, device="cuda")
        self.refill(0)
        return lambda: self._layers(variant)

    def _layers(self, variant: Variant) -> None:
        replies, tile = views.replies(self.reply, self.layout), variant.tile
        for layer in range(self.setup.layers):
            x, ids, weights = self.batches[layer % len(self.batches)]
            slots = self.slots[layer]
            dispatch(x, ids, weights, self.owner, self.peers, self.layout, region_of(layer), slots, tile)
            wait(self.peers, self.layout, variant.tokens, tile)
            combine(replies, slots, self.outs[layer], tile)

    def _batch(self, tokens: int) -> tuple[Fp8Rows, Tensor, Tensor]:
        ids = torch.empty(tokens, self.setup.topk, dtype=torch.int32, device="cuda")
        return Fp8Rows.empty(tokens, self.setup.hidden, "cuda"), ids, torch.empty(ids.shape, device="cuda")

    def refill(self, seed: int) -> None:
        torch.manual_seed(seed)
        for x, ids, weights in self.batches:
            quantise_rows(torch.randn(x.data.shape, device="cuda"), x)
            ids.copy_(torch.rand(len(ids), self.setup.experts, device="cuda").topk(ids.shape[1], 1).indices)
            weights.copy_(torch.randint(1, 65, weights.shape, device="cuda") / 64)
        self.outs.fill_(torch.nan)

    def expected(self) -> Tensor:
        """bf16 [inputs, tokens, hidden], within this process and without a kernel of the link."""
        layout, outs = self.layout, torch.empty_like(self.outs[: len(self.batches)])
        slabs = [torch.zeros(layout.request_bytes(), dtype=torch.uint8, device="cuda") for _ in range(layout.peers)]
        reply = torch.zeros(layout.reply_bytes(), dtype=torch.uint8, device="cuda")
        into = [views.requests(slab, layout, Region.EVEN) for slab in slabs]
        for (x, ids, weights), out in zip(self.batches, outs, strict=True):
            slots = torch.empty(len(ids), layout.peers, dtype=torch.int32, device="cuda")
            naive.dispatch(x, ids, weights, self.owner, into, layout, Region.EVEN, slots)
            for peer, there in enumerate(into):
                naive.give_back(plain_echo(there, len(ids)), there.count, views.block(reply, layout, peer))
            naive.combine(views.replies(reply, layout), slots, out)
        return outs

    def wrong_layers(self) -> int:
        """Of the last replay, bit by bit."""
        want = self.expected().view(torch.int16)
        return sum(not torch.equal(out.view(torch.int16), want[i % len(want)]) for i, out in enumerate(self.outs))

    def reset(self) -> None:
        for peer in range(self.setup.peers):
            views.flag_word(self.reply, self.layout, peer).zero_()
            self.abort[peer] = 0
        _reset(self.peers)

    @property
    def ok(self) -> bool:
        return bool(self.peers.ok.item())


class Shard:
    """All peers of one worker, one after another: `slabs` are their request slabs, `there` the worker's reply slab."""

    def __init__(self, setup: Setup, slabs: list[Tensor], there: int) -> None:
        self.setup, self.layout, self.slabs = setup, setup.layout, slabs
        self.abort = ipc.HostWords(1)
        self.ends = [Peers.empty(1, setup.budget_ns, "cuda") for _ in slabs]
        for peer, (end, slab) in enumerate(zip(self.ends, slabs, strict=True)):
            block, flag = there + self.layout.block_at(peer), there + self.layout.flag_at(peer)
            end.attach(0, block, flag, slab.data_ptr() + self.layout.flag_at(), self.abort.address(0), setup.near)
        self.local = torch.empty(setup.rows, setup.hidden, dtype=torch.bfloat16, device="cuda")
        self.stream = torch.cuda.Stream()

    def build(self, variant: Variant) -> Callable[[], None]:
        for end in self.ends:
            end.ok.zero_()
        return lambda: self._layers(variant)

    def _layers(self, variant: Variant) -> None:
        layout, tile, tokens = self.layout, variant.tile, variant.tokens
        for layer in range(self.setup.layers):
            region = region_of(layer)
            for end, slab in zip(self.ends, self.slabs, strict=True):
                requests = views.requests(slab, layout, region)
                take(end, layout, tokens, tile)
                echo(requests, end, layout, region, variant, self.local)
                if variant.launches > 2:
                    give_back(self.local[:tokens], requests.count, end, layout, region, tile)

    def reset(self) -> None:
        for end, slab in zip(self.ends, self.slabs, strict=True):
            views.flag_word(slab, self.layout).zero_()
            _reset(end)

    @property
    def ok(self) -> bool:
        return all(bool(end.ok.item()) for end in self.ends)


def _reset(peers: Peers) -> None:
    peers.table[:, SENT] = 0
    peers.tickets.zero_()
    peers.ok.fill_(1)
    torch.cuda.synchronize()


def captured(launches: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Compiled, captured, and run once, all while the step has failed, so that nothing waits for the other side and
    no module is left to load while kernels spin."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        launches()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            launches()
        graph.replay()
    torch.cuda.synchronize()
    return graph


# ---- one process ----------------------------------------------------------------------------------------------------


def both_ends(setup: Setup) -> tuple[Worker, Shard]:
    layout = setup.layout
    reply = torch.empty(layout.reply_bytes(), dtype=torch.uint8, device="cuda")
    slabs = [torch.empty(layout.request_bytes(), dtype=torch.uint8, device="cuda") for _ in range(setup.peers)]
    views.format_slab(reply, BOOT)
    for slab in slabs:
        views.format_requests(slab, layout, BOOT)
    return Worker(setup, reply, [slab.data_ptr() for slab in slabs]), Shard(setup, slabs, reply.data_ptr())


def time_in_one_process(setup: Setup, variants: list[Variant], replays: int, rounds: int, report: Connection) -> None:
    """Sends a dict for each variant; two streams."""
    worker, shard = both_ends(setup)
    for variant in variants:
        shard_graph = captured(shard.build(variant), shard.stream)
        worker_graph = captured(worker.build(variant), worker.stream)
        worker.reset()
        shard.reset()

        def replay_shard(graph: torch.cuda.CUDAGraph = shard_graph) -> None:
            with torch.cuda.stream(shard.stream):
                for _ in range(replays):
                    graph.replay()

        times = []
        for _ in range(rounds + 1):
            replay_shard()
            times.append(_timed(worker_graph, worker.stream, replays) / setup.layers)
        report.send(_result(times[1:], worker, worker.ok and shard.ok))


def _timed(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, replays: int) -> float:
    """Microseconds a replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / replays


def _result(times: list[float], worker: Worker, ok: bool) -> dict[str, Any]:
    return {"us": statistics.median(times), "least": min(times), "ok": ok, "wrong": worker.wrong_layers()}


# ---- two processes --------------------------------------------------------------------------------------------------


def meet(link: Connection) -> None:
    """Both sides have come here."""
    link.send("here")
    hear(link)


def hear(link: Connection) -> Any:
    if not link.poll(HANDSHAKE_SECONDS):
        raise TimeoutError(f"the other side of the link has said nothing for {HANDSHAKE_SECONDS:g} s")
    return link.recv()


@contextlib.contextmanager
def worker_end(setup: Setup, link: Connection) -> Iterator[Worker]:
    layout = setup.layout
    own = ipc.DeviceMemory.allocate(layout.reply_bytes())
    views.format_slab(own.tensor(), BOOT)
    torch.cuda.synchronize()
    link.send(own.handle())
    opened = [ipc.DeviceMemory.open(handle, layout.request_bytes()) for handle in hear(link)]
    for memory in opened:
        views.check_slab(memory.tensor(), BOOT)
    yield Worker(setup, own.tensor(), [memory.address for memory in opened])
    for memory in opened:
        memory.close()
    meet(link)
    own.close()


@contextlib.contextmanager
def shard_end(setup: Setup, link: Connection) -> Iterator[Shard]:
    layout = setup.layout
    own = [ipc.DeviceMemory.allocate(layout.request_bytes()) for _ in range(setup.peers)]
    for memory in own:
        views.format_requests(memory.tensor(), layout, BOOT)
    torch.cuda.synchronize()
    link.send([memory.handle() for memory in own])
    opened = ipc.DeviceMemory.open(hear(link), layout.reply_bytes())
    views.check_slab(opened.tensor(), BOOT)
    yield Shard(setup, [memory.tensor() for memory in own], opened.address)
    opened.close()
    meet(link)
    for memory in own:
        memory.close()


def time_worker(
    link: Connection, report: Connection, setup: Setup, variants: list[Variant], replays: int, rounds: int
) -> None:
    with worker_end(setup, link) as worker:
        for variant in variants:
            graph = captured(worker.build(variant), worker.stream)
            meet(link)
            worker.reset()
            meet(link)
            times, ok = [], True
            for _ in range(rounds + 1):
                hear(link)  # the shard's launches are on their way
                times.append(_timed(graph, worker.stream, replays) / setup.layers)
                ok = hear(link) and worker.ok and ok
            report.send(_result(times[1:], worker, ok))


def time_shard(
    link: Connection, report: Connection, setup: Setup, variants: list[Variant], replays: int, rounds: int
) -> None:
    with shard_end(setup, link) as shard:
        for variant in variants:
            graph = captured(shard.build(variant), shard.stream)
            meet(link)  # the worker's signals of its first run have arrived, and can be wiped
            shard.reset()
            meet(link)
            for _ in range(rounds + 1):
                with torch.cuda.stream(shard.stream):
                    for _ in range(replays):
                        graph.replay()
                link.send("launched")
                shard.stream.synchronize()
                link.send(shard.ok)


def check_worker(link: Connection, report: Connection, setup: Setup, variants: list[Variant], replays: int) -> None:
    """Every replay on fresh rows; sends how many layers of all were wrong, for each variant."""
    with worker_end(setup, link) as worker:
        for variant in variants:
            graph = captured(worker.build(variant), worker.stream)
            worker.wrong_layers()  # whatever it loads and compiles, before the shard's waits have a clock
            meet(link)
            worker.reset()
            meet(link)
            wrong = 0
            for seed in range(replays):
                worker.refill(seed)
                torch.cuda.synchronize()
                with torch.cuda.stream(worker.stream):
                    graph.replay()
                worker.stream.synchronize()
                wrong += worker.wrong_layers()
                if not worker.ok:
                    break
            report.send({"wrong": wrong, "ok": worker.ok and hear(link)})


def check_shard(link: Connection, report: Connection, setup: Setup, variants: list[Variant], replays: int) -> None:
    with shard_end(setup, link) as shard:
        for variant in variants:
            graph = captured(shard.build(variant), shard.stream)
            meet(link)
            shard.reset()
            meet(link)
            with torch.cuda.stream(shard.stream):
                for seed in range(replays):
                    graph.replay()
                    if seed % 16 == 15:
                        shard.stream.synchronize()
            shard.stream.synchronize()
            link.send(shard.ok)


Side = Callable[..., None]


def in_processes(
    sides: list[Side], arguments: tuple, seconds: float, gpus: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Runs each side in a process of its own, which shares a pipe with the other and reports through a second; yields
    what is reported. `gpus`: the CUDA_VISIBLE_DEVICES of each, ours where there is none. Raises RuntimeError when a
    side dies or is silent for `seconds`. Nothing outlives it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    ends = context.Pipe() if len(sides) == 2 else ()
    processes = [
        context.Process(target=_run_side, args=(side, [*ends[i : i + 1], theirs], arguments), daemon=True)
        for i, side in enumerate(sides)
    ]
    try:
        for process, visible in itertools.zip_longest(processes, gpus):
            with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": visible} if visible else {}):
                process.start()
        for end in (*ends, theirs):
            end.close()
        while True:
            if not ours.poll(seconds):
                raise RuntimeError(f"a side of the link has reported nothing for {seconds:g} s")
            try:
                found = ours.recv()
            except EOFError:
                return
            if isinstance(found, str):
                raise RuntimeError(found)
            yield found
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(10)


def _run_side(side: Side, ends: list[Connection], arguments: tuple) -> None:
    *link, report = ends
    try:
        if link:
            side(*link, report, *arguments)
        else:
            side(*arguments, report)
    except BaseException as error:
        report.send(f"{side.__name__}: {type(error).__name__}: {error}")
        raise


@contextlib.contextmanager
def mps() -> Iterator[None]:
    """Processes that start within share the GPU. Raises RuntimeError where MPS cannot be started."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        raise RuntimeError("nvidia-cuda-mps-control is not installed")
    if (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists():
        yield  # someone else's, and theirs to end
        return
    with tempfile.TemporaryDirectory(prefix="moecule-mps-") as folder:
        pipes = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in pipes.values():
            os.mkdir(path)
        with patch.dict(os.environ, pipes):
            # Not its output: a daemon that keeps a pipe open would keep us reading.
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            if code := subprocess.run([control, "-d"], **quiet, timeout=30).returncode:
                said = " ".join(path.read_text()[-300:] for path in Path(folder, "log").glob("control.log"))
                raise RuntimeError(f"MPS does not start (exit {code}): {said}")
            try:
                yield
            finally:
                subprocess.run([control], input=b"quit -t 5\n", stdout=subprocess.DEVNULL, timeout=60)
                time.sleep(0.5)  # its server closes its files in the folder
