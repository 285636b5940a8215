"""Finding entries by their path, and never handing out bytes that are not what was stored."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from xzcache import _files as files
from xzcache import _opened as opening
from xzcache._errors import CacheFault, Damaged
from xzcache._files import Whose
from xzcache._keys import Entry, is_plain, relative_path
from xzcache._pieces import Listed, Pieces
from xzcache._quarantine import EVERYTHING, Quarantine

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from xzcache._keeper import Keeper
    from xzcache._schema import Row

_REMEMBERED: Final = 65536


class Found(NamedTuple):
    """The open file of an entry."""

    entry: Entry
    path: str
    opened: opening.Opened
    known: bool
    """Whether this process has checked this very file before."""

    @property
    def size(self) -> int:
        return self.opened.size


class Reader:
    """Reads the entries of one cache directory, without a look at the index.

    Parameters
    ----------
    keeper : Keeper
    folds : bool
        Whether the file system takes names that differ in case for the same.

    Attributes
    ----------
    quarantine : Quarantine
        Keys of which something could not be made invisible when it had to be.

    Notes
    -----
    Safe for threads. That a file was checked is remembered by its inode, modification time and size, for a bounded
    number of files.
    """

    def __init__(self, keeper: Keeper, *, folds: bool, quarantine: Quarantine | None = None) -> None:
        self._keeper = keeper
        self._root = keeper.books.root
        self._folds = folds
        self._pieces = Pieces(self._root)
        self._checked: dict[str, opening.Signature] = {}
        self._damaged: dict[str, opening.Signature] = {}
        self.quarantine = Quarantine() if quarantine is None else quarantine

    def find(self, entry: Entry) -> Found | None:
        """Open a file that holds an entry: its own, or one that holds more of the object.

        A file that this process has not checked yet may still turn out to be damaged: `read` tells.
        """
        return next(self.candidates(entry), None)

    def candidates(self, entry: Entry) -> Iterator[Found]:
        """Open one file after another that holds an entry; whoever takes one closes it, or reads it."""
        if not self.quarantine.is_empty and self.quarantine.holds(entry.key):
            return
        try:
            if entry.is_whole:
                if (found := self._open(entry)) is not None:
                    yield found
                return
            tried = set()
            # what is found without a look at the directory is found fast; what is not there any more is looked for
            remembered = self._pieces.remembered(entry.key)
            for piece in remembered.covering(entry) if remembered is not None else ():
                tried.add(piece)
                if (found := self._open_if_possible(piece)) is not None:
                    yield found
            if (found := self._open_if_possible(entry.whole)) is not None:
                yield found
            for piece in self._pieces.listed(entry.key).covering(entry):
                if piece not in tried and (found := self._open_if_possible(piece)) is not None:
                    yield found
        except OSError as error:
            self._keeper.trouble(error)

    def at_once(self, entry: Entry, max_age_ns: int | None, most: int) -> memoryview | None:
        """A whole object of at most `most` bytes that this process has checked before, if it is in memory; else None.

        The shortest way of all: whoever gets None goes the long one.
        """
        path = f"{self._root}/{entry.key}"
        signature = self._checked_at(entry.key, path, max_age_ns)
        return None if signature is None else opening.read_unchanged(path, signature, most)

    def into(self, entry: Entry, max_age_ns: int | None, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
        """As `at_once`, into bytes that somebody has; what is there after False is undefined."""
        path = f"{self._root}/{entry.key}"
        signature = self._checked_at(entry.key, path, max_age_ns)
        return signature is not None and opening.read_unchanged_into(path, signature, place, patient=patient)

    def _checked_at(self, key: str, path: str, max_age_ns: int | None) -> opening.Signature | None:
        """The file that was checked at a path, if it may be served."""
        signature = self._checked.get(path)
        if signature is None or (not self.quarantine.is_empty and self.quarantine.concerns(key)):
            return None
        if max_age_ns is not None and not 0 <= time.time_ns() - signature[1] < max_age_ns:
            return None
        return signature

    def listed(self, key: str) -> Listed:
        """The byte ranges of an object that there are, as far as can be seen."""
        try:
            held = not self.quarantine.is_empty and self.quarantine.holds(key)
            return Listed(key, ()) if held else self._pieces.listed(key)
        except OSError as error:
            self._keeper.trouble(error)
            return Listed(key, ())

    def distrust_all(self) -> None:
        """Read nothing more from this directory."""
        self.quarantine.hold([EVERYTHING])

    def _open_if_possible(self, entry: Entry) -> Found | None:
        """As `_open`, where another file may hold the same."""
        try:
            return self._open(entry)
        except OSError as error:
            self._keeper.trouble(error)
            return None

    def _open(self, entry: Entry) -> Found | None:
        odd = entry.is_whole and not is_plain(entry.key, folds=self._folds)
        path = f"{self._root}/{entry.key}" if entry.is_whole and not odd else self._path(entry, odd=odd)
        try:
            opened = opening.open_file(path)
        except (NotADirectoryError, IsADirectoryError):
            # the path is taken by something else, so the entry may lie under its digest
            path = self._path(entry, odd=True)
            opened = opening.open_file(path)
        if opened is None:
            return None
        known = self._checked.get(path) == opened.signature
        if not known and not odd and entry.is_whole and files.read_stamp(opened.fd) is None:
            # a file of somebody else's keeps ours from its place, or this file system has no stamps
            try:
                elsewhere = opening.open_file(self._path(entry, odd=True))
            except BaseException:
                os.close(opened.fd)
                raise
            if elsewhere is not None:
                os.close(opened.fd)
                path, opened = self._path(entry, odd=True), elsewhere
                known = self._checked.get(path) == opened.signature
        if not known and self._damaged.get(path) == opened.signature:
            os.close(opened.fd)
            return None
        if not self.quarantine.is_empty:
            # the file is open already, so what is asked now holds for it
            if self.quarantine.is_away(entry.key) and not self._keeper.books.is_stand_in():
                os.close(opened.fd)
                return None
            known = known and not self.quarantine.suspects(entry.key)
        return Found(entry, path, opened, known)

    def _path(self, entry: Entry, *, odd: bool) -> str:
        return f"{self._root}/{relative_path(entry, odd=odd)}"

    def read(self, found: Found, first: int, last: int) -> memoryview | None:
        """Bytes of a file that was found, which is closed; None where they are not what was stored.

        The whole file is checked against its checksum the first time this process sees it.
        """
        try:
            if found.known:
                return opening.read(found.opened.fd, first, last)
            data = opening.read(found.opened.fd, 0, found.size)
            return self._checked_part(found, data, first, last)
        except OSError as error:
            self._keeper.trouble(error)
            return None
        finally:
            os.close(found.opened.fd)

    def read_now(self, found: Found, first: int, last: int) -> tuple[bool, memoryview | None]:
        """As `read`, if that needs no waiting: else `(False, None)`, and the file stays open."""
        if not found.known:
            if self.quarantine.suspects(found.entry.key) or files.read_stamp(found.opened.fd) is None:
                # the index has to be asked
                return False, None
            data = opening.read_resident(found.opened.fd, 0, found.size)
        else:
            data = opening.read_resident(found.opened.fd, first, last)
        if data is None:
            return False, None
        try:
            return True, data if found.known else self._checked_part(found, data, first, last)
        finally:
            os.close(found.opened.fd)

    def _checked_part(self, found: Found, data: memoryview | None, first: int, last: int) -> memoryview | None:
        if data is None or not self._is_sound(found, data):
            _remember(self._damaged, found)
            return None
        _remember(self._checked, found)
        return data[first:last]

    def _is_sound(self, found: Found, data: memoryview) -> bool:
        stamp, suspect = files.read_stamp(found.opened.fd), self.quarantine.suspects(found.entry.key)
        sound, expected = False, -1
        if stamp is not None:
            sound = stamp.size == found.size and stamp.digest == found.entry.digest()
            expected = stamp.crc
        elif not self._may_be_ours(found):
            return False
        if stamp is None or suspect:
            row = self._keeper.attempt(lambda: self._row(found.entry), None)
            sound = row is not None and row.size == found.size and (stamp is None or (sound and row.crc == expected))
            expected = row.crc if row is not None else -1
            if suspect and not sound:
                self.quarantine.note_returned(found.entry.key)
        if sound and files.checksum(data) == expected:
            return True
        if not suspect:
            self._keeper.trouble(Damaged(f"{found.path} is not what was stored there"))
        return False

    def _may_be_ours(self, found: Found) -> bool:
        """Whether the index is to be asked about a file whose stamp could not be read."""
        try:
            return files.look(found.path, found.entry) in (Whose.OURS, Whose.UNMARKED)
        except OSError as error:
            self._keeper.trouble(error)
            return False

    def is_foreign(self, found: Found) -> bool:
        """Whether a file that was found is known not to be one of the cache's."""
        try:
            return not found.known and self.is_foreign_file(found.path, found.entry.key)
        except (OSError, CacheFault) as error:
            self._keeper.trouble(error)
            return False

    def is_foreign_file(self, path: str, key: str) -> bool:
        """Whether the file at a path is not one of the cache's.

        Raises
        ------
        CacheFault, OSError
            It cannot be told.
        """
        found = files.look(path, Entry(key))
        if found is Whose.UNMARKED:
            return self._keeper.insist(lambda: self._row(Entry(key))) is None
        return found in (Whose.FOREIGN, Whose.MARKED)

    def read_foreign(self, found: Found, first: int, last: int) -> memoryview | None:
        """Bytes of somebody else's file, as they are; it is closed."""
        try:
            return opening.read(found.opened.fd, first, last)
        finally:
            os.close(found.opened.fd)

    def validator(self, entry: Entry) -> str:
        """What tells the state of what would be found of an entry from others; empty where nothing does."""
        return "" if (found := self.find(entry)) is None else self._validator(found)

    def states_of(self, key: str) -> set[str]:
        """What tells the state of an object from others, as the whole of it and one of its byte ranges have it."""
        states = set()
        try:
            for entry in (Entry(key), self.listed(key).any()):
                if entry is not None and (found := self._open(entry)) is not None:
                    states.add(self._validator(found))
        except OSError as error:
            self._keeper.trouble(error)
        return states - {""}

    def _validator(self, found: Found) -> str:
        stamp = files.read_stamp(found.opened.fd)
        self.close(found)
        return stamp.validator if stamp is not None and stamp.digest == found.entry.digest() else ""

    def renew(self, entry: Entry) -> None:
        """Let the age of an entry begin now."""
        if (found := self.find(entry)) is not None:
            with suppress(OSError):
                os.utime(found.opened.fd)
            self.close(found)

    def close(self, found: Found) -> None:
        """Let go of a file that is not to be read."""
        os.close(found.opened.fd)

    def _row(self, entry: Entry) -> Row | None:
        with self._keeper.books.section() as (_, index):
            return index.find(entry)


def _remember(files_seen: dict[str, opening.Signature], found: Found) -> None:
    if len(files_seen) >= _REMEMBERED:
        # another thread may be doing the same
        with suppress(KeyError, StopIteration, RuntimeError):
            del files_seen[next(iter(files_seen))]
    files_seen[found.path] = found.opened.signature
