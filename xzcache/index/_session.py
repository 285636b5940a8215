"""The shared books of a cache directory, as one process holds them: locks, index, and its own lease of the bound.

`Books.section` is the only way to the index. It holds the guard, opens the index that is current, and notices when the
directory was removed or the index rebuilt meanwhile.
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
from functools import cache
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

_MOST_OWNERS: Final = 10_000
_PATIENCE: Final = 0.25
"""Seconds to wait for another program that has the index locked, with the guard held: once, then not for a while."""
_IMPATIENCE: Final = 10.0

_GUARD_OF_OLD: Final = "guard.lock"
_LOCKS_OF_OLD: Final = ("storing.lock", "door.lock", "owners.lock", *(f"keys-{i}.lock" for i in range(16)))
"""The lock files of version 0.1.0, which had one for each lock; a process of it that runs still has them open."""

_WRITTEN: Final = "written"
"""The directory of the notes that namespaces are being written."""
_NOTE: Final = re.compile(r"([0-9a-f]{16})-(\d+)-\d+")
_NOTES: Final = 1 << 60
"""The first byte of the lock file that stands for the notes of one process; the owners' bytes lie far below."""
_MOST_NOTES: Final = 16
_OF_GARBAGE: Final = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError)
"""What the use of a row raises whose values are not of their columns' kinds."""
_LONGEST_SYNC: Final = 5.0
"""Seconds that the end of a process waits for the disk."""


class WrittenNote(NamedTuple):
    """A note that a process has written through the cache to a namespace since the machine was started.

    What was invalidated for a write is not safe on the disk before the process signs off, but the source has the write.
    If the power goes in between, entries of the old values may come back, so everything of the namespace is dropped.

    Attributes
    ----------
    path : str
    boot : int
        The number of the boot in which the process wrote.
    number : int
        The byte of the lock file that is locked for as long as the process lives.
    """

    path: str
    boot: int
    number: int

    @property
    def is_of_this_boot(self) -> bool:
        return self.boot == _boot()

    def namespace(self) -> str:
        """The namespace; empty for all of them, as where the note is not whole."""
        with open(self.path, "rb") as file:
            name = file.read()
        text = name.decode(errors="replace")
        return text[:-1] if text.endswith("\n") else ""


def written_notes(meta: str) -> list[WrittenNote]:
    """The notes of all processes.

    Raises
    ------
    OSError
        They cannot be read, so nobody can tell whether the entries are true.
    """
    try:
        names = os.listdir(f"{meta}/{_WRITTEN}")
    except FileNotFoundError:
        return []
    found = [(name, match) for name in names if (match := _NOTE.fullmatch(name)) is not None]
    return [WrittenNote(f"{meta}/{_WRITTEN}/{name}", int(match[1], 16), int(match[2])) for name, match in found]


