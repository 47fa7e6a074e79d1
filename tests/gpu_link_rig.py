"""A worker and its shards on one GPU and in one process, without a bus: links as the tests of the engine need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.doorbell import Doorbell, Order
from common.errors import ExpertsUnavailable
from common.futex import Bell
from common.messages import ExpertMap, ShardEntry
from common.model_config import ModelConfig
from common.source import Source
from kernels.link import SlabLayout, views
from kernels.link.ipc import DeviceMemory, HostWords
from services.expert_shard.gpu_server import GpuAttachment, GpuServer
from services.expert_shard.launches import GpuLaunches
from services.expert_shard.stacks import load_stacks
from services.gpu_worker.device_link import DeviceLink
from services.gpu_worker.gpu_steps import GpuPeer, Steps
from services.gpu_worker.table import Table, make_table, missing_reason

BOOT = 0xB007


def deal(config: ModelConfig, shards: int) -> list[tuple[str, ...]]:
    """The owners of each partition."""
    return [(f"s{partition % shards}",) for partition in range(config.partitions)]


class LinksInProcess:
    """StepLinks to `shards` shards, each with a server, a stream and stacks of its own."""

    def __init__(
        self, config: ModelConfig, source: Source, shards: int, *, max_batch: int, chunk_tokens: int,
        buckets: Sequence[int], fp8: bool, bound: float = 20.0, slice_rows: int = 1 << 20,
    ) -> None:  # fmt: skip
        layout = SlabLayout(config.hidden, config.topk, max_batch, chunk_tokens, shards, fp8)
        self._config = config
        self._reply = DeviceMemory.allocate(layout.reply_bytes())
        reply = self._reply.tensor()
        views.format_slab(reply, BOOT)
        self.device = DeviceLink(layout, reply, config.moe_layers, config.experts, bound)
        self.steps = Steps(self.device)
        aborts = HostWords(layout.peers)
        self.servers: list[GpuServer] = []
        self.launches: list[GpuLaunches] = []
        self.peers: list[GpuPeer] = []
        owners = deal(config, shards)
        for index in range(shards):
            mine = [p for p, names in enumerate(owners) if f"s{index}" in names]
            experts = sorted(e for p in mine for e in range(p, config.experts, config.partitions))
            stacks = load_stacks(config, source, experts, "cuda", shared=False, fp8=fp8)
            slab = DeviceMemory.allocate(layout.request_bytes())
            views.format_requests(slab.tensor(), layout, BOOT)
            launches = GpuLaunches(
                layout, index, slab.tensor(), self._reply.address, stacks, buckets, bound, slab.close, slice_rows,
                near=True,
            )  # fmt: skip
            self.launches.append(launches)
            doorbell, _ = Doorbell.create()
            server = GpuServer()
            server.attach(GpuAttachment("w", doorbell, launches, chunk_tokens))
            self.servers.append(server)
            theirs = _Rung(server.bell)
            self.peers.append(GpuPeer(f"s{index}", "b", index, slab.address, doorbell, theirs, aborts, near=True))
        entries = {peer.shard_id: ShardEntry("b", "n") for peer in self.peers}
        self._map = ExpertMap(version=1, model="", partitions=config.partitions, owners=tuple(owners), shards=entries)
        self._table = make_table(self._map, self.peers, config.experts, "w")
        torch.cuda.synchronize()

    def rehearse(self, rows: int) -> None:
        for launches in self.launches:
            launches.rehearse([rows])

    def mute(self, shard: int) -> None:
        """It takes no orders any more, as a process that was stopped."""
        self.servers[shard]._stopping = True
        self.servers[shard].bell.ring()

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    # ---- StepLinks

    def begin_step(self) -> None:
        def pick() -> Table:
            why = {peer.shard_id: peer.lost for peer in self.peers if peer.lost}
            table = self._table
            if why:
                table = make_table(self._map, self.peers, self._config.experts, "w")
            if reason := missing_reason(table.missing, self._config.partitions, why):
                raise ExpertsUnavailable(reason)
            return table

        self.steps.begin(pick)

    def ring(self, rows: int, prefill: bool) -> None:
        assert not self.steps.ring(Order(rows, prefill))

    def end_step(self, ok: bool) -> None:
        for peer in self.steps.end(ok):
            peer.lost = "is late"


class _Rung(Bell):
    """The bell of somebody in this process."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell

    def ring(self) -> None:
        self._bell.ring()

    def close_fd(self) -> None:
        pass
