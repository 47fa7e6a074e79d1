"""Who else is there, from heartbeats: what /ready says, who is asked for metrics, which worker is silent."""

from __future__ import annotations

from dataclasses import dataclass

from common.actor import BEAT_SECONDS, SILENT_SECONDS
from common.bus import Bus
from common.clock import Clock
from common.messages import Message, SchedulerBeat, ShardBeat, WorkerBeat
from common.pages import PAGE

SCHEDULER_SILENT_SECONDS = 2.0
LISTEN_SECONDS = 2 * BEAT_SECONDS  # everyone alive has been heard by then


@dataclass(frozen=True)
class Seen:
    beat: WorkerBeat | ShardBeat | SchedulerBeat
    at: float


class Peers:
    def __init__(self, bus: Bus, clock: Clock) -> None:
        self._bus = bus
        self._clock = clock
        self._seen: dict[tuple[str, str], Seen] = {}
        self._began: float | None = None  # when the first heartbeat came

    def take(self, subject: str, message: Message) -> None:
        """`subject`: moecule.v1.<kind>.<id>.beat"""
        if isinstance(message, WorkerBeat | ShardBeat | SchedulerBeat):
            now = self._clock.now()
            self._seen[subject.split(".")[2], message.id] = Seen(message, now)
            self._began = now if self._began is None else self._began

    def most_cached_tokens(self) -> int:
        """Tokens of the largest KV cache among the workers that can serve; 0: none is known."""
        workers = (seen.beat for seen in self._seen.values() if isinstance(seen.beat, WorkerBeat))
        return PAGE * max((beat.pages_total for beat in workers if beat.state == "ready"), default=0)

    def silence(self, worker_id: str, since: float) -> float:
        """Seconds since this worker was last heard, or since `since` if that is later; our own outages do not count."""
        seen = self._seen.get(("worker", worker_id))
        heard = max(since, seen.at) if seen else since
        return min(self._clock.now() - heard, self._bus.connected_for())

    def live(self) -> list[tuple[str, str]]:
        """(kind, id) of everyone heard within SILENT_SECONDS; the others are forgotten."""
        horizon = self._clock.now() - SILENT_SECONDS
        self._seen = {peer: seen for peer, seen in self._seen.items() if seen.at >= horizon}
        return sorted(self._seen)

    def why_not_ready(self) -> str:
        """Why the cluster cannot serve; empty when it can."""
        if not self._bus.connected:
            return "there is no connection to NATS"
        horizon = self._clock.now() - SCHEDULER_SILENT_SECONDS
        schedulers = [(s.beat, s.at) for s in self._seen.values() if isinstance(s.beat, SchedulerBeat)]
        reasons = [beat.reason for beat, at in schedulers if beat.state == "ready" and at >= horizon]
        if not reasons:
            return "the scheduler does not answer"
        # Before that /metrics, the page and whoever forgets pages would leave out workers that serve.
        listened = 0.0 if self._began is None else self._clock.now() - self._began
        if min(listened, self._bus.connected_for()) < LISTEN_SECONDS:
            return "the gateway has just begun to listen and does not know yet who is there"
        return min(reasons, key=len)  # one scheduler that can serve is enough
