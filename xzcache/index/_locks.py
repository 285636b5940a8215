"""The locks, each with the state that it protects. Nothing in here knows what a cache is.

Descriptors are dear, so the locks of a directory share two files, which are open once in each process. `flock` of
either is one lock (the guard, the storing lock); locks of byte ranges, which the kernel keeps apart from those, are all
others.

All of them are released by the kernel when their process dies. None is ever waited for without a deadline, and no lock
file is ever unlinked. After a fork the child closes its copies of the descriptors and never unlocks them: an unlock in
the child would release the parent's lock.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from xzcache.model import Busy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from xzcache.model import Span


_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_FIRST_PAUSE: Final = 0.0001
_LONGEST_PAUSE: Final = 0.002
_IMPATIENCE: Final = 6
_IMPATIENT_WAIT: Final = 0.05

_FLOCK: Final = struct.Struct("hhqqi0q")
"""``struct flock``: type, whence, start, length, pid; native alignment, padded to a multiple of 8."""
_DOOR: Final = 1 << 62
"""The byte of the door; those below are the owners'."""


def open_lock_file(path: str) -> int:
    """A descriptor of a lock file, which is made where it is not there yet."""
    return os.open(path, _FLAGS, 0o600)


def try_flock(fd: int, operation: int) -> bool:
    """Take the lock of a whole file; False while another process has it."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_range(fd: int, kind: int, offset: int, length: int = 1) -> bool:
    """Lock (`F_WRLCK`, `F_RDLCK`) or unlock (`F_UNLCK`) some bytes of a file; False while another process has them.

    Open-file-description locks where the platform has them (Linux), else POSIX locks, which serve as well because each
    file is opened once a process.
    """
    try:
        if hasattr(fcntl, "F_OFD_SETLK"):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, length, 0))
        else:
            shared = fcntl.LOCK_SH if kind == fcntl.F_RDLCK else fcntl.LOCK_EX
            operation = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else shared | fcntl.LOCK_NB
            fcntl.lockf(fd, operation, length, offset, os.SEEK_SET)
    except BlockingIOError:
        return False
    return True


def locked_range(fd: int, offset: int, length: int) -> tuple[int, int] | None:
    """Offset and end of a lock that another process has on some bytes, as far as the platform tells."""
    if not hasattr(fcntl, "F_OFD_GETLK"):
        return None
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
    kind, _, start, size, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else (start, start + size)


def is_unlocked(path: str) -> bool:
    """Whether no process has a lock on any byte of a file; True where there is no file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return lock_range(fd, fcntl.F_WRLCK, 0, 0)
    finally:
        os.close(fd)


