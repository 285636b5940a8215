"""Opening entry files and reading them. Plain blocking functions that know no index and no lock."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, Final, NamedTuple

import numpy as np

_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)


Signature = tuple[int, int, int]
"""Inode, time of modification in ns, size: what stays the same for as long as nobody replaces or writes a file."""


class Opened(NamedTuple):
    """A file that was found and is open: whoever holds it closes the descriptor."""

    fd: int
    size: int
    mtime_ns: int
    inode: int

    @property
    def signature(self) -> Signature:
        return self.inode, self.mtime_ns, self.size


def open_file(path: str) -> Opened | None:
    """Open a regular file; None where there is no file of that name.

    Raises
    ------
    NotADirectoryError, IsADirectoryError
        Something else is there: a file where the path has a directory, a directory, a link, a pipe.
    OSError
        Anything but absence: EIO, EACCES, EMFILE, ESTALE, ...
    """
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise IsADirectoryError(error.errno, error.strerror, path) from None
        raise
    try:
        status = os.fstat(fd)
    except OSError:
        os.close(fd)
        raise
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return Opened(fd, status.st_size, status.st_mtime_ns, status.st_ino)


def read_unchanged(path: str, signature: Signature, most: int) -> memoryview | None:
    """All of a file, if it is the one that has this signature and reading it cannot block; else None."""
    try:
        fd = os.open(path, _READ)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        size = status.st_size
        if (status.st_ino, status.st_mtime_ns, size) != signature or size > most:
            return None
        return read_resident(fd, 0, size)
    except OSError:
        return None
    finally:
        os.close(fd)


def read_unchanged_into(path: str, signature: Signature, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
    """As `read_unchanged`, into bytes that somebody has; what is there after False is undefined.

    Parameters
    ----------
    path : str
    signature : (int, int, int)
    place : ndarray of uint8
    patient : bool
        Whether the disk may be waited for.
    """
    try:
        fd = os.open(path, _READ)
    except OSError:
        return False
    try:
        status = os.fstat(fd)
        size = status.st_size
        if (status.st_ino, status.st_mtime_ns, size) != signature or size != len(place):
            return False
        return os.preadv(fd, [place], 0, 0 if patient else os.RWF_NOWAIT) == size
    except (OSError, AttributeError) as error:
        # a file system that is memory does not know the flag
        return getattr(error, "errno", None) == errno.EOPNOTSUPP and os.preadv(fd, [place], 0) == size
    finally:
        os.close(fd)


def read(fd: int, first: int, last: int) -> memoryview | None:
    """Bytes `first` up to `last` of a file; None where it turns out to be shorter."""
    data = os.pread(fd, last - first, first)
    while len(data) < last - first:
        more = os.pread(fd, last - first - len(data), first + len(data))
        if not more:
            return None
        data += more
    return memoryview(data)


def read_resident(fd: int, first: int, last: int) -> memoryview | None:
    """Bytes of a file if they are in memory, so that reading them cannot block; else None."""
    data = np.empty(last - first, dtype=np.uint8)
    try:
        if os.preadv(fd, [data], first, os.RWF_NOWAIT) != last - first:
            return None
    except AttributeError:
        return None
    except OSError as error:
        # a file system that is memory does not know the flag
        return read(fd, first, last) if error.errno == errno.EOPNOTSUPP else None
    data.flags.writeable = False
    return memoryview(data)
