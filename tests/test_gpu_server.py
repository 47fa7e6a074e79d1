"""Doorbells, the shard's launching thread and the worker's steps, with devices that only note what they are told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from common.doorbell import ORDERS, Doorbell, Order
from common.errors import ExpertsUnavailable
from common.futex import Bell
from common.messages import ExpertMap, ShardEntry
from services.expert_shard.gpu_server import GpuAttachment, GpuServer
from services.gpu_worker.gpu_steps import GpuPeer, Steps
from services.gpu_worker.table import Table, make_table


def doorbell() -> tuple[Doorbell, Doorbell]:
    """The worker's and the shard's."""
    theirs, fd = Doorbell.create()
    ours = Doorbell(fd)
    os.close(fd)
    return theirs, ours


def test_orders_come_in_order_and_none_is_lost_when_counts_wrap() -> None:
    worker, shard = doorbell()
    start = (1 << 32) - 3
    worker._put.value = worker._taken.value = shard._next = start
    for n in range(10):
        assert worker.put(Order(n, n % 2 == 0))
    assert [shard.take() for _ in range(11)] == [Order(n, n % 2 == 0) for n in range(10)] + [None]
    assert worker.put(Order(7, False)) and shard.take() == Order(7, False)


def test_a_shard_that_takes_nothing_is_not_told_for_ever() -> None:
    worker, shard = doorbell()
    assert all(worker.put(Order(n, False)) for n in range(ORDERS))
    assert not worker.put(Order(0, False))
    assert shard.take() == Order(0, False)
    assert worker.put(Order(0, False))


class Noted:
    """Launches that note themselves."""

    def __init__(self, name: str, log: list[str], pieces: int = 3) -> None:
        self.name, self.log, self._pieces = name, log, pieces

    def decode(self, rows: int) -> None:
        if rows > 8:
            raise KeyError(rows)
        self.log.append(f"{self.name} decode {rows}")

    def prefill(self, rows: int) -> Iterator[Callable[[], None]]:
        for n in range(self._pieces):
            yield lambda n=n: self.log.append(f"{self.name} prefill {rows}.{n}")  # type: ignore[misc]

    def abort(self) -> None:
        self.log.append(f"{self.name} abort")

    def close(self) -> None:
        self.log.append(f"{self.name} close")


def serve(server: GpuServer) -> None:
    while server.serve():
        pass


def attached(server: GpuServer, name: str, log: list[str]) -> tuple[Doorbell, GpuAttachment]:
    worker, shard = doorbell()
    attachment = GpuAttachment(name, shard, Noted(name, log), most_rows=100)
    server.attach(attachment)
    return worker, attachment


def test_decodes_come_between_the_pieces_of_anothers_prefill_and_after_those_of_ones_own() -> None:
    server, log = GpuServer(), list[str]()
    a, _ = attached(server, "a", log)
    b, _ = attached(server, "b", log)
    for order in (Order(1, False), Order(50, True), Order(2, False)):
        a.put(order)
    server.serve()  # the first decode, then nothing of a prefill yet
    server.serve()
    assert log == ["a decode 1", "a prefill 50.0"]
    b.put(Order(4, False))
    serve(server)
    assert log[2] == "b decode 4"
    assert [entry for entry in log if entry.startswith("a")] == [
        "a decode 1", "a prefill 50.0", "a prefill 50.1", "a prefill 50.2", "a decode 2",
    ]  # fmt: skip


def test_prefills_of_two_workers_take_turns() -> None:
    server, log = GpuServer(), list[str]()
    for name in "ab":
        attached(server, name, log)[0].put(Order(9, True))
    serve(server)
    assert sorted(log[:2]) == ["a prefill 9.0", "b prefill 9.0"]
    assert sorted(log[2:4]) == ["a prefill 9.1", "b prefill 9.1"]


@pytest.mark.parametrize("order", [Order(9, False), Order(101, True), Order(0, True)])
def test_an_order_that_makes_no_sense_breaks_its_link_and_no_other(order: Order) -> None:
    server, log = GpuServer(), list[str]()
    a, broken = attached(server, "a", log)
    b, _ = attached(server, "b", log)
    a.put(order)
    a.put(Order(1, False))
    b.put(Order(2, False))
    serve(server)
    assert log == ["b decode 2"]
    assert "ordered" in broken.broken


def test_a_worker_that_left_is_closed_once_and_in_the_middle_of_a_prefill() -> None:
    server, log = GpuServer(), list[str]()
    a, attachment = attached(server, "a", log)
    a.put(Order(9, True))
    server.serve()
    server.detach(attachment)
    server.detach(attachment)
    serve(server)
    assert log == ["a prefill 9.0", "a abort", "a close"]


def test_a_launch_that_fails_is_told_and_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a shard whose GPU failed would be there for good, and answer nobody."""
    failures: list[Exception] = []
    server, log = GpuServer(failures.append), list[str]()
    a, attachment = attached(server, "a", log)

    def fails(rows: int) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(attachment.launches, "decode", fails)
    server.start()
    a.put(Order(3, False))
    server.bell.ring()
    server._thread.join(10)
    assert not server._thread.is_alive()
    assert [str(error) for error in failures] == ["an illegal memory access"]
    server.stop()
    assert log == ["a abort", "a close"]


