"""Device memory that processes share, and host memory that kernels read, through the CUDA runtime that torch loaded.

Plain cudaMalloc: the memory of torch's allocator may lie in segments that have no IPC handle, and a handle names a
whole allocation. Whoever opened a peer's memory closes it before its owner frees it; no tensor may be used after that.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

_GRANULE = 2 << 20  # smaller allocations share a block, and a handle would share the neighbours too
_LAZY_PEER_ACCESS, _PORTABLE, _MAPPED = 1, 1, 2
HANDLE_BYTES = 64


class CudaError(RuntimeError):
    """A call of the CUDA runtime that failed; the sentence names it and the reason."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class _Array:
    """What torch.as_tensor takes for a piece of device memory."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


class DeviceMemory:
    """`owned`: allocated here, else opened from another process."""

    def __init__(self, address: int, size: int, device: int, owned: bool) -> None:
        self.address, self.size = address, size
        self._device, self._owned = device, owned

    @classmethod
    def allocate(cls, size: int, device: int = 0) -> DeviceMemory:
        """The contents are undefined."""
        pointer = ctypes.c_void_p()
        whole = -(-size // _GRANULE) * _GRANULE
        _call(device, "cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(whole))
        return cls(_address(pointer), size, device, owned=True)

    @classmethod
    def open(cls, handle: bytes, size: int, device: int = 0) -> DeviceMemory:
        """The memory of another process on this node; `device` is the one that will reach it."""
        if len(handle) != HANDLE_BYTES:
            raise ValueError(f"an IPC handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        pointer = ctypes.c_void_p()
        given = _Handle.from_buffer_copy(handle)
        _call(device, "cudaIpcOpenMemHandle", ctypes.byref(pointer), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return cls(_address(pointer), size, device, owned=False)

    def handle(self) -> bytes:
        """For `open` in other processes. It names the whole allocation, so there is no offset to send."""
        if not self._owned:
            raise ValueError("only the process that allocated memory can hand it on")
        handle = _Handle()
        _call(self._device, "cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(self.address))
        return bytes(handle)

    def tensor(self) -> Tensor:
        """uint8 [size], in place."""
        return torch.as_tensor(_Array(self.address, self.size), device=torch.device("cuda", self._device))

    def close(self) -> None:
        """Once; waits for the device first, since a kernel under way may use the memory."""
        if not self.address:
            return
        torch.cuda.synchronize(self._device)
        _call(self._device, "cudaFree" if self._owned else "cudaIpcCloseMemHandle", ctypes.c_void_p(self.address))
        self.address = 0


class HostWords:
    """int32 words in host memory that kernels read: what a host sets to end a wait, whatever the device is doing."""

    def __init__(self, count: int, device: int = 0) -> None:
        pointer, seen = ctypes.c_void_p(), ctypes.c_void_p()
        size = ctypes.c_size_t(4 * count)
        _call(device, "cudaHostAlloc", ctypes.byref(pointer), size, ctypes.c_uint(_PORTABLE | _MAPPED))
        self._device, self._pointer = device, pointer
        _call(device, "cudaHostGetDevicePointer", ctypes.byref(seen), pointer, ctypes.c_uint(0))
        self._seen = _address(seen)
        self._words = (ctypes.c_int32 * count).from_address(_address(pointer))
        ctypes.memset(self._words, 0, 4 * count)

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value  # an aligned store: a kernel sees all of it or nothing

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def address(self, index: int) -> int:
        """As kernels know it."""
        if not 0 <= index < len(self._words):
            raise IndexError(f"word {index} of {len(self._words)}")
        return self._seen + 4 * index

    def close(self) -> None:
        if self._pointer:
            torch.cuda.synchronize(self._device)
            _call(self._device, "cudaFreeHost", self._pointer)
            self._pointer = ctypes.c_void_p()


@cache
def _runtime() -> ctypes.CDLL:
    if torch.version.cuda is None:
        raise CudaError("this torch has no CUDA runtime, so there is no memory to share between processes")
    torch.cuda.init()
    # By its soname: the one that torch has loaded, with torch's contexts, and not another copy.
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime


def _call(device: int, name: str, *arguments: object) -> None:
    runtime = _runtime()
    with torch.cuda.device(device):
        code = getattr(runtime, name)(*arguments)
    if code:
        runtime.cudaGetLastError()  # else torch's next launch would report it as its own
        reason = runtime.cudaGetErrorString(code).decode()
        raise CudaError(f"{name} failed on GPU {device}: {reason} (error {code})")


def _address(pointer: ctypes.c_void_p) -> int:
    assert pointer.value is not None
    return pointer.value
