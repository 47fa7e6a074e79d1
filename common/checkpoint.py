"""Reading a safetensors checkpoint tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEADER_LIMIT = 100 << 20  # bytes, the format's own


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
        for path in self._paths():
            self._entries |= _read_header(path)

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def nbytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.end - entry.start

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """In the file's dtype. Raises ConfigError naming it if it is missing, unreadable or of another shape."""
        entry = self._entry(name)
        if shape is not None and entry.shape != tuple(shape):
            raise ConfigError(f"{entry.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)}")
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ConfigError(f"{entry.path}: tensor {name} is {entry.dtype}, which is not supported")
        if entry.end - entry.start != math.prod(entry.shape) * dtype.itemsize:
            raise ConfigError(f"{entry.path}: tensor {name} has the wrong number of bytes")
        data = _read(entry.path, entry.start, entry.end - entry.start)
        return torch.frombuffer(data, dtype=dtype).view(entry.shape) if data else torch.empty(entry.shape, dtype=dtype)

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(f"{self.folder}: tensor {name} is missing") from None

    def _paths(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            try:
                return [
                    self.folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
                ]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{index} is malformed: {error!r}") from None
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise ConfigError(f"{self.folder} holds no .safetensors file")
        return paths


def _read_header(path: Path) -> dict[str, Entry]:
    """A file is: length of the header as a little-endian uint64, the header (JSON), the tensors' bytes."""
    size = int.from_bytes(_read(path, 0, 8), "little")
    if size > HEADER_LIMIT:
        raise ConfigError(f"{path} is not a safetensors file")
    try:
        header: dict[str, Any] = json.loads(_read(path, 8, size))
        header.pop("__metadata__", None)
        return {
            name: Entry(path, about["dtype"], tuple(about["shape"]), *(8 + size + at for at in about["data_offsets"]))
            for name, about in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error!r}") from None


def _read(path: Path, start: int, size: int) -> bytearray:
    data = bytearray(size)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start, os.SEEK_SET)
            view, got = memoryview(data), 0
            while got < size and (count := file.readinto(view[got:])):
                got += count
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if got < size:
        raise ConfigError(f"{path} ends too early")
    return data
