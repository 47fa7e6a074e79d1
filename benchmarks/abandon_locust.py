"""For locust: users who lose patience. `python -m benchmarks.abandon` runs it."""

from __future__ import annotations

import os
import urllib.parse
from random import Random

from locust import User, constant, task

from benchmarks.abandon_client import visit

seeds = Random(int(os.environ.get("ABANDON_SEED", "1")))


class Impatient(User):
    wait_time = constant(0.0)

    def on_start(self) -> None:
        self.draw = Random(seeds.randrange(1 << 32))
        self.port = urllib.parse.urlsplit(self.host).port

    @task
    def one(self) -> None:
        seen = visit(self.port, self.draw)
        what, _, how = seen.name.partition(": ")
        self.environment.events.request.fire(
            request_type=what,
            name=how,
            response_time=seen.seconds * 1000,
            response_length=seen.received,
            exception=RuntimeError(seen.wrong) if seen.wrong else None,
            context={},
        )
