"""The mailbox: one slab of shared memory for each (worker, shard) on one node, and the handshake that sets it up.

Byte layout of a slab (native byte order, layout version LAYOUT):

    0      u32 layout version     the geometry follows from the handshake's numbers
    64     u32 abort              set by either host when it gives the link up; every wait polls it
    128    slot header of decode slot 0 (128 bytes)
    256    slot header of decode slot 1
    384    slot header of the prefill slot
    4096   bodies of the three slots, each on a page boundary:
           x f32 [rows, hidden] | ids i32 [rows, topk] | weights f32 [rows, topk] | sums f32 [rows, hidden]

A slot header is two cache lines with one writer each:

    +0     u32 request seq, u32 layer, u32 rows      written by the worker, seq last
    +64    u32 done seq, u32 status (0: done)        written by the shard, seq last

A slot has work while request seq != done seq. `seq` names one use of a slot, is advanced for each use of the slab and
wraps; it is only ever compared for equality, so that the answer to a broken step is never taken for that of its rerun.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import socket
import struct
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from common import messages
from common.errors import Unavailable
from common.futex import fence

LAYOUT = 1
DONE, REFUSED = 0, 1
DECODE_SLOTS = 2
_LAST_SEQ = 0xFFFFFFFF

_ABORT, _HEADERS, _HEADER_BYTES, _DONE_AT, _BODIES = 64, 128, 128, 64, 4096
_MAX_HELLO = 64 << 10


class HandshakeError(Unavailable):
    """A mailbox could not be set up with this peer."""

    code = "handshake"


def boot_word(boot_id: str) -> int:
    """A boot id as the header of a slab in a GPU's memory holds it."""
    return int.from_bytes(hashlib.blake2b(boot_id.encode(), digest_size=7).digest(), "little")


def next_seq(seq: int) -> int:
    """0 is left out: it is what a slot holds that was never used."""
    return seq % _LAST_SEQ + 1


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _body_bytes(hidden: int, topk: int, rows: int) -> int:
    return _pages(rows * 4 * (2 * hidden + 2 * topk))


def slab_bytes(hidden: int, topk: int, decode_rows: int, prefill_rows: int) -> int:
    """The whole size of a slab; known before any of it is allocated."""
    decode, prefill = _body_bytes(hidden, topk, decode_rows), _body_bytes(hidden, topk, prefill_rows)
    return _BODIES + DECODE_SLOTS * decode + prefill


class Rows(NamedTuple):
    """Some rows of a slot's body, in place, as the shard computes with them."""

    x: Tensor  # [rows, hidden] float32
    ids: Tensor  # [rows, topk] int32
    weights: Tensor  # [rows, topk] float32
    sums: Tensor  # [rows, hidden] float32


