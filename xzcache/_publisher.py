"""Publishing entries: when one may be stored, and the order of the steps that survives a crash.

Several that wait are published together. Each has its own file and its own checks; they have one wait for the guard and
one transaction in common.
"""

from __future__ import annotations

import errno
import sqlite3
import time
from functools import partial
from typing import TYPE_CHECKING

from xzcache import _files as files
from xzcache import _recovery as recovery
from xzcache._admission import Admission
from xzcache._errors import Damaged, NoRoom
from xzcache._keys import META, namespace_of, relative_path
from xzcache._leaders import Tickets
from xzcache._parcels import InFlight, Parcel
from xzcache._space import recovery_due

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xzcache._index import Index
    from xzcache._keeper import Keeper
    from xzcache._keys import Entry
    from xzcache._leaders import Ticket
    from xzcache._membership import Membership
    from xzcache._schema import Dying
    from xzcache._space import Space


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

    def publish(self, entry: Entry, data: files.Data, ticket: Ticket | None, validator: str = "") -> bool:
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

    def store(self, entry: Entry, data: files.Data, *, exclusive: bool = False) -> bool:
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
