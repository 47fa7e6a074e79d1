"""A futex word in shared memory: what a receiver sleeps on and its senders ring.

A receiver has one word. A sender makes its data visible, then rings; the receiver reads the word, looks for work, and
sleeps only while the word still has the value it read, so that no ring is lost:

    seen = bell.value()
    if not find_work():
        bell.wait(seen, timeout)
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_STRONG_STORES = platform.machine() == "x86_64"
_WAIT, _WAKE_OP = 0, 5
_ADD_ONE = 1 << 28 | 1 << 12  # FUTEX_OP(ADD, 1, CMP_EQ, 0): the second wake never matters, both words are one

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
# Called with the interpreter held: given up for this moment, it goes to the event loop, and comes back late.
_quick_syscall = ctypes.PyDLL(None).syscall
_quick_syscall.restype = ctypes.c_long


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class Bell:
    """A futex word at the start of a memfd; `fd` is what a sender needs to ring it."""

    def __init__(self, fd: int) -> None:
        """Takes the file descriptor over."""
        if _SYS_FUTEX is None:
            raise OSError(errno.ENOSYS, f"no futex on {platform.machine()}")
        self.fd = fd
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)
        self._word = ctypes.c_uint32.from_buffer(self._memory)
        address = ctypes.c_void_p(ctypes.addressof(self._word))
        number, one = ctypes.c_long(_SYS_FUTEX), ctypes.c_uint32(1)
        self._timeout = _Timespec()
        # Built once: converting the arguments costs as much as the system call.
        self._ring = (number, address, ctypes.c_int(_WAKE_OP), one, ctypes.c_long(0), address, ctypes.c_int(_ADD_ONE))
        self._wait = (number, address, ctypes.c_int(_WAIT)), ctypes.byref(self._timeout)

    @classmethod
    def create(cls, name: str) -> Bell:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        return cls(fd)

    def value(self) -> int:
        return self._word.value

    def ring(self) -> None:
        """Add one to the word, in the kernel and so atomically between processes, and wake who waits on it."""
        _quick_syscall(*self._ring)

    def wait(self, seen: int, timeout: float) -> None:
        """Sleep while the word is `seen`, at most `timeout` seconds; may return early. One thread waits on a Bell."""
        whole = int(timeout)
        self._timeout.sec, self._timeout.nsec = whole, int((timeout - whole) * 1e9)
        head, limit = self._wait
        _syscall(*head, ctypes.c_uint32(seen), limit)

    def close_fd(self) -> None:
        """The mapping lives on for as long as this object."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_fence_bell: Bell | None = None


def fence() -> None:
    """What was stored before is seen before what is stored after, and what is loaded after is loaded after.

    x86 keeps both orders by itself; elsewhere a futex operation is a full barrier.
    """
    global _fence_bell
    if _STRONG_STORES:
        return
    if _fence_bell is None:
        _fence_bell = Bell.create("moecule-fence")
    _fence_bell.ring()