class Membership:
    """This process's part in a directory: open locks, an owner number, and the bytes it may still write.

    It has three descriptors: the file ``lock``, whose `flock` is the guard and whose bytes are the owners' locks; the
    file ``writes``, whose `flock` is the storing lock and whose bytes are the locks of keys; and the index. During a
    transaction SQLite has the journal open as well.

    Attributes
    ----------
    number : int
        The files of the locks and of the counters: what was counted in others says nothing.
    owner : int
        The number under which the index knows this process; its byte of the lock file is locked for life.
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
        self.number = os.fstat(self.guard.fd).st_ino << 64 | os.fstat(self.writes.fd).st_ino
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
        self._noting = threading.Lock()
        self._noted: dict[str, str] = {}
        self._note_number = 0
        self.is_writing = False
        status = os.fstat(self.guard.fd)
        self.identity = status.st_dev, status.st_ino
        """What tells this directory from another one that takes its place."""

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
        """Make another index the current one, for all who enter the guard from now on."""
        # a serial that nobody reached, as garbage might be, would make every index look old
        self._write(1, 0)
        self.note_boot()
        self._write(0, generation)

    def note_boot(self) -> None:
        """Write down that the index is known to be whole since the machine was started; under the guard."""
        self._write(3, _boot())

    def was_restarted(self) -> bool:
        """Whether the machine was started anew since: a part of what was written may not have got to the disk."""
        return bool(boot := _boot()) and self._read(3) != boot

    # -- the notes that namespaces are being written

    def is_noted(self, namespace: str) -> bool:
        """Whether `note_written` has nothing to do."""
        return namespace in self._noted or "" in self._noted or not _boot()

    def note_written(self, namespace: str) -> None:
        """Say, before the first write to a namespace, that it is being written, so that a loss of power is noticed.

        The note is on the disk when this returns. Where the platform does not tell one boot from the next, there is
        none.

        Raises
        ------
        OSError
            It could not be written.
        """
        if self.is_noted(namespace):
            return
        with self._noting:
            if self.is_noted(namespace):
                return
            if len(self._noted) >= _MOST_NOTES - 1:
                namespace = ""
            folder = f"{self.meta}/{_WRITTEN}"
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            # each process does this, as the one that made the directory may not have got that far
            for place in (self.meta, os.path.dirname(self.meta)):
                files.sync(place)
            while not self._note_number:
                number = _NOTES | secrets.randbits(48)
                if self.owners.try_lock(number):
                    self._note_number = number
            path = f"{folder}/{_boot():016x}-{self._note_number}-{len(self._noted)}"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                # what has no end of line is not whole, and stands for all namespaces
                os.write(fd, f"{namespace}\n".encode() if namespace else b"")
                os.fsync(fd)
            finally:
                os.close(fd)
            files.sync(folder)
            self._noted[namespace] = path

    def take_notes_back(self) -> None:
        """Make what was invalidated safe on the disk, then remove the notes that say it is not; after signing off.

        Where that takes long, it is left to a thread, and where it cannot be done, to the next process.
        """
        if self._noted:
            thread = threading.Thread(target=self._take_notes_back, name="xzcache-sync", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # the end of the process
                self._take_notes_back()
            else:
                thread.join(_LONGEST_SYNC)

    def _take_notes_back(self) -> None:
        with self._noting, suppress(OSError):
            files.sync_all(self.guard.fd)
            for path in self._noted.values():
                files.discard(path)
            self._noted.clear()

    def dead_notes(self) -> Iterator[WrittenNote]:
        """Notes of this boot whose processes are dead, each with its byte locked."""
        for note in written_notes(self.meta):
            if note.is_of_this_boot and note.number != self._note_number and self.owners.try_lock(note.number):
                try:
                    yield note
                finally:
                    self.owners.unlock(note.number)

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
        if generation != self.generation or generation == 0:
            self.leave_index()
        elif self.index is not None and self.index.is_logged:
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
        if index.serial() < self.read_serial():
            raise Damaged("the index has lost its last transactions")
        if self.was_restarted():
            # before this process takes a number that one of them had
            index.disown_lost()
        owner = self._take_number(index)
        try:
            # after the power went, the files of an owner may be there whose row was lost; its number is free again
            files.remove_tree(f"{self.meta}/tmp/{owner}")
            os.makedirs(f"{self.meta}/tmp/{owner}", mode=0o700)
            index.commit()
        except BaseException:
            self.owners.unlock(owner)
            raise
        self.owner, self._epoch = owner, self._read(2)

    def patiently(self, action: Callable[[], T]) -> T:
        """Do something that another program may keep from being done: wait for it once, then not for a while.

        Raises
        ------
        Busy
            It has the index locked.
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
        """Close the connection, which the next section opens again; under the guard, or where nobody can be in one."""
        index, self.index = self.index, None
        if index is not None:
            with suppress(sqlite3.Error):
                index.close()

    def leave_index(self) -> None:
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
                # whatever a file system says then, the descriptor is gone
                with suppress(OSError):
                    lock.close()

    def __del__(self) -> None:
        # other threads may still be using the locks of a directory that was left: they go with the last of them
        if hasattr(self, "_closed"):
            self.close_descriptors()
            self.disconnect()


