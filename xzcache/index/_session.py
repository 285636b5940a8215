"""The index session of one process: its locks, its connection to the index, and its lease of the bound.

`IndexSession.section` is the only way to the index. It holds the guard, opens the current index, and detects that the
directory was removed or that the index was rebuilt.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import sqlite3
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from functools import cache, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xzcache import files
from xzcache.index._locks import ByteLocks, Guard, StoringLock, is_unlocked, open_lock_file, try_flock
from xzcache.index._sql import Index, is_locked
from xzcache.index._writeclock import WriteCounters
from xzcache.model import META, Busy, CacheFault, Damaged, Foreign, Unusable, translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# -- One process's part in a cache directory: its open locks, its number, its lease, its connection.

T = TypeVar("T")

# numbers that old processes still have locked are few: more than this is damage, and must not be a loop without end
_MOST_OWNERS: Final = 10_000
_PATIENCE: Final = 0.25
"""Seconds to wait for another program that has the index locked, with the guard held: once, then not for a while."""
# seconds in which each attempt fails at once: all other processes would wait for the guard as well
_IMPATIENCE: Final = 10.0

_GUARD_OF_OLD: Final = "guard.lock"
_LOCKS_OF_OLD: Final = ("storing.lock", "door.lock", "owners.lock", *(f"keys-{i}.lock" for i in range(16)))
"""The lock files of version 0.1.0, which running processes of that version still have open."""

_WRITTEN: Final = "written"
"""The directory of the notes that namespaces are being written."""
# a note holds a number or a name: a larger file is garbage, and is not read into memory
_LONGEST_NOTE: Final = 4096
_NOTE: Final = re.compile(r"([0-9a-f]{16})-(\d+)-\d+")
_NOTES: Final = 1 << 60
"""The first byte of the lock file that stands for the notes of one process; the owners' bytes lie far below."""
# each note costs several syncs of the disk; beyond this, one note stands for all namespaces
_MOST_NOTES: Final = 16
_OF_GARBAGE: Final = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError)
"""Exceptions of code that uses a row with values of the wrong types."""
_LONGEST_SYNC: Final = 5.0
"""Seconds that the end of a process waits for the disk."""


class WrittenNote(NamedTuple):
    """A note on the disk: a process wrote through the cache to a namespace in this boot of the machine.

    Invalidations are not safe on the disk before the process signs off, but the source has the write. After a loss of
    power old values could come back, so the whole namespace is then invalidated. `boot` is the boot in which the
    process wrote; `number` is the byte of the lock file that the process locks while it lives.
    """

    path: str
    boot: int
    number: int

    @property
    def is_of_this_boot(self) -> bool:
        return self.boot == _boot()

    def namespace(self) -> str:
        """The namespace; empty for all namespaces, and if the note is incomplete."""
        with open(self.path, "rb", opener=files.open_own) as file:
            name = file.read()
        text = name.decode(errors="replace")
        return text[:-1] if text.endswith("\n") else ""


def written_notes(meta: str) -> list[WrittenNote]:
    """The notes of all processes; raises `OSError` if they cannot be read."""
    try:
        names = os.listdir(f"{meta}/{_WRITTEN}")
    except FileNotFoundError:
        return []
    found = [(name, match) for name in names if (match := _NOTE.fullmatch(name)) is not None]
    return [WrittenNote(f"{meta}/{_WRITTEN}/{name}", int(match[1], 16), int(match[2])) for name, match in found]


