"""Whether it is worth to ask other nodes: how long they take, and how long the source does.

State: the times of answers and the nodes that do not answer, which all event loops share under a mutex.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from statistics import median
from typing import Final, NamedTuple

from xzcache._fork import renew_after_fork
from xzcache.dask._peering import Latest

_SOME: Final = 16
"""The latest answers that tell whether it is worth to ask."""
_PAUSES: Final = (1.0, 60.0)
"""The shortest and the longest time, in seconds, for which a node that is slow is not asked."""
_SOURCES: Final = 256
_WORKERS: Final = 4096


class _Pace:
    """Whether it is worth to ask: how long the source takes, and how much longer or shorter other nodes take."""

    def __init__(self) -> None:
        self._source: float | None = None
        self._deviation = 0.0
        # the median of some, as the first answers of a process that has just started are slow
        self._answers: deque[float] = deque(maxlen=_SOME)
        self._pause = _PAUSES[0]
        self._until = 0.0

    def source_took(self, seconds: float) -> None:
        if self._source is None:
            self._source, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self._source) - self._deviation) / 4
            self._source += (seconds - self._source) / 8

    def peer_took(self, seconds: float) -> None:
        """Record what an answer took beyond the owner's own request to the source."""
        self._answers.append(seconds)
        if self._source is None or len(self._answers) < _SOME or not self.is_worth_it:
            return
        if median(tuple(self._answers)) > self._source:
            self._until = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _PAUSES[1])
            # the next answers decide
            self._answers.clear()
        else:
            self._pause = _PAUSES[0]

    @property
    def is_worth_it(self) -> bool:
        return time.monotonic() >= self._until

    @property
    def usual(self) -> float | None:
        """The seconds within which the source usually answers."""
        return None if self._source is None else self._source + 4 * self._deviation


class _Silence(NamedTuple):
    """A node that does not answer."""

    since: float
    """When that was last found, by `time.monotonic`."""
    until: float
    """Until when it is not asked."""
    pause: float


class Worth:
    """Whom to ask, as the latest answers tell."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._paces: Latest[str, _Pace] = Latest(_SOURCES)
        self._silences: Latest[str, _Silence] = Latest(_WORKERS)
        """For the addresses that did not answer the last question."""
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Another thread may have held the mutex."""
        self._mutex = threading.Lock()

    def may_ask(self, namespace: str) -> bool:
        """Whether other nodes are faster than this source."""
        with self._mutex:
            pace = self._paces.get(namespace)
            return pace is None or pace.is_worth_it

    def may_be_asked(self, address: str) -> bool:
        """Whether a worker is not left alone for a while."""
        with self._mutex:
            silence = self._silences.get(address)
        return silence is None or time.monotonic() >= silence.until

    def usual(self, namespace: str) -> float | None:
        """The seconds within which a source usually answers; None if that is unknown."""
        with self._mutex:
            pace = self._paces.get(namespace)
            return None if pace is None else pace.usual

    def source_took(self, namespace: str, seconds: float) -> None:
        """Record how long the source took to answer."""
        with self._mutex:
            self._pace(namespace).source_took(seconds)

    def peer_took(self, namespace: str, seconds: float) -> None:
        """Record what an answer took beyond the owner's own request to the source."""
        with self._mutex:
            self._pace(namespace).peer_took(seconds)

    def answered(self, address: str) -> None:
        """Record that a worker has answered."""
        with self._mutex:
            self._silences.drop(address)

    def is_slow(self, address: str, began: float) -> None:
        """Leave a worker alone for a while that was silent twice in a row; questions at the same time count once."""
        with self._mutex:
            silence = self._silences.get(address) or _Silence(-math.inf, 0.0, 0.0)
            if began > silence.since:
                now = time.monotonic()
                pause = min(max(4 * silence.pause, _PAUSES[0]), _PAUSES[1]) if silence.since > 0 else 0.0
                self._silences.put(address, _Silence(now, now + pause, pause))

    def _pace(self, namespace: str) -> _Pace:
        pace = self._paces.get(namespace)
        if pace is None:
            pace = _Pace()
            self._paces.put(namespace, pace)
        return pace
