"""The second half of `benchmarks.engine --link mailbox`: the same engine with its experts in shard processes."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Bench, measure, progress
from benchmarks.shapes import write_config
from benchmarks.shards import Shards
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


def run_split(arguments: argparse.Namespace, settings: dict[str, Any], local: list[dict]) -> list[dict]:
    """`local`: the rows of the local link, measured just before in this process."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_config(arguments.shape, arguments.layers, Path(temporary))
        bench, shards = start(folder, arguments.shards, settings)
        print(HEAD.format(arguments.shards), flush=True)
        for before in local:
            row = measure(bench, None, before["input"], before["concurrency"], arguments)
            rows.append(row)
            print(line(row, before), flush=True)
        bench.engine.stop()
        shards.close()
    return rows


def start(folder: Path, count: int, settings: dict[str, Any]) -> tuple[Bench, Shards]:
    started, config = time.perf_counter(), ModelConfig.load(folder, weights="random")
    batch, context, chunk = (settings[name] for name in ("max_batch", "max_context", "chunk_tokens"))
    layout = SlabLayout(config.hidden, config.topk, batch, chunk, count, config.fp8)
    shards = Shards(folder, layout, buckets(batch), count, weights="random")
    weights = load_weights(config, open_source(folder, config, "random"), "cuda")
    # Not what is free: the shards' experts come to lie on this GPU too.
    pages = batch * -(-context // PAGE)
    bench = Bench(config, weights, {}, links=shards.links, pages=pages, **settings)
    shards.attach()
    progress(f"split engine ready after {time.perf_counter() - started:.1f} s; slabs of {layout.bytes() / 1e6:.0f} MB")
    torch.cuda.synchronize()
    return bench, shards


def line(row: dict, local: dict) -> str:
    ours, theirs = (
        {name: statistics.median(one["ours"][name]) for name in ("tpot", "prefill")} for one in (row, local)
    )
    return (
        f"| {row['input']} x {row['concurrency']} | {ours['tpot']:.2f} | {min(row['ours']['tpot']):.2f} | "
        f"{ours['tpot'] / theirs['tpot']:.3f} | {ours['prefill']:.3f} | {ours['prefill'] / theirs['prefill']:.2f} |"
    )
