"""Publishing entries: when one may be stored, and the order of the steps that survives a crash.

Several that wait are published together. Each has its own file and its own checks; they have one wait for the guard and
one transaction in common.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from xzcache import files, model
from xzcache.directory import _recovery as recovery
from xzcache.directory._fetchlocks import Tickets
from xzcache.directory._space import recovery_due
from xzcache.files import Whose, is_plain, relative_path
from xzcache.model import META, Damaged, NoRoom, fits, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from xzcache.directory._faults import Keeper
    from xzcache.directory._fetchlocks import Ticket
    from xzcache.directory._space import Space
    from xzcache.files import Stamp
    from xzcache.index import Dying, Index, Membership, Row
    from xzcache.model import Data, Entry


logger = logging.getLogger("xzcache.directory")

# -- What is on its way into the cache: an entry and its bytes, and how far it has come.

MOST: Final = 32
"""Parcels that are published together: it bounds for how long others wait for the guard."""

MOST_BYTES: Final = 4 << 20
"""Bytes of several parcels that are published together, and so may have to be made room for at once."""

_OVERTAKEN: Final = "it was written meanwhile, or something else is in its place"


@dataclass(eq=False, slots=True)
class Parcel:
    """An entry that somebody wants to be stored.

    Attributes
    ----------
    ticket : Ticket or None
        From before the bytes were fetched; None for what has no source.
    validator : str
        What tells this state of the object from others, as its source has it.
    exclusive : bool
        Store nothing where the entry is there already.
    done : callable or None
        To be called when it is stored, or will not be.
    is_stored : bool
    """

    entry: Entry
    data: Data
    ticket: Ticket | None
    validator: str = ""
    exclusive: bool = False
    done: Callable[[], None] | None = None
    is_stored: bool = False


@dataclass(eq=False, slots=True)
class InFlight:
    """A parcel whose bytes were taken from the lease, and the file that they are written to.

    Attributes
    ----------
    old, replaced : Row or None, Dying or None
        What the index had of the entry before, and what has become of that.
    has_others : bool
        Whether the index may have other entries of the same object.
    damaged : list of Row
        Those of them whose files do not tell of which state they are.
    is_spent : bool
        Whether the bytes are the index's to count now.
    failure : OSError, NoRoom or None
        Why it cannot be stored.
    """

    parcel: Parcel
    sequence: int
    temporary: str
    stamp: Stamp
    odd: bool = False
    old: Row | None = None
    replaced: Dying | None = None
    has_others: bool = False
    damaged: list[Row] = field(default_factory=list)
    is_spent: bool = False
    failure: OSError | NoRoom | None = None

    @property
    def stamp_in_place(self) -> Stamp:
        """The stamp of the file where it is to lie: only one that does not lie at its own key has to carry that."""
        entry = self.parcel.entry
        return self.stamp._replace(key=entry.key) if self.odd or not entry.is_whole else self.stamp


# -- Which entries may be stored, and where the file of each is to lie: decided under the guard.


class Admission:
    """Lets entries into one cache directory, or not.

    Parameters
    ----------
    root : str
        The cache directory.
    folds : bool
        Whether the file system takes names that differ in case for the same.
    """

    def __init__(self, root: str, *, folds: bool) -> None:
        self._root = root
        self._folds = folds

    def of(self, member: Membership, index: Index, items: Sequence[InFlight], seen: set[str]) -> list[InFlight]:
        """Those that may enter; what the index has of each, and whether it is to lie at an odd place, is noted.

        Directories that were looked at are added to `seen`.
        """
        tickets, writings = Tickets(member), index.notes.writings()
        states: dict[str, str] = {}
        admitted = []
        for item in items:
            parcel = item.parcel
            key, state = parcel.entry.key, parcel.validator
            if item.failure is not None or (
                # somebody has written the key since the ticket was taken, or is writing it now
                parcel.ticket is not None and (parcel.ticket != tickets.of(key) or writings.concern(key))
            ):
                continue
            try:
                if parcel.exclusive and self._is_there(parcel.entry):
                    continue
            except OSError as error:
                item.failure = error
                continue
            item.has_others = known = index.knows(key)
            item.old = index.find(parcel.entry) if known else None
            apart = (key in states and not fits(state, states[key])) or (known and not self._agrees(index, item))
            if apart and parcel.ticket is not None:
                continue
            if self._finds_place(item, seen):
                admitted.append(item)
                states[key] = state
        return admitted

    def is_odd(self, entry: Entry) -> bool:
        """Whether the key of an entry cannot be a path."""
        return entry.is_whole and not is_plain(entry.key, folds=self._folds)

    def _agrees(self, index: Index, item: InFlight) -> bool:
        """Whether what is cached of an object is of the state that an entry is of: parts of two must not be mixed."""
        parcel, entry = item.parcel, item.parcel.entry
        for row in (index.find(entry.whole), index.piece_of(entry.key)):
            if row is not None and row.entry != entry:
                path = self._path(row.entry, odd=row.odd)
                stamp = files.read_stamp(path)
                if stamp is None:
                    # where it cannot be told, it may be of another state
                    with suppress(OSError):
                        found = files.look(path, row.entry)
                        if found in (Whose.MARKED, Whose.FOREIGN):
                            # nor ever will be: damage gives way
                            item.damaged.append(row)
                        if found is not Whose.OURS:
                            continue
                    return False
                if not fits(parcel.validator, stamp.validator):
                    return False
        return True

    def _is_there(self, entry: Entry) -> bool:
        places = (True,) if self.is_odd(entry) else (False, True)
        return any(files.exists(self._path(entry, odd=odd)) for odd in places)

    def _finds_place(self, item: InFlight, seen: set[str]) -> bool:
        """Have an entry lie elsewhere where something of somebody else's is at its key; False if that cannot be."""
        entry = item.parcel.entry
        if item.odd or not entry.is_whole:
            return True
        try:
            item.odd = self._is_blocked(item, seen)
            if item.odd:
                files.attach(item.temporary, item.stamp_in_place)
        except OSError as error:
            # what lies there cannot be told: it is neither renamed over, nor passed by
            item.failure = error
        return item.failure is None

    def _is_blocked(self, item: InFlight, seen: set[str]) -> bool:
        """Whether something of somebody else's keeps an entry from lying at its key."""
        entry = item.parcel.entry
        try:
            path = files.inside(self._root, relative_path(entry, odd=False), seen)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return True
            raise
        try:
            is_regular = stat.S_ISREG(os.lstat(path).st_mode)
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            return True
        if item.parcel.ticket is None or not is_regular:
            return not is_regular
        found = files.look(path, entry)
        if item.old is not None and not item.old.odd:
            # whatever has a mark of ours is in its place, however damaged
            return found is Whose.FOREIGN
        return found in (Whose.FOREIGN, Whose.MARKED, Whose.UNMARKED)

    def _path(self, entry: Entry, *, odd: bool) -> str:
        return f"{self._root}/{relative_path(entry, odd=odd)}"


