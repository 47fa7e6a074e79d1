"""How far a load has come: all of it for heartbeats and metrics, a line now and then for the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common.source import Progress

TELL_SECONDS = 2.0  # between two lines


class Loading:
    """Written by the thread that loads, read by any. What is loaded within TELL_SECONDS is not worth a line."""

    def __init__(self, log: Any, now: Callable[[], float] = time.monotonic) -> None:
        self.what, self.done, self.total = "", 0, 0
        self._log, self._now = log, now
        self._told = now()

    def of(self, what: str) -> Progress:
        """The progress of one load, in bytes."""
        self._told = self._now()
        return lambda done, total: self._take(what, done, total)

    @property
    def percent(self) -> int:
        return 100 * self.done // max(self.total, 1)

    def _take(self, what: str, done: int, total: int) -> None:
        self.what, self.done, self.total = what, done, total
        if (now := self._now()) - self._told >= TELL_SECONDS:
            self._told = now
            gb = f"{done / 1e9:.1f} of {total / 1e9:.1f}"
            self._log.info("loading", what=what, percent=self.percent, gb=gb)
