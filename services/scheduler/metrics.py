"""What the scheduler counts, in Prometheus' words."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class SchedulerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._assigned = Counter(
            "moecule_scheduler_assignments", "requests given to a worker", ["worker"], registry=registry
        )
        self._refused = Counter("moecule_scheduler_refusals", "requests refused", ["code"], registry=registry)
        self._map_version = Gauge("moecule_scheduler_map_version", "version of the expert map", registry=registry)
        self._workers = Gauge("moecule_scheduler_workers", "live workers", registry=registry)
        self._shards = Gauge("moecule_scheduler_shards", "live expert shards", registry=registry)

    def assigned(self, worker_id: str) -> None:
        self._assigned.labels(worker_id).inc()

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def state(self, map_version: int, workers: int, shards: int) -> None:
        self._map_version.set(map_version)
        self._workers.set(workers)
        self._shards.set(shards)
