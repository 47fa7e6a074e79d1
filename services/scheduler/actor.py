"""The scheduler: who is alive, which expert lives where, which worker gets a request. It takes no part in a step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from common.actor import BEAT_SECONDS, SILENT_SECONDS, Actor
from common.bus import Conflict, Subscription
from common.errors import (
    BusUnavailable,
    Draining,
    ExpertsUnavailable,
    InvalidRequest,
    MoeculeError,
    NoResponders,
)
from common.messages import (
    Assign,
    Assigned,
    ExpertMap,
    GetMetrics,
    GetPages,
    LoadPartitions,
    Message,
    PagesChanged,
    SchedulerBeat,
    ShardBeat,
    WorkerBeat,
    decode,
    encode,
    subject,
    subject_of_kind,
)
from common.model_config import ModelConfig
from common.tracing import entered
from services.scheduler.keeper import MapKeeper
from services.scheduler.membership import Members
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.placement import Placement, why_none_serves

BUCKET, KEY = "moecule", "expert_map"
TICK_SECONDS = BEAT_SECONDS / 2
STALLED_SECONDS = 1.0  # between two ticks: then the silence was our own
LATE_SECONDS = 3 * BEAT_SECONDS  # a peer not heard for so long is asked whether anyone listens on its subject
SURE_SECONDS = 2.0  # after a reconnect of ours the others may still be reconnecting: no answer proves nothing


class Scheduler(Actor):
    kind = "scheduler"
    keeper: MapKeeper

    async def start(self) -> None:
        config = await asyncio.to_thread(ModelConfig.load, self.settings.model, self.settings.weights)
        self.model = config.fingerprint
        self.workers: Members[WorkerBeat] = Members()
        self.shards: Members[ShardBeat] = Members()
        self.others: Members[SchedulerBeat] = Members()
        self.keeper = MapKeeper(self.model, config.partitions, self.settings.expert_copies, self.clock.now())
        self.placement = Placement(self.settings.max_batch)
        self.metered = SchedulerMetrics(self.metrics)
        self._peers: dict[str, Members[Any]] = {"worker": self.workers, "shard": self.shards, "scheduler": self.others}
        self._revision: int | None = None  # of the key in the KV bucket; None: to be read
        self._foreign: dict[str, str] = {}  # id -> boot id of those that were logged as of another model
        self._busy: set[tuple[str, str]] = set()  # (what, id) of the requests under way: one at a time
        self._told: dict[str, tuple[str, tuple[int, ...]]] = {}  # shard -> (boot id, what it was told to hold)
        self._said = (0, "")  # map version and reason of the newest heartbeat
        self._write_failed = False
        self._looked_at = self._listening_since = self.clock.now()
        self._wake = asyncio.Event()
        self.bus.on_reconnect(self._on_reconnect)
        self._subscriptions: list[Subscription] = [
            await self.bus.subscribe("moecule.v1.worker.*.beat", self._on_worker),
            await self.bus.subscribe("moecule.v1.shard.*.beat", self._on_shard),
            await self.bus.subscribe("moecule.v1.scheduler.*.beat", self._on_scheduler),
            await self.bus.subscribe("moecule.v1.worker.*.pages", self._on_pages),
        ]
        self._serving: list[Subscription] = [
            await self.bus.subscribe(subject_of_kind("assign"), self._on_assign, queue="scheduler"),
            await self.bus.subscribe(subject_of_kind("map"), self._on_get_map, queue="scheduler"),
        ]
        self.spawn(self._tick(), "tick")
        self.spawn(self._keep_map(), "keep map")

    def beat(self) -> Message:
        if self.state == "starting":
            version, reason = 0, "the scheduler is starting"
        else:
            version, reason = self._map_version, self.reason()
        return SchedulerBeat(id=self.id, boot_id=self.boot_id, state=self.state, map_version=version, reason=reason)

    async def drain(self) -> None:
        for subscription in self._serving:
            await subscription.drain()

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.drain()

    def reason(self) -> str:
        """Why the cluster cannot serve, in one sentence; empty when it can."""
        reasons = (self._why_no_experts(), why_none_serves(self.workers))
        return "; ".join(reason for reason in reasons if reason)

    def _why_no_experts(self) -> str:
        """Why no worker reaches all experts; those that have them in their own process need no shards."""
        if any(worker.own_experts for worker in self.workers):
            return ""
        return self.keeper.reason(self.shards)

    @property
    def _map_version(self) -> int:
        return self.keeper.map.version if self.keeper.map else 0

    # ---- requests

    async def _on_assign(self, _: str, message: Message) -> Assigned:
        if not isinstance(message, Assign):
            raise InvalidRequest("expected an Assign message")
        try:
            with entered(self.traces.begin("choose worker", message.traceparent)) as span:
                assigned = self._assign(message)
                span.set({"moecule.worker": assigned.worker_id, "moecule.workers": len(self.workers)})
        except MoeculeError as error:
            self.metered.refused(error.code)
            raise
        self.metered.assigned(assigned.worker_id)
        return assigned

    def _assign(self, message: Assign) -> Assigned:
        if self.state == "draining":
            raise Draining("the scheduler is leaving")
        if reason := self._why_no_experts():
            raise ExpertsUnavailable(reason)
        return self.placement.pick(message, list(self.workers))

    async def _on_get_map(self, _: str, message: Message) -> ExpertMap:
        if self.keeper.map is None:
            raise ExpertsUnavailable(self.keeper.reason(self.shards) or "this model has no routed experts")
        return self.keeper.map

    # ---- who is there

    async def _on_worker(self, _: str, beat: Message) -> None:
        if isinstance(beat, WorkerBeat) and not self._is_foreign("worker", beat) and self._heard("worker", beat):
            self.placement.heard(beat)

    async def _on_shard(self, _: str, beat: Message) -> None:
        if isinstance(beat, ShardBeat) and not self._is_foreign("shard", beat):
            self._heard("shard", beat)

    async def _on_scheduler(self, _: str, beat: Message) -> None:
        if not isinstance(beat, SchedulerBeat) or beat.id == self.id:
            return
        if self._heard("scheduler", beat) and beat.map_version > self._map_version:
            self._revision = None

    def _heard(self, kind: str, beat: WorkerBeat | ShardBeat | SchedulerBeat) -> bool:
        """False for a message of an earlier life, which counts for nothing."""
        news = self._peers[kind].heard(beat, self.clock.now())
        if news == "stale":
            return False
        self.keeper.announced = max(self.keeper.announced, beat.map_version)
        if news in ("joined", "reborn"):
            self.log.info(f"{kind} {news}", peer=beat.id, boot=beat.boot_id)
        if news != "same":
            self._wake.set()
        return True

    def _is_foreign(self, kind: str, beat: WorkerBeat | ShardBeat) -> bool:
        if beat.model in ("", self.model):  # an actor that is starting may not know its model yet
            return False
        if self._foreign.get(beat.id) != beat.boot_id:
            self._foreign[beat.id] = beat.boot_id
            self.log.warning("left out: it serves another checkpoint", peer=beat.id, model=beat.model, ours=self.model)
        if known := self._peers[kind].get(beat.id):
            self._bury(kind, known, "it serves another checkpoint")
        return True

    async def _tick(self) -> None:
        while True:
            await self.clock.sleep(TICK_SECONDS)
            self._look_for_dead()
            for worker in self.placement.unsynced(self.workers):
                self._once("pages", worker.id, self._ask_pages, worker)
            self._wake.set()

    def _look_for_dead(self) -> None:
        now = self.clock.now()
        if now - self._looked_at > STALLED_SECONDS:
            # It was this process that stood still (stopped, swapped out): what others said meanwhile is still unread.
            self._listening_since = now
        self._looked_at = now
        # 0 without a connection: nobody is silent
        connected_for = min(self.bus.connected_for(), now - self._listening_since)
        for kind, members in self._peers.items():
            for beat in members.silent(SILENT_SECONDS, now, now - connected_for):
                self._bury(kind, beat, "it is silent")
            if connected_for > SURE_SECONDS:
                for beat in members.silent(LATE_SECONDS, now, now - connected_for):
                    self._once("probe", f"{kind}.{beat.id}", self._probe, kind, beat)

    async def _probe(self, kind: str, beat: Any) -> None:
        """Late is not dead, but a subject on which nobody listens is the mark of an ended process."""
        try:
            await self.bus.request(subject(kind, beat.id, "metrics"), GetMetrics(), timeout=1.0)
        except NoResponders:
            if self.bus.connected:
                self._bury(kind, beat, "nobody listens on its subject")
        except MoeculeError:
            pass

    def _bury(self, kind: str, beat: Any, why: str) -> None:
        if not self._peers[kind].bury(beat):
            return
        self.log.warning(f"{kind} lost", peer=beat.id, boot=beat.boot_id, why=why)
        if kind == "shard":
            self.keeper.shard_died(beat.id, self.clock.now())
        if kind == "worker":
            self.placement.forget(beat.id)
        self._wake.set()

    async def _on_reconnect(self) -> None:
        self._revision = None  # a restarted server has an empty bucket
        self._wake.set()

    # ---- the prefix caches

    async def _on_pages(self, _: str, change: Message) -> None:
        if isinstance(change, PagesChanged) and self.workers.lives(change.worker_id, change.boot_id):
            self.placement.pages_changed(change)

    async def _ask_pages(self, worker: WorkerBeat) -> None:
        try:
            pages = await self.bus.request(subject("worker", worker.id, "allpages"), GetPages())
        except MoeculeError as error:
            self.log.debug("the pages of a worker are not known", peer=worker.id, why=error.message)
            return
        await self._on_pages("", pages)

    # ---- the expert map

    async def _keep_map(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._look_at_map()
            except (BusUnavailable, Conflict) as error:
                self._revision = None  # read it again at the next tick: someone else may have written it
                if not self._write_failed:
                    self.log.warning("the expert map is not written", why=error.message)
                self._write_failed = True

    async def _look_at_map(self) -> None:
        if self._revision is None:
            await self._read_map()
        if self.state == "ready" and self._leads():
            decision = self.keeper.decide(self.clock.now(), self.shards, self.workers)
            if decision.new_map:
                await self._write_map(decision.new_map)
            for shard_id, partitions in decision.loads.items():
                self._tell(shard_id, partitions)
        else:
            self._told.clear()
        self._write_failed = False
        self.metered.state(self._map_version, len(self.workers), len(self.shards))
        if (says := (self._map_version, self.reason())) != self._said:
            self._said = says
            self.beat_now()

    def _leads(self) -> bool:
        """Of several schedulers one plans; that two might for a moment is what compare-and-set is for."""
        return not any(other.state == "ready" and other.id < self.id for other in self.others)

    async def _read_map(self) -> None:
        found = await self.bus.kv_get(BUCKET, KEY)
        self._revision = found[1] if found else 0
        theirs = _parse(found[0]) if found else None
        adopted = theirs is not None and self.keeper.adopt(theirs)
        if not adopted and self.keeper.map and self._leads():
            await self._write_map(self.keeper.map)

    async def _write_map(self, new_map: ExpertMap) -> None:
        assert self._revision is not None
        self._revision = await self.bus.kv_put(BUCKET, KEY, encode(new_map), self._revision)
        self.keeper.published(new_map)
        self.log.info("expert map", version=new_map.version, shards=sorted(new_map.shards), why=self.reason() or None)

    def _tell(self, shard_id: str, partitions: tuple[int, ...]) -> None:
        beat = self.shards.get(shard_id)
        if beat and self._told.get(shard_id) != (beat.boot_id, partitions):
            self._once("load", shard_id, self._ask_to_hold, beat, partitions)

    async def _ask_to_hold(self, shard: ShardBeat, partitions: tuple[int, ...]) -> None:
        message = LoadPartitions(version=self.keeper.announced, partitions=partitions)
        try:
            await self.bus.request(subject("shard", shard.id, "load"), message)
        except NoResponders:
            return  # it is ending or reconnecting; if it lives, the next tick tells it
        except MoeculeError as error:
            self.log.warning("a shard was not told what to hold", peer=shard.id, why=error.message)
            return
        self._told[shard.id] = (shard.boot_id, partitions)

    def _once(self, what: str, peer: str, ask: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run `ask` in a task of its own, unless the same is under way for this peer."""
        key = (what, peer)
        if key in self._busy:
            return
        self._busy.add(key)

        async def run() -> None:
            try:
                await ask(*args)
            finally:
                self._busy.discard(key)

        self.spawn(run(), f"{what} {peer}")


def _parse(value: bytes) -> ExpertMap | None:
    try:
        found = decode(value)
    except msgspec.DecodeError:
        return None
    return found if isinstance(found, ExpertMap) else None
