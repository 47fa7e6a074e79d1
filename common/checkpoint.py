"""A safetensors checkpoint as a source of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from common.source import CODED, Progress, Read, empty, put
from common.transfer import Transfer, open_file, read_into, transfer
from common.weight_files import weight_files
from kernels.quant import Fp8Blocks, dequantise, scale_shape

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": CODED,
}
SCALES = "_scale_inv"  # behind the name of a weight in blocks of 8 bits
MOST_ASIDE = 512 << 20  # bytes of weights to be dequantised that are read at a time
HEADER_LIMIT = 100 << 20  # bytes, the format's own
MOST = 1 << 60  # of a size or an offset: what a file system can address


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` of `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """Reads the headers when made, and the bytes of a tensor when it is asked for.

    Files are read, not mapped: no byte of a tensor that nobody asked for enters this process.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._entries: dict[str, Entry] = {}
        for path in weight_files(self.folder):
            self._entries |= _read_header(path)

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def nbytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.end - entry.start

    def require(self, name: str) -> None:
        if self._is_coded(name):
            self._entry(name + SCALES)

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """In the file's dtype, or float32 where that is in blocks of 8 bits. Raises ConfigError naming it if it is
        missing, unreadable or of another shape."""
        entry, dtype = self._checked(name, shape)
        value = _value(entry, dtype)
        if dtype is not CODED:
            return value
        _require_matrix(name, entry)
        scale = _value(*self._checked(name + SCALES, scale_shape(entry.shape)))
        return dequantise(Fp8Blocks(value, scale.float()))

    def fill(self, reads: Sequence[Read], progress: Progress | None = None) -> None:
        done, total = 0, sum(self.nbytes(read.name) for read in reads)

        def advance(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(min(done, total), total)

        for batch in self._batches(reads):
            targets = [self._target(read) for read in batch]
            transfer(
                [t for read, to in zip(batch, targets, strict=True) for t in self._transfers(read.name, to)], advance
            )
            for read, target in zip(batch, targets, strict=True):
                if target is not read.out:
                    put(target, read.out)

    def _batches(self, reads: Sequence[Read]) -> Iterator[list[Read]]:
        """Of as many as need MOST_ASIDE bytes beside what they fill, or one that needs more."""
        batch: list[Read] = []
        aside = 0
        for read in reads:
            size = self.nbytes(read.name) if self._is_dequantised(read) else 0
            if batch and aside + size > MOST_ASIDE:
                yield batch
                batch, aside = [], 0
            batch.append(read)
            aside += size
        if batch:
            yield batch

    def _target(self, read: Read) -> Tensor | Fp8Blocks:
        """What the file's bytes go to: `read.out`, unless they have to be dequantised, which takes their scales too."""
        if not self._is_dequantised(read):
            return read.out
        entry, _ = self._checked(read.name, read.out.data.shape)
        _require_matrix(read.name, entry)
        return empty(read.out.data.shape, CODED, read.out.data.device, fp8=True)

    def _transfers(self, name: str, target: Tensor | Fp8Blocks) -> Iterator[Transfer]:
        parts: list[tuple[str, Tensor | Fp8Blocks]] = [(name, target)]
        if isinstance(target, Fp8Blocks) and self._is_coded(name):
            parts = [(name, target.data), (name + SCALES, target.scale)]
        for part, out in parts:
            entry, dtype = self._checked(part, out.data.shape)
            yield Transfer(entry.path, entry.start, dtype, out)

    def _is_dequantised(self, read: Read) -> bool:
        return self._is_coded(read.name) and isinstance(read.out, Tensor)

    def _is_coded(self, name: str) -> bool:
        return DTYPES.get(self._entry(name).dtype) is CODED

    def _checked(self, name: str, shape: Sequence[int] | None) -> tuple[Entry, torch.dtype]:
        entry = self._entry(name)
        if shape is not None and entry.shape != tuple(shape):
            raise ConfigError(f"{entry.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)}")
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ConfigError(f"{entry.path}: tensor {name} is {entry.dtype}, which is not supported")
        if entry.end - entry.start != math.prod(entry.shape) * dtype.itemsize:
            raise ConfigError(f"{entry.path}: tensor {name} has the wrong number of bytes")
        return entry, dtype

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(f"{self.folder}: tensor {name} is missing") from None


def _read_header(path: Path) -> dict[str, Entry]:
    """A file is: length of the header as a little-endian uint64, the header (JSON), the tensors' bytes."""
    size = int.from_bytes(_read(path, 0, 8), "little")
    if size > HEADER_LIMIT:
        raise ConfigError(f"{path} is not a safetensors file")
    try:
        header: dict[str, Any] = json.loads(_read(path, 8, size))
        header.pop("__metadata__", None)
        return {name: _entry(path, 8 + size, **about) for name, about in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error!r}") from None


def _entry(path: Path, first: int, dtype: str, shape: list[int], data_offsets: list[int], **_: object) -> Entry:
    start, end = data_offsets
    if not all(type(n) is int and 0 <= n < MOST for n in (*shape, start, end)) or type(dtype) is not str:
        raise ValueError(f"a tensor of {dtype}, shape {shape}, at {data_offsets}")
    return Entry(path, dtype, tuple(shape), first + start, first + end)


def _require_matrix(name: str, entry: Entry) -> None:
    if len(entry.shape) < 2:
        raise ConfigError(f"{entry.path}: tensor {name} is {entry.dtype}, and no matrix: it has no blocks")


def _value(entry: Entry, dtype: torch.dtype) -> Tensor:
    data = _read(entry.path, entry.start, entry.end - entry.start)
    return torch.frombuffer(data, dtype=dtype).view(entry.shape) if data else torch.empty(entry.shape, dtype=dtype)


def _read(path: Path, start: int, size: int) -> bytearray:
    data = bytearray(size)
    with ExitStack() as stack:
        read_into(memoryview(data), open_file(path, stack), path, start)
    return data
