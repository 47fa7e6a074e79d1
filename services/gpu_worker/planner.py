"""What the next step computes: decodes first, then chunks of prefill. The plan is a value and needs no model."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from common.messages import Generate, TokenLogprobs
from common.pages import PAGE, extend_hashes
from services.gpu_worker.pace import Pace, Room
from services.gpu_worker.pages import PageAllocator
from services.gpu_worker.turns import Turns

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
    # perf_counter() when it came, when a step first computed of it, and when its first token was known
    arrived: float = 0.0
    started: float = 0.0
    answered: float = 0.0

    @classmethod
    def of(cls, request: Generate, arrival: int, constraint: Constraint | None = None) -> Sequence:
        scores: list[TokenLogprobs] | None = [] if request.sampling.prompt_logprobs is not None else None
        return cls(request, arrival, list(request.prompt), scores=scores, constraint=constraint)

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def order(self) -> tuple[int, int]:
        """Among its tenant's: the more urgent first, then the older."""
        return self.request.priority, self.arrival

    @property
    def left(self) -> int:
        """Rows that are to be computed."""
        return len(self.tokens) - self.computed

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

    Who is next, for prompt tokens as for a place in the batch: the more urgent, then the tenant that has nothing
    running, then the one that had the fewest tokens computed (see Turns), then the older.

    A sequence whose pages run out takes them from another that runs: of the least urgent ones, from the tenant with the
    most running, the youngest. That goes back to the head of its tenant's queue and is computed again later. Of the
    most urgent the oldest is never preempted for another, and every request alone fits into the cache, so some request
    always advances. Without priorities and tenants this is the youngest of all.

    Where batch or pages are full, one is preempted too for a waiting request that is more urgent, or whose tenant has
    nothing running: for the latter only one of a tenant that keeps another, and pages only from a tenant that has more
    than its share. So no two requests take the same place from each other in turn.
    """

    def __init__(self, allocator: PageAllocator, model: str, *, max_batch: int, pace: Pace, prefix_cache: bool) -> None:
        self.allocator = allocator
        self.model = model
        self.max_batch = max_batch
        self.pace = pace
        self.prefix_cache = prefix_cache
        self.running: list[Sequence] = []  # oldest first
        self.preempted: list[Sequence] = []  # in their order
        self.turns = Turns()
        self._waiting: dict[str, list[Sequence]] = {}  # tenant -> its queue, the next one first
        self._running_of = Counter[str]()  # tenant -> how many of its run
        self._started: list[Sequence] = []  # for the first time, since they were last asked for
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
        if request.tenant not in (present := self._tenants()):
            self.turns.comes(request.tenant, present)
        bisect.insort(self._waiting.setdefault(request.tenant, []), sequence, key=lambda s: s.order)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """End a sequence wherever it is: its pages are free at once."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self._take_out(sequence)
        self._give_back(sequence)

    def take_preemptions(self) -> int:
        """How many there were since the last call."""
        count, self._preemptions = self._preemptions, 0
        return count

    def take_started(self) -> list[Sequence]:
        """Those that were admitted for the first time since the last call."""
        started, self._started = self._started, []
        return started

    def plan(self) -> Plan:
        room = self.pace.room(sum(s.left == 1 for s in self.running))
        planned = [*self._plan_decodes(), *self._plan_prefills(room)]
        alive = set(map(id, self.running))
        chunks = [c for c in planned if id(c.sequence) in alive and c.life == c.sequence.preemptions]
        # A one-row chunk of a prefill is a decode like any other: same rows, same kernel.
        return Plan(tuple(c for c in chunks if c.rows == 1), tuple(c for c in chunks if c.rows > 1))

    def _plan_decodes(self) -> list[Chunk]:
        chunks = []
        for sequence in list(self.running):
            if sequence.left != 1 or sequence.full or not sequence.pages:
                continue  # in its prompt, about to end, or preempted for another in this very loop
            if self._grow(sequence):
                chunks.append(Chunk(sequence, sequence.computed, 1, sequence.preemptions))
        for tenant, rows in Counter(chunk.sequence.tenant for chunk in chunks).items():
            self.turns.had(tenant, rows)
        return chunks

    def _plan_prefills(self, room: Room) -> list[Chunk]:
        """Prompts under way and new ones, by turns. Once the next new one finds no room no other is admitted: what
        becomes free is kept until that one fits."""
        chunks: list[Chunk] = []
        begun = [s for s in self.running if s.left > 1]
        may_admit = True
        while room:
            begun = [s for s in begun if s.pages]
            candidates = begun + (self._heads() if may_admit else [])
            if not candidates:
                break
            chosen = min(candidates, key=self._turn)
            if chosen in begun:
                begun.remove(chosen)
            elif not self._admit(chosen):
                may_admit = False
                continue
            if not (rows := room.take(chosen.left, chosen.computed)):
                break
            chunks.append(Chunk(chosen, chosen.computed, rows, chosen.preemptions))
            self.turns.had(chosen.tenant, rows)
        return chunks

    def _turn(self, sequence: Sequence) -> tuple[int, bool, int, bool, int]:
        """The lowest is next."""
        tenant, waits = sequence.tenant, not sequence.pages
        return sequence.request.priority, self._running_of[tenant] > 0, self.turns.of(tenant), waits, sequence.arrival

    def _heads(self) -> list[Sequence]:
        """Of each tenant the next one that waits; none of a tenant whose next one does not know its last token yet."""
        heads = {tenant: queue[0] for tenant, queue in self._waiting.items()}
        for sequence in reversed(self.preempted):
            other = heads.get(sequence.tenant)
            if other is None or sequence.order < other.order:
                heads[sequence.tenant] = sequence
        return [sequence for sequence in heads.values() if not sequence.unknown]

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

    def _grow(self, sequence: Sequence) -> bool:
        """Give `sequence` the page for its next row, taking it from another; False if it lost its own."""
        need = -(-(sequence.computed + 1) // PAGE) - len(sequence.pages)
        if need <= 0:
            return True
        while (pages := self.allocator.allocate(need)) is None:
            victim = max(self.running, key=self._dispensable)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += pages
        return True

    def _dispensable(self, sequence: Sequence) -> tuple[int, int, int]:
        """The highest is preempted first."""
        return sequence.request.priority, self._running_of[sequence.tenant], sequence.arrival

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._give_back(sequence)
        sequence.preemptions += 1
        self._preemptions += 1
        bisect.insort(self.preempted, sequence, key=lambda s: s.order)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._running_of[sequence.tenant] -= 1
        if not self._running_of[sequence.tenant]:
            del self._running_of[sequence.tenant]

    def _take_out(self, sequence: Sequence) -> None:
        """Of where it waits."""
        if sequence in self.preempted:
            self.preempted.remove(sequence)
            return
        queue = self._waiting[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.tenant]

    def _give_back(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def _tenants(self) -> set[str]:
        return self._waiting.keys() | self._running_of.keys() | {s.tenant for s in self.preempted}

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if there is a place for it, and the pages for all its tokens."""
        if len(self.running) >= self.max_batch and self._victim(sequence) is None:
            return False
        if self.prefix_cache:
            # The last token is always computed: its logits are wanted.
            usable = (len(sequence.tokens) - 1) // PAGE
            if sequence.scores is not None:
                usable = min(usable, len(sequence.scores) // PAGE)  # a row without logits scores nothing
            extend_hashes(sequence.hashes, sequence.tokens, self.model, sequence.request.salt)
            sequence.pages = self.allocator.match(sequence.hashes[:usable])
        need = -(-len(sequence.tokens) // PAGE) - len(sequence.pages)
        while (pages := self.allocator.allocate(need)) is None:
            if (victim := self._victim(sequence, pages=True)) is None:
                self._give_back(sequence)
                return False
            self._preempt(victim)
        if len(self.running) >= self.max_batch:
            victim = self._victim(sequence)
            assert victim is not None  # there was one, and nobody was preempted since
            self._preempt(victim)
        sequence.computed = len(sequence.pages) * PAGE
        sequence.epoch = self.allocator.epoch
        if not sequence.preemptions:
            sequence.cached = sequence.computed
            self._started.append(sequence)
        sequence.pages += pages
        self._take_out(sequence)
        # Preempted ones come back before younger ones that were never preempted: keep the oldest first.
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)
        self._running_of[sequence.tenant] += 1
        return True

    def _victim(self, waiting: Sequence, *, pages: bool = False) -> Sequence | None:
        """Whose place, or whose pages, a waiting sequence takes; None: it has to wait. See the class."""
        priority = waiting.request.priority
        victims = [s for s in self.running if s.request.priority > priority and not s.full]
        if not victims and not self._running_of[waiting.tenant]:
            rich = {tenant for tenant, count in self._running_of.items() if count > 1}
            if pages:
                rich -= self._within_share()
            victims = [s for s in self.running if s.tenant in rich and s.request.priority == priority and not s.full]
        return max(victims, key=self._dispensable, default=None)

    def _within_share(self) -> set[str]:
        """The tenants that hold no more pages than each would if they were shared out evenly."""
        held = Counter[str]()
        for sequence in self.running:
            held[sequence.tenant] += len(sequence.pages)
        share = self.allocator.total // max(1, len(self._tenants()))
        return {tenant for tenant, count in held.items() if count <= share}
