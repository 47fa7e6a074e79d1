"""The spans of this worker's traced requests, and what its shards are told of them.

The step loop knows nothing of it: it keeps a request's times for the metrics, and from those the spans are made when
the request has ended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from common.errors import from_code
from common.messages import Generate, Message, TokenChunk, Watch, subject
from common.tracing import Span, Traces
from services.gpu_worker.engine import RequestTimes


class _Open(NamedTuple):
    span: Span
    shards: tuple[str, ...]  # those that were told


class RequestSpans:
    def __init__(self, traces: Traces, publish: Callable[[str, Message], Awaitable[None]]) -> None:
        self._traces = traces
        self._publish = publish
        self._open: dict[str, _Open] = {}

    async def begin(self, request: Generate, shards: tuple[str, ...], map_version: int) -> None:
        span = self._traces.begin("generate", request.traceparent)
        if span.traceparent:
            self._open[request.request_id] = _Open(span, shards)
            span.set({"gen_ai.usage.input_tokens": len(request.prompt), "moecule.map_version": map_version})
            await self._tell(shards, Watch(traceparent=span.traceparent))
            if request.request_id not in self._open:  # it ended meanwhile: that may have come before
                await self._tell(shards, Watch(traceparent=span.traceparent, ends=True))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    async def end(self, times: RequestTimes, chunk: TokenChunk | None) -> None:
        """`chunk`: all that was told of the request, which `begin` began."""
        span, shards = self._open.pop(times.request_id)
        await self._tell(shards, Watch(traceparent=span.traceparent, ends=True))
        moments = [at for at in (times.arrived, times.started, times.answered) if at] + [times.ended]
        for name, began, ended in zip(("queue", "prefill", "decode"), moments, moments[1:], strict=False):
            span.phase(name, began, ended)
        span.set({"moecule.preemptions": times.preemptions})
        if chunk:
            span.set({"gen_ai.usage.output_tokens": len(chunk.tokens), "moecule.cached_tokens": chunk.cached_tokens})
            span.set({"gen_ai.response.finish_reasons": [chunk.finish or ""]})
            if chunk.error:
                span.fail(from_code(*chunk.error))
        span.end(times.ended)

    async def _tell(self, shards: tuple[str, ...], message: Watch) -> None:
        for shard_id in shards:
            await self._publish(subject("shard", shard_id, "watch"), message)
