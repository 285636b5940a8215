"""The locks, each with the state that it protects. Nothing in here knows what a cache is.

Descriptors are dear, so the locks of a directory share two files, which are open once in each process. `flock` of
either is one lock (the guard, the storing lock); locks of byte ranges, which the kernel keeps apart from those, are all
others.

All of them are released by the kernel when their process dies. None is ever waited for without a deadline, and no lock
file is ever unlinked. After a fork the child closes its copies of the descriptors and never unlocks them: an unlock in
the child would release the parent's lock.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import struct
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from xzcache._errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_FIRST_PAUSE: Final = 0.0001
_LONGEST_PAUSE: Final = 0.002
_IMPATIENCE: Final = 6
_IMPATIENT_WAIT: Final = 0.05
_MOST_SEEN: Final = 4096

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

    def leave(self) -> None:
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


class WriteCounters:
    """Counters in a file that tell whether a key was written since; protects the cache from fills that began before.

    A slot is shared by the keys that hash to it: a false alarm costs one entry that is not cached. Bumps happen under
    the guard; reads need no lock.

    Parameters
    ----------
    path : str
        The file of counters.

    Notes
    -----
    One more counter, behind all slots, is raised after any of them was: while it stands still, so do they. Beside it is
    the one of `lost` writes, whose own slot could not be raised for want of room; these two have their room from the
    beginning.
    """

    SLOTS: Final = 1 << 20

    def __init__(self, path: str) -> None:
        self.fd = open_lock_file(path)
        self._seen: tuple[bytes, dict[int, int]] = (b"", {})
        if hasattr(os, "posix_fallocate"):
            with suppress(OSError):
                os.posix_fallocate(self.fd, self.SLOTS * 8, 16)

    def read(self, slot: int) -> int:
        return self._read(slot % self.SLOTS)

    def lost(self) -> int:
        """How many writes could not be counted: each may have been of any key."""
        return self._read(self.SLOTS + 1)

    def before(self, slots: Sequence[int]) -> tuple[int, ...]:
        """How many were lost, and the counts of some slots: now, or from a moment ago, where somebody just raises one.

        Most need no look at the file. Older counts are safe for whoever begins something that may only be finished
        while `read` still says the same.
        """
        totals = os.pread(self.fd, 16, self.SLOTS * 8)
        seen, counts = self._seen
        if seen != totals or len(counts) > _MOST_SEEN:
            counts = {}
            self._seen = totals, counts
        for slot in slots:
            if slot not in counts:
                counts[slot] = self.read(slot)
        return (int.from_bytes(totals[8:], "little"), *[counts[slot] for slot in slots])

    def bump(self, slot: int) -> None:
        """Count one write."""
        try:
            self._raise(slot % self.SLOTS)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._raise(self.SLOTS + 1)
        self._raise(self.SLOTS)

    def _read(self, position: int) -> int:
        raw = os.pread(self.fd, 8, position * 8)
        return int.from_bytes(raw, "little") if len(raw) == 8 else 0

    def _raise(self, position: int) -> None:
        count = (self._read(position) + 1) & 0xFFFF_FFFF_FFFF_FFFF
        os.pwrite(self.fd, count.to_bytes(8, "little"), position * 8)

    def close(self) -> None:
        os.close(self.fd)
