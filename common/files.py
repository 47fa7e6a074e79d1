"""Small files that people change while we run."""

from __future__ import annotations

import errno
import os
import stat


def read_small(path: str | os.PathLike[str], most: int) -> tuple[os.stat_result, bytes]:
    """The file as it was when the reading began, and at most one byte more than `most`, which shows that it is too
    large. Raises OSError, also for what is no regular file: a FIFO may keep whoever opens it waiting for good."""
    found = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(found)
        if stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        data = b""
        while len(data) <= most and (more := os.read(found, most + 1 - len(data))):
            data += more
        return state, data
    finally:
        os.close(found)
