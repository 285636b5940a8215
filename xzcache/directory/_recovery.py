"""What the next process does for one that died, and what anyone does for an index that was damaged."""

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
from xzcache.index import Index, Row, prefix_slot, write_slot, written_notes
from xzcache.model import END, META, Busy, CacheFault, Entry, is_trouble

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xzcache.index import Books, Dying, Membership


logger = logging.getLogger("xzcache")

_INDEX_FILE: Final = re.compile(r"index-(\d+)\.db(?:-journal|-wal|-shm)?")
_UNBOUNDED: Final = "none"
_EVERYTHING: Final = -1
_AT_ONCE: Final = 256
"""Files that could not be removed before, and are tried again by one recovery."""
_BATCH: Final = 500
_UNSYNCED_NS: Final = 300 * 10**9
"""Nanoseconds after which what was written is on the disk: ten times what Linux takes by default."""
_MANY: Final = 100_000
"""Entries whose sum takes so long (7 ms) that only a process which is alone with the directory adds them up."""

UNDONE: Final = "undone-"
"""How the names of notes about what is still to be done begin, in the directory of files in flight."""


def recover(books: Books) -> list[str]:
    """Finish or undo what dead processes were doing, and take their leases back.

    A process is dead when its byte of the owners' file can be locked: no pid is looked at, so pid namespaces and
    recycled numbers do not matter, and a stopped process counts as alive. Everything here may itself be killed and done
    again by the next.

    Returns
    -------
    list of str
        Keys, and prefixes that end in a slash, of which a file may be left that must not be served. What cannot be
        removed, or cannot be told apart, stays counted, and keeps nothing else from being done.
    """
    with books.section() as (member, index):
        for owner in index.owners():
            if owner != member.owner and member.owners.try_lock(owner):
                try:
                    _forget_written(books, member, index, owner)
                    _bury_owner(books, index, owner)
                    index.commit()
                    index.begin()
                    _remove_tree(books, f"tmp/{owner}")
                except OSError as error:
                    logger.debug("what process %d left cannot be finished yet: %s", owner, error)
                    index.rollback()
                    index.begin()
                finally:
                    member.owners.unlock(owner)
        _forget_written(books, member, index, member.owner)
        finish(books, index, index.dying_of_nobody())
        finish(books, index, index.left_dying(_AT_ONCE))
        left = _finish_notes(books, member, index)
        index.commit()
        index.begin()
        _sweep(books, member, index)
        left += [item.entry.key for item in index.left_dying()]
        if not member.is_checked:
            _check_sums(books, member, index)
        restarted = member.was_restarted()
    _see_to_restart(books, restarted=restarted)
    return list(dict.fromkeys(left))


def _see_to_restart(books: Books, *, restarted: bool) -> None:
    """Drop what may not be true any more since the machine was started anew."""
    old = [note for note in written_notes(books.meta) if not note.is_of_this_boot]
    for note in old:
        # another process may be doing the same
        with suppress(FileNotFoundError):
            _drop_namespace(books, note.namespace())
    if not (old or restarted) or not _discard_torn(books):
        return
    with books.section() as (member, _):
        member.note_boot()
        fd = member.guard.fd
    if old:
        # else the power could go again, and bring back what was dropped, but not the notes
        files.sync_all(fd)
        for note in old:
            files.discard(note.path)


def _drop_namespace(books: Books, namespace: str) -> None:
    """Drop everything of a namespace, or of all: some of its entries may be of before a write that the source has."""
    logger.info("what is cached of %s is dropped: it was written when the power went", namespace or "any source")
    with books.section() as (member, index):
        member.writes.bump(prefix_slot(namespace))
        index.notes.drop_nodes(namespace)
        index.notes.drop_absent_beneath(namespace)
    is_last = False
    while not is_last:
        with books.section() as (_, index):
            rows = index.beneath(namespace, _BATCH)
            is_last = not rows
            dying = []
            for row in rows:
                index.remove(row.id)
                dying.append(index.add_dying(row, 0))
            index.commit()
            index.begin()
            finish(books, index, dying)


def has_dead_notes(books: Books) -> bool:
    """Whether there is something for `settle_notes` to do."""
    return any(books.member().dead_notes())


