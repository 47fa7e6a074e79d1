"""Microseconds of device work, from CUDA graphs, and the ceilings that they are held against."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks.kernels import Launch

ROUND_MS = 8.0
NO_GPU = "this measures on a GPU, and PyTorch finds none"


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """Ends the program where there is none. This may begin to use the GPU: MPS must be there before."""
    if not torch.cuda.is_available():
        parser.error(NO_GPU)


class Timed:
    """Launches captured in one graph; `round()` is microseconds a launch over some milliseconds of replays."""

    def __init__(self, launches: list[Launch]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # where the inputs are made
        with torch.cuda.stream(stream):
            for launch in launches:  # compiles, and lets libraries choose and allocate
                launch()
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                for launch in launches:
                    launch()
        self._count = len(launches)
        self._replays = 1
        self._replays = max(1, int(ROUND_MS * 1e3 / (self.round() * self._count)))

    def round(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / (self._replays * self._count)


def microseconds(sides: dict[str, list[Launch]], rounds: int = 7) -> dict[str, float]:
    """The median of `rounds` of each side; the sides take turns, so that a drift of the clocks meets all."""
    timed = {name: Timed(launches) for name, launches in sides.items()}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, one in timed.items():
            found[name].append(one.round())
    return {name: statistics.median(values) for name, values in found.items()}


@triton.jit
def _read(data, out, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for at in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        total += tl.load(data + at + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


def _read_ceiling() -> float:
    count = 1 << 30  # 4 GiB
    data = torch.randint(-9, 9, (count,), dtype=torch.int32, device="cuda")
    out = torch.empty(132 * 8, dtype=torch.int32, device="cuda")
    us = microseconds({"read": [lambda: _read[(len(out),)](data, out, count, 4096, num_warps=8)]})["read"]
    return 4 * count / us / 1e6


def ceilings() -> dict[str, float]:
    """TB/s of reading alone, and TFLOPS of square products, of this card now."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    products: dict[str, Callable[[], object]] = {
        "bf16": lambda: a @ b.T,
        "fp8": lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16),
    }
    times = microseconds({name: [launch] for name, launch in products.items()})
    return {"read": _read_ceiling()} | {name: 2 * n**3 / us / 1e6 for name, us in times.items()}
