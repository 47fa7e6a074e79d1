"""The shard's one thread: it sleeps until its bell rings, and serves what it finds."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import structlog

from common.futex import Bell

IDLE_SECONDS = 5.0  # a ring is never lost; this only bounds what a broken peer could cost


class Serving(ABC):
    def __init__(self, failed: Callable[[Exception], object] = lambda _: None) -> None:
        """`failed`: is called by the thread when it ends by an error."""
        self.bell = Bell.create("moecule-shard-bell")
        self._failed = failed
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)

    @abstractmethod
    def serve(self) -> bool:
        """One round; whether anything was found."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self.bell.ring()
        if self._thread.is_alive():
            self._thread.join()
        self.bell.close_fd()

    def _run(self) -> None:
        try:
            while not self._stopping:
                seen = self.bell.value()
                if not self.serve():
                    self.bell.wait(seen, IDLE_SECONDS)
        except Exception as error:
            structlog.get_logger().exception("the thread that serves experts crashed")
            self._crashed(error)

    def _crashed(self, error: Exception) -> None:
        self._failed(error)