class Registration:
    """The registration of this process in a directory: its open locks, its owner number and its lease.

    It has three descriptors: the file ``lock``, whose `flock` is the guard and whose bytes are the owners' locks; the
    file ``writes``, whose `flock` is the storing lock and whose bytes are the locks of keys; and the index. During a
    transaction SQLite opens the journal as well.

    Attributes
    ----------
    number : int
        Identifies the lock and counter files; counters of other files are not comparable.
    owner : int
        The number of this process in the index; its byte of the lock file stays locked while the process lives.
    free : int
        Bytes that are leased and not yet spent; guarded by `lease_lock`.
    is_writing : bool
        Whether this process was writing at the source when it signed off.
    """

    def __init__(self, meta: str, timeout: float) -> None:
        self.meta = meta
        self.guard = Guard(f"{meta}/lock", timeout)
        try:
            self.writes = WriteCounters(f"{meta}/writes")
        except BaseException:
            self.guard.close()
            raise
        # of both files: counters are not comparable if either file was replaced
        self.number = self.guard.identity[1] << 64 | os.fstat(self.writes.fd).st_ino
        self.storing = StoringLock(self.writes.fd, self.guard.fd)
        self.owners = ByteLocks(self.guard.fd)
        self.keys = ByteLocks(self.writes.fd)
        self.lease_lock = threading.Lock()
        self.index: Index | None = None
        self.generation = 0
        self.owner = 0
        self.free = 0
        self.next_recovery = 0.0
        self.is_checked = False
        self._sequence = 0
        self._serial = -1
        self._epoch = 0
        self._impatient_until = 0.0
        self._closed = False
        self._recording = threading.Lock()
        self._recorded: dict[str, str] = {}
        self._note_number = 0
        self.is_writing = False
        self.identity = self.guard.identity
        """Distinguishes this directory from another one at the same path."""

    def waits_for_others(self, seconds: float) -> bool:
        """Whether a lock was found held by another process within the last seconds, which is no fault of the disk."""
        return time.monotonic() - max(self.guard.refused_at, self.storing.refused_at) <= seconds

    def is_deleted(self) -> bool:
        """Whether the directory cannot come back."""
        return os.fstat(self.guard.fd).st_nlink == 0

    def index_path(self, generation: int) -> str:
        return f"{self.meta}/index-{generation}.db"

    # The guard's file holds four numbers of 8 bytes, written under the guard: generation, serial, epoch, boot.

    def _read(self, position: int) -> int:
        return int.from_bytes(os.pread(self.guard.fd, 8, 8 * position), "little")

    def _write(self, position: int, number: int) -> None:
        os.pwrite(self.guard.fd, number.to_bytes(8, "little"), 8 * position)

    def read_generation(self) -> int:
        """The number of the current index; 0 where there is none yet."""
        return self._read(0)

    def begin_generation(self, generation: int) -> None:
        """Make another index the current one for all later sections."""
        # a stale high serial, such as garbage, would make every index look outdated
        self._write(1, 0)
        self.write_boot()
        # last: from here on, the other processes use the new index
        self._write(0, generation)

    def write_boot(self) -> None:
        """Record that the index is sound since the machine booted; under the guard."""
        self._write(3, _boot())

    def was_restarted(self) -> bool:
        """Whether the machine rebooted since the index was found sound: some writes may not have reached the disk."""
        return bool(boot := _boot()) and self._read(3) != boot

    # -- the notes that namespaces are being written

    def is_recorded(self, namespace: str) -> bool:
        """Whether `record_written` has nothing to do."""
        return namespace in self._recorded or "" in self._recorded or not _boot()

    def record_written(self, namespace: str) -> None:
        """Write a note before the first write to a namespace, so that a loss of power during the writes is detected.

        The note is on the disk when this returns; raises `OSError` if it cannot be written. Platforms that do not
        identify the boot have no notes.
        """
        if self.is_recorded(namespace):
            return
        # Two threads of a process need one note. The lock may wait for the disk, but no other lock is taken under it
        with self._recording:
            if self.is_recorded(namespace):
                return
            if len(self._recorded) >= _MOST_NOTES - 1:
                namespace = ""
            folder = f"{self.meta}/{_WRITTEN}"
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            # each process syncs both, because the process that created the directory may have been killed before
            for place in (self.meta, os.path.dirname(self.meta)):
                files.sync(place)
            # a random number: a note of a dead process must not be taken for one of this process
            while not self._note_number:
                number = _NOTES | secrets.randbits(48)
                if self.owners.try_lock(number):
                    self._note_number = number
            path = f"{folder}/{_boot():016x}-{self._note_number}-{len(self._recorded)}"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                # a note without a line end is incomplete and stands for all namespaces
                os.write(fd, f"{namespace}\n".encode() if namespace else b"")
                os.fsync(fd)
            finally:
                os.close(fd)
            # the name of the note must be on the disk as well as its contents
            files.sync(folder)
            self._recorded[namespace] = path

    def take_notes_back(self) -> None:
        """After signing off, sync the invalidations to the disk, then remove the notes.

        If the sync takes long, a thread finishes it. If it fails, the next process does it.
        """
        if self._recorded:
            thread = threading.Thread(target=self._take_notes_back, name="xzcache-sync", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # the end of the process
                self._take_notes_back()
            else:
                thread.join(_LONGEST_SYNC)

    def _take_notes_back(self) -> None:
        with self._recording, suppress(OSError):
            files.sync_all(self.guard.fd)
            for path in self._recorded.values():
                files.discard(path)
            self._recorded.clear()

    def dead_notes(self) -> Iterator[WrittenNote]:
        """Notes of this boot whose processes are dead, each with its byte locked."""
        for note in written_notes(self.meta):
            if note.is_of_this_boot and note.number != self._note_number and self.owners.try_lock(note.number):
                try:
                    yield note
                finally:
                    self.owners.unlock(note.number)

    def revoke_leases(self, index: Index) -> None:
        """Revoke all leases, with the storing lock held; each process sees the new epoch before its next store."""
        index.drop_leases()
        self._write(2, (self._read(2) + 1) % (1 << 63))

    def sees_revocations(self) -> bool:
        """Forget a revoked lease; False if this process has no number in the current index."""
        # all three numbers in one call: this is asked before each entry is stored
        numbers = os.pread(self.guard.fd, 24, 0)
        if (epoch := int.from_bytes(numbers[16:], "little")) != self._epoch:
            # the spent part of the old lease was counted with its entries
            with self.lease_lock:
                self._epoch, self.free = epoch, 0
        return self.owner != 0 and int.from_bytes(numbers[:8], "little") == self.generation

    def read_serial(self) -> int:
        """The serial number of the index after the last transaction."""
        return self._read(1)

    def write_serial(self, index: Index) -> None:
        """Record the serial of the index, which shows a loss of its last transactions; under the guard."""
        serial = index.committed_serial
        if serial != self._serial:
            self._serial = serial
            self._write(1, serial)

    def next_temporary(self) -> tuple[int, str]:
        """An unused number of this owner, and the path of the temporary file with that number."""
        with self.lease_lock:
            self._sequence += 1
            return self._sequence, f"{self.meta}/tmp/{self.owner}/{self._sequence}"

    def give_back(self, size: int) -> None:
        """Return bytes that were taken from the lease and not written."""
        with self.lease_lock:
            self.free += size

    def open_index(self) -> Index:
        """The current index, with this process registered in it; under the guard only."""
        generation = self._read(0)
        if generation != self.generation or generation == 0:
            self.close_index()
        elif self.index is not None and self.index.is_logged:
            # a new connection merges the log first; this one would map it into memory
            self.disconnect()
        self.generation = generation
        if generation == 0:
            raise Damaged("there is no index yet")
        if self.index is None:
            index = self.patiently(lambda: Index(self.index_path(generation)))
            try:
                if self.owner == 0:
                    self._register(index)
            except BaseException:
                index.close()
                raise
            self.index = index
        return self.index

    def _register(self, index: Index) -> None:
        self.patiently(lambda: index.begin(0))
        if self.was_restarted() and not index.is_sound():
            raise Damaged("the index did not survive the restart of the machine")
        # for example, another program put back an older copy of the file
        if index.serial() < self.read_serial():
            raise Damaged("the index has lost its last transactions")
        if self.was_restarted():
            # first, because this process may get the number of a lost owner
            index.disown_lost()
        owner = self._take_number(index)
        try:
            # after a loss of power, files of an owner may exist whose row was lost and whose number is free again
            files.remove_tree(f"{self.meta}/tmp/{owner}")
            os.makedirs(f"{self.meta}/tmp/{owner}", mode=0o700)
            # after the directory exists: temporary files of an owner lie there from its first entry on
            index.commit()
        except BaseException:
            self.owners.unlock(owner)
            raise
        self.owner, self._epoch = owner, self._read(2)

    def patiently(self, action: Callable[[], T]) -> T:
        """Retry an action that another program's lock on the index blocks: wait once, then fail fast for a while.

        Raises
        ------
        Busy
            Another program has the index locked.
        """
        now = time.monotonic()
        patient = now >= self._impatient_until
        while True:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if not is_locked(error):
                    raise
                if not patient or time.monotonic() >= now + _PATIENCE:
                    if patient:
                        self._impatient_until = time.monotonic() + _IMPATIENCE
                    raise Busy(f"another program has the index in {self.meta} locked") from error
            time.sleep(_PATIENCE / 100)

    def _take_number(self, index: Index) -> int:
        for _ in range(_MOST_OWNERS):
            owner = index.add_owner(os.getpid())
            if self.owners.try_lock(owner):
                return owner
            # still locked by a process that does not know of the new index yet
            index.drop_owner(owner)
        raise Unusable(f"no number in {self.meta}/lock can be locked")

    def disconnect(self) -> None:
        """Close the connection; the next section opens a new one. Requires the guard, or that no section is open."""
        index, self.index = self.index, None
        if index is not None:
            with suppress(sqlite3.Error):
                index.close()

    def close_index(self) -> None:
        """Close the index of an older generation; under the guard only."""
        self.disconnect()
        self.is_checked = False
        if self.owner:
            self.owners.unlock(self.owner)
        with self.lease_lock:
            self.owner = self.free = 0

    def close_descriptors(self) -> None:
        if not self._closed:
            self._closed = True
            self.owners.disown()
            self.keys.disown()
            for lock in (self.guard, self.writes):
                # the descriptor is closed even if the file system reports an error
                with suppress(OSError):
                    lock.close()

    def __del__(self) -> None:
        # other threads may still be using the locks of a directory that was left: they go with the last of them
        if hasattr(self, "_closed"):
            self.close_descriptors()
            self.disconnect()


def take_over(meta: str, timeout: float) -> None:
    """Convert a directory of version 0.1.0 to the current lock files, unless a process of that version uses it.

    A directory in the place of the old guard file then keeps such processes out: they serve cached entries, store
    nothing, and unlink the files of the keys that they write.

    Raises
    ------
    Unusable
        A process of that version uses the directory; this process then reads from the source.
    """
    path = f"{meta}/{_GUARD_OF_OLD}"
    while not os.path.isdir(path):
        try:
            old = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
            continue
        try:
            deadline = time.monotonic() + timeout
            while not try_flock(old, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    raise Unusable(f"{path} is held by a process of version 0.1.0")
                time.sleep(_PATIENCE / 100)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(old)):
                    _convert(meta, old)
        finally:
            os.close(old)


def _convert(meta: str, old: int) -> None:
    """Convert the lock files, with the old guard held; a process that is killed here leaves all steps to the next."""
    if not is_unlocked(f"{meta}/owners.lock"):
        raise Unusable(f"the cache directory {os.path.dirname(meta)} is in use by a process of version 0.1.0")
    numbers = os.pread(old, 24, 0).ljust(24, b"\0")
    new = open_lock_file(f"{meta}/lock")
    try:
        if any(numbers[:8]) or not any(os.pread(new, 8, 0)):
            # an empty old file was made again by a process of that version: it must not erase the numbers
            os.pwrite(new, numbers + _boot().to_bytes(8, "little"), 0)
    finally:
        os.close(new)
    os.unlink(f"{meta}/{_GUARD_OF_OLD}")
    os.mkdir(f"{meta}/{_GUARD_OF_OLD}", 0o700)
    for name in _LOCKS_OF_OLD:
        with suppress(FileNotFoundError):
            os.unlink(f"{meta}/{name}")


@cache
def _boot() -> int:
    """A number that changes with each boot of the machine; 0 if the platform does not identify the boot."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            # 0 stands for "unknown", so no boot may have it
            return int.from_bytes(blake2b(file.read(), digest_size=8).digest(), "little") or 1
    except OSError:
        return 0


# -- The session.

FORMAT: Final = 1
"""The format of the entry files, and of invalidation without the index. `take_over` handles the lock files."""
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
    joined : callable
        Called when this process has joined; must not wait.

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

    def __init__(self, root: str, timeout: float, joined: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self._joined = joined
        self.meta = f"{root}/{META}"
        self.timeout = timeout
        self.is_retired = False
        self.when_refused: Callable[[], None] = _nothing
        self.when_joined: Callable[[], None] = _nothing
        self._opening = threading.Lock()
        self.current: Registration | None = None
        self._forking: Registration | None = None
        self._inside = threading.local()
        self._stamps: bool | None = None
        self.when_used: Callable[[], None] = _nothing
        self.lost: set[tuple[int, int]] = set()
        """The directories that were at the path before, were moved away, and may come back."""
        self.writing: set[int] = set()
        """Ids of the writes that this process has begun at the source and not ended."""
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
                self.when_joined()
                self._joined()
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
        process = Registration(self.meta, self.timeout)
        with process.guard:
            if self.read_note("format") != str(FORMAT):
                self.write_note("format", str(FORMAT))
        return process

    def node_id(self) -> str:
        """A uuid that is the same for all processes that share this directory, and for no others."""
        # under the guard, so that two processes that ask at once get the same id
        with self.guarded():
            if not self.read_note("node"):
                self.write_note("node", str(uuid.uuid4()))
            return self.read_note("node") or ""

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
        unless_writing: bool = False,
        has_pending: bool = False,
    ) -> bool:
        """Return the lease and sign off once nothing is being stored; the next use joins again.

        `last_words` writes pending uses to the index. With `unless_writing`, a process that is writing at the source
        stays. With `has_pending`, the notes stay because invalidations are pending. Returns whether this process has
        left.
        """
        process = self.current
        if process is None:
            return True
        is_done = False
        # first the threads that are about to spend the lease, because signing off gives it back
        with process.storing.kept_out(self.timeout) as alone:
            with suppress(CacheFault, OSError):
                if alone and not self._sign_off(process, last_words, unless_writing=unless_writing):
                    return False
                is_done = alone and not process.is_writing
            # a process that could not sign off counts as dead: the next recovery finishes its work
            if self.current is process:
                self.current = None
        # a note stays while an invalidation is pending, since the disk may still show the
        # old files after a loss of power
        if is_done and not has_pending:
            process.take_notes_back()
        return True

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

    def _sign_off(
        self, process: Registration, last_words: Callable[[Index], None] | None, *, unless_writing: bool
    ) -> bool:
        with process.guard:
            stays = False
            try:
                # only the guard shows whether there is a number to return, because a thread in a section may just take
                # one; and a removed directory must not be created again
                if process.owner and process.guard.is_current():
                    self._give_number_back(process, last_words)
                    stays = process.is_writing and unless_writing
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
        self.writing = set()


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
