"""What to do about what must not be left undone, when the index cannot be used."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from xzcache import _files as files
from xzcache._errors import NoRoom, Unusable
from xzcache._keys import META, Entry, is_plain, namespace_of, prefix_slot, range_directory, relative_path, write_slot
from xzcache._locks import WriteCounters

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from xzcache._keeper import Keeper
    from xzcache._reader import Reader

T = TypeVar("T")


class Doubts:
    """Makes entries invisible come what may: by the index, else by hand, else by not reading them any more.

    Parameters
    ----------
    keeper : Keeper
    reader : Reader
    """

    def __init__(self, keeper: Keeper, reader: Reader) -> None:
        self._keeper = keeper
        self._books = keeper.books
        self._reader = reader
        self._owed: list[tuple[set[str], Callable[[], object]]] = []

    def surely(self, about: Collection[str], action: Callable[[], T], by_hand: Callable[[], None] | None) -> T | None:
        """Do something that must not be left undone: by the index, else by hand, else later and in doubt until then.

        Parameters
        ----------
        about : collection of str
            The keys, or the paths of nodes, that are in doubt if it fails.
        action, by_hand : callable
            What to do, and how without the index.
        """
        done: list[T] = []
        try:
            done.append(self._keeper.insist(action))
        except Exception as error:
            self._keeper.trouble(error)
            is_full = isinstance(error, NoRoom) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        else:
            self.make_up()
            return done[-1]
        if self._reader.distrusts_all:
            # the directory is not of our making: nothing in it is read, and nothing touched
            return None
        try:
            if by_hand is not None:
                by_hand()
                # what was unlinked from a full disk may have made the room that was missing
                if is_full:
                    self._keeper.attempt(lambda: _into(done, action), False)
                return done[-1] if done else None
        except Exception as error:
            self._keeper.trouble(error)
        doubts = set(about) if by_hand is None else {namespace_of(key) for key in about}
        self._reader.distrusted.update(doubts)
        self._owed.append((doubts, action))
        return None

    @property
    def owes(self) -> bool:
        """Whether something is in doubt that could be made up for."""
        return bool(self._owed)

    def make_up(self) -> None:
        """Do what could not be done before."""
        owed, self._owed = self._owed, []
        for number, (doubts, action) in enumerate(owed):
            if not self._keeper.attempt(partial(_into, [], action), False):
                self._owed += owed[number:]
                return
            self._reader.distrusted.difference_update(doubts)

    def _bump_by_hand(self, number: int, failures: list[OSError]) -> None:
        """Count a write without the guard: two such counts may become one, which is still a change.

        Where it cannot be counted, what is there has to go all the same; then somebody may still publish what he
        fetched before.
        """
        try:
            if (member := self._books.current) is not None:
                member.writes.bump(number)
            elif os.path.exists(self._books.meta):
                counters = WriteCounters(f"{self._books.meta}/writes")
                try:
                    counters.bump(number)
                finally:
                    counters.close()
        except OSError as error:
            failures.append(error)

    def unlink_keys(self, keys: Sequence[str]) -> None:
        """Make keys invisible without the index."""
        failures: list[OSError] = []
        for key in keys:
            # counted first: whoever publishes meanwhile looks at the counters after he has given a file its name
            self._bump_by_hand(write_slot(key), failures)
            entry = Entry(key)
            if is_plain(key):
                self._unlink(key, entry)
            self._unlink(relative_path(entry, odd=True), entry)
            ranges = f"{self._books.root}/{range_directory(key)}"
            if os.path.isdir(ranges):
                shutil.rmtree(ranges)
        if failures:
            raise failures[0]

    def unlink_beneath(self, prefix: str) -> None:
        """Make everything beneath a prefix invisible without the index."""
        failures: list[OSError] = []
        self._bump_by_hand(prefix_slot(prefix), failures)
        if is_plain(prefix):
            for path in files.walk(f"{self._books.root}/{prefix}"):
                key = os.path.relpath(path, self._books.root).replace(os.sep, "/")
                self._unlink(key, Entry(key))
        for place in ("odd", "ranges"):
            for path in files.walk(f"{self._books.root}/{META}/{place}"):
                stamp = files.read_stamp(path)
                if stamp is None or stamp.key.startswith(f"{prefix}/"):
                    files.discard(path)
        if failures:
            raise failures[0]

    def _unlink(self, relative: str, entry: Entry) -> None:
        path = f"{self._books.root}/{relative}"
        if os.path.lexists(path):
            if files.ours(path, entry) is None:
                raise Unusable(f"nobody can tell whether {path} is ours")
            files.discard_ours(path, entry)


def _into(results: list[T], action: Callable[[], T]) -> bool:
    results.append(action())
    return True
