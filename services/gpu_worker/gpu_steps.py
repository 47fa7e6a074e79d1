"""Which shards the steps under way use, and what the device knows of them: the engine's thread's part of GpuLinks."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from common.doorbell import Doorbell, Order
from common.futex import Bell
from services.gpu_worker.device_link import DeviceLink
from services.gpu_worker.peers import Peer
from services.gpu_worker.table import Table

CATCH_UP_SECONDS = 0.5  # in which a peer that lives answers what a failed step sent
CATCH_UP_POLL_SECONDS = 0.01


class Words(Protocol):
    """kernels.link.ipc.HostWords"""

    def __setitem__(self, index: int, value: int) -> None: ...
    def address(self, index: int) -> int: ...


class GpuPeer(Peer):
    """`index`: of its row in the device's table and its block in our reply slab. `base`: the address here of its
    request slab, which `unmap` takes away. `near`: it runs on our GPU."""

    def __init__(
        self, shard_id: str, boot_id: str, index: int, base: int, doorbell: Doorbell, bell: Bell, aborts: Words,
        sock: socket.socket | None = None, unmap: Callable[[], None] = lambda: None, *, near: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(shard_id, boot_id, sock)
        self.index, self.base, self.near, self.freed = index, base, near, False
        self._doorbell, self._bell, self._aborts, self._unmap = doorbell, bell, aborts, unmap
        aborts[index] = 0

    @property
    def abort(self) -> int:
        """The address of its abort word."""
        return self._aborts.address(self.index)

    def ring(self, order: Order) -> bool:
        """False if it is so far behind that it cannot be told."""
        if not self._doorbell.put(order):
            return False
        if not self.lost:
            self._bell.ring()
        return True

    def close(self, why: str) -> None:
        """Every wait for it ends. Kernels that are under way may still write to its memory."""
        super().close(why)
        self._aborts[self.index] = 1
        self._bell.close_fd()

    def free(self) -> None:
        """No kernel knows it any more, and none will."""
        if not self.freed:
            self._unmap()
            self.freed = True


class Steps:
    """`begin`, `ring` and `end` are the engine's thread's, the rest the event loop's."""

    def __init__(self, device: DeviceLink) -> None:
        self.device = device
        self._guard = threading.Lock()
        self._under_way: deque[tuple[int, int]] = deque()  # (step, map version)
        self._leaving: list[tuple[int, GpuPeer]] = []  # (the first step without it, peer)
        self._known: dict[int, GpuPeer] = {}  # as the device's table has them
        self._step = 0
        self._shares: np.ndarray | None = None  # of Table.choose, that the device's owners are
        self._broken = True  # the device's `ok` may be 0

    def begin(self, pick: Callable[[], Table]) -> None:
        """`pick`: the table of this step, of peers that are not lost; what it raises ends the step before it began."""
        with self._guard:  # between the choice of peers and the entry in `_under_way` none of them may be freed
            table = pick()
            self._step += 1
            self._under_way.append((self._step, table.expert_map.version))
            self._tell_peers({peer.index: peer for peer in table.peers if isinstance(peer, GpuPeer)})
            self._tell_owners(table)
            if self._broken:
                self.device.begin()
                self._broken = False

    def _tell_peers(self, peers: dict[int, GpuPeer]) -> None:
        for index, peer in list(self._known.items()):
            if peers.get(index) is not peer:
                self.device.detach(index)
                self._leaving.append((self._step, self._known.pop(index)))
        for index, peer in peers.items():
            if index not in self._known:
                self.device.attach(index, peer.base, peer.abort, peer.near)
                self._known[index] = peer
                self._shares = None

    def _tell_owners(self, table: Table) -> None:
        shares = table.choose(self._step)  # [peers, experts + 1]
        if shares is self._shares:
            return
        owner = np.full(shares.shape[1] - 1, -1, np.int32)
        for share, peer in zip(shares, table.peers, strict=True):
            assert isinstance(peer, GpuPeer)
            owner[share[:-1] >= 0] = peer.index
        self.device.set_owner(owner)
        self._shares = shares

    def ring(self, order: Order) -> list[GpuPeer]:
        """Peers that could not be told."""
        return [peer for peer in self._known.values() if not peer.ring(order)]

    def end(self, ok: bool) -> list[GpuPeer]:
        """The oldest step has ended. Peers that are to be given up because of how it did."""
        late = [] if ok else self._late()
        with self._guard:
            self._under_way.popleft()
            self._broken = self._broken or not ok
            oldest = self._under_way[0][0] if self._under_way else self._step + 1
            for _, peer in (gone := [entry for entry in self._leaving if entry[0] <= oldest]):
                peer.free()
            self._leaving = [entry for entry in self._leaving if entry not in gone]
        return late

    def _late(self) -> list[GpuPeer]:
        """Late is not dead; but who does not answer even rows that are none has used up the bound of a wait."""
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while True:
            behind = [self._known[index] for index in self.device.behind() if index in self._known]
            late = [peer for peer in behind if not peer.lost]
            if not late or time.monotonic() > deadline:
                return late
            time.sleep(CATCH_UP_POLL_SECONDS)

    # ---- the event loop's

    def oldest_version(self) -> int | None:
        with self._guard:
            return self._under_way[0][1] if self._under_way else None

    def free_if_idle(self, peer: GpuPeer) -> None:
        """A peer that was closed. If no step is under way the next one begins by forgetting it."""
        with self._guard:
            if not self._under_way:
                peer.free()
