"""How long each tenant's requests wait in this worker's queue: whether one holds up another shows here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from services.gpu_worker.planner import Sequence


class TenantWaits(Collector):
    """From a request's coming to the step that first computes of it. Plain numbers, for the reason of WorkerMetrics."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[int, float]] = {}  # tenant -> requests, seconds of all of them

    def add(self, started: Iterable[Sequence], now: float) -> None:
        for sequence in started:
            count, seconds = self._of.get(sequence.tenant, (0, 0.0))
            self._of[sequence.tenant] = count + 1, seconds + now - sequence.arrived

    def collect(self) -> Iterator[Metric]:
        family = SummaryMetricFamily(
            "moecule_tenant_queue_time_seconds",
            "From the coming of a key's request to its first step",
            labels=["tenant"],
        )
        for tenant, (count, seconds) in sorted(self._of.copy().items()):
            family.add_metric([tenant], count, seconds)
        yield family
