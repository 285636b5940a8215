"""The locks between processes, each with the state that it protects.

Descriptors are scarce, so all locks of a directory share two files, each open once in a process. The `flock` of each
file is one lock (the guard and the storing lock). All others are byte range locks, which the kernel keeps separate.

The kernel releases every lock when its process dies. Every wait has a deadline, and no lock file is ever unlinked. A
forked child closes its copies of the descriptors and never unlocks them: an unlock in the child would release the
parent's lock.
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
# guards are held for some 0.1 ms: short pauses first, and longer ones when many processes wait
_FIRST_PAUSE: Final = 0.0001
_LONGEST_PAUSE: Final = 0.002
# after one failure, for so many times the timeout, each attempt waits only for a moment
_IMPATIENCE: Final = 6
_IMPATIENT_WAIT: Final = 0.05

_FLOCK: Final = struct.Struct("hhqqi0q")
"""``struct flock``: type, whence, start, length, pid; native alignment, padded to a multiple of 8."""
_DOOR: Final = 1 << 62
"""The byte of the door lock; the bytes below it are the owners' locks."""
_NEXT: Final = _DOOR + 1
"""The byte of the process that gets the guard next."""
_SHORTEST_PAUSE: Final = 0.00005
_JUST_NOW: Final = 0.005
"""Seconds after it has had the guard in which a process lets others go first."""
_COURTESY: Final = 0.02
"""The most seconds for which it waits for them."""


def open_lock_file(path: str) -> int:
    """Open a lock file, creating it if it does not exist."""
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
        # POSIX locks belong to the process: closing any other descriptor of the file would release them
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
    """Offset and end of another process's lock within some bytes; None if the platform cannot report it."""
    if not hasattr(fcntl, "F_OFD_GETLK"):
        return None
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
    kind, _, start, size, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else (start, start + size)


def is_range_locked(fd: int, offset: int, length: int) -> bool:
    """Whether another process has a lock on any of some bytes."""
    if hasattr(fcntl, "F_OFD_GETLK"):
        return locked_range(fd, offset, length) is not None
    if not lock_range(fd, fcntl.F_WRLCK, offset, length):
        return True
    lock_range(fd, fcntl.F_UNLCK, offset, length)
    return False


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


def let_the_next_go_first(fd: int, patience: float = _COURTESY) -> bool:
    """Wait while a process is next to get the guard, whose file is open; False if that takes long."""
    deadline, pause = time.monotonic() + patience, _SHORTEST_PAUSE
    while locked_range(fd, _NEXT, 1) is not None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)
    return True


