"""What this worker has told about each request, so that a gateway that missed something can ask again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from common.clock import Clock
from common.messages import FinishReason, Generate, TokenChunk, TokenLogprobs

KEEP_SECONDS = 30.0
KEEP_STREAMS = 4096


@dataclass
class Stream:
    gateway_id: str
    tenant: str
    deadline: float | None = None  # by the clock; None: none, or it has passed and its end is under way
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: tuple[str, str] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    ended_at: float = 0.0

    def take(self, chunk: TokenChunk) -> None:
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs or ()
        self.cached_tokens = chunk.cached_tokens or self.cached_tokens
        self.prompt_logprobs = self.prompt_logprobs or chunk.prompt_logprobs
        self.finish, self.stop_token, self.error = chunk.finish, chunk.stop_token, chunk.error

    def chunk(self, request_id: str, index: int) -> TokenChunk:
        return TokenChunk(
            request_id=request_id,
            index=index,
            tokens=tuple(self.tokens[index:]),
            finish=self.finish,
            stop_token=self.stop_token,
            cached_tokens=self.cached_tokens,
            logprobs=tuple(self.logprobs[index:]) if self.logprobs else None,
            error=self.error,
            prompt_logprobs=self.prompt_logprobs if index == 0 else None,
        )


class Streams:
    """Live streams, and ended ones for KEEP_SECONDS (at most KEEP_STREAMS of them)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.live: dict[str, Stream] = {}
        self.tenants = Counter[str]()  # how many live ones each of them has
        self._ended: OrderedDict[str, Stream] = OrderedDict()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.live or request_id in self._ended

    def open(self, request: Generate, deadline: float | None = None) -> None:
        self.live[request.request_id] = Stream(request.gateway_id, request.tenant, deadline)
        self.tenants[request.tenant] += 1

    def take(self, chunk: TokenChunk) -> None:
        stream = self.live[chunk.request_id]
        stream.take(chunk)
        if chunk.finish:
            stream.ended_at = self._clock.now()
            self.tenants[stream.tenant] -= 1
            if not self.tenants[stream.tenant]:
                del self.tenants[stream.tenant]
            self._ended[chunk.request_id] = self.live.pop(chunk.request_id)
            self._forget_old()

    def chunk(self, request_id: str, index: int) -> TokenChunk | None:
        stream = self.live.get(request_id) or self._ended.get(request_id)
        return stream.chunk(request_id, index) if stream else None

    def take_overdue(self) -> list[str]:
        """The live ones whose deadline passed since the last call."""
        now = self._clock.now()
        found = {i: s for i, s in self.live.items() if s.deadline is not None and s.deadline <= now}
        for stream in found.values():
            stream.deadline = None
        return list(found)

    def of_gateway(self, gateway_id: str) -> list[str]:
        return [request_id for request_id, stream in self.live.items() if stream.gateway_id == gateway_id]

    def _forget_old(self) -> None:
        horizon = self._clock.now() - KEEP_SECONDS
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if len(self._ended) <= KEEP_STREAMS and oldest.ended_at >= horizon:
                break
            self._ended.popitem(last=False)
