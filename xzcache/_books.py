"""The shared books of a cache directory, as one process holds them: locks, index, and its own lease of the bound.

`Books.section` is the only way to the index. It holds the guard, opens the index that is current, and notices when the
directory was removed or the index rebuilt meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from xzcache import _disk as disk
from xzcache import _files as files
from xzcache._errors import Busy, CacheFault, Damaged, Foreign, Unusable, translated
from xzcache._index import is_locked
from xzcache._keys import META
from xzcache._membership import Membership, take_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xzcache._index import Index

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
        disk.make_private(self.root)
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
            if (why := disk.unsafe(place)) is not None:
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


def _blamed(error: BaseException, member: Membership) -> BaseException:
    """The same exception; damage says which index it was."""
    if isinstance(error, Damaged):
        error.generation = member.generation
    return error
