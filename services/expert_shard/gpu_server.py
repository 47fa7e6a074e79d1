"""The shard's launching thread on a GPU: it waits on the shard's bell and launches what workers' doorbells order.

It computes nothing and waits for no rows; the kernels do. Decodes are one graph each. A prefill is launched piece by
piece, and before each piece all doorbells are looked at again, so that a decode is launched behind one piece at most.
Orders of one worker are launched one after another, as its own passes are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from common.doorbell import Doorbell
from services.expert_shard.serving import Serving


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


class GpuServer(Serving):
    def __init__(self, failed: Callable[[Exception], object] = lambda _: None) -> None:
        super().__init__(failed)
        self.rows_served = 0
        self.busy_seconds = 0.0  # not known: a graph's time is also that of its waits for rows
        self._attachments: tuple[GpuAttachment, ...] = ()  # replaced, never changed
        self._launching = threading.Lock()  # held for one launch at a time
        self._turn = 0

    def stop(self) -> None:
        super().stop()
        for attachment in self._attachments:
            self.detach(attachment)

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
