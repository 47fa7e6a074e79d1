"""Bytes of files into tensors; to a GPU through pinned buffers, the next bytes being read while the last are copied."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from common.errors import ConfigError

CHUNK = 8 << 20  # bytes read at a time
THREADS = 8  # that read for a GPU; one that only waits for a disk or a copy costs nothing
BUFFERS = 2  # a thread: one is read into while the other is copied


@dataclass(frozen=True, slots=True)
class Transfer:
    path: Path
    start: int  # byte of the file
    dtype: torch.dtype  # in the file
    out: Tensor  # contiguous; of another dtype: converted


@dataclass(frozen=True, slots=True)
class _Chunk:
    fd: int
    path: Path
    start: int
    dtype: torch.dtype
    out: Tensor  # [elements]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.out.numel() * self.dtype.itemsize


def transfer(transfers: Sequence[Transfer], advance: Callable[[int], None], *, threads: int | None = None) -> None:
    """All on one device. `advance` is told of bytes read, by one thread at a time. Raises ConfigError naming a file
    that cannot be read; then some of the tensors hold anything."""
    transfers = [one for one in transfers if one.out.numel()]
    if not transfers:
        return
    device = transfers[0].out.device
    with ExitStack() as stack:
        files = {path: open_file(path, stack) for path in {one.path for one in transfers}}
        in_order = sorted(transfers, key=lambda one: (one.path, one.start))
        chunks = deque(chunk for one in in_order for chunk in _chunks(one, files[one.path]))
        threads = min(threads or (THREADS if device.type == "cuda" else 1), len(chunks))
        lanes = [_GpuLane(device) if device.type == "cuda" else _Lane() for _ in range(threads)]
        advance = _one_at_a_time(advance)
        if threads == 1:
            _drain(chunks, lanes[0], advance)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for done in [pool.submit(_drain, chunks, lane, advance) for lane in lanes]:
                    done.result()


def open_file(path: Path, stack: ExitStack) -> int:
    """Closed with `stack`. Raises ConfigError naming `path`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    stack.callback(os.close, fd)
    return fd


def _chunks(one: Transfer, fd: int) -> Iterator[_Chunk]:
    flat, size = one.out.view(-1), one.dtype.itemsize
    for first in range(0, len(flat), CHUNK // size):
        yield _Chunk(fd, one.path, one.start + first * size, one.dtype, flat[first : first + CHUNK // size])


def _one_at_a_time(advance: Callable[[int], None]) -> Callable[[int], None]:
    lock = Lock()

    def locked(size: int) -> None:
        with lock:
            advance(size)

    return locked


def _drain(chunks: deque[_Chunk], lane: _Lane, advance: Callable[[int], None]) -> None:
    """Until none is left; where one fails, the other threads find none left."""
    try:
        with lane.open():
            while chunks:
                try:
                    chunk = chunks.popleft()
                except IndexError:  # another thread was faster
                    break
                lane.take(chunk)
                advance(chunk.size)
    except BaseException:
        chunks.clear()
        raise


class _Lane:
    """One thread's way into memory."""

    def take(self, chunk: _Chunk) -> None:
        if chunk.dtype is chunk.out.dtype:
            _read(chunk, chunk.out)
        else:
            chunk.out.copy_(_read(chunk, torch.empty(chunk.out.shape, dtype=chunk.dtype)))

    def open(self) -> AbstractContextManager[None]:
        return nullcontext()


class _GpuLane(_Lane):
    """One thread's way to a GPU; its copies are done when it is closed."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # what was there before may still be in use
        self._buffers: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def take(self, chunk: _Chunk) -> None:
        if len(self._buffers) < BUFFERS:
            # A thread that waits for a blocking event leaves its core to those that read.
            buffer, copied = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True), torch.cuda.Event(blocking=True)
        else:
            buffer, copied = self._buffers.popleft()
            copied.synchronize()
        values = _read(chunk, buffer[: chunk.size].view(chunk.dtype))
        chunk.out.copy_(values, non_blocking=True)  # another dtype's values are so converted by the GPU
        copied.record()
        self._buffers.append((buffer, copied))

    @contextmanager
    def open(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()


def _read(chunk: _Chunk, into: Tensor) -> Tensor:
    """Returns `into`, which is as many bytes of this process's memory."""
    read_into(into.view(torch.uint8).numpy().data, chunk.fd, chunk.path, chunk.start)
    return into


def read_into(view: memoryview, fd: int, path: Path, start: int) -> None:
    """As many bytes as `view` has, from `start` on. Raises ConfigError naming `path`."""
    got = 0
    try:
        while got < len(view) and (count := os.preadv(fd, [view[got:]], start + got)):
            got += count
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if got < len(view):
        raise ConfigError(f"{path} ends too early")
