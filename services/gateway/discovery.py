"""What `nats micro ls`, `info` and `stats` ask of a service (ADR-32), answered for the NATS door.

nats-py's own `nats.micro` would take the requests as well, and its end loses those under way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar

import msgspec

from common.bus import Bus, RawMessage, Subscription

NAME, VERSION = "moecule", "1.0.0"
DESCRIPTION = "Answers of a mixture-of-experts model, as numbered batches of tokens."
PREFIX = "$SRV"


@dataclass
class Endpoint:
    """One subject of the door, and how it fares."""

    name: str
    subject: str
    queue_group: str
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    seconds: float = 0.0

    def answered(self, seconds: float) -> None:
        self.requests += 1
        self.seconds += seconds

    def failed(self, why: str) -> None:
        self.requests += 1
        self.errors += 1
        self.last_error = why[:256]


class EndpointInfo(msgspec.Struct, frozen=True):
    name: str
    subject: str
    queue_group: str
    metadata: dict[str, str]


class EndpointStats(msgspec.Struct, frozen=True):
    """Times are nanoseconds."""

    name: str
    subject: str
    queue_group: str
    num_requests: int
    num_errors: int
    last_error: str
    processing_time: int
    average_processing_time: int


class Service(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    id: str
    name: str = NAME
    version: str = VERSION
    metadata: dict[str, str]


class Pong(Service, frozen=True, kw_only=True, tag="io.nats.micro.v1.ping_response"):
    pass


class Info(Service, frozen=True, kw_only=True, tag="io.nats.micro.v1.info_response"):
    description: str = DESCRIPTION
    endpoints: list[EndpointInfo]


class Stats(Service, frozen=True, kw_only=True, tag="io.nats.micro.v1.stats_response"):
    started: str
    endpoints: list[EndpointStats]


class Discovery:
    verbs: ClassVar[tuple[str, ...]] = ("PING", "INFO", "STATS")

    def __init__(
        self, bus: Bus, service_id: str, endpoints: list[Endpoint], reply: Callable[[RawMessage, bytes], None]
    ) -> None:
        self._bus = bus
        self._id = service_id
        self._endpoints = endpoints
        self._reply = reply
        self._started = datetime.now(UTC).isoformat().replace("+00:00", "Z")

    async def open(self) -> list[Subscription]:
        """Every service is asked on $SRV.PING, those of one name on $SRV.PING.<name>, one on $SRV.PING.<name>.<id>."""
        names = ("", f".{NAME}", f".{NAME}.{self._id}")
        return [
            await self._bus.listen(f"{PREFIX}.{verb}{name}", self._on_question) for verb in self.verbs for name in names
        ]

    def _on_question(self, message: RawMessage) -> None:
        self._reply(message, msgspec.json.encode(self.answer(message.subject.split(".")[1])))

    def answer(self, verb: str) -> Service:
        if verb == "PING":
            return Pong(id=self._id, metadata={})
        if verb == "INFO":
            infos = [EndpointInfo(one.name, one.subject, one.queue_group, {}) for one in self._endpoints]
            return Info(id=self._id, metadata={}, endpoints=infos)
        return Stats(
            id=self._id, metadata={}, started=self._started, endpoints=[_stats(one) for one in self._endpoints]
        )


def _stats(one: Endpoint) -> EndpointStats:
    total = int(one.seconds * 1e9)
    average = total // max(1, one.requests)
    return EndpointStats(
        one.name, one.subject, one.queue_group, one.requests, one.errors, one.last_error, total, average
    )