def settle_notes(books: Books) -> None:
    """Remove the notes of processes that were killed in this boot, after what they invalidated is safe on the disk."""
    member = books.member()
    dead = list(member.dead_notes())
    if dead:
        files.sync_all(member.guard.fd)
        for note in dead:
            files.discard(note.path)


def may_be_stale(books: Books) -> bool:
    """Whether entries may be of before a write that the source has, as nobody has seen to a loss of power yet."""
    try:
        return not all(note.is_of_this_boot for note in written_notes(books.meta))
    except OSError as error:
        # a directory that is not there, or is another's, has nothing that would be served
        return error.errno not in (errno.ENOTDIR, errno.EACCES)


def _check_sums(books: Books, member: Membership, index: Index) -> None:
    """Do not believe the index what it can be asked for: what the rows add up to, and the bound."""
    bound = index.totals().max_size
    if (remembered := _remembered_bound(books, bound)) != bound:
        index.set_max_size(remembered)
    state = member.generation, index.serial()
    if index.last_entry() <= _MANY or (books.checked != state and index.owners() == [member.owner]):
        if index.mend_totals():
            logger.warning("the totals of the cache in %s were wrong and are right now", books.root)
        books.checked = state
    member.is_checked = True


def _discard_torn(books: Books) -> bool:
    """Drop what does not hang together: files that the index does not know, or not as they are, and rows without files.

    What was written just before the machine stopped may have got to the disk in any order, and in part. Returns False
    where that is to be tried again.
    """
    stamped, complete, newest = _stamped(books), True, 0
    while batch := list(itertools.islice(stamped, _BATCH)):
        with books.section() as (_, index):
            for path, entry, stamp, _ in batch:
                row = index.find(entry)
                try:
                    if row is None or stamp is None or (row.size, row.crc) != (stamp.size, stamp.crc):
                        files.discard_ours(path, entry)
                    else:
                        newest = max(newest, os.lstat(path).st_mtime_ns)
                except FileNotFoundError:
                    pass
                except OSError:
                    complete = False
    after = 0
    while True:
        with books.section() as (_, index):
            rows = index.rows_after(after, _BATCH)
        if not rows:
            return complete
        after = rows[-1].id
        if torn := [row for row in rows if _is_torn(books, row, newest - _UNSYNCED_NS)]:
            with books.section() as (_, index):
                dying = []
                for row in torn:
                    current = index.find(row.entry)
                    if current is not None and current.id == row.id:
                        index.remove(row.id)
                        dying.append(index.add_dying(row, 0))
                index.commit()
                index.begin()
                finish(books, index, dying)


def _is_torn(books: Books, row: Row, since: int) -> bool:
    """Whether a row has no file of its size, or one that was written after `since` and is not what was stored."""
    path = f"{books.root}/{relative_path(row.entry, odd=row.odd)}"
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
        # nobody can tell, so a reader has to
        return False


def is_last_to_leave(books: Books) -> bool:
    """Say that this process is about to leave; whether every other one has left, said so, or died."""
    with books.section() as (member, index):
        index.announce_leaving(member.owner)
        for owner in index.staying_owners():
            if not member.owners.try_lock(owner):
                return False
            member.owners.unlock(owner)
    return True


def _forget_written(books: Books, member: Membership, index: Index, owner: int) -> None:
    """Forget what a process was writing at the source when it died: nobody knows how far it got.

    The rows of this process are those of writes that are over, whose end could not be told to the index.
    """
    for id_, key, beneath in index.notes.writing_of(owner):
        if id_ not in books.writing:
            _forget(books, member, index, key, beneath=beneath)
            index.notes.drop_writings([id_])


def _forget(books: Books, member: Membership, index: Index, key: str, *, beneath: bool) -> None:
    """Forget a key, or all keys beneath it: rows first, then names, then bytes."""
    member.writes.bump(prefix_slot(key) if beneath else write_slot(key))
    dying = []
    for row in index.beneath(key, _EVERYTHING) if beneath else index.of_key(key):
        index.remove(row.id)
        dying.append(index.add_dying(row, 0))
    index.commit()
    index.begin()
    finish(books, index, dying)


