"""The bound: leases of space, and eviction to make room.

At any time ``bytes + leases + tombstones <= max_size`` in the index, and every byte on the disk is part of that sum: a
file is written only out of a lease, and its bytes are freed only after it is unlinked.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from xzcache import files
from xzcache._config import shown_min_free, shown_size
from xzcache.directory import _recovery as recovery
from xzcache.files import Whose, relative_path
from xzcache.model import META, NoRoom

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from xzcache.directory._statistics import Ledger
    from xzcache.eviction import Policy, Recency
    from xzcache.index import Index, IndexSession, Registration, Row, Tombstone, Totals


logger = logging.getLogger("xzcache.directory")

# bytes that a process asks for in advance, so that it needs the index for the bound only once in many entries
_LARGEST_LEASE: Final = 4 << 20
# bytes of the disk for the index: an eviction adds tombstones before it frees anything
_INDEX_RESERVE: Final = 4 << 20
_IN_ADVANCE: Final = 64
"""How many entries, if they are as large as most, are evicted for the next ones: this one waits for it."""
_SMALL: Final = 64 << 10
"""The most bytes of a file that is unlinked as fast as it is renamed."""
_LONGEST: Final = 0.002
"""Seconds that the deletions of one section are to take."""
_FEWEST, _USUAL, _MOST = 8, 32, 128
# other processes may take the room that this one has made: it tries again, but not for ever
_ATTEMPTS: Final = 8
_PAUSE_WHILE_FULL: Final = 1.0
"""Seconds for which a full directory without evictions is not asked for room again."""


class HideReport:
    """The keys whose files could not be hidden.

    Attributes
    ----------
    left : set of str
        Keys of which a file may still exist.
    missing : set of str
        Keys of which a file in the index was missing from its path.
    error : OSError or None
        The reason for one of `left`.
    """

    def __init__(self) -> None:
        self.left: set[str] = set()
        self.missing: set[str] = set()
        self.error: OSError | None = None

    def add(self, key: str, error: OSError) -> None:
        """Add a key of which a file may still exist."""
        self.left.add(key)
        self.error = error


class Pace:
    """How many entries one section deletes: others wait for the guard meanwhile, and disks differ.

    Attributes
    ----------
    count : int
        As many as take `_LONGEST` together, by the time that the last ones took.
    """

    def __init__(self) -> None:
        self._each = _LONGEST / _USUAL
        self.count = _USUAL

    def record(self, count: int, seconds: float) -> None:
        """Record that the deletion of some entries took so long."""
        # of few entries, the time of the transaction itself is most
        if count >= _FEWEST:
            each = seconds / count
            # slowly upwards: a thread that has to wait for a processor gains nothing by deleting less
            self._each = 1.25 * self._each if each > self._each else max(1e-6, (3 * self._each + each) / 4)
            self.count = int(min(_MOST, max(_FEWEST, _LONGEST / self._each)))


class Space:
    """Leases and frees the space of one cache directory; `min_free` is a fraction of the file system, or bytes."""

    def __init__(self, session: IndexSession, recency: Recency, ledger: Ledger, min_free: float | int) -> None:
        self.session = session
        self.recency = recency
        self._ledger = ledger
        self.min_free = min_free
        self.pace = Pace()
        self.evictions = 0
        self._is_bound_small = False
        self._has_logged = False
        self._full_until = 0.0
        self._full_for = 0
        self._unreleased: list[Tombstone] = []
        self._erased: list[Tombstone] = []

    @property
    def policy(self) -> Policy:
        """The eviction policy."""
        return self.recency.policy

    # -- taking

    def take(self, process: Registration, size: int) -> None:
        """Take bytes from this process's lease, enlarging it and evicting if needed.

        Raises `NoRoom` without taking any.
        """
        with process.lease_lock:
            # other threads share the lease: take the free part first, and request only the rest
            had = min(process.free, size)
            process.free -= had
        # the usual way: no transaction, no lock between processes
        if had == size:
            return
        try:
            self._take_more(process, size - had, size)
        except BaseException:
            process.give_back(had)
            raise

    def warn_of_bound(self, size: int, bound: int) -> None:
        """Log, once, that an entry is larger than the whole cache may be."""
        if not self._is_bound_small:
            self._is_bound_small = True
            text = "an object of %s is larger than max_size=%s of the cache in %s: such objects are not cached"
            logger.warning(text, shown_size(size), shown_size(bound), self.session.root)

    def _take_more(self, process: Registration, size: int, whole: int) -> None:
        for attempt in range(_ATTEMPTS):
            # without evictions the answer stays the same for a while, and each attempt would cost a transaction
            if not self.policy.evicts and whole >= self._full_for and time.monotonic() < self._full_until:
                break
            short, tombstones = self._enlarge(process, size, whole)
            if short > 0 and not tombstones and self.prepare_policy(short):
                short, tombstones = self._enlarge(process, size, whole)
            if short <= 0:
                return
            # the next attempt frees their bytes in its own transaction, which saves one
            self.unlink_deleted(tombstones, soon=True)
            self._count_evicted(tombstones)
            # the next eviction frees as much
            self.prepare_policy(short)
            freed = sum(item.size for item in tombstones)
            if freed < short:
                freed += self.make_room(short - freed)
            if freed == 0:
                if attempt and not recovery_due(process):
                    # smaller entries are still tried, because they may find room
                    self._full_until, self._full_for = time.monotonic() + _PAUSE_WHILE_FULL, whole
                    break
                # processes that died since may have left leases and tombstones, which are
                # counted until they are recovered
                recovery.recover(self.session)
        raise NoRoom(f"no room for {size} bytes in {self.session.root}")

    def _enlarge(self, process: Registration, size: int, whole: int) -> tuple[int, list[Tombstone]]:
        """Lease `size` bytes more, for a file of `whole` bytes; returns the missing bytes and the evicted entries."""
        with self.session.section() as (current, index):
            # the lease belongs to the directory that was replaced, and so would the file
            if current is not process:
                raise NoRoom("the directory was removed meanwhile")
            with self.freeing_tombstones(index):
                totals = index.totals()
                short = self._grant(process, index, totals, size, whole)
                index.commit()
            has_room = totals.room is None or totals.room >= size
            takes_long = self.recency.are_many or not self.policy.is_prepared
            if short <= 0 or not self.policy.evicts or has_room or takes_long:
                return short, []
            # another process may take the freed bytes: the caller then evicts more
            index.begin()
            self.recency.flush_to(index)
            return short, self._mark_evicted(process, index, short)

    def _grant(self, process: Registration, index: Index, totals: Totals, size: int, whole: int) -> int:
        """Lease `size` bytes more, and some in advance; returns how many are missing, 0 if they were taken."""
        if totals.max_size is not None and whole > totals.max_size:
            error = NoRoom(f"{whole} bytes are more than the bound of {totals.max_size}")
            error.bound = totals.max_size
            raise error
        chunk = self._lease_size(totals, len(index.owners()))
        room = totals.room
        # some more in advance, so that the next entries need no eviction of their own
        if room is not None and room < size:
            return size - room + min(chunk, _IN_ADVANCE * totals.size // max(1, totals.entries))
        grant = size + chunk if room is None else min(size + chunk, room)
        if (short := self._short_of_disk(grant)) > 0:
            # leasing in advance must not evict an entry
            grant, short = size, self._short_of_disk(size)
        # other programs fill the disk: to evict everything would not help, and the cache would be empty
        if short > totals.size:
            error = NoRoom(
                f"the disk of {self.session.root} has less free than min_free={shown_min_free(self.min_free)} asks for"
            )
            if not self._has_logged:
                # warn once, because the default may surprise users
                self._has_logged = True
                logger.warning("%s: nothing new is cached until there is more", error)
            raise error
        if short > 0:
            return short
        index.change_lease(process.owner, grant)
        # before any thread may spend these bytes: a lease that the index does not know would break the bound
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
            # some file systems do not report it
            return 0
        reserve = int(self.min_free * total) if isinstance(self.min_free, float) else self.min_free
        # the index needs some space to record evictions
        return max(reserve, min(_INDEX_RESERVE, total // 8)) + grant - free

    def return_surplus(self, process: Registration, index: Index) -> None:
        """Return the surplus of the lease after failed writes; within a section."""
        with process.lease_lock:
            # only a large surplus, so that the next entries find some of the lease left
            surplus = process.free - 2 * _LARGEST_LEASE
            if surplus <= 0:
                return
            process.free -= surplus
        index.change_lease(process.owner, -surplus)

    # -- giving back

    def make_room(self, want: int) -> int:
        """Evict entries if the policy allows it; returns the bytes freed."""
        return self.evict(want) if self.policy.evicts else 0

    def evict(self, want: int) -> int:
        """Evict the entries that the policy chooses until `want` bytes are free; returns the bytes freed."""
        freed = 0
        try:
            while freed < want:
                self.prepare_policy(want - freed)
                if self.recency.are_many:
                    with self.session.section() as (_, index):
                        self.recency.flush_to(index)
                with self.session.section() as (process, index):
                    self.recency.flush_to(index, together=True)
                    tombstones = self._mark_evicted(process, index, want - freed)
                # the next section frees their bytes
                self.unlink_deleted(tombstones, soon=True)
                self._count_evicted(tombstones)
                freed += sum(item.size for item in tombstones)
                if not tombstones:
                    break
        finally:
            if erased := self._take_erased():
                self.free_tombstones(erased)
        return freed

    def prepare_policy(self, want: int = 0) -> bool:
        """Let the policy do what takes long, if it is due, outside of any section; returns whether it was."""
        return self.policy.prepare(self.session, want)

    def _mark_evicted(self, process: Registration, index: Index, want: int) -> list[Tombstone]:
        victims = self.policy.choose(index, want, self.pace.count)
        self._ledger.evicted(victims)
        return self.mark_deleted(process, index, victims)

    def _count_evicted(self, tombstones: Sequence[Tombstone]) -> None:
        self.evictions += len(tombstones)
        if logger.isEnabledFor(logging.DEBUG):
            for item in tombstones:
                logger.debug("evicted %s: %d bytes", item.entry, item.size)

    def enforce_bound(self) -> int:
        """Evict until the directory is within its bound; returns the bytes freed."""
        with self.session.section() as (_, index):
            room = index.totals().room
        return self.evict(-room) if room is not None and room < 0 else 0

    def mark_deleted(
        self, process: Registration, index: Index, rows: Iterable[Row], report: HideReport | None = None
    ) -> list[Tombstone]:
        """Move entries from the index to tombstones, commit, then hide their files; within a section.

        Keys whose files may remain are added to `report`. Returns the tombstones of hidden files, for `unlink_deleted`.
        The tombstones of all other files lose their owner, so that the next recovery retries them.
        """
        begun = time.perf_counter()
        tombstones = []
        with self.freeing_tombstones(index) as freed:
            for row in rows:
                index.remove(row.id)
                tombstones.append(index.add_tombstone(row, process.owner))
            if tombstones or freed:
                # rows first: if this process dies in between, the next one finds the tombstone and removes the file
                index.commit()
        report = HideReport() if report is None else report
        seen: set[str] = set()
        hidden = [item for found in tombstones if (item := self._hidden(found, report, seen)) is not None]
        # one path for each directory, because `prune` looks only at the directories above
        for path in {os.path.dirname(relative): relative for relative in map(_relative, hidden)}.values():
            files.prune(f"{self.session.root}/{path}", self.session.root)
        if len(hidden) < len(tombstones):
            index.begin()
            index.disown_tombstones({item.id for item in tombstones} - {item.id for item in hidden})
            index.commit()
        self.pace.record(len(tombstones), time.perf_counter() - begun)
        return hidden

    def _hidden(self, item: Tombstone, report: HideReport, seen: set[str]) -> Tombstone | None:
        """Hide a file; returns its tombstone, or None if the file may still be visible."""
        # an error may occur only once: a second attempt spares the key the quarantine
        for is_last in (False, True):
            try:
                return self._hide(item, report, seen)
            except OSError as error:
                if is_last:
                    report.add(item.entry.key, error)
        return None

    def _hide(self, item: Tombstone, report: HideReport, seen: set[str]) -> Tombstone:
        """Unlink a small file, or move a larger one to the trash; raises `OSError` if it may still be visible."""
        path = files.inside(self.session.root, _relative(item), seen)
        found = files.look(path, item.entry)
        if found is Whose.GONE:
            report.missing.add(item.entry.key)
        # a foreign file may have replaced the entry
        if found in (Whose.GONE, Whose.FOREIGN):
            return item
        try:
            if item.size <= _SMALL:
                with suppress(OSError):
                    os.unlink(path)
                    return item._replace(is_unlinked=True)
            try:
                # unlinking a large file takes too long under the guard; a rename takes the same time for any size
                files.move(path, files.inside(self.session.root, f"{META}/trash/{item.id}", seen))
            except FileNotFoundError:
                pass
            except OSError:
                files.discard(path)
        except OSError:
            # neither unlinked nor moved: the file must at least not be taken for an entry any more
            files.disown(path)
            raise
        return item

    def clear_paths(self, index: Index, keys: Iterable[str], report: HideReport, unowned: Sequence[Tombstone]) -> None:
        """Unlink files of keys that have no row any more; within a section.

        `unowned` are the tombstones without an owner.
        """
        for key in keys:
            for is_last in (False, True):
                try:
                    recovery.clear_paths(self.session, index, key, unowned)
                    break
                except OSError as error:
                    if is_last:
                        report.add(key, error)

    def unlink_deleted(self, tombstones: list[Tombstone], *, soon: bool = False) -> None:
        """Unlink the files of tombstones, then free their bytes.

        With `soon`, small amounts are freed in the next transaction of this process instead of one of their own.
        """
        # those of failed attempts are tried again with the next ones
        tombstones, self._unreleased = tombstones + self._unreleased, []
        if not tombstones:
            return
        erased = self.erase(tombstones)
        if soon and sum(item.size for item in erased) <= _LARGEST_LEASE:
            self._erased.extend(erased)
        else:
            self.free_tombstones(erased)

    @contextmanager
    def freeing_tombstones(self, index: Index) -> Iterator[list[Tombstone]]:
        """Free the postponed tombstones in a transaction that the caller commits in this context; yields them."""
        erased = self._take_erased()
        try:
            if erased:
                self.free_tombstones_in(index, erased)
            yield erased
        except BaseException:
            # the transaction was rolled back, so the bytes are still counted
            self._erased.extend(erased)
            raise

    def _take_erased(self) -> list[Tombstone]:
        erased: list[Tombstone] = []
        # other threads add to it
        with suppress(IndexError):
            while True:
                erased.append(self._erased.pop())
        return erased

    def erase(self, tombstones: list[Tombstone]) -> list[Tombstone]:
        """Unlink the files of tombstones; returns those whose files are gone."""
        erased = []
        seen: set[str] = set()
        for item in tombstones:
            if item.is_unlinked:
                erased.append(item)
                continue
            try:
                files.discard(files.inside(self.session.root, f"{META}/trash/{item.id}", seen))
                erased.append(item)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    # a link replaced the trash directory: no file of this cache is behind it
                    erased.append(item)
                else:
                    self._unreleased.append(item)
        return erased

    def free_tombstones(self, tombstones: list[Tombstone]) -> None:
        """Free the bytes of unlinked files; if that fails, the next `unlink_deleted` tries again."""
        try:
            with self.session.section() as (_, index):
                self.free_tombstones_in(index, tombstones)
        except BaseException:
            self._unreleased += tombstones
            raise

    @staticmethod
    def free_tombstones_in(index: Index, tombstones: list[Tombstone]) -> None:
        """Free the bytes of unlinked files, in the caller's transaction."""
        index.drop_tombstones(item.id for item in tombstones)


def _relative(item: Tombstone) -> str:
    return relative_path(item.entry, hashed=item.hashed)


def recovery_due(process: Registration) -> bool:
    """Whether it is time to look for dead processes again."""
    now = time.monotonic()
    if now < process.next_recovery:
        return False
    # once a second at most: a look for dead processes tries a lock of each owner, under the guard
    process.next_recovery = now + 1.0
    return True
