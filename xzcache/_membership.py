"""One process's part in a cache directory: its open locks, its number, its lease, its connection."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import suppress
from typing import Final

from xzcache._bytelocks import ByteLocks
from xzcache._errors import Damaged, Unusable
from xzcache._index import Index
from xzcache._locks import Guard, StoringLock, WriteCounters

_KEY_LOCK_FILES: Final = 16
_MOST_OWNERS: Final = 10_000
_left_open: Final[list[object]] = []


class Membership:
    """This process's part in a directory: open locks, an owner number, and the bytes it may still write.

    Attributes
    ----------
    owner : int
        The number under which the index knows this process; its byte of the owners' file is locked for life.
    free : int
        Bytes that are leased and not yet spent; guarded by `lease_lock`.
    """

    def __init__(self, meta: str, timeout: float) -> None:
        self.meta = meta
        self.guard = Guard(f"{meta}/guard.lock", timeout)
        self.storing = StoringLock(f"{meta}/storing.lock", f"{meta}/door.lock")
        self.owners = ByteLocks([f"{meta}/owners.lock"])
        self.keys = ByteLocks([f"{meta}/keys-{i}.lock" for i in range(_KEY_LOCK_FILES)])
        self.writes = WriteCounters(f"{meta}/writes")
        self.lease_lock = threading.Lock()
        self.index: Index | None = None
        self.generation = 0
        self.owner = 0
        self.free = 0
        self.next_recovery = 0.0
        self._sequence = 0
        self._serial = -1
        self._epoch = 0
        self._closed = False
        status = os.fstat(self.guard.fd)
        self.identity = status.st_dev, status.st_ino
        """What tells this directory from another one that takes its place."""

    def is_deleted(self) -> bool:
        """Whether the directory cannot come back."""
        return os.fstat(self.guard.fd).st_nlink == 0

    def index_path(self, generation: int) -> str:
        return f"{self.meta}/index-{generation}.db"

    # The guard's file holds three numbers of 8 bytes, written under the guard: generation, serial, epoch.

    def _read(self, position: int) -> int:
        return int.from_bytes(os.pread(self.guard.fd, 8, 8 * position), "little")

    def _write(self, position: int, number: int) -> None:
        os.pwrite(self.guard.fd, number.to_bytes(8, "little"), 8 * position)

    def read_generation(self) -> int:
        """The number of the current index; 0 where there is none yet."""
        return self._read(0)

    def begin_generation(self, generation: int) -> None:
        """Make another index the current one, for all who enter the guard from now on."""
        # a serial that nobody reached, as garbage might be, would make every index look old
        self._write(1, 0)
        self._write(0, generation)

    def revoke_leases(self, index: Index) -> None:
        """Take all leases back, while nobody stores; whoever stores next finds the epoch changed."""
        index.drop_leases()
        self._write(2, (self._read(2) + 1) % (1 << 63))

    def see_revocations(self) -> None:
        """Forget a lease that was taken back."""
        if (epoch := self._read(2)) != self._epoch:
            with self.lease_lock:
                self._epoch, self.free = epoch, 0

    def read_serial(self) -> int:
        """The serial number that the index had after the last transaction."""
        return self._read(1)

    def note_serial(self, index: Index) -> None:
        """Write down how far the index got, so that one that lost its last transactions is noticed; under the guard."""
        serial = index.serial()
        if serial != self._serial:
            self._serial = serial
            self._write(1, serial)

    def next_temporary(self) -> tuple[int, str]:
        """A number that this owner has not used yet, and the path of the file in flight that goes with it."""
        with self.lease_lock:
            self._sequence += 1
            return self._sequence, f"{self.meta}/tmp/{self.owner}/{self._sequence}"

    def give_back(self, size: int) -> None:
        """Return bytes that were taken from the lease and not written."""
        with self.lease_lock:
            self.free += size

    def open_index(self) -> Index:
        """The current index, with this process registered in it; under the guard only."""
        generation = self.read_generation()
        if self.index is not None and generation == self.generation:
            return self.index
        self.leave_index()
        self.generation = generation
        if generation == 0:
            raise Damaged("there is no index yet")
        index = Index(self.index_path(generation))
        try:
            index.begin()
            if index.serial() < self.read_serial():
                raise Damaged("the index has lost its last transactions")
            owner = self._take_number(index)
            os.makedirs(f"{self.meta}/tmp/{owner}", mode=0o700, exist_ok=True)
            index.commit()
        except BaseException:
            index.close()
            raise
        self.index, self.owner, self._epoch = index, owner, self._read(2)
        return index

    def _take_number(self, index: Index) -> int:
        for _ in range(_MOST_OWNERS):
            owner = index.add_owner(os.getpid())
            if self.owners.try_lock(owner):
                return owner
            # still locked by a process that does not know of the new index yet
            index.drop_owner(owner)
        raise Unusable(f"no number in {self.meta}/owners.lock can be locked")

    def leave_index(self) -> None:
        """Close the index of an older generation; under the guard only."""
        if self.index is not None:
            with suppress(sqlite3.Error):
                self.index.close()
            self.index = None
            self.owners.unlock(self.owner)
        with self.lease_lock:
            self.owner = self.free = 0

    def close_descriptors(self) -> None:
        if not self._closed:
            self._closed = True
            for lock in (self.guard, self.storing, self.owners, self.keys, self.writes):
                lock.close()

    def __del__(self) -> None:
        # other threads may still be using the locks of a directory that was left: they go with the last of them
        if hasattr(self, "writes"):
            self.close_descriptors()
        if getattr(self, "index", None) is not None:
            # not closed here, where nobody holds the guard: the last one to close an index folds its log in
            _left_open.append(self.index)