class RowArrays(NamedTuple):
    """The same for the worker, which only copies: numpy takes a third of the time of torch for so little."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    sums: np.ndarray


class Slot:
    def __init__(self, memory: mmap.mmap, header: int, body: int, hidden: int, topk: int, rows: int) -> None:
        self.rows = rows
        self._request = (ctypes.c_uint32 * 3).from_buffer(memory, header)
        self._done = (ctypes.c_uint32 * 2).from_buffer(memory, header + _DONE_AT)
        offsets = np.cumsum([body, rows * hidden * 4, rows * topk * 4, rows * topk * 4]).tolist()
        self._all = (
            _view(memory, offsets[0], torch.float32, rows, hidden),
            _view(memory, offsets[1], torch.int32, rows, topk),
            _view(memory, offsets[2], torch.float32, rows, topk),
            _view(memory, offsets[3], torch.float32, rows, hidden),
        )
        self._by_count: dict[int, Rows] = {}
        self._arrays_by_count: dict[int, RowArrays] = {}

    # The views are kept: making them costs more than the link's own work on a small batch.

    def first(self, count: int) -> Rows:
        found = self._by_count.get(count)
        if found is None:
            found = self._by_count[count] = self.part(0, count)
        return found

    def first_arrays(self, count: int) -> RowArrays:
        found = self._arrays_by_count.get(count)
        if found is None:
            found = self._arrays_by_count[count] = RowArrays(*(tensor.numpy() for tensor in self.part(0, count)))
        return found

    def part(self, start: int, end: int) -> Rows:
        return Rows(*(tensor[start:end] for tensor in self._all))

    # The worker's side.

    def submit(self, seq: int, layer: int, rows: int) -> None:
        self._request[1], self._request[2] = layer, rows
        fence()
        self._request[0] = seq

    def answered(self, seq: int) -> bool:
        if self._done[0] != seq:
            return False
        fence()
        return True

    @property
    def status(self) -> int:
        return self._done[1]

    # The shard's side.

    def work(self) -> tuple[int, int, int] | None:
        """(seq, layer, rows) of a use that is not answered yet."""
        seq = self._request[0]
        if seq == self._done[0]:
            return None
        fence()
        # The other side is not trusted with a bound: rows past the body would be read out of the slab.
        return seq, self._request[1], min(self._request[2], self.rows)

    def wants(self, seq: int) -> bool:
        """Whether use `seq` is still the one that is waited for."""
        return bool(self._request[0] == seq)

    def answer(self, seq: int, status: int = DONE) -> None:
        self._done[1] = status
        fence()
        self._done[0] = seq


class Slab:
    """The shared memory of one (worker, shard); mapped until the last view of it is gone."""

    def __init__(self, fd: int, hidden: int, topk: int, decode_rows: int, prefill_rows: int) -> None:
        """Maps the memory; the file descriptor stays the caller's."""
        size = slab_bytes(hidden, topk, decode_rows, prefill_rows)
        if os.fstat(fd).st_size != size:
            raise HandshakeError(f"a mailbox of {os.fstat(fd).st_size} bytes was offered where {size} are needed")
        memory = mmap.mmap(fd, size)
        self._version = ctypes.c_uint32.from_buffer(memory, 0)
        self._abort = ctypes.c_uint32.from_buffer(memory, _ABORT)
        body, slots = _BODIES, []
        for index, rows in enumerate([decode_rows] * DECODE_SLOTS + [prefill_rows]):
            slots.append(Slot(memory, _HEADERS + index * _HEADER_BYTES, body, hidden, topk, rows))
            body += _body_bytes(hidden, topk, rows)
        self.decode: tuple[Slot, ...] = tuple(slots[:DECODE_SLOTS])
        self.prefill: Slot = slots[DECODE_SLOTS]

    @classmethod
    def create(cls, hidden: int, topk: int, decode_rows: int, prefill_rows: int) -> tuple[Slab, int]:
        """A new slab and its memfd, which the caller hands over and closes."""
        fd = os.memfd_create("moecule-slab", os.MFD_CLOEXEC)
        os.ftruncate(fd, slab_bytes(hidden, topk, decode_rows, prefill_rows))
        slab = cls(fd, hidden, topk, decode_rows, prefill_rows)
        slab._version.value = LAYOUT
        return slab, fd

    @property
    def layout(self) -> int:
        return self._version.value

    @property
    def aborted(self) -> bool:
        return self._abort.value != 0

    def abort(self) -> None:
        self._abort.value = 1


def _view(memory: mmap.mmap, offset: int, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=rows * width, offset=offset).view(rows, width)


# ---- the handshake --------------------------------------------------------------------------------------------------
#
# The worker connects to the shard's abstract Unix socket (SOCK_SEQPACKET: a message arrives whole or not at all) and
# sends Attach with the memfd of its own bell; the shard answers Attached with the memfds of the slab and of its bell.
# Nothing else ever passes the socket: it stays open so that its end of file tells either side of the other's death.


def socket_name(shard_id: str, boot_id: str) -> str:
    """Abstract (nothing on the file system), and of one life of the shard, so that a stale name meets nobody."""
    return f"\0moecule-{shard_id}-{boot_id}"


def handshake_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    return sock


def send_with_fds(sock: socket.socket, message: messages.Message, fds: list[int]) -> None:
    try:
        socket.send_fds(sock, [messages.encode(message)], fds, socket.MSG_NOSIGNAL)
    except OSError as error:
        raise HandshakeError(f"the other side of a mailbox left in the handshake: {error}") from error


def receive_with_fds(sock: socket.socket, count: int) -> tuple[messages.Message, list[int]]:
    """The message and exactly `count` file descriptors, which the caller owns. Call when the socket is readable."""
    try:
        data, fds, _, _ = socket.recv_fds(sock, _MAX_HELLO, 4, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise HandshakeError(f"the other side of a mailbox left in the handshake: {error}") from error
    try:
        if not data:
            raise HandshakeError("the other side of a mailbox left in the handshake")
        if len(fds) != count:
            raise HandshakeError(f"a mailbox handshake brought {len(fds)} file descriptors in place of {count}")
        return messages.decode(data), fds
    except (HandshakeError, msgspec.DecodeError) as error:
        for fd in fds:
            os.close(fd)
        raise HandshakeError(f"no mailbox handshake: {error}") from error


def same_user(sock: socket.socket) -> bool:
    """An abstract socket has no permissions of its own: only processes of our own user may attach."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.geteuid())