class Guard:
    """Mutual exclusion of all threads of all processes; protects the index, and the names of entry files.

    Parameters
    ----------
    path : str
        The lock file; locked by `flock`.
    timeout : float
        Seconds to wait before `Busy` is raised. After one such failure the guard is hardly waited for, for a while, so
        that a stopped holder does not slow every read down.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.fd = open_lock_file(path)
        self._path = path
        self.timeout = timeout
        self._mutex = threading.Lock()
        self._impatient_until = 0.0
        self._kept_out = False
        self.refused_at = -math.inf
        """When another process was last seen to have the lock, by the monotonic clock."""

    def __enter__(self) -> None:
        self._acquire(None)

    @contextmanager
    def within(self, patience: float) -> Iterator[None]:
        """Hold the guard if it is to be had within so many seconds."""
        self._acquire(patience)
        try:
            yield
        finally:
            self.__exit__(None, None, None)

    def _acquire(self, patience: float | None) -> None:
        now = time.monotonic()
        patient = patience is None and now >= self._impatient_until
        wait = self.timeout if patient else min(_IMPATIENT_WAIT, self.timeout)
        deadline = now + (wait if patience is None else min(patience, wait))
        if not self._mutex.acquire(timeout=deadline - now):
            self._give_up(patient)
        pause = _FIRST_PAUSE
        try:
            while not try_flock(self.fd, fcntl.LOCK_EX):
                self.refused_at = time.monotonic()
                if time.monotonic() >= deadline:
                    self._give_up(patient)
                time.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_PAUSE)
        except BaseException:
            self._mutex.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        finally:
            self._mutex.release()

    def _give_up(self, patient: bool) -> None:
        if patient:
            self._impatient_until = time.monotonic() + _IMPATIENCE * self.timeout
        raise Busy(f"{self._path} is held by somebody else")

    def is_current(self) -> bool:
        """Whether the lock file is still the one at its path: the directory may have been removed.

        Raises
        ------
        OSError
            It cannot be told.
        """
        try:
            there = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(there, os.fstat(self.fd))

    def before_fork(self) -> bool:
        """Keep every thread out, so that the child does not inherit a guard that is held; but do not wait for long.

        Returns
        -------
        bool
            Whether no thread holds the guard.
        """
        self._kept_out = self._mutex.acquire(timeout=_IMPATIENT_WAIT)
        return self._kept_out

    def after_fork_in_parent(self) -> None:
        """Undo `before_fork`."""
        if self._kept_out:
            self._mutex.release()

    def close(self) -> None:
        os.close(self.fd)


class StoringLock:
    """Shared while a process writes an entry out of its lease, exclusive while leases are void.

    Protects the promise that a lease is spent only under the index that granted it. There are two locks: a process that
    wants to be alone shuts the door first, through which all others come, so that they cannot keep it waiting for ever.

    Parameters
    ----------
    fd : int
        The file whose `flock` is the lock.
    door : int
        The file of which one byte is the door.
    """

    def __init__(self, fd: int, door: int) -> None:
        self._fd = fd
        self._door = door
        self._mutex = threading.Lock()
        self._sharers = 0
        self._closing = False
        self._impatient_until = 0.0
        self.refused_at = -math.inf
        """When another process was last seen to be alone, by the monotonic clock."""

    def share(self, timeout: float) -> bool:
        """Join; False if somebody was alone for too long. After that, one does not wait again for a while."""
        now = time.monotonic()
        patient = now >= self._impatient_until
        if _poll(self._try_share, timeout if patient else min(_IMPATIENT_WAIT, timeout)):
            return True
        if patient:
            self._impatient_until = time.monotonic() + _IMPATIENCE * timeout
        return False

    def _try_share(self) -> bool:
        with self._mutex:
            if self._closing:
                return False
            joined = False
            if lock_range(self._door, fcntl.F_RDLCK, _DOOR):
                joined = self._sharers > 0 or try_flock(self._fd, fcntl.LOCK_SH)
                lock_range(self._door, fcntl.F_UNLCK, _DOOR)
            if not joined:
                self.refused_at = time.monotonic()
            self._sharers += joined
            return joined

    def unshare(self) -> None:
        """Undo `share`."""
        with self._mutex:
            self._sharers -= 1
            if self._sharers == 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def exclude(self, timeout: float) -> bool:
        """Keep all sharers out; False if they did not leave in time."""
        deadline = time.monotonic() + timeout
        if not _poll(self._try_close, timeout):
            return False
        alone = False
        try:
            if _poll(lambda: lock_range(self._door, fcntl.F_WRLCK, _DOOR), timeout):
                alone = _poll(self._try_alone, deadline - time.monotonic())
        finally:
            if not alone:
                self.readmit()
        return alone

    def _try_close(self) -> bool:
        with self._mutex:
            if self._closing:
                return False
            self._closing = True
            return True

    def _try_alone(self) -> bool:
        with self._mutex:
            return self._sharers == 0 and try_flock(self._fd, fcntl.LOCK_EX)

    def readmit(self) -> None:
        """Undo `exclude`."""
        with self._mutex:
            self._closing = False
            if self._sharers == 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            lock_range(self._door, fcntl.F_UNLCK, _DOOR)

    @contextmanager
    def kept_out(self, timeout: float) -> Iterator[bool]:
        """Keep the threads of this process out, and no other process; tells whether they left in time."""
        if not _poll(self._try_close, timeout):
            yield False
            return
        try:
            yield _poll(lambda: self._sharers == 0, timeout)
        finally:
            with self._mutex:
                self._closing = False


def _poll(attempt: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not attempt():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LONGEST_PAUSE)
    return True


# -- Locks of single bytes, and of spans of them: thousands of things, each with a lock of its own, in one file.

_SPANS: Final = 1 << 62
"""Where the locks of spans begin; those of single bytes lie below."""
_ROOM: Final = 1 << 40
"""Bytes of one object that have locks of their own."""
_OBJECTS: Final = (1 << 22) - 1


class ByteLocks:
    """One exclusive lock a byte; each protects whatever its number stands for.

    Threads of a process do not exclude each other here.

    Parameters
    ----------
    fd : int
        The lock file, open once in this process. The kernel searches a list for each: with a thousand locks held, to
        take and to release one takes 18 us instead of 2.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mutex = threading.Lock()
        self._held: Counter[int] = Counter()

    def try_lock(self, offset: int) -> bool:
        """Take a lock; False while another process has it. The same process may take it several times."""
        with self._mutex:
            if offset not in self._held and not lock_range(self._fd, fcntl.F_WRLCK, offset):
                return False
            self._held[offset] += 1
            return True

    def unlock(self, offset: int) -> None:
        """Undo one `try_lock`."""
        with self._mutex:
            self._held[offset] -= 1
            if self._held[offset] <= 0:
                del self._held[offset]
                self._release(offset, 1)

    def try_lock_span(self, number: int, span: Span) -> Span | None:
        """Take the lock of a span of bytes of whatever a number stands for.

        Two numbers may come to share their locks, so what is locked need not be; the same process must not take a byte
        twice.

        Returns
        -------
        (int, int) or None
            None where it was taken; else a part of the span that another process has.
        """
        offset, length, base = _offsets_of(number, span)
        if length <= 0 or lock_range(self._fd, fcntl.F_WRLCK, offset, length):
            return None
        if (taken := locked_range(self._fd, offset, length)) is None:
            # it may have been let go of meanwhile
            return span
        first, last = max(taken[0], offset), min(taken[1], offset + length)
        return (first - base, last - base) if first < last else span

    def unlock_span(self, number: int, span: Span) -> None:
        """Undo one `try_lock_span`."""
        offset, length, _ = _offsets_of(number, span)
        if length > 0:
            self._release(offset, length)

    def _release(self, offset: int, length: int) -> None:
        # in a forked child the locks are the parent's
        if self._fd >= 0:
            lock_range(self._fd, fcntl.F_UNLCK, offset, length)

    def disown(self) -> None:
        """Release nothing any more: the descriptor is about to be closed."""
        self._fd = -1


def _offsets_of(number: int, span: Span) -> tuple[int, int, int]:
    """Offset and length of what a span is locked by, and the offset of its object's first byte."""
    base = _SPANS + (number & _OBJECTS) * _ROOM
    first, last = min(span[0], _ROOM), min(span[1], _ROOM)
    # the last byte of all that can be locked is not, as its end would be none
    return base + first, min(base + last, (1 << 63) - 1) - base - first, base
