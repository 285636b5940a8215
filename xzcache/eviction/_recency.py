"""Uses of entries that are not in the index yet, and the trace that may be kept of them."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xzcache._config import config
from xzcache.eviction._policies import UseBatch
from xzcache.index import hash_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xzcache.eviction._policies import Policy
    from xzcache.index import Index
    from xzcache.model import Entry


_SHARE: Final = 32
"""While one process evicts, the others together keep at most the uses of 1/32 of the entries to themselves."""
_FEWEST: Final = 8
"""Fewer uses are not worth a transaction."""


class Recency:
    """Uses of entries that are not in the index yet: a hit costs a dictionary store, not a transaction.

    A process that evicts flushes its own uses first. Other processes flush after `most` uses, or `longest` seconds;
    earlier if the cache is small and entries were evicted since their last flush, because a use that is not in the
    index saves no entry.
    """

    def __init__(self, policy: Policy, most: int = 256, longest: float = 5.0) -> None:
        self.policy = policy
        self._most = self._enough = most
        self._longest = longest
        self._lock = threading.Lock()
        self._uses: dict[Entry, int] = {}
        self._flush_after = 0.0
        self._is_flushing = False
        self._removals: int | None = None

    def record_use(self, entry: Entry) -> bool:
        """Record a use; True if `flush_to` is due."""
        uses = self._uses
        if not uses:
            self._flush_after = time.monotonic() + self._longest
        uses[entry] = time.time_ns()
        if len(uses) < self._enough and time.monotonic() < self._flush_after:
            return False
        if len(uses) > 64 * self._most:
            # the index cannot be used: drop the uses to limit the memory
            uses.clear()
        # the caller has a second for the flush
        due = not self._is_flushing or time.monotonic() >= self._flush_after
        if due:
            self._is_flushing = True
            self._flush_after = max(self._flush_after, time.monotonic() + 1.0)
        return due

    def flush_to(self, index: Index, arrived: Sequence[Entry] = ()) -> None:
        """Write the recorded uses and the new entries to the index."""
        with self._lock:
            uses, self._uses = self._uses, {}
            self._is_flushing = False
        if uses or arrived:
            # a copy: a hit that began before may still add to it
            self.policy.record(index, UseBatch(dict(uses), arrived))
        if uses:
            self._set_pace(index)

    def _set_pace(self, index: Index) -> None:
        """Set after how many uses to flush: few while entries of a small cache are evicted by other processes."""
        entries, owners, removals = index.turnover()
        if owners < 2 or self._removals in (None, removals):
            self._enough = min(self._most, 2 * self._enough)
        else:
            self._enough = min(self._most, max(_FEWEST, entries // (_SHARE * (owners - 1))))
        self._removals = removals

    def __bool__(self) -> bool:
        return bool(self._uses)


class Traced(Recency):
    """Also writes all uses to a file: time (ns since the epoch), hash of the key, and size in bytes.

    Several processes may append to one file.
    """

    def __init__(self, policy: Policy, path: str) -> None:
        super().__init__(policy)
        self._path = path
        self._trace: list[tuple[int, Entry]] = []

    def record_use(self, entry: Entry) -> bool:
        """Record a use; True if `flush_to` is due."""
        self._trace.append((time.time_ns(), entry))
        if len(self._trace) > 64 * self._most:
            self._trace.clear()
        return super().record_use(entry)

    def flush_to(self, index: Index, arrived: Sequence[Entry] = ()) -> None:
        """Write the recorded uses to the index and to the file."""
        trace, self._trace = self._trace, []
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
        super().flush_to(index, arrived)


def recency_for(policy: Policy) -> Recency:
    """The recency of a policy, with a trace if one is configured."""
    path = config.get("trace")
    if path in (None, ""):
        return Recency(policy)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"trace={path!r} is not accepted: give the path of a file, or None for no trace")
    return Traced(policy, os.path.expanduser(os.fspath(path)))
