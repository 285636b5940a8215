"""Single-flight: each byte of an object is fetched once at a time within a process.

State: a table of the fetches under way, under a lock that is held for one dictionary operation. The futures belong to
threads, not to tasks, so that several event loops can wait for the same fetch.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from xzcache._fork import renew_after_fork
from xzcache.model.spans import WHOLE, Span, covers, overlap

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable


T = TypeVar("T")


class LeaderCancelled(Exception):
    """The task that fetched was cancelled, so one of the waiting tasks must fetch."""


class Fetched(NamedTuple):
    """The outcome of a fetch for all that waited for it."""

    data: memoryview | None
    """None if the object is missing."""
    validator: str | None = ""
    """None if the bytes are cached, so that their state must be looked up with them."""
    exact: bool = True
    """Whether the bytes are certainly those of the claimed span, so that a part of them is that part of the object."""


class Claim:
    """A span of one object, as `placed` gives it, that one task fetches for all tasks that wait for it."""

    __slots__ = ("_outcome", "_waiters", "sent_at", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self._outcome: Fetched | LeaderCancelled | None = None
        # most claims have none
        self._waiters: list[Future[Fetched]] = []
        self.sent_at = math.inf
        """When the source was asked, by `time.perf_counter`."""

    def mark_sent(self) -> None:
        """Record that the request is sent now: the answer may miss later changes."""
        self.sent_at = time.perf_counter()

    async def outcome(self, timeout: float) -> Fetched | None:
        """Wait for the result; None if it does not come in time, for example because an event loop was stopped.

        Raises `LeaderCancelled`, or the exception that the source raised, which may be a `TimeoutError` as well.
        """
        # of `concurrent.futures`, because the leader may run in another event loop
        future: Future[Fetched] = Future()
        self._waiters.append(future)
        # an outcome that was set before the append reaches the new waiter here
        self._pass_on()
        waiting = asyncio.wrap_future(future)
        # a waiter that gave up must not get a warning about an exception that was never retrieved
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        # unlike `wait_for`, it raises nothing: the exception would refer to a frame that refers to the exception
        await asyncio.wait([waiting], timeout=timeout)
        try:
            return future.result() if future.done() else None
        finally:
            # for the same reason
            del future, waiting

    def set_result(self, data: memoryview | None, validator: str | None = "", *, exact: bool = True) -> None:
        # the first outcome counts: the leader may still fail afterwards, when it stores the value
        if self._outcome is None:
            self._outcome = Fetched(data, validator, exact)
            self._pass_on()

    def set_exception(self, error: BaseException) -> None:
        """Give the exception to all that wait; `LeaderCancelled` for a cancellation, and to waiters that are late.

        The claim does not keep the exception. Its traceback refers to the frames of the fetch, and these to the claim:
        such a cycle would keep the store, and the locks of its directory, until the garbage collector runs.
        """
        if self._outcome is None:
            self._outcome = LeaderCancelled()
            self._pass_on(error if isinstance(error, Exception) else None)

    def _pass_on(self, error: Exception | None = None) -> None:
        """Give the outcome, if there is one, to all waiters; each is taken from the list by one thread."""
        outcome = error or self._outcome
        while outcome is not None and self._waiters:
            # two threads may both see the last waiter
            with suppress(IndexError):
                future = self._waiters.pop()
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    @property
    def has_outcome(self) -> bool:
        return self._outcome is not None


class Claims:
    """The spans of objects that this process is fetching. Safe for threads and event loops; empty after a fork.

    An object is named by its key and the write version before the fetch, so that a read after a write does not wait for
    a fetch from before it.
    """

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Start with an empty table."""
        self._lock = threading.Lock()
        self._claims: dict[Hashable, list[Claim]] = {}

    def join(
        self, what: Hashable, span: Span = WHOLE, since: float = -math.inf, *, apart: bool = True
    ) -> tuple[Claim | None, bool]:
        """The claim that covers a span of an object, and whether the caller made it and must fetch.

        A claim whose request was sent before `since` (by `time.perf_counter`) is not joined. Unless `apart`, the answer
        is None if others have claimed a part of the span: then only the rest should be fetched.
        """
        with self._lock:
            claims = self._claims.get(what)
            if claims is None:
                claims = self._claims[what] = []
            for claim in claims:
                if covers(claim.span, span) and claim.sent_at >= since:
                    return claim, False
            if not apart and any(overlap(claim.span, span) for claim in claims):
                return None, False
            claim = Claim(span)
            claims.append(claim)
            return claim, True

    def make(self, what: Hashable, choose: Callable[[list[Span]], list[Span]]) -> tuple[list[Claim], list[Claim]]:
        """Claim spans of an object; returns the new claims and those that existed before.

        `choose` maps the spans that are claimed already to the spans to claim, which should not overlap them. Suffixes
        are left out.
        """
        with self._lock:
            others = [claim for claim in self._claims.get(what, ()) if claim.span[0] >= 0]
            made = [Claim(span) for span in choose([claim.span for claim in others])]
            if made:
                self._claims.setdefault(what, []).extend(made)
            return made, others

    def release(self, what: Hashable, claim: Claim) -> None:
        """Release a claim, giving waiting tasks without a result `LeaderCancelled`; a second call has no effect."""
        with self._lock:
            claims = self._claims.get(what, [])
            if claim in claims:
                claims.remove(claim)
                if not claims:
                    del self._claims[what]
        # outside of the lock, because callbacks of the futures run here
        if not claim.has_outcome:
            claim.set_exception(LeaderCancelled())


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
