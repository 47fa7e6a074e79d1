"""A worker's side of its links to expert shards: one Peer for each shard, over a mailbox or over the bus."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from concurrent.futures import CancelledError, Future

import numpy as np

from common.bus import Bus
from common.clock import Clock, within
from common.errors import BusTimeout, MoeculeError, NoResponders
from common.futex import Bell
from common.link import PeerLost
from common.mailbox import DONE, Slab, next_seq
from common.messages import Attach, Attached, ExpertRows, ExpertSums, Message, subject

SPARE_BYTES = 8 << 10  # of a bus message, for what is not rows; the bus wants 4 KiB under its limit
PROBE_SECONDS = 0.5


class Peer:
    """One life of one shard. `lost` says why it is given up, once and for all; empty while it lives."""

    def __init__(self, shard_id: str, boot_id: str, sock: socket.socket | None = None) -> None:
        """`sock` stays open for its end of file."""
        self.shard_id, self.boot_id, self.sock, self.lost = shard_id, boot_id, sock, ""

    def close(self, why: str) -> None:
        self.lost = self.lost or why
        if self.sock is not None:
            self.sock.close()


class RowPeer(Peer, ABC):
    """One that the compute thread itself sends rows to and waits for."""

    @abstractmethod
    def submit(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, rows: np.ndarray | None) -> None:
        """Send rows `rows` (None: all) of each on their way; the arguments stay as they are until the answer."""

    @abstractmethod
    def answered(self) -> bool: ...

    @abstractmethod
    def sums(self) -> np.ndarray:
        """[rows, hidden] float32, valid until the next submit; call once answered. Raises PeerLost."""


class MailboxPeer(RowPeer):
    def __init__(self, shard_id: str, boot_id: str, slab: Slab, bell: Bell, sock: socket.socket) -> None:
        """`bell` is the shard's."""
        super().__init__(shard_id, boot_id, sock)
        self._slab, self._bell = slab, bell
        self._seq = 0
        self._slot, self._sums = slab.prefill, slab.prefill.first_arrays(0).sums

    def submit(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, rows: np.ndarray | None) -> None:
        count = len(x) if rows is None else len(rows)
        self._seq = seq = next_seq(self._seq)
        slot = self._slab.decode[seq & 1]
        if count > slot.rows:
            slot = self._slab.prefill
        into = slot.first_arrays(count)
        if rows is None:
            into.x[...], into.ids[...], into.weights[...] = x, ids, weights
        else:
            # "clip" only spares numpy a temporary: every row is in bounds.
            x.take(rows, axis=0, out=into.x, mode="clip")
            ids.take(rows, axis=0, out=into.ids, mode="clip")
            weights.take(rows, axis=0, out=into.weights, mode="clip")
        slot.submit(seq, layer, count)
        self._bell.ring()
        self._slot, self._sums = slot, into.sums

    def answered(self) -> bool:
        return self._slot.answered(self._seq)

    def sums(self) -> np.ndarray:
        if self._slot.status != DONE:
            raise PeerLost(self.shard_id, "refused the rows: it does not hold all experts it was asked for")
        return self._sums

    def close(self, why: str) -> None:
        """The memory itself goes with its last view, so a compute thread that still reads it is safe."""
        super().close(why)
        self._slab.abort()
        self._bell.close_fd()


class BusPeer(RowPeer):
    def __init__(
        self, shard_id: str, boot_id: str, bus: Bus, hello: Attach, bell: Bell, clock: Clock, bound: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        """`bell` is the worker's own: the answer rings it, as a mailbox's would."""
        super().__init__(shard_id, boot_id)
        self._bus, self._hello, self._bell, self._clock, self._bound, self._loop = bus, hello, bell, clock, bound, loop
        self._answer: Future[np.ndarray] = Future()

    def submit(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, rows: np.ndarray | None) -> None:
        chosen: slice | np.ndarray = slice(None) if rows is None else rows
        picked = x[chosen], ids[chosen], weights[chosen]
        exchange = self._exchange(self._chunks(layer, *picked), x.shape[1])
        self._answer = asyncio.run_coroutine_threadsafe(exchange, self._loop)
        self._answer.add_done_callback(lambda _: self._bell.ring())

    def answered(self) -> bool:
        return self._answer.done()

    def sums(self) -> np.ndarray:
        try:
            return self._answer.result()
        except PeerLost:
            raise
        except CancelledError as error:
            raise PeerLost(self.shard_id, "was not asked: this worker is leaving") from error
        except MoeculeError as error:
            raise PeerLost(self.shard_id, f"does not answer over the bus: {error.message}") from error

    def _chunks(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> list[ExpertRows]:
        """As many rows a message as the bus carries."""
        row_bytes = x.shape[1] * 4 + ids.shape[1] * 8
        most = max(1, (self._bus.max_payload - SPARE_BYTES) // row_bytes)
        return [
            ExpertRows(
                worker_id=self._hello.worker_id,
                boot_id=self.boot_id,
                layer=layer,
                rows=len(x[start : start + most]),
                x=x[start : start + most].tobytes(),
                ids=ids[start : start + most].tobytes(),
                weights=weights[start : start + most].tobytes(),
            )
            for start in range(0, len(x), most)
        ]

    async def _exchange(self, chunks: list[ExpertRows], hidden: int) -> np.ndarray:
        began = self._clock.now()
        where = subject("shard", self.shard_id, "experts")
        work = asyncio.gather(*(self._bus.request(where, chunk, timeout=self._bound) for chunk in chunks))
        try:
            while not work.done():
                with contextlib.suppress(TimeoutError):
                    await within(self._clock, PROBE_SECONDS, asyncio.shield(work))
                if not work.done():
                    await self._probe(began)
            return self._joined(work.result(), hidden)
        finally:
            work.cancel()

    async def _probe(self, began: float) -> None:
        """The bus does not say that a receiver died after it took a request, nor that an answer was lost."""
        if self._bus.connected_for() < self._clock.now() - began:
            raise PeerLost(self.shard_id, "may not have been heard: the bus connection was lost meanwhile")
        try:
            attached = await self._bus.request(subject("shard", self.shard_id, "attach"), self._hello)
        except NoResponders:
            raise
        except BusTimeout:
            return  # late is not dead
        if not isinstance(attached, Attached) or attached.boot_id != self.boot_id:
            raise PeerLost(self.shard_id, "was restarted")

    def _joined(self, replies: list[Message], hidden: int) -> np.ndarray:
        parts = []
        for reply in replies:
            if not isinstance(reply, ExpertSums) or reply.boot_id != self.boot_id:
                raise PeerLost(self.shard_id, "answered with something else than sums")
            parts.append(reply.sums)
        return np.frombuffer(b"".join(parts), dtype=np.float32).reshape(-1, hidden)
