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

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xzcache.eviction._policies import Policy
    from xzcache.index import Index
    from xzcache.model import Entry


_NONE: Final[Mapping[Entry, int]] = {}


class Tell(Protocol):
    """Tells the index, within a section, what else was counted; `uses` and `arrived` as for a policy."""

    def __call__(
        self, index: Index, uses: Mapping[Entry, int], arrived: Mapping[Entry, int], *, everything: bool
    ) -> None: ...


class Recency:
    """Uses of entries that are not in the index yet: a hit costs a dictionary store, not a transaction."""

    def __init__(self, policy: Policy, most: int = 256, longest: float = 5.0) -> None:
        self.policy = policy
        self._most = most
        self._longest = longest
        self._lock = threading.Lock()
        self._uses: dict[Entry, int] = {}
        self._flush_after = 0.0
        self.tell: Tell | None = None

    def record_use(self, entry: Entry) -> bool:
        """Record a use; True if `flush_to` is due."""
        uses = self._uses
        if not uses:
            self._flush_after = time.monotonic() + self._longest
        uses[entry] = time.time_ns()
        if len(uses) < self._most and time.monotonic() < self._flush_after:
            return False
        if len(uses) > 64 * self._most:
            # the index cannot be used: drop the uses to limit the memory
            uses.clear()
        # the caller has a second for the flush
        due = time.monotonic() >= self._flush_after or len(uses) == self._most
        self._flush_after = max(self._flush_after, time.monotonic() + 1.0) if due else self._flush_after
        return due

    def flush_to(self, index: Index, arrived: Mapping[Entry, int] = _NONE, *, everything: bool = False) -> None:
        """Write the recorded uses and the new entries, with their sizes, to the index.

        With `everything`, nothing that was counted is kept for a later transaction.
        """
        with self._lock:
            uses, self._uses = self._uses, {}
        if uses or arrived:
            # a copy: a hit that began before may still add to it
            uses = dict(uses)
            self.policy.record(index, UseBatch(uses, arrived))
        if self.tell is not None:
            self.tell(index, uses, arrived, everything=everything)

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

    def flush_to(self, index: Index, arrived: Mapping[Entry, int] = _NONE, *, everything: bool = False) -> None:
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
        super().flush_to(index, arrived, everything=everything)


def recency_for(policy: Policy) -> Recency:
    """The recency of a policy, with a trace if one is configured."""
    path = config.get("trace")
    if path in (None, ""):
        return Recency(policy)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"trace={path!r} is not accepted: give the path of a file, or None for no trace")
    return Traced(policy, os.path.expanduser(os.fspath(path)))
