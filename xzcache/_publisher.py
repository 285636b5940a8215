"""Publishing entries: who fetches one, when it may be stored, and the order of the steps that survives a crash."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from xzcache import _files as files
from xzcache import _recovery as recovery
from xzcache._documents import is_document
from xzcache._errors import Damaged, NoRoom
from xzcache._keys import Entry, all_slots, is_plain, namespace_of, relative_path
from xzcache._space import recovery_due

if TYPE_CHECKING:
    from collections.abc import Callable

    from xzcache._index import Index
    from xzcache._keeper import Keeper
    from xzcache._membership import Membership
    from xzcache._schema import Dying
    from xzcache._space import Space


class Ticket(NamedTuple):
    """What the write counters said when a fill began: it may publish only while they still say so."""

    member: int
    generation: int
    counts: tuple[int, ...]


def current_ticket(member: Membership, key: str) -> Ticket:
    """What the write counters say now."""
    counts = tuple(member.writes.read(number) for number in all_slots(key, data=not is_document(key)))
    return Ticket(id(member), member.generation, counts)


@dataclass
class _Spending:
    """Whether the bytes that were taken from the lease are the index's to count now."""

    done: bool = False


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
        self._folds = folds

    def lead(self, entry: Entry) -> Callable[[], None] | None:
        """Try to become the one process that fetches an entry.

        Returns
        -------
        callable or None
            What gives the lead up again; None while another process has it. Never waits.
        """
        member = self._books.current
        if member is None:
            return lambda: None
        offset = entry.lock_offset()
        try:
            if not member.keys.try_lock(offset):
                return None
        except OSError as error:
            # a lock is only there to save a fetch
            self._keeper.trouble(error)
            return lambda: None
        return lambda: member.keys.unlock(offset)

    def ticket(self, entry: Entry) -> Ticket | None:
        """Take note of the writes so far, before a fetch begins. Never waits."""
        member = self._books.current
        if member is None:
            return None
        try:
            return current_ticket(member, entry.key)
        except OSError as error:
            self._keeper.trouble(error)
            return None

    # -- publishing

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
        if ticket is None:
            return False
        return self._keeper.attempt(lambda: self._publish(entry, data, ticket, validator=validator), False)

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
        return self._keeper.insist(lambda: self._publish(entry, data, None, exclusive=exclusive))

    def _publish(
        self, entry: Entry, data: files.Data, ticket: Ticket | None, *, exclusive: bool = False, validator: str = ""
    ) -> bool:
        size = len(data)
        overtaken: list[Dying] = []
        with self._books.storing() as member:
            self._space.take(member, size)
            sequence, temporary = member.next_temporary()
            spending = _Spending()
            try:
                stamp = self._write(temporary, entry, data, validator)
                with self._books.section() as (current, index):
                    if current is not member or (
                        ticket is not None and not self._may_enter(member, index, entry, ticket)
                    ):
                        return False
                    if (exclusive and self._is_there(entry)) or not self._agrees(index, entry, validator):
                        return False
                    replaced, odd = self._enter(
                        member, index, entry, stamp, sequence, temporary, spending, over_foreign=ticket is None
                    )
                    self._bury(index, replaced, renamed_over=odd)
                    if ticket is not None and ticket != current_ticket(member, entry.key):
                        # somebody who could not wait for the guard has written the key: see `Writes`
                        overtaken = self._space.condemn(member, index, index.of_key(entry.key))
            finally:
                if not spending.done:
                    files.discard(temporary)
                    member.give_back(size)
        self._space.release(overtaken)
        if recovery_due(member):
            # whatever comes of that, this entry is stored
            self._keeper.attempt(lambda: recovery.recover(self._books), None)
        return not overtaken

    @staticmethod
    def _may_enter(member: Membership, index: Index, entry: Entry, ticket: Ticket) -> bool:
        """Whether nobody has written the key since the ticket was taken, or is writing it now."""
        return ticket == current_ticket(member, entry.key) and not index.notes.is_written(entry.key)

    def _agrees(self, index: Index, entry: Entry, validator: str) -> bool:
        """Whether what is cached of an object is of the state that an entry is of: parts of two must not be mixed."""
        if not validator:
            return True
        for row in (index.find(entry.whole), index.piece_of(entry.key)):
            if row is not None and row.entry != entry:
                stamp = files.read_stamp(self._path(row.entry, odd=row.odd))
                if stamp is not None and stamp.validator not in ("", validator):
                    return False
        return True

    def _is_there(self, entry: Entry) -> bool:
        places = (True,) if self._is_odd(entry) else (False, True)
        return any(os.path.lexists(self._path(entry, odd=odd)) for odd in places)

    def _write(self, temporary: str, entry: Entry, data: files.Data, validator: str) -> files.Stamp:
        stamp = files.stamp_of(entry, data, validator)
        try:
            files.write(temporary, data, self._for_place(stamp, entry, odd=self._is_odd(entry)))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # for the next one
                self._space.make_room(stamp.size)
                raise NoRoom(f"the disk of {self._root} is full") from error
            raise
        return stamp

    def _is_odd(self, entry: Entry) -> bool:
        return entry.is_whole and not is_plain(entry.key, folds=self._folds)

    @staticmethod
    def _for_place(stamp: files.Stamp, entry: Entry, *, odd: bool) -> files.Stamp:
        """Only a file that does not lie at its own key has to carry it."""
        return stamp._replace(key=entry.key) if odd or not entry.is_whole else stamp

    def _enter(
        self,
        member: Membership,
        index: Index,
        entry: Entry,
        stamp: files.Stamp,
        sequence: int,
        temporary: str,
        spending: _Spending,
        *,
        over_foreign: bool,
    ) -> tuple[list[Dying], bool]:
        """Give an entry its row, then its file its name; what it replaced, and whether it lies at an odd place."""
        old = index.find(entry)
        odd = self._is_odd(entry)
        if not odd and entry.is_whole:
            path = self._path(entry, odd=False)
            known = old is not None and not old.odd
            odd = not files.is_regular(path) if over_foreign else files.blocked(path, entry, known=known)
            if odd:
                files.attach(temporary, self._for_place(stamp, entry, odd=True))
        replaced = [] if old is None else [index.add_dying(old, member.owner)]
        if old is not None:
            index.remove(old.id)
        used = time.time_ns()
        index.notes.drop_absent(entry.key)
        index.add(entry, odd=odd, size=stamp.size, crc=stamp.crc, used=used, owner=member.owner, seq=sequence)
        index.change_lease(member.owner, -stamp.size)
        self._space.trim_lease(member, index)
        self._space.recency.tell(index, [entry])
        self._books.note_made(namespace_of(entry.key))
        # whatever interrupts us from here on, it may be after the commit
        spending.done = True
        try:
            self._commit_and_reveal(index, temporary, self._path(entry, odd=odd))
        except sqlite3.Error:
            spending.done = False
            raise
        except OSError:
            self._undo(member, index, entry, stamp.size)
            spending.done = False
            self._bury(index, replaced, renamed_over=None)
            raise
        return replaced, odd

    def _bury(self, index: Index, replaced: list[Dying], *, renamed_over: bool | None) -> None:
        """Give back the bytes of what was replaced: its place was renamed over (plain or odd), or it is unlinked."""
        for item in replaced:
            # what cannot be unlinked stays counted
            with suppress(OSError):
                if item.odd != renamed_over:
                    files.discard_ours(self._path(item.entry, odd=item.odd), item.entry)
                index.drop_dying([item.id])

    @staticmethod
    def _commit_and_reveal(index: Index, temporary: str, path: str) -> None:
        """In this order: a row without a named file is finished by the next process, a file without a row is lost."""
        index.commit()
        files.move(temporary, path)

    @staticmethod
    def _undo(member: Membership, index: Index, entry: Entry, size: int) -> None:
        """Take a row back whose file could not be given its name."""
        try:
            index.begin()
            if (row := index.find(entry)) is not None:
                index.remove(row.id)
            index.change_lease(member.owner, size)
            index.commit()
        except sqlite3.Error as error:
            # the index counts bytes that are not there: only a new one is right again
            raise Damaged("an entry without a file could not be taken out of the index") from error

    def _path(self, entry: Entry, *, odd: bool) -> str:
        return f"{self._root}/{relative_path(entry, odd=odd)}"
