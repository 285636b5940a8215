"""Uses of entries that are not in the index yet, and the trace that may be kept of them."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from xzcache._config import config
from xzcache.eviction._policies import UseBatch
from xzcache.index import hash_of
from xzcache.model import Entry, Extent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xzcache.eviction._policies import Policy
    from xzcache.index import Index


_NONE: Final[Mapping[Entry, int]] = {}


class Tell(Protocol):
    """Reports other counts to the index, within a section; `uses` and `arrived` as for a policy."""

    def __call__(
        self, index: Index, uses: Mapping[Entry, int], arrived: Mapping[Entry, int], *, everything: bool
    ) -> None: ...


# with 256 uses in each of four processes, a cache of 600 entries lost 0.10 of its hit ratio with `"lru"`
_SHARE: Final = 32
"""While one process evicts, the others together keep at most the uses of 1/32 of the entries to themselves."""
_MANY: Final = 500_000
"""Of so many entries, each use is a search in pages that are not at hand: half as many are written at once."""
_FEW: Final = 32
_FEWEST: Final = 8
"""Fewer uses are not worth a transaction."""


class Recency:
    """Uses of entries that are not in the index yet: a hit costs a dictionary store, not a transaction.

    A process that evicts flushes its own uses first. Other processes flush after 128 uses (64 if the cache is large),
    or `longest` seconds; earlier if the cache is small and entries were evicted since their last flush, because a use
    that is not in the index saves no entry.

    A hit stores its use without a call: ``uses[key, start, stop] = time.monotonic()``. It calls `is_due` only if there
    are `most` uses, or it is later than `due_at`.
    """

    def __init__(self, policy: Policy, most: int = 128, longest: float = 5.0) -> None:
        self.policy = policy
        self.uses = self._no_uses()
        self.most = self._largest = most
        self.due_at = 0.0
        self._longest = longest
        self._lock = threading.Lock()
        self._is_flushing = False
        self._removals: int | None = None
        self.tell: Tell | None = None

    def record_use(self, entry: Entry) -> bool:
        """Record a use; True if `flush_to` is due."""
        now = self.uses[entry] = time.monotonic()
        return (now >= self.due_at or len(self.uses) >= self.most) and self.is_due(now)

    def is_due(self, now: float) -> bool:
        """Whether `flush_to` is due; the caller then has a second to call it."""
        uses = self.uses
        if len(uses) > 64 * self._largest:
            # the index cannot be used: drop the uses to limit the memory
            uses.clear()
        if not self.due_at:
            # this is the first use since the last flush
            self.due_at = now + self._longest
        due = now >= self.due_at or (len(uses) >= self.most and not self._is_flushing)
        if due:
            self._is_flushing = True
            # whatever happens to this flush, the next attempt comes a second later, not with each hit
            self.due_at = max(self.due_at, now + 1.0)
        return due

    def flush_to(
        self, index: Index, arrived: Mapping[Entry, int] = _NONE, *, everything: bool = False, together: bool = False
    ) -> None:
        """Write the recorded uses and the new entries, with their sizes, to the index.

        With `everything`, nothing that was counted is kept for a later transaction. With `together`, the transaction
        does other work as well, and many uses are left to another one.
        """
        with self._lock:
            recorded = self._no_uses()
            if not (together and self.are_many):
                # a new dictionary instead of a clear: hits write to it without the lock
                recorded, self.uses, self.due_at = self.uses, recorded, 0.0
                self._is_flushing = False
        zero = _zero()
        # a copy: a hit that began before may still add to it
        uses = {Entry(*extent): zero + int(at * 1e9) for extent, at in recorded.copy().items()}
        if uses or arrived:
            self.policy.record(index, UseBatch(uses, arrived))
        if uses:
            self._set_pace(index)
        if self.tell is not None:
            self.tell(index, uses, arrived, everything=everything)

    @property
    def are_many(self) -> bool:
        """Whether there are so many uses that they should be written in a transaction of their own."""
        return len(self.uses) > _FEW

    def _set_pace(self, index: Index) -> None:
        """Set after how many uses to flush: few while entries of a small cache are evicted by other processes."""
        entries, owners, removals = index.turnover()
        largest = self._largest // 2 if entries > _MANY else self._largest
        # uses of a single process are never late, and without evictions no use can save an entry
        if owners < 2 or self._removals in (None, removals):
            # slowly, since evictions come and go
            self.most = min(largest, 2 * self.most)
        else:
            self.most = min(largest, max(_FEWEST, entries // (_SHARE * (owners - 1))))
        self._removals = removals

    def _no_uses(self) -> dict[Extent, float]:
        return {}

    def __bool__(self) -> bool:
        return bool(self.uses)


class _TracedUses(dict[Extent, float]):
    """Uses, of which each is also appended to a list, and not only the last one of an entry."""

    def __init__(self, trace: list[tuple[float, Extent]], most: int) -> None:
        super().__init__()
        self._trace = trace
        self._most = most

    def __setitem__(self, extent: Extent, at: float) -> None:
        self._trace.append((at, extent))
        if len(self._trace) > self._most:
            self._trace.clear()
        super().__setitem__(extent, at)


class Traced(Recency):
    """Also writes all uses to a file: time (ns since the epoch), hash of the key, and size in bytes.

    Several processes may append to one file.
    """

    def __init__(self, policy: Policy, path: str) -> None:
        self._path = path
        self._trace: list[tuple[float, Extent]] = []
        super().__init__(policy)

    def _no_uses(self) -> dict[Extent, float]:
        return _TracedUses(self._trace, 1 << 14)

    def flush_to(
        self, index: Index, arrived: Mapping[Entry, int] = _NONE, *, everything: bool = False, together: bool = False
    ) -> None:
        """Write the recorded uses to the index and to the file."""
        zero = _zero()
        trace = [(zero + int(at * 1e9), Entry(*extent)) for at, extent in self._trace]
        del self._trace[: len(trace)]
        trace += ((time.time_ns(), entry) for entry in arrived)
        rows = {entry: row for _, entry in trace if (row := index.find(entry)) is not None}
        lines = (
            f"{at} {hash_of(entry):016x} {row.size}\n" for at, entry in trace if (row := rows.get(entry)) is not None
        )
        # a failure to write the trace must not fail other work
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, "".join(lines).encode())
            finally:
                os.close(descriptor)
        super().flush_to(index, arrived, everything=everything, together=together)


def _zero() -> int:
    """When `time.monotonic` was zero, in ns since the epoch."""
    # read anew for each flush, since the clock of the day may be set
    return time.time_ns() - time.monotonic_ns()


def recency_for(policy: Policy) -> Recency:
    """The recency of a policy, with a trace if one is configured."""
    path = config.get("trace")
    if path in (None, ""):
        return Recency(policy)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"trace={path!r} is not accepted: give the path of a file, or None for no trace")
    return Traced(policy, os.path.expanduser(os.fspath(path)))
