"""Expert shards on the GPU as processes of their own, and a worker's links to them from synchronous code.

The actors, the handshake and the links are the cluster's; what a bus would carry goes through a pipe to each shard, so
that neither NATS nor a scheduler is needed. Use it within benchmarks.link_rig.mps(), from before this process uses the
GPU.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Coroutine, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from common.actor import running
from common.device import on_gpu
from common.errors import BusTimeout, MoeculeError, NoResponders
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import (
    ExpertMap,
    Failed,
    LoadPartitions,
    Message,
    ShardBeat,
    ShardEntry,
    decode,
    encode,
    new_boot_id,
    subject,
)
from common.model_config import ModelConfig
from common.settings import Settings, node_id
from kernels.link import SlabLayout

PIPE_SECONDS = 20.0
LOAD_SECONDS = 600.0

T = TypeVar("T")


def _shard_process(link: Connection, settings: Settings, shard_id: str) -> None:
    asyncio.run(_serve(link, settings, shard_id))


async def _serve(link: Connection, settings: Settings, shard_id: str) -> None:
    from services.expert_shard.gpu_actor import GpuExpertShard

    on_gpu(settings)
    broker = MemoryBroker()
    bus = MemoryBus(broker)
    await bus.connect()
    shard = GpuExpertShard(MemoryBus(broker), settings, actor_id=shard_id)
    async with running(shard):
        while asked := await asyncio.to_thread(_received, link):
            where, data = asked
            try:
                answer = await bus.request(where, decode(data)) if where else shard.beat()
            except MoeculeError as error:
                answer = Failed.of(error)
            link.send_bytes(encode(answer))
    await bus.close()


def _received(link: Connection) -> tuple[str, bytes] | None:
    try:
        found: tuple[str, bytes] | None = link.recv()
    except EOFError:
        return None
    return found


class PipeBus:
    """Requests to the shards, each through its pipe."""

    max_payload = 8 << 20

    def __init__(self, pipes: dict[str, Connection]) -> None:
        self._pipes = pipes
        self._locks = {shard: threading.Lock() for shard in pipes}

    async def request(self, where: str, message: Message, timeout: float = PIPE_SECONDS) -> Message:
        shard = where.split(".")[3]
        if shard not in self._pipes:
            raise NoResponders(f"nobody listens on {where}")
        return await asyncio.to_thread(self.exchange, shard, where, message, timeout)

    def exchange(self, shard: str, where: str, message: Message | None, timeout: float = PIPE_SECONDS) -> Message:
        pipe = self._pipes[shard]
        with self._locks[shard]:
            try:
                while pipe.poll():
                    pipe.recv_bytes()  # too late for an earlier one
                pipe.send((where, b"" if message is None else encode(message)))
                if not pipe.poll(timeout):
                    raise BusTimeout(f"{shard} does not answer")
                answer = decode(pipe.recv_bytes())
            except (EOFError, OSError) as error:
                raise NoResponders(f"{shard} is gone") from error
        if isinstance(answer, Failed):
            raise answer.error()
        return answer

    def beat(self, shard: str) -> ShardBeat:
        beat = self.exchange(shard, "", None)
        assert isinstance(beat, ShardBeat)
        return beat


class WorkerLinks:
    """A worker's links, and the event loop that follows the map for them."""

    def __init__(
        self, bus: Any, config: ModelConfig, worker_id: str, layout: SlabLayout, buckets: Sequence[int], bound: float
    ) -> None:
        from services.gpu_worker.gpu_links import GpuLinks

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()
        self.links = GpuLinks(
            bus, config, worker_id=worker_id, boot_id=new_boot_id(), node=node_id(), layout=layout, buckets=buckets,
            loop=self._loop, bound=bound,
        )  # fmt: skip

    def attach(self, expert_map: ExpertMap) -> None:
        self._call(self.links.set_map(expert_map))
        if self.links.reason:
            raise RuntimeError(self.links.reason)

    def close(self) -> None:
        self._call(self.links.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LOAD_SECONDS)


class Shards:
    def __init__(
        self, model: Path, layout: SlabLayout, buckets: Sequence[int], count: int, *, bound: float = 30.0,
        **settings: Any,
    ) -> None:  # fmt: skip
        """Each holds every `count`-th partition."""
        whole = Settings(model=str(model), device="cuda", **settings)
        self.config = ModelConfig.load(model, whole.weights)
        self.names = [f"s{n}" for n in range(count)]
        context, pipes = multiprocessing.get_context("spawn"), {}
        self.processes = {}
        for name in self.names:
            pipes[name], theirs = context.Pipe()
            self.processes[name] = context.Process(target=_shard_process, args=(theirs, whole, name), daemon=True)
            self.processes[name].start()
            theirs.close()
        self.bus = PipeBus(pipes)
        self._pipes = pipes
        self._worker = WorkerLinks(self.bus, self.config, "w", layout, buckets, bound)
        self.links = self._worker.links

    def attach(self) -> ExpertMap:
        """When all have loaded. What any further worker is to attach to."""
        partitions = range(self.config.partitions)
        for n, name in enumerate(self.names):
            self._until(lambda name=name: self.bus.beat(name).state == "ready", f"{name} is not ready")  # type: ignore[misc]
            load = LoadPartitions(version=1, partitions=tuple(partitions[n :: len(self.names)]))
            self.bus.exchange(name, subject("shard", name, "load"), load)
        for name in self.names:
            self._until(lambda name=name: bool(self.bus.beat(name).held), f"{name} does not load")  # type: ignore[misc]
        beats = {name: self.bus.beat(name) for name in self.names}
        expert_map = ExpertMap(
            version=1,
            model=self.config.fingerprint,
            partitions=self.config.partitions,
            owners=tuple((self.names[p % len(self.names)],) for p in partitions),
            shards={name: ShardEntry(beat.boot_id, beat.node) for name, beat in beats.items()},
        )
        self._worker.attach(expert_map)
        return expert_map

    def stand_still(self, name: str) -> None:
        stand_still(self.processes[name])

    def close(self) -> None:
        self._worker.close()
        for pipe in self._pipes.values():
            pipe.close()
        for process in self.processes.values():
            process.join(10)
            process.kill()
            process.join()

    def _until(self, condition: Any, why: str) -> None:
        deadline = time.monotonic() + LOAD_SECONDS
        while not condition():
            if time.monotonic() > deadline or not all(p.is_alive() for p in self.processes.values()):
                raise RuntimeError(why)
            time.sleep(0.1)


def stand_still(process: Any) -> None:
    """SIGSTOP, until the last of its threads has stopped."""
    os.kill(process.pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    deadline = time.monotonic() + PIPE_SECONDS
    while not all("T (stopped)" in (task / "status").read_text() for task in tasks.iterdir()):
        if time.monotonic() > deadline:
            raise RuntimeError("it runs")
        time.sleep(0.01)
