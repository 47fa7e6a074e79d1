"""The shard's one compute thread: it waits on the shard's bell and serves every attached worker and the bus.

Decodes go first: between two slices of a prefill all decode slots are looked at again, so that a decode waits for at
most one slice of another worker's prefill.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from torch import Tensor

from common.errors import ExpertsUnavailable, Unavailable
from common.futex import Bell
from common.mailbox import DONE, REFUSED, Rows, Slab, Slot
from common.promises import Promises
from services.expert_shard.serving import Serving

SLICE_ROWS = 64


class Experts(Protocol):
    def compute(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> bool:
        """Fill `out` with the partial sums; whether every expert that was asked for is held."""
        ...


@dataclass(eq=False)
class Attachment:
    """One worker's mailbox. `prefill` is how far its prefill slot's use has come: (seq, rows done)."""

    worker_id: str
    slab: Slab
    bell: Bell  # the worker's
    prefill: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class Job:
    """Rows that came over the bus."""

    layer: int
    rows: Rows
    done: Future[None] = field(default_factory=Future)


class ExpertServer(Serving):
    def __init__(self, experts: Experts, failed: Callable[[Exception], object] = lambda _: None) -> None:
        super().__init__(failed)
        self.rows_served = 0
        self.busy_seconds = 0.0
        self._experts = experts
        self._attachments: tuple[Attachment, ...] = ()  # replaced, never changed: the compute thread iterates over it
        self._jobs: deque[Job] = deque()
        self._promises = Promises()
        self._turn = 0
        self._log = structlog.get_logger()

    @property
    def attached(self) -> tuple[Attachment, ...]:
        return self._attachments

    def attach(self, attachment: Attachment) -> None:
        self._attachments += (attachment,)
        self.bell.ring()

    def detach(self, attachment: Attachment) -> None:
        """Returns at once; the compute thread may still finish the slice it is in."""
        attachment.slab.abort()
        self._attachments = tuple(other for other in self._attachments if other is not attachment)

    def submit(self, job: Job) -> Future[None]:
        self._promises.add(job.done)
        self._jobs.append(job)
        self.bell.ring()
        return job.done

    def _crashed(self, error: Exception) -> None:
        self._promises.refuse(Unavailable("this shard failed; see its log"))
        super()._crashed(error)

    def serve(self) -> bool:
        """One round: all decodes, then one job of the bus, then one slice of prefill."""
        found = False
        for attachment in self._attachments:
            found |= self._serve_decode(attachment)
        if self._jobs:
            found = True
            self._serve_job(self._jobs.popleft())
        return self._serve_prefill() or found

    def _serve_decode(self, attachment: Attachment) -> bool:
        found = False
        for slot in attachment.slab.decode:
            work = slot.work()
            if work is not None:
                seq, layer, count = work
                self._answer(attachment, slot, seq, self._compute(layer, slot.first(count)))
                found = True
        return found

    def _serve_prefill(self) -> bool:
        """One slice, of the workers in turn."""
        attachments = self._attachments
        for step in range(1, len(attachments) + 1):
            index = (self._turn + step) % len(attachments)
            if self._serve_prefill_slice(attachments[index]):
                self._turn = index
                return True
        return False

    def _serve_prefill_slice(self, attachment: Attachment) -> bool:
        slot = attachment.slab.prefill
        work = slot.work()
        if work is None or attachment.slab.aborted:
            return False
        seq, layer, count = work
        started, done = attachment.prefill
        start = done if started == seq else 0
        end = min(start + SLICE_ROWS, count)
        status = self._compute(layer, slot.part(start, end))
        if status == REFUSED or end == count:
            attachment.prefill = (seq, 0)
            self._answer(attachment, slot, seq, status)
        else:
            attachment.prefill = (seq, end)
        return True

    def _answer(self, attachment: Attachment, slot: Slot, seq: int, status: int) -> None:
        slot.answer(seq, status)
        attachment.bell.ring()

    def _serve_job(self, job: Job) -> None:
        if not job.done.set_running_or_notify_cancel():
            return  # who asked has gone
        if self._compute(job.layer, job.rows) == REFUSED:
            job.done.set_exception(ExpertsUnavailable("this shard does not hold all experts it was asked for"))
        else:
            job.done.set_result(None)

    def _compute(self, layer: int, rows: Rows) -> int:
        """The status to answer with. What a peer wrote is not trusted: it must not end the thread that serves all."""
        began = time.perf_counter()
        try:
            if not self._experts.compute(layer, rows.x, rows.ids, rows.weights, rows.sums):
                return REFUSED
        except (IndexError, KeyError, RuntimeError, ValueError) as error:
            self._log.error("rows refused", layer=layer, error=repr(error))
            return REFUSED
        self.busy_seconds += time.perf_counter() - began
        self.rows_served += len(rows.x)
        return DONE
