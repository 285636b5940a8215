"""Single-flight: each object is fetched once at a time within a process.

State: a table of the fetches under way, under a lock that is held for one dictionary operation. The futures belong to
threads, not to tasks, so that several event loops can wait for the same fetch.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from xzcache._fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable

    from xzcache.model.spans import Span


T = TypeVar("T")


class LeaderCancelled(Exception):
    """The task that fetched was cancelled, so one of the waiting tasks must fetch."""


class Flight(Generic[T]):
    """One fetch that is under way."""

    def __init__(self) -> None:
        self._future: Future[T] = Future()
        self.waiters = 0
        self.sent_at = math.inf
        """When the source was asked, by `time.perf_counter`."""

    def mark_sent(self) -> None:
        """Record that the request is sent now: the answer may miss later changes."""
        self.sent_at = time.perf_counter()

    async def outcome(self) -> T:
        """Wait for the result; raises `LeaderCancelled`, or the exception that the source raised."""
        waiting = asyncio.wrap_future(self._future)
        # a waiter that gave up must not get a warning about an exception that was never retrieved
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(waiting)

    def set_result(self, result: T) -> None:
        if not self._future.done():
            self._future.set_result(result)

    def set_exception(self, error: BaseException) -> None:
        if not self._future.done():
            # a cancellation, a keyboard interrupt: none of the waiters' business
            self._future.set_exception(error if isinstance(error, Exception) else LeaderCancelled())
            # mark the exception as retrieved, so that asyncio does not warn if there are no waiters
            self._future.exception()


class Flights(Generic[T]):
    """The fetches that are under way in this process. Safe for threads and event loops; empty after a fork."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Start with an empty table."""
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Flight[T]] = {}

    def join(self, what: Hashable, since: float = -math.inf) -> tuple[Flight[T], bool]:
        """The fetch with this name, and whether the caller must run it.

        A fetch that sent its request before `since` (by `time.perf_counter`) is not joined. A new fetch takes its
        place.
        """
        with self._lock:
            flight = self._flights.get(what)
            if flight is not None and flight.sent_at >= since:
                flight.waiters += 1
                return flight, False
            flight = self._flights[what] = Flight()
            return flight, True

    def finish(self, what: Hashable, flight: Flight[T]) -> None:
        """End a fetch; waiting tasks without a result get `LeaderCancelled`."""
        with self._lock:
            if self._flights.get(what) is flight:
                del self._flights[what]
        flight.set_exception(LeaderCancelled())


@dataclass(eq=False)
class Claim:
    """A span of one object that one task fetches for all tasks that wait for it."""

    span: Span
    flight: Flight[tuple[memoryview | None, str]] = field(default_factory=Flight)
    """Resolves to the bytes, or None, and the validator of the object."""


class Claims:
    """Which bytes of which objects this process is fetching, none twice. As `Flights`, safe and empty after a fork."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Start with an empty table."""
        self._lock = threading.Lock()
        self._claims: dict[Hashable, list[Claim]] = {}

    def make(self, what: Hashable, choose: Callable[[list[Span]], list[Span]]) -> tuple[list[Claim], list[Claim]]:
        """Claim spans of an object; returns the new claims and those that existed before.

        `choose` maps the spans that are claimed already to the spans to claim, which must not overlap them.
        """
        with self._lock:
            others = list(self._claims.get(what, ()))
            made = [Claim(span) for span in choose([claim.span for claim in others])]
            if made:
                self._claims.setdefault(what, []).extend(made)
            return made, others

    def release(self, what: Hashable, claim: Claim) -> None:
        """Release a claim; a second call has no effect."""
        with self._lock:
            claims = self._claims.get(what, [])
            if claim in claims:
                claims.remove(claim)
                if not claims:
                    del self._claims[what]
        claim.flight.set_exception(LeaderCancelled())


async def run_to_completion(coroutine: Coroutine[Any, Any, T]) -> tuple[T, bool]:
    """Await a coroutine to its end even if the caller is cancelled; returns its result and whether it was."""
    task = asyncio.ensure_future(coroutine)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
            cancelled = True
        except BaseException:
            break
    return task.result(), cancelled