# -- Publishing.


class Publisher:
    """Stores entries of one cache directory.

    Parameters
    ----------
    keeper : Keeper
    space : Space
    folds : bool
        Whether the file system takes names that differ in case for the same.
    """

    def __init__(self, keeper: Keeper, space: Space, *, folds: bool) -> None:
        self._keeper = keeper
        self._books = keeper.books
        self._root = keeper.books.root
        self._space = space
        self._admission = Admission(self._root, folds=folds)

    def publish(self, entry: Entry, data: model.Data, ticket: Ticket | None, validator: str = "") -> bool:
        """Store an entry for every process, unless it was written since the ticket was taken.

        Parameters
        ----------
        entry : Entry
        data : bytes-like
        ticket : Ticket or None
            From before the bytes were fetched; None stores nothing.
        validator : str
            What tells this state of the object from others, as its source has it.

        Returns
        -------
        bool
            Whether it was stored.
        """
        parcel = Parcel(entry, data, ticket, validator)
        self.publish_all([parcel])
        return parcel.is_stored

    def publish_all(self, parcels: Sequence[Parcel]) -> None:
        """As `publish`, of several together, no two of them the same entry; each tells whether it was stored."""
        todo = [parcel for parcel in parcels if parcel.ticket is not None and not self._keeper.health.is_aside]
        if len(todo) > 1:
            # what one of them lacks must not harm the others
            todo = self._keeper.attempt(lambda: self._together(todo), [])
        for parcel in todo:
            self._keeper.attempt(partial(self._alone, parcel), None)

    def store(self, entry: Entry, data: model.Data, *, exclusive: bool = False) -> bool:
        """Store an entry that has no source, over whatever file lies at its key.

        Parameters
        ----------
        entry : Entry
        data : bytes-like
        exclusive : bool
            Store nothing where the entry is there already.

        Returns
        -------
        bool
            Whether it was stored.

        Raises
        ------
        CacheFault, OSError
            It could not be.
        """
        for is_last in (False, False, True):
            parcel = Parcel(entry, data, None, exclusive=exclusive)
            try:
                self._keeper.insist(partial(self._alone, parcel))
                break
            except FileNotFoundError:
                # somebody deleted the key by hand, and what was in flight of it: this comes after that
                if is_last:
                    raise
        return parcel.is_stored

    def _alone(self, parcel: Parcel) -> None:
        for item in self._publish([parcel]):
            if item.failure is not None:
                raise item.failure

    def _together(self, parcels: list[Parcel]) -> list[Parcel]:
        """Publish several; returns those that are to be tried alone."""
        try:
            return [item.parcel for item in self._publish(parcels) if item.failure is not None]
        except NoRoom:
            return parcels

    def _publish(self, parcels: list[Parcel]) -> list[InFlight]:
        overtaken: list[Dying] = []
        with self._books.storing() as member:
            self._space.take(member, sum(len(parcel.data) for parcel in parcels))
            items: list[InFlight] = []
            try:
                for parcel in parcels:
                    stamp = files.stamp_of(parcel.entry, parcel.data, parcel.validator)
                    items.append(InFlight(parcel, *member.next_temporary(), stamp))
                # no file is written through a link
                files.inside(self._root, f"{META}/tmp/{member.owner}/.")
                for item in items:
                    self._write(item)
                with self._books.section() as (current, index):
                    if current is member:
                        overtaken = self._enter(member, index, items)
            finally:
                self._give_back(member, items, parcels)
        self._space.release(overtaken)
        _log(items)
        if recovery_due(member):
            # whatever comes of that, these entries are stored
            self._keeper.attempt(lambda: recovery.recover(self._books), None)
        return items

    @staticmethod
    def _give_back(member: Membership, items: Sequence[InFlight], parcels: Sequence[Parcel]) -> None:
        """Give back what was leased and not spent, once nothing of it is on disk."""
        member.give_back(sum(len(parcel.data) for parcel in parcels[len(items) :]))
        for item in items:
            if not item.is_spent:
                try:
                    files.discard(item.temporary)
                except OSError as error:
                    # what cannot be unlinked stays counted
                    item.failure = item.failure or error
                else:
                    member.give_back(item.stamp.size)

    def _write(self, item: InFlight) -> None:
        item.odd = self._admission.is_odd(item.parcel.entry)
        try:
            files.write(item.temporary, item.parcel.data, item.stamp_in_place)
        except OSError as error:
            item.failure = error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # for the next one
                self._space.make_room(item.stamp.size)
                item.failure = NoRoom(f"the disk of {self._root} is full")

    # -- under the guard

    def _enter(self, member: Membership, index: Index, items: Sequence[InFlight]) -> list[Dying]:
        """Give entries their rows, then their files their names; returns what somebody wrote in the meantime."""
        # a directory that many of them have in common is looked at once
        seen: set[str] = set()
        entering = self._admission.of(member, index, items, seen)
        if not entering:
            return []
        keys = {item.parcel.entry.key for item in entering}
        used = time.time_ns()
        for item in entering:
            entry, stamp, number = item.parcel.entry, item.stamp, item.sequence
            if (old := item.old) is not None:
                item.replaced = index.add_dying(old, member.owner)
                index.remove(old.id)
            index.add(entry, odd=item.odd, size=stamp.size, crc=stamp.crc, used=used, owner=member.owner, seq=number)
        index.notes.drop_absent(keys)
        index.change_lease(member.owner, -sum(item.stamp.size for item in entering))
        self._space.trim_lease(member, index)
        self._space.recency.tell(index, [item.parcel.entry for item in entering])
        for namespace in set(map(namespace_of, keys)):
            self._books.note_made(namespace)
        # whatever interrupts us from here on, it may be after the commit
        for item in entering:
            item.is_spent = True
        moves = []
        for item in entering:
            try:
                moves.append((item, self._path(item, seen)))
            except OSError as error:
                item.failure = error
        try:
            self._commit_and_reveal(index, moves)
        except sqlite3.Error:
            for item in entering:
                item.is_spent = False
            raise
        self._undo(member, index, [item for item in entering if item.failure is not None])
        if any(item.replaced for item in entering):
            index.begin()
            self._bury(index, entering)
        return self._superseded(member, index, [item for item in entering if item.failure is None])

    @staticmethod
    def _commit_and_reveal(index: Index, moves: Iterable[tuple[InFlight, str]]) -> None:
        """In this order: a row without a named file is finished by the next process, a file without a row is lost."""
        index.commit()
        for item, path in moves:
            try:
                files.move(item.temporary, path)
            except OSError as error:
                item.failure = error

    def _undo(self, member: Membership, index: Index, failed: Sequence[InFlight]) -> None:
        """Take rows back whose files could not be given their names."""
        if not failed:
            return
        try:
            index.begin()
            tombstones = []
            for item in failed:
                if (row := index.find(item.parcel.entry)) is not None:
                    index.remove(row.id)
                    # a rename that failed may have happened all the same, as far as can be told
                    tombstones.append(index.add_dying(row, member.owner))
                index.change_lease(member.owner, item.stamp.size)
            index.commit()
            index.begin()
            recovery.finish(self._books, index, tombstones)
            index.commit()
        except sqlite3.Error as error:
            # the index counts bytes that are not there: only a new one is right again
            raise Damaged("an entry without a file could not be taken out of the index") from error
        for item in failed:
            item.is_spent = False

    def _bury(self, index: Index, items: Iterable[InFlight]) -> None:
        """Give back the bytes of what was replaced: its place was renamed over, or it is unlinked."""
        for item in items:
            if (old := item.replaced) is not None:
                if item.failure is not None or old.odd != item.odd:
                    recovery.finish(self._books, index, [old])
                else:
                    index.drop_dying([old.id])

    def _superseded(self, member: Membership, index: Index, items: Sequence[InFlight]) -> list[Dying]:
        """Condemn what somebody wrote who could not wait for the guard, see `Writes`, and pieces of what is whole."""
        tickets = Tickets(member)
        rows = {}
        for item in items:
            ticket, entry = item.parcel.ticket, item.parcel.entry
            item.parcel.is_stored = ticket is None or ticket == tickets.of(entry.key)
            rows.update({row.id: row for row in item.damaged})
            if not item.parcel.is_stored or (item.has_others and entry.is_whole):
                for row in index.of_key(entry.key):
                    if not item.parcel.is_stored or not row.entry.is_whole:
                        rows[row.id] = row
        if not rows:
            return []
        index.commit()
        index.begin()
        return self._space.condemn(member, index, rows.values())

    def _path(self, item: InFlight, seen: set[str]) -> str:
        return files.inside(self._root, relative_path(item.parcel.entry, odd=item.odd), seen)


def _log(items: Iterable[InFlight]) -> None:
    """Log what has become of entries; never under the guard, which a handler would keep others from."""
    if logger.isEnabledFor(logging.DEBUG):
        for item in items:
            if item.parcel.is_stored:
                logger.debug("published %s: %d bytes", item.parcel.entry, item.stamp.size)
            else:
                logger.debug("not published %s: %s", item.parcel.entry, item.failure or _OVERTAKEN)
