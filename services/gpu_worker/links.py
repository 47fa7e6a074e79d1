"""The worker's end of the expert link on a CPU: rows to the shards and partial sums back, over mailboxes and the bus.

Two threads use it. The event loop sets maps, attaches, and hears of deaths; it only ever replaces whole values
(`_newest`) and rings the bell. The compute thread runs steps: it takes the newest table once a step, and a death that
it meets in a wait ends the step with PeerLost.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
from torch import Tensor

from common.bus import Bus
from common.clock import Clock
from common.errors import ExpertsUnavailable
from common.futex import Bell
from common.link import PeerLost
from common.mailbox import LAYOUT, HandshakeError, Slab
from common.messages import Attach, Attached, ShardEntry
from common.model_config import ModelConfig
from common.telemetry import Tally
from services.gpu_worker.membership import ATTACH_SECONDS, Membership
from services.gpu_worker.peers import BusPeer, MailboxPeer, Peer, RowPeer

WAIT_BOUND_SECONDS = 30.0
COUNT_SECONDS = 0.25  # a long wait is counted piece by piece, so that heartbeats tell of it while it lasts
MOST_TIMES = 256  # shards whose times are kept, those included that have left
TRIP_BUCKETS = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # seconds


class LinkTimes:
    """Of one shard, in seconds, as the compute thread meets it. `trips`: from a dispatch to the moment that its answer
    is seen. `waited`: for how long steps stood still while it had not answered, as if it were the only one: a time in
    which several had not counts for each of them, so that these may add up to more than the steps stood still."""

    def __init__(self) -> None:
        self.trips = Tally(TRIP_BUCKETS)
        self.waited = 0.0


@dataclass(eq=False, slots=True)
class _Sent:
    """What one window of rows went to one peer as."""

    peer: RowPeer
    rows: np.ndarray | None  # None: all rows of the window
    times: LinkTimes


class ExpertLinks(Membership):
    """An ExpertLink to every shard of the newest expert map."""

    def __init__(
        self, bus: Bus, config: ModelConfig, *, worker_id: str, boot_id: str, node: str,
        mode: Literal["auto", "mailbox", "bus"], decode_rows: int, prefill_rows: int,
        loop: asyncio.AbstractEventLoop, clock: Clock | None = None, bound: float = WAIT_BOUND_SECONDS,
    ) -> None:  # fmt: skip
        hello = Attach(
            worker_id=worker_id, worker_boot_id=boot_id, node=node, layout=LAYOUT,
            decode_rows=decode_rows, prefill_rows=prefill_rows,
        )  # fmt: skip
        super().__init__(bus, config, hello, loop, clock)
        self._node, self._mode, self._bound = node, mode, bound
        self._bell = Bell.create("moecule-worker-bell")
        self._last_layer = max(config.moe_layers, default=-1)
        self._step = 0
        # The compute thread's.
        self._in_step = False
        self._times: dict[str, LinkTimes] = {}  # shard id -> its times; the event loop takes out those that have left
        self._sent_at = 0.0
        self._table = self._newest
        self._lookups = np.empty((0, 1), np.int32)  # of Table.choose, for this step
        self._work: tuple[int, np.ndarray, np.ndarray, np.ndarray] = (0, np.empty(0), np.empty(0), np.empty(0))
        self._sent: list[_Sent] = []
        self._late: list[_Sent] = []  # of these the ones whose answer has not been seen

    # ---- the compute thread

    def begin_step(self) -> None:
        self._in_step = True  # before the table is read: set_map looks at the two in the other order
        table = self._live_table()
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
            assert isinstance(peer, RowPeer)
            rows = None if every else some.nonzero()[0]
            if rows is None or len(rows):
                peer.submit(layer, x, mine, weights, rows)
                self._sent.append(_Sent(peer, rows, self._times_of(peer.shard_id)))
        self._late = self._sent
        self._sent_at = time.perf_counter()

    def _add(self, sent: _Sent, out: np.ndarray) -> None:
        if sent in self._late:
            self._wait(sent)
        try:
            sums = sent.peer.sums()
        except PeerLost as lost:
            self._fail(sent.peer, lost.why)
        if sent.rows is None:
            out += sums
        else:
            out[sent.rows] += sums  # a row occurs once

    def _times_of(self, shard_id: str) -> LinkTimes:
        if (found := self._times.get(shard_id)) is None:
            found = self._times[shard_id] = LinkTimes()
        return found

    def _wait(self, sent: _Sent) -> None:
        """Every answer rings our bell, so that those of others are seen when they come, not when their turn does."""
        now = time.perf_counter()
        deadline = now + self._bound
        while True:
            seen = self._bell.value()
            now = self._look(now)
            if sent not in self._late:
                return
            if sent.peer.lost:
                self._fail(sent.peer, sent.peer.lost)
            if now >= deadline:
                self._fail(sent.peer, f"has not answered for {self._bound:g} s")
            self._bell.wait(seen, min(deadline - now, COUNT_SECONDS))

    def _look(self, since: float) -> float:
        """Who has answered now is late no longer; the step stood still for all who were. The time."""
        now, late = time.perf_counter(), []
        for sent in self._late:
            sent.times.waited += now - since
            if sent.peer.answered():
                sent.times.trips.add(now - self._sent_at)
            else:
                late.append(sent)
        self._late = late
        return now

    def _fail(self, peer: Peer, why: str) -> NoReturn:
        """Break the step off. The next one starts without this peer, whether or not the loop has heard of it yet."""
        self._in_step, self._sent, self._late = False, [], []
        peer.lost = peer.lost or why
        self._loop.call_soon_threadsafe(self._lose, peer, why)
        raise PeerLost(peer.shard_id, why)

    # ---- the event loop

    def times(self) -> dict[str, LinkTimes]:
        """Of each shard of the newest map that was asked. One that was stopped for long may come back."""
        named, found = self._newest.expert_map.shards, dict(self._times)  # a copy: a step may meet a new one meanwhile
        for shard_id in found.keys() - named.keys():
            del found[shard_id]
            if len(self._times) > MOST_TIMES:
                self._times.pop(shard_id, None)
        return found

    async def close(self) -> None:
        await super().close()
        self._bell.ring()
        self._bell.close_fd()

    def _oldest_in_use(self) -> int | None:
        return self._table.expert_map.version if self._in_step else None

    def _gave_up(self, peer: Peer) -> None:
        self._bell.ring()

    async def _connect(self, shard_id: str, entry: ShardEntry, attached: Attached) -> Peer:
        if self._mode == "bus" or (self._mode == "auto" and entry.node != self._node):
            return BusPeer(
                shard_id, entry.boot_id, self._bus, self._hello, self._bell, self._clock, self._bound, self._loop
            )
        if not attached.socket or attached.layout != LAYOUT:
            raise HandshakeError(f"it offers no mailbox of layout {LAYOUT}")
        sock, _, (slab_fd, bell_fd) = await self._shake_hands(attached, self._hello, self._bell.fd, 2, ATTACH_SECONDS)
        bell, hello, config = Bell(bell_fd), self._hello, self._config
        try:
            slab = Slab(slab_fd, config.hidden, config.topk, hello.decode_rows, hello.prefill_rows)
        except HandshakeError:
            bell.close_fd()
            sock.close()
            raise
        finally:
            os.close(slab_fd)
        return MailboxPeer(shard_id, attached.boot_id, slab, bell, sock)
