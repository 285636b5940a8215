"""Keeping the cache true when its source is written through it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xzcache import files
from xzcache.directory._fetchlocks import Ticket, current_ticket
from xzcache.directory._recovery import UNDONE
from xzcache.directory._space import Doubtful
from xzcache.files import Whose, beneath, is_plain, range_directory, relative_path
from xzcache.index import WriteCounters, prefix_slot, write_slot
from xzcache.model import META, Entry, NoRoom, Unusable, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from xzcache.directory._faults import Keeper
    from xzcache.directory._publish import Publisher
    from xzcache.directory._space import Space
    from xzcache.files import Quarantine, Reader
    from xzcache.index import Dying, Index, Membership, Row
    from xzcache.model import Data


logger = logging.getLogger("xzcache.directory")

# -- What to do about what must not be left undone, when the index cannot be used or a file cannot be removed.

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


# -- Invalidation through the index.

_BATCH: Final = 128


class Begun(NamedTuple):
    """A write that has begun: the row that says so in the index, and what the counters said then.

    Without a ticket, the index could not be told, or may not have been.
    """

    key: str
    row: int
    ticket: Ticket | None = None


class Drop(NamedTuple):
    """A deletion that has begun: of everything beneath a key, and perhaps of the key itself."""

    beneath: Begun
    itself: Begun | None

    @property
    def keys(self) -> list[str]:
        return [] if self.itself is None else [self.itself.key]

    @property
    def writes(self) -> list[Begun]:
        return [self.beneath] if self.itself is None else [self.beneath, self.itself]


class Writes:
    """Makes what is no longer true invisible to every process.

    A write has two ends. `begin` makes the old value invisible before the source changes, and says in the index that
    the key is being written: until `end`, nobody stores anything for it, and if this process dies before, the next one
    forgets the key. `end` stores the new value if nobody else was writing the key. Each end counts the write, so that
    no fill that began before it publishes after it.

    Notes
    -----
    Where the index cannot be used, files are unlinked by their paths; where even that fails, this process serves
    nothing of that key from the cache until its files are seen to be gone.
    """

    def __init__(self, doubts: Doubts, space: Space, publisher: Publisher) -> None:
        self._doubts = doubts
        self._books = space.books
        self._space = space
        self._publisher = publisher

    # -- keys

    def begin(self, keys: Sequence[str]) -> list[Begun]:
        """Before the source is written: forget the keys, and say that they are being written."""
        return [begun for batch in _batches(keys) for begun in self._begin(batch)]

    def _begin(self, keys: Sequence[str]) -> list[Begun]:
        doubts = Doubtful()
        begun = [self._started(key) for key in keys]

        def act() -> list[Begun]:
            with self._books.section() as (member, index):
                self._note(keys, member)
                tickets = [self._count(member, index, key) for key in keys]
                for write in begun:
                    index.notes.add_writing(write.row, write.key, member.owner, beneath=False)
                dying = self._condemn_keys(member, index, keys, doubts)
            # the bytes are given back when the write ends
            self._release(dying, soon=True)
            return [write._replace(ticket=ticket) for write, ticket in zip(begun, tickets, strict=True)]

        return self._surely(keys, act, doubts, "a write begins") or begun

    def _started(self, key: str) -> Begun:
        # no number is drawn twice, so that a row is never taken for that of another write
        begun = Begun(key, secrets.randbits(62))
        self._books.writing.add(begun.row)
        return begun

    def _surely(
        self, keys: Sequence[str], act: Callable[[], T], doubts: Doubtful, why: str, ended: Sequence[Begun] = ()
    ) -> T | None:
        """Do something about some keys, and see to those of which a file may be left.

        Where that is done by hand, it is done again by the index later, which is told then which writes have ended.
        """
        self._note(keys)
        done = self._doubts.surely(
            keys,
            act,
            lambda: self._doubts.unlink_keys(keys),
            lambda: self.forget_now(keys, Doubtful(), ended),
        )
        self._see_to(doubts)
        _log(keys, why)
        return done

    def _note(self, keys: Sequence[str], member: Membership | None = None) -> None:
        """Say that the namespaces of some keys are being written: the power may go before the entries are gone.

        Where that cannot be said, what is cached is right for as long as the machine runs.
        """
        for namespace in set(map(namespace_of, keys)):
            try:
                (self._books if member is None else member).note_written(namespace)
            except Exception as error:
                self._doubts.tell(error)

    def _release(self, dying: list[Dying], *, soon: bool = False) -> None:
        """Unlink what is out of sight; what cannot be settled now is settled later, and fails no write."""
        try:
            self._space.release(dying, soon=soon)
        except Exception as error:
            self._doubts.tell(error)

    def _see_to(self, doubts: Doubtful) -> None:
        """Serve nothing of the keys of which a file may be left."""
        self._doubts.suspect(doubts.missing)
        if left := list(doubts.left):
            if doubts.error is not None:
                self._doubts.tell(doubts.error)
            self._doubts.pend(left, lambda: self.forget_now(left, Doubtful()))

    def forget_now(self, keys: Sequence[str], doubts: Doubtful, ended: Sequence[Begun] = ()) -> bool:
        """Forget keys, where trouble is the caller's; whether all their files are seen to be gone."""
        for batch in _batches(keys):
            with self._books.section() as (member, index):
                for key in batch:
                    self._count(member, index, key)
                index.notes.drop_writings(write.row for write in ended)
                dying = self._condemn_keys(member, index, batch, doubts)
            self._release(dying)
        return not doubts.left

    def adopt(self, names: Sequence[str]) -> None:
        """See to what other processes have left: serve nothing of it until its files are seen to be gone."""
        self._doubts.adopt(names, self._again)

    def make_up_for_return(self) -> None:
        """Forget what was written while the directory that is there now was away."""
        names = self._doubts.has_returned()
        if names and not self._again(names):
            self._doubts.pend(names, lambda: self._again(names))
        self._doubts.forget_returned()

    def _again(self, names: Sequence[str]) -> bool:
        doubts = Doubtful()
        self.forget_now([name for name in names if not name.endswith("/")], doubts)
        for name in names:
            if name.endswith("/"):
                self._drop_now(name.rstrip("/"), doubts)
        _log(names, "it was pending")
        return not doubts.left

    def end(self, writes: Sequence[Begun], values: Sequence[Data | None]) -> None:
        """After the source was written: forget what was filled meanwhile, and store the new values."""
        tickets = [ticket for batch in _batches(writes) for ticket in self._end(batch)]
        for write, ticket, value in zip(writes, tickets, values, strict=True):
            if value is not None and ticket is not None:
                self._publisher.publish(Entry(write.key), value, ticket)

    def _end(self, writes: Sequence[Begun]) -> list[Ticket | None]:
        keys = [write.key for write in writes]
        doubts = Doubtful()

        def act() -> list[Ticket | None]:
            tickets: list[Ticket | None] = []
            with self._books.section() as (member, index):
                for write in writes:
                    # a write whose beginning could not be told may have met others that nobody knows of
                    alone = write.ticket is not None and write.ticket == current_ticket(member, write.key)
                    ticket = self._count(member, index, write.key)
                    tickets.append(ticket if alone else None)
                index.notes.drop_writings(write.row for write in writes)
                dying = self._condemn_keys(member, index, keys, doubts)
            self._release(dying)
            return tickets

        try:
            return self._surely(keys, act, doubts, "a write has ended", writes) or [None] * len(writes)
        finally:
            # a row that is left is nobody's from here on: the next recovery forgets its key
            self._books.writing.difference_update(write.row for write in writes)

    def forget(self, key: str, since: Ticket | None) -> Ticket | None:
        """Forget a key whose value turned out to be another; a ticket to store that, None if it was written since."""
        doubts = Doubtful()

        def act() -> Ticket | None:
            with self._books.section() as (member, index):
                alone = since is not None and since == current_ticket(member, key)
                ticket = self._count(member, index, key)
                dying = self._condemn_keys(member, index, [key], doubts)
            self._release(dying)
            return ticket if alone else None

        return self._surely([key], act, doubts, "the source has another state")

    def remove(self, key: str) -> None:
        """Remove a key that has no source, and that may have been written as well as not.

        Raises
        ------
        OSError
            It may still be there.
        """
        doubts = Doubtful()
        self._note([key])
        self._doubts.strictly(lambda: self.forget_now([key], doubts), lambda: self._doubts.unlink_keys([key]))
        if doubts.error is not None:
            raise doubts.error
        _log([key], "it was deleted")

    def remove_beneath(self, prefix: str) -> None:
        """As `remove`, of everything beneath a prefix."""
        doubts = Doubtful()
        self._note([f"{prefix}/"] if prefix else [""])
        self._doubts.strictly(lambda: self._drop_now(prefix, doubts), lambda: self._doubts.unlink_beneath(prefix))
        if doubts.error is not None:
            raise doubts.error
        _log([f"{prefix}/"], "it was deleted")

    @staticmethod
    def _count(member: Membership, index: Index, key: str) -> Ticket:
        """Count a write; returns what the counters say now."""
        member.writes.bump(write_slot(key))
        index.notes.drop_absent([key])
        return current_ticket(member, key)

    def _condemn_keys(
        self, member: Membership, index: Index, keys: Sequence[str], doubts: Doubtful, others: Sequence[Row] = ()
    ) -> list[Dying]:
        """Take keys, and other entries, out of the index and out of sight; within a section, which is committed."""
        rows = [*(row for key in keys for row in index.of_key(key)), *others]
        dying = self._space.condemn(member, index, rows, doubts)
        for key in keys:
            if key not in doubts.left:
                self._space.clear_paths(index, key, doubts)
        return dying

    # -- everything beneath a prefix

    def begin_drop(self, prefix: str, *, itself: bool = False) -> Drop:
        """Before all beneath a prefix is deleted at the source: forget it, and say that it is being written.

        Parameters
        ----------
        prefix : str
        itself : bool
            Whether the prefix is a key as well, which is deleted with what is beneath it.
        """
        drop = Drop(self._started(prefix), self._started(prefix) if itself else None)
        self._surely_drop(prefix, drop, begins=True)
        return drop

    def end_drop(self, drop: Drop) -> None:
        """After it was deleted at the source."""
        try:
            self._surely_drop(drop.beneath.key, drop)
        finally:
            self._books.writing.difference_update(write.row for write in drop.writes)

    def _surely_drop(self, prefix: str, drop: Drop | None = None, *, begins: bool = False) -> None:
        self._note([f"{prefix}/"] if prefix else [""])
        keys = [] if drop is None else drop.keys
        ended = None if begins else drop

        def act() -> None:
            doubts = Doubtful()
            self._drop_now(prefix, doubts, keys=keys, begun=drop if begins else None, ended=ended)
            self._see_to(doubts)

        def by_hand() -> None:
            if keys:
                self._doubts.unlink_keys(keys)
            self._doubts.unlink_beneath(prefix)

        def again() -> bool:
            return self._drop_now(prefix, Doubtful(), keys=keys, ended=ended)

        self._doubts.surely([beneath(prefix), *keys], act, by_hand, again)
        why = "it is cleared" if drop is None else "a deletion begins" if begins else "a deletion has ended"
        _log([f"{prefix}/", *keys], why)

    def drop(self, prefix: str) -> None:
        """Forget all entries whose key begins with ``prefix + "/"``, and the arrays there."""
        self._surely_drop(prefix)

    def drop_now(self, prefix: str, *, counted: bool = False) -> None:
        """As `drop`, where trouble is the caller's; `counted` if the counter of writes was raised already."""
        doubts = Doubtful()
        self._drop_now(prefix, doubts, counted=counted)
        self._see_to(doubts)
        _log([f"{prefix}/"], "its metadata document has changed" if counted else "it is cleared")

    def _drop_now(
        self,
        prefix: str,
        doubts: Doubtful,
        *,
        counted: bool = False,
        keys: Sequence[str] = (),
        begun: Drop | None = None,
        ended: Drop | None = None,
    ) -> bool:
        """As `drop_now`, of some keys as well; whether all files are seen to be gone."""
        with self._books.section() as (member, index):
            if begun is not None:
                self._note([f"{prefix}/"], member)
                for write in begun.writes:
                    index.notes.add_writing(write.row, write.key, member.owner, beneath=write is begun.beneath)
            for key in keys:
                self._count(member, index, key)
            if not counted:
                member.writes.bump(prefix_slot(prefix))
            index.notes.drop_nodes(prefix, documents=not counted)
            index.notes.drop_absent_beneath(prefix)
            tombstones = {item.entry.key for item in index.left_dying() if _is_beneath(item.entry.key, prefix)}
            rows = index.beneath(prefix, _BATCH)
            is_last = len(rows) < _BATCH
            if ended is not None and is_last:
                index.notes.drop_writings(write.row for write in ended.writes)
            dying = self._condemn_keys(member, index, keys, doubts, rows)
        self._release(dying, soon=begun is not None)
        while not is_last:
            with self._books.section() as (member, index):
                rows = index.beneath(prefix, _BATCH)
                is_last = len(rows) < _BATCH
                if ended is not None and is_last:
                    index.notes.drop_writings(write.row for write in ended.writes)
                dying = self._space.condemn(member, index, rows, doubts)
            self._release(dying, soon=begun is not None)
        self._drop_orphans(prefix, tombstones, doubts)
        return not doubts.left

    def _drop_orphans(self, prefix: str, tombstones: set[str], doubts: Doubtful) -> None:
        """Drop files of ours beneath a prefix that have no row: what an earlier failure, or a crash, has left."""
        keys = set(tombstones)
        try:
            if not prefix or is_plain(prefix):
                for path in files.walk(files.inside(self._books.root, f"{prefix}/").rstrip("/")):
                    keys.add(os.path.relpath(path, self._books.root).replace(os.sep, "/"))
        except OSError as error:
            doubts.note(beneath(prefix), error)
        for batch in _batches(sorted(keys - doubts.left)):
            with self._books.section() as (_, index):
                for key in batch:
                    # what has a row by now was stored after the drop
                    if not index.knows(key):
                        self._space.clear_paths(index, key, doubts)


def _log(names: Iterable[str], why: str) -> None:
    """Log invalidations; never under the guard, which a handler would keep others from."""
    if logger.isEnabledFor(logging.DEBUG):
        for name in names:
            logger.debug("invalidated %s: %s", name, why)


def _is_beneath(key: str, prefix: str) -> bool:
    return not prefix or key.startswith(f"{prefix}/")


def _batches(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
