"""Bytes of files into tensors; to a GPU through pinned buffers, the next bytes being read while the last are copied."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from common.errors import ConfigError
from common.source import put, rows_of
from kernels.quant import GROUP, Fp8Blocks

CHUNK = 16 << 20  # bytes read at a time; at half of it readers spend longer waiting for each other (for the GIL)
THREADS = 8  # that read for a GPU; one that only waits for a disk or a copy costs nothing
BUFFERS = 2  # a thread: one is read into while the other is copied


@dataclass(frozen=True, slots=True)
class Transfer:
    path: Path
    start: int  # byte of the file
    dtype: torch.dtype  # in the file
    out: Tensor | Fp8Blocks  # contiguous; of another dtype: converted; blocks, [out, in]: quantised

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.out.data.numel() * self.dtype.itemsize

    def put(self, values: Tensor) -> None:
        """`values`: the file's, flat. To a GPU from pinned memory without waiting, and converted there."""
        if isinstance(self.out, Fp8Blocks):
            put(values.view(self.out.data.shape).to(self.out.data.device, non_blocking=True), self.out)
        else:
            self.out.copy_(values.view(self.out.shape), non_blocking=True)


@dataclass(slots=True)
class _Chunk:
    """Bytes of a file that are read at once, of one tensor or of several that lie one behind the other."""

    fd: int
    path: Path
    start: int
    size: int
    parts: list[tuple[int, Transfer]]  # (byte of the chunk, what begins there)


def transfer(transfers: Sequence[Transfer], advance: Callable[[int], None], *, threads: int | None = None) -> None:
    """All on one device. `advance` is told of bytes read, by one thread at a time. Raises ConfigError naming a file
    that cannot be read; then some of the tensors hold anything."""
    transfers = [one for one in transfers if one.size]
    if not transfers:
        return
    device = transfers[0].out.data.device
    with ExitStack() as stack:
        files = {path: open_file(path, stack) for path in {one.path for one in transfers}}
        in_order = sorted(transfers, key=lambda one: (one.path, one.start))
        chunks = deque(_chunks((part for one in in_order for part in _cut(one)), files))
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


def _cut(one: Transfer) -> Iterator[Transfer]:
    """Into parts of at most CHUNK bytes; blocks between their rows, so that each is quantised by itself."""
    if isinstance(one.out, Fp8Blocks):
        rows, columns = one.out.data.shape
        step = max(1, CHUNK // (GROUP * columns * one.dtype.itemsize)) * GROUP
        for first in range(0, rows, step):
            start = one.start + first * columns * one.dtype.itemsize
            yield Transfer(one.path, start, one.dtype, rows_of(one.out, first, min(first + step, rows)))
    elif one.size <= CHUNK:
        yield one
    else:
        flat, step = one.out.view(-1), CHUNK // one.dtype.itemsize
        for first in range(0, len(flat), step):
            yield Transfer(one.path, one.start + first * one.dtype.itemsize, one.dtype, flat[first : first + step])


def _chunks(parts: Iterable[Transfer], files: dict[Path, int]) -> Iterator[_Chunk]:
    """`parts` in the order of the files. What lies between two that nobody asked for is not read."""
    chunk: _Chunk | None = None
    for part in parts:
        if chunk is not None:
            at = part.start - chunk.start
            behind = part.path == chunk.path and at == chunk.size and at % part.dtype.itemsize == 0
            if behind and at + part.size <= CHUNK:
                chunk.parts.append((at, part))
                chunk.size += part.size
                continue
            yield chunk
        chunk = _Chunk(files[part.path], part.path, part.start, part.size, [(0, part)])
    if chunk is not None:
        yield chunk


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
        for at, part in chunk.parts:
            as_it_is = isinstance(part.out, Tensor) and part.out.dtype is part.dtype
            values = part.out.data.view(-1) if as_it_is else torch.empty(part.out.data.numel(), dtype=part.dtype)
            read_into(values.view(torch.uint8).numpy().data, chunk.fd, chunk.path, chunk.start + at)
            if not as_it_is:
                part.put(values)

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
            buffer, copied = _pinned(max(CHUNK, chunk.size)), torch.cuda.Event(blocking=True)
        else:
            buffer, copied = self._buffers.popleft()
            copied.synchronize()
            if len(buffer) < chunk.size:  # blocks of very wide rows
                buffer = _pinned(chunk.size)
        read_into(buffer[: chunk.size].numpy().data, chunk.fd, chunk.path, chunk.start)
        for at, part in chunk.parts:
            part.put(buffer[at : at + part.size].view(part.dtype))
        copied.record()
        self._buffers.append((buffer, copied))

    @contextmanager
    def open(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


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
