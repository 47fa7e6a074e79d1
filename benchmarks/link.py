"""The round trip of a dispatch and combine of 8 rows through empty experts, over the CPU's links: mailbox against bus.

python -m benchmarks.link [--rows 8] [--count 2000]
python -m benchmarks.kernels.link                          the GPU's link, which this does not measure

It starts a NATS server of its own and, for each size, a shard in a process of its own whose experts answer zeros, so
that what is measured is the link alone. Mailbox and bus take turns in blocks, so that both meet the same machine.
Exit status 1 if the mailbox takes more than a third of the bus at p50, or if nothing could be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator

import torch
import uvloop
from torch import Tensor

from common.actor import run_process
from common.bus import Bus
from common.errors import BusUnavailable, MoeculeError
from common.lines import nats_binary
from common.log import setup_logs
from common.messages import ExpertMap, ShardBeat, ShardEntry, new_boot_id
from common.model_config import ModelConfig
from common.nats_bus import NatsBus
from common.settings import Settings, node_id
from services.expert_shard.actor import ExpertShard
from services.gpu_worker.links import ExpertLinks

SHARD = "bench-shard"
LARGE_HIDDEN, LARGE_TOPK = 2048, 6  # DeepSeek-V2-Lite
ROWS = 64  # the most that a mailbox has room for in a decode step
BLOCK = 100  # round trips over one link before the other has its turn
SHARD_SECONDS = 60.0  # for a shard's process to start: torch alone may take some


class ZeroExperts:
    """Holds every expert of the model, and each of them answers zeros."""

    def __init__(self, config: ModelConfig) -> None:
        self.held = frozenset(range(config.partitions))
        self.tokens = ()  # of which experts: nobody counts

    def compute(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> bool:
        out.zero_()
        return True


class EmptyShard(ExpertShard):
    def _open_checkpoint(self):
        torch.set_num_threads(1)
        config = config_of(self.settings.model, int(os.environ["LINK_HIDDEN"]), int(os.environ["LINK_TOPK"]))
        return config, ZeroExperts(config)


def config_of(model: str, hidden: int, topk: int) -> ModelConfig:
    """The model's configuration with another width, where 0 keeps its own."""
    config = ModelConfig.load(model)
    return dataclasses.replace(config, hidden=hidden or config.hidden, topk=topk or config.topk)


