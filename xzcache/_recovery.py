"""What the next process does for one that died, and what anyone does for an index that was damaged."""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
import shutil
import stat
from typing import TYPE_CHECKING, Final

from xzcache import _files as files
from xzcache._errors import Busy, CacheFault, is_trouble
from xzcache._index import Index
from xzcache._keys import END, Entry, prefix_slot, relative_path, write_slot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xzcache._books import Books
    from xzcache._membership import Membership
    from xzcache._schema import Dying

logger = logging.getLogger("xzcache")

_INDEX_FILE: Final = re.compile(r"index-(\d+)\.db(?:-journal|-wal|-shm)?")
_UNBOUNDED: Final = "none"
_EVERYTHING: Final = -1
_BATCH: Final = 500
_MANY: Final = 100_000
"""Entries whose sum takes so long (7 ms) that only a process which is alone with the directory adds them up."""


def recover(books: Books) -> None:
    """Finish or undo what dead processes were doing, and take their leases back.

    A process is dead when its byte of the owners' file can be locked: no pid is looked at, so pid namespaces and
    recycled numbers do not matter, and a stopped process counts as alive. Everything here may itself be killed and done
    again by the next.
    """
    with books.section() as (member, index):
        for owner in index.owners():
            if owner != member.owner and member.owners.try_lock(owner):
                try:
                    _forget_written(books, member, index, owner)
                    _bury_owner(books, index, owner)
                    index.commit()
                    index.begin()
                finally:
                    member.owners.unlock(owner)
                shutil.rmtree(f"{books.meta}/tmp/{owner}", ignore_errors=True)
        left = index.dying_of_nobody()
        finish(books, index, left)
        index.drop_dying(item.id for item in left)
        _sweep(books, member, index)
        if not member.is_checked:
            _check_sums(books, member, index)
        restarted = member.was_restarted()
    if restarted:
        _discard_orphans(books)
        with books.section() as (member, _):
            member.note_boot()


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


def _discard_orphans(books: Books) -> None:
    """Unlink entry files that the index does not know, or not as they are.

    What was written just before the machine stopped may have got to the disk in any order.
    """
    stamped = _stamped(books)
    while batch := list(itertools.islice(stamped, _BATCH)):
        with books.section() as (_, index):
            for path, entry, stamp, _ in batch:
                row = index.find(entry)
                if row is None or (row.size, row.crc) != (stamp.size, stamp.crc):
                    files.discard_ours(path, entry)


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
    """Forget what a process was writing at the source when it died: nobody knows how far it got."""
    for key, beneath in index.notes.writing_of(owner):
        member.writes.bump(prefix_slot(key) if beneath else write_slot(key))
        rows = index.beneath(key, _EVERYTHING) if beneath else index.of_key(key)
        for row in rows:
            files.discard_ours(f"{books.root}/{relative_path(row.entry, odd=row.odd)}", row.entry)
            index.remove(row.id)
    index.notes.drop_writings_of(owner)


def _bury_owner(books: Books, index: Index, owner: int) -> None:
    directory = f"{books.meta}/tmp/{owner}"
    for row in index.in_flight(owner, _numbers_in(directory)):
        # its row was committed, so the entry is whole: all that is missing is its name
        try:
            files.move(f"{directory}/{row.seq}", f"{books.root}/{relative_path(row.entry, odd=row.odd)}")
        except OSError:
            # something else has taken its place: the entry goes, and before its file does
            index.remove(row.id)
            index.commit()
            index.begin()
    files.empty(directory)
    dying = index.dying_of(owner)
    finish(books, index, dying)
    index.drop_dying(item.id for item in dying)
    index.drop_owner(owner)


def _numbers_in(directory: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(directory) if name.isdecimal()]
    except FileNotFoundError:
        return []


def finish(books: Books, index: Index, dying: Iterable[Dying]) -> None:
    """Unlink files whose rows are gone, wherever between the two their owner got to."""
    for item in dying:
        trash = f"{books.meta}/trash/{item.id}"
        if os.path.exists(trash):
            files.discard(trash)
        elif index.find(item.entry) is None:
            path = f"{books.root}/{relative_path(item.entry, odd=item.odd)}"
            # what is not ours at that path may have come later, from somebody else
            files.discard_ours(path, item.entry)
            files.prune(path, books.root)


def _sweep(books: Books, member: Membership, index: Index) -> None:
    """Remove directories of files in flight that no owner's row speaks of, and indexes of old."""
    for number in _generations(books):
        if number != member.generation:
            _remove_index(books, number)
    dying = index.dying_ids()
    for name in os.listdir(f"{books.meta}/trash"):
        if not name.isdecimal() or int(name) not in dying:
            files.discard(f"{books.meta}/trash/{name}")
    known = {str(owner) for owner in index.owners()}
    for name in os.listdir(f"{books.meta}/tmp"):
        if name not in known and (not name.isdecimal() or member.owners.try_lock(int(name))):
            shutil.rmtree(f"{books.meta}/tmp/{name}", ignore_errors=True)
            if name.isdecimal():
                member.owners.unlock(int(name))


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
        files.empty(f"{books.meta}/tmp")
        files.empty(f"{books.meta}/trash")
        if not books.has_stamps:
            _remove_unknowable(books)
        for path, entry, stamp, odd in _stamped(books):
            try:
                status = os.stat(path)
            except FileNotFoundError:
                # unlinked by hand while we walk
                continue
            if status.st_size == stamp.size and index.find(entry) is None:
                index.add(entry, odd=odd, size=stamp.size, crc=stamp.crc, used=status.st_mtime_ns, owner=0, seq=0)
            else:
                files.discard(path)
        _shrink(books, index)
        index.commit()
    finally:
        index.close()


def _remove_unknowable(books: Books) -> None:
    """Remove entries that no index knows any more, where files have no stamps to tell that they are ours.

    Ours are those in directories of our making that nobody but this user may read.
    """
    for name in books.made_namespaces():
        for path in files.walk(f"{books.root}/{name}"):
            if stat.S_IMODE(os.lstat(path).st_mode) == 0o600:
                files.discard(path)
                files.prune(path, books.root)
    files.empty(f"{books.meta}/made")


def _stamped(books: Books) -> Iterator[tuple[str, Entry, files.Stamp, bool]]:
    """Every file that bears our stamp and lies where that entry belongs."""
    for path in files.walk(books.root):
        stamp = files.read_stamp(path)
        entry = Entry(os.path.relpath(path, books.root).replace(os.sep, "/"), 0, END)
        if stamp is not None and stamp.digest == entry.digest():
            yield path, entry, stamp, False
    for place in ("odd", "ranges"):
        for path in files.walk(f"{books.meta}/{place}"):
            stamp = files.read_stamp(path)
            if stamp is None or path != f"{books.root}/{relative_path(stamp.entry, odd=place == 'odd')}":
                # nobody else puts files here
                files.discard(path)
            else:
                yield path, stamp.entry, stamp, place == "odd"


def _shrink(books: Books, index: Index) -> None:
    room = index.totals().room
    while room is not None and room < 0:
        for row in index.by_rank(256):
            files.discard(f"{books.root}/{relative_path(row.entry, odd=row.odd)}")
            index.remove(row.id)
            room += row.size
            if room >= 0:
                break
