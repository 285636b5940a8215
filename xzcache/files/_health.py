"""Health of the disk of a cache directory: a failing disk must not add its time-outs to every read."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from xzcache.model import Damaged, report_bug

if TYPE_CHECKING:
    from collections.abc import Callable


logger = logging.getLogger("xzcache.files")

LONG: Final = 1.0
"""Seconds that an operation may take, and that a read waits for one."""
_SPEED: Final = 20_000_000
"""Bytes per second of the slowest disk that is not taken for one that hangs."""
# a single error is the affair of one file, many in a short time are the disk's
_FAULTS: Final = 10
_WINDOW: Final = 30.0
"""So many faults within so many seconds put the cache aside."""
_FIRST_PAUSE: Final = 1.0
_POLL: Final = 0.01
_LONGEST_PAUSE: Final = 60.0
_OF_THE_DISK: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ETIMEDOUT", "ESTALE", "ENODEV", "ENOTCONN", "EREMOTEIO", "ESHUTDOWN", "EHOSTDOWN"),
        *("EHOSTUNREACH", "ENOLINK", "ENOMEDIUM", "EBADMSG", "EUCLEAN"),
    )
    if hasattr(errno, name)
)
"""Errors of a broken disk. A read-only file system is not broken: entries can be read, and no call hangs."""


def allowance(size: int) -> float:
    """Seconds that an operation on so many bytes may take."""
    return LONG + size / _SPEED


class Health:
    """The health of the disk of one cache directory, as one process observes it. Safe for threads.

    While the disk is healthy, every operation uses the directory. Many errors in a short time, or one slow operation,
    put the directory aside: reads skip it and nothing is published. A thread then probes the disk with increasing
    pauses, and the first successful probe ends that. The first probe after a slow operation follows without a pause,
    because the machine may only have been busy.

    `probe` exercises the disk. `retry_pending` retries pending invalidations before the directory is used again, and
    returns whether all are done. A hit checks only `is_aside`.
    """

    def __init__(self, root: str, probe: Callable[[], None], retry_pending: Callable[[], bool]) -> None:
        self.is_aside = False
        self._root = root
        self._probe = probe
        self._retry_pending = retry_pending
        self._lock = threading.Lock()
        self._faults: deque[float] = deque(maxlen=_FAULTS)
        self._pause = _FIRST_PAUSE
        self._since = 0.0
        self._back_at = -_LONGEST_PAUSE
        self._reason = ""
        self._has_logged = False
        self._ends = threading.Event()
        self._latest = time.monotonic()

    # -- observing the disk

    def record_progress(self) -> None:
        """Record that an operation on the disk ended: other slow operations may only wait for their turn."""
        self._latest = time.monotonic()

    @property
    def makes_progress(self) -> bool:
        """Whether an operation ended less than a moment ago."""
        return time.monotonic() - self._latest < LONG

    def record_fault(self, error: BaseException) -> None:
        """Count an error, if it is one of the disk."""
        # operations that began before fail one after another; they say nothing new
        if self.is_aside or not is_of_the_disk(error):
            return
        now = time.monotonic()
        with self._lock:
            self._faults.append(now)
            is_too_much = len(self._faults) == _FAULTS and now - self._faults[0] <= _WINDOW
        if is_too_much:
            self._put_aside(f"{_FAULTS} errors, the last one: {error}", is_certain=True)

    def record_slow(self, what: str) -> None:
        """Record that an operation takes, or took, too long."""
        self._put_aside(what, is_certain=False)

    # -- aside, and back

    def _put_aside(self, reason: str, *, is_certain: bool) -> None:
        with self._lock:
            if self.is_aside:
                return
            self.is_aside = True
            self._faults.clear()
            self._since = time.monotonic()
            self._reason, self._has_logged = reason, False
            # a disk that fails again soon after it came back gets the longer pauses of before
            was_well = self._since - self._back_at >= _LONGEST_PAUSE
            self._pause = _FIRST_PAUSE if was_well else min(2 * self._pause, _LONGEST_PAUSE)
            ends = self._ends = threading.Event()
        # a slow operation may only mean a busy machine, so it is logged if the first probe fails as well
        if is_certain:
            self._log_aside()
        pause = 0.0 if was_well and not is_certain else self._pause
        # a daemon thread of its own: the threads of the pool may all hang at the disk
        thread = threading.Thread(target=self._probe_on, args=(pause, ends), name="xzcache-probe", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # at the end of the process the cache stays aside
            logger.debug("no thread to probe the disk of %s: %s", self._root, error)

    def log_if_long(self) -> None:
        """Log that the directory is aside, if it has been for a while, and that was not logged."""
        if not self._has_logged and time.monotonic() - self._since > LONG:
            self._log_aside()

    def _log_aside(self) -> None:
        with self._lock:
            if self._has_logged or not self.is_aside:
                return
            self._has_logged = True
        logger.warning("the cache in %s is put aside, reads go to the source: %s", self._root, self._reason)

    def _probe_on(self, pause: float, ends: threading.Event) -> None:
        count = 0
        while not ends.wait(pause):
            count += 1
            if self._is_well():
                # before anything is served: these keys were written while the cache was aside
                is_done = self._retry_safely()
                self._come_back(ends, count)
                if not is_done:
                    logger.debug("the cache in %s still has pending invalidations", self._root)
                return
            self._log_aside()
            pause = self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _is_well(self) -> bool:
        began = time.monotonic()
        try:
            self._probe()
        except Exception as error:
            if is_of_the_disk(error):
                logger.debug("the disk of %s is not healthy: %s", self._root, error)
                return False
            # other errors are reported by the operations that use the directory
            report_bug(error, f"the cache in {self._root}")
        return time.monotonic() - began <= LONG

    def _retry_safely(self) -> bool:
        try:
            return self._retry_pending()
        except Exception as error:
            report_bug(error, f"the cache in {self._root}")
            return False

    def _come_back(self, ends: threading.Event, count: int) -> None:
        with self._lock:
            # `rest` has ended this probe meanwhile
            if self._ends is not ends:
                return
            now = self._back_at = self._latest = time.monotonic()
            self.is_aside = False
        if self._has_logged:
            logger.info(
                "the cache in %s is used again, after %.1f s and %d probes", self._root, now - self._since, count
            )

    def comes_back(self, patience: float) -> bool:
        """Whether the directory is healthy, now or within so many seconds."""
        end = time.monotonic() + patience
        while self.is_aside and time.monotonic() < end:
            time.sleep(_POLL)
        return not self.is_aside

    def rest(self) -> None:
        """Stop probing and reset to healthy, because the directory is closed."""
        with self._lock:
            self._ends.set()
            self._ends = threading.Event()
            self.is_aside = False


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an exception or its cause is a failure of the disk, not a missing file, a full disk or a lock."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OF_THE_DISK:
            return True
        if isinstance(cause, Damaged) and not cause.is_certain:
            return True
        if isinstance(cause, sqlite3.Error) and (getattr(cause, "sqlite_errorname", None) or "").startswith(
            "SQLITE_IOERR"
        ):
            return True
        cause = cause.__cause__
    return False
