from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from multiprocessing.synchronize import Barrier

import pytest
import torch

from common.futex import Bell
from common.mailbox import (
    LAYOUT,
    REFUSED,
    HandshakeError,
    Slab,
    next_seq,
    receive_with_fds,
    send_with_fds,
    slab_bytes,
)
from common.messages import Attached

GEOMETRY = dict(hidden=48, topk=3, decode_rows=8, prefill_rows=40)
RINGS = 30_000


def _ring_many(fd: int, together: Barrier) -> None:
    bell = Bell(fd)
    together.wait()
    for _ in range(RINGS):
        bell.ring()


def test_no_ring_of_several_processes_is_lost():
    bell = Bell.create("test")
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)
    senders = [context.Process(target=_ring_many, args=(os.dup(bell.fd), together)) for _ in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert bell.value() == 3 * RINGS


def test_a_ring_wakes_a_waiter_and_silence_ends_in_the_timeout():
    bell = Bell.create("test")
    seen = bell.value()
    began = time.monotonic()
    bell.wait(seen, 0.05)
    assert 0.045 <= time.monotonic() - began < 5

    woken = threading.Event()
    thread = threading.Thread(target=lambda: (bell.wait(seen, 60), woken.set()))
    thread.start()
    bell.ring()
    assert woken.wait(10)
    thread.join()


def test_a_wait_for_a_value_that_has_passed_returns_at_once():
    bell = Bell.create("test")
    seen = bell.value()
    bell.ring()
    began = time.monotonic()
    bell.wait(seen, 60)
    assert time.monotonic() - began < 10


def test_two_mappings_of_a_slab_see_each_other_and_its_regions_do_not_overlap():
    ours, fd = Slab.create(**GEOMETRY)
    theirs = Slab(fd, **GEOMETRY)
    assert os.fstat(fd).st_size == slab_bytes(**GEOMETRY)
    os.close(fd)
    assert theirs.layout == LAYOUT
    regions = []
    for slot in (*ours.decode, ours.prefill):
        views = slot.first(slot.rows)
        regions += [views.x, views.ids, views.weights, views.sums]
    for number, region in enumerate(regions):
        region.fill_(number + 1)
    for index, slot in enumerate((*ours.decode, ours.prefill)):
        slot.submit(seq=7 + index, layer=3, rows=5 + index)
    number = 0
    for index, slot in enumerate((*theirs.decode, theirs.prefill)):
        assert slot.work() == (7 + index, 3, 5 + index)
        views = slot.first(slot.rows)
        for region in (views.x, views.ids, views.weights, views.sums):
            number += 1
            assert torch.equal(region, torch.full_like(region, number))
    assert not theirs.aborted
    ours.abort()
    assert theirs.aborted


@pytest.mark.parametrize("topk,decode_rows,prefill_rows,hidden", [(1, 1, 1, 1), (8, 64, 320, 7168), (3, 5, 7, 100)])
def test_the_size_is_known_before(topk, decode_rows, prefill_rows, hidden):
    _, fd = Slab.create(hidden, topk, decode_rows, prefill_rows)
    assert os.fstat(fd).st_size == slab_bytes(hidden, topk, decode_rows, prefill_rows)
    os.close(fd)
    row = 4 * (2 * hidden + 2 * topk)
    assert slab_bytes(hidden, topk, decode_rows, prefill_rows) >= 4096 + row * (2 * decode_rows + prefill_rows)


def test_a_slab_of_another_geometry_is_refused():
    _, fd = Slab.create(**GEOMETRY)
    with pytest.raises(HandshakeError, match="bytes"):
        Slab(fd, **GEOMETRY | dict(hidden=2048))
    os.close(fd)


def test_seq_is_compared_only_for_equality_and_wraps():
    slab, fd = Slab.create(**GEOMETRY)
    os.close(fd)
    seq, used = 2**32 - 2, []
    for _ in range(4):
        seq = next_seq(seq)
        used.append(seq)
        for slot in (slab.decode[seq & 1], slab.prefill):
            slot.submit(seq, 1, 2)
            assert slot.work() == (seq, 1, 2)
            assert not slot.answered(seq)
            slot.answer(seq)
            assert slot.answered(seq) and slot.work() is None
    assert used == [2**32 - 1, 1, 2, 3]


def test_the_answer_to_an_overtaken_use_is_not_taken_for_the_newer_one():
    slab, fd = Slab.create(**GEOMETRY)
    os.close(fd)
    slot = slab.decode[0]
    slot.submit(2, 1, 4)
    slot.submit(4, 1, 6)
    assert not slot.wants(2)
    slot.answer(2, REFUSED)
    assert not slot.answered(4)
    assert slot.work() == (4, 1, 6)


def test_more_rows_than_the_slot_has_are_never_read():
    slab, fd = Slab.create(**GEOMETRY)
    os.close(fd)
    slab.decode[0].submit(2, 1, 1_000_000)
    assert slab.decode[0].work() == (2, 1, 8)


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_a_handshake_carries_the_message_and_its_memory():
    ours, theirs = _pair()
    bell = Bell.create("test")
    bell.ring()
    send_with_fds(ours, Attached(boot_id="b", layout=LAYOUT), [bell.fd])
    message, fds = receive_with_fds(theirs, 1)
    assert message == Attached(boot_id="b", layout=LAYOUT)
    received = Bell(fds[0])
    assert received.value() == 1
    received.ring()
    assert bell.value() == 2
    ours.close()
    with pytest.raises(HandshakeError, match="left"):
        receive_with_fds(theirs, 1)
    theirs.close()


def test_a_handshake_without_its_memory_or_that_is_no_message_is_refused_and_leaks_nothing():
    ours, theirs = _pair()
    bell = Bell.create("test")
    before = len(os.listdir("/proc/self/fd"))
    send_with_fds(ours, Attached(boot_id="b", layout=LAYOUT), [bell.fd, bell.fd])
    with pytest.raises(HandshakeError, match="2 file descriptors in place of 1"):
        receive_with_fds(theirs, 1)
    socket.send_fds(ours, [b"\x93what"], [bell.fd])
    with pytest.raises(HandshakeError):
        receive_with_fds(theirs, 1)
    assert len(os.listdir("/proc/self/fd")) == before
    ours.close()
    theirs.close()
