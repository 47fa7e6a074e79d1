"""The shard's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class ShardCounts:
    """What a shard's heartbeat and its metrics tell. `expert_tokens`: over all layers, empty where not counted."""

    partitions: int
    mailboxes: int
    rows: int
    busy_seconds: float
    expert_tokens: tuple[int, ...]
    load_done: int
    load_total: int


class ShardMetrics(Collector):
    """Made when they are asked for: the compute thread keeps plain numbers."""

    def __init__(self, registry: CollectorRegistry, counts: Callable[[], ShardCounts]) -> None:
        self._counts = counts
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        yield GaugeMetricFamily("moecule_shard_partitions", "Expert partitions held", counts.partitions)
        yield GaugeMetricFamily("moecule_shard_mailboxes", "Workers attached over a mailbox", counts.mailboxes)
        yield GaugeMetricFamily("moecule_loaded_bytes", "Bytes of weights read by the newest load", counts.load_done)
        yield GaugeMetricFamily("moecule_load_total_bytes", "Bytes of weights that it has to read", counts.load_total)
        yield CounterMetricFamily("moecule_shard_rows", "Rows served, one a layer, token and worker", counts.rows)
        yield CounterMetricFamily("moecule_shard_busy_seconds", "Time that experts were computed", counts.busy_seconds)
        load = CounterMetricFamily(
            "moecule_expert_tokens", "Tokens that each expert got, over all layers", labels=["expert"]
        )
        for expert, tokens in enumerate(counts.expert_tokens):
            if tokens:  # a shard computes only those that it holds
                load.add_metric([str(expert)], tokens)
        yield load
