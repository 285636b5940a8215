"""Publishing: which entries may be stored, in steps whose order survives a crash.

Entries that wait are published together. Each has its own file and its own checks; all share one wait for the guard and
one transaction.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from xzcache import files, model
from xzcache.directory import _recovery as recovery
from xzcache.directory._fetchlocks import WriteVersions, current_version
from xzcache.directory._space import recovery_due
from xzcache.files import Whose, is_plain, relative_path
from xzcache.model import META, Damaged, NoRoom, are_compatible, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from xzcache.directory._faults import FaultBarrier
    from xzcache.directory._fetchlocks import WriteVersion
    from xzcache.directory._space import Space
    from xzcache.files import Stamp
    from xzcache.index import Index, Registration, Row, Tombstone
    from xzcache.model import Data, Entry


logger = logging.getLogger("xzcache.directory")

# -- Entries on their way into the cache.

MOST: Final = 32
"""The most entries that are published together, which limits the wait of others for the guard."""

MOST_BYTES: Final = 4 << 20
"""The most bytes of entries that are published together, which may need room at once."""

_OVERTAKEN: Final = "it was written meanwhile, or something else is in its place"


@dataclass(eq=False, slots=True)
class PendingEntry:
    """An entry that waits to be stored.

    Attributes
    ----------
    version : WriteVersion or None
        From before the fetch; None for an entry without a source.
    validator : str
        The validator of the object.
    exclusive : bool
        Whether to store nothing if the entry exists.
    done : callable or None
        Called when the entry is stored, or will not be.
    age : float
        How long ago the source gave the bytes, in seconds.
    is_stored : bool
    """

    entry: Entry
    data: Data
    version: WriteVersion | None
    validator: str = ""
    exclusive: bool = False
    done: Callable[[], None] | None = None
    age: float = 0.0
    is_stored: bool = False

    def is_current(self, process: Registration) -> bool:
        """Whether the key was not written since the version was read."""
        return self.version == current_version(process, self.entry.key)


@dataclass(eq=False, slots=True)
class StagedEntry:
    """A pending entry whose bytes were taken from the lease, and its temporary file.

    Attributes
    ----------
    old, replaced : Row or None, Tombstone or None
        The previous row of the entry, and its tombstone.
    has_others : bool
        Whether the index may have other entries of the same object.
    damaged : list of Row
        Other entries of the object whose files are damaged, so that their state is unknown.
    path : str
        Where the file is to lie.
    is_spent : bool
        Whether the index counts the bytes now.
    failure : OSError, NoRoom or None
        The reason why the entry cannot be stored.
    """

    pending: PendingEntry
    sequence: int
    temporary: str
    stamp: Stamp
    hashed: bool = False
    old: Row | None = None
    replaced: Tombstone | None = None
    has_others: bool = False
    damaged: list[Row] = field(default_factory=list)
    path: str = ""
    is_spent: bool = False
    failure: OSError | NoRoom | None = None

    @property
    def stamp_in_place(self) -> Stamp:
        """The stamp of the file at its final path; it holds the key unless the path does."""
        entry = self.pending.entry
        return self.stamp._replace(key=entry.key) if self.hashed or not entry.is_whole else self.stamp


@dataclass(eq=False, slots=True)
class Staged:
    """Staged entries that one process is about to enter into the index.

    Attributes
    ----------
    process : Registration or None
        The process whose lease was spent.
    seen : set of str
        The directories that were checked: one that several entries share is checked once.
    overtaken : list of Tombstone
        Entries that a write has overtaken, or of older states.
    """

    _enter: Callable[[Registration, Index, Sequence[StagedEntry], set[str]], list[Tombstone]]
    items: list[StagedEntry] = field(default_factory=list)
    process: Registration | None = None
    seen: set[str] = field(default_factory=set)
    overtaken: list[Tombstone] = field(default_factory=list)

    def enter(self, process: Registration, index: Index, items: Sequence[StagedEntry]) -> None:
        """Publish some of the entries, unless another registration paid for them; within a section, which commits."""
        if process is self.process:
            self.overtaken += self._enter(process, index, items, self.seen)


# -- Which entries may be stored, and where the file of each is to lie: decided under the guard.


class PublishCheck:
    """Checks whether entries may be published; `folds` tells that the file system folds case."""

    def __init__(self, root: str, *, folds: bool) -> None:
        self._root = root
        self._folds = folds

    def of(
        self, versions: WriteVersions, index: Index, items: Sequence[StagedEntry], seen: set[str]
    ) -> list[StagedEntry]:
        """The entries that may be published; sets their old rows and whether their paths are hashed.

        Checked directories are added to `seen`.
        """
        writings = index.tables.writings()
        states: dict[str, str] = {}
        admitted = []
        for item in items:
            pending = item.pending
            key, state = pending.entry.key, pending.validator
            # without a version there is no source, so no write at a source can have overtaken the entry
            if item.failure is not None or (
                # the key was written since the version was read, or is being written now
                pending.version is not None and (pending.version != versions.of(key) or writings.concern(key))
            ):
                continue
            try:
                if pending.exclusive and self._is_there(pending.entry):
                    continue
            except OSError as error:
                item.failure = error
                continue
            item.has_others = known = index.knows(key)
            item.old = index.find(pending.entry) if known else None
            # entries of the same batch have no rows in the index yet, so they are compared here
            apart = (key in states and not are_compatible(state, states[key])) or (
                known and not self._agrees(index, item)
            )
            # an entry without a source replaces what is there, whatever its state
            if apart and pending.version is not None:
                continue
            if self._finds_place(item, seen):
                admitted.append(item)
                states[key] = state
        return admitted

    def is_hashed(self, entry: Entry) -> bool:
        """Whether the key of an entry cannot be a path."""
        return entry.is_whole and not is_plain(entry.key, folds=self._folds)

    def _agrees(self, index: Index, item: StagedEntry) -> bool:
        """Whether all cached parts of an object are of the state of an entry: two states must not be mixed."""
        pending, entry = item.pending, item.pending.entry
        for row in (index.find(entry.whole), index.piece_of(entry.key)):
            if row is not None and row.entry != entry:
                path = self._path(row.entry, hashed=row.hashed)
                stamp = files.read_stamp(path)
                if stamp is None:
                    # an unknown state may be another one
                    with suppress(OSError):
                        found = files.look(path, row.entry)
                        if found in (Whose.MARKED, Whose.FOREIGN):
                            # it will never be known: the damaged file gives way to the new entry
                            item.damaged.append(row)
                        if found is not Whose.OURS:
                            continue
                    return False
                if not are_compatible(pending.validator, stamp.validator):
                    return False
        return True

    def _is_there(self, entry: Entry) -> bool:
        places = (True,) if self.is_hashed(entry) else (False, True)
        return any(files.exists(self._path(entry, hashed=hashed)) for hashed in places)

    def _finds_place(self, item: StagedEntry, seen: set[str]) -> bool:
        """Use a hashed path if a foreign file has the key of an entry; False if that fails."""
        entry = item.pending.entry
        try:
            if not item.hashed and entry.is_whole:
                item.hashed = self._is_blocked(item, seen)
                if item.hashed:
                    files.attach(item.temporary, item.stamp_in_place)
            if item.hashed or not entry.is_whole:
                item.path = files.inside(self._root, relative_path(entry, hashed=item.hashed), seen)
        except OSError as error:
            # an unknown file is neither replaced nor avoided
            item.failure = _cause(error)
        return item.failure is None

    def _is_blocked(self, item: StagedEntry, seen: set[str]) -> bool:
        """Whether a foreign file or directory is at the path of an entry."""
        entry = item.pending.entry
        try:
            path = item.path = files.inside(self._root, entry.key, seen)
        except OSError as error:
            # a link leads to files outside of the cache, so nothing is stored behind it
            if error.errno == errno.ELOOP:
                return True
            raise
        try:
            is_regular = stat.S_ISREG(os.lstat(path).st_mode)
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            return True
        # a store without a source, `LockedLocalStore`, replaces the user's file at a key, as any store does
        if item.pending.version is None or not is_regular:
            return not is_regular
        found = files.look(path, entry)
        if item.old is not None and not item.old.hashed:
            # a stamped file is replaced, even if it is damaged
            return found is Whose.FOREIGN
        return found in (Whose.FOREIGN, Whose.MARKED, Whose.UNMARKED)

    def _path(self, entry: Entry, *, hashed: bool) -> str:
        return f"{self._root}/{relative_path(entry, hashed=hashed)}"


# -- Publishing.


class Publisher:
    """Stores the entries of one cache directory; `folds` tells that the file system folds case."""

    def __init__(self, barrier: FaultBarrier, space: Space, *, folds: bool) -> None:
        self._barrier = barrier
        self._session = barrier.session
        self._root = barrier.session.root
        self._space = space
        self._check = PublishCheck(self._root, folds=folds)

    def publish(self, entry: Entry, data: model.Data, version: WriteVersion | None, validator: str = "") -> bool:
        """Store an entry for every process, unless its key was written since `version` was read.

        `version` is from before the fetch; None stores nothing. `validator` identifies the state of the object. Returns
        whether the entry was stored.
        """
        pending = PendingEntry(entry, data, version, validator)
        self.publish_all([pending])
        return pending.is_stored

    def publish_all(self, batch: Sequence[PendingEntry]) -> None:
        """Like `publish`, for several different entries; each records whether it was stored."""
        # without a version it is unknown whether the key was written since
        todo = [pending for pending in batch if pending.version is not None and not self._barrier.health.is_aside]
        if len(todo) > 1:
            # the failure of one entry must not harm the others
            todo = self._barrier.try_or(lambda: self._publish_together(todo), [])
        for pending in todo:
            self._barrier.try_or(partial(self._publish_one, pending), None)

    def store(self, entry: Entry, data: model.Data, *, exclusive: bool = False) -> bool:
        """Store an entry without a source, replacing any file at its key; returns whether it was stored.

        `exclusive` stores nothing if the entry exists. Raises `CacheFault` or `OSError` if it cannot be stored.
        """
        for is_last in (False, False, True):
            pending = PendingEntry(entry, data, None, exclusive=exclusive)
            try:
                self._barrier.with_rebuild(partial(self._publish_one, pending))
                break
            except FileNotFoundError:
                # another process invalidated the key without the index and unlinked this temporary file. This write
                # is the later one, so it is tried again
                if is_last:
                    raise
        return pending.is_stored

    def _publish_one(self, pending: PendingEntry) -> None:
        for item in self._publish([pending]):
            if item.failure is not None:
                raise item.failure

    def _publish_together(self, batch: list[PendingEntry]) -> list[PendingEntry]:
        """Publish several entries; returns those to retry one by one."""
        try:
            return [item.pending for item in self._publish(batch) if item.failure is not None]
        except NoRoom:
            return batch

    def _publish(self, batch: list[PendingEntry]) -> list[StagedEntry]:
        with self.staged(batch) as staged, self._session.section() as (process, index):
            staged.enter(process, index, staged.items)
        return staged.items

    def _take(self, process: Registration, batch: Sequence[PendingEntry]) -> None:
        """Take the space of several entries."""
        size = sum([len(pending.data) for pending in batch])
        try:
            self._space.take(process, size)
        except NoRoom as error:
            if error.bound is not None and len(batch) == 1:
                self._space.warn_of_bound(size, error.bound)
            raise

    @contextmanager
    def staged(self, batch: Sequence[PendingEntry]) -> Iterator[Staged]:
        """Write the temporary files of entries, for the caller to enter them into the index, in one section.

        A file that could not be written is the `failure` of its entry. Raises `NoRoom` if there is no room. On exit,
        the files of entries that were not entered are removed.
        """
        staged = Staged(self._enter)
        # until the rows are in the index: a rebuild or a lower bound meanwhile would count
        # these bytes twice, or not at all
        with self._session.storing() as process:
            self._take(process, batch)
            staged.process = process
            try:
                for pending in batch:
                    stamp = files.stamp_of(pending.entry, pending.data, pending.validator)
                    staged.items.append(StagedEntry(pending, *process.next_temporary(), stamp))
                # no file is written through a link
                files.inside(self._root, f"{META}/tmp/{process.owner}/.", staged.seen)
                for item in staged.items:
                    self._write(item)
                yield staged
            finally:
                self._give_back(process, staged.items, batch)
        # after the guard is released, because unlinking takes time
        if staged.overtaken:
            self._space.unlink_deleted(staged.overtaken)
        _log(staged.items)
        # the entries are stored even if one of these fails
        self._barrier.try_or(self._space.prepare_policy, False)
        if recovery_due(process):
            self._barrier.try_or(lambda: recovery.recover(self._session), None)

    @staticmethod
    def _give_back(process: Registration, items: Sequence[StagedEntry], batch: Sequence[PendingEntry]) -> None:
        """Return the unspent part of a lease after the temporary files are gone."""
        if unwritten := batch[len(items) :]:
            process.give_back(sum([len(pending.data) for pending in unwritten]))
        for item in items:
            if not item.is_spent:
                try:
                    files.discard(item.temporary)
                except OSError as error:
                    # a file that cannot be unlinked stays counted
                    item.failure = item.failure or error
                else:
                    process.give_back(item.stamp.size)

    def try_staged(self, batch: Sequence[PendingEntry], stack: ExitStack) -> Staged:
        """As `staged`, until the stack is closed; without any entry if they cannot be stored."""
        nothing = Staged(self._enter)
        return self._barrier.try_or(lambda: stack.enter_context(self.staged(batch)), nothing) if batch else nothing

    def _write(self, item: StagedEntry) -> None:
        item.hashed = self._check.is_hashed(item.pending.entry)
        try:
            files.write(item.temporary, item.pending.data, item.stamp_in_place)
            if item.pending.age:
                # the age of an entry is that of its file
                then = time.time() - item.pending.age
                os.utime(item.temporary, (then, then))
        except OSError as error:
            item.failure = _cause(error)
            if isinstance(item.failure, NoRoom):
                # this entry is lost, but the next one finds room
                self._space.make_room(item.stamp.size)

    # -- under the guard

    def _enter(
        self, process: Registration, index: Index, items: Sequence[StagedEntry], seen: set[str]
    ) -> list[Tombstone]:
        """Add the rows of entries, then rename their files; commits.

        Returns tombstones of entries that were overtaken by a write.
        """
        versions = WriteVersions(process)
        entering = self._check.of(versions, index, items, seen)
        if not entering:
            return []
        keys = {item.pending.entry.key for item in entering}
        used = time.time_ns()
        for item in entering:
            entry, stamp, number = item.pending.entry, item.stamp, item.sequence
            if (old := item.old) is not None:
                item.replaced = index.add_tombstone(old, process.owner)
                index.remove(old.id)
            index.add(
                entry, hashed=item.hashed, size=stamp.size, crc=stamp.crc, used=used, owner=process.owner, seq=number
            )
        index.tables.drop_absent(keys)
        # in the same transaction as the rows, so that these bytes are counted once at every moment
        index.change_lease(process.owner, -sum([item.stamp.size for item in entering]))
        self._space.return_surplus(process, index)
        arrived = {item.pending.entry: item.stamp.size for item in entering}
        self._space.recency.flush_to(index, arrived, together=True)
        for namespace in set(map(namespace_of, keys)):
            self._session.record_made(namespace)
        # if an interrupt comes from here on, the commit may have happened, so the bytes count as spent
        for item in entering:
            item.is_spent = True
        try:
            self._commit_and_reveal(index, entering)
        except (sqlite3.Error, Damaged):
            for item in entering:
                item.is_spent = False
            raise
        self._undo(process, index, [item for item in entering if item.failure is not None])
        # only now: until the rename, the file of the replaced entry lies at the path and its bytes must stay counted
        if [item for item in entering if item.replaced is not None]:
            index.begin()
            self._drop_replaced(index, entering)
        stored = [item for item in entering if item.failure is None]
        return self._superseded(process, index, stored, None if versions.are_current else WriteVersions(process))

    @staticmethod
    def _commit_and_reveal(index: Index, items: Iterable[StagedEntry]) -> None:
        """Commit, then rename: a row whose file has no name yet can be finished, but a file without a row is lost."""
        index.commit()
        for item in items:
            try:
                files.move(item.temporary, item.path)
            except OSError as error:
                item.failure = _cause(error)

    def _undo(self, process: Registration, index: Index, failed: Sequence[StagedEntry]) -> None:
        """Delete the rows of entries whose files could not be renamed."""
        if not failed:
            return
        try:
            index.begin()
            tombstones = []
            for item in failed:
                if (row := index.find(item.pending.entry)) is not None:
                    index.remove(row.id)
                    # a failed rename may have happened nevertheless
                    tombstones.append(index.add_tombstone(row, process.owner))
                index.change_lease(process.owner, item.stamp.size)
            index.commit()
            index.begin()
            recovery.finish(self._session, index, tombstones)
            index.commit()
        except sqlite3.Error as error:
            # the index counts bytes that do not exist: rebuild it
            raise Damaged("an entry without a file could not be taken out of the index") from error
        for item in failed:
            item.is_spent = False

    def _drop_replaced(self, index: Index, items: Iterable[StagedEntry]) -> None:
        """Free the bytes of replaced entries, whose files were renamed over or are unlinked here."""
        for item in items:
            if (old := item.replaced) is not None:
                if item.failure is not None or old.hashed != item.hashed:
                    recovery.finish(self._session, index, [old])
                else:
                    index.drop_tombstones([old.id])

    def _superseded(
        self, process: Registration, index: Index, items: Sequence[StagedEntry], versions: WriteVersions | None
    ) -> list[Tombstone]:
        """Delete entries that a writer without the guard overtook (see `Writes`), and ranges of whole objects.

        `versions` are those of now; None if none has changed.
        """
        rows = {}
        for item in items:
            version, entry = item.pending.version, item.pending.entry
            item.pending.is_stored = version is None or versions is None or version == versions.of(entry.key)
            rows.update({row.id: row for row in item.damaged})
            if not item.pending.is_stored or (item.has_others and entry.is_whole):
                for row in index.of_key(entry.key):
                    if not item.pending.is_stored or not row.entry.is_whole:
                        rows[row.id] = row
        if not rows:
            return []
        index.commit()
        index.begin()
        return self._space.mark_deleted(process, index, rows.values())


def _log(items: Iterable[StagedEntry]) -> None:
    """Log the outcome of publishing; never under the guard, because a slow handler would hold other processes up."""
    if logger.isEnabledFor(logging.DEBUG):
        for item in items:
            if item.pending.is_stored:
                logger.debug("published %s: %d bytes", item.pending.entry, item.stamp.size)
            else:
                logger.debug("not published %s: %s", item.pending.entry, item.failure or _OVERTAKEN)


def _cause(error: OSError) -> OSError | NoRoom:
    """Why an entry is not stored: a full disk is no fault of the cache."""
    return NoRoom(f"the disk is full: {error}") if error.errno in (errno.ENOSPC, errno.EDQUOT) else error
