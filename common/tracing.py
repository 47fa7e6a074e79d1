"""Traces, where MOECULE_TRACES says so: one from a request's door through scheduler and worker to each shard.

This is what actors know of them, and does nothing; common/otel.py does it with OpenTelemetry, which is imported only
where traces are wanted. Between actors a span travels as the text of a W3C `traceparent`, with a space and the
`tracestate` behind it where the client sent one; empty: nothing is recorded.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from common.errors import ConfigError
from common.settings import Settings

Attributes = Mapping[str, str | int | float | Sequence[str]]


class Span:
    """One that is not recorded. Times are seconds of time.perf_counter()."""

    traceparent = ""

    def set(self, attributes: Attributes) -> None: ...

    def fail(self, error: Exception) -> None: ...

    def child(self, name: str) -> contextlib.AbstractContextManager[Span]:
        """What happens inside the block; an error that leaves it is the span's."""
        return contextlib.nullcontext(self)

    def phase(self, name: str, began: float, ended: float) -> None:
        """A child that is over already."""

    def end(self, at: float | None = None) -> None:
        """Over now, or since `at`."""


NOT_RECORDED = Span()
_current: ContextVar[Span] = ContextVar("span", default=NOT_RECORDED)


def current() -> Span:
    """The span of the block that this runs in, also in the tasks that were made there."""
    return _current.get()


@contextlib.contextmanager
def entered(span: Span) -> Iterator[Span]:
    """`span` is current() in the block, and ends with it."""
    token = _current.set(span)
    try:
        yield span
    except Exception as error:
        span.fail(error)
        raise
    finally:
        _current.reset(token)
        span.end()


class Traces:
    """One actor's. None are made."""

    def request(self, name: str, header: Callable[[str], str]) -> contextlib.AbstractContextManager[Span]:
        """A request that came from outside, in the trace of its `traceparent`, or in a new one if that is malformed.
        `header`: the text of one of its headers by the name, empty if there is none."""
        return contextlib.nullcontext(NOT_RECORDED)

    def begin(self, name: str, traceparent: str) -> Span:
        """What another actor asked for within its span; none if it sent none. It lasts until its `end`."""
        return NOT_RECORDED

    async def close(self) -> None:
        """Send what is left, in a bounded time."""


def open_traces(settings: Settings, kind: str, actor_id: str, log: Any) -> Traces:
    """Raises ConfigError."""
    if not settings.traces:
        return Traces()
    check_traces(settings)
    from common.otel import OtelTraces

    return OtelTraces(settings, kind, actor_id, log)


def check_traces(settings: Settings) -> None:
    """Raises ConfigError if traces are wanted and what makes them is not installed."""
    if settings.traces and not (
        _installed("opentelemetry.sdk") and _installed("opentelemetry.exporter.otlp.proto.http")
    ):
        raise ConfigError("MOECULE_TRACES needs OpenTelemetry, which is not installed: pip install -e '.[traces]'")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
