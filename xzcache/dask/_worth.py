"""Whether it is worth to ask other nodes: the one place that decides whom to leave alone, and how long to wait.

A node is left alone for a while that was silent or late twice in a row, for one array if it refused that twice in a
row, and for one source if most of its latest answers took longer than the source does; so are all nodes together. Each
pause is longer than the last one.

State: how the latest questions went, which all event loops share under a mutex.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Final, NamedTuple

from xzcache._fork import renew_after_fork
from xzcache.dask._peering import Latest

_SOME: Final = 16
"""The latest answers that tell whether it is worth to ask: the first ones of a new process are slow."""
_PAUSES: Final = (1.0, 60.0)
"""The shortest and the longest time, in seconds, for which a node is left alone."""
_SOURCES: Final = 256
_NODES: Final = 4096


class Whom(NamedTuple):
    """What a question is about."""

    address: str
    namespace: str
    array: str


class _Pause:
    """A time without questions, longer each time."""

    def __init__(self) -> None:
        self._length = 0.0
        self._until = -math.inf

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._until

    def begin(self) -> None:
        self._length = min(max(4 * self._length, _PAUSES[0]), _PAUSES[1])
        self._until = time.monotonic() + self._length

    def end(self) -> None:
        self._length, self._until = 0.0, -math.inf


class _InVain:
    """Questions in vain, in a row; those at the same time count once."""

    def __init__(self) -> None:
        self.pause = _Pause()
        self._latest: float | None = None

    def record(self, began: float) -> None:
        if self._latest is None or began > self._latest:
            if self._latest is not None:
                self.pause.begin()
            self._latest = time.monotonic()


class _Times:
    """Whether answers took longer than the source does."""

    def __init__(self) -> None:
        self.pause = _Pause()
        self._slower: deque[bool] = deque(maxlen=_SOME)

    def record(self, *, is_slower: bool) -> None:
        self._slower.append(is_slower)
        if len(self._slower) == _SOME and self.pause.is_over:
            if sum(self._slower) > _SOME // 2:
                self.pause.begin()
                # the next answers decide
                self._slower.clear()
            else:
                self.pause.end()


class _Source:
    """How long a source takes to answer."""

    def __init__(self) -> None:
        self.mean = self._deviation = 0.0

    def record(self, seconds: float) -> None:
        if not self.mean:
            self.mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self.mean) - self._deviation) / 4
            self.mean += (seconds - self.mean) / 8

    @property
    def usual(self) -> float:
        """The seconds within which it usually answers."""
        return self.mean + 4 * self._deviation


class Worth:
    """Whom to ask, and for how long, as the latest answers tell; `timeout` is how long any answer may take."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._mutex = threading.Lock()
        self._sources: Latest[str, _Source] = Latest(_SOURCES)
        self._times: Latest[tuple[str, str], _Times] = Latest(_NODES)
        """By source, and by worker or an empty string for all of them."""
        self._in_vain: Latest[tuple[str, str], _InVain] = Latest(_NODES)
        """By worker, and by array or an empty string for all of them."""
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Another thread may have held the mutex."""
        self._mutex = threading.Lock()

    def may_ask(self, whom: Whom) -> bool:
        """Whether a question is worth it."""
        address, namespace, array = whom
        with self._mutex:
            times = [self._times.get(name) for name in ((namespace, ""), (namespace, address))]
            in_vain = [self._in_vain.get(name) for name in ((address, ""), (address, array))]
            return all(each is None or each.pause.is_over for each in (*times, *in_vain))

    def usual(self, namespace: str) -> float | None:
        """The seconds within which a source usually answers; None if that is unknown."""
        with self._mutex:
            source = self._sources.get(namespace)
            return None if source is None else source.usual

    def limit(self, namespace: str, usual: float | None) -> float:
        """The seconds after which the source is asked, given what the owner knows of it; unknown counts as nothing."""
        return (self.usual(namespace) or usual or 0.0) + self._timeout

    def source_took(self, namespace: str, seconds: float) -> None:
        """Record how long the source took to answer."""
        with self._mutex:
            self._sources.made(namespace, _Source).record(seconds)

    def gave(self, whom: Whom, seconds: float) -> None:
        """Record what an answer took beyond the owner's own request to the source."""
        address, namespace, array = whom
        with self._mutex:
            self._in_vain.drop((address, ""))
            self._in_vain.drop((address, array))
            if (source := self._sources.get(namespace)) is not None:
                for name in ((namespace, ""), (namespace, address)):
                    self._times.made(name, _Times).record(is_slower=seconds > source.mean)

    def was_late(self, whom: Whom, began: float) -> None:
        """Record that there was no answer in time, to a question that began at a time of `time.monotonic`."""
        with self._mutex:
            self._in_vain.made((whom.address, ""), _InVain).record(began)

    def refused(self, whom: Whom, began: float) -> None:
        """Record that a worker gave nothing of an array, and may never do."""
        with self._mutex:
            self._in_vain.drop((whom.address, ""))
            self._in_vain.made((whom.address, whom.array), _InVain).record(began)
