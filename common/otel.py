"""Traces through OpenTelemetry's SDK, sent as OTLP over HTTP by a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.errors import MoeculeError
from common.settings import Settings, without_login
from common.tracing import NOT_RECORDED, Attributes, Span, Traces, entered

SEND_EVERY_MS = 500
SEND_SECONDS = 5.0  # for a batch, its repetitions included
TRACEPARENT = 55  # characters, of W3C's version 00
MOST_STATE = 512  # characters of a tracestate that is passed on, as W3C wants at least; every actor gets it
FLUSH_SECONDS = 0.3  # at the end; honcho waits little longer than actors drain

_w3c = TraceContextTextMapPropagator()


class OtelTraces(Traces):
    def __init__(self, settings: Settings, kind: str, actor_id: str, log: Any) -> None:
        # What goes wrong there is told once, by the exporter below.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = _Exporter(settings.traces.rstrip("/") + "/v1/traces", log)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.traces_ratio)),
            resource=Resource.create({"service.name": f"moecule-{kind}", "service.instance.id": actor_id}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter, schedule_delay_millis=SEND_EVERY_MS))
        self._tracer = self._provider.get_tracer("moecule")

    def request(self, name: str, header: Callable[[str], str]) -> contextlib.AbstractContextManager[Span]:
        state = header("tracestate")
        return entered(self._start(name, header("traceparent"), state if len(state) <= MOST_STATE else ""))

    def begin(self, name: str, traceparent: str) -> Span:
        parent, _, state = traceparent.partition(" ")
        return self._start(name, parent, state) if len(parent) == TRACEPARENT else NOT_RECORDED

    def _start(self, name: str, traceparent: str, tracestate: str) -> Span:
        parent = _w3c.extract({"traceparent": traceparent, "tracestate": tracestate})
        span = self._tracer.start_span(name, parent, kind=trace.SpanKind.SERVER)
        return OtelSpan(self._tracer, span) if span.is_recording() else NOT_RECORDED

    async def close(self) -> None:
        """In a thread that nobody waits for longer: one of the loop's own would hold up the process's end."""
        flush = threading.Thread(target=self._provider.shutdown, name="last traces", daemon=True)
        flush.start()
        deadline = time.monotonic() + FLUSH_SECONDS
        while flush.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        self._exporter.shutdown()


class OtelSpan(Span):
    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span
        self._within = trace.set_span_in_context(span)
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
        if state := context.trace_state.to_header():
            self.traceparent += f" {state}"

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def fail(self, error: Exception) -> None:
        """What a client did wrong is no failure here, and its words are not told: messages may quote the request."""
        code, status = (error.code, error.status) if isinstance(error, MoeculeError) else (type(error).__name__, 500)
        self._span.set_attribute("error.type", code)
        if status >= 500:
            self._span.set_status(trace.StatusCode.ERROR, str(error) if isinstance(error, MoeculeError) else code)

    def child(self, name: str) -> contextlib.AbstractContextManager[Span]:
        return entered(OtelSpan(self._tracer, self._tracer.start_span(name, self._within)))

    def phase(self, name: str, began: float, ended: float) -> None:
        self._tracer.start_span(name, self._within, start_time=_wall(began)).end(_wall(ended))

    def end(self, at: float | None = None) -> None:
        self._span.end(None if at is None else _wall(at))


class _Exporter(SpanExporter):
    """OTLP's; that a collector is away is told once, and that it is back. The spans of that time are lost."""

    def __init__(self, url: str, log: Any) -> None:
        self._shown, self._log = without_login(url), log
        self._otlp = OTLPSpanExporter(endpoint=url, timeout=SEND_SECONDS)
        self._away = self._closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._otlp.export(spans)
        away = result is not SpanExportResult.SUCCESS
        if away != self._away and not self._closed:
            self._away = away
            tell = self._log.warning if away else self._log.info
            tell("traces are lost: nobody takes them" if away else "traces are taken again", url=self._shown)
        return result

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._otlp.shutdown()


def _wall(at: float) -> int:
    """Nanoseconds of the epoch at `at` of perf_counter(), by the wall clock of now."""
    return time.time_ns() - round((time.perf_counter() - at) * 1e9)
