"""Pending invalidations: the index cannot be used, or a file cannot be removed."""

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

from xzcache import files
from xzcache.directory._recovery import UNDONE
from xzcache.files import Whose, is_plain, range_directory, relative_path
from xzcache.index import WriteCounters
from xzcache.model import META, Entry, NoRoom, Unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from xzcache.directory._faults import FaultBarrier
    from xzcache.files import Quarantine, Reader

T = TypeVar("T")


class PendingInvalidation(NamedTuple):
    """An invalidation that is still to be done."""

    names: list[str]
    """The quarantined names; empty if only the index must still be updated."""
    again: Callable[[], bool]
    """Retries the invalidation; returns whether all files are gone."""
    tag: str = ""
    """A newer invalidation with the same tag replaces this one."""


class PendingInvalidations:
    """Guarantees invalidation: by the index; if that fails, without it; if that fails too, by quarantine and retries.

    A pending invalidation quarantines its keys until its files are gone. Other processes learn of it by a tombstone in
    the index, or by a note that is locked while this process lives. After that, the next process that joins or recovers
    retries the invalidation.
    """

    def __init__(self, barrier: FaultBarrier, reader: Reader) -> None:
        self._barrier = barrier
        self._session = barrier.session
        self._quarantine: Quarantine = reader.quarantine
        self._lock = threading.Lock()
        self._pending: list[PendingInvalidation] = []
        self._note = -1
        self._note_path = ""

    def must_invalidate(
        self,
        names: Collection[str],
        action: Callable[[], T],
        by_hand: Callable[[], None] | None,
        again: Callable[[], bool],
    ) -> T | None:
        """Invalidate keys through the index, else `by_hand` without it, else later, in quarantine until then.

        `names` are the keys, and the prefixes with a trailing slash, to quarantine if both fail. `again` retries later
        and returns whether all files are gone.
        """
        done: list[T] = []
        try:
            done.append(self._barrier.with_rebuild(action))
        except Exception as error:
            self._barrier.record_fault(error)
            is_full = isinstance(error, NoRoom) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        else:
            self._record_away(names)
            self.retry_pending()
            return done[-1]
        if self._quarantine.holds_everything:
            # the directory belongs to another user: nothing in it is read or changed
            return None
        self._record_away(names)
        if by_hand is None:
            self.defer(names, again)
            return None
        # before any file goes: if this process dies in between, the next one finishes the invalidation
        self._write_note(names)
        try:
            by_hand()
        except Exception as error:
            self._barrier.record_fault(error)
            self.defer(names, again)
            return None
        # unlinking files on a full disk may have freed enough space for the index
        if is_full and self._barrier.try_or(partial(_append, done, action), False):
            return done[-1]
        # no file is left, but the index counts them still
        self._add(PendingInvalidation([], again))
        return None

    def must_remove(self, action: Callable[[], T], by_hand: Callable[[], None]) -> None:
        """Invalidate through the index, else without it; raises `OSError` if both fail."""
        try:
            self._barrier.with_rebuild(action)
        except Exception as error:
            self._barrier.record_fault(error)
            try:
                by_hand()
            except Exception as reason:
                number = getattr(reason, "errno", None) or errno.EIO
                raise OSError(number, f"it was not deleted: {reason}", self._session.root) from error
        else:
            self.retry_pending()

    def defer(self, names: Collection[str], again: Callable[[], bool]) -> None:
        """Quarantine names until a retry succeeds."""
        if names:
            self._quarantine.hold(names)
            self._add(PendingInvalidation(list(names), again))

    def defer_latest(self, tag: str, names: Collection[str], again: Callable[[], bool]) -> None:
        """Like `defer`, replacing the pending invalidation with the same tag."""
        self._quarantine.hold(names)
        with self._lock:
            older = [pending for pending in self._pending if pending.tag == tag]
            self._pending = [pending for pending in self._pending if pending.tag != tag] + [
                PendingInvalidation(list(names), again, tag)
            ]
        for pending in older:
            self._quarantine.free(pending.names)

    def record_fault(self, error: BaseException) -> None:
        """Record a fault with a file."""
        self._barrier.record_fault(error)

    def adopt(self, names: Iterable[str], again: Callable[[list[str]], bool]) -> None:
        """Like `defer`, for the leftovers of another process; names that are pending already are skipped."""
        with self._lock:
            known = {name for pending in self._pending for name in pending.names}
        new = [name for name in names if name not in known]
        self.defer(new, lambda: again(new))

    def _add(self, pending: PendingInvalidation) -> None:
        with self._lock:
            self._pending.append(pending)

    @property
    def has_pending(self) -> bool:
        """Whether invalidations are pending."""
        away = bool(self._session.lost) and bool(self._quarantine.written_while_away())
        return away or bool(self._pending) or self._quarantine.has_returned

    def retry_pending(self) -> None:
        """Retry all pending invalidations."""
        with self._lock:
            # taken out, so that a retry in another thread does not do the same, and new ones can be added meanwhile
            pending, self._pending = self._pending, []
        left = []
        for number, item in enumerate(pending):
            try:
                is_done = self._barrier.with_rebuild(item.again)
            except Exception as error:
                # the index cannot be used: the others would wait for it as well
                self._barrier.record_fault(error)
                left += pending[number:]
                break
            if is_done:
                self._quarantine.free(item.names)
            else:
                left.append(item)
        # invalidations that came meanwhile stay behind the older ones, and keep the note
        with self._lock:
            self._pending = left + self._pending
            if not self._pending:
                self._drop_note()

    def has_returned(self) -> list[str]:
        """The names that were written while the current directory was missing from its path, if it has returned."""
        process = self._session.current
        if process is None or process.identity not in self._session.lost:
            return []
        return self._quarantine.written_while_away()

    def forget_returned(self) -> None:
        """Forget the names of `has_returned`: the directory that was away is invalidated now."""
        if (process := self._session.current) is not None:
            self._session.lost.discard(process.identity)
        if not self._session.lost:
            self._quarantine.forget_away()

    def suspect(self, names: Iterable[str]) -> None:
        """Serve some keys only after the index has confirmed the file, because their files were missing."""
        self._quarantine.suspect(names)

    def _record_away(self, names: Collection[str]) -> None:
        if self._session.lost:
            self._quarantine.record_away(names)

    # -- the note for later processes

    def _write_note(self, names: Collection[str]) -> None:
        """Append names to the note of pending invalidations, which stays locked while this process lives."""
        # without a note, only this process retries; the quarantine does not depend on it
        with self._lock, suppress(OSError):
            if self._note < 0:
                path = files.inside(self._session.root, f"{META}/tmp/{UNDONE}{secrets.token_hex(8)}")
                # A new name for each process, so that no two processes share a lock. Whole lines are appended, so half
                # a line means that the process died
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
        """Close the note; a forked child must not keep the lock of its parent."""
        if self._note >= 0:
            os.close(self._note)
            self._note = -1

    # -- invalidation without the index

    def _count_lost(self, failures: list[OSError]) -> None:
        """Count a write without the guard.

        Even if that fails, the files must go; then a fetch from before the write may still be published.
        """
        try:
            process = self._session.current
            if process is not None:
                process.writes.lose()
            # the counters of the registration may be those of a directory that was moved away
            if process is None or not process.guard.is_current():
                try:
                    counters = WriteCounters(f"{self._session.meta}/writes")
                except FileNotFoundError:
                    # there is no cache
                    return
                try:
                    counters.lose()
                finally:
                    counters.close()
        except OSError as error:
            failures.append(error)

    def unlink_keys(self, keys: Sequence[str]) -> None:
        """Invalidate keys without the index and without the guard.

        The process that holds the guard may be stopped at any point, and continue at any time. So the write is counted
        first: a later publish compares them under the guard before a file gets its name. Then temporary
        files are unlinked, so that a publish or a recovery that has compared already has no file to rename. Files that
        got their names before that are unlinked last. Raises `OSError` or `Unusable` if a file may be left.
        """
        failures: list[OSError] = []
        self._count_lost(failures)
        wanted, digests = set(keys), {Entry(key).digest() for key in keys}
        self._unlink_in_flight(lambda stamp: stamp.digest in digests or stamp.key in wanted)
        for key in keys:
            entry = Entry(key)
            if is_plain(key):
                self._unlink(key, entry)
            self._unlink(relative_path(entry, hashed=True), entry)
            files.remove_tree(files.inside(self._session.root, range_directory(key)))
        if failures:
            raise failures[0]

    def unlink_beneath(self, prefix: str) -> None:
        """Invalidate everything beneath a prefix without the index and without the guard; raises as `unlink_keys`."""
        failures: list[OSError] = []
        self._count_lost(failures)
        # the stamp of a file at its own key does not hold the key
        self._unlink_in_flight(lambda stamp: True)
        root = self._session.root
        # a prefix that cannot be a path has only hashed keys and byte ranges, which are searched below
        if not prefix or is_plain(prefix):
            for path in files.walk(files.inside(root, f"{prefix}/").rstrip("/")):
                key = os.path.relpath(path, root).replace(os.sep, "/")
                self._unlink(key, Entry(key))
        for place in ("odd", "ranges"):
            for path in files.walk(files.inside(root, f"{META}/{place}/").rstrip("/")):
                # only the cache writes here: a file without a stamp can be discarded, whatever it was
                stamp = files.read_stamp(path)
                if stamp is None or not prefix or stamp.key.startswith(f"{prefix}/"):
                    files.discard(path)
        if failures:
            raise failures[0]

    def _unlink_in_flight(self, concerns: Callable[[files.Stamp], bool]) -> None:
        """Unlink temporary files that another process may be about to rename."""
        for path in files.walk(files.inside(self._session.root, f"{META}/tmp/").rstrip("/")):
            if os.path.basename(path).startswith(UNDONE):
                continue
            stamp = files.read_stamp(path)
            # a file without a stamp may be of this key, and costs only a fetch
            if stamp is None or concerns(stamp):
                files.discard(path)

    def _unlink(self, relative: str, entry: Entry) -> None:
        path = files.inside(self._session.root, relative)
        # the index would know, but cannot be asked: to unlink a file of the user would be worse than an error
        if files.discard_ours(path, entry) is Whose.UNMARKED:
            raise Unusable(f"it is unknown whether {path} belongs to the cache")


def _append(results: list[T], action: Callable[[], T]) -> bool:
    results.append(action())
    return True
