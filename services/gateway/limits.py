"""What one key may have at a time, and how soon its requests must be served."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.clock import Clock
from common.errors import DeadlineExceeded, InvalidRequest, RateLimited

if TYPE_CHECKING:
    from services.gateway.prepare import Job

MINUTE = 60.0


@dataclass(frozen=True)
class Key:
    """`digest`: the SHA-256 of the key itself. `requests`, `tokens`, `per_minute`: 0 is no limit. `priority`: what its
    requests have, and the lowest number they may ask for; None: 0, and they may ask for any."""

    name: str
    digest: bytes
    requests: int = 0
    tokens: int = 0
    per_minute: int = 0
    priority: int | None = 0
    admin: bool = False


class Caller:
    """One key and what is in flight of it. Its name is the tenant that schedulers and workers know."""

    def __init__(self, key: Key, clock: Clock) -> None:
        self.key = key
        self.requests = 0  # in flight; of a request with several choices each one counts
        self.tokens = 0  # of prompt and most output of those
        self._clock = clock
        self._recent: deque[float] = deque()  # when those of the last minute came

    @contextlib.contextmanager
    def request(self, timeout: float | None = None) -> Iterator[Permit]:
        """One request from its beginning to its end; `timeout`: seconds that it has. Raises RateLimited."""
        self._check_minute()
        self._take(1, 0)
        permit = Permit(self, self._clock, timeout)
        try:
            yield permit
        finally:
            self.requests -= permit.choices
            self.tokens -= permit.tokens

    def _check_minute(self) -> None:
        if not (most := self.key.per_minute):
            return
        now = self._clock.now()
        while self._recent and self._recent[0] <= now - MINUTE:
            self._recent.popleft()
        if len(self._recent) >= most:
            # Less than the key's limit may be left of a longer past, where that was lowered meanwhile.
            seconds = math.ceil(self._recent[-most] + MINUTE - now)
            raise RateLimited(f"key {self.key.name!r} may send {most} requests a minute", retry_after=max(1, seconds))
        self._recent.append(now)

    def _take(self, requests: int, tokens: int) -> None:
        """Raises RateLimited, and takes nothing then."""
        key = self.key
        if key.requests and self.requests + requests > key.requests:
            raise RateLimited(
                f"key {key.name!r} may have {key.requests} requests in flight (each choice counts), and has "
                f"{self.requests}"
            )
        if key.tokens and self.tokens + tokens > key.tokens:
            raise RateLimited(
                f"key {key.name!r} may have {key.tokens} tokens in flight (prompt and max_tokens), and has "
                f"{self.tokens}: this request needs {tokens}"
            )
        self.requests += requests
        self.tokens += tokens


class Permit:
    """What one request has taken of its caller's limits. Those of a key that is changed meanwhile hold from the next
    request on."""

    def __init__(self, caller: Caller, clock: Clock, timeout: float | None) -> None:
        self.choices, self.tokens = 1, 0
        self._caller = caller
        self._clock = clock
        self._began = clock.now()
        self._timeout = math.inf if timeout is None else timeout

    def take(self, jobs: list[Job], priority: int | None = None, timeout: float | None = None) -> list[Job]:
        """The jobs as the caller's own, once its limits have room for all of them. `priority` and `timeout`: what the
        request asks for. Raises RateLimited, DeadlineExceeded, or InvalidRequest for what no waiting makes possible."""
        key = self._caller.key
        earliest = key.priority
        if priority is not None and earliest is not None and priority < earliest:
            raise InvalidRequest(f"key {key.name!r} may ask for priority {earliest} or a higher number", "priority")
        seconds = min(self._timeout, math.inf if timeout is None else timeout)
        deadline = None if math.isinf(seconds) else self._began + seconds
        if deadline is not None and self._clock.now() >= deadline:
            raise DeadlineExceeded("the request's deadline passed before it was sent to a worker")
        tokens = sum(len(job.prompt) + job.sampling.max_tokens for job in jobs)
        self._check_possible(len(jobs), tokens)
        self._caller._take(len(jobs) - self.choices, tokens - self.tokens)
        self.choices, self.tokens = len(jobs), tokens
        place = (earliest or 0) if priority is None else priority
        return [replace(job, tenant=key.name, priority=place, deadline=deadline) for job in jobs]

    def _check_possible(self, choices: int, tokens: int) -> None:
        key = self._caller.key
        if key.requests and choices > key.requests:
            raise InvalidRequest(
                f"key {key.name!r} may have {key.requests} requests in flight: each of the {choices} choices is one",
                "n",
            )
        if key.tokens and tokens > key.tokens:
            raise InvalidRequest(
                f"key {key.name!r} may have {key.tokens} tokens in flight: prompt and max_tokens are {tokens} here, so "
                "ask for fewer",
                "max_tokens",
            )
