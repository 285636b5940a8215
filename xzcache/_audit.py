"""The audit of a cache directory: the index against the files, the files against their checksums, what was left over.

Other processes may use the directory meanwhile. What looks wrong is looked at a second time under the guard, where no
entry is on its way in or out, before it becomes a finding.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache import _files as files
from xzcache import _opened as opening
from xzcache import _recovery as recovery
from xzcache._keys import META, Entry, relative_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xzcache._directory import CacheDirectory
    from xzcache._index import Index
    from xzcache._schema import Row

_BATCH: Final = 256
"""Rows that are read, or files that are looked up, in one transaction: others wait for the guard that long."""


class Finding(NamedTuple):
    """One thing that is not as it should be.

    Attributes
    ----------
    kind : str
        ``"index"`` (SQLite's own check), ``"totals"`` (a sum differs from its rows), ``"bound"`` (more is counted than
        the bound allows), ``"missing"`` (an entry without its file), ``"damaged"`` (a file that is not what was
        stored), ``"orphan"`` (an entry file that the index does not count), ``"lease"``, ``"tombstone"``,
        ``"temporary"`` (left behind by a process that is gone), ``"unknown"`` (the file system did not let us look).
    where : str
        The path below the cache directory, or the name of the table.
    detail : str
        What is wrong, in a few words.
    """

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit of a cache directory found.

    Attributes
    ----------
    root : str
        The cache directory.
    entries, size : int
        Entries that were looked at, and the bytes of their files.
    findings : tuple of Finding
        What was wrong when the audit began; empty where all is well.
    repaired : bool
        Whether the findings were mended: by a second audit that found nothing after `repair`.
    """

    root: str
    entries: int = 0
    size: int = 0
    findings: tuple[Finding, ...] = field(default=())
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong, or all of it was mended."""
        return self.repaired or not self.findings

    def __str__(self) -> str:
        head = f"{self.root}: {self.entries} entries, {self.size} bytes"
        if not self.findings:
            return f"{head}: nothing is wrong"
        tail = "mended" if self.repaired else "not mended"
        return "\n".join([f"{head}: {len(self.findings)} findings, {tail}", *map(str, self.findings)])


def audit(directory: CacheDirectory, *, repair: bool) -> Audit:
    """Audit a directory; with `repair`, mend what is found.

    Raises
    ------
    CacheFault, OSError
        The directory cannot be used at all.
    """
    if not os.path.isdir(directory.books.meta):
        # an audit makes no directory
        return Audit(directory.root)
    first = directory.keeper.insist(lambda: _Pass(directory).run())
    if not repair or not first.findings:
        return first
    directory.keeper.insist(lambda: _mend(directory, first.findings))
    second = directory.keeper.insist(lambda: _Pass(directory).run())
    return Audit(first.root, first.entries, first.size, first.findings, repaired=not second.findings)


class _Pass:
    """One look at everything."""

    def __init__(self, directory: CacheDirectory) -> None:
        self._root = directory.root
        self._books = directory.books
        self._found: list[Finding] = []
        self._entries = 0
        self._size = 0

    def run(self) -> Audit:
        self._check_index()
        self._check_rows()
        self._check_files()
        self._check_leftovers()
        return Audit(self._root, self._entries, self._size, tuple(self._found))

    def _add(self, kind: str, where: str, detail: str) -> None:
        self._found.append(Finding(kind, where, detail))

    # -- the index by itself

    def _check_index(self) -> None:
        with self._books.section() as (_, index):
            for problem in index.problems():
                self._add("index", "index", problem)
            for table, says, sums in index.wrong_totals():
                self._add("totals", table, f"{says} is written down, the rows come to {sums}")
            room = index.totals().room
            if room is not None and room < 0:
                self._add("bound", "total", f"{-room} bytes more than the bound are counted")

    # -- from the rows to the files

    def _check_rows(self) -> None:
        after = 0
        while rows := self._rows_after(after):
            after = rows[-1].id
            doubtful = [row for row in rows if self._fault_of(row) is not None]
            if doubtful:
                with self._books.section() as (_, index):
                    self._recheck(index, doubtful)

    def _rows_after(self, id_: int) -> list[Row]:
        with self._books.section() as (_, index):
            return index.rows_after(id_, _BATCH)

    def _recheck(self, index: Index, rows: Iterable[Row]) -> None:
        for row in rows:
            current = index.find(row.entry)
            if current is not None and current.id == row.id and (fault := self._fault_of(row)) is not None:
                self._add(fault[0], relative_path(row.entry, odd=row.odd), fault[1])

    def _fault_of(self, row: Row) -> tuple[str, str] | None:
        """What is wrong with the file of a row, as kind and detail; counts those that are right."""
        path = f"{self._root}/{relative_path(row.entry, odd=row.odd)}"
        try:
            opened = opening.open_file(path)
        except (IsADirectoryError, NotADirectoryError):
            return "missing", "something else lies in its place"
        except OSError as error:
            return "unknown", str(error)
        if opened is None:
            return "missing", f"{row.size} bytes are counted for no file"
        try:
            stamp = files.read_stamp(opened.fd)
            data = opening.read(opened.fd, 0, opened.size)
        except OSError as error:
            return "unknown", str(error)
        finally:
            os.close(opened.fd)
        if data is None or opened.size != row.size or files.checksum(data) != row.crc:
            return "damaged", f"{opened.size} bytes that are not the {row.size} that were stored"
        if stamp is not None and stamp.digest != row.entry.digest():
            return "damaged", "the file is another entry's"
        self._entries += 1
        self._size += opened.size
        return None

    # -- from the files to the rows

    def _check_files(self) -> None:
        batch: list[tuple[str, Entry]] = []
        for item in self._entry_files():
            batch.append(item)
            if len(batch) == _BATCH:
                self._check_orphans(batch)
                batch = []
        self._check_orphans(batch)

    def _entry_files(self) -> Iterator[tuple[str, Entry]]:
        """Files that the cache wrote, where entries lie, with the entry that each says it is."""
        for path in files.walk(self._root):
            key = os.path.relpath(path, self._root).replace(os.sep, "/")
            if files.ours(path, entry := Entry(key)):
                yield path, entry
        for place in ("odd", "ranges"):
            for path in files.walk(f"{self._books.meta}/{place}"):
                # only the cache writes here, so a file that does not say which entry it is is an orphan
                stamp = files.read_stamp(path)
                yield path, stamp.entry if stamp is not None and stamp.key else Entry("")

    def _check_orphans(self, batch: list[tuple[str, Entry]]) -> None:
        with self._books.section() as (_, index):
            for path, entry in batch:
                row = index.find(entry)
                lies_right = row is not None and path == f"{self._root}/{relative_path(entry, odd=row.odd)}"
                if not lies_right and os.path.lexists(path) and not index.is_dying(entry):
                    self._add("orphan", os.path.relpath(path, self._root), "an entry file that no row counts")

    # -- what dead processes left

    def _check_leftovers(self) -> None:
        meta = self._books.meta
        with self._books.section() as (member, index):
            owners = index.owners()
            dead = []
            for owner in owners:
                if owner != member.owner and member.owners.try_lock(owner):
                    member.owners.unlock(owner)
                    dead.append(owner)
                    if lease := index.lease_of(owner):
                        self._add("lease", f"owner {owner}", f"{lease} bytes are leased to a process that is gone")
            tombstones = index.dying_of_nobody() + [item for owner in dead for item in index.dying_of(owner)]
            for item in tombstones:
                where = relative_path(item.entry, odd=item.odd)
                self._add("tombstone", where, f"{item.size} bytes wait for a process that is gone")
            known = index.dying_ids()
            for name in _names(f"{meta}/trash"):
                if not name.isdecimal() or int(name) not in known:
                    self._add("temporary", f"{META}/trash/{name}", "no tombstone speaks of it")
            alive = {str(owner) for owner in owners if owner not in dead}
            for name in _names(f"{meta}/tmp"):
                if name not in alive:
                    self._add("temporary", f"{META}/tmp/{name}", "its process is gone")


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _mend(directory: CacheDirectory, findings: Iterable[Finding]) -> None:
    """Mend what an audit found: what is wrong leaves the cache, the source has it still."""
    books = directory.books
    recovery.recover(books)
    for finding in findings:
        with books.section() as (member, index):
            if finding.kind in ("missing", "damaged"):
                rows = index.at_place(finding.where)
                dying = directory.space.condemn(member, index, rows)
            else:
                dying = []
                if finding.kind == "orphan":
                    path = f"{books.root}/{finding.where}"
                    files.discard(path)
                    files.prune(path, books.root)
                elif finding.kind == "totals":
                    index.mend_totals()
                elif finding.kind == "temporary":
                    path = f"{books.root}/{finding.where}"
                    if os.path.isdir(path) and not os.path.islink(path):
                        shutil.rmtree(path)
                    else:
                        files.discard(path)
        directory.space.release(dying)
    directory.space.fit()