def test_the_thread_wakes_when_it_is_rung() -> None:
    server, log = GpuServer(), list[str]()
    a, _ = attached(server, "a", log)
    server.start()
    a.put(Order(3, False))
    server.bell.ring()
    server.stop()
    assert log[0] == "a decode 3" or log == ["a abort", "a close"]
    assert log[-1] == "a close"


# ---- the worker's steps


class Device:
    """DeviceLink's part that Steps uses."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.late: list[int] = []

    def begin(self) -> None:
        self.log.append("begin")

    def attach(self, peer: int, base: int, abort: int, near: bool) -> None:
        self.log.append(("attach", peer, base, abort, near))

    def detach(self, peer: int) -> None:
        self.log.append(("detach", peer))

    def set_owner(self, owner: np.ndarray) -> None:
        self.log.append(owner.tolist())

    def behind(self) -> list[int]:
        return self.late

    def take(self) -> list[Any]:
        taken, self.log = self.log, []
        return taken


class Words(dict[int, int]):
    def address(self, index: int) -> int:
        return 1000 + index


class Worker:
    def __init__(self) -> None:
        self.device = Device()
        self.steps = Steps(self.device)  # type: ignore[arg-type]
        self.words, self.freed = Words(), list[str]()

    def peer(self, name: str, index: int, near: bool = False) -> GpuPeer:
        worker, _ = doorbell()
        return GpuPeer(
            name, "b", index, 100 * index, worker, Bell.create("test"), self.words,
            unmap=lambda: self.freed.append(name), near=near,
        )  # fmt: skip


def table(version: int, *peers: GpuPeer) -> Table:
    """Two partitions over four experts, of the first and the last of these."""
    entries = {peer.shard_id: ShardEntry("b", "n") for peer in peers}
    owners = ((peers[0].shard_id,), (peers[-1].shard_id,))
    return make_table(ExpertMap(version=version, model="", partitions=2, owners=owners, shards=entries), peers, 4, "w")


def test_the_device_is_told_what_changed_and_nothing_else() -> None:
    worker = Worker()
    a, b = worker.peer("a", 3, near=True), worker.peer("b", 1)
    both = table(1, a, b)
    worker.steps.begin(lambda: both)
    assert worker.device.take() == [
        ("attach", 3, 300, 1003, True), ("attach", 1, 100, 1001, False), [3, 1, 3, 1], "begin",
    ]  # fmt: skip
    assert worker.steps.oldest_version() == 1
    worker.steps.begin(lambda: both)
    assert worker.device.take() == []
    assert worker.steps.end(True) == worker.steps.end(True) == []
    alone = table(2, a)
    worker.steps.begin(lambda: alone)
    assert worker.device.take() == [("detach", 1), [3, 3, 3, 3]]


def test_a_peer_is_freed_when_the_last_step_that_knows_it_has_ended() -> None:
    worker = Worker()
    a, b = worker.peer("a", 0), worker.peer("b", 1)
    for peers in ((a, b), (a,)):
        worker.steps.begin(lambda peers=peers: table(1, *peers))  # type: ignore[misc]
    b.close("left")
    worker.steps.free_if_idle(b)
    assert worker.freed == [] and worker.words[1] == 1
    worker.steps.end(True)
    assert worker.freed == ["b"] and b.freed
    worker.steps.end(True)
    a.close("left")
    worker.steps.free_if_idle(a)
    assert worker.freed == ["b", "a"]


def test_a_failed_step_names_who_is_late_and_the_next_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gpu_worker.gpu_steps.CATCH_UP_SECONDS", 0.02)
    worker = Worker()
    a, b = worker.peer("a", 0), worker.peer("b", 1)
    for _ in range(2):
        worker.steps.begin(lambda: table(1, a, b))
    worker.device.late = [1]
    assert worker.steps.end(False) == [b]
    b.lost = "is late"
    assert worker.steps.end(False) == []
    worker.device.take()
    worker.steps.begin(lambda: table(1, a))
    assert worker.device.take() == [("detach", 1), [0, 0, 0, 0], "begin"]


def test_a_step_that_cannot_begin_leaves_nothing_behind() -> None:
    worker = Worker()

    def none() -> Table:
        raise ExpertsUnavailable("no shard")

    with pytest.raises(ExpertsUnavailable):
        worker.steps.begin(none)
    assert worker.steps.oldest_version() is None and worker.device.log == []


def test_a_peer_that_takes_no_orders_is_told_of() -> None:
    worker = Worker()
    a = worker.peer("a", 0)
    worker.steps.begin(lambda: table(1, a))
    assert all(worker.steps.ring(Order(1, False)) == [] for _ in range(ORDERS))
    assert worker.steps.ring(Order(1, False)) == [a]
