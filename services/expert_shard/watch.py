"""What this shard did between two moments that a worker names, as a span. It is of all who asked: a shard knows rows,
and not whose they are.

A GPU shard's span has no busy seconds: its launching thread waits for no kernel, and a time taken on the device around
a graph would also be that of the kernels in it which wait for the worker's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from common.messages import Watch
from common.tracing import Span, Traces
from services.expert_shard.metrics import ShardCounts

MOST = 4096  # at a time; the oldest are dropped, whose worker has died


class _Begun(NamedTuple):
    span: Span
    counts: ShardCounts


class Watches:
    def __init__(self, traces: Traces, counts: Callable[[], ShardCounts]) -> None:
        self._traces = traces
        self._counts = counts
        self._begun: dict[str, _Begun] = {}

    def take(self, message: Watch) -> None:
        if message.ends:
            if found := self._begun.pop(message.traceparent, None):
                self._end(*found)
        elif (span := self._traces.begin("experts", message.traceparent)).traceparent:
            self._begun[message.traceparent] = _Begun(span, self._counts())
            if len(self._begun) > MOST:
                del self._begun[next(iter(self._begun))]

    def close(self) -> None:
        """This shard leaves: the word that ends a watch may come too late."""
        begun, self._begun = self._begun, {}
        for one in begun.values():
            self._end(*one)

    def _end(self, span: Span, before: ShardCounts) -> None:
        now = self._counts()
        span.set({"moecule.rows": now.rows - before.rows, "moecule.partitions": now.partitions})
        if now.busy_seconds:  # 0 on a GPU, where they are not known
            span.set({"moecule.busy_seconds": now.busy_seconds - before.busy_seconds})
        span.end()
