"""Work that its caller does not wait for: storing what somebody has been given already.

One thread does it, in order. How many bytes may be waiting is bounded: beyond, the caller has to wait after all.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Final

from xzcache._fork import renew_after_fork
from xzcache._pool import submit_in_order

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

_MOST_BYTES: Final = 64 << 20


class Background:
    """What is yet to be stored in one cache directory. Safe for threads and event loops; empty after a fork."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """The parent does what it has begun."""
        self._lock = threading.Lock()
        self._waiting: dict[Future[None], int] = {}
        self._bytes = 0
        self._readers = 0

    def enter(self) -> None:
        """Somebody begins to fetch."""
        with self._lock:
            self._readers += 1

    def leave(self) -> None:
        """Somebody is done with fetching."""
        with self._lock:
            self._readers -= 1

    def add(self, work: Callable[[], None], size: int) -> None:
        """Have something done that holds `size` bytes until it is."""
        with self._lock:
            self._bytes += size
            future = submit_in_order(work)
            self._waiting[future] = size
        future.add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._bytes -= self._waiting.pop(future, 0)

    async def pause(self) -> None:
        """Wait where somebody has to: nobody else is fetching, so that a caller may go and look, or too much waits."""
        while True:
            with self._lock:
                waiting = list(self._waiting) if self._readers <= 1 or self._bytes > _MOST_BYTES else []
            if not waiting:
                return
            # meanwhile others may come, fetch, and leave it to this one
            for future in waiting:
                await asyncio.shield(asyncio.wrap_future(future))

    def wait(self) -> None:
        """Wait until all is done that there is to do now."""
        with self._lock:
            waiting = list(self._waiting)
        for future in waiting:
            future.exception()
