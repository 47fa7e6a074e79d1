"""Which expert shards a worker is linked to: it follows the expert map, attaches, and hears of deaths.

The event loop's part of every kind of link. It only ever replaces whole values (`_newest`), which the compute thread
takes once a step.
"""

from __future__ import annotations

import asyncio
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable

import structlog

from common.bus import Bus
from common.clock import Clock, RealClock, within
from common.errors import ConfigError, MoeculeError
from common.mailbox import HandshakeError, handshake_socket, receive_with_fds, same_user, send_with_fds
from common.messages import Attach, Attached, ExpertMap, ShardEntry, subject
from common.model_config import ModelConfig
from services.gpu_worker.peers import Peer
from services.gpu_worker.table import Table, make_table, missing_reason

ATTACH_SECONDS = 2.0
RETRY_SECONDS = 0.25
FLIP_SECONDS = 1.0  # a step under way may keep the old table for so long before it is broken off
FLIP_POLL_SECONDS = 0.002
_NO_MAP = ExpertMap(version=0, model="", partitions=0, owners=(), shards={})


class Membership(ABC):
    """A link, or none yet, to every shard of the newest expert map."""

    def __init__(
        self, bus: Bus, config: ModelConfig, hello: Attach, loop: asyncio.AbstractEventLoop, clock: Clock | None
    ) -> None:
        self.on_change: Callable[[], object] = lambda: None
        self.on_failure: Callable[[Exception], object] = lambda _: None  # this process can make no links any more
        self.version = 0  # no later step uses an older map
        self.reason = "there is no expert map yet" if config.experts else ""
        self._bus, self._config, self._hello, self._loop = bus, config, hello, loop
        self._clock = clock or RealClock()
        self._log = structlog.get_logger().bind(worker=hello.worker_id)
        self._peers: dict[str, Peer] = {}
        self._failures: dict[str, str] = {}  # shard id -> why there is no peer; replaced, not changed
        self._changing = asyncio.Lock()
        self._healing: asyncio.Task[None] | None = None
        self._newest = self._table_of(_NO_MAP)  # handed to the compute thread

    # ---- what a kind of link adds

    @abstractmethod
    def _oldest_in_use(self) -> int | None:
        """The map version of the oldest step under way."""

    @abstractmethod
    async def _connect(self, shard_id: str, entry: ShardEntry, attached: Attached) -> Peer:
        """Raises HandshakeError."""

    @abstractmethod
    def _gave_up(self, peer: Peer) -> None:
        """It is closed: wake who waits for it."""

    # ---- for the compute thread

    def _live_table(self) -> Table:
        """The newest, without those that the compute thread itself gave up and of whom the loop has not heard yet."""
        table = self._newest
        if any(peer.lost for peer in table.peers):
            return make_table(table.expert_map, table.peers, self._config.experts, self._hello.worker_id)
        return table

    # ---- the map

    @property
    def shards(self) -> tuple[str, ...]:
        """Those it is linked to now."""
        return tuple(self._peers)

    async def set_map(self, new_map: ExpertMap) -> None:
        """Attach to the map's shards, then flip. When this returns no later step uses an older map."""
        async with self._changing:
            if new_map.version < self.version:
                return
            if new_map.partitions != self._config.partitions or len(new_map.owners) != new_map.partitions:
                raise ConfigError(f"expert map {new_map.version} is not of this model")
            retired = [peer for peer in self._peers.values() if peer.shard_id not in new_map.shards]
            for shard_id, entry in new_map.shards.items():
                if (peer := self._peers.get(shard_id)) and peer.boot_id != entry.boot_id:
                    self._lose(peer, "was restarted")
            await self._attach_missing(new_map)
            self._flip(new_map)
            await self._until_taken_over(new_map.version)
            for peer in retired:
                if self._peers.get(peer.shard_id) is peer:
                    self._forget(peer, "left the expert map")
            self._failures = {shard: why for shard, why in self._failures.items() if shard in new_map.shards}
            self._flip(new_map)
            self.version = new_map.version
        self.on_change()
        self._heal_if_needed()

    async def close(self) -> None:
        if self._healing is not None:
            self._healing.cancel()
            await asyncio.wait({self._healing})
        for peer in list(self._peers.values()):
            self._forget(peer, "was left: this worker is leaving")

    def _table_of(self, expert_map: ExpertMap) -> Table:
        return make_table(expert_map, self._peers.values(), self._config.experts, self._hello.worker_id)

    def _why_incomplete(self, table: Table) -> str:
        if table.expert_map.version == 0:
            return "there is no expert map yet" if self._config.experts else ""
        return missing_reason(table.missing, len(table.expert_map.owners), self._failures)

    def _flip(self, expert_map: ExpertMap) -> None:
        self._newest = self._table_of(expert_map)
        self.reason = self._why_incomplete(self._newest)

    async def _until_taken_over(self, version: int) -> None:
        """Until the step under way, if any, has ended or uses the new table; the wait of a dead shard is cut short."""
        deadline = self._clock.now() + FLIP_SECONDS
        while (used := self._oldest_in_use()) is not None and used < version and self._clock.now() < deadline:
            await self._clock.sleep(FLIP_POLL_SECONDS)

    def _lose(self, peer: Peer, why: str) -> None:
        """The peer is dead or given up: every wait on it ends now, and no new step uses it."""
        if self._peers.get(peer.shard_id) is not peer:
            return
        self._log.warning("expert shard lost", shard=peer.shard_id, why=why)
        self._failures = self._failures | {peer.shard_id: why}
        self._forget(peer, why)
        self._flip(self._newest.expert_map)
        self.on_change()
        self._heal_if_needed()

    def _forget(self, peer: Peer, why: str) -> None:
        del self._peers[peer.shard_id]
        if peer.sock is not None:
            self._loop.remove_reader(peer.sock)
        peer.close(why)
        self._gave_up(peer)

    # ---- attaching

    def _heal_if_needed(self) -> None:
        if self._healing is None and self._absent(self._newest.expert_map):
            self._healing = self._loop.create_task(self._heal(), name="links:heal")
            self._healing.add_done_callback(self._healed)

    def _healed(self, task: asyncio.Task[None]) -> None:
        self._healing = None
        if not task.cancelled() and (error := task.exception()):
            self._log.error("healing the expert links failed", error=repr(error))
            if isinstance(error, Exception):
                self.on_failure(error)

    async def _heal(self) -> None:
        """A shard of the map that could not be reached is tried again until it can be, or leaves the map."""
        while self._absent(self._newest.expert_map):
            await self._clock.sleep(RETRY_SECONDS)
            async with self._changing:
                expert_map = self._newest.expert_map
                if await self._attach_missing(expert_map):
                    self._flip(expert_map)
                    self.on_change()

    def _absent(self, expert_map: ExpertMap) -> list[str]:
        return [shard_id for shard_id in expert_map.shards if shard_id not in self._peers]

    async def _attach_missing(self, expert_map: ExpertMap) -> bool:
        """Whether a peer was gained."""
        absent = sorted(self._absent(expert_map))
        return any(await asyncio.gather(*(self._attach(shard, expert_map.shards[shard]) for shard in absent)))

    async def _attach(self, shard_id: str, entry: ShardEntry) -> bool:
        try:
            attached = await self._bus.request(
                subject("shard", shard_id, "attach"), self._hello, timeout=ATTACH_SECONDS
            )
            if not isinstance(attached, Attached) or attached.boot_id != entry.boot_id:
                raise HandshakeError("is another life of it than the expert map names")
            peer = await self._connect(shard_id, entry, attached)
        except MoeculeError as error:
            why = f"cannot be attached: {error.message}"
            if self._failures.get(shard_id) != why:
                self._log.warning("expert shard not attached", shard=shard_id, why=error.message)
            self._failures = self._failures | {shard_id: why}
            return False
        self._peers[shard_id] = peer
        self._failures = {shard: why for shard, why in self._failures.items() if shard != shard_id}
        if peer.sock is not None:
            self._loop.add_reader(peer.sock, self._on_socket, peer)
        self._log.info("expert shard attached", shard=shard_id, link=type(peer).__name__)
        return True

    async def _shake_hands(
        self, attached: Attached, hello: Attach, give: int, take: int, seconds: float
    ) -> tuple[socket.socket, Attached, list[int]]:
        """Over the shard's socket: `hello` with the file descriptor `give`, against its answer with `take` of them,
        which the caller owns as it does the socket. Raises HandshakeError."""
        sock = handshake_socket()
        try:
            try:
                sock.connect(attached.socket)
                send_with_fds(sock, hello, [give])
                await within(self._clock, seconds, _readable(self._loop, sock))
            except (OSError, TimeoutError) as error:
                raise HandshakeError(f"its mailbox socket does not answer: {error!r}") from error
            reply, fds = receive_with_fds(sock, take)
            if not same_user(sock) or not isinstance(reply, Attached) or reply.boot_id != attached.boot_id:
                for fd in fds:
                    os.close(fd)
                raise HandshakeError("it answers the handshake as another shard")
            return sock, reply, fds
        except BaseException:
            sock.close()
            raise

    def _on_socket(self, peer: Peer) -> None:
        """After the handshake the socket says one thing: its end of file, the other side's death."""
        self._lose(peer, "died")


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