def take_over(meta: str, timeout: float) -> None:
    """Bring a directory of version 0.1.0 to today's lock files, unless a process of that version uses it.

    Where its guard was, a directory keeps such processes out from then on: they serve what is cached, store nothing,
    and make what they write invisible by hand.

    Raises
    ------
    Unusable
        A process of that version uses the directory. Until it is gone, this one does as it would do.
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
    """With the guard of old held; killed at any point, it is done again from the beginning."""
    if not is_unlocked(f"{meta}/owners.lock"):
        raise Unusable(f"the cache directory {os.path.dirname(meta)} is in use by a process of version 0.1.0")
    numbers = os.pread(old, 24, 0).ljust(24, b"\0")
    new = open_lock_file(f"{meta}/lock")
    try:
        if any(numbers[:8]) or not any(os.pread(new, 8, 0)):
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
    """A number that is another one after each start of the machine; 0 where that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return int.from_bytes(blake2b(file.read(), digest_size=8).digest(), "little") or 1
    except OSError:
        return 0


# -- The session.

FORMAT: Final = 1
"""How entries lie, and how what is no longer true is made invisible by hand. (Who may lock what is another matter: see
`take_over`.)"""
_MOMENT: Final = 0.09
_inherited: Final[list[object]] = []
"""What must neither be used nor closed any more: a parent's connections, in a child of a fork that could not wait."""


