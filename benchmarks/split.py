"""The second half of `benchmarks.engine --link mailbox`: the same engine with its experts in shard processes, and with
`--workers 2` beside another worker on the same shards, which is stopped (SIGSTOP) in the middle of a run."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Bench, measure, progress
from benchmarks.shapes import write_config
from benchmarks.shards import PipeBus, Shards, WorkerLinks, stand_still
from common.errors import MoeculeError
from common.messages import ExpertMap, Failed, decode, encode
from common.model_config import ModelConfig
from common.pages import PAGE
from common.source import open_source
from kernels.link import SlabLayout
from services.gpu_worker.graphs import buckets
from services.gpu_worker.weights import load_weights

HEAD = (
    "\n| input x streams, {} shards | TPOT ms | least | of the local link's | prefill s | of the local link's |\n"
    "|---|--:|--:|--:|--:|--:|"
)


TWO = (
    "\n| input x streams, each of 2 workers | TPOT ms with both | with the other stopped | ratio | longest step |\n"
    "|---|--:|--:|--:|--:|"
)
WARM_TOKENS = 32  # of each stream, before the time between two steps counts


def run_split(arguments: argparse.Namespace, settings: dict[str, Any], local: list[dict]) -> list[dict]:
    """`local`: the rows of the local link, measured just before in this process."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_config(arguments.shape, arguments.layers, Path(temporary))
        config = ModelConfig.load(folder, weights="random")
        batch, chunk = settings["max_batch"], settings["chunk_tokens"]
        layout = SlabLayout(config.hidden, config.topk, batch, chunk, arguments.shards, config.fp8)
        started = time.perf_counter()
        shards = Shards(folder, layout, buckets(batch), arguments.shards, weights="random")
        other = Companion(folder, layout, settings, shards.bus) if arguments.workers == 2 else None
        bench = make_bench(folder, settings, shards.links)
        expert_map = shards.attach()
        took = time.perf_counter() - started
        progress(f"split engine ready after {took:.1f} s; slabs of {layout.bytes() / 1e6:.0f} MB")
        print(HEAD.format(arguments.shards), flush=True)
        for before in local:
            row = measure({"ours": bench}, before["input"], before["concurrency"], arguments)
            rows.append(row)
            print(line(row, before), flush=True)
        if other is not None:
            other.attach(expert_map)
            print(TWO, flush=True)
            for before in local:
                print(beside(bench, other, before["input"], before["concurrency"], arguments.output), flush=True)
            other.close()
        bench.engine.stop()
        shards.close()
    return rows


