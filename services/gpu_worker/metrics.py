"""The worker's Prometheus metrics; the names follow vLLM's under our own prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from common.telemetry import Tally
from services.gpu_worker.engine import Stats, StepOutput
from services.gpu_worker.links import LinkTimes

STEP_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024)  # seconds
REQUEST_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


@dataclass(frozen=True)
class Standing:
    """What a worker is, rather than what it did. `links`: by shard, where the link's times are the host's to take."""

    pages_total: int = 0
    map_version: int = 0
    load_done: int = 0
    load_total: int = 0
    links: Mapping[str, LinkTimes] = field(default_factory=dict)


class WorkerMetrics(Collector):
    """Kept as plain numbers, and made into Prometheus' when they are asked for: a step pays for no lock of theirs."""

    def __init__(self, registry: CollectorRegistry, standing: Callable[[], Standing]) -> None:
        self.stats = Stats(0, 0, 0, 0)  # of the newest step
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = self.preemptions = 0
        self.steps = Tally(STEP_BUCKETS)
        self._queue, self._prefill, self._decode = (Tally(REQUEST_BUCKETS) for _ in range(3))
        self._standing = standing
        registry.register(self)

    def step(self, output: StepOutput) -> None:
        self.stats = stats = output.stats
        self.prompt_tokens += stats.prefill_tokens
        self.cached_tokens += stats.cached_tokens
        self.preemptions += stats.preemptions
        self.generation_tokens += sum(len(c.tokens) for chunks in output.chunks.values() for c in chunks)
        self.steps.add(stats.seconds)
        for times in output.ended:
            self._queue.add(times.queue)
            self._prefill.add(times.prefill)
            self._decode.add(times.decode)

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        for name, says, tally in (
            ("moecule_step_seconds", "Time of a step", self.steps),
            ("moecule_request_queue_time_seconds", "From the request's coming to its first step", self._queue),
            ("moecule_request_prefill_time_seconds", "From its first step to its first token", self._prefill),
            ("moecule_request_decode_time_seconds", "From its first token to its last", self._decode),
        ):
            yield HistogramMetricFamily(name, says, tally.buckets, tally.sum)
        yield from self._links()

    def _gauges(self) -> Iterator[Metric]:
        stats, standing = self.stats, self._standing()
        usage = stats.pages_used / standing.pages_total if standing.pages_total else 0.0
        yield GaugeMetricFamily("moecule_num_requests_running", "Requests in the batch", stats.running)
        yield GaugeMetricFamily("moecule_num_requests_waiting", "Requests in the queue", stats.waiting)
        yield GaugeMetricFamily("moecule_kv_pages_used", "KV pages that requests own", stats.pages_used)
        yield GaugeMetricFamily("moecule_kv_pages", "KV pages that there are", standing.pages_total)
        yield GaugeMetricFamily("moecule_kv_cache_usage_perc", "Share of the KV pages that requests own, 0 to 1", usage)
        yield GaugeMetricFamily(
            "moecule_map_version", "Version of the expert map that is followed", standing.map_version
        )
        yield GaugeMetricFamily("moecule_loaded_bytes", "Bytes of weights read by the newest load", standing.load_done)
        yield GaugeMetricFamily("moecule_load_total_bytes", "Bytes of weights that it has to read", standing.load_total)

    def _counters(self) -> Iterator[Metric]:
        cached = self.cached_tokens
        yield CounterMetricFamily("moecule_prompt_tokens", "Prompt tokens computed", self.prompt_tokens)
        yield CounterMetricFamily("moecule_generation_tokens", "Tokens sampled", self.generation_tokens)
        yield CounterMetricFamily("moecule_prefix_cache_hits", "Prompt tokens read from the prefix cache", cached)
        yield CounterMetricFamily(
            "moecule_prefix_cache_queries", "Prompt tokens, read or computed", cached + self.prompt_tokens
        )
        yield CounterMetricFamily("moecule_num_preemptions", "Requests that gave pages back", self.preemptions)

    def _links(self) -> Iterator[Metric]:
        trips = HistogramMetricFamily(
            "moecule_link_round_trip_seconds", "From a dispatch to when this shard's answer is seen", labels=["shard"]
        )
        waited = CounterMetricFamily(
            "moecule_link_wait_seconds",
            "Time that steps stood still while this shard had not answered; counts for each of those that had not",
            labels=["shard"],
        )
        for shard, times in sorted(self._standing().links.items()):
            trips.add_metric([shard], times.trips.buckets, times.trips.sum)
            waited.add_metric([shard], times.waited)
        yield trips
        yield waited
