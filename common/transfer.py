"""Bytes of files into tensors; to a GPU through pinned buffers, the next bytes being read while the last are copied."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from common.errors import ConfigError
from common.source import put, rows_of
from kernels.quant import GROUP, Fp8Blocks

CHUNK = 8 << 20  # bytes read at a time: larger buffers fit no cache, smaller ones cost more calls than they gain
THREADS = 8  # that read for a GPU; one that only waits for a disk costs nothing
BUFFERS = 12  # that they read into: the rest are being copied, which is faster


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


def transfer(transfers: Sequence[Transfer], advance: Callable[[int], None]) -> None:
    """All on one device. `advance` is told of bytes read. Raises ConfigError naming a file that cannot be read; then
    some of the tensors hold anything."""
    transfers = [one for one in transfers if one.size]
    if not transfers:
        return
    device = transfers[0].out.data.device
    with ExitStack() as stack:
        chunks = _in_order(transfers, stack)
        if device.type == "cuda":
            with _stream_of_its_own(device):
                _read_ahead(chunks, _PinnedBuffer, advance)
        else:
            for chunk in chunks:
                _read_in_place(chunk)
                advance(chunk.size)


def _in_order(transfers: Sequence[Transfer], stack: ExitStack) -> Iterator[_Chunk]:
    """As the files have them, which are open until `stack` closes."""
    files = {path: open_file(path, stack) for path in {one.path for one in transfers}}
    in_order = sorted(transfers, key=lambda one: (one.path, one.start))
    return _chunks((part for one in in_order for part in _cut(one)), files)


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


def _read_in_place(chunk: _Chunk) -> None:
    for at, part in chunk.parts:
        as_it_is = isinstance(part.out, Tensor) and part.out.dtype is part.dtype
        values = part.out.data.view(-1) if as_it_is else torch.empty(part.out.data.numel(), dtype=part.dtype)
        read_into(values.view(torch.uint8).numpy().data, chunk.fd, chunk.path, chunk.start + at)
        if not as_it_is:
            part.put(values)


@contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """All that was begun on it is done when it is left."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # what was there before may still be in use
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()


class _PinnedBuffer:
    """Copied from on the current stream."""

    def __init__(self, size: int) -> None:
        self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.memory = self._bytes.numpy().data
        # A thread that waits for a blocking event leaves its core to those that read.
        self._copied = torch.cuda.Event(blocking=True)

    def begin_copy(self, chunk: _Chunk) -> None:
        """Of a chunk that has been read into it."""
        for at, part in chunk.parts:
            part.put(self._bytes[at : at + part.size].view(part.dtype))
        self._copied.record()

    def copied(self) -> bool:
        return self._copied.query()

    def wait(self) -> None:
        self._copied.synchronize()


_Asked = SimpleQueue[tuple[_Chunk, _PinnedBuffer] | None]
_Read = SimpleQueue[tuple[_Chunk, _PinnedBuffer, BaseException | None]]


def _read_ahead(
    chunks: Iterator[_Chunk], new_buffer: Callable[[int], _PinnedBuffer], advance: Callable[[int], None]
) -> None:
    """Threads read, and this one has copied what they have read: each of copying's many short calls lets go of the
    GIL, and threads that all make them wait for each other. Copies are begun when it returns, not done."""
    asked, read = _Asked(), _Read()
    free, copying = list[_PinnedBuffer](), deque[_PinnedBuffer]()
    made = reading = 0
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            to_read = next(chunks, None)
            while to_read is not None or reading:
                while copying and (copying[0].copied() or not (free or reading)):
                    copying[0].wait()
                    free.append(copying.popleft())
                while to_read is not None and (free or made < BUFFERS):
                    if not free:
                        free.append(new_buffer(max(CHUNK, to_read.size)))  # larger: blocks of very wide rows
                        made += 1
                        if made <= THREADS:
                            pool.submit(_read_what_is_asked, asked, read)
                    buffer = free.pop()
                    if len(buffer.memory) < to_read.size:
                        buffer = new_buffer(to_read.size)
                    asked.put((to_read, buffer))
                    reading += 1
                    to_read = next(chunks, None)
                chunk, buffer, error = read.get()
                if error is not None:
                    try:
                        raise error
                    finally:
                        del error  # it and this frame would keep each other, and all that is being loaded
                reading -= 1
                buffer.begin_copy(chunk)
                copying.append(buffer)
                advance(chunk.size)
        finally:
            for _ in range(THREADS):
                asked.put(None)


def _read_what_is_asked(asked: _Asked, read: _Read) -> None:
    while (item := asked.get()) is not None:
        chunk, buffer = item
        try:
            read_into(buffer.memory[: chunk.size], chunk.fd, chunk.path, chunk.start)
        except BaseException as error:
            read.put((chunk, buffer, error))
        else:
            read.put((chunk, buffer, None))


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
