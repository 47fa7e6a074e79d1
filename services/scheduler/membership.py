"""Who is alive, from what they say: heartbeats, the life (boot id) they come from, and silence."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from common.messages import SchedulerBeat, ShardBeat, WorkerBeat

B = TypeVar("B", WorkerBeat, ShardBeat, SchedulerBeat)

News = Literal["joined", "reborn", "changed", "same", "stale"]


@dataclass
class Member(Generic[B]):
    beat: B
    heard_at: float  # seconds of the injected clock


class Members(Generic[B]):
    """The live actors of one kind. Silence counts from the later of the last heartbeat and our own (re)connection."""

    def __init__(self) -> None:
        self._members: dict[str, Member[B]] = {}
        self._former: deque[str] = deque(maxlen=256)  # boot ids of earlier lives, whose late messages are ignored

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[B]:
        """The newest heartbeats, in the order of the ids."""
        return (self._members[actor_id].beat for actor_id in sorted(self._members))

    def get(self, actor_id: str) -> B | None:
        member = self._members.get(actor_id)
        return member.beat if member else None

    def lives(self, actor_id: str, boot_id: str) -> bool:
        member = self._members.get(actor_id)
        return member is not None and member.beat.boot_id == boot_id

    def heard(self, beat: B, now: float) -> News:
        """What this heartbeat tells: a later boot id under a known id means that the earlier life is dead."""
        known = self._members.get(beat.id)
        if beat.boot_id in self._former or (known and beat.boot_id < known.beat.boot_id):
            return "stale"
        self._members[beat.id] = Member(beat, now)
        if known is None:
            return "joined"
        if known.beat.boot_id != beat.boot_id:
            self._former.append(known.beat.boot_id)
            return "reborn"
        return "same" if known.beat == beat else "changed"

    def silent(self, seconds: float, now: float, connected_since: float) -> list[B]:
        """Those not heard for `seconds` of our connection."""
        return [
            member.beat
            for member in self._members.values()
            if now - max(member.heard_at, connected_since) >= seconds
        ]  # fmt: skip

    def bury(self, beat: B) -> bool:
        """Forget the life that sent this; false if it is gone or another life has its id.

        Its boot id is not held against it: a life that was only cut off may speak again, and joins anew.
        """
        if not self.lives(beat.id, beat.boot_id):
            return False
        del self._members[beat.id]
        return True
