"""The locks, each with the state that it protects. Nothing in here knows what a cache is.

All of them are released by the kernel when their process dies. None is ever waited for without a deadline, and no lock
file is ever unlinked. After a fork the child closes its copies of the descriptors and never unlocks them: an unlock in
the child would release the parent's lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xzcache._errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_FIRST_PAUSE: Final = 0.0001
_LONGEST_PAUSE: Final = 0.002
_IMPATIENCE: Final = 6
_IMPATIENT_WAIT: Final = 0.05
_MOST_SEEN: Final = 4096


def open_lock_file(path: str) -> int:
    """A descriptor of a lock file, which is made where it is not there yet."""
    return os.open(path, _FLAGS, 0o600)


def _flock(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Guard:
    """Mutual exclusion of all threads of all processes; protects the index, and the names of entry files.

    Parameters
    ----------
    path : str
        The lock file.
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

    def __enter__(self) -> None:
        now = time.monotonic()
        patient = now >= self._impatient_until
        deadline = now + (self.timeout if patient else min(_IMPATIENT_WAIT, self.timeout))
        if not self._mutex.acquire(timeout=deadline - now):
            self._give_up(patient)
        pause = _FIRST_PAUSE
        try:
            while not _flock(self.fd, fcntl.LOCK_EX):
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

    def before_fork(self) -> None:
        """Keep every thread out, so that the child does not inherit a guard that is held; but do not wait for long."""
        self._kept_out = self._mutex.acquire(timeout=_IMPATIENT_WAIT)

    def after_fork_in_parent(self) -> None:
        """Undo `before_fork`."""
        if self._kept_out:
            self._mutex.release()

    def close(self) -> None:
        os.close(self.fd)


class StoringLock:
    """Shared while a process writes an entry out of its lease, exclusive while leases are void.

    Protects the promise that a lease is spent only under the index that granted it. Two files: whoever wants to be
    alone shuts the door first, through which all others come, so that they cannot keep him waiting for ever.

    Parameters
    ----------
    path, door : str
        The lock files.
    """

    def __init__(self, path: str, door: str) -> None:
        self._fd = open_lock_file(path)
        self._door = open_lock_file(door)
        self._mutex = threading.Lock()
        self._sharers = 0
        self._closing = False
        self._impatient_until = 0.0

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
            if self._closing or not _flock(self._door, fcntl.LOCK_SH):
                return False
            joined = self._sharers > 0 or _flock(self._fd, fcntl.LOCK_SH)
            fcntl.flock(self._door, fcntl.LOCK_UN)
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
            if _poll(lambda: _flock(self._door, fcntl.LOCK_EX), timeout):
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
            return self._sharers == 0 and _flock(self._fd, fcntl.LOCK_EX)

    def readmit(self) -> None:
        """Undo `exclude`."""
        with self._mutex:
            self._closing = False
            if self._sharers == 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            fcntl.flock(self._door, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._door)


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
        self._fd = open_lock_file(path)
        self._seen: tuple[bytes, dict[int, int]] = (b"", {})
        if hasattr(os, "posix_fallocate"):
            with suppress(OSError):
                os.posix_fallocate(self._fd, self.SLOTS * 8, 16)

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
        totals = os.pread(self._fd, 16, self.SLOTS * 8)
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
        raw = os.pread(self._fd, 8, position * 8)
        return int.from_bytes(raw, "little") if len(raw) == 8 else 0

    def _raise(self, position: int) -> None:
        count = (self._read(position) + 1) & 0xFFFF_FFFF_FFFF_FFFF
        os.pwrite(self._fd, count.to_bytes(8, "little"), position * 8)

    def close(self) -> None:
        os.close(self._fd)
