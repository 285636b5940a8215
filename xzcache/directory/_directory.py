"""A cache directory, as every process on the machine shares it: the blocking whole, made of its parts.

Nothing here raises for the cache's own sake: trouble is counted, logged once, and answered with "not here" or "not
stored".
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from xzcache import _threads as pool
from xzcache import files
from xzcache._config import Unset
from xzcache.directory import _recovery as recovery
from xzcache.directory._absent import Absences
from xzcache.directory._faults import Keeper
from xzcache.directory._fetchlocks import Leaders
from xzcache.directory._invalidation import Doubts, Writes
from xzcache.directory._metadata import Arrays
from xzcache.directory._publish import Publisher
from xzcache.directory._space import Space
from xzcache.directory._writebehind import Background, departures
from xzcache.eviction import POLICIES, recency_for
from xzcache.files import LONG, Health, Quarantine, Reader
from xzcache.index import Books, Totals
from xzcache.model import META, Busy, CacheFault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from xzcache.directory._publish import Parcel
    from xzcache.index import Membership


P = ParamSpec("P")
T = TypeVar("T")

_PAUSE_AFTER_FAILURE: Final = 10.0
"""Seconds for which a directory that could not be opened is left alone by reads."""

_GLANCE: Final = 0.02
"""Seconds that somebody who only looks waits for the index."""
_PROBED: Final = 1 << 16
_PATIENCE_OF_A_PROBE: Final = 0.2
_users: Final = itertools.count()

_PAUSE_WHILE_IN_DOUBT: Final = 1.0
"""Seconds between attempts to make up for what could not be made invisible."""


class CacheDirectory:
    """One cache directory; each process has one object of it.

    Parameters
    ----------
    root : str
        The real path of the directory. Nothing is made before it is needed.
    max_size : int, None or UNSET
        The bound in bytes, None for none; UNSET keeps the one that the directory has.
    default_max_size : int or None
        The bound of a directory that is new.
    min_free : float or int
        What to leave free of the file system: a fraction or bytes.
    lock_timeout : float
        Seconds to wait for the lock of the index.
    policy : str
        Which entries leave first, as far as this process decides it.

    Attributes
    ----------
    reader, leaders, publisher, writes, absences, arrays, space
        The parts: what they do with the directory they do for all processes.
    """

    def __init__(
        self,
        root: str,
        *,
        max_size: int | Unset | None,
        default_max_size: int | None,
        min_free: float | int,
        lock_timeout: float,
        policy: str = "lru",
    ) -> None:
        self.root = root
        self._users: set[int] = set()
        self.books = Books(root, lock_timeout, self._see_whether_used)
        self.health = Health(root, self._probe, self._make_up)
        self.background = Background(self._publish_all, self._hangs)
        self._min_free = min_free
        self._policy = policy
        self._quarantine = Quarantine()
        self._start(max_size, default_max_size)

    def _start(self, max_size: int | Unset | None, default_max_size: int | None) -> None:
        self.recency = recency_for(POLICIES[self._policy]())
        self.keeper = Keeper(self.books, max_size, default_max_size, self.health)
        self.books.when_used = self.health.note_progress
        self.space = Space(self.books, self.recency, self._min_free)
        folds = files.folds_case(self.books.meta)
        before, self._quarantine = self._quarantine, Quarantine(self._quarantine)
        self.reader = Reader(self.keeper, folds=folds, quarantine=self._quarantine)
        self.books.when_refused, self.books.when_joined = self.reader.distrust_all, self.reader.trust_again
        self.leaders = Leaders(self.keeper)
        self.publisher = Publisher(self.keeper, self.space, folds=folds)
        self.doubts = Doubts(self.keeper, self.reader)
        self.writes = Writes(self.doubts, self.space, self.publisher)
        if before.held:
            self.writes.adopt(before.held)
        self.absences = Absences(self.keeper)
        self.arrays = Arrays(self.keeper, self.writes, self.doubts)
        self._seen: dict[str, tuple[Totals, tuple[int, int]]] = {}
        self._prepared: tuple[Membership | None, int | Unset | None] | None = None
        self._preparing = threading.Lock()
        self._prepare_after = 0.0
        self._is_trusted = False
        self._under_way: Future[bool] | None = None

    # -- the disk

    def _probe(self) -> None:
        """Do a little of everything on the disk."""
        try:
            os.stat(self.root)
            os.listdir(self.books.meta)
            fd = files.open_own(f"{self.books.meta}/lock")
        except FileNotFoundError:
            # there is no cache, which is no fault of the disk
            return
        try:
            os.fstat(fd)
            os.pread(fd, 64, 0)
        finally:
            os.close(fd)
        if (path := self.reader.slow_path) and os.path.lexists(path):
            # other files may be as well as ever
            with suppress(OSError), open(path, "rb", buffering=0, opener=files.open_own) as file:
                file.read(_PROBED)
        with self.books.section(_PATIENCE_OF_A_PROBE):
            pass

    def _make_up(self) -> bool:
        self._prepare_after = 0.0
        self.doubts.make_up()
        return not self.doubts.owes

    def _hangs(self, waited: bool = True) -> bool:
        """Whether a read goes on without the disk; asked when it has waited for long, or is about to wait."""
        if self.health.is_aside:
            return True
        if not waited or self.health.makes_progress:
            return False
        member = self.books.current
        if member is None or not member.waits_for_others(LONG):
            self.health.note_slow("nothing was heard from its disk for a second")
        return True

    async def promptly(self, otherwise: T, function: Callable[..., T], *args: object, patience: float = LONG) -> T:
        """Await a blocking function of a read; `otherwise` where the disk lets it hang, or is to be left alone."""
        if self.health.is_aside:
            return otherwise
        return await self._unless_it_hangs(otherwise, pool.submit(self._with_progress, function, args), patience)

    def _with_progress(self, function: Callable[..., T], args: tuple[object, ...]) -> T:
        try:
            return function(*args)
        finally:
            self.health.note_progress()

    async def _unless_it_hangs(self, otherwise: T, future: Future[T], patience: float = LONG) -> T:
        while True:
            try:
                return await asyncio.wait_for(pool.outcome(future), patience)
            except TimeoutError:
                if future.done():
                    # it was the function's own
                    return await pool.outcome(future)
                if self._hangs():
                    return otherwise
                patience = LONG

    async def to_the_end(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `promptly`, of what must not be left undone: what hangs is waited for, but others need not learn it."""
        future = pool.submit(function, *args, **kwargs)
        try:
            return await asyncio.wait_for(pool.outcome(future), LONG)
        except TimeoutError:
            if not future.done():
                self._hangs()
            return await pool.outcome(future)

    async def prepare_promptly(self) -> None:
        """As `prepare`, which goes on where it takes long: all who want it wait for the same."""
        if self.health.is_aside:
            self.health.tell_if_long()
            return
        if (future := self._under_way) is None or future.done():
            future = self._under_way = pool.submit(self.prepare)
        await self._unless_it_hangs(False, future)

    # -- who uses it

    def used_by(self, user: object) -> weakref.finalize[[int], object]:
        """Take note of a user: without any, this process leaves the directory. What ends the use, if nothing else does.

        Everything can be used without: the process joins, and leaves soon.
        """
        number = next(_users)
        self._users.add(number)
        end = weakref.finalize(user, self._end_use, number)
        # all directories are closed at exit
        end.atexit = False
        return end

    def _end_use(self, number: int) -> None:
        # a finalizer: it must neither wait nor take a lock
        self._users.discard(number)
        self._see_whether_used()

    def _see_whether_used(self) -> None:
        if not self._users:
            departures.add(self._leave)

    @property
    def is_used(self) -> bool:
        """Whether anything uses the directory, or this process has not left it yet."""
        return bool(self._users) or self.books.current is not None

    def _leave(self) -> bool:
        """Leave, if nothing uses the directory; False where it is about to be left."""
        if self._users:
            return True
        if self.books.current is None:
            # another process may do what this one could not
            self.doubts.leave_note()
            return True
        if self.health.is_aside or not self.background.is_idle or self.books.was_just_used:
            return False
        if self.doubts.owes:
            self.doubts.make_up()
        left = self._close(unless_writing=True)
        if not left and not self.books.writing:
            # the index speaks of writes that are over
            self.keeper.attempt(lambda: recovery.recover(self.books), None)
        return left

    def _publish_all(self, parcels: Sequence[Parcel]) -> None:
        self.publisher.publish_all(parcels)

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` has nothing to do; never waits."""
        return self._prepared is not None and self._prepared == (self.books.current, self.keeper.bound)

    @property
    def is_ready(self) -> bool:
        """As `is_prepared`; what a hit asks. Which keys are in doubt, the reader knows."""
        prepared = self._prepared
        return prepared is not None and prepared[0] is self.books.current and prepared[1] == self.keeper.bound

    @property
    def may_serve(self) -> bool:
        """Whether entries may be read by their paths, though this process may not have joined: no hit has to ask.

        Before somebody has seen to a loss of power, entries may be of before a write that the source has.
        """
        if not self._is_trusted:
            self._is_trusted = self.is_ready or not recovery.may_be_stale(self.books)
        return self._is_trusted

    @property
    def wants_preparing(self) -> bool:
        """Whether `prepare` is to be called before a read: after it failed, not for a while; never waits."""
        if self.health.is_aside:
            # what is wrong is told there
            return True
        return (not self.is_prepared or self.doubts.owes) and time.monotonic() >= self._prepare_after

    def prepare(self) -> bool:
        """Join the directory, clean up after dead processes and see to the bound; False where that cannot be done."""
        if self.health.is_aside:
            return False
        with self._preparing:
            if self.books.lost and not self.books.is_stand_in():
                # the directory that was away may be back
                self._prepared = None
            if not self.is_prepared and not self.keeper.attempt(self._prepare, False):
                self._prepare_after = time.monotonic() + _PAUSE_AFTER_FAILURE
                return False
            if self._quarantine.has_returned:
                self.writes.adopt(self._quarantine.take_returned())
            self.doubts.make_up()
            if self.doubts.owes:
                self._prepare_after = time.monotonic() + _PAUSE_WHILE_IN_DOUBT
            return True

    def _prepare(self) -> bool:
        bound = self.keeper.bound
        left = recovery.recover(self.books)
        self.writes.make_up_for_return()
        self.writes.adopt(left)
        self.keeper.apply_bound()
        self.space.fit()
        if not left and recovery.has_dead_notes(self.books):
            # that waits for the disk
            pool.spawn(self._settle_notes)
        self._prepared = self.books.current, bound
        return True

    def _settle_notes(self) -> None:
        self.keeper.attempt(lambda: recovery.settle_notes(self.books), None)

    def set_bound(self, max_size: int | None) -> None:
        """Ask for another bound, for all processes; a smaller one evicts at the next use."""
        if self.keeper.bound != max_size:
            self.keeper.bound = max_size
            self._prepare_after = 0.0
        if self.books.current is None:
            self.keeper.ask_again()

    def set_min_free(self, min_free: float | int) -> None:
        """Ask for another reserve of free disk, in this process."""
        self._min_free = self.space.min_free = min_free

    def set_policy(self, policy: str) -> None:
        """Ask for another policy, in this process: whoever makes room does so by its own."""
        if policy != self._policy:
            self._policy = policy
            self.recency.policy = POLICIES[policy]()

    def set_lock_timeout(self, seconds: float) -> None:
        """Ask for another time to wait for the lock of the index, in this process."""
        self.books.timeout = seconds
        if (member := self.books.current) is not None:
            member.guard.timeout = seconds

    def reopen(self) -> None:
        """Have a directory that was taken away be made again at its next use."""
        if self.books.is_retired:
            self.books.is_retired = False
            self._prepare_after = 0.0

    def flush(self) -> None:
        """Tell the index of the latest uses."""
        if self.books.is_retired:
            # taken away meanwhile: there is nobody to tell
            return
        # who has only read so far has not joined yet
        if self.recency and (self.books.current is not None or (self.wants_preparing and self.prepare())):
            self.keeper.attempt(self._flush, None)

    def _flush(self) -> None:
        with self.books.section() as (_, index):
            self.recency.tell(index)
            left = {item.entry.key for item in index.left_dying()}
        if left:
            self.writes.adopt(list(left))

    @property
    def is_made(self) -> bool:
        """Whether there is a cache to look at: what only looks makes none."""
        # even where this process has joined it may have been taken away since
        return os.path.isdir(self.books.meta)

    def totals(self) -> Totals:
        """What the directory holds; zeros where it is not there, or cannot be asked."""
        if not self.is_made:
            bound = self.keeper.bound
            return Totals(0, 0, 0, 0, self.keeper.default_bound if isinstance(bound, Unset) else bound)
        return self.keeper.attempt(self._totals, Totals(0, 0, 0, 0, None))

    def _totals(self) -> Totals:
        with self.books.section() as (_, index):
            return index.totals()

    def share(self, namespace: str) -> tuple[int, int]:
        """Number and bytes of the entries of one source."""
        if not self.is_made:
            return 0, 0
        return self.keeper.attempt(lambda: self._share(namespace), (0, 0))

    def _share(self, namespace: str) -> tuple[int, int]:
        with self.books.section() as (_, index):
            return index.share(namespace)

    def glance(self, namespace: str) -> tuple[Totals, tuple[int, int]]:
        """As `totals` and `share`, for show: as they were seen last, where they are not to be had at once."""
        if not self.is_made:
            return self.totals(), (0, 0)
        try:
            if self.health.is_aside:
                raise Busy("the disk is to be left alone")
            with self.books.section(_GLANCE) as (_, index):
                self._seen[namespace] = index.totals(), index.share(namespace)
        except Busy:
            pass
        except (CacheFault, OSError) as error:
            self.keeper.trouble(error)
        return self._seen.get(namespace, (Totals(0, 0, 0, 0, None), (0, 0)))

    def odd_keys(self, prefix: str) -> list[str]:
        """Keys beneath a prefix whose files do not lie at the key."""
        if not self.is_made:
            return []
        return self.keeper.attempt(lambda: self._odd_keys(prefix), [])

    def _odd_keys(self, prefix: str) -> list[str]:
        with self.books.section() as (_, index):
            return index.odd_keys(prefix)

    def close(self) -> None:
        """Finish what is being stored, note the latest uses, give the lease back. The next use joins again."""
        if not self.health.comes_back(LONG):
            # whoever comes next finds that this process is gone
            self.health.rest()
            return
        self.background.wait()
        if self.books.current is not None:
            # what was taken away and is back would be served by those who come after
            self.writes.adopt(self._quarantine.suspected)
            self.doubts.make_up()
        self._close()
        self.doubts.leave_note()

    def _close(self, *, unless_writing: bool = False) -> bool:
        last_words = self.recency.tell if self.recency else None
        left = self.books.close(last_words, unless_writing=unless_writing, owes=self.doubts.owes)
        if (prepared := self._prepared) is not None and prepared[0] is not self.books.current:
            self._prepared = None
        return left

    def remove_if_last(self) -> bool:
        """Leave, and take away what the cache made, if no other process uses it; whether it did."""
        return self.keeper.attempt(self._remove_if_last, False)

    def _remove_if_last(self) -> bool:
        self.background.wait()
        if not recovery.is_last_to_leave(self.books):
            # what is still open here joins again at its next use
            self.close()
            return False
        self.writes.drop_now("")
        # what still runs here must not make it again
        self.books.is_retired = True
        self.books.close()
        self._prepared = None
        with suppress(OSError):
            shutil.rmtree(files.inside(self.root, META))
        with suppress(OSError):
            # unless somebody keeps something else there
            os.rmdir(self.root)
        return True

    def after_fork_in_child(self) -> None:
        """Start anew, with the settings of the parent and nothing else of it."""
        self.books.after_fork_in_child()
        self.health = Health(self.root, self._probe, self._make_up)
        self.doubts.let_go_of_note()
        # the users are there in the child, too
        self._start(self.keeper.bound, self.keeper.default_bound)
