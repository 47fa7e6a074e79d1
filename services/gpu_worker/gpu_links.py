"""The worker's end of the expert links on a GPU: slabs shared by CUDA IPC, peers in a table in device memory.

Two threads use it, as they do ExpertLinks. The event loop follows the map and attaches; the engine's thread takes the
newest table once a step, writes what changed of it into the device's table, and rings the shards' doorbells. Signals
and waits are the kernels' own; what the host adds is the abort word of a peer that is gone.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence

import msgspec
import torch

from common.bus import Bus
from common.clock import Clock
from common.device import device_uuid, require_gpu
from common.doorbell import Doorbell, Order
from common.errors import ExpertsUnavailable
from common.futex import Bell
from common.mailbox import HandshakeError, boot_word
from common.messages import Attach, Attached, ExpertMap, GpuMailbox, ShardEntry
from common.model_config import ModelConfig
from kernels.link import SlabLayout, views
from kernels.link.ipc import CudaError, DeviceMemory, HostWords
from kernels.link.layout import LAYOUT
from services.gpu_worker.device_link import DeviceLink
from services.gpu_worker.gpu_steps import GpuPeer, Steps
from services.gpu_worker.membership import Membership
from services.gpu_worker.peers import Peer
from services.gpu_worker.table import Table

WAIT_BOUND_SECONDS = 30.0
CAPTURE_SECONDS = 120.0  # a shard may have to compile


class GpuLinks(Membership):
    """StepLinks to every shard of the newest expert map; within one node."""

    def __init__(
        self, bus: Bus, config: ModelConfig, *, worker_id: str, boot_id: str, node: str, layout: SlabLayout,
        buckets: Sequence[int], loop: asyncio.AbstractEventLoop, clock: Clock | None = None,
        bound: float = WAIT_BOUND_SECONDS,
    ) -> None:  # fmt: skip
        self._slab = DeviceMemory.allocate(layout.reply_bytes())  # for as long as this process lives
        reply = self._slab.tensor()
        views.format_slab(reply, boot_word(boot_id))
        self._mailbox = GpuMailbox(device_uuid(), layout.peers, layout.quantised, tuple(buckets))
        hello = Attach(
            worker_id=worker_id, worker_boot_id=boot_id, node=node, layout=LAYOUT,
            decode_rows=layout.decode_rows, prefill_rows=layout.prefill_rows, gpu=self._mailbox,
        )  # fmt: skip
        super().__init__(bus, config, hello, loop, clock)
        self.device = DeviceLink(layout, reply, config.moe_layers, config.experts, bound)
        self._steps = Steps(self.device)
        self._bound = bound
        self._aborts = HostWords(layout.peers)
        self._indices = deque(range(layout.peers))  # those longest unused first
        self._holders: dict[int, GpuPeer | None] = {}  # None: its handshake is under way
        self._ranks: dict[str, int] = {}

    # ---- the engine's thread

    def begin_step(self) -> None:
        self._steps.begin(self._complete_table)

    def ring(self, rows: int, prefill: bool) -> None:
        for peer in self._steps.ring(Order(rows, prefill)):
            self._give_up(peer, "does not follow its doorbell")

    def end_step(self, ok: bool) -> None:
        for peer in self._steps.end(ok):
            self._give_up(peer, f"has not answered for {self._bound:g} s")

    def _complete_table(self) -> Table:
        table = self._live_table()
        if reason := self._why_incomplete(table):
            raise ExpertsUnavailable(reason)
        return table

    def _give_up(self, peer: GpuPeer, why: str) -> None:
        """The next step starts without this peer, whether or not the loop has heard of it yet."""
        peer.lost = peer.lost or why
        self._failures = self._failures | {peer.shard_id: why}  # for the reason that the next step may end with
        self._loop.call_soon_threadsafe(self._lose, peer, why)

    # ---- the event loop

    def _oldest_in_use(self) -> int | None:
        return self._steps.oldest_version()

    def _gave_up(self, peer: Peer) -> None:
        assert isinstance(peer, GpuPeer)
        try:
            self._steps.free_if_idle(peer)
        except RuntimeError as error:  # torch's and the driver's: our GPU failed
            self.on_failure(error)

    async def _connect(self, shard_id: str, entry: ShardEntry, attached: Attached) -> Peer:
        if entry.node != self._hello.node:
            raise HandshakeError("is on another node, which a worker on a GPU has no link to yet")
        if not attached.socket or attached.layout != LAYOUT:
            raise HandshakeError(f"it offers no mailbox of layout {LAYOUT} on a GPU")
        index = self._take_index(self._ranks.get(shard_id, 0))
        try:
            peer = await self._connect_as(index, shard_id, attached)
        except BaseException:
            del self._holders[index]
            raise
        self._holders[index] = peer
        return peer

    async def _connect_as(self, index: int, shard_id: str, attached: Attached) -> GpuPeer:
        await asyncio.to_thread(self.device.clear_flag, index)
        mailbox = msgspec.structs.replace(self._mailbox, handle=self._slab.handle(), peer=index)
        hello = msgspec.structs.replace(self._hello, gpu=mailbox)
        doorbell, fd = Doorbell.create()
        try:
            sock, reply, (bell_fd,) = await self._shake_hands(attached, hello, fd, 1, CAPTURE_SECONDS)
        finally:
            os.close(fd)
        bell = Bell(bell_fd)
        try:
            memory = await asyncio.to_thread(self._open, reply)
        except (CudaError, ValueError) as error:
            bell.close_fd()
            sock.close()
            await asyncio.to_thread(require_gpu)
            raise HandshakeError(f"its memory cannot be reached: {error}") from error
        return GpuPeer(
            shard_id, attached.boot_id, index, memory.address, doorbell, bell, self._aborts, sock, memory.close,
            near=reply.device == self._mailbox.device,
        )  # fmt: skip

    def _open(self, reply: Attached) -> DeviceMemory:
        memory = DeviceMemory.open(reply.handle, self.device.layout.request_bytes(), torch.cuda.current_device())
        try:
            views.check_slab(memory.tensor(), boot_word(reply.boot_id))
        except ValueError:
            memory.close()
            raise
        return memory

    async def _attach_missing(self, expert_map: ExpertMap) -> bool:
        self._ranks = {shard_id: rank for rank, shard_id in enumerate(sorted(expert_map.shards))}
        return await super()._attach_missing(expert_map)

    def _take_index(self, rank: int) -> int:
        """A row of the device's table: one that no shard has, nor a kernel under way. If it can be, in the order of
        the shards' ids, which is then that of the sums."""
        free = [index for index in self._indices if self._is_free(index)]
        if not free:
            raise HandshakeError(f"this worker has room for {len(self._indices)} shards (MOECULE_LINK_SHARDS)")
        index = rank if rank in free else free[0]
        self._indices.remove(index)
        self._indices.append(index)
        self._holders[index] = None
        return index

    def _is_free(self, index: int) -> bool:
        holder = self._holders.get(index)
        return index not in self._holders or (holder is not None and holder.freed)
