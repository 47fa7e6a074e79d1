"""The worker's Prometheus metrics; the names follow vLLM's under our own prefix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.gpu_worker.engine import StepOutput


class WorkerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.running = Gauge("moecule_num_requests_running", "Requests in the batch", registry=registry)
        self.waiting = Gauge("moecule_num_requests_waiting", "Requests in the queue", registry=registry)
        self.pages = Gauge("moecule_kv_pages_used", "KV pages that requests own", registry=registry)
        self.prompt = Counter("moecule_prompt_tokens", "Prompt tokens computed", registry=registry)
        self.generated = Counter("moecule_generation_tokens", "Tokens sampled", registry=registry)
        self.cached = Counter("moecule_prefix_cache_hit_tokens", "Prompt tokens read from cache", registry=registry)
        self.preemptions = Counter("moecule_num_preemptions", "Requests that gave pages back", registry=registry)
        buckets = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024)
        self.step_seconds = Histogram("moecule_step_seconds", "Time of a step", registry=registry, buckets=buckets)

    def step(self, output: StepOutput) -> None:
        stats = output.stats
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.pages.set(stats.pages_used)
        self.prompt.inc(stats.prefill_tokens)
        self.cached.inc(stats.cached_tokens)
        self.preemptions.inc(stats.preemptions)
        self.generated.inc(sum(len(c.tokens) for chunks in output.chunks.values() for c in chunks))
        self.step_seconds.observe(stats.seconds)
