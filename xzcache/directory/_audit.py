"""The audit of a cache directory: the index against the files, the files against their checksums, and leftovers.

Other processes may use the directory meanwhile. A suspected problem is checked again under the guard, where no entry is
being published or deleted, before it becomes a finding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache import files
from xzcache._config import shown_size
from xzcache.directory import _recovery as recovery
from xzcache.files import Whose, relative_path
from xzcache.model import META, Entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xzcache.directory._directory import CacheDirectory
    from xzcache.index import Index, Row


_BATCH: Final = 256
"""The rows or files of one transaction; other processes wait for the guard that long."""


class Finding(NamedTuple):
    """One problem that an audit found.

    Attributes
    ----------
    kind : str
        ``"index"`` (SQLite's own check finds damage), ``"totals"`` (a sum differs from its rows), ``"bound"`` (more
        bytes are counted than the bound allows), ``"missing"`` (an entry without its file), ``"damaged"`` (a file with
        other bytes than were stored), ``"orphan"`` (an entry file that the index does not count), ``"lease"``,
        ``"tombstone"``, ``"write"`` and ``"temporary"`` (left by a dead process), ``"unknown"`` (the file system
        did not answer).
    where : str
        The path below the cache directory, or the name of the checked item.
    detail : str
        A short description of the problem.
    """

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit of a cache directory.

    Attributes
    ----------
    root : str
        The cache directory.
    entries, size : int
        The number of intact entries, and the bytes of their files.
    findings : tuple of Finding
        The problems when the audit began.
    repaired : bool
        Whether a second audit, after the repair, found no problem.
    """

    root: str
    entries: int = 0
    size: int = 0
    findings: tuple[Finding, ...] = ()
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """Whether there was no problem, or all problems were repaired."""
        return self.repaired or not self.findings

    def __str__(self) -> str:
        head = f"{self.root}: {self.entries:,} entries, {shown_size(self.size)}"
        if not self.findings:
            return f"{head}: nothing is wrong"
        state = "repaired" if self.repaired else "not repaired"
        return "\n".join([f"{head}: {len(self.findings)} findings, {state}", *map(str, self.findings)])


def audit(directory: CacheDirectory, *, repair: bool) -> Audit:
    """Audit a directory and, with `repair`, repair it; raises `CacheFault` or `OSError` if it is unusable."""
    if not directory.is_made:
        # an audit creates no directory
        return Audit(directory.root)
    with_rebuild = directory.barrier.with_rebuild
    first = with_rebuild(lambda: _Pass(directory))
    report = Audit(directory.root, first.entries, first.size, tuple(first.findings))
    if not repair or not first.findings:
        return report
    with_rebuild(lambda: _repair(directory, first))
    second = with_rebuild(lambda: _Pass(directory))
    return Audit(directory.root, second.entries, second.size, report.findings, repaired=not second.findings)