@contextlib.contextmanager
def nats_server(folder: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [nats_binary(), "-c", "nats.conf", "-a", "127.0.0.1", "-p", str(port), "-sd", folder]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def shard_process(url: str, model: str, hidden: int, topk: int) -> Iterator[subprocess.Popen[bytes]]:
    settings = dict(
        MOECULE_NATS_URL=url, MOECULE_MODEL=model, MOECULE_ID=SHARD, MOECULE_LOG_LEVEL="warning",
        LINK_HIDDEN=str(hidden), LINK_TOPK=str(topk), OMP_NUM_THREADS="1",
    )  # fmt: skip
    shard = subprocess.Popen([sys.executable, "-m", "benchmarks.link", "--shard"], env=os.environ | settings)
    try:
        yield shard
    finally:
        shard.kill()
        shard.wait()


async def ready_shard(bus: Bus, process: subprocess.Popen[bytes]) -> ShardBeat:
    found: asyncio.Future[ShardBeat] = asyncio.get_running_loop().create_future()

    async def on_beat(_: str, beat: object) -> None:
        if isinstance(beat, ShardBeat) and beat.state == "ready" and not found.done():
            found.set_result(beat)

    await bus.subscribe(f"moecule.v1.shard.{SHARD}.beat", on_beat)
    deadline = time.monotonic() + SHARD_SECONDS
    while not found.done():
        if (code := process.poll()) is not None:
            raise RuntimeError(f"the shard's process ended with exit code {code}; what it said is above")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the shard was not ready within {SHARD_SECONDS:.0f} s; what it said is above")
        await asyncio.wait([found], timeout=0.1)
    return found.result()


@contextlib.asynccontextmanager
async def attached(bus: Bus, config: ModelConfig, shard: ShardBeat, mode: str) -> AsyncIterator[ExpertLinks]:
    links = ExpertLinks(
        bus, config, worker_id=f"bench-{mode}", boot_id=new_boot_id(), node=node_id(), mode=mode,
        decode_rows=ROWS, prefill_rows=320, loop=asyncio.get_running_loop(),
    )  # fmt: skip
    owners = ((SHARD,),) * config.partitions
    entry = ShardEntry(shard.boot_id, shard.node)
    await links.set_map(
        ExpertMap(
            version=1, model=config.fingerprint, partitions=config.partitions, owners=owners, shards={SHARD: entry}
        )
    )
    if links.reason:
        raise BusUnavailable(links.reason)
    yield links
    await links.close()


def round_trips(links: ExpertLinks, config: ModelConfig, rows: int, count: int) -> list[float]:
    """Microseconds of each dispatch and combine."""
    x, out = torch.randn(rows, config.hidden), torch.zeros(rows, config.hidden)
    ids = torch.rand(rows, config.experts).topk(config.topk).indices
    weights = torch.rand(rows, config.topk)
    layer, times = config.moe_layers[-1], []
    with torch.inference_mode():
        for _ in range(count):
            links.begin_step()
            began = time.perf_counter()
            links.dispatch(layer, x, ids, weights)
            links.combine(out)
            times.append((time.perf_counter() - began) * 1e6)
    assert not out.any(), "empty experts answer zeros"
    return times


async def measure(url: str, model: str, hidden: int, topk: int, rows: int, count: int) -> dict[str, list[float]]:
    config = config_of(model, hidden, topk)
    times: dict[str, list[float]] = {"mailbox": [], "bus": []}
    block = min(BLOCK, count)
    with shard_process(url, model, hidden, topk) as process:
        bus = NatsBus(url, "bench")
        await bus.connect()
        shard = await ready_shard(bus, process)
        async with attached(bus, config, shard, "mailbox") as mailbox, attached(bus, config, shard, "bus") as over_bus:
            for turn in range(1 + -(-count // block)):
                for name, links in (("mailbox", mailbox), ("bus", over_bus)):
                    taken = await asyncio.to_thread(round_trips, links, config, rows, block)
                    times[name] += taken if turn else []  # the first turn warms up
        await bus.close()
    return times


def report(config: ModelConfig, rows: int, times: dict[str, list[float]]) -> float:
    """Prints two lines; the ratio of the medians."""
    medians = {}
    for name, of in times.items():
        cuts = statistics.quantiles(of, n=100)
        medians[name] = statistics.median(of)
        ratio = f"{medians[name] / medians['mailbox']:5.1f}x"
        print(
            f"{config.hidden:>7} {config.topk:>5} {rows:>5}  {name:<8} {medians[name]:8.1f} {cuts[98]:8.1f} {ratio:>7}"
        )
    return medians["bus"] / medians["mailbox"]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.link", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/tiny", help="whose shape is measured first (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help=f"of each dispatch, 1 to {ROWS} (default %(default)s)")
    parser.add_argument("--count", type=int, default=2000, help="round trips over each link (default %(default)s)")
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shard:
        del sys.argv[1:]  # which an actor reads as its own
        run_process("shard", lambda: EmptyShard)
    if not 1 <= options.rows <= ROWS:
        parser.error(f"--rows must be 1 to {ROWS}")
    if options.count < 2:
        parser.error("--count must be at least 2: of less there is no median")
    setup_logs(Settings(log_level="warning"))
    torch.set_num_threads(1)
    ratios = []
    print(f"dispatch and combine of {options.rows} rows through empty experts, one shard in another process, us")
    print(" hidden  topk  rows  link          p50      p99  ratio")
    with tempfile.TemporaryDirectory(prefix="moecule-bench-") as folder, nats_server(folder) as url:
        for hidden, topk in ((0, 0), (LARGE_HIDDEN, LARGE_TOPK)):
            try:
                times = uvloop.run(measure(url, options.model, hidden, topk, options.rows, options.count))
            except (RuntimeError, MoeculeError) as error:
                sys.exit(f"FAILED: {error}")
            ratios.append(report(config_of(options.model, hidden, topk), options.rows, times))
    verdict = "holds" if min(ratios) >= 3 else "DOES NOT HOLD"
    print(f"the mailbox takes at most 1/3 of the bus at p50: {verdict}")
    return 0 if min(ratios) >= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
