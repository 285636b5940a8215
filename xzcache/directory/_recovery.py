"""Recovery from dead processes, and rebuilding of a damaged index."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xzcache import files
from xzcache.files import Whose, is_plain, range_directory, relative_path
from xzcache.index import Index, Row, salvaged, write_counter, written_notes
from xzcache.model import END, META, Busy, CacheFault, Entry, is_expected_fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from xzcache.index import IndexSession, Registration, Tombstone


logger = logging.getLogger("xzcache.directory")

# other programs may have added a write-ahead log to the index: its files go with it
_INDEX_FILE: Final = re.compile(r"index-(\d+)\.db(?:-journal|-wal|-shm)?")
_UNBOUNDED: Final = "none"
_EVERYTHING: Final = -1
_AT_ONCE: Final = 256
"""Files that could not be removed before, and are tried again by one recovery."""
_BATCH: Final = 500
_UNSYNCED_NS: Final = 300 * 10**9
"""Nanoseconds after which written data is on the disk: ten times the default of Linux."""
_FEW: Final = 10_000
"""The number of entries whose sums take so little time (3 ms) that each process computes them when it joins."""

UNDONE: Final = "undone-"
"""The prefix of notes of pending invalidations, among the temporary files."""


def recover(session: IndexSession) -> list[str]:
    """Finish or undo the work of dead processes, and revoke their leases.

    A process is dead if its byte of the lock file can be locked. No pid is used, so pid namespaces and recycled pids do
    not matter, and a stopped process counts as alive. A recovery may itself be killed; the next one does it again.

    Returns the keys, and the prefixes with a trailing slash, of which a file may remain that must not be served. Files
    that cannot be removed or identified stay counted.
    """
    with session.section() as (process, index):
        restarted = has_crashed = process.was_restarted()
        for owner in index.owners():
            if owner != process.owner and process.owners.try_lock(owner):
                has_crashed = True
                try:
                    _invalidate_written(session, process, index, owner)
                    _finish_owner(session, index, owner)
                    # committed for each owner: the next recovery goes on where this one was killed
                    index.commit()
                    index.begin()
                    # if this process is killed before this, the next sweep removes the directory, which has no owner
                    _remove_tree(session, f"tmp/{owner}")
                except OSError as error:
                    # its row stays, and with it what is counted for it: the next recovery tries again
                    logger.debug("the work of process %d cannot be finished yet: %s", owner, error)
                    index.rollback()
                    index.begin()
                finally:
                    process.owners.unlock(owner)
        _invalidate_written(session, process, index, process.owner)
        process.end_unknown_writes(index)
        finish(session, index, index.orphaned_tombstones())
        # a few of them only, and drawn at random, so that files that cannot be removed do not hold up each recovery
        finish(session, index, index.unowned_tombstones(_AT_ONCE))
        left = _finish_notes(session, process, index)
        index.commit()
        index.begin()
        _sweep(session, process, index)
        left += [item.entry.key for item in index.unowned_tombstones()]
        if not process.is_checked:
            _check_sums(session, process, index, has_crashed=has_crashed)
    # outside of the section, because it reads every file of the cache
    _see_to_restart(session, restarted=restarted)
    return list(dict.fromkeys(left))


def _see_to_restart(session: IndexSession, *, restarted: bool) -> None:
    """Invalidate entries that may be stale since the machine was restarted."""
    # before the boot is written down: a recovery that is killed here must find the notes again
    old = [note for note in written_notes(session.meta) if not note.is_of_this_boot]
    for note in old:
        # another process may be doing the same
        with suppress(FileNotFoundError):
            _drop_namespace(session, note.namespace())
    # if a file could not be checked, the boot is not recorded, so that the next recovery checks again
    if not (old or restarted) or not _discard_torn(session):
        return
    with session.section() as (process, _):
        process.write_boot()
        fd = process.guard.fd
    if old:
        # otherwise another loss of power could bring back the entries, but not the notes
        files.sync_all(fd)
        for note in old:
            files.discard(note.path)


def _drop_namespace(session: IndexSession, namespace: str) -> None:
    """Drop everything of a namespace, or of all namespaces: some entries may be older than a write at the source."""
    logger.info("invalidating all entries of %s, which was written when the power failed", namespace or "any source")
    with session.section() as (process, index):
        # before the rows go: what another process fetched before must not be stored after them
        process.writes.increment_beneath(namespace)
        index.tables.drop_nodes(namespace)
        index.tables.drop_absent_beneath(namespace)
    is_last = False
    while not is_last:
        with session.section() as (_, index):
            rows = index.beneath(namespace, _BATCH)
            is_last = not rows
            tombstones = []
            for row in rows:
                index.remove(row.id)
                tombstones.append(index.add_tombstone(row, 0))
            index.commit()
            index.begin()
            finish(session, index, tombstones)


def has_dead_notes(session: IndexSession) -> bool:
    """Whether there are notes for `remove_dead_notes`."""
    return any(session.process().dead_notes())


def remove_dead_notes(session: IndexSession) -> None:
    """Remove the notes of processes that were killed in this boot, after a sync of their invalidations."""
    process = session.process()
    dead = list(process.dead_notes())
    if dead:
        files.sync_all(process.guard.fd)
        for note in dead:
            files.discard(note.path)


def may_be_stale(session: IndexSession) -> bool:
    """Whether entries may be older than a write at the source, because a loss of power was not handled yet."""
    try:
        return not all(note.is_of_this_boot for note in written_notes(session.meta))
    except OSError as error:
        # a missing directory, or one of another user, has no entries to serve
        return error.errno not in (errno.ENOTDIR, errno.EACCES)


def _check_sums(session: IndexSession, process: Registration, index: Index, *, has_crashed: bool) -> None:
    """Check the bound; also the totals, if the cache is small or this is the only process after a crash."""
    bound = index.totals().max_size
    # the bound in the file survives the loss of an index, so it is the one that counts
    if (remembered := _remembered_bound(session, bound)) != bound:
        index.set_max_size(remembered)
    if (index.last_entry() <= _FEW or (has_crashed and index.owners() == [process.owner])) and index.mend_totals():
        logger.warning("the totals of the cache in %s were wrong and have been corrected", session.root)
    process.is_checked = True


def _discard_torn(session: IndexSession) -> bool:
    """Remove inconsistent files and rows after a restart of the machine; False if that must be tried again.

    Data that was written just before the machine stopped may have reached the disk in any order, and in part.
    """
    stamped, complete, newest = _stamped(session), True, 0
    while batch := list(itertools.islice(stamped, _BATCH)):
        with session.section() as (_, index):
            for path, entry, stamp, _ in batch:
                row = index.find(entry)
                try:
                    if row is None or stamp is None or (row.size, row.crc) != (stamp.size, stamp.crc):
                        files.discard_ours(path, entry)
                    else:
                        # files that were written long before the latest one have reached the disk, so only
                        # the later ones are read in full
                        newest = max(newest, os.lstat(path).st_mtime_ns)
                except FileNotFoundError:
                    pass
                except OSError:
                    complete = False
    after = 0
    while True:
        with session.section() as (_, index):
            rows = index.rows_after(after, _BATCH)
        if not rows:
            return complete
        after = rows[-1].id
        if torn := [row for row in rows if _is_torn(session, row, newest - _UNSYNCED_NS)]:
            with session.section() as (_, index):
                tombstones = []
                for row in torn:
                    # another process may have deleted or replaced the entry since the rows were read
                    current = index.find(row.entry)
                    if current is not None and current.id == row.id:
                        index.remove(row.id)
                        tombstones.append(index.add_tombstone(row, 0))
                index.commit()
                index.begin()
                finish(session, index, tombstones)


def _is_torn(session: IndexSession, row: Row, since: int) -> bool:
    """Whether a row has no file of its size, or one that was written after `since` with another checksum."""
    path = f"{session.root}/{relative_path(row.entry, hashed=row.hashed)}"
    try:
        status = os.lstat(path)
        if status.st_size != row.size or not stat.S_ISREG(status.st_mode):
            return True
        if status.st_mtime_ns < since:
            return False
        with open(path, "rb") as file:
            return files.checksum(file.read()) != row.crc
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        # unknown: a read verifies the file
        return False


def is_last_to_leave(session: IndexSession) -> bool:
    """Record that this process leaves; returns whether all others have left, announced to leave, or died.

    No process is the last one during a write at the source: another that makes the directory anew would not know of it.
    """
    with session.section() as (process, index):
        index.announce_leaving(process.owner)
        if session.writing:
            return False
        for owner in index.staying_owners():
            if not process.owners.try_lock(owner):
                return False
            process.owners.unlock(owner)
    return True


def _invalidate_written(session: IndexSession, process: Registration, index: Index, owner: int) -> None:
    """Invalidate the keys that a process was writing when it died, because the state of the source is unknown.

    For this process, these are writes that have ended, but whose rows could not be deleted.
    """
    for id_, key, beneath in index.tables.writing_of(owner):
        # the others are still under way in this process
        if id_ not in session.writing:
            _invalidate(session, process, index, key, beneath=beneath)
            index.tables.drop_writings([id_])


def _invalidate(session: IndexSession, process: Registration, index: Index, key: str, *, beneath: bool) -> None:
    """Forget a key, or all keys beneath it: rows first, then names, then bytes."""
    logger.debug("invalidated %s%s: its writer died or could not finish", key, "/" if beneath else "")
    if beneath:
        process.writes.increment_beneath(key)
    else:
        process.writes.increment(write_counter(key))
    tombstones = []
    for row in index.beneath(key, _EVERYTHING) if beneath else index.of_key(key):
        index.remove(row.id)
        # without an owner, so that any recovery may finish it
        tombstones.append(index.add_tombstone(row, 0))
    index.commit()
    index.begin()
    finish(session, index, tombstones)


def _finish_notes(session: IndexSession, process: Registration, index: Index) -> list[str]:
    """Finish the pending invalidations that dead processes noted; returns the names that remain."""
    left: list[str] = []
    with suppress(OSError):
        for name in os.listdir(files.inside(session.root, f"{META}/tmp/.").removesuffix("/.")):
            if name.startswith(UNDONE):
                left += _finish_note(session, process, index, f"{session.meta}/tmp/{name}")
    return left


def _finish_note(session: IndexSession, process: Registration, index: Index, path: str) -> list[str]:
    names: list[str] = []
    with suppress(OSError), open(path, "r+b", opener=files.open_own) as note:
        for line in note.read().decode(errors="replace").splitlines():
            with suppress(ValueError):
                # the last line may be half a line: then its write has not begun
                names.append(str(json.loads(line)))
        try:
            # the lock, not the age of the note, tells whether its writer lives
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # its writer lives and retries, but the file may still be there: this process must not serve it
            return [name for name in names if not _is_gone(session, index, name)]
        for name in dict.fromkeys(names):
            _invalidate(session, process, index, name.rstrip("/"), beneath=name.endswith("/"))
        left = [name for name in names if not _is_gone(session, index, name)]
        if not left:
            files.discard(path)
        return left
    return names


def _is_gone(session: IndexSession, index: Index, name: str) -> bool:
    """Remove files of a key, or beneath a prefix, that have no row; returns whether none is left."""
    try:
        if not name.endswith("/"):
            if not index.knows(name):
                clear_paths(session, index, name, index.unowned_tombstones())
            return True
        if name != "/" and not is_plain(name.rstrip("/")):
            return True
        for path in files.walk(files.inside(session.root, name).rstrip("/")):
            key = os.path.relpath(path, session.root).replace(os.sep, "/")
            if not index.knows(key):
                clear_paths(session, index, key, index.unowned_tombstones())
    except OSError:
        return False
    return True


def _finish_owner(session: IndexSession, index: Index, owner: int) -> None:
    directory = files.inside(session.root, f"{META}/tmp/{owner}/.").removesuffix("/.")
    for row in index.in_flight(owner, _numbers_in(directory)):
        # the row is committed, so the entry is complete and only its name is missing
        try:
            relative = relative_path(row.entry, hashed=row.hashed)
            files.move(f"{directory}/{row.seq}", files.inside(session.root, relative))
        except OSError:
            # the path is taken: delete the row first, then the file, which stays counted
            index.remove(row.id)
            index.change_lease(owner, row.size)
            index.commit()
            index.begin()
    # before the row of the owner goes: its lease counts the temporary files
    files.empty(directory)
    finish(session, index, index.tombstones_of(owner))
    index.drop_owner(owner)


def _numbers_in(directory: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(directory) if name.isdecimal()]
    except FileNotFoundError:
        return []


def finish(session: IndexSession, index: Index, tombstones: Iterable[Tombstone]) -> None:
    """Unlink the files of tombstones, at any step where their owner stopped, and free their bytes.

    A file that cannot be unlinked or identified stays counted, without an owner.
    """
    done, left = [], []
    for item in tombstones:
        try:
            row = index.find(item.entry)
            # a file of another entry may lie at the path by now; it has a row then
            # the process may have died before or after the file was moved to the trash
            if not _unlink(session, f"{META}/trash/{item.id}") and (row is None or row.hashed != item.hashed):
                _unlink_ours(session, item.entry, hashed=item.hashed, unmarked=True)
            done.append(item.id)
        except OSError as error:
            logger.debug("the file of a deleted entry cannot be removed yet: %s", error)
            left.append(item.id)
    index.drop_tombstones(done)
    index.disown_tombstones(left)


def clear_paths(session: IndexSession, index: Index, key: str, unowned: Sequence[Tombstone]) -> None:
    """Unlink files of a key without a row, leftovers of a failure or a crash; raises `OSError` if one may remain.

    `unowned` are the tombstones without an owner.
    """
    tombstones = [item for item in unowned if item.entry.key == key]
    unmarked = {item.entry for item in tombstones}
    for entry, hashed in _places(session, key):
        _unlink_ours(session, entry, hashed=hashed, unmarked=entry in unmarked)
    if tombstones:
        index.drop_tombstones(item.id for item in tombstones)


def _places(session: IndexSession, key: str) -> Iterator[tuple[Entry, bool]]:
    """Where files of a key may lie."""
    if is_plain(key):
        yield Entry(key), False
    yield Entry(key), True
    try:
        names = os.listdir(f"{session.root}/{range_directory(key)}")
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        start, _, stop = name.partition("_")
        with suppress(ValueError):
            yield Entry(key, int(start), int(stop)), False


def _unlink_ours(session: IndexSession, entry: Entry, *, hashed: bool, unmarked: bool) -> None:
    """Unlink the file of an entry; `unmarked` tells that the index identifies it."""
    relative = relative_path(entry, hashed=hashed)
    if not files.exists(f"{session.root}/{relative}"):
        return
    path = files.inside(session.root, relative)
    # a foreign file at that path may have come later
    found = files.discard_ours(path, entry)
    if found is Whose.UNMARKED and unmarked:
        files.discard(path)
    files.prune(path, session.root)


def _unlink(session: IndexSession, relative: str) -> bool:
    """Unlink a file in the directory; returns whether it existed."""
    try:
        os.unlink(files.inside(session.root, relative))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _remove_tree(session: IndexSession, name: str) -> None:
    files.remove_tree(files.inside(session.root, f"{META}/{name}"))


def _sweep(session: IndexSession, process: Registration, index: Index) -> None:
    """Remove temporary directories without an owner, and old indexes.

    The next sweep retries those that cannot be removed.
    """
    # a process that still has an old index open notices that under the guard, and opens the new one
    for number in _generations(session):
        if number != process.generation:
            _remove_index(session, number)
    tombstones = index.tombstone_ids()
    for name in _listed(session, "trash"):
        if not name.isdecimal() or int(name) not in tombstones:
            with suppress(OSError):
                _unlink(session, f"{META}/trash/{name}")
    known = {str(owner) for owner in index.owners()}
    for name in _listed(session, "tmp"):
        if name not in known and not name.startswith(UNDONE):
            # its process lives, and does not know yet that the index was rebuilt
            if name.isdecimal() and not process.owners.try_lock(int(name)):
                continue
            with suppress(OSError):
                _remove_tree(session, f"tmp/{name}")
            if name.isdecimal():
                process.owners.unlock(int(name))


def _listed(session: IndexSession, name: str) -> list[str]:
    """Names in a directory of the cache; none if it is a link."""
    with suppress(OSError):
        return os.listdir(files.inside(session.root, f"{META}/{name}/.").removesuffix("/."))
    return []


def rebuild(session: IndexSession, damaged: int, max_size: int | None) -> bool:
    """Make a new index from the entry files, unless another process has done so.

    `damaged` is the generation of the damaged index; `max_size` is the bound of a directory without a recorded bound.
    Returns whether this process did it. Raises `Busy` if another process is writing an entry for too long, perhaps
    because it is stopped.
    """
    # first under the guard alone: usually another process has done it already
    with session.guarded() as process:
        if process.read_generation() != damaged:
            return False
    # no process may store meanwhile: a file that gets its name after the walk below would never be counted
    if not process.storing.exclude(session.timeout):
        raise Busy("an entry is being written, so the index cannot be rebuilt now")
    try:
        with session.guarded() as current:
            if current is not process or process.read_generation() != damaged:
                return False
            old = _generations(session)
            # random, not counted: a process that still has a deleted index open must not mistake the new one for it
            generation = secrets.randbits(48) | 1
            bound = _remembered_bound(session, max_size)
            try:
                _build(session, process, generation, bound)
                remember_bound(session, bound)
            except BaseException as error:
                _remove_index(session, generation)
                if is_expected_fault(error):
                    raise CacheFault(f"the index of {session.root} cannot be rebuilt: {error}") from error
                raise
            # the new index becomes valid in one write, after it is complete: a crash before it leaves the old number
            process.begin_generation(generation)
            for number in old:
                _remove_index(session, number)
            return True
    finally:
        process.storing.readmit()


def remember_bound(session: IndexSession, max_size: int | None) -> None:
    """Write the bound to a file that outlives the index; under the guard only."""
    session.write_note("max_size", _UNBOUNDED if max_size is None else str(max_size))


def _remembered_bound(session: IndexSession, max_size: int | None) -> int | None:
    note = session.read_note("max_size")
    if note == _UNBOUNDED:
        return None
    return int(note) if note and note.isdecimal() else max_size


def _generations(session: IndexSession) -> set[int]:
    return {int(m[1]) for name in os.listdir(session.meta) if (m := _INDEX_FILE.fullmatch(name))}


def _remove_index(session: IndexSession, generation: int) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        path = f"{session.meta}/index-{generation}.db{suffix}"
        try:
            os.unlink(path)
        except OSError:
            # a directory at this path can only be garbage
            shutil.rmtree(path, ignore_errors=True)


def _build(session: IndexSession, process: Registration, generation: int, max_size: int | None) -> None:
    # new owners get numbers above all that are in use, because a process keeps the lock of its old
    # number until it sees the new index
    last = max([0, process.owner, *_numbers_in(f"{session.meta}/tmp")])
    pins = salvaged(process.index_path(process.read_generation()))
    index = Index(process.index_path(generation), create=True)
    try:
        index.begin()
        index.number_from("owner", last)
        # a process that has not seen the new index may still free tombstones of the old one
        index.number_from("dying", secrets.randbits(40))
        index.set_max_size(max_size)
        if process.writing or process.has_unknown_writes(generation):
            # until each of these processes has recorded its writes in this index, or has died
            index.tables.add_unknown_writes()
        for name in _listed(session, "tmp"):
            # a note of pending invalidations does not depend on the lost index
            if not name.startswith(UNDONE):
                _remove_tree(session, f"tmp/{name}")
        # the new index has no tombstones of these files, and no process serves them
        files.empty(files.inside(session.root, f"{META}/trash/.").removesuffix("/."))
        if not session.has_stamps:
            _remove_unknowable(session)
        for path, entry, stamp, hashed in _stamped(session):
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                # unlinked by an invalidation without the index
                continue
            if stamp is not None and status.st_size == stamp.size and index.find(entry) is None:
                # the time of modification stands for the last use, which only the lost index had
                index.add(entry, hashed=hashed, size=stamp.size, crc=stamp.crc, used=status.st_mtime_ns, owner=0, seq=0)
            else:
                _discard_or_count(session, index, entry, hashed=hashed, size=status.st_size, certain=stamp is not None)
        index.pins.restore(pins)
        _shrink(session, index)
        index.commit()
    finally:
        index.close()


def _discard_or_count(
    session: IndexSession, index: Index, entry: Entry, *, hashed: bool, size: int, certain: bool
) -> None:
    """Unlink a file without a row; if that fails, or is not `certain` to be right, add a tombstone."""
    try:
        if certain:
            _unlink(session, relative_path(entry, hashed=hashed))
            return
    except OSError as error:
        logger.debug("a file cannot be removed yet: %s", error)
    index.add_tombstone(Row(0, entry, hashed, size, 0, 0, 0, 0, 0, 0), 0)


def _remove_unknowable(session: IndexSession) -> None:
    """Remove entries without an index, on file systems without stamps.

    They are the private files in directories that the cache created.
    """
    for name in session.made_namespaces():
        for path in files.walk(files.inside(session.root, f"{name}/.").removesuffix("/.")):
            if stat.S_IMODE(os.lstat(path).st_mode) == 0o600:
                files.discard(path)
                files.prune(path, session.root)
    _remove_tree(session, "made")


def _stamped(session: IndexSession) -> Iterator[tuple[str, Entry, files.Stamp | None, bool]]:
    """All entry files at the right paths; without a stamp if a file cannot be identified."""
    for path in files.walk(session.root):
        entry = Entry(os.path.relpath(path, session.root).replace(os.sep, "/"), 0, END)
        try:
            found = files.look(path, entry)
        except OSError:
            yield path, entry, None, False
            continue
        # it was deleted before, and could not be unlinked then
        if found is Whose.DISOWNED:
            _unlink(session, entry.key)
        elif found is Whose.OURS:
            yield path, entry, files.read_stamp(path), False
    for place in ("odd", "ranges"):
        for path in files.walk(files.inside(session.root, f"{META}/{place}/.").removesuffix("/.")):
            stamp = files.read_stamp(path)
            lies_right = (
                stamp is not None and path == f"{session.root}/{relative_path(stamp.entry, hashed=place == 'odd')}"
            )
            if stamp is None or not lies_right or stamp.digest == files.OF_NOBODY:
                # only the cache writes here
                files.discard(path)
            else:
                yield path, stamp.entry, stamp, place == "odd"


def _shrink(session: IndexSession, index: Index) -> None:
    room = index.totals().room
    while room is not None and room < 0:
        for row in index.by_rank(256):
            index.remove(row.id)
            before = index.totals().tombstones
            _discard_or_count(session, index, row.entry, hashed=row.hashed, size=row.size, certain=True)
            # a file that could not be unlinked gets a tombstone, and its bytes stay counted
            room += row.size - (index.totals().tombstones - before)
            if room >= 0:
                break
