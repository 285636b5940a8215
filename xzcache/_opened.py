"""The one way to the files of entries: opening, reading and closing them.

Plain blocking functions that know no index and no lock. Every system call that fails, the closing of a file included,
is either absence, or an `OSError` that is raised or handed to `trouble`; a descriptor is closed whatever happens.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from xzcache._disk import user

_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
_NO_FLAG: Final = (errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that does not know `RWF_NOWAIT`, and a kernel that does not."""
_IN_THE_WAY: Final = (errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR)
"""Where an entry's file would be, there is something that is no file: a directory, a link, a pipe."""

Signature = tuple[int, int, int]
"""Inode, time of modification in ns, size: what stays the same for as long as nobody replaces or writes a file."""

Trouble = Callable[[BaseException], None]
"""Gets each exception that is not absence."""


_user = user()


def is_ours(owner: int) -> bool:
    """Whether a file that belongs to `owner` belongs to this user."""
    global _user
    if owner == _user or _user == -1:
        return True
    # a process may have changed its user since: that costs a system call only where an owner is another one
    _user = user()
    return owner == _user


def let_go(fd: int, trouble: Trouble) -> None:
    """Close a descriptor. What was read is right even where that fails, and the descriptor is gone in any case."""
    try:
        os.close(fd)
    except OSError as error:
        trouble(error)


class Opened:
    """An open file, which is closed with `close`, or with the last reference to it.

    Attributes
    ----------
    fd : int
    size : int
    mtime_ns : int
    signature : Signature
    is_ours : bool
        Whether the file belongs to this user.
    """

    __slots__ = ("_trouble", "fd", "is_ours", "mtime_ns", "signature", "size")

    def __init__(self, fd: int, status: os.stat_result, trouble: Trouble) -> None:
        self.fd = fd
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self.signature: Signature = (status.st_ino, self.mtime_ns, self.size)
        self.is_ours = is_ours(status.st_uid)
        self._trouble = trouble

    def close(self) -> None:
        """Close the file; once is enough."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            let_go(fd, self._trouble)

    __del__ = close


def open_file(path: str, trouble: Trouble) -> Opened | None:
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
        if not stat.S_ISREG(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    except BaseException:
        let_go(fd, trouble)
        raise
    return Opened(fd, status, trouble)


def read_unchanged(path: str, signature: Signature, most: int, trouble: Trouble) -> memoryview | None:
    """All of a file, if it is the one that has this signature and reading it cannot block; else None."""
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            trouble(error)
        return None
    try:
        status = os.fstat(fd)
        size = status.st_size
        if (status.st_ino, status.st_mtime_ns, size) != signature or size > most:
            return None
        if status.st_uid != _user and not is_ours(status.st_uid):
            return None
        return read_resident(fd, 0, size)
    except OSError as error:
        trouble(error)
        return None
    finally:
        # as `let_go`, in which a call would be felt
        try:
            os.close(fd)
        except OSError as error:
            trouble(error)


def read_unchanged_into(
    path: str, signature: Signature, place: np.ndarray[Any, Any], trouble: Trouble, *, patient: bool
) -> bool:
    """As `read_unchanged`, into an array of bytes; what is there after False is undefined.

    Parameters
    ----------
    path : str
    signature : (int, int, int)
    place : ndarray of uint8
    trouble : callable
    patient : bool
        Whether the disk may be waited for.
    """
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            trouble(error)
        return False
    try:
        status = os.fstat(fd)
        size = status.st_size
        if (status.st_ino, status.st_mtime_ns, size) != signature or size != len(place):
            return False
        if status.st_uid != _user and not is_ours(status.st_uid):
            return False
        return _fill(fd, place, 0, patient=patient)
    except OSError as error:
        trouble(error)
        return False
    finally:
        let_go(fd, trouble)


def _fill(fd: int, place: np.ndarray[Any, Any], first: int, *, patient: bool) -> bool:
    """Read bytes of a file from `first` on, as many as `place` has; False where they are not to be had like that.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    try:
        count = os.preadv(fd, [place], first, 0 if patient else os.RWF_NOWAIT)
        if count == len(place) or not patient:
            return count == len(place)
    except BlockingIOError:
        return False
    except AttributeError:
        # this platform has no such call, or cannot say that it must not block
        if not patient:
            return False
    except OSError as error:
        # a file system that is memory may not know the flag, and never blocks
        if error.errno not in _NO_FLAG:
            raise
    data = read(fd, first, first + len(place))
    if data is None:
        return False
    place[:] = np.frombuffer(data, dtype=np.uint8)
    return True


def read(fd: int, first: int, last: int) -> memoryview | None:
    """Bytes `first` up to `last` of a file; None where it turns out to be shorter.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    data = os.pread(fd, last - first, first)
    while len(data) < last - first:
        more = os.pread(fd, last - first - len(data), first + len(data))
        if not more:
            return None
        data += more
    return memoryview(data)


def read_resident(fd: int, first: int, last: int) -> memoryview | None:
    """Bytes of a file if they are in memory, so that reading them cannot block; else None.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    data = np.empty(last - first, dtype=np.uint8)
    if not _fill(fd, data, first, patient=False):
        return None
    data.flags.writeable = False
    return memoryview(data)
