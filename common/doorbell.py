"""A doorbell: which passes a shard on a GPU is to launch for one worker, a step ahead of the worker's own kernels.

The worker puts an order and rings the shard's Bell; the shard takes the orders one after another. They only say what to
launch: every wait for rows is the kernels' own, and one that is rung early costs nothing. Byte layout of the memfd:

    0      u32 orders put       written by the worker, after the order
    64     u32 orders taken     written by the shard
    128    u32 [ORDERS, 2]      rows, and whether they are prefill
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import NamedTuple

from common.futex import fence

ORDERS = 64  # that may wait; a worker is two steps ahead at most, of two passes each
_TAKEN_AT, _ORDERS_AT = 64, 128
_WRAP = 1 << 32


class Order(NamedTuple):
    rows: int
    prefill: bool


class Doorbell:
    def __init__(self, fd: int) -> None:
        """Maps the memory; the file descriptor stays the caller's. Raises ValueError if it is too small."""
        if os.fstat(fd).st_size < mmap.PAGESIZE:
            raise ValueError(f"a doorbell of {os.fstat(fd).st_size} bytes")
        memory = mmap.mmap(fd, mmap.PAGESIZE)
        self._put = ctypes.c_uint32.from_buffer(memory, 0)
        self._taken = ctypes.c_uint32.from_buffer(memory, _TAKEN_AT)
        self._orders = (ctypes.c_uint32 * (2 * ORDERS)).from_buffer(memory, _ORDERS_AT)
        self._next = self._taken.value  # the shard's own count, which a worker cannot write

    @classmethod
    def create(cls) -> tuple[Doorbell, int]:
        """A new one and its memfd, which the caller hands over and closes."""
        fd = os.memfd_create("moecule-doorbell", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        return cls(fd), fd

    def put(self, order: Order) -> bool:
        """The worker's. False if the shard is so far behind that there is no room."""
        count = self._put.value
        if (count - self._taken.value) % _WRAP >= ORDERS:
            return False
        at = 2 * (count % ORDERS)
        self._orders[at], self._orders[at + 1] = order.rows, order.prefill
        fence()
        self._put.value = count + 1
        return True

    def take(self) -> Order | None:
        """The shard's: the next one, or None."""
        if self._put.value == self._next:
            return None
        fence()
        at = 2 * (self._next % ORDERS)
        order = Order(self._orders[at], bool(self._orders[at + 1]))
        self._next = (self._next + 1) % _WRAP
        self._taken.value = self._next
        return order
