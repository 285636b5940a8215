"""One fetch at a time for each thing that is fetched, within a process.

State: a table of what is in flight, protected by a lock that is held for a dictionary operation at a time. Futures of
threads, not of tasks, so that several event loops can wait for the same fetch.
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
    """Whoever fetched was cancelled: one of those who waited has to go on."""


class Flight(Generic[T]):
    """One fetch that is under way."""

    def __init__(self) -> None:
        self._future: Future[T] = Future()
        self.waiters = 0
        self.sent_at = math.inf
        """When the source was asked, by `time.perf_counter`."""

    def mark_sent(self) -> None:
        """Note that the source is asked now: the answer may lack what changes from now on."""
        self.sent_at = time.perf_counter()

    async def outcome(self) -> T:
        """Wait for what the leader gets.

        Raises
        ------
        HandedOver
            The leader was cancelled.
        Exception
            What the source raised for the leader.
        """
        waiting = asyncio.wrap_future(self._future)
        # who stops waiting does not want to hear of an exception later
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(waiting)

    def set_result(self, result: T) -> None:
        if not self._future.done():
            self._future.set_result(result)

    def set_exception(self, error: BaseException) -> None:
        if not self._future.done():
            # a cancellation, a keyboard interrupt: none of the waiters' business
            self._future.set_exception(error if isinstance(error, Exception) else LeaderCancelled())
            # an exception that nobody waits for is not worth a warning
            self._future.exception()


class Flights(Generic[T]):
    """The fetches that are under way in this process. Safe for threads and event loops; empty after a fork."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Begin with nothing under way."""
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Flight[T]] = {}

    def join(self, what: Hashable, since: float = -math.inf) -> tuple[Flight[T], bool]:
        """The fetch of something, and whether the caller is the one who has to do it.

        Parameters
        ----------
        what : hashable
        since : float
            A fetch that asked the source before this time, by `time.perf_counter`, is not joined: a new one takes its
            place for later callers.
        """
        with self._lock:
            flight = self._flights.get(what)
            if flight is not None and flight.sent_at >= since:
                flight.waiters += 1
                return flight, False
            flight = self._flights[what] = Flight()
            return flight, True

    def finish(self, what: Hashable, flight: Flight[T]) -> None:
        """The leader is done, one way or the other."""
        with self._lock:
            if self._flights.get(what) is flight:
                del self._flights[what]
        flight.set_exception(LeaderCancelled())


@dataclass(eq=False)
class Claim:
    """Bytes of one object that somebody fetches for all who wait."""

    span: Span
    flight: Flight[tuple[memoryview | None, str]] = field(default_factory=Flight)
    """Ends with the bytes, or None, and what tells the state of the object from others."""


class Claims:
    """Which bytes of which objects this process is fetching, none twice. As `Flights`, safe and empty after a fork."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Begin with nothing under way."""
        self._lock = threading.Lock()
        self._claims: dict[Hashable, list[Claim]] = {}

    def make(self, what: Hashable, choose: Callable[[list[Span]], list[Span]]) -> tuple[list[Claim], list[Claim]]:
        """Claim bytes of an object.

        Parameters
        ----------
        what : hashable
            The object, and what else has to be the same for two to want the same bytes.
        choose : callable
            From the spans that are claimed already to those that shall be; these must not overlap any of those.

        Returns
        -------
        made, others : list of Claim
        """
        with self._lock:
            others = list(self._claims.get(what, ()))
            made = [Claim(span) for span in choose([claim.span for claim in others])]
            if made:
                self._claims.setdefault(what, []).extend(made)
            return made, others

    def release(self, what: Hashable, claim: Claim) -> None:
        """The leader is done, one way or the other; again if need be."""
        with self._lock:
            claims = self._claims.get(what, [])
            if claim in claims:
                claims.remove(claim)
                if not claims:
                    del self._claims[what]
        claim.flight.set_exception(LeaderCancelled())


async def run_to_completion(coroutine: Coroutine[Any, Any, T]) -> tuple[T, bool]:
    """See something through to its end, whoever is cancelled meanwhile.

    Returns
    -------
    result : object
    cancelled : bool
        Whether a cancellation came, which the caller has to honour.
    """
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