def _finish_notes(books: Books, member: Membership, index: Index) -> list[str]:
    """Do what processes wrote down that they could not do, and died; the names of what is still to be done."""
    left: list[str] = []
    with suppress(OSError):
        for name in os.listdir(files.inside(books.root, f"{META}/tmp/.").removesuffix("/.")):
            if name.startswith(UNDONE):
                left += _finish_note(books, member, index, f"{books.meta}/tmp/{name}")
    return left


def _finish_note(books: Books, member: Membership, index: Index, path: str) -> list[str]:
    names: list[str] = []
    with suppress(OSError), open(path, "r+b", opener=files.open_own) as note:
        for line in note.read().decode(errors="replace").splitlines():
            with suppress(ValueError):
                # the last line may be half a line: then its write has not begun
                names.append(str(json.loads(line)))
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # its writer lives and will do it, but perhaps could not remove a file: this process hears of it
            return [name for name in names if not _is_gone(books, index, name)]
        for name in dict.fromkeys(names):
            _forget(books, member, index, name.rstrip("/"), beneath=name.endswith("/"))
        left = [name for name in names if not _is_gone(books, index, name)]
        if not left:
            files.discard(path)
        return left
    return names


def _is_gone(books: Books, index: Index, name: str) -> bool:
    """Remove files of a key, or beneath a prefix, that have no row; whether there are none."""
    try:
        if not name.endswith("/"):
            if not index.knows(name):
                clear_paths(books, index, name)
            return True
        if name != "/" and not is_plain(name.rstrip("/")):
            return True
        for path in files.walk(files.inside(books.root, name).rstrip("/")):
            key = os.path.relpath(path, books.root).replace(os.sep, "/")
            if not index.knows(key):
                clear_paths(books, index, key)
    except OSError:
        return False
    return True


def _bury_owner(books: Books, index: Index, owner: int) -> None:
    directory = files.inside(books.root, f"{META}/tmp/{owner}/.").removesuffix("/.")
    for row in index.in_flight(owner, _numbers_in(directory)):
        # its row was committed, so the entry is whole: all that is missing is its name
        try:
            relative = relative_path(row.entry, odd=row.odd)
            files.move(f"{directory}/{row.seq}", files.inside(books.root, relative))
        except OSError:
            # something else has taken its place: the entry goes, and before its file does, which stays counted
            index.remove(row.id)
            index.change_lease(owner, row.size)
            index.commit()
            index.begin()
    files.empty(directory)
    finish(books, index, index.dying_of(owner))
    index.drop_owner(owner)


def _numbers_in(directory: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(directory) if name.isdecimal()]
    except FileNotFoundError:
        return []


def finish(books: Books, index: Index, dying: Iterable[Dying]) -> None:
    """Unlink files whose rows are gone, wherever between the two their owner got to, and give their bytes back.

    A file that cannot be unlinked, or of which cannot be told whose it is, stays counted as nobody's.
    """
    done, left = [], []
    for item in dying:
        try:
            row = index.find(item.entry)
            # a file of another entry may lie at the path by now; it has a row then
            if not _unlink(books, f"{META}/trash/{item.id}") and (row is None or row.odd != item.odd):
                _unlink_ours(books, item.entry, odd=item.odd, unmarked=True)
            done.append(item.id)
        except OSError as error:
            logger.debug("a file of an entry that has left cannot be removed yet: %s", error)
            left.append(item.id)
    index.drop_dying(done)
    index.disown_dying(left)


def clear_paths(books: Books, index: Index, key: str) -> None:
    """Unlink files of a key that has no row any more: what an earlier failure, or a crash, has left.

    Raises
    ------
    OSError
        One may still be there.
    """
    tombstones = [item for item in index.left_dying() if item.entry.key == key]
    unmarked = {item.entry for item in tombstones}
    for entry, odd in _places(books, key):
        _unlink_ours(books, entry, odd=odd, unmarked=entry in unmarked)
    if tombstones:
        index.drop_dying(item.id for item in tombstones)