class Books:
    """The index of one cache directory and the locks around it.

    Parameters
    ----------
    root : str
        The cache directory.
    timeout : float
        Seconds to wait for the guard.
    joined : callable
        What is called when this process has joined; must not wait.

    Attributes
    ----------
    checked : (int, int) or None
        Generation and serial number of the index whose totals this process knows to be right.
    when_refused, when_joined : callable
        Called when the directory turns out not to be this user's cache, and when it turns out to be.
    when_used : callable
        Called after each transaction.

    Notes
    -----
    Safe for threads and processes. Opens nothing before it is needed; a directory that was removed is made again at the
    next section, and a forked child starts anew.
    """

    def __init__(self, root: str, timeout: float, joined: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self.checked: tuple[int, int] | None = None
        self._joined = joined
        self.meta = f"{root}/{META}"
        self.timeout = timeout
        self.is_retired = False
        self.when_refused: Callable[[], None] = _nothing
        self.when_joined: Callable[[], None] = _nothing
        self._opening = threading.Lock()
        self._member: Membership | None = None
        self._forking: Membership | None = None
        self._inside = threading.local()
        self._stamps: bool | None = None
        self.when_used: Callable[[], None] = _nothing
        self.lost: set[tuple[int, int]] = set()
        """Which directories were at the path before, were taken away, and may come back."""
        self.writing: set[int] = set()
        """Ids of the writes that this process has begun at the source and not ended."""
        self._used = 0.0

    @property
    def was_just_used(self) -> bool:
        """Whether the index was used less than a moment ago."""
        return time.monotonic() - self._used < _MOMENT

    @property
    def current(self) -> Membership | None:
        """This process's membership, if it has joined already; never waits."""
        return self._member

    def member(self) -> Membership:
        """This process's membership, joining where it has none.

        Raises
        ------
        Unusable
            The directory cannot be made or written, or is of a newer format.
        """
        member = self._member
        if member is not None:
            return member
        if self.is_retired:
            raise Unusable(f"the cache directory {self.root} was taken away")
        with self._opening:
            if self._member is None:
                try:
                    self._member = self._join()
                except Foreign:
                    self.when_refused()
                    raise
                except OSError as error:
                    raise Unusable(f"the cache directory {self.root} cannot be used: {error}") from error
                self.when_joined()
                self._joined()
            return self._member

    def _join(self) -> Membership:
        found = self.read_note("format")
        # garbage is damage, and mended; a number is somebody who knows better
        if found and found.isdecimal() and found != str(FORMAT):
            raise Foreign(f"the cache directory {self.root} is of format {found}, this xzcache writes {FORMAT}")
        files.make_private(self.root)
        for name in ("tmp", "trash", "odd", "ranges", "made", "written"):
            # a link there leads to files that are not the cache's; what is behind it is left alone
            if not os.path.islink(self.meta) and os.path.islink(path := f"{self.meta}/{name}"):
                os.unlink(path)
        folders = [self.root, self.meta, *(f"{self.meta}/{name}" for name in ("tmp", "trash"))]
        for place in folders:
            if place != self.root:
                with suppress(FileExistsError):
                    os.mkdir(place, 0o700)
            # whoever else may write it could plant entries, or have files of others deleted
            if (why := files.unsafe(place)) is not None:
                raise Foreign(why)
        take_over(self.meta, self.timeout)
        member = Membership(self.meta, self.timeout)
        with member.guard:
            if self.read_note("format") != str(FORMAT):
                self.write_note("format", str(FORMAT))
        return member

    def node_id(self) -> str:
        """A uuid that is the same for all processes that share this directory, and for no others."""
        with self.guarded():
            if not self.read_note("node"):
                self.write_note("node", str(uuid.uuid4()))
            return self.read_note("node") or ""

    @property
    def has_stamps(self) -> bool:
        """Whether the file system can tell which files are ours."""
        return files.has_stamps(f"{self.meta}/lock")

    def note_made(self, namespace: str) -> None:
        """Remember, where files have no stamps, that a directory is of our making; under the guard only."""
        if self._stamps is None:
            self._stamps = self.has_stamps
        if not self._stamps and namespace and not os.path.exists(f"{self.root}/{namespace}"):
            files.make_directories(f"{self.meta}/made/{namespace}")

    def made_namespaces(self) -> list[str]:
        """The directories that `note_made` remembers."""
        with suppress(FileNotFoundError):
            return os.listdir(f"{self.meta}/made")
        return []

    def write_note(self, name: str, text: str) -> None:
        """Replace a small file; under the guard only."""
        path = f"{self.meta}/{name}"
        with open(path + ".new", "w", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
            file.write(text)
        os.replace(path + ".new", path)

    def read_note(self, name: str) -> str | None:
        """The contents of a small file, None where it is missing."""
        with suppress(OSError), open(f"{self.meta}/{name}", errors="replace") as file:
            return file.read().strip()
        return None

    @contextmanager
    def guarded(self, patience: float | None = None) -> Iterator[Membership]:
        """Hold the guard of the directory as it is now, without touching the index.

        Parameters
        ----------
        patience : float, optional
            Seconds to wait for it, instead of those of this object.
        """
        for _ in range(3):
            member = self.member()
            self._used = time.monotonic()
            with member.guard if patience is None else member.guard.within(patience):
                if self._member is member and member.guard.is_current():
                    yield member
                    return
                # this process left it meanwhile, or somebody removed the directory: start over
                self.abandon(member)
        raise Unusable(f"the cache directory {self.root} is removed again and again")

    @contextmanager
    def section(self, patience: float | None = None) -> Iterator[tuple[Membership, Index]]:
        """One transaction on the index, under the guard.

        Commits at the end; a caller that has to act between commit and the release of the guard commits by itself.

        Raises
        ------
        Busy, Damaged, NoRoom, Unusable
            The transaction did not happen.
        """
        if getattr(self._inside, "yes", False):
            raise CacheFault("a section within a section")
        with self.guarded(patience) as member:
            self._inside.yes = True
            index = None
            try:
                index = opened = member.open_index()
                member.patiently(lambda: opened.begin(0))
                yield member, index
                index.commit()
                member.note_serial(index)
            except BaseException as error:
                if index is not None:
                    with suppress(sqlite3.Error):
                        index.rollback()
                    index.forget_uncommitted()
                if isinstance(error, sqlite3.Error):
                    if not is_locked(error):
                        # a new connection looks at the files anew
                        member.disconnect()
                    raise _blamed(translated(error), member) from error
                if isinstance(error, _OF_GARBAGE) and index is not None and _is_damaged(index):
                    member.disconnect()
                    raise _blamed(Damaged("the rows of the index make no sense"), member) from error
                _blamed(error, member)
                raise
            finally:
                self._inside.yes = False
                self.when_used()

    @contextmanager
    def storing(self) -> Iterator[Membership]:
        """Keep a rebuild away while space is taken from the lease, written to and accounted for.

        Raises
        ------
        Busy
            A rebuild goes on for too long.
        """
        for _ in range(3):
            member = self._present()
            if not member.storing.share(self.timeout):
                raise Busy("the index is being rebuilt")
            try:
                if self._member is not member:
                    # this process left the directory meanwhile
                    continue
                if member.owner == 0 or member.read_generation() != member.generation:
                    with self.section() as (current, _):
                        if current is not member:
                            raise Busy("the directory was removed meanwhile")
                member.see_revocations()
                yield member
                return
            finally:
                member.storing.leave()
        raise Busy(f"the cache directory {self.root} is left again and again")

    def is_stand_in(self) -> bool:
        """Whether the directory at the path is the one that this process uses, and not one that was away."""
        member = self._member
        try:
            return member is not None and member.identity not in self.lost and member.guard.is_current()
        except OSError:
            return False

    def abandon(self, member: Membership) -> None:
        """Let go of a directory that is no longer there."""
        if not member.is_deleted():
            self.lost.add(member.identity)
        with self._opening:
            if self._member is member:
                self._member = None
        member.leave_index()

    def close(
        self,
        last_words: Callable[[Index], None] | None = None,
        *,
        unless_writing: bool = False,
        owes: bool = False,
    ) -> bool:
        """Give the lease back and sign off, once nothing is being stored. The next use joins again.

        Parameters
        ----------
        last_words : callable, optional
            What is still to be told to the index.
        unless_writing : bool, optional
            Whether to stay if this process is writing at the source.
        owes : bool, optional
            Whether an invalidation is still to be done.

        Returns
        -------
        bool
            Whether this process has left.
        """
        member = self._member
        if member is None:
            return True
        is_done = False
        with member.storing.kept_out(self.timeout) as alone:
            with suppress(CacheFault, OSError):
                if alone and not self._sign_off(member, last_words, unless_writing=unless_writing):
                    return False
                is_done = alone and not member.is_writing
            # a process that could not sign off is taken for dead, and buried by the next one
            if self._member is member:
                self._member = None
        if is_done and not owes:
            member.take_notes_back()
        return True

    def note_written(self, namespace: str) -> None:
        """Say that a namespace is being written in this boot of the machine; see `Membership.note_written`."""
        member = self._member
        if member is None or not member.is_noted(namespace):
            self._present().note_written(namespace)

    def _present(self) -> Membership:
        """This process's membership in the directory that is at the path now, which may have been replaced."""
        member = self.member()
        if not member.guard.is_current():
            with self.guarded() as joined:
                member = joined
        return member

    def _sign_off(
        self, member: Membership, last_words: Callable[[Index], None] | None, *, unless_writing: bool
    ) -> bool:
        with member.guard:
            stays = False
            try:
                # only the guard tells whether there is a number to give back: a thread in a section may just take one;
                # and a directory that was removed is not made again to sign off from it
                if member.owner and member.guard.is_current():
                    self._give_number_back(member, last_words)
                    stays = member.is_writing and unless_writing
            except sqlite3.Error as error:
                raise translated(error) from error
            finally:
                if not stays:
                    # a thread that waits for this guard has to see that it is of the past
                    if self._member is member:
                        self._member = None
                    member.leave_index()
            return not stays

    def _give_number_back(self, member: Membership, last_words: Callable[[Index], None] | None) -> None:
        """Remove this process from the index, unless it is writing at the source; under the guard."""
        index = member.open_index()
        member.patiently(lambda: index.begin(0))
        try:
            if last_words is not None:
                last_words(index)
            # while this process writes at the source, the index says so on its behalf
            member.is_writing = bool(index.notes.writing_of(member.owner))
            if not member.is_writing:
                index.drop_owner(member.owner)
            index.commit()
        finally:
            index.rollback()
        member.note_serial(index)
        if not member.is_writing:
            with suppress(OSError):
                os.rmdir(f"{self.meta}/tmp/{member.owner}")
            if self.checked is not None and self.checked[0] == member.generation:
                self.checked = member.generation, index.serial()

    # -- fork

    def before_fork(self) -> None:
        """Wait until no thread is in a section, and keep it so: the child must not inherit half a transaction."""
        self._forking = self._member
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
        """Start anew: no lock of the parent's is released, and its connection is neither used nor closed."""
        for member in {self._member, self._forking} - {None}:
            assert member is not None
            if member.index is not None:
                _inherited.append(member.index)
                member.index = None
            member.close_descriptors()
        self._member = self._forking = None
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


def _blamed(error: BaseException, member: Membership) -> BaseException:
    """The same exception; damage says which index it was."""
    if isinstance(error, Damaged):
        error.generation = member.generation
    return error
