"""Metrics: every actor has a registry of its own, and answers GetMetrics with its text."""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from common.messages import Metrics


def new_registry(kind: str, actor_id: str, boot_id: str) -> CollectorRegistry:
    registry = CollectorRegistry()
    info = Gauge(
        "moecule_actor_info", "1, with which actor this is", ["kind", "id", "boot_id", "pid"], registry=registry
    )
    info.labels(kind, actor_id, boot_id, os.getpid()).set(1)
    return registry


def count_tasks(registry: CollectorRegistry, loop: asyncio.AbstractEventLoop) -> None:
    """Read in the loop, where no other thread changes their number meanwhile."""
    gauge = Gauge("moecule_asyncio_tasks", "Tasks of the actor's event loop", registry=registry)
    gauge.set_function(lambda: len(asyncio.all_tasks(loop)))


def render(registry: CollectorRegistry) -> Metrics:
    return Metrics(text=generate_latest(registry).decode())


class Tally:
    """A histogram as plain numbers: whoever measures pays for no lock of Prometheus'. One thread adds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)  # by bucket, the last one without a bound
        self.sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus wants them: each with all below it."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True))
