"""What the gateway knows of the cluster, from heartbeats alone: one snapshot for all who look, so that a viewer costs
the actors nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from common.actor import BEAT_SECONDS, SILENT_SECONDS
from common.bus import Bus
from common.clock import Clock
from common.messages import GatewayBeat, Message, SchedulerBeat, ShardBeat, WorkerBeat
from common.model_config import ModelConfig

MISSED_SECONDS = 4 * BEAT_SECONDS  # without a heartbeat for so long an actor is shown as silent
KEEP_SECONDS = 60.0  # for so long one that is gone is shown
WINDOW_SECONDS = 2.0  # that rates are taken over
SNAPSHOT_SECONDS = 0.2  # a snapshot serves all who ask within this time
STOOD_STILL_SECONDS = 1.0  # what came while this process stood still is not read yet: that silence is ours
HAPPENINGS = 50

AnyBeat = GatewayBeat | SchedulerBeat | WorkerBeat | ShardBeat
Kind = Literal["gateway", "scheduler", "worker", "shard"]
KINDS: dict[str, Kind] = {"worker": "worker", "shard": "shard", "scheduler": "scheduler", "gateway": "gateway"}
Condition = Literal["starting", "ready", "draining", "silent", "left", "gone"]


# ---- the answer


class Wait(msgspec.Struct, frozen=True):
    """The share of its time, 0 to 1, that a worker's steps stood still while this shard had not answered. A time in
    which several had not counts for each of them: these do not add up."""

    shard: str
    share: float


class ExpertRate(msgspec.Struct, frozen=True):
    expert: int
    tokens_per_second: float  # over all layers


class ActorView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One actor. Fields that its kind does not have, and zeros, are left out. `state` is what it said of itself; or
    `silent`: it has missed four heartbeats; `left`: it did so after it said that it leaves; `gone`: it is silent for
    longer than 5 s. `lives`: how often it has started, as far as this gateway saw. Rates are over the last 2 s."""

    kind: Kind
    id: str
    boot_id: str
    state: Condition
    silent_seconds: float
    lives: int = 1
    node: str = ""
    reason: str = ""  # why it cannot serve
    map_version: int = 0
    load_done: int = 0  # bytes of weights
    load_total: int = 0
    # a worker's
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    tokens_per_second: float = 0.0
    prompt_tokens_per_second: float = 0.0
    step_ms: float = 0.0
    waited: list[Wait] = []
    own_experts: bool = False
    # a shard's
    partitions: int = 0
    rows_per_second: float = 0.0
    row_us: float = 0.0
    busy: float = 0.0  # share of its time, 0 to 1
    awaited: float | None = None  # the largest share that a worker tells in `waited`; None: no worker tells of it
    experts: list[ExpertRate] = []  # those that it holds; none where they are not counted


class Happening(msgspec.Struct, frozen=True):
    """`at`: seconds since 1970."""

    at: float
    id: str
    what: str


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """`at`: seconds since 1970. `reason`: why the cluster cannot serve, empty when it can. Where `connected` is false
    the actors are as they were last heard. `happenings`: the newest last."""

    at: float
    gateway: str
    model: str
    connected: bool
    reason: str
    map_version: int
    partitions: int
    actors: list[ActorView]
    happenings: list[Happening]


# ---- how it comes about


class _Known:
    """One actor over its lives; `beats`: of its newest one, with when they came, as far back as rates need."""

    def __init__(self, kind: Kind, beat: AnyBeat, now: float) -> None:
        self.kind = kind
        self.lives = 1
        self.beats: deque[tuple[float, AnyBeat]] = deque([(now, beat)])
        self.shown: Condition = beat.state

    @property
    def beat(self) -> AnyBeat:
        return self.beats[-1][1]

    @property
    def heard(self) -> float:
        return self.beats[-1][0]

    def take(self, beat: AnyBeat, now: float) -> None:
        self.beats.append((now, beat))
        while len(self.beats) > 2 and self.beats[1][0] <= now - WINDOW_SECONDS:
            self.beats.popleft()

    def reborn(self, beat: AnyBeat, now: float) -> None:
        self.lives += 1
        self.beats = deque([(now, beat)])


