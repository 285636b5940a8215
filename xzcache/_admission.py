"""Which entries may be stored, and where the file of each is to lie: decided under the guard."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from xzcache import _files as files
from xzcache._files import Whose
from xzcache._keys import is_plain, relative_path
from xzcache._leaders import Tickets
from xzcache._states import fits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xzcache._index import Index
    from xzcache._keys import Entry
    from xzcache._membership import Membership
    from xzcache._parcels import InFlight


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
