"""Time, passed in, so that time-outs are tested without sleeping."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Awaitable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class RealClock:
    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def within(clock: Clock, seconds: float, awaitable: Awaitable[T]) -> T:
    """The result of `awaitable`; when `seconds` of `clock` pass before, it is cancelled and TimeoutError raised."""
    work, alarm = asyncio.ensure_future(awaitable), asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({work, alarm}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise TimeoutError
    finally:
        alarm.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})


class FakeClock:
    """Stands still until `advance` moves it; sleepers wake in the order of their times."""

    def __init__(self) -> None:
        self._now = 0.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), future))
        await future

    async def advance(self, seconds: float) -> None:
        end = self._now + seconds
        await _settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            self._now, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)
            await _settle()
        self._now = end

    def jump(self, seconds: float) -> None:
        """Time in which nothing runs, as while a process is stopped: who was due in it wakes with the next advance."""
        self._now += seconds
        self._sleepers = [(max(at, self._now), order, future) for at, order, future in self._sleepers]
        heapq.heapify(self._sleepers)


async def _settle() -> None:
    # A woken task may wake others; a few turns of the loop let them all reach their next wait.
    for _ in range(20):
        await asyncio.sleep(0)
