"""The index session of one process.

`IndexSession.section` is the only way to the index. It holds the guard, opens the current index, and detects that the
directory was removed or that the index was rebuilt.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from xzcache import files
from xzcache.index._registration import Registration, take_over
from xzcache.index._sql import Index, is_locked
from xzcache.model import META, Busy, CacheFault, Damaged, Foreign, Unusable, translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


FORMAT: Final = 1
"""The format of the entry files, and of invalidation without the index. `take_over` handles the lock files."""
# a note holds a number or a name: a larger file is garbage, and is not read into memory
_LONGEST_NOTE: Final = 4096
_OF_GARBAGE: Final = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError)
"""Exceptions of code that uses a row with values of the wrong types."""
_MOMENT: Final = 0.09
_inherited: Final[list[object]] = []
"""Connections of the parent in a forked child, which must neither be used nor closed."""


class IndexSession:
    """The index of one cache directory and the locks around it.

    Safe for threads and processes. Nothing is opened before the first use. A directory that was removed is created
    again in the next section, and a forked child starts with a new registration.

    Parameters
    ----------
    root : str
        The cache directory.
    timeout : float
        Seconds to wait for the guard.
    to_leave : callable
        Called when this process has joined, and when its last write has ended, to leave if nobody uses the directory;
        must not wait.

    Attributes
    ----------
    checked : (int, int) or None
        Generation and serial number of the index whose totals this process has verified.
    when_refused, when_joined : callable
        Called when the directory is found not to be a cache of this user, and when it is found to be one.
    when_used : callable
        Called after each transaction.
    current : Registration or None
        The registration of this process, if it has joined.
    """

    def __init__(self, root: str, timeout: float, to_leave: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self._to_leave = to_leave
        self.meta = f"{root}/{META}"
        self.timeout = timeout
        self.is_retired = False
        self.when_refused: Callable[[], None] = _nothing
        self.when_joined: Callable[[], None] = _nothing
        self._opening = threading.Lock()
        self.current: Registration | None = None
        self._joining: Registration | None = None
        self._impatient_until = 0.0
        self._forking: Registration | None = None
        self._inside = threading.local()
        self._stamps: bool | None = None
        self.when_used: Callable[[], None] = _nothing
        self.lost: set[tuple[int, int]] = set()
        """The directories that were at the path before, were moved away, and may come back."""
        self.writing: dict[int, tuple[str, bool]] = {}
        """The writes that this process has begun at the source and not ended; see `Registration`."""
        self._used = 0.0

    @property
    def was_just_used(self) -> bool:
        """Whether the index was used less than a moment ago."""
        return time.monotonic() - self._used < _MOMENT

    def process(self) -> Registration:
        """The registration of this process, joining the directory if needed; raises `Unusable` if that fails."""
        process = self.current
        if process is not None:
            return process
        if self.is_retired:
            raise Unusable(f"the cache directory {self.root} was removed")
        with self._opening:
            # another thread may leave at any moment
            process = self.current
            if process is None:
                try:
                    process = self.current = self._join()
                except Foreign:
                    self.when_refused()
                    raise
                except OSError as error:
                    raise Unusable(f"the cache directory {self.root} cannot be used: {error}") from error
                # for writes that began before
                self._share_writers_byte()
                self.when_joined()
                self._to_leave()
            return process

    def _join(self) -> Registration:
        found = self.read_note("format")
        # garbage is damage and is repaired; a number belongs to a newer version
        if found and found.isdecimal() and found != str(FORMAT):
            raise Foreign(f"the cache directory {self.root} has format {found}, but this xzcache uses format {FORMAT}")
        files.make_private(self.root)
        if not os.path.islink(self.meta) and os.path.isdir(self.meta) and files.unsafe(self.meta) is None:
            # a link leads out of the cache, and opening a pipe can block for ever: both are removed, not followed
            files.remove_strangers(self.meta)
        folders = [self.root, self.meta, *(f"{self.meta}/{name}" for name in ("tmp", "trash"))]
        for place in folders:
            if place != self.root:
                with suppress(FileExistsError):
                    os.mkdir(place, 0o700)
            # another user with write access could plant entries, or have files deleted
            if (why := files.unsafe(place)) is not None:
                raise Foreign(why)
        take_over(self.meta, self.timeout)
        process = self._joining = Registration(self.meta, self.timeout, self.writing)
        # a stopped holder of the guard must not slow down each attempt to join
        process.guard.impatient_until = self._impatient_until
        try:
            with process.guard:
                if self.read_note("format") != str(FORMAT):
                    self.write_note("format", str(FORMAT))
                # without room for it on the disk, the cache is still of use
                with suppress(OSError):
                    self._make_node_id()
        finally:
            self._joining, self._impatient_until = None, process.guard.impatient_until
        return process

    def waits_for_others(self, seconds: float) -> bool:
        """Whether a lock was found held by another process within the last seconds, which is no fault of the disk."""
        process = self.current or self._joining
        return process is not None and process.waits_for_others(seconds)

    def node_id(self) -> str:
        """A uuid that is the same for all processes that share this directory, and for no others."""
        # under the guard, so that two processes that ask at once get the same id
        with self.guarded():
            return self._make_node_id()

    def _make_node_id(self) -> str:
        if not (found := self.read_note("node")):
            self.write_note("node", found := str(uuid.uuid4()))
        return found

    @property
    def has_stamps(self) -> bool:
        """Whether the file system supports the stamps that identify the cache's files."""
        return files.has_stamps(f"{self.meta}/lock")

    def record_made(self, namespace: str) -> None:
        """Record, on file systems without stamps, that the cache created a directory; under the guard only."""
        if self._stamps is None:
            self._stamps = self.has_stamps
        if not self._stamps and namespace and not os.path.exists(f"{self.root}/{namespace}"):
            files.make_directories(f"{self.meta}/made/{namespace}")

    def made_namespaces(self) -> list[str]:
        """The directories that `record_made` remembers."""
        with suppress(FileNotFoundError):
            return os.listdir(f"{self.meta}/made")
        return []

    def write_note(self, name: str, text: str) -> None:
        """Replace a small file; under the guard only."""
        path = f"{self.meta}/{name}"
        # written beside and renamed: a process that is killed here leaves the old note whole
        with open(path + ".new", "w", opener=files.open_own) as file:
            file.write(text)
        os.replace(path + ".new", path)

    def read_note(self, name: str) -> str | None:
        """The contents of a small file; None if it is missing."""
        with suppress(OSError), open(f"{self.meta}/{name}", errors="replace", opener=files.open_own) as file:
            return file.read(_LONGEST_NOTE).strip()
        return None

    @contextmanager
    def guarded(self, patience: float | None = None) -> Iterator[Registration]:
        """Hold the guard of the current directory without opening the index; wait `patience` seconds if given."""
        # a program that removes the directory in a loop must not keep a read here for ever
        for _ in range(3):
            process = self.current or self.process()
            self._used = time.monotonic()
            with process.guard if patience is None else process.guard.within(patience):
                # asked again under the guard: the process may have left, or the directory been removed, during the wait
                if self.current is process and process.guard.is_current():
                    yield process
                    return
                # this process left, or the directory was removed: start over
                self.abandon(process)
        raise Unusable(f"the cache directory {self.root} is removed again and again")

    @contextmanager
    def section(self, patience: float | None = None) -> Iterator[tuple[Registration, Index]]:
        """One transaction on the index, under the guard.

        Commits at the end. A caller that must act between the commit and the release of the guard commits itself.

        Raises
        ------
        Busy, Damaged, NoRoom, Unusable
            The transaction did not happen.
        """
        # the mutex of the guard is not reentrant: the thread would wait for itself
        if getattr(self._inside, "yes", False):
            raise CacheFault("a section is open already in this thread")
        with self.guarded(patience) as process:
            self._inside.yes = True
            index = None
            try:
                index = opened = process.open_index()
                process.patiently(partial(opened.begin, 0.0))
                yield process, index
                index.commit()
                # after the commit: a serial ahead of the index would make it look as if it had lost transactions
                process.write_serial(index)
            except BaseException as error:
                if index is not None:
                    with suppress(sqlite3.Error):
                        index.rollback()
                    index.forget_uncommitted()
                if isinstance(error, sqlite3.Error):
                    if not is_locked(error):
                        # a new connection opens the files again
                        process.disconnect()
                    raise _blamed(translated(error), process) from error
                if isinstance(error, _OF_GARBAGE) and index is not None and _is_damaged(index):
                    process.disconnect()
                    raise _blamed(Damaged("the rows of the index make no sense"), process) from error
                _blamed(error, process)
                raise
            finally:
                self._inside.yes = False
                # a wait that has ended shows that the disk makes progress, whatever the outcome
                self.when_used()

    @contextmanager
    def storing(self) -> Iterator[Registration]:
        """Block a rebuild while a lease is spent and the entry is recorded; raises `Busy` during a long rebuild."""
        for _ in range(3):
            process = self._present()
            if not process.storing.share(self.timeout):
                raise Busy("the index is being rebuilt")
            try:
                if self.current is not process:
                    # this process left the directory meanwhile
                    continue
                # a section gives this process a number in the current index, which the lease must belong to
                if not process.sees_revocations():
                    with self.section() as (current, _):
                        if current is not process:
                            raise Busy("the directory was removed meanwhile")
                    process.sees_revocations()
                yield process
                return
            finally:
                process.storing.unshare()
        raise Busy(f"the cache directory {self.root} is left again and again")

    def is_stand_in(self) -> bool:
        """Whether the directory at the path is the one that this process uses, and was never away."""
        process = self.current
        try:
            return process is not None and process.identity not in self.lost and process.guard.is_current()
        except OSError:
            return False

    def abandon(self, process: Registration) -> None:
        """Drop the registration in a directory that is no longer at the path."""
        if not process.is_deleted():
            self.lost.add(process.identity)
        # the guard is held: another thread that joins a directory waits for it with this lock
        if self.current is process:
            with self._opening:
                if self.current is process:
                    self.current = None
        process.close_index()

    def close(
        self,
        last_words: Callable[[Index], None] | None = None,
        *,
        for_good: bool = False,
        has_pending: bool = False,
    ) -> bool:
        """Return the lease and sign off once nothing is being stored; the next use joins again.

        `last_words` writes pending uses to the index. A process that is writing at the source stays, unless the
        directory goes `for_good`. With `has_pending`, the notes stay because invalidations are pending. Returns whether
        this process has left.
        """
        process = self.current
        if process is None:
            return True
        has_signed_off = False
        # first the threads that are about to spend the lease, because signing off gives it back
        with process.storing.kept_out(self.timeout) as alone:
            with suppress(CacheFault, OSError):
                if alone and not self._sign_off(process, last_words, for_good=for_good):
                    return False
                has_signed_off = alone
            # a process that could not sign off counts as dead, which one that is writing must not
            if not has_signed_off and self.writing and not for_good:
                return False
            # the next recovery finishes its work
            if self.current is process:
                self.current = None
        # a note stays while an invalidation is pending, since the disk may still show the
        # old files after a loss of power
        if has_signed_off and not process.is_writing and not has_pending:
            process.take_notes_back()
        return True

    def begin_write(self, key: str, *, beneath: bool) -> int:
        """Begin a write of a key at the source, or of all beneath it; returns its id.

        The caller records it in the index. After a rebuild, the next section records it in the new index.
        """
        # no number is drawn twice, so that a row is never taken for that of another write
        id_ = secrets.randbits(62)
        self.writing[id_] = key, beneath
        self._share_writers_byte()
        return id_

    def end_writes(self, ids: Iterable[int]) -> None:
        """End writes at the source."""
        for id_ in ids:
            self.writing.pop(id_, None)
        self._share_writers_byte()
        if not self.writing and self.current is not None:
            self._to_leave()

    def _share_writers_byte(self) -> None:
        if (process := self.current) is not None:
            # a write does not fail for want of this lock, which matters only if the index is rebuilt meanwhile
            with suppress(OSError):
                process.share_writers_byte()

    def record_written(self, namespace: str) -> None:
        """Write the note of a namespace unless it exists; see `Registration.record_written`."""
        process = self.current
        if process is None or not process.is_recorded(namespace):
            self._present().record_written(namespace)

    def _present(self) -> Registration:
        """The registration in the directory that is at the path now, which may have been replaced."""
        process = self.current or self.process()
        if not process.guard.is_current():
            with self.guarded() as joined:
                process = joined
        return process

    def _sign_off(self, process: Registration, last_words: Callable[[Index], None] | None, *, for_good: bool) -> bool:
        with process.guard:
            stays = bool(self.writing) and not for_good
            try:
                # only the guard shows whether there is a number to return, because a thread in a section may just take
                # one; and a removed directory must not be created again
                if process.owner and process.guard.is_current():
                    self._give_number_back(process, last_words)
                    stays = process.is_writing and not for_good
                else:
                    stays = False
            except sqlite3.Error as error:
                raise translated(error) from error
            finally:
                if not stays:
                    # a thread that waits for this guard must see that the registration has ended
                    if self.current is process:
                        self.current = None
                    process.close_index()
            return not stays

    def _give_number_back(self, process: Registration, last_words: Callable[[Index], None] | None) -> None:
        """Remove this process from the index, unless it is writing at the source; under the guard."""
        index = process.open_index()
        process.patiently(lambda: index.begin(0))
        try:
            if last_words is not None:
                last_words(index)
            # while this process writes at the source, its row in the index stays
            process.is_writing = bool(index.tables.writing_of(process.owner))
            if not process.is_writing:
                index.drop_owner(process.owner)
            index.commit()
        finally:
            index.rollback()
        process.write_serial(index)
        if not process.is_writing:
            with suppress(OSError):
                os.rmdir(f"{self.meta}/tmp/{process.owner}")

    # -- fork

    def before_fork(self) -> None:
        """Wait until no thread is in a section, and keep it so: the child must not inherit half a transaction."""
        self._forking = self.current
        if self._forking is not None and self._forking.guard.before_fork():
            # the child must neither use nor close the connection of its parent, so there is none to inherit
            self._forking.disconnect()
        self._opening.acquire()

    def after_fork_in_parent(self) -> None:
        self._opening.release()
        if self._forking is not None:
            self._forking.guard.after_fork_in_parent()
        self._forking = None

    def after_fork_in_child(self) -> None:
        """Start anew: release no lock of the parent, and neither use nor close its connection."""
        for process in {self.current, self._forking} - {None}:
            assert process is not None
            if process.index is not None:
                # SQLite forbids even to close a connection of another process
                _inherited.append(process.index)
                process.index = None
            process.close_descriptors()
        self.current = self._forking = None
        self._opening = threading.Lock()
        self._inside = threading.local()
        self.writing = {}


def _nothing() -> None:
    pass


def _is_damaged(index: Index) -> bool:
    """Whether SQLite finds damage: values of the wrong kind come from there, or from an error in this package."""
    try:
        return not index.is_sound()
    except sqlite3.Error:
        return True


def _blamed(error: BaseException, process: Registration) -> BaseException:
    """Add the generation of the index to a `Damaged` exception; returns the exception."""
    if isinstance(error, Damaged):
        error.generation = process.generation
    return error
