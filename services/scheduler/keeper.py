"""The map keeper: from what the shards and workers say to the next expert map. It decides and does no I/O.

It looks at the present state each time and says what is still to be done, so that it does not matter which events were
missed: `target` is who shall hold what; `map` is what workers use. A partition moves in three decisions: its new shard
is told to load it, the map flips when all that is to be loaded is held, and when every worker has acknowledged that
version the old shard is told to hold only its target. A dead shard leaves the map at once and the target after a grace.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from common import expert_map
from common.expert_map import Assignment
from common.messages import ExpertMap, ShardBeat, ShardEntry, WorkerBeat

HEAR_SECONDS = 1.0  # after its start the scheduler only listens: deciding on half of the shards would move the rest
SETTLE_SECONDS = 1.0  # shards that start together are planned together, so that each loads its part once
GRACE_SECONDS = 10.0  # a dead shard's partitions wait so long for its return before others load them


@dataclass
class Decision:
    new_map: ExpertMap | None = None  # to be published by compare-and-set
    loads: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shard -> all that it shall hold now


class MapKeeper:
    def __init__(self, model: str, partitions: int, copies: int, now: float) -> None:
        self.model = model
        self.partitions = partitions  # 0: a dense model, which needs neither shards nor a map
        self.copies = copies
        self.map: ExpertMap | None = None
        self.target: Assignment | None = None
        self.announced = 0  # the highest version anyone has named
        self._target_members: frozenset[str] = frozenset()
        self._reserved: dict[str, float] = {}  # dead shard -> until when its part of the target waits for it
        self._joining: frozenset[tuple[str, str]] = frozenset()
        self._joining_since = now
        self._started = now

    # ---- what it is told --------------------------------------------------------------------------------------------

    def adopt(self, found: ExpertMap) -> bool:
        """Take over a map that another scheduler published. False if it is of another model, or older than ours."""
        self.announced = max(self.announced, found.version)
        ours = found.model == self.model and found.partitions == self.partitions and not expert_map.faults(found)
        if not ours or (self.map and found.version < self.map.version):
            return False
        if found != self.map:
            self.map, self.target, self._target_members = found, None, frozenset()
        return True

    def published(self, new_map: ExpertMap) -> None:
        self.map = new_map
        self.announced = max(self.announced, new_map.version)

    def shard_died(self, shard_id: str, now: float) -> None:
        if shard_id in self._target_members:
            self._reserved[shard_id] = now + GRACE_SECONDS

    # ---- what it decides --------------------------------------------------------------------------------------------

    def decide(self, now: float, shards: Iterable[ShardBeat], workers: Iterable[WorkerBeat]) -> Decision:
        live = {beat.id: beat for beat in shards}
        self._watch_joining(now, live)
        if not self.partitions or now < self._started + HEAR_SECONDS:
            return Decision()
        self._replan(now, live)
        return Decision(self._next_map(live), self._loads(live, self._acknowledged(workers)))

    def _watch_joining(self, now: float, live: dict[str, ShardBeat]) -> None:
        joining = frozenset((s, beat.state) for s, beat in live.items() if s not in self._target_members)
        if joining != self._joining:
            self._joining, self._joining_since = joining, now

    def _replan(self, now: float, live: dict[str, ShardBeat]) -> None:
        self._reserved = {s: until for s, until in self._reserved.items() if s not in live and until > now}
        staying = {s for s, beat in live.items() if beat.state != "draining"}
        usable = (staying | self._reserved.keys()) & self._target_members
        if now >= self._joining_since + SETTLE_SECONDS:
            usable |= {s for s in staying if live[s].state == "ready"}
        if usable == self._target_members:
            return
        self.target = expert_map.plan({s: self._has(s, live) for s in usable}, self.partitions, self.copies)
        self._target_members = frozenset(usable)

    def _has(self, shard_id: str, live: dict[str, ShardBeat]) -> frozenset[int]:
        if self.target is not None and shard_id in self._target_members:
            return expert_map.partitions_of(self.target, shard_id)
        return frozenset(live[shard_id].held)

    def _next_map(self, live: dict[str, ShardBeat]) -> ExpertMap | None:
        """The map to publish, or None while the present one is right.

        It flips to the target when all of that is held; earlier only if this makes an incomplete map complete.
        """
        owners = self._still_true(live)
        if self.target is not None:
            flipped = tuple(_holders(self.target[p], p, live) or owners[p] for p in range(self.partitions))
            mends = bool(expert_map.missing(owners)) and not expert_map.missing(flipped)
            if mends or self._all_loaded(live):
                owners = flipped
        entries = {s: ShardEntry(live[s].boot_id, live[s].node) for s in sorted(expert_map.members(owners))}
        if self.map is None:
            wait = not entries or (expert_map.missing(owners) and not self._all_loaded(live))
        else:
            wait = (owners, entries) == (self.map.owners, self.map.shards) and self.announced <= self.map.version
        if wait:
            return None
        version = self.announced + 1
        return ExpertMap(version=version, model=self.model, partitions=self.partitions, owners=owners, shards=entries)

    def _still_true(self, live: dict[str, ShardBeat]) -> Assignment:
        """The owners of the map that live and hold their part; without a map (both it and we are new) all holders."""
        owners = self.map.owners if self.map else (tuple(sorted(live)),) * self.partitions
        return tuple(_holders(owners[p], p, live) for p in range(self.partitions))

    def _all_loaded(self, live: dict[str, ShardBeat]) -> bool:
        return self.target is not None and not any(self._is_loading(live[s]) for s in self._target_members if s in live)

    def _is_loading(self, beat: ShardBeat) -> bool:
        """Whether it has not all it shall have; a shard that nothing is planned for yet counts as loading."""
        if beat.id not in self._target_members:
            return beat.state != "draining"
        return not expert_map.partitions_of(self.target or (), beat.id) <= set(beat.held)

    def _acknowledged(self, workers: Iterable[WorkerBeat]) -> bool:
        # A worker that is starting has no request yet, and its first map will be this one or a newer one.
        users = [worker for worker in workers if worker.state != "starting"]
        return self.map is not None and all(worker.map_version >= self.map.version for worker in users)

    def _loads(self, live: dict[str, ShardBeat], acknowledged: bool) -> dict[str, tuple[int, ...]]:
        """All that each shard shall hold now. Nothing is dropped that a worker may still use."""
        loads = {}
        for shard_id, beat in live.items():
            if beat.state != "draining" and not (beat.state == "ready" and shard_id in self._target_members):
                continue
            wanted = set() if acknowledged else set(beat.held)
            for owners in (self.target, self.map.owners if self.map else None):
                wanted |= expert_map.partitions_of(owners or (), shard_id)
            loads[shard_id] = tuple(sorted(wanted))
        return loads

    # ---- what it says -----------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        return not self.partitions or (self.map is not None and not expert_map.missing(self.map.owners))

    def reason(self, shards: Iterable[ShardBeat]) -> str:
        """Why there is no complete set of experts, in one sentence; empty if there is one."""
        if self.complete:
            return ""
        live = {beat.id: beat for beat in shards}
        loading = ", ".join(f"{s} {_percent(live[s])}" for s in sorted(live) if self._is_loading(live[s]))
        if self.map is None:
            return f"experts are being loaded by {loading}" if loading else "no expert shard is running"
        gaps = expert_map.missing(self.map.owners)
        sentence = f"no live shard holds expert partitions {_ranges(gaps)} of {self.partitions}"
        gone = ", ".join(sorted(s for s in self._reserved if s not in live))
        return sentence + (f"; gone: {gone}" if gone else "") + (f"; loading: {loading}" if loading else "")


def _holders(shard_ids: Iterable[str], partition: int, live: dict[str, ShardBeat]) -> tuple[str, ...]:
    return tuple(s for s in shard_ids if s in live and partition in live[s].held)


def _percent(beat: ShardBeat) -> str:
    if beat.load_total and beat.load_done < beat.load_total:
        return f"({100 * beat.load_done // beat.load_total} %)"
    return f"({beat.state})"


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