def _places(books: Books, key: str) -> Iterator[tuple[Entry, bool]]:
    """Where files of a key may lie."""
    if is_plain(key):
        yield Entry(key), False
    yield Entry(key), True
    try:
        names = os.listdir(f"{books.root}/{range_directory(key)}")
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        start, _, stop = name.partition("_")
        with suppress(ValueError):
            yield Entry(key, int(start), int(stop)), False


def _unlink_ours(books: Books, entry: Entry, *, odd: bool, unmarked: bool) -> None:
    """Unlink what lies at the path of an entry, if it is ours; `unmarked` if the index says that it is."""
    relative = relative_path(entry, odd=odd)
    if not files.exists(f"{books.root}/{relative}"):
        return
    path = files.inside(books.root, relative)
    # what is not ours at that path may have come later, from somebody else
    found = files.discard_ours(path, entry)
    if found is Whose.UNMARKED and unmarked:
        files.discard(path)
    files.prune(path, books.root)


def _unlink(books: Books, relative: str) -> bool:
    """Unlink something in the directory; whether it was there."""
    try:
        os.unlink(files.inside(books.root, relative))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _remove_tree(books: Books, name: str) -> None:
    files.remove_tree(files.inside(books.root, f"{META}/{name}"))


def _sweep(books: Books, member: Membership, index: Index) -> None:
    """Remove directories of files in flight that no owner's row speaks of, and indexes of old.

    What cannot be removed is left to the next sweep.
    """
    for number in _generations(books):
        if number != member.generation:
            _remove_index(books, number)
    dying = index.dying_ids()
    for name in _listed(books, "trash"):
        if not name.isdecimal() or int(name) not in dying:
            with suppress(OSError):
                _unlink(books, f"{META}/trash/{name}")
    known = {str(owner) for owner in index.owners()}
    for name in _listed(books, "tmp"):
        if name not in known and not name.startswith(UNDONE):
            if name.isdecimal() and not member.owners.try_lock(int(name)):
                continue
            with suppress(OSError):
                _remove_tree(books, f"tmp/{name}")
            if name.isdecimal():
                member.owners.unlock(int(name))


def _listed(books: Books, name: str) -> list[str]:
    """Names in a directory of ours; none where a link has taken its place."""
    with suppress(OSError):
        return os.listdir(files.inside(books.root, f"{META}/{name}/.").removesuffix("/."))
    return []


def rebuild(books: Books, damaged: int, max_size: int | None) -> bool:
    """Make a new index from the entry files, unless another process has done so already.

    Parameters
    ----------
    books : Books
    damaged : int
        The generation that was found damaged.
    max_size : int or None
        The bound of a directory that does not remember its own.

    Returns
    -------
    bool
        Whether this process did it.

    Raises
    ------
    Busy
        A process that writes an entry did not finish in time (it may be stopped).
    """
    with books.guarded() as member:
        if member.read_generation() != damaged:
            return False
    if not member.storing.exclude(books.timeout):
        raise Busy("an entry is being written, so the index cannot be rebuilt now")
    try:
        with books.guarded() as current:
            if current is not member or member.read_generation() != damaged:
                return False
            old = _generations(books)
            # drawn, not counted: a process that holds an index whose files are all gone must not take this for its own
            generation = secrets.randbits(48) | 1
            bound = _remembered_bound(books, max_size)
            try:
                _build(books, member, generation, bound)
                remember_bound(books, bound)
            except BaseException as error:
                _remove_index(books, generation)
                if is_trouble(error):
                    raise CacheFault(f"the index of {books.root} cannot be rebuilt: {error}") from error
                raise
            member.begin_generation(generation)
            for number in old:
                _remove_index(books, number)
            return True
    finally:
        member.storing.readmit()


def remember_bound(books: Books, max_size: int | None) -> None:
    """Write the bound where it outlives the index; under the guard only."""
    books.write_note("max_size", _UNBOUNDED if max_size is None else str(max_size))


def _remembered_bound(books: Books, max_size: int | None) -> int | None:
    note = books.read_note("max_size")
    if note == _UNBOUNDED:
        return None
    return int(note) if note and note.isdecimal() else max_size