class ClusterView:
    def __init__(
        self, bus: Bus, clock: Clock, gateway_id: str, model: str, config: ModelConfig,
        why_not_ready: Callable[[], str], wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._bus, self._clock, self._wall = bus, clock, wall
        self._gateway_id, self._model, self._config = gateway_id, model, config
        self._why_not_ready = why_not_ready
        self._known: dict[tuple[Kind, str], _Known] = {}
        self._happenings: deque[Happening] = deque(maxlen=HAPPENINGS)
        self._map_version = 0
        self._looked_at = self._awake_since = clock.now()
        self._snapshot: tuple[float, bytes] | None = None

    def take(self, subject: str, message: Message) -> None:
        """`subject`: moecule.v1.<kind>.<id>.beat"""
        kind = KINDS.get(subject.split(".")[2])
        if kind is None or not isinstance(message, AnyBeat):
            return
        self._look()
        now = self._clock.now()
        known = self._known.get((kind, message.id))
        if known is None:
            known = self._known[kind, message.id] = _Known(kind, message, now)
            self._tell(message.id, f"is there: {message.state}")
        elif message.boot_id < known.beat.boot_id:
            return  # an earlier life's word, on its way for long
        elif message.boot_id != known.beat.boot_id:
            known.reborn(message, now)
            known.shown = message.state
            self._tell(message.id, f"is back in a new life: {message.state}")
        else:
            known.take(message, now)
            self._show(known, message.state)
        if isinstance(message, SchedulerBeat) and message.map_version > self._map_version:
            self._map_version = message.map_version
            self._tell(message.id, f"made version {message.map_version} of the expert map")

    def snapshot(self) -> bytes:
        """`Cluster`, as JSON."""
        now = self._clock.now()
        if self._snapshot is None or now - self._snapshot[0] >= SNAPSHOT_SECONDS:
            self._look()
            self._snapshot = now, msgspec.json.encode(self._cluster())
        return self._snapshot[1]

    # ---- who is silent

    def _look(self) -> None:
        """Our own heartbeat comes back to us too, so that this runs as often as heartbeats do."""
        now = self._clock.now()
        if now - self._looked_at > STOOD_STILL_SECONDS:
            self._awake_since = now
        self._looked_at = now
        for key, known in list(self._known.items()):
            if (silence := self._silence(known)) >= MISSED_SECONDS:
                self._show(known, _how_gone(known, silence))
            if silence >= KEEP_SECONDS:
                del self._known[key]

    def _silence(self, known: _Known) -> float:
        """Seconds since it was heard. Without a connection of ours nobody is silent, nor before it was made."""
        since = max(known.heard, self._awake_since)
        return max(0.0, min(self._clock.now() - since, self._bus.connected_for()))

    def _show(self, known: _Known, state: Condition) -> None:
        if state == known.shown:
            return
        was_away, known.shown = known.shown in ("silent", "left", "gone"), state
        words = {"silent": "has missed its heartbeats", "gone": "is taken for dead", "left": "has left"}
        self._tell(known.beat.id, words.get(state, f"is heard again: {state}" if was_away else f"is {state}"))

    def _tell(self, actor_id: str, what: str) -> None:
        self._happenings.append(Happening(round(self._wall(), 3), actor_id, what))

    # ---- the picture

    def _cluster(self) -> Cluster:
        order = list(KINDS.values())
        known = sorted(self._known.values(), key=lambda one: (order.index(one.kind), _natural(one.beat.id)))
        actors = [self._view(one) for one in known]
        return Cluster(
            at=round(self._wall(), 3),
            gateway=self._gateway_id,
            model=self._model,
            connected=self._bus.connected,
            reason=self._why_not_ready(),
            map_version=self._map_version,
            partitions=self._config.partitions,
            actors=_with_awaited(actors),
            happenings=list(self._happenings),
        )

    def _view(self, known: _Known) -> ActorView:
        beat = known.beat
        fields: dict[str, Any] = {}
        if isinstance(beat, WorkerBeat):
            fields = _worker(beat, known)
        elif isinstance(beat, ShardBeat):
            fields = self._shard(beat, known)
        return ActorView(
            kind=known.kind,
            id=beat.id,
            boot_id=beat.boot_id,
            state=known.shown,
            silent_seconds=round(self._silence(known), 2),
            lives=known.lives,
            node=getattr(beat, "node", ""),
            reason=getattr(beat, "reason", ""),
            map_version=getattr(beat, "map_version", 0),
            load_done=getattr(beat, "load_done", 0),
            load_total=getattr(beat, "load_total", 0),
            **fields,
        )

    def _shard(self, beat: ShardBeat, known: _Known) -> dict[str, Any]:
        first = known.beats[0][1]
        assert isinstance(first, ShardBeat)
        rate = _rates(known)
        before = first.expert_tokens or (0,) * len(beat.expert_tokens)
        # A shard that serves another model may be on the same NATS.
        known_experts = len(beat.expert_tokens) == len(before) == self._config.experts
        held = self._config.experts_of(beat.held) if known_experts else []
        rows, busy = beat.rows - first.rows, beat.busy_seconds - first.busy_seconds
        return {
            "partitions": len(beat.held),
            "rows_per_second": rate(rows),
            "row_us": round(1e6 * busy / rows, 1) if rows else 0.0,
            "busy": round(min(1.0, rate(busy, 3)), 3),
            "experts": [ExpertRate(e, rate(beat.expert_tokens[e] - before[e])) for e in held],
        }


def _worker(beat: WorkerBeat, known: _Known) -> dict[str, Any]:
    first = known.beats[0][1]
    assert isinstance(first, WorkerBeat)
    rate, before = _rates(known), dict(first.waited)
    steps, seconds = beat.steps - first.steps, beat.step_seconds - first.step_seconds
    return {
        "running": beat.running,
        "waiting": beat.waiting,
        "pages_used": beat.pages_used,
        "pages_total": beat.pages_total,
        "tokens_per_second": rate(beat.generation_tokens - first.generation_tokens),
        "prompt_tokens_per_second": rate(beat.prompt_tokens - first.prompt_tokens),
        "step_ms": round(1e3 * seconds / steps, 2) if steps else 0.0,
        "waited": [Wait(s, min(1.0, rate(t - before.get(s, 0.0), 3))) for s, t in beat.waited],
        "own_experts": beat.own_experts,
    }


def _with_awaited(actors: list[ActorView]) -> list[ActorView]:
    """Workers tell whom they wait for; each shard shows the one that waits for it the most."""
    longest: dict[str, float] = {}
    for wait in (wait for actor in actors for wait in actor.waited):
        longest[wait.shard] = max(wait.share, longest.get(wait.shard, 0.0))
    return [
        msgspec.structs.replace(actor, awaited=longest.get(actor.id)) if actor.kind == "shard" else actor
        for actor in actors
    ]


def _rates(known: _Known) -> Callable[..., float]:
    """What grew by so much since the first heartbeat of the window, a second; 0 of one that is silent."""
    seconds = known.heard - known.beats[0][0]
    alive = seconds > 0 and known.shown not in ("silent", "left", "gone")
    return lambda grown, digits=1: round(max(0.0, grown) / seconds, digits) if alive else 0.0


def _how_gone(known: _Known, silence: float) -> Condition:
    if known.beat.state == "draining":
        return "left"
    return "gone" if silence >= SILENT_SECONDS else "silent"


def _natural(name: str) -> list[tuple[int, str]]:
    """worker-2 comes before worker-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split("-")]
