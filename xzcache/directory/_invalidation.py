"""Keeping the cache true when its source is written through it."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

from xzcache import files
from xzcache.directory._fetchlocks import WriteVersion, WriteVersions, current_version
from xzcache.directory._publish import MOST, MOST_BYTES, PendingEntry
from xzcache.directory._space import HideReport
from xzcache.files import beneath, is_plain
from xzcache.index import data_counter, write_counter
from xzcache.model import Entry, NoRoom, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from xzcache.directory._pending import PendingInvalidations
    from xzcache.directory._publish import Publisher
    from xzcache.directory._space import Space
    from xzcache.index import Index, Registration, Row, Tombstone
    from xzcache.model import Data


logger = logging.getLogger("xzcache.directory")

T = TypeVar("T")

# the keys of one section, for which other processes wait
_BATCH: Final = 32


class Begun(NamedTuple):
    """A write that has begun: its row in the index, and the write version at its begin.

    Without a version, the index was not updated, or may not have been.
    """

    key: str
    row: int
    version: WriteVersion | None = None


class Deletion(NamedTuple):
    """A deletion that has begun: of everything beneath a key, and perhaps of the key itself."""

    beneath: Begun
    itself: Begun | None

    @property
    def keys(self) -> list[str]:
        return [] if self.itself is None else [self.itself.key]

    @property
    def writes(self) -> list[Begun]:
        return [self.beneath] if self.itself is None else [self.beneath, self.itself]


class Listener(Protocol):
    """Called after this process has learned that entries are stale, except by a write through the cache."""

    def __call__(self, names: Sequence[str], state: bytes = b"") -> None:
        """`names` are keys, and prefixes with a trailing slash. `state` is the new state, where that is known."""


class Writes:
    """Invalidates entries for every process when the source is written or changes.

    `begin_write` invalidates the old value before the source changes and adds a row to the index: the key is being
    written. Until `end_writes`, no process stores the key. If this process dies in between, the next process to recover
    invalidates the key. `end_writes` stores the new value unless another process wrote the key at the same time. Both
    increment the write counters, so that no fetch that began before the write is published after it.

    If the index cannot be used, files are unlinked by their paths. If that fails as well, this process serves nothing
    of the key from the cache until its files are known to be gone.
    """

    def __init__(self, pending: PendingInvalidations, space: Space, publisher: Publisher) -> None:
        self._pending = pending
        self._session = space.session
        self._space = space
        self._publisher = publisher
        self.listeners: list[Listener] = []

    # -- keys

    def begin_write(self, keys: Sequence[str]) -> list[Begun]:
        """Invalidate keys before the source is written, and record in the index that they are being written."""
        return [begun for batch in _batches(keys) for begun in self._begin(batch)]

    def _begin(self, keys: Sequence[str]) -> list[Begun]:
        report = HideReport()
        begun = [self._started(key) for key in keys]

        def act() -> list[Begun]:
            with self._session.section() as (process, index):
                # again, because the section may have joined another directory than the one that has the note
                self._record_written(keys, process)
                # counted before the commit: from then on, no result of an earlier fetch may be published
                for write in begun:
                    self._count(process, index, write.key)
                    index.tables.add_writing(write.row, write.key, process.owner, beneath=False)
                versions = WriteVersions(process)
                counted = [write._replace(version=versions.of(write.key)) for write in begun]
                tombstones = self._mark_keys_deleted(process, index, keys, report)
            # the bytes are given back when the write ends
            self._unlink_deleted(tombstones, soon=True)
            return counted

        return self._must_invalidate(keys, act, report, "a write begins", begun) or begun

    def _started(self, key: str, *, beneath: bool = False) -> Begun:
        return Begun(key, self._session.begin_write(key, beneath=beneath))

    def _must_invalidate(
        self, keys: Sequence[str], act: Callable[[], T], report: HideReport, why: str, writes: Sequence[Begun] = ()
    ) -> T | None:
        """Invalidate keys, and quarantine those whose files may remain.

        After an invalidation without the index, the retry through the index also updates the rows of the writes.
        """
        # before the first change, and outside of the guard: the note waits for the disk
        self._record_written(keys)
        done = self._pending.must_invalidate(
            keys,
            act,
            lambda: self._pending.unlink_keys(keys),
            lambda: self._invalidate_late(keys, writes=writes),
        )
        self._see_to(report)
        _log(keys, why)
        return done

    def _record_written(self, keys: Sequence[str], process: Registration | None = None) -> None:
        """Write a note for the namespaces of some keys, in case the power fails before their entries are gone.

        If the note fails, the invalidation still holds until the machine stops.
        """
        for namespace in set(map(namespace_of, keys)):
            try:
                (self._session if process is None else process).record_written(namespace)
            except Exception as error:
                self._pending.record_fault(error)

    def _unlink_deleted(self, tombstones: list[Tombstone], *, soon: bool = False) -> None:
        """Unlink deleted files; a failure is retried later and fails no write."""
        try:
            self._space.unlink_deleted(tombstones, soon=soon)
        except Exception as error:
            self._pending.record_fault(error)

    def _see_to(self, report: HideReport) -> None:
        """Quarantine the keys whose files may remain."""
        self._pending.suspect(report.missing)
        if report.left and report.error is not None:
            self._pending.record_fault(report.error)
        self._defer(report.left)

    def _defer(self, names: Iterable[str]) -> None:
        """Quarantine names, if any, until their files are gone."""
        if left := list(names):
            self._pending.defer(left, lambda: self._again(left))

    def _invalidate_late(self, keys: Sequence[str], prefixes: Sequence[str] = (), writes: Sequence[Begun] = ()) -> bool:
        """Retry the invalidation of some keys and prefixes; those whose files are gone do not wait for the others."""
        report = HideReport()
        self.invalidate_now(keys, report, writes)
        for batch in _batches(prefixes):
            self._drop_now(batch, report)
        self._defer(report.left)
        return True

    def invalidate_now(self, keys: Sequence[str], report: HideReport, writes: Sequence[Begun] = ()) -> bool:
        """Invalidate keys, raising faults; returns whether all their files are gone."""
        for batch in _batches(keys):
            with self._session.section() as (process, index):
                for key in batch:
                    self._count(process, index, key)
                self._update_rows(process, index, writes)
                tombstones = self._mark_keys_deleted(process, index, batch, report)
            self._unlink_deleted(tombstones)
        return not report.left

    def _update_rows(self, process: Registration, index: Index, writes: Sequence[Begun]) -> None:
        """Record the writes that are still under way, and delete the rows of those that have ended."""
        for write in writes:
            if (found := self._session.writing.get(write.row)) is not None:
                index.tables.add_writing(write.row, write.key, process.owner, beneath=found[1])
        index.tables.drop_writings(write.row for write in writes if write.row not in self._session.writing)

    def adopt(self, names: Sequence[str]) -> None:
        """Quarantine the leftovers of other processes until their files are gone."""
        self._pending.adopt(names, self._again)

    def invalidate_returned(self) -> None:
        """Invalidate the names that were written while the current directory was missing from its path."""
        self._again(self._pending.has_returned())
        self._pending.forget_returned()

    def _again(self, names: Sequence[str]) -> bool:
        keys = [name for name in names if not name.endswith("/")]
        prefixes = [name.rstrip("/") for name in names if name.endswith("/")]
        _log(names, "it was pending")
        return self._invalidate_late(keys, prefixes)

    def end_writes(self, writes: Sequence[tuple[Begun, Data | None]]) -> list[None]:
        """Invalidate the keys again after the source was written, and store the new values."""
        batch: list[tuple[Begun, Data | None]] = []
        size = 0
        for write, value in writes:
            size += len(value or b"")
            if batch and (size > MOST_BYTES or len(batch) >= MOST or write.key in {other.key for other, _ in batch}):
                self._end(batch)
                batch, size = [], len(value or b"")
            batch.append((write, value))
        if batch:
            self._end(batch)
        return [None] * len(writes)

    def _end(self, batch: Sequence[tuple[Begun, Data | None]]) -> None:
        writes = [write for write, _ in batch]
        keys = [write.key for write in writes]
        report = HideReport()

        def end(new: Sequence[PendingEntry]) -> None:
            tombstones: list[Tombstone] = []
            with ExitStack() as stack:
                stack.callback(lambda: self._unlink_deleted(tombstones))
                # the files are written before the guard is taken, which must be held for a short time only
                staged = self._publisher.try_staged(new, stack)
                with self._session.section() as (process, index), self._space.freeing_tombstones(index):
                    # a value that another process wrote meanwhile is not stored
                    alone = [item for item in staged.items if item.pending.is_current(process)]
                    # after the comparison above: this write raises the counters itself
                    for key in keys:
                        self._count(process, index, key)
                    versions = WriteVersions(process)
                    index.tables.drop_writings(write.row for write in writes)
                    tombstones += self._mark_keys_deleted(process, index, keys, report)
                    for item in alone:
                        item.pending.version = versions.of(item.pending.entry.key)
                    staged.enter(process, index, alone)
                    index.commit()
            for item in staged.items:
                if item.failure is not None:
                    self._pending.record_fault(item.failure)

        def act() -> None:
            # without its begin in the index, a write may have missed concurrent ones
            new = [
                PendingEntry(Entry(write.key), value, write.version)
                for write, value in batch
                if value is not None and write.version is not None
            ]
            try:
                end(new)
            except NoRoom:
                # the index has no room for the new rows: the old ones must go nevertheless
                end([])

        try:
            self._must_invalidate(keys, act, report, "a write has ended", writes)
        finally:
            # a row that remains belongs to no write from here on: the next recovery invalidates its key
            self._session.end_writes(write.row for write in writes)

    def invalidate(self, key: str, since: WriteVersion | None) -> WriteVersion | None:
        """Invalidate a key that changed at the source.

        Returns the version to store it with, None if it was written since.
        """
        report = HideReport()

        def act() -> WriteVersion | None:
            with self._session.section() as (process, index):
                # compared and raised in one section, so that no write of another process falls in between
                alone = since is not None and since == current_version(process, key)
                self._count(process, index, key)
                version = current_version(process, key)
                tombstones = self._mark_keys_deleted(process, index, [key], report)
            self._unlink_deleted(tombstones)
            return version if alone else None

        done = self._must_invalidate([key], act, report, "the source has another state")
        self._tell([key])
        return done

    def distrust(self, prefix: str) -> None:
        """Store no result of a fetch of data beneath a prefix that is under way, because it may be stale already."""
        with self._session.section() as (process, _):
            if prefix:
                process.writes.increment(data_counter(prefix))
            else:
                process.writes.lose()

    def _tell(self, names: Sequence[str], state: bytes = b"") -> None:
        for listener in self.listeners:
            listener(names, state)

    def remove(self, key: str) -> None:
        """Remove a key that has no source; raises `OSError` if it may still exist."""
        report = HideReport()
        self._record_written([key])
        self._pending.must_remove(lambda: self.invalidate_now([key], report), lambda: self._pending.unlink_keys([key]))
        if report.error is not None:
            raise report.error
        _log([key], "it was deleted")

    def remove_beneath(self, prefix: str) -> None:
        """Like `remove`, for everything beneath a prefix."""
        report = HideReport()
        self._record_written([f"{prefix}/"] if prefix else [""])
        self._pending.must_remove(
            lambda: self._drop_now([prefix], report), lambda: self._pending.unlink_beneath(prefix)
        )
        if report.error is not None:
            raise report.error
        _log([f"{prefix}/"], "it was deleted")

    @staticmethod
    def _count(process: Registration, index: Index, key: str) -> None:
        """Increment the write counter of a key: results of fetches that began before are not published."""
        process.writes.increment(write_counter(key))
        index.tables.drop_absent([key])

    def _mark_keys_deleted(
        self, process: Registration, index: Index, keys: Sequence[str], report: HideReport, others: Sequence[Row] = ()
    ) -> list[Tombstone]:
        """Remove keys and other entries from the index and hide their files; within a section, which is committed."""
        # a key may lie beneath a prefix, and a prefix beneath another one: no file has two tombstones
        rows = {row.id: row for row in (*(row for key in keys for row in index.of_key(key)), *others)}.values()
        # before the commit: after it, the query would be a transaction of its own
        unowned = index.unowned_tombstones() if keys else []
        tombstones = self._space.mark_deleted(process, index, rows, report)
        self._space.clear_paths(index, [key for key in keys if key not in report.left], report, unowned)
        return tombstones

    # -- everything beneath a prefix

    def begin_deletes(self, wanted: Sequence[tuple[str, bool]]) -> list[Deletion]:
        """Invalidate everything beneath some prefixes before it is deleted at the source, and record the writes.

        Of each prefix, `wanted` tells whether it is a key as well and is deleted too.
        """
        drops = [
            Deletion(self._started(prefix, beneath=True), self._started(prefix) if itself else None)
            for prefix, itself in wanted
        ]
        self._must_drop([prefix for prefix, _ in wanted], drops, begins=True)
        return drops

    def end_deletes(self, drops: Sequence[Deletion]) -> list[None]:
        """Invalidate everything beneath the prefixes again, after it was deleted at the source."""
        try:
            self._must_drop([drop.beneath.key for drop in drops], drops)
        finally:
            self._session.end_writes(write.row for drop in drops for write in drop.writes)
        return [None] * len(drops)

    def _must_drop(self, prefixes: Sequence[str], drops: Sequence[Deletion] = (), *, begins: bool = False) -> None:
        places = [f"{prefix}/" if prefix else "" for prefix in prefixes]
        self._record_written(places)
        keys = [key for drop in drops for key in drop.keys]
        begun, ended = (drops, ()) if begins else ((), drops)

        def act() -> None:
            report = HideReport()
            self._drop_now(prefixes, report, keys=keys, begun=begun, ended=ended)
            self._see_to(report)

        def by_hand() -> None:
            if keys:
                self._pending.unlink_keys(keys)
            for prefix in prefixes:
                self._pending.unlink_beneath(prefix)

        def again() -> bool:
            report = HideReport()
            self._drop_now(prefixes, report, keys=keys, begun=begun, ended=ended)
            self._defer(report.left)
            return True

        self._pending.must_invalidate([*map(beneath, prefixes), *keys], act, by_hand, again)
        why = "it is cleared" if not drops else "a deletion begins" if begins else "a deletion has ended"
        _log([*places, *keys], why)

    def drop(self, prefix: str) -> None:
        """Invalidate all entries beneath a prefix, and the fingerprints of the arrays there."""
        self._must_drop([prefix])
        self._tell([f"{prefix}/"])

    def drop_now(self, prefix: str, *, counted: bool = False, state: bytes = b"") -> None:
        """Like `drop`, but raises faults; `counted` tells that the write counter was incremented already.

        `state` is the new state of the array at the prefix, where that is known.
        """
        report = HideReport()
        self._drop_now([prefix], report, counted=counted)
        self._see_to(report)
        self._tell([f"{prefix}/"], state)
        _log([f"{prefix}/"], "its metadata document has changed" if counted else "it is cleared")

    def _drop_now(
        self,
        prefixes: Sequence[str],
        report: HideReport,
        *,
        counted: bool = False,
        keys: Sequence[str] = (),
        begun: Sequence[Deletion] = (),
        ended: Sequence[Deletion] = (),
    ) -> None:
        """Like `drop_now`, for some prefixes and keys."""
        leftover: set[str] = set()
        is_first, is_last = True, False
        while not is_last:
            with self._session.section() as (process, index):
                if is_first:
                    if begun:
                        self._record_written([f"{prefix}/" for prefix in prefixes], process)
                    self._update_rows(process, index, [write for drop in begun for write in drop.writes])
                    for key in keys:
                        self._count(process, index, key)
                    for prefix in prefixes:
                        if not counted:
                            process.writes.increment_beneath(prefix)
                        index.tables.drop_nodes(prefix, documents=not counted)
                        index.tables.drop_absent_beneath(prefix)
                    # tombstones that earlier failures left: this call reports its own
                    leftover = {
                        key
                        for item in index.unowned_tombstones()
                        if any(_is_beneath(key := item.entry.key, prefix) for prefix in prefixes)
                    }
                # in batches, so that other processes get the guard in between; the counters already
                # refuse what was fetched before
                count = self._space.pace.count
                rows: list[Row] = []
                for prefix in prefixes:
                    rows += index.beneath(prefix, count - len(rows))
                is_last = len(rows) < count
                # only with the last rows: until then, the rows of the writes keep entries
                # beneath them from being published
                if is_last:
                    index.tables.drop_writings(write.row for drop in ended for write in drop.writes)
                tombstones = self._mark_keys_deleted(process, index, keys if is_first else (), report, rows)
            self._unlink_deleted(tombstones, soon=bool(begun))
            is_first = False
        self._drop_orphans(prefixes, leftover, report)

    def _drop_orphans(self, prefixes: Sequence[str], leftover: set[str], report: HideReport) -> None:
        """Remove entry files beneath some prefixes that have no row: leftovers of a failure or a crash."""
        keys = set(leftover)
        for prefix in prefixes:
            try:
                if not prefix or (is_plain(prefix) and files.exists(f"{self._session.root}/{prefix}/.")):
                    for path in files.walk(files.inside(self._session.root, f"{prefix}/").rstrip("/")):
                        keys.add(os.path.relpath(path, self._session.root).replace(os.sep, "/"))
            except OSError as error:
                report.add(beneath(prefix), error)
        for batch in _batches(sorted(keys - report.left)):
            with self._session.section() as (_, index):
                # a key that has a row by now was stored after the drop
                orphans = [key for key in batch if not index.knows(key)]
                self._space.clear_paths(index, orphans, report, index.unowned_tombstones())


def _log(names: Iterable[str], why: str) -> None:
    """Log invalidations; never under the guard, because a slow handler would hold other processes up."""
    if logger.isEnabledFor(logging.DEBUG):
        for name in names:
            logger.debug("invalidated %s: %s", name, why)


def _is_beneath(key: str, prefix: str) -> bool:
    return not prefix or key.startswith(f"{prefix}/")


def _batches(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