def make_bench(folder: Path, settings: dict[str, Any], links: Any) -> Bench:
    config = ModelConfig.load(folder, weights="random")
    weights = load_weights(config, open_source(folder, config, "random"), "cuda")
    # Not what is free: the shards' experts come to lie on this GPU too.
    pages = settings["max_batch"] * -(-settings["max_context"] // PAGE)
    bench = Bench(config, weights, {}, links=links, pages=pages, **settings)
    torch.cuda.synchronize()
    return bench


def beside(bench: Bench, other: Companion, inputs: int, streams: int, outputs: int) -> str:
    """A batch of ours; the other worker, which runs the same, stands still from the middle of it on. Means, so that a
    pause counts: with the other stopped from the step on in which it was."""
    other.resume()
    other.run(inputs, streams, outputs)
    bench.steps.clear()
    middle: list[int] = []

    def stop_in_the_middle() -> None:
        while len(bench.steps) < outputs // 2:
            time.sleep(0.002)
        middle.append(len(bench.steps))
        other.stop()

    stopper = threading.Thread(target=stop_in_the_middle)
    stopper.start()
    bench.seconds(inputs, streams, outputs, 1.0)
    stopper.join()
    times = [b - a for a, b in zip(bench.steps, bench.steps[1:], strict=False)]
    both, alone = times[WARM_TOKENS : middle[0] - 1], times[middle[0] - 1 :]
    one, two = 1e3 * statistics.mean(both), 1e3 * statistics.mean(alone)
    return f"| {inputs} x {streams} | {one:.2f} | {two:.2f} | {two / one:.3f} | {1e3 * max(alone):.1f} |"


class Companion:
    """A second worker on the same shards, in a process of its own. It repeats a batch until the next command."""

    def __init__(self, folder: Path, layout: SlabLayout, settings: dict[str, Any], bus: PipeBus) -> None:
        context = multiprocessing.get_context("spawn")
        self._commands, commands = context.Pipe()
        ours, requests = context.Pipe()
        self.process = context.Process(
            target=_second_worker, args=(commands, requests, folder, layout, settings), daemon=True
        )
        self.process.start()
        threading.Thread(target=_pass_on, args=(ours, bus), daemon=True).start()
        self._stopped = False
        assert self._commands.recv() == "made"

    def attach(self, expert_map: ExpertMap) -> None:
        self._commands.send(encode(expert_map))
        assert self._commands.recv() == "attached"

    def run(self, *batch: int) -> None:
        """Returns when its decodes run."""
        self._commands.send(batch)
        assert self._commands.recv() == "running"

    def stop(self) -> None:
        stand_still(self.process)
        self._stopped = True

    def resume(self) -> None:
        if self._stopped:
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGCONT)
            self._stopped = False

    def close(self) -> None:
        self.resume()
        self._commands.close()
        self.process.join(20)
        self.process.kill()


class _RelayBus:
    """Requests through the first worker's process, which has the pipes to the shards."""

    max_payload = 8 << 20

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    async def request(self, where: str, message: Any, timeout: float = 20.0) -> Any:
        import asyncio

        return await asyncio.to_thread(self._exchange, where, message)

    def _exchange(self, where: str, message: Any) -> Any:
        with self._lock:
            self._pipe.send((where, encode(message)))
            answer = decode(self._pipe.recv_bytes())
        if isinstance(answer, Failed):
            raise answer.error()
        return answer


def _pass_on(pipe: Connection, bus: PipeBus) -> None:
    while True:
        try:
            where, data = pipe.recv()
        except EOFError:
            return
        try:
            answer = bus.exchange(where.split(".")[3], where, decode(data))
        except MoeculeError as error:
            answer = Failed.of(error)
        pipe.send_bytes(encode(answer))


def _second_worker(
    commands: Connection, requests: Connection, folder: Path, layout: SlabLayout, settings: dict[str, Any]
) -> None:
    from common.device import on_gpu
    from common.settings import Settings

    on_gpu(Settings(model=str(folder), device="cuda", weights="random"))
    config = ModelConfig.load(folder, weights="random")
    worker = WorkerLinks(_RelayBus(requests), config, "w2", layout, buckets(settings["max_batch"]), 30.0)
    bench = make_bench(folder, settings, worker.links)
    commands.send("made")
    decoded = decode(commands.recv())
    assert isinstance(decoded, ExpertMap)
    worker.attach(decoded)
    commands.send("attached")
    batch: Sequence[int] | None = None
    while True:
        if commands.poll(None if batch is None else 0.0):
            try:
                batch = commands.recv()
            except EOFError:
                break
            assert batch is not None
            inputs, streams, _ = batch
            bench.seconds(inputs, streams, 8, 1.0)
            commands.send("running")
        assert batch is not None
        bench.seconds(*batch, 1.0)
    bench.engine.stop()
    worker.close()


def line(row: dict, local: dict) -> str:
    ours, theirs = (
        {name: statistics.median(one["ours"][name]) for name in ("tpot", "prefill")} for one in (row, local)
    )
    return (
        f"| {row['input']} x {row['concurrency']} | {ours['tpot']:.2f} | {min(row['ours']['tpot']):.2f} | "
        f"{ours['tpot'] / theirs['tpot']:.3f} | {ours['prefill']:.3f} | {ours['prefill'] / theirs['prefill']:.2f} |"
    )
