"""The registration of one process in a cache directory: its open locks, its number, its lease, its connection."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import sqlite3
import threading
import time
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xzcache import files
from xzcache.index._locks import (
    ByteLocks,
    Guard,
    StoringLock,
    is_range_locked,
    is_unlocked,
    lock_range,
    open_lock_file,
    try_flock,
)
from xzcache.index._sql import Index, is_locked
from xzcache.index._writeclock import WriteCounters
from xzcache.model import Busy, Damaged, Unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


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
_NOTE: Final = re.compile(r"([0-9a-f]{16})-(\d+)-\d+")
_NOTES: Final = 1 << 60
"""The first byte of the lock file that stands for the notes of one process; the owners' bytes lie far below."""
_WRITERS: Final = 1 << 61
"""The byte of the lock file that all processes share whose writes under way an index has: this plus its number."""
_INDEXES: Final = 1 << 48
"""More than the largest number of an index."""
# each note costs several syncs of the disk; beyond this, one note stands for all namespaces
_MOST_NOTES: Final = 16
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
    writing : mapping of int to (str, bool)
        The writes of this process at the source that are under way: by id, the key, and whether it is everything
        beneath it.
    """

    def __init__(self, meta: str, timeout: float, writing: Mapping[int, tuple[str, bool]]) -> None:
        self.meta = meta
        self.writing = writing
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
        self._sharing = threading.Lock()
        self._informed = 0
        self._shared = 0
        self.is_writing = False
        self.identity = self.guard.identity
        """Distinguishes this directory from another one at the same path."""

    def waits_for_others(self, seconds: float) -> bool:
        """Whether a lock was found held by another process within the last seconds."""
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

    # -- the writes under way

    def share_writers_byte(self) -> None:
        """While writes are under way, share the byte of the index that has their rows; call this after each change.

        It shows a rebuild that there are writes whose rows were lost. The kernel unlocks it if this process dies.
        """
        with self._sharing:
            byte = _writers_byte(self._informed) if self.writing else 0
            if byte != self._shared:
                # before the other one is unlocked: at each moment there is one
                if byte and not lock_range(self.guard.fd, fcntl.F_RDLCK, byte):
                    return
                if self._shared:
                    lock_range(self.guard.fd, fcntl.F_UNLCK, self._shared)
                self._shared = byte

    def has_unknown_writes(self, generation: int) -> bool:
        """Whether writes of other processes are under way of which an index has no rows; under the guard.

        Idle processes do not count, so that nothing waits for them.
        """
        byte = _writers_byte(generation)
        spans = (_WRITERS, byte), (byte + 1, _WRITERS + _INDEXES)
        return any(is_range_locked(self.guard.fd, first, end - first) for first, end in spans if first < end)

    def end_unknown_writes(self, index: Index) -> None:
        """Let keys be stored again if no such writes are under way any more; within a section."""
        if index.tables.has_unknown_writes() and not self.has_unknown_writes(self.generation):
            # nothing was stored meanwhile, and what was fetched meanwhile must not be stored from here on
            self.writes.lose()
            index.tables.drop_unknown_writes()

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
            # the writes that began under a lost index, or without one
            for id_, (key, beneath) in dict(self.writing).items():
                index.tables.add_writing(id_, key, owner, beneath=beneath)
            self.end_unknown_writes(index)
            # after the directory exists: temporary files of an owner lie there from its first entry on
            index.commit()
            self._informed = self.generation
            self.share_writers_byte()
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


def _writers_byte(generation: int) -> int:
    return _WRITERS + generation % _INDEXES


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
        except IsADirectoryError:  # another process was faster
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
    with suppress(FileExistsError):  # a process that came in between has made it
        os.mkdir(f"{meta}/{_GUARD_OF_OLD}", 0o700)
    if not os.path.isdir(f"{meta}/{_GUARD_OF_OLD}"):
        # it was one of that version, which now uses the directory: its locks must be found
        return
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
