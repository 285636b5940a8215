"""What to do about what must not be left undone, when the index cannot be used or a file cannot be removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from xzcache import _files as files
from xzcache._errors import NoRoom, Unusable
from xzcache._files import Whose
from xzcache._keys import META, Entry, is_plain, prefix_slot, range_directory, relative_path, write_slot
from xzcache._locks import WriteCounters
from xzcache._recovery import UNDONE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from xzcache._keeper import Keeper
    from xzcache._quarantine import Quarantine
    from xzcache._reader import Reader

T = TypeVar("T")


class Owed(NamedTuple):
    """An invalidation that is still to be done."""

    names: list[str]
    """What is in doubt until then, as a `Quarantine` names it; empty where nothing is but the index is to be told."""
    again: Callable[[], bool]
    """Does it; whether all files are seen to be gone."""
    tag: str = ""
    """What makes an older one of the same tag unnecessary."""


class Doubts:
    """Makes entries invisible come what may: by the index, else by hand, else by not reading them any more.

    Parameters
    ----------
    keeper : Keeper
    reader : Reader

    Notes
    -----
    An invalidation that is pending holds its own keys in quarantine until its own files are seen to be gone. Other
    processes hear of it by a tombstone in the index, or by a note that is locked for as long as this process lives:
    whoever joins afterwards, or recovers, tries again.
    """

    def __init__(self, keeper: Keeper, reader: Reader) -> None:
        self._keeper = keeper
        self._books = keeper.books
        self._quarantine: Quarantine = reader.quarantine
        self._lock = threading.Lock()
        self._owed: list[Owed] = []
        self._note = -1
        self._note_path = ""

    def surely(
        self,
        names: Collection[str],
        action: Callable[[], T],
        by_hand: Callable[[], None] | None,
        again: Callable[[], bool],
    ) -> T | None:
        """Do something that must not be left undone: by the index, else by hand, else later and in doubt until then.

        Parameters
        ----------
        names : collection of str
            The keys, and the prefixes that end in a slash, that are in doubt if it fails.
        action, by_hand : callable
            What to do, and how without the index.
        again : callable
            Does it later; whether that made an end of it.
        """
        done: list[T] = []
        try:
            done.append(self._keeper.insist(action))
        except Exception as error:
            self._keeper.trouble(error)
            is_full = isinstance(error, NoRoom) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        else:
            self._note_away(names)
            self.make_up()
            return done[-1]
        if self._quarantine.holds_everything:
            # the directory is not of our making: nothing in it is read, and nothing touched
            return None
        self._note_away(names)
        if by_hand is None:
            self.pend(names, again)
            return None
        self._write_note(names)
        try:
            by_hand()
        except Exception as error:
            self._keeper.trouble(error)
            self.pend(names, again)
            return None
        # what was unlinked from a full disk may have made the room that was missing
        if is_full and self._keeper.attempt(partial(_into, done, action), False):
            return done[-1]
        # no file is left, but the index counts them still
        self._owe(Owed([], again))
        return None

    def strictly(self, action: Callable[[], T], by_hand: Callable[[], None]) -> None:
        """Do something by the index, or by hand.

        Raises
        ------
        OSError
            It was not done.
        """
        try:
            self._keeper.insist(action)
        except Exception as error:
            self._keeper.trouble(error)
            try:
                by_hand()
            except Exception as reason:
                number = getattr(reason, "errno", None) or errno.EIO
                raise OSError(number, f"it was not deleted: {reason}", self._books.root) from error
        else:
            self.make_up()

    def pend(self, names: Collection[str], again: Callable[[], bool]) -> None:
        """Serve nothing of some keys until something has been done again, and made an end of it."""
        if names:
            self._quarantine.hold(names)
            self._owe(Owed(list(names), again))

    def pend_latest(self, tag: str, names: Collection[str], again: Callable[[], bool]) -> None:
        """As `pend`, in place of what was pending under the same tag."""
        self._quarantine.hold(names)
        with self._lock:
            older = [owed for owed in self._owed if owed.tag == tag]
            self._owed = [owed for owed in self._owed if owed.tag != tag] + [Owed(list(names), again, tag)]
        for owed in older:
            self._quarantine.free(owed.names)

    def tell(self, error: BaseException) -> None:
        """Say what went wrong with a file."""
        self._keeper.trouble(error)

    def adopt(self, names: Iterable[str], again: Callable[[list[str]], bool]) -> None:
        """As `pend`, of what another process has left: each name once."""
        with self._lock:
            known = {name for owed in self._owed for name in owed.names}
        new = [name for name in names if name not in known]
        self.pend(new, lambda: again(new))

    def _owe(self, owed: Owed) -> None:
        with self._lock:
            self._owed.append(owed)

    @property
    def owes(self) -> bool:
        """Whether something is in doubt that could be made up for."""
        away = bool(self._books.lost) and bool(self._quarantine.written_while_away())
        return away or bool(self._owed) or self._quarantine.has_returned

    def make_up(self) -> None:
        """Do what could not be done before, each for itself."""
        with self._lock:
            owed, self._owed = self._owed, []
        left = []
        for number, item in enumerate(owed):
            try:
                is_done = self._keeper.insist(item.again)
            except Exception as error:
                # the index cannot be used: the others would wait for it as well
                self._keeper.trouble(error)
                left += owed[number:]
                break
            if is_done:
                self._quarantine.free(item.names)
            else:
                left.append(item)
        with self._lock:
            self._owed = left + self._owed
            if not self._owed:
                self._drop_note()

    def has_returned(self) -> list[str]:
        """What was written while the directory that is there now was away; empty where it was not."""
        member = self._books.current
        if member is None or member.identity not in self._books.lost:
            return []
        return self._quarantine.written_while_away()

    def forget_returned(self) -> None:
        """The directory that was away is true again."""
        if (member := self._books.current) is not None:
            self._books.lost.discard(member.identity)
        if not self._books.lost:
            self._quarantine.forget_away()

    def suspect(self, names: Iterable[str]) -> None:
        """Have some keys served only where the index vouches for the file: theirs were not where they had to be."""
        self._quarantine.suspect(names)

    def _note_away(self, names: Collection[str]) -> None:
        if self._books.lost:
            self._quarantine.note_away(names)

    # -- a note for those who come after this process

    def _write_note(self, names: Collection[str]) -> None:
        """Write down what is not done yet; the note stays locked until it is, or this process is dead."""
        with self._lock, suppress(OSError):
            if self._note < 0:
                path = files.inside(self._books.root, f"{META}/tmp/{UNDONE}{secrets.token_hex(8)}")
                self._note = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._note_path = path
                fcntl.flock(self._note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._note, "".join(f"{json.dumps(name)}\n" for name in names).encode())

    def _drop_note(self) -> None:
        if self._note >= 0:
            with suppress(OSError):
                files.discard(self._note_path)
            self.let_go_of_note()

    def leave_note(self) -> None:
        """Leave the note, if there is one, to others: this process no longer uses the directory."""
        with self._lock:
            self.let_go_of_note()

    def let_go_of_note(self) -> None:
        """Close the note, if there is one: a forked child is not who wrote it."""
        if self._note >= 0:
            os.close(self._note)
            self._note = -1

    # -- by hand

    def _bump_by_hand(self, number: int, failures: list[OSError]) -> None:
        """Count a write without the guard: two such counts may become one, which is still a change.

        Where it cannot be counted, what is there has to go all the same; then somebody may still publish what he
        fetched before.
        """
        try:
            member = self._books.current
            if member is not None:
                member.writes.bump(number)
            if member is None or not member.guard.is_current():
                try:
                    counters = WriteCounters(f"{self._books.meta}/writes")
                except FileNotFoundError:
                    # there is no cache
                    return
                try:
                    counters.bump(number)
                finally:
                    counters.close()
        except OSError as error:
            failures.append(error)

    def unlink_keys(self, keys: Sequence[str]) -> None:
        """Make keys invisible without the index, and without the guard.

        Whoever has the guard may be stopped anywhere, and go on at any time. So a write is counted first: files that
        are written from now on get no name, as the counters are compared under the guard before. Then what is in flight
        goes, so that a publisher, or a recovery, that has compared already finds nothing to give a name to. What has
        got its name before that goes last.

        Raises
        ------
        OSError, Unusable
            Something may be left.
        """
        failures: list[OSError] = []
        for key in keys:
            self._bump_by_hand(write_slot(key), failures)
        wanted, digests = set(keys), {Entry(key).digest() for key in keys}
        self._unlink_in_flight(lambda stamp: stamp.digest in digests or stamp.key in wanted)
        for key in keys:
            entry = Entry(key)
            if is_plain(key):
                self._unlink(key, entry)
            self._unlink(relative_path(entry, odd=True), entry)
            files.remove_tree(files.inside(self._books.root, range_directory(key)))
        if failures:
            raise failures[0]

    def unlink_beneath(self, prefix: str) -> None:
        """Make everything beneath a prefix invisible without the index, and without the guard.

        Raises
        ------
        OSError, Unusable
            Something may be left.
        """
        failures: list[OSError] = []
        self._bump_by_hand(prefix_slot(prefix), failures)
        # the stamp of a file at its own key does not tell the key
        self._unlink_in_flight(lambda stamp: True)
        root = self._books.root
        if not prefix or is_plain(prefix):
            for path in files.walk(files.inside(root, f"{prefix}/").rstrip("/")):
                key = os.path.relpath(path, root).replace(os.sep, "/")
                self._unlink(key, Entry(key))
        for place in ("odd", "ranges"):
            for path in files.walk(files.inside(root, f"{META}/{place}/").rstrip("/")):
                stamp = files.read_stamp(path)
                if stamp is None or not prefix or stamp.key.startswith(f"{prefix}/"):
                    files.discard(path)
        if failures:
            raise failures[0]

    def _unlink_in_flight(self, concerns: Callable[[files.Stamp], bool]) -> None:
        """Unlink files in flight that somebody may be about to give a name."""
        for path in files.walk(files.inside(self._books.root, f"{META}/tmp/").rstrip("/")):
            if os.path.basename(path).startswith(UNDONE):
                continue
            stamp = files.read_stamp(path)
            if stamp is None or concerns(stamp):
                files.discard(path)

    def _unlink(self, relative: str, entry: Entry) -> None:
        path = files.inside(self._books.root, relative)
        if files.discard_ours(path, entry) is Whose.UNMARKED:
            raise Unusable(f"nobody can tell whether {path} is ours")


def _into(results: list[T], action: Callable[[], T]) -> bool:
    results.append(action())
    return True
