"""Which worker gets a request: the one with the fewest prompt tokens to compute before the first one comes out.

What counts is the request's own uncached tokens (by the longest run of its page hashes that the worker holds), what the
worker has admitted and not computed, and what was assigned to it since its newest heartbeat could tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.errors import NoWorker, Overloaded
from common.fairness import has_room, why_no_room
from common.messages import Assign, Assigned, PagesChanged, WorkerBeat
from common.pages import PAGE

MOST_PAGES = 1 << 19  # hashes remembered for one worker (about 50 MB); a larger cache is known in part


@dataclass
class KnownWorker:
    """What the scheduler knows of one life of a worker beyond its heartbeat."""

    boot_id: str
    seq: int = 0  # of the newest PagesChanged that is in `pages`
    synced: bool = False  # false: `pages` says nothing until the worker sends all of them
    pages: set[bytes] = field(default_factory=set)
    new_tokens: int = 0  # assigned since the newest heartbeat
    new_requests: int = 0
    new_of: Counter[str] = field(default_factory=Counter)  # tenant -> how many of the new requests are its


class Placement:
    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self._known: dict[str, KnownWorker] = {}

    def heard(self, beat: WorkerBeat) -> None:
        known = self._life(beat.id, beat.boot_id)
        known.new_tokens = known.new_requests = 0
        known.new_of.clear()

    def forget(self, worker_id: str) -> None:
        self._known.pop(worker_id, None)

    def pages_changed(self, change: PagesChanged) -> None:
        known = self._life(change.worker_id, change.boot_id)
        if change.full:
            known.pages, known.seq, known.synced = set(change.added[:MOST_PAGES]), change.seq, True
        elif known.synced and change.seq == known.seq + 1:
            known.pages.difference_update(change.evicted)
            known.pages.update(change.added[: max(0, MOST_PAGES - len(known.pages))])
            known.seq = change.seq
        elif change.seq > known.seq:
            known.synced = False

    def unsynced(self, workers: Iterable[WorkerBeat]) -> list[WorkerBeat]:
        """The workers that have to be asked for all their pages."""
        return [w for w in workers if w.state == "ready" and not self._life(w.id, w.boot_id).synced]

    def pick(self, request: Assign, workers: Sequence[WorkerBeat]) -> Assigned:
        """Raises NoWorker, or Overloaded if every queue is full, or keeps its places from this tenant.

        The worker refuses by the same rule. It has to hold here as well: whoever asks again and again, and is refused
        by the workers, would else use up all the places that are thought free until the next heartbeat.
        """
        usable = [w for w in workers if serves(w)]
        if not usable:
            raise NoWorker(why_none_serves(workers))
        free = [w for w in usable if has_room(*self._places(request.tenant, w))]
        if not free:
            raise Overloaded(self._why_no_room(request.tenant, usable))
        uncached = {w.id: self._uncached(request, w) for w in free}
        best = min(free, key=lambda w: (uncached[w.id] + self._queued(w), self._requests(w), w.id))
        known = self._life(best.id, best.boot_id)
        known.new_tokens += uncached[best.id]
        known.new_requests += 1
        known.new_of[request.tenant] += 1
        return Assigned(worker_id=best.id, worker_boot_id=best.boot_id)

    def _life(self, worker_id: str, boot_id: str) -> KnownWorker:
        known = self._known.get(worker_id)
        if known is None or known.boot_id != boot_id:
            known = self._known[worker_id] = KnownWorker(boot_id)
        return known

    def _uncached(self, request: Assign, worker: WorkerBeat) -> int:
        known = self._life(worker.id, worker.boot_id)
        if not known.synced:
            return request.prompt_tokens
        cached = next((i for i, page in enumerate(request.page_hashes) if page not in known.pages), None)
        pages = len(request.page_hashes) if cached is None else cached
        return max(0, request.prompt_tokens - pages * PAGE)

    def _queued(self, worker: WorkerBeat) -> int:
        return worker.pending_tokens + self._life(worker.id, worker.boot_id).new_tokens

    def _requests(self, worker: WorkerBeat) -> int:
        return worker.running + worker.waiting + self._life(worker.id, worker.boot_id).new_requests

    def _places(self, tenant: str, worker: WorkerBeat) -> tuple[str, int, int, int]:
        """What has_room() asks for."""
        held = worker.tenants.get(tenant, 0) + self._life(worker.id, worker.boot_id).new_of[tenant]
        return tenant, held, self._requests(worker), worker.queue_limit + self.max_batch

    def _why_no_room(self, tenant: str, workers: Sequence[WorkerBeat]) -> str:
        kept = [w for w in workers if self._requests(w) < w.queue_limit + self.max_batch]
        if kept:
            return why_no_room(*self._places(tenant, kept[0]), f"the queue of worker {kept[0].id}")
        return f"every queue is full ({sum(w.waiting for w in workers)} requests wait)"


def serves(worker: WorkerBeat) -> bool:
    return worker.state == "ready" and not worker.reason and worker.role != "decode"


def why_none_serves(workers: Iterable[WorkerBeat]) -> str:
    """One sentence; empty if one serves."""
    workers = list(workers)
    if any(serves(w) for w in workers):
        return ""
    if not workers:
        return "no worker is running"
    return "; ".join(f"worker {w.id} {_why_not(w)}" for w in workers)


def _why_not(worker: WorkerBeat) -> str:
    if worker.state == "draining":
        return "is leaving"
    if worker.reason:
        return f"cannot serve: {worker.reason}"
    return "is starting" if worker.state == "starting" else "only decodes"
