"""The bound: who may write how many bytes, and what leaves to make room.

At any instant ``bytes + leases + dying <= max_size`` in the index, and no byte is on disk that is not in that sum: a
file is written only out of a lease, and its bytes are given back only after it is unlinked.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from xzcache import files
from xzcache.directory import _recovery as recovery
from xzcache.files import Whose, relative_path
from xzcache.model import META, NoRoom

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xzcache.eviction import Policy, Recency
    from xzcache.index import Index, IndexSession, Registration, Row, Tombstone, Totals


logger = logging.getLogger("xzcache")

_LARGEST_LEASE: Final = 4 << 20
_INDEX_RESERVE: Final = 4 << 20
_ATTEMPTS: Final = 8
_PAUSE_WHILE_FULL: Final = 1.0
"""Seconds for which a directory that was full, and from which nothing leaves, is not asked again."""


class HideReport:
    """What became of keys whose files were to be taken out of sight.

    Attributes
    ----------
    left : set of str
        Keys of which a file may still be there.
    missing : set of str
        Keys of which a file that the index knew was not where it had to be.
    error : OSError or None
        Why one of `left` is.
    """

    def __init__(self) -> None:
        self.left: set[str] = set()
        self.missing: set[str] = set()
        self.error: OSError | None = None

    def add(self, key: str, error: OSError) -> None:
        """Take note of a key of which a file may still be there."""
        self.left.add(key)
        self.error = error


class Space:
    """Takes and gives back the space of one cache directory.

    Parameters
    ----------
    books : Books
    recency : Recency
    min_free : float or int
        What is left free of the file system: a fraction of it, or bytes.
    """

    def __init__(self, session: IndexSession, recency: Recency, min_free: float | int) -> None:
        self.session = session
        self.recency = recency
        self.min_free = min_free
        self.evictions = 0
        self._has_logged = False
        self._full_until = 0.0
        self._full_for = 0
        self._unreleased: list[Tombstone] = []
        self._erased: list[Tombstone] = []

    @property
    def policy(self) -> Policy:
        """Who decides what leaves."""
        return self.recency.policy

    # -- taking

    def take(self, process: Registration, size: int) -> None:
        """Take bytes from this process's lease, enlarging it, and evicting for that, where needed.

        Raises
        ------
        NoRoom
            Nothing was taken.
        """
        with process.lease_lock:
            # other threads take from the same lease: what there is is taken first, and only the rest asked for
            had = min(process.free, size)
            process.free -= had
        if had == size:
            return
        try:
            self._take_more(process, size - had, size)
        except BaseException:
            process.give_back(had)
            raise

    def _take_more(self, process: Registration, size: int, whole: int) -> None:
        for attempt in range(_ATTEMPTS):
            if not self.policy.evicts and whole >= self._full_for and time.monotonic() < self._full_until:
                break
            short, tombstones = self._enlarge(process, size, whole)
            if short <= 0:
                return
            self.unlink_deleted(tombstones, soon=True)
            self.evictions += len(tombstones)
            freed = sum(item.size for item in tombstones)
            if freed < short:
                freed += self.make_room(short - freed)
            if freed == 0:
                if attempt and not recovery_due(process):
                    # what is smaller may still have room
                    self._full_until, self._full_for = time.monotonic() + _PAUSE_WHILE_FULL, whole
                    break
                recovery.recover(self.session)
        raise NoRoom(f"no room for {size} bytes in {self.session.root}")

    def _enlarge(self, process: Registration, size: int, whole: int) -> tuple[int, list[Tombstone]]:
        """Lease `size` bytes more, for a file of `whole` bytes.

        Returns
        -------
        int
            How many are missing, 0 if they were taken.
        list of Dying
            What has to leave for them, and is out of sight.
        """
        with self.session.section() as (current, index):
            if current is not process:
                raise NoRoom("the directory was removed meanwhile")
            with self._freeing_tombstones(index):
                totals = index.totals()
                short = self._grant(process, index, totals, size, whole)
                index.commit()
            if short <= 0 or not self.policy.evicts or totals.room is None or totals.room >= size:
                return short, []
            # others may take what is freed: more goes if they have
            index.begin()
            self.recency.flush_to(index)
            return short, self.mark_deleted(process, index, self.policy.choose(index, short))

    def _grant(self, process: Registration, index: Index, totals: Totals, size: int, whole: int) -> int:
        """Lease `size` bytes more, and some in advance; returns how many are missing, 0 if they were taken."""
        if totals.max_size is not None and whole > totals.max_size:
            raise NoRoom(f"{whole} bytes are more than the bound of {totals.max_size}")
        chunk = self._lease_size(totals, len(index.owners()))
        room = totals.room
        if room is not None and room < size:
            return size - room + chunk
        grant = size + chunk if room is None else min(size + chunk, room)
        if (short := self._short_of_disk(grant)) > 0:
            # what is leased in advance must not cost an entry
            grant, short = size, self._short_of_disk(size)
        if short > totals.size:
            error = NoRoom(f"the disk of {self.session.root} has less free than min_free={self.min_free} asks for")
            if not self._has_logged:
                # what is asked for by default may be news to somebody
                self._has_logged = True
                logger.warning("%s: nothing new is cached until there is more", error)
            raise error
        if short > 0:
            return short
        index.change_lease(process.owner, grant)
        index.commit()
        process.give_back(grant - size)
        return 0

    @staticmethod
    def _lease_size(totals: Totals, owners: int) -> int:
        """Bytes that a process leases in advance: together at most some 3 % of the bound."""
        if totals.max_size is None:
            return _LARGEST_LEASE
        return min(_LARGEST_LEASE, totals.max_size // max(256, 32 * owners))

    def _short_of_disk(self, grant: int) -> int:
        free, total = files.free_bytes(self.session.root)
        if total == 0:
            # some file systems do not say
            return 0
        reserve = int(self.min_free * total) if isinstance(self.min_free, float) else self.min_free
        # without any room for itself, the index could not even record what leaves
        return max(reserve, min(_INDEX_RESERVE, total // 8)) + grant - free

    def return_surplus(self, process: Registration, index: Index) -> None:
        """Return what a failed write left over; within a section."""
        with process.lease_lock:
            surplus = process.free - 2 * _LARGEST_LEASE
            if surplus <= 0:
                return
            process.free -= surplus
        index.change_lease(process.owner, -surplus)

    # -- giving back

    def make_room(self, want: int) -> int:
        """Let entries go for new ones, if the policy lets any; returns the bytes freed."""
        return self.evict(want) if self.policy.evicts else 0

    def evict(self, want: int) -> int:
        """Let entries go until `want` bytes are free, those that the policy chooses; returns the bytes freed."""
        freed = 0
        while freed < want:
            with self.session.section() as (process, index):
                self.recency.flush_to(index)
                victims = self.policy.choose(index, want - freed)
                tombstones = self.mark_deleted(process, index, victims)
            self.unlink_deleted(tombstones)
            self.evictions += len(tombstones)
            freed += sum(item.size for item in tombstones)
            if not tombstones:
                break
        return freed

    def enforce_bound(self) -> None:
        """Evict until the directory is within its bound, which may have been lowered."""
        with self.session.section() as (_, index):
            room = index.totals().room
        if room is not None and room < 0:
            self.evict(-room)

    def mark_deleted(
        self, process: Registration, index: Index, rows: Iterable[Row], report: HideReport | None = None
    ) -> list[Tombstone]:
        """Take entries out of the index, then their files out of sight; within a section, which is committed.

        Parameters
        ----------
        member : Membership
        index : Index
        rows : iterable of Row
        doubts : Doubtful, optional
            Is told of the keys whose files could not be seen to be gone.

        Returns
        -------
        list of Dying
            What is out of sight, to be released. Every other file stays counted, as a tombstone that no process owns:
            the next recovery tries again.
        """
        tombstones = []
        with self._freeing_tombstones(index):
            for row in rows:
                index.remove(row.id)
                tombstones.append(index.add_tombstone(row, process.owner))
            index.commit()
        report = HideReport() if report is None else report
        hidden = [item for item in tombstones if self._is_hidden(item, report)]
        if len(hidden) < len(tombstones):
            index.begin()
            index.disown_tombstones({item.id for item in tombstones} - {item.id for item in hidden})
            index.commit()
        return hidden

    def _is_hidden(self, item: Tombstone, report: HideReport) -> bool:
        """Take a file out of sight; False where that cannot be done, or cannot be told."""
        for is_last in (False, True):
            try:
                if self._hide(item) is Whose.GONE:
                    report.missing.add(item.entry.key)
                return True
            except OSError as error:
                if is_last:
                    report.add(item.entry.key, error)
        return False

    def _hide(self, item: Tombstone) -> Whose:
        """Take a file out of sight; returns whose it was.

        Raises
        ------
        OSError
            It may still be there.
        """
        relative = relative_path(item.entry, hashed=item.hashed)
        path = files.inside(self.session.root, relative)
        found = files.look(path, item.entry)
        # a foreign file may have taken the place of ours; and none is unlinked here: that takes long for a large one,
        # and the guard is held
        if found in (Whose.GONE, Whose.FOREIGN):
            return found
        try:
            files.move(path, files.inside(self.session.root, f"{META}/trash/{item.id}"))
        except FileNotFoundError:
            pass
        except OSError:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError:
                files.disown(path)
                raise
        files.prune(path, self.session.root)
        return found

    def clear_paths(self, index: Index, key: str, report: HideReport) -> None:
        """Unlink files of a key that has no row any more; within a section."""
        for is_last in (False, True):
            try:
                recovery.clear_paths(self.session, index, key)
                return
            except OSError as error:
                if is_last:
                    report.add(key, error)

    def unlink_deleted(self, tombstones: list[Tombstone], *, soon: bool = False) -> None:
        """Unlink, and only then give the bytes back.

        Parameters
        ----------
        dying : list of Dying
        soon : bool
            Whether a few bytes may be given back with the next transaction, which is about to follow.
        """
        tombstones, self._unreleased = tombstones + self._unreleased, []
        if not tombstones:
            return
        erased = self.erase(tombstones)
        if soon and sum(item.size for item in erased) <= _LARGEST_LEASE:
            self._erased.extend(erased)
        else:
            self.free_tombstones(erased)

    @contextmanager
    def _freeing_tombstones(self, index: Index) -> Iterator[None]:
        """Give back, within a transaction that is committed inside, what was to be given back soon."""
        erased: list[Tombstone] = []
        # other threads add to it
        while self._erased:
            erased.append(self._erased.pop())
        try:
            if erased:
                self.free_tombstones_in(index, erased)
            yield
        except BaseException:
            self._erased.extend(erased)
            raise

    def erase(self, tombstones: list[Tombstone]) -> list[Tombstone]:
        """Unlink condemned files; returns those of which nothing is left."""
        erased = []
        for item in tombstones:
            try:
                files.discard(files.inside(self.session.root, f"{META}/trash/{item.id}"))
                erased.append(item)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    # a link took the place of our directory: nothing of this cache is behind it
                    erased.append(item)
                else:
                    self._unreleased.append(item)
        return erased

    def free_tombstones(self, tombstones: list[Tombstone]) -> None:
        """Give back the bytes of files that were unlinked; where that cannot be done now, it is done later."""
        try:
            with self.session.section() as (_, index):
                self.free_tombstones_in(index, tombstones)
        except BaseException:
            self._unreleased += tombstones
            raise

    @staticmethod
    def free_tombstones_in(index: Index, tombstones: list[Tombstone]) -> None:
        """Give back, within a transaction, the bytes of files that were unlinked."""
        index.drop_tombstones(item.id for item in tombstones)


def recovery_due(process: Registration) -> bool:
    """Whether it is time to look for dead processes again."""
    now = time.monotonic()
    if now < process.next_recovery:
        return False
    process.next_recovery = now + 1.0
    return True
