"""The worker's end of the expert link: rows to the shards and partial sums back, over mailboxes and the bus.

Two threads use it. The event loop sets maps, attaches, and hears of deaths; it only ever replaces whole values
(`_newest`) and rings the bell. The compute thread runs steps: it takes the newest table once a step, and a death that
it meets in a wait ends the step with PeerLost.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
import structlog
from torch import Tensor

from common.bus import Bus
from common.clock import Clock, RealClock, within
from common.errors import ConfigError, ExpertsUnavailable, MoeculeError
from common.futex import Bell
from common.link import PeerLost
from common.mailbox import (
    LAYOUT,
    HandshakeError,
    Slab,
    handshake_socket,
    receive_with_fds,
    same_user,
    send_with_fds,
)
from common.messages import Attach, Attached, ExpertMap, ShardEntry, subject
from common.model_config import ModelConfig
from services.gpu_worker.peers import BusPeer, MailboxPeer, Peer
from services.gpu_worker.table import Table, make_table, missing_reason

WAIT_BOUND_SECONDS = 30.0
ATTACH_SECONDS = 2.0
RETRY_SECONDS = 0.25
FLIP_SECONDS = 1.0  # a step under way may keep the old table for so long before it is broken off
FLIP_POLL_SECONDS = 0.002
_NO_MAP = ExpertMap(version=0, model="", partitions=0, owners=(), shards={})


@dataclass(frozen=True, slots=True)
class _Sent:
    """What one window of rows went to one peer as."""

    peer: Peer
    rows: np.ndarray | None  # None: all rows of the window


class ExpertLinks:
    """An ExpertLink to every shard of the newest expert map."""

    def __init__(
        self, bus: Bus, config: ModelConfig, *, worker_id: str, boot_id: str, node: str,
        mode: Literal["auto", "mailbox", "bus"], decode_rows: int, prefill_rows: int,
        loop: asyncio.AbstractEventLoop, clock: Clock | None = None, bound: float = WAIT_BOUND_SECONDS,
    ) -> None:  # fmt: skip
        self.on_change: Callable[[], object] = lambda: None
        self.version = 0  # no later step uses an older map
        self.reason = "there is no expert map yet" if config.experts else ""
        self._bus, self._config, self._node, self._mode, self._loop = bus, config, node, mode, loop
        self._clock = clock or RealClock()
        self._bound = bound
        self._log = structlog.get_logger().bind(worker=worker_id)
        self._hello = Attach(
            worker_id=worker_id, worker_boot_id=boot_id, node=node, layout=LAYOUT,
            decode_rows=decode_rows, prefill_rows=prefill_rows,
        )  # fmt: skip
        self._bell = Bell.create("moecule-worker-bell")
        self._last_layer = max(config.moe_layers, default=-1)
        self._step = 0
        # The loop's.
        self._peers: dict[str, Peer] = {}
        self._failures: dict[str, str] = {}  # shard id -> why there is no peer; replaced, not changed
        self._changing = asyncio.Lock()
        self._healing: asyncio.Task[None] | None = None
        # Handed from the loop to the compute thread.
        self._newest = self._table_of(_NO_MAP)
        # The compute thread's.
        self._in_step = False
        self._table = self._newest
        self._lookups = np.empty((0, 1), np.int32)  # of Table.choose, for this step
        self._work: tuple[int, np.ndarray, np.ndarray, np.ndarray] = (0, np.empty(0), np.empty(0), np.empty(0))
        self._sent: list[_Sent] = []

    # ---- the compute thread

    def begin_step(self) -> None:
        self._in_step = True  # before the table is read: set_map looks at the two in the other order
        table = self._newest
        if any(peer.lost for peer in table.peers):
            table = make_table(table.expert_map, table.peers, self._config.experts, self._hello.worker_id)
        if reason := self._why_incomplete(table):
            self._in_step = False
            raise ExpertsUnavailable(reason)
        self._table, self._sent, self._step = table, [], self._step + 1
        self._lookups = table.choose(self._step)

    def dispatch(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        self._work = layer, x.numpy(), ids.numpy(), weights.numpy()
        self._send(0)

    def combine(self, out: Tensor) -> None:
        sums, window = out.numpy(), self._hello.prefill_rows
        for start in range(0, len(sums), window):
            if start:
                self._send(start)
            for sent in self._sent:
                self._add(sent, sums[start : start + window])
        self._sent = []
        if self._work[0] == self._last_layer:
            self._in_step = False

    def _send(self, start: int) -> None:
        """One window of rows to every peer that holds an expert of it; the whole batch is nearly always one window."""
        layer, x, ids, weights = self._work
        end = start + self._hello.prefill_rows
        x, ids, weights = x[start:end], ids[start:end], weights[start:end]
        self._sent = []
        shares = self._lookups.take(ids, axis=1)  # [peers, T, topk], -1 where another shard's
        asked = shares.max(axis=2) >= 0  # [peers, T]
        for peer, mine, some, every in zip(self._table.peers, shares, asked, asked.all(axis=1), strict=True):
            if peer.lost:
                self._fail(peer, peer.lost)
            rows = None if every else some.nonzero()[0]
            if rows is None or len(rows):
                peer.submit(layer, x, mine, weights, rows)
                self._sent.append(_Sent(peer, rows))

    def _add(self, sent: _Sent, out: np.ndarray) -> None:
        self._wait(sent.peer)
        try:
            sums = sent.peer.sums()
        except PeerLost as lost:
            self._fail(sent.peer, lost.why)
        if sent.rows is None:
            out += sums
        else:
            out[sent.rows] += sums  # a row occurs once

    def _wait(self, peer: Peer) -> None:
        deadline = time.monotonic() + self._bound
        while True:
            seen = self._bell.value()
            if peer.answered():
                return
            if peer.lost:
                self._fail(peer, peer.lost)
            left = deadline - time.monotonic()
            if left <= 0:
                self._fail(peer, f"has not answered for {self._bound:g} s")
            self._bell.wait(seen, left)

    def _fail(self, peer: Peer, why: str) -> NoReturn:
        """Break the step off. The next one starts without this peer, whether or not the loop has heard of it yet."""
        self._in_step, self._sent = False, []
        peer.lost = peer.lost or why
        self._loop.call_soon_threadsafe(self._lose, peer, why)
        raise PeerLost(peer.shard_id, why)

    # ---- the event loop

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
        self._bell.ring()
        self._bell.close_fd()

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
        while self._in_step and self._table.expert_map.version < version and self._clock.now() < deadline:
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
        if isinstance(peer, MailboxPeer):
            self._loop.remove_reader(peer.sock)
        peer.close(why)
        self._bell.ring()

    # ---- attaching

    def _heal_if_needed(self) -> None:
        if self._healing is None and self._absent(self._newest.expert_map):
            self._healing = self._loop.create_task(self._heal(), name="links:heal")
            self._healing.add_done_callback(self._healed)

    def _healed(self, task: asyncio.Task[None]) -> None:
        self._healing = None
        if not task.cancelled() and (error := task.exception()):
            self._log.error("healing the expert links failed", error=repr(error))

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
        absent = self._absent(expert_map)
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
        if isinstance(peer, MailboxPeer):
            self._loop.add_reader(peer.sock, self._on_socket, peer)
        self._log.info("expert shard attached", shard=shard_id, link=type(peer).__name__)
        return True

    async def _connect(self, shard_id: str, entry: ShardEntry, attached: Attached) -> Peer:
        if self._mode == "bus" or (self._mode == "auto" and entry.node != self._node):
            return BusPeer(
                shard_id, entry.boot_id, self._bus, self._hello, self._bell, self._clock, self._bound, self._loop
            )
        if not attached.socket or attached.layout != LAYOUT:
            raise HandshakeError(f"it offers no mailbox of layout {LAYOUT}")
        sock = handshake_socket()
        try:
            return await self._shake_hands(sock, shard_id, attached)
        except BaseException:
            sock.close()
            raise

    async def _shake_hands(self, sock: socket.socket, shard_id: str, attached: Attached) -> MailboxPeer:
        try:
            sock.connect(attached.socket)
            send_with_fds(sock, self._hello, [self._bell.fd])
            await within(self._clock, ATTACH_SECONDS, _readable(self._loop, sock))
        except (OSError, TimeoutError) as error:
            raise HandshakeError(f"its mailbox socket does not answer: {error!r}") from error
        reply, fds = receive_with_fds(sock, 2)
        slab_fd, bell_fd = fds
        bell = Bell(bell_fd)
        try:
            if not same_user(sock) or not isinstance(reply, Attached) or reply.boot_id != attached.boot_id:
                raise HandshakeError("it answers the handshake as another shard")
            hello, config = self._hello, self._config
            slab = Slab(slab_fd, config.hidden, config.topk, hello.decode_rows, hello.prefill_rows)
        except HandshakeError:
            bell.close_fd()
            raise
        finally:
            os.close(slab_fd)
        return MailboxPeer(shard_id, attached.boot_id, slab, bell, sock)

    def _on_socket(self, peer: MailboxPeer) -> None:
        """After the handshake the socket says one thing: its end of file, the other side's death."""
        self._lose(peer, "died")


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
