"""What the next step computes: decodes first, then chunks of prefill. The plan is a value and needs no model."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from common.messages import Generate, TokenLogprobs
from common.pages import PAGE, extend_hashes
from services.gpu_worker.pace import Pace
from services.gpu_worker.pages import PageAllocator

if TYPE_CHECKING:
    from services.gpu_worker.grammar import Constraint


UNKNOWN = -1


@dataclass(eq=False)
class Sequence:
    """A request on this worker. `tokens` is prompt + output; the KV rows of the first `computed` of them exist, or will
    when the steps under way end. The last token may be UNKNOWN yet: such a step finds it.

    `scores`: logprobs of the prompt's tokens from the second on, as far as they are computed; None if nobody asked.
    """

    request: Generate
    arrival: int
    tokens: list[int]
    computed: int = 0
    cached: int = 0  # prompt tokens read from the prefix cache when it was first admitted
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    epoch: int = 0  # the allocator's when its first page was matched or computed
    preemptions: int = 0
    scores: list[TokenLogprobs] | None = None
    constraint: Constraint | None = None
    arrived: float = (
        0.0  # perf_counter() when it came, when a step first computed of it, when its first token was known
    )
    started: float = 0.0
    answered: float = 0.0

    @classmethod
    def of(cls, request: Generate, arrival: int, constraint: Constraint | None = None) -> Sequence:
        scores: list[TokenLogprobs] | None = [] if request.sampling.prompt_logprobs is not None else None
        return cls(request, arrival, list(request.prompt), scores=scores, constraint=constraint)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def outputs(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def unknown(self) -> bool:
        return self.tokens[-1] == UNKNOWN

    @property
    def full(self) -> bool:
        """It ends with the step under way, whatever that finds."""
        return self.unknown and self.outputs >= self.request.sampling.max_tokens


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `start + rows` of a sequence. The last token is sampled from if that reaches the end."""

    sequence: Sequence
    start: int
    rows: int
    life: int = 0  # how often the sequence had been preempted

    @property
    def end(self) -> int:
        return self.start + self.rows

    @property
    def sampled(self) -> bool:
        return self.end == len(self.sequence.tokens)

    @property
    def scored(self) -> range:
        """The rows whose logits score the prompt's token after them, less those that an earlier step scored."""
        if (scores := self.sequence.scores) is None:
            return range(0)
        return range(max(self.start, len(scores)), min(self.end, self.sequence.prompt_len - 1))


@dataclass(frozen=True)
class Plan:
    decodes: tuple[Chunk, ...]  # one row each
    prefills: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.decodes + self.prefills

    @cached_property
    def samples(self) -> tuple[Chunk, ...]:
        """Those after which a token is sampled, as they stood when this was first asked."""
        return tuple(chunk for chunk in self.chunks if chunk.sampled)

    @cached_property
    def sampled(self) -> tuple[Sequence, ...]:
        return tuple(chunk.sequence for chunk in self.samples)