class _Pass:
    """One audit pass; `rows` have missing or damaged files, and `orphans` are paths of files that no row counts."""

    def __init__(self, directory: CacheDirectory) -> None:
        self._root = directory.root
        self._session = directory.session
        self.findings: list[Finding] = []
        self.rows: list[Row] = []
        self.orphans: list[str] = []
        self.entries = 0
        self.size = 0
        self._check_leftovers()
        self._check_index()
        self._check_rows()
        self._check_files()

    def _add(self, kind: str, where: str, detail: str) -> None:
        self.findings.append(Finding(kind, where, detail))

    # -- leftovers of dead processes

    def _check_leftovers(self) -> None:
        meta = self._session.meta
        with self._session.section() as (process, index):
            dead = []
            for owner in index.owners():
                # a process whose number can be locked is dead; the lock is only a look
                if owner != process.owner and process.owners.try_lock(owner):
                    process.owners.unlock(owner)
                    dead.append(owner)
                    if lease := index.lease_of(owner):
                        self._add("lease", f"owner {owner}", f"{lease} bytes are leased to a process that is gone")
                    for _, key, _ in index.tables.writing_of(owner):
                        self._add("write", key, "a process that is gone was writing it")
            left = index.unowned_tombstones() + index.orphaned_tombstones()
            for item in left + [item for owner in dead for item in index.tombstones_of(owner)]:
                where = relative_path(item.entry, hashed=item.hashed)
                self._add("tombstone", where, f"{item.size} bytes could not be given back yet")
            for key in index.tables.writings_of_nobody():
                self._add("write", key, "a process that has left was writing it")
            known = index.tombstone_ids()
            for name in _names(f"{meta}/trash"):
                if not name.isdecimal() or int(name) not in known:
                    self._add("temporary", f"{META}/trash/{name}", "no tombstone speaks of it")
            alive = {str(owner) for owner in index.owners() if owner not in dead}
            for name in _names(f"{meta}/tmp"):
                if name not in alive and not name.startswith(recovery.UNDONE):
                    self._add("temporary", f"{META}/tmp/{name}", "its process is gone")

    # -- the index by itself

    def _check_index(self) -> None:
        with self._session.section() as (_, index):
            for problem in index.problems():
                self._add("index", "index", problem)
            for name, says, true in index.wrong_totals():
                self._add("totals", name, f"{says} is written down, the rows come to {true}")
            room = index.totals().room
            if room is not None and room < 0:
                self._add("bound", "bytes", f"{-room} more than the bound are counted")

    # -- from the rows to the files

    def _check_rows(self) -> None:
        after = 0
        while True:
            with self._session.section() as (_, index):
                rows = index.rows_after(after, _BATCH)
            if not rows:
                return
            after = rows[-1].id
            # read outside of the guard, which would be held for as long as the disk needs
            suspected = [row for row in rows if self._fault_of(row) is not None]
            if suspected:
                with self._session.section() as (_, index):
                    self._recheck(index, suspected)

    def _recheck(self, index: Index, rows: Iterable[Row]) -> None:
        for row in rows:
            current = index.find(row.entry)
            if current is not None and current.id == row.id and (fault := self._fault_of(row)) is not None:
                self._add(fault[0], relative_path(row.entry, hashed=row.hashed), fault[1])
                self.rows.append(row)

    def _fault_of(self, row: Row) -> tuple[str, str] | None:
        """The problem with the file of a row, as kind and detail; intact files are counted."""
        path = f"{self._root}/{relative_path(row.entry, hashed=row.hashed)}"
        faults: list[BaseException] = []
        try:
            opened = files.open_file(path, faults.append)
            if opened is None:
                return "missing", f"{row.size} bytes are counted for no file"
            try:
                stamp, _ = files.stamp_of_open(opened.fd)
                data = files.read(opened.fd, 0, opened.size)
            finally:
                opened.close()
        except (IsADirectoryError, NotADirectoryError):
            return "missing", "something else lies in its place"
        except OSError as error:
            return "unknown", str(error)
        if data is None or opened.size != row.size or files.checksum(data) != row.crc:
            return "damaged", f"{opened.size} bytes that are not the {row.size} that were stored"
        if stamp is None and self._session.has_stamps:
            return "damaged", "its stamp is gone"
        if stamp is not None:
            # the stamp of a file that does not lie at its own key names the key as well
            named = stamp.entry if row.hashed or not row.entry.is_whole else row.entry
            if stamp.digest != row.entry.digest() or named != row.entry:
                return "damaged", "its stamp is not that of the entry"
        if not opened.is_ours:
            return "damaged", "it belongs to another user"
        self.entries += 1
        self.size += opened.size
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
        """Entry files on the disk, each with the entry that its path or stamp names."""
        for path in files.walk(self._root):
            entry = Entry(os.path.relpath(path, self._root).replace(os.sep, "/"))
            try:
                if files.look(path, entry) in (Whose.OURS, Whose.DISOWNED):
                    yield path, entry
            except OSError as error:
                self._add("unknown", entry.key, str(error))
        for place in ("odd", "ranges"):
            for path in files.walk(f"{self._session.meta}/{place}"):
                # only the cache writes here, so a file that does not name its entry is an orphan
                stamp = files.read_stamp(path)
                yield path, stamp.entry if stamp is not None and stamp.key else Entry("")

    def _check_orphans(self, batch: list[tuple[str, Entry]]) -> None:
        with self._session.section() as (_, index):
            for path, entry in batch:
                row = index.find(entry)
                lies_right = row is not None and path == f"{self._root}/{relative_path(entry, hashed=row.hashed)}"
                # a tombstone speaks of the file if a deletion is not finished yet
                if not lies_right and os.path.lexists(path) and not index.has_tombstone(entry):
                    self._add("orphan", os.path.relpath(path, self._root), "an entry file that no row counts")
                    self.orphans.append(path)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _repair(directory: CacheDirectory, found: _Pass) -> None:
    """Repair the findings of an audit: broken entries are removed, and the source still has them."""
    session, space = directory.session, directory.space
    # first the work of dead processes, so that only real damage is left
    recovery.recover(session)
    with session.section() as (_, index):
        index.tables.drop_writings_of_nobody()
        index.mend_totals()
    for start in range(0, len(found.rows), _BATCH):
        with session.section() as (process, index):
            # an entry whose last use was updated meanwhile is still the same; one that was stored again has another id
            there = index.of_ids([row.id for row in found.rows[start : start + _BATCH]])
            tombstones = space.mark_deleted(process, index, list(there.values()))
        space.unlink_deleted(tombstones)
    for path in found.orphans:
        with session.section():
            # under the guard, where no publisher is about to give this file a row
            relative = os.path.relpath(path, session.root)
            files.discard(files.inside(session.root, relative))
            files.prune(path, session.root)
    space.enforce_bound()
