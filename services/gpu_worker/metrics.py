"""The worker's Prometheus metrics; the names follow vLLM's under our own prefix."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gpu_worker.engine import Stats, StepOutput

STEP_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024)  # seconds


class WorkerMetrics(Collector):
    """Kept as plain numbers, and made into Prometheus' when they are asked for: a step pays for no lock of theirs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stats = Stats(0, 0, 0, 0)  # of the newest step
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.preemptions = 0
        self._steps = [0] * (len(STEP_BUCKETS) + 1)  # by bucket, the last one without a bound
        self._step_seconds = 0.0
        registry.register(self)

    def step(self, output: StepOutput) -> None:
        self.stats = stats = output.stats
        self.prompt_tokens += stats.prefill_tokens
        self.cached_tokens += stats.cached_tokens
        self.preemptions += stats.preemptions
        self.generated_tokens += sum(len(c.tokens) for chunks in output.chunks.values() for c in chunks)
        self._steps[bisect_left(STEP_BUCKETS, stats.seconds)] += 1
        self._step_seconds += stats.seconds

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        yield GaugeMetricFamily("moecule_num_requests_running", "Requests in the batch", stats.running)
        yield GaugeMetricFamily("moecule_num_requests_waiting", "Requests in the queue", stats.waiting)
        yield GaugeMetricFamily("moecule_kv_pages_used", "KV pages that requests own", stats.pages_used)
        yield CounterMetricFamily("moecule_prompt_tokens", "Prompt tokens computed", self.prompt_tokens)
        yield CounterMetricFamily("moecule_generation_tokens", "Tokens sampled", self.generated_tokens)
        yield CounterMetricFamily(
            "moecule_prefix_cache_hit_tokens", "Prompt tokens read from cache", self.cached_tokens
        )
        yield CounterMetricFamily("moecule_num_preemptions", "Requests that gave pages back", self.preemptions)
        bounds = [*map(str, STEP_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._steps), strict=True))
        yield HistogramMetricFamily("moecule_step_seconds", "Time of a step", buckets, self._step_seconds)