class Planner:
    """Owns the requests of a worker and their pages.

    A sequence whose pages run out takes them from the youngest running one, which goes back to the head of the queue
    and is computed again later. The oldest is never preempted for another, and every request alone fits into the
    cache, so some request always advances.
    """

    def __init__(self, allocator: PageAllocator, model: str, *, max_batch: int, pace: Pace, prefix_cache: bool) -> None:
        self.allocator = allocator
        self.model = model
        self.max_batch = max_batch
        self.pace = pace
        self.prefix_cache = prefix_cache
        self.running: list[Sequence] = []  # oldest first
        self.preempted: deque[Sequence] = deque()  # oldest first, ahead of all that wait
        self._waiting: OrderedDict[str, deque[Sequence]] = OrderedDict()  # tenant -> its queue; the first is next
        self._arrivals = 0
        self._preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self.preempted) + sum(map(len, self._waiting.values()))

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.preempted
        for queue in self._waiting.values():
            yield from queue

    def add(self, request: Generate, constraint: Constraint | None = None) -> Sequence:
        sequence = Sequence.of(request, self._arrivals, constraint)
        self._arrivals += 1
        self._waiting.setdefault(request.tenant, deque()).append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """End a sequence wherever it is: its pages are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            tenant = sequence.request.tenant
            self._waiting[tenant].remove(sequence)
            if not self._waiting[tenant]:
                del self._waiting[tenant]
        self._give_back(sequence)

    def take_preemptions(self) -> int:
        """How many there were since the last call."""
        count, self._preemptions = self._preemptions, 0
        return count

    def plan(self) -> Plan:
        decodes, prefills = [], []
        budget = self.pace.tokens(sum(len(s.tokens) - s.computed == 1 for s in self.running))
        for sequence in list(self.running):
            left = len(sequence.tokens) - sequence.computed
            if sequence not in self.running or sequence.full:
                continue  # preempted for an older one in this very loop, or about to end
            if left == 1:
                if self._grow(sequence, 1):
                    decodes.append(_chunk(sequence, 1))
            elif budget and self._grow(sequence, min(left, budget)):
                prefills.append(_chunk(sequence, min(left, budget)))
                budget -= min(left, budget)
        while budget and len(self.running) < self.max_batch and (admitted := self._admit()):
            rows = min(len(admitted.tokens) - admitted.computed, budget)
            prefills.append(_chunk(admitted, rows))
            budget -= rows
        alive = set(map(id, self.running))
        # A one-row chunk of a prefill is a decode like any other: same rows, same kernel.
        chunks = [c for c in decodes + prefills if id(c.sequence) in alive]
        return Plan(tuple(c for c in chunks if c.rows == 1), tuple(c for c in chunks if c.rows > 1))

    def advance(self, plan: Plan) -> None:
        """The rows of `plan` are in the cache for every later step, and each sampled sequence is a token longer."""
        sampled = plan.sampled
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.end
        for sequence in sampled:
            sequence.tokens.append(UNKNOWN)

    def undo(self, plan: Plan) -> None:
        """Take back what `advance` said of the newest plan whose step has not been taken in. Its sequences keep their
        pages; the rows in them are written again."""
        for sequence in plan.sampled:
            assert sequence.unknown
            sequence.tokens.pop()
        for chunk in plan.chunks:
            if chunk.sequence.pages and chunk.life == chunk.sequence.preemptions:
                chunk.sequence.computed = chunk.start

    def publish(self, plan: Plan) -> None:
        """Make the pages known that `plan` filled, once its step has succeeded and their tokens are known."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            # What was computed before the cache was emptied, or from it, is not found again; nor what was given back.
            known = self.prefix_cache and sequence.epoch == self.allocator.epoch and chunk.life == sequence.preemptions
            if known and sequence.pages and chunk.end // PAGE > chunk.start // PAGE:
                extend_hashes(sequence.hashes, sequence.tokens[: chunk.end], self.model, sequence.request.salt)
                for index in range(chunk.start // PAGE, chunk.end // PAGE):
                    self.allocator.publish(sequence.pages[index], sequence.hashes[index])

    def check(self) -> None:
        """Assert what must hold between two steps."""
        self.allocator.check(sequence.pages for sequence in self.sequences())
        assert len(self.running) <= self.max_batch
        assert [s.arrival for s in self.running] == sorted(s.arrival for s in self.running)
        for sequence in self.running:
            assert sequence.computed < len(sequence.tokens) and len(sequence.pages) * PAGE >= sequence.computed
        assert not any(s.pages or s.computed for s in self.sequences() if s not in self.running)

    def _grow(self, sequence: Sequence, rows: int) -> bool:
        """Give `sequence` the pages for its next rows, taking them from younger ones; False if it lost its own."""
        need = -(-(sequence.computed + rows) // PAGE) - len(sequence.pages)
        while (pages := self.allocator.allocate(max(need, 0))) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += pages
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.preemptions += 1
        self._preemptions += 1
        self.preempted.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def _admit(self) -> Sequence | None:
        """Start the next waiting sequence if the pages for all its tokens are there."""
        queue = self.preempted or next(iter(self._waiting.values()), self.preempted)
        if not queue or queue[0].unknown:  # a preempted one may still wait for its last token
            return None
        sequence = queue[0]
        if self.prefix_cache:
            # The last token is always computed: its logits are wanted.
            usable = (len(sequence.tokens) - 1) // PAGE
            if sequence.scores is not None:
                usable = min(usable, len(sequence.scores) // PAGE)  # a row without logits scores nothing
            extend_hashes(sequence.hashes, sequence.tokens, self.model, sequence.request.salt)
            sequence.pages = self.allocator.match(sequence.hashes[:usable])
        pages = self.allocator.allocate(-(-len(sequence.tokens) // PAGE) - len(sequence.pages))
        if pages is None:
            self._give_back(sequence)
            return None
        sequence.computed = len(sequence.pages) * PAGE
        sequence.epoch = self.allocator.epoch
        if not sequence.preemptions:
            sequence.cached = sequence.computed
        sequence.pages += pages
        queue.popleft()
        if queue is not self.preempted:
            tenant = sequence.request.tenant
            self._waiting.move_to_end(tenant)  # the next tenant's turn
            if not queue:
                del self._waiting[tenant]
        # Preempted ones come back before younger ones that were never preempted: keep the oldest first.
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival)
        return sequence


def _chunk(sequence: Sequence, rows: int) -> Chunk:
    return Chunk(sequence, sequence.computed, rows, sequence.preemptions)
