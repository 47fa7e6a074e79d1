"""Clients that disconnect at random leave nothing behind in a real cluster; `python -m benchmarks.abandon` for long."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from benchmarks import abandon
from benchmarks.abandon import held_when_idle, leaves_nothing, more_than
from benchmarks.abandon_client import visit
from benchmarks.cluster import Cluster, cluster

pytestmark = pytest.mark.cluster
USERS = 8


def traffic(running: Cluster, seconds: float, seed: int) -> bool:
    until = time.monotonic() + seconds

    def user(number: int) -> list[str]:
        draw, wrong = Random(f"{seed} {number}"), []
        while time.monotonic() < until:
            wrong.append(visit(running.port, draw).wrong)
        return wrong

    with ThreadPoolExecutor(USERS) as pool:
        found = [wrong for some in pool.map(user, range(USERS)) for wrong in some]
    assert len(found) > USERS
    return not any(found)


def test_clients_that_leave_at_random_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(device="cpu", log_level="error") as running:
        assert leaves_nothing(running, lambda: traffic(running, 3.0, 1), lambda: traffic(running, 8.0, 2))
        monkeypatch.setattr(abandon, "QUIET_SECONDS", 1.0)
        before = held_when_idle(running)
        with socket.create_connection(("127.0.0.1", running.port)):
            _, more = more_than(before, running)
        assert more[("gateway, process 0", "sockets")] == before[("gateway, process 0", "sockets")] + 1, (
            "it would be seen"
        )
