"""The shard's launching thread on a GPU: it waits on the shard's bell and launches what workers' doorbells order.

It computes nothing and waits for no rows; the kernels do. Decodes are one graph each. A prefill is launched piece by
piece, and before each piece all doorbells are looked at again, so that a decode is launched behind one piece at most.
Orders of one worker are launched one after another, as its own passes are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import structlog

from common.doorbell import Doorbell
from common.futex import Bell

IDLE_SECONDS = 5.0  # a ring is never lost; this only bounds what a broken peer could cost


class Launches(Protocol):
    """One worker's passes on the device."""

    def decode(self, rows: int) -> None:
        """Raises KeyError if there is no graph of so many rows."""
        ...

    def prefill(self, rows: int) -> Iterator[Callable[[], None]]: ...

    def abort(self) -> None:
        """End every wait, now and later, whatever the device is doing."""
        ...

    def close(self) -> None:
        """Wait for what runs, and free the memory; nothing is launched any more."""
        ...


class GpuAttachment:
    """One worker's link. `launches` may be replaced between two orders."""

    def __init__(self, worker_id: str, doorbell: Doorbell, launches: Launches, most_rows: int) -> None:
        self.worker_id, self.doorbell, self.launches = worker_id, doorbell, launches
        self.most_rows = most_rows
        self.pieces: Iterator[Callable[[], None]] | None = None  # of a prefill, that are left
        self.broken = ""


class GpuServer:
    def __init__(self, failed: Callable[[Exception], object] = lambda _: None) -> None:
        """`failed`: is called by the launching thread when it ends by an error."""
        self._failed = failed
        self.bell = Bell.create("moecule-shard-bell")
        self.rows_served = 0
        self.busy_seconds = 0.0  # not known: a graph's time is also that of its waits for rows
        self._attachments: tuple[GpuAttachment, ...] = ()  # replaced, never changed
        self._launching = threading.Lock()  # held for one launch at a time
        self._turn = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self.bell.ring()
        if self._thread.is_alive():
            self._thread.join()
        for attachment in self._attachments:
            self.detach(attachment)
        self.bell.close_fd()

    @property
    def attached(self) -> tuple[GpuAttachment, ...]:
        return self._attachments

    def attach(self, attachment: GpuAttachment) -> None:
        with self._launching:
            self._attachments += (attachment,)
        self.bell.ring()

    def detach(self, attachment: GpuAttachment) -> None:
        """Blocks until nothing of it runs; once."""
        with self._launching:
            known = attachment in self._attachments
            self._attachments = tuple(other for other in self._attachments if other is not attachment)
        if known:
            attachment.launches.abort()
            attachment.launches.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                seen = self.bell.value()
                if not self.serve():
                    self.bell.wait(seen, IDLE_SECONDS)
        except Exception as error:
            structlog.get_logger().exception("the launching thread crashed")
            self._failed(error)

    def serve(self) -> bool:
        """One round: each worker's next order, if it is a decode, then one piece of one prefill. Whether anything was
        found."""
        found = False
        for attachment in self._attachments:
            with self._launching:
                if attachment in self._attachments:
                    found |= self._next_order(attachment)
        return self._next_piece() or found

    def _next_order(self, attachment: GpuAttachment) -> bool:
        if attachment.pieces is not None or attachment.broken:
            return False
        order = attachment.doorbell.take()
        if order is None:
            return False
        if order.prefill and not 0 < order.rows <= attachment.most_rows:
            attachment.broken = f"{order.rows} rows were ordered"
        elif order.prefill:
            attachment.pieces = attachment.launches.prefill(order.rows)
        else:
            try:
                attachment.launches.decode(order.rows)
            except KeyError:
                attachment.broken = f"{order.rows} decodes were ordered, for which there is no graph"
        self.rows_served += order.rows
        return True

    def _next_piece(self) -> bool:
        """Of the workers in turn."""
        attachments = self._attachments
        for step in range(1, len(attachments) + 1):
            index = (self._turn + step) % len(attachments)
            with self._launching:
                attachment = attachments[index]
                if attachment.pieces is None or attachment not in self._attachments:
                    continue
                piece = next(attachment.pieces, None)
                if piece is None:
                    attachment.pieces = None
                else:
                    piece()
                self._turn = index
                return True
        return False