def _generations(books: Books) -> set[int]:
    return {int(m[1]) for name in os.listdir(books.meta) if (m := _INDEX_FILE.fullmatch(name))}


def _remove_index(books: Books, generation: int) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        path = f"{books.meta}/index-{generation}.db{suffix}"
        try:
            os.unlink(path)
        except OSError:
            # nobody else makes directories here
            shutil.rmtree(path, ignore_errors=True)


def _build(books: Books, member: Membership, generation: int, max_size: int | None) -> None:
    last = max([0, member.owner, *_numbers_in(f"{books.meta}/tmp")])
    index = Index(member.index_path(generation), create=True)
    try:
        index.begin()
        index.number_from("owner", last)
        # a process that does not know of this index yet may still settle what it condemned under another
        index.number_from("dying", secrets.randbits(40))
        index.set_max_size(max_size)
        for name in _listed(books, "tmp"):
            # a note of what is still to be done is not about the index that was lost
            if not name.startswith(UNDONE):
                _remove_tree(books, f"tmp/{name}")
        files.empty(files.inside(books.root, f"{META}/trash/.").removesuffix("/."))
        if not books.has_stamps:
            _remove_unknowable(books)
        for path, entry, stamp, odd in _stamped(books):
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                # unlinked by hand while we walk
                continue
            if stamp is not None and status.st_size == stamp.size and index.find(entry) is None:
                index.add(entry, odd=odd, size=stamp.size, crc=stamp.crc, used=status.st_mtime_ns, owner=0, seq=0)
            else:
                _discard_or_count(books, index, entry, odd=odd, size=status.st_size, certain=stamp is not None)
        _shrink(books, index)
        index.commit()
    finally:
        index.close()


def _discard_or_count(books: Books, index: Index, entry: Entry, *, odd: bool, size: int, certain: bool) -> None:
    """Unlink a file of ours that no row is to speak of; where that fails, or is not `certain`, a tombstone does."""
    try:
        if certain:
            _unlink(books, relative_path(entry, odd=odd))
            return
    except OSError as error:
        logger.debug("a file cannot be removed yet: %s", error)
    index.add_dying(Row(0, entry, odd, size, 0, 0, 0, 0, 0, 0), 0)


def _remove_unknowable(books: Books) -> None:
    """Remove entries that no index knows any more, where files have no stamps to tell that they are ours.

    Ours are those in directories of our making that nobody but this user may read.
    """
    for name in books.made_namespaces():
        for path in files.walk(files.inside(books.root, f"{name}/.").removesuffix("/.")):
            if stat.S_IMODE(os.lstat(path).st_mode) == 0o600:
                files.discard(path)
                files.prune(path, books.root)
    _remove_tree(books, "made")


def _stamped(books: Books) -> Iterator[tuple[str, Entry, files.Stamp | None, bool]]:
    """Every file that bears our stamp and lies where that entry belongs; or of which nobody can tell, without one."""
    for path in files.walk(books.root):
        entry = Entry(os.path.relpath(path, books.root).replace(os.sep, "/"), 0, END)
        try:
            found = files.look(path, entry)
        except OSError:
            yield path, entry, None, False
            continue
        if found is Whose.DISOWNED:
            _unlink(books, entry.key)
        elif found is Whose.OURS:
            yield path, entry, files.read_stamp(path), False
    for place in ("odd", "ranges"):
        for path in files.walk(files.inside(books.root, f"{META}/{place}/.").removesuffix("/.")):
            stamp = files.read_stamp(path)
            lies_right = stamp is not None and path == f"{books.root}/{relative_path(stamp.entry, odd=place == 'odd')}"
            if stamp is None or not lies_right or stamp.digest == files.OF_NOBODY:
                # nobody else puts files here
                files.discard(path)
            else:
                yield path, stamp.entry, stamp, place == "odd"


def _shrink(books: Books, index: Index) -> None:
    room = index.totals().room
    while room is not None and room < 0:
        for row in index.by_rank(256):
            index.remove(row.id)
            before = index.totals().dying
            _discard_or_count(books, index, row.entry, odd=row.odd, size=row.size, certain=True)
            room += row.size - (index.totals().dying - before)
            if room >= 0:
                break
