"""What other threads were promised by one that may crash."""

from __future__ import annotations

import threading
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress


class Promises:
    """Futures that somebody waits for until they are done; from `refuse` on all that are left, and all that come."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._left: set[Future[None]] = set()
        self._error: Exception | None = None

    def add(self, promise: Future[None]) -> None:
        with self._guard:
            self._left.add(promise)
            error = self._error
        promise.add_done_callback(self._left.discard)
        if error is not None:
            _refuse(promise, error)

    def refuse(self, error: Exception) -> None:
        with self._guard:
            self._error = error
            left = list(self._left)
        for promise in left:
            _refuse(promise, error)


def _refuse(promise: Future[None], error: Exception) -> None:
    with suppress(InvalidStateError):  # it is done, or who asked has gone
        promise.set_exception(error)
