"""What the gateway counts (names follow vLLM's under our own prefix), and everyone's metrics on one page."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.bus import Bus
from common.errors import MoeculeError
from common.messages import GetMetrics, Metrics, subject

FETCH_SECONDS = 1.0

_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_STEP_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class GatewayMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._answers = Counter("moecule_http_answers", "HTTP answers", ["path", "status"], registry=registry)
        self.running = Gauge("moecule_gateway_requests_running", "Requests in flight", registry=registry)
        self._finished = Counter(
            "moecule_request_success",
            "Choices that came to their end",
            ["finished_reason", "tenant"],
            registry=registry,
        )
        self._failed = Counter("moecule_request_failed", "Requests that failed", ["code", "tenant"], registry=registry)
        self._tokens = Counter(
            "moecule_tenant_tokens", "Tokens of the choices that came to their end, by kind: prompt or generation",
            ["tenant", "kind"], registry=registry,
        )  # fmt: skip
        self.gaps = Counter("moecule_token_gaps", "Times that tokens had to be asked for again", registry=registry)
        self.lost = Counter("moecule_requests_lost", "Requests whose worker was lost", registry=registry)
        self._first = Histogram(
            "moecule_time_to_first_token_seconds", "From the request to its first token", registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self._between = Histogram(
            "moecule_inter_token_latency_seconds", "Between the tokens of a choice", registry=registry,
            buckets=_STEP_SECONDS,
        )  # fmt: skip
        self._whole = Histogram(
            "moecule_e2e_request_latency_seconds", "From the request to its end", registry=registry, buckets=_SECONDS
        )
        self._prompt = Histogram(
            "moecule_request_prompt_tokens", "Tokens of a prompt", registry=registry, buckets=_TOKENS
        )
        self._generated = Histogram(
            "moecule_request_generation_tokens", "Tokens of a choice", registry=registry, buckets=_TOKENS
        )

    def answered(self, path: str, status: int) -> None:
        self._answers.labels(path, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_tokens(self, seconds: float) -> None:
        self._between.observe(seconds)

    def finished(self, reason: str, seconds: float, prompt_tokens: int, completion_tokens: int, tenant: str) -> None:
        """`tenant`: the name of the key, empty where none is asked for."""
        self._finished.labels(reason, tenant).inc()
        self._tokens.labels(tenant, "prompt").inc(prompt_tokens)
        self._tokens.labels(tenant, "generation").inc(completion_tokens)
        self._whole.observe(seconds)
        self._prompt.observe(prompt_tokens)
        self._generated.observe(completion_tokens)

    def failed(self, code: str, tenant: str) -> None:
        self._failed.labels(code, tenant).inc()


async def everyones_metrics(bus: Bus, peers: Sequence[tuple[str, str]], own: tuple[str, str]) -> str:
    """One page in the Prometheus text format; `own`: (actor id, text). Who does not answer in time is left out."""
    texts = await asyncio.gather(*(_fetch(bus, kind, actor_id) for kind, actor_id in peers))
    answered = [(actor_id, text) for (_, actor_id), text in zip(peers, texts, strict=True) if text]
    return merged([own, *answered])


async def _fetch(bus: Bus, kind: str, actor_id: str) -> str:
    try:
        reply = await bus.request(subject(kind, actor_id, "metrics"), GetMetrics(), timeout=FETCH_SECONDS)
    except MoeculeError:
        return ""
    return reply.text if isinstance(reply, Metrics) else ""


def merged(texts: Sequence[tuple[str, str]]) -> str:
    """Several actors' texts as one: each family once, each sample with the label `actor`."""
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for actor_id, text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                _, word, family = line.split(" ", 3)[:3]
                heads.setdefault(family, {}).setdefault(word, line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, actor_id))
    lines = []
    for family, head in heads.items():
        lines += [*head.values(), *samples.get(family, ())]
    return "\n".join(lines) + "\n"


def _labelled(sample: str, actor_id: str) -> str:
    """A name holds neither brace nor space, so that whichever comes first ends it."""
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f'{name}{{actor="{actor_id}",{rest}'
    name, _, rest = sample.partition(" ")
    return f'{name}{{actor="{actor_id}"}} {rest}'