class Guard:
    """Mutual exclusion of all threads of all processes; protects the index and the names of entry files.

    Locked by the `flock` of the file at `path`. After `timeout` seconds `Busy` is raised. For a while after such a
    failure the wait is much shorter, so that a stopped holder does not slow down every read.

    The lock is polled, so a process that takes it again and again would leave the others only moments to get it. Of the
    processes that wait, one holds a second lock, `_NEXT`, and polls in short intervals. A process that has just had the
    guard lets that one go first. It waits for a short time only, because the next process may be stopped.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.fd = open_lock_file(path)
        status = os.fstat(self.fd)
        self.identity = status.st_dev, status.st_ino
        self._path = path
        self.timeout = timeout
        self._mutex = threading.Lock()
        self.impatient_until = 0.0
        self._kept_out = False
        self._left_at = self._discourteous_until = -math.inf
        self.refused_at = -math.inf
        """When another process was last found to hold the lock, by the monotonic clock."""

    def __enter__(self) -> None:
        self._acquire(None)

    @contextmanager
    def within(self, patience: float) -> Iterator[None]:
        """Hold the guard; raise `Busy` if that takes more than some seconds."""
        self._acquire(patience)
        try:
            yield
        finally:
            self.__exit__(None, None, None)

    def _acquire(self, patience: float | None) -> None:
        now = time.monotonic()
        patient = patience is None and now >= self.impatient_until
        wait = self.timeout if patient else min(_IMPATIENT_WAIT, self.timeout)
        deadline = now + (wait if patience is None else min(patience, wait))
        # first the threads of this process: `flock` does not exclude them, as they share the descriptor
        if not self._mutex.acquire(timeout=deadline - now):
            self._give_up(patient)
        try:
            self._take(deadline, patient)
        except BaseException:
            self._mutex.release()
            raise

    def _take(self, deadline: float, patient: bool) -> None:
        now = time.monotonic()
        if now - self._left_at < _JUST_NOW and now >= self._discourteous_until:
            patience = min(deadline - now, _COURTESY)
            if not let_the_next_go_first(self.fd, patience):
                # many processes wait, or the next one is stopped: for a while, this process waits as they do
                self._discourteous_until = now + 10 * _COURTESY
        is_next, pause = False, _FIRST_PAUSE
        try:
            # polled, since a blocking `flock` has no timeout, and a stopped process may hold the lock
            while not try_flock(self.fd, fcntl.LOCK_EX):
                self.refused_at = time.monotonic()
                if self.refused_at >= deadline:
                    self._give_up(patient)
                is_next = is_next or lock_range(self.fd, fcntl.F_WRLCK, _NEXT)
                time.sleep(_FIRST_PAUSE if is_next else pause)
                pause = min(pause * 1.5, _LONGEST_PAUSE)
        finally:
            if is_next:
                lock_range(self.fd, fcntl.F_UNLCK, _NEXT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            self._left_at = time.monotonic()
        finally:
            self._mutex.release()

    def _give_up(self, patient: bool) -> None:
        if patient:
            self.impatient_until = time.monotonic() + _IMPATIENCE * self.timeout
        raise Busy(f"{self._path} is held by another process")

    def is_current(self) -> bool:
        """Whether the lock file is still the one at its path: the directory may have been removed. Raises `OSError`."""
        try:
            # by path: a lock on an unlinked file excludes no process
            there = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (there.st_dev, there.st_ino) == self.identity

    def before_fork(self) -> bool:
        """Block all threads from the guard before a fork; returns False if a thread held it for too long."""
        # not for long: a fork must not hang because a disk does
        self._kept_out = self._mutex.acquire(timeout=_IMPATIENT_WAIT)
        return self._kept_out

    def after_fork_in_parent(self) -> None:
        """Undo `before_fork`."""
        if self._kept_out:
            self._mutex.release()

    def close(self) -> None:
        os.close(self.fd)


class StoringLock:
    """Shared while a process writes an entry out of its lease; exclusive while leases are revoked.

    Protects the rule that a lease is spent only under the index that granted it. There are two locks: a process that
    needs exclusive access first closes the door, a byte of the file `door` that all others must pass. So it cannot
    starve.
    """

    def __init__(self, fd: int, door: int) -> None:
        self._fd = fd
        self._door = door
        self._mutex = threading.Lock()
        self._sharers = 0
        self._closing = False
        self._impatient_until = 0.0
        self.refused_at = -math.inf
        """When another process was last found to hold the lock, by the monotonic clock."""
        self._resigned_until = 0.0

    def share(self, timeout: float) -> bool:
        """Join the sharers; False on a timeout, after which the next waits are much shorter for a while."""
        now = time.monotonic()
        patient = now >= self._impatient_until
        if self._try_share() or _poll(self._try_share, timeout if patient else min(_IMPATIENT_WAIT, timeout)):
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
                # the first thread takes the lock for all threads of the process, and the last one releases it
                joined = self._sharers > 0 or try_flock(self._fd, fcntl.LOCK_SH)
                # only passed, not held: the door must stand open for the next process that wants to close it
                lock_range(self._door, fcntl.F_UNLCK, _DOOR)
            self._sharers += joined
            return self._unless_refused(joined)

    def unshare(self) -> None:
        """Undo `share`."""
        with self._mutex:
            self._sharers -= 1
            if self._sharers == 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def exclude(self, timeout: float) -> bool:
        """Keep all sharers out; False if they did not leave in time, after which the next waits are much shorter."""
        if time.monotonic() >= self._resigned_until:
            alone = self._exclude(timeout)
            if not alone:
                self._resigned_until = time.monotonic() + _IMPATIENCE * timeout
            return alone
        return self._exclude(min(_IMPATIENT_WAIT, timeout))

    def _exclude(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        # threads of this process are kept out by the flag, because the kernel's locks are those of the process
        if not _poll(self._try_close, timeout):
            return False
        alone = False
        try:
            if _poll(self._try_door, timeout):
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

    def _try_door(self) -> bool:
        return self._unless_refused(lock_range(self._door, fcntl.F_WRLCK, _DOOR))

    def _try_alone(self) -> bool:
        with self._mutex:
            return self._sharers == 0 and self._unless_refused(try_flock(self._fd, fcntl.LOCK_EX))

    def _unless_refused(self, locked: bool) -> bool:
        if not locked:
            self.refused_at = time.monotonic()
        return locked

    def readmit(self) -> None:
        """Undo `exclude`."""
        with self._mutex:
            self._closing = False
            if self._sharers == 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            lock_range(self._door, fcntl.F_UNLCK, _DOOR)

    @contextmanager
    def kept_out(self, timeout: float) -> Iterator[bool]:
        """Exclude the other threads of this process, but no other process; yields whether they left in time."""
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
"""The first byte of the span locks; the locks of single bytes lie below."""
_ROOM: Final = 1 << 40
"""The bytes of one object that can be locked separately."""
_OBJECTS: Final = (1 << 22) - 1


class ByteLocks:
    """One exclusive lock for each byte of a file; threads of one process do not exclude each other.

    The kernel searches a list of locks: with 1,000 locks held, a lock and unlock takes 18 us instead of 2.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mutex = threading.Lock()
        self._held: Counter[int] = Counter()

    def try_lock(self, offset: int) -> bool:
        """Take a lock; False while another process has it. The same process may take it several times."""
        with self._mutex:
            # the kernel grants a lock to its holder again, but forgets it at the first unlock: so it is counted here
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

    def try_lock_span(self, number: int, span: Span, *, exactly: bool = True) -> Span | None:
        """Lock a span of bytes of the object with this number; returns a part that another process holds, or None.

        Without `exactly`, the span is returned for the part, which saves a system call. Two objects may share their
        locks, so a refusal can be a false alarm. A process must not lock the same byte twice.
        """
        offset, length, base = _offsets_of(number, span)
        if length <= 0 or lock_range(self._fd, fcntl.F_WRLCK, offset, length):
            return None
        if not exactly or (taken := locked_range(self._fd, offset, length)) is None:
            # the lock may have been released meanwhile
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
        """Stop releasing locks: the descriptor is about to be closed."""
        self._fd = -1


def _offsets_of(number: int, span: Span) -> tuple[int, int, int]:
    """Offset and length of the lock of a span, and the offset of the first byte of its object."""
    base = _SPANS + (number & _OBJECTS) * _ROOM
    first, last = min(span[0], _ROOM), min(span[1], _ROOM)
    # the last possible byte cannot be locked, because its end would overflow
    return base + first, min(base + last, (1 << 63) - 1) - base - first, base


def locked_objects(path: str) -> int | None:
    """How many objects have a span locked in a file of `ByteLocks`, by any process; None if the system hides it."""
    try:
        inode = os.stat(path).st_ino
        with open("/proc/locks") as file:
            rows = [line.split() for line in file]
    except OSError:
        return None
    # a row that waits for a lock has an arrow; a device may have another number there than in `stat`
    held = [int(row[6]) for row in rows if row[1] in ("OFDLCK", "POSIX") and row[5].rpartition(":")[2] == str(inode)]
    return len({(start - _SPANS) // _ROOM for start in held if start >= _SPANS})
