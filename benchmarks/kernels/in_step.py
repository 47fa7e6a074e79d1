"""Finds tiles where they run: in a decode step, beside the launches ahead and after, which one alone does not meet.

python -m benchmarks.kernels.in_step --shape r1 --layers 4 --rows 4,16,64

Each product of a step is taken in turn. Its tiles are measured by the time of whole steps; the best one is kept in
its room's tiles.json if it was faster than what the step has now in each of several turns, and stays for the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import triton

from benchmarks.engine import Bench, load, progress
from benchmarks.kernels.timing import need_gpu
from benchmarks.kernels.tuning import keep
from benchmarks.shapes import SHAPES
from common.pages import PAGE
from kernels import target
from kernels.ahead import compiling_ahead
from kernels.linear.candidates import candidates
from kernels.mla_decode.triton import projection_candidates
from services.gpu_worker.graphs import GpuRunner

INPUT = 1024  # tokens of context
REPLAYS = 12
TURNS = 5
Shape = tuple[str, str]  # a room of kernels/, and the name of a shape in its tiles.json


class Tables:
    """Stands where tiles.json is read: notes who asks, and can answer otherwise."""

    def __init__(self) -> None:
        self.asked: set[Shape] = set()
        self.instead: dict[Shape, dict] = {}
        self._read = target._buckets

    def _answer(self, source: str, shape: str, device: str) -> list[tuple[int, dict[str, int]]]:
        asked = Path(source).parent.name, shape
        self.asked.add(asked)
        return [(1 << 30, self.instead[asked])] if asked in self.instead else self._read(source, shape, device)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        target._buckets = self._answer  # type: ignore[assignment]
        try:
            yield
        finally:
            target._buckets = self._read

    @contextlib.contextmanager
    def with_tile(self, shape: Shape, tile: dict) -> Iterator[None]:
        before = dict(self.instead)
        self.instead[shape] = tile
        try:
            yield
        finally:
            self.instead = before


def tiles_of(shape: Shape, rows: int) -> list[dict]:
    room, name = shape
    if room == "linear":
        size, dtype = name.split()
        n, k = map(int, size.split("x"))
        return [tile for tile in candidates(rows, n, k, getattr(torch, dtype)) if "BN" not in tile]  # no streaming
    if name.startswith("per head"):
        _, k, _ = map(int, name.split()[-1].split("x"))
        return projection_candidates(rows, k, "to fp8" in name)
    return []


def tell_a_step(runner: GpuRunner, rows: int) -> None:
    """The inputs of so many requests with INPUT tokens in the cache, each in pages of its own."""
    pages, given = -(-(INPUT + 1) // PAGE), runner._inputs.on_host[0]
    tokens = np.random.default_rng(rows).integers(runner._model.config.vocab, size=rows)
    told = {"tokens": tokens, "positions": INPUT, "write": -1, "source": -1, "context": INPUT + 1, "top_p": 1.0}
    for name, value in told.items():
        given[name][:rows] = value
    runner._inputs.send(0)
    runner._table.on_device[:rows, :pages] = torch.arange(rows * pages, device="cuda").view(rows, pages)
    for layer in runner._cache:
        assert isinstance(layer, torch.Tensor)
        layer.normal_()
    torch.cuda.synchronize()


def microseconds(runner: GpuRunner, rows: int) -> float:
    """Of a step of so many rows, without sampling."""
    with torch.inference_mode():
        runner._pool = None  # a graph of its own: it is dropped with it
        step = runner._prepare(rows)
        graph = runner._graph(step.forward)
        best = float("inf")
        for _ in range(3):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(REPLAYS):
                graph.replay()
            ended.record()
            ended.synchronize()
            best = min(best, 1e3 * began.elapsed_time(ended) / REPLAYS)
    return best


def compile_all(tables: Tables, shapes: list[Shape], runner: GpuRunner, rows: int) -> None:
    with compiling_ahead(ignore_errors=True), torch.inference_mode():
        for shape in shapes:
            for tile in tiles_of(shape, rows):
                with tables.with_tile(shape, tile), contextlib.suppress(Exception):
                    runner._prepare(rows).forward()


def tune(tables: Tables, only: str, runner: GpuRunner, rows: int) -> dict[Shape, dict]:
    """What gains in steps of so many rows, among the shapes whose names `only` finds."""
    now = microseconds(runner, rows)
    progress(f"{rows} rows: {now:.1f} us a step")
    shapes = [shape for shape in sorted(tables.asked) if re.search(only, " ".join(shape))]
    compile_all(tables, shapes, runner, rows)
    gained: dict[Shape, dict] = {}
    for shape in shapes:
        found: list[tuple[float, dict]] = []
        for tile in tiles_of(shape, rows):
            with tables.with_tile(shape, tile):
                try:
                    found.append((microseconds(runner, rows), tile))
                except (triton.runtime.errors.OutOfResources, triton.compiler.CompilationError, ValueError) as error:
                    progress(f"    {tile}: {type(error).__name__} {str(error).strip()[:80]}")
        if not found:
            continue
        _, best = min(found, key=lambda one: one[0])
        olds, news = [], []
        for _ in range(TURNS):
            olds.append(microseconds(runner, rows))
            with tables.with_tile(shape, best):
                news.append(microseconds(runner, rows))
        won = max(news) < min(olds)
        progress(f"  {' '.join(shape)}: {min(olds):.1f} to {min(news):.1f} us {'KEPT' if won else 'left'}  {best}")
        if won:
            gained[shape] = tables.instead[shape] = best
    progress(f"{rows} rows: {now:.1f} to {microseconds(runner, rows):.1f} us a step")
    return gained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="v2-lite", help="(default %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="0, the default: all; fewer show smaller differences")
    parser.add_argument("--rows", default="4,16,64", help="of the steps; a tile serves up to so many (default 4,16,64)")
    parser.add_argument("--only", default="", help="a regular expression that finds the shapes to be tuned")
    arguments = parser.parse_args()
    need_gpu(parser)
    config, weights, stacks = load(arguments.shape, arguments.layers, False)
    most = max(map(int, arguments.rows.split(",")))
    bench = Bench(config, weights, stacks, max_batch=most, max_context=2 * INPUT, chunk_tokens=4096, memory=0.92)
    torch.set_grad_enabled(False)
    for rows in map(int, arguments.rows.split(",")):
        tell_a_step(bench.runner, rows)
        tables = Tables()
        with tables.answering():
            gained = tune(tables, arguments.only, bench.runner, rows)
        for (room, name), tile in gained.items():
            keep((room, name, rows), tile)
    bench.engine.stop()


if __name__ == "__main__":
    main()
