"""A cache directory that all processes of a machine share: the blocking parts, put together.

No method raises because the cache fails: faults are counted, logged once, and answered with "not cached" or "not
stored".
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import threading
import time
import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from xzcache import _threads as pool
from xzcache import files
from xzcache._config import UNSET, Unset, shown_bound, shown_size
from xzcache.directory import _recovery as recovery
from xzcache.directory._absent import NegativeCache
from xzcache.directory._faults import FaultBarrier
from xzcache.directory._fetchlocks import FetchLocks
from xzcache.directory._invalidation import Writes
from xzcache.directory._metadata import MetadataTracker
from xzcache.directory._pending import PendingInvalidations
from xzcache.directory._publish import MOST, Publisher
from xzcache.directory._space import Space
from xzcache.directory._statistics import Ledger
from xzcache.directory._writebehind import WriteBehind, departures
from xzcache.eviction import POLICIES, recency_for
from xzcache.files import LONG, Health, Quarantine, Reader
from xzcache.index import Counts, IndexSession, Totals
from xzcache.model import META, Busy, CacheFault, lock_offset

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from concurrent.futures import Future

    from xzcache.directory._publish import PendingEntry
    from xzcache.index import Index, Registration


logger = logging.getLogger("xzcache.directory")

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_PAUSE_AFTER_FAILURE: Final = 10.0
"""Seconds for which reads skip a directory that could not be opened."""

_GLANCE: Final = 0.02
"""Seconds that a display waits for the index."""
# a probe reads only so much of a file: a disk that answers at all has read these bytes long before `LONG`
_PROBED: Final = 1 << 16
# another process may hold the guard for good reasons: a probe tries the index, but does not wait for a turn
_PATIENCE_OF_A_PROBE: Final = 0.2
# `next` of a count and changes of a set are atomic, so a finalizer can end a use without a lock
_users: Final = itertools.count()
# other processes wait for the guard as long as one section takes
_WINDOW: Final = 512
"""The entries that one section of `evict_unused` looks at."""
_PINNED_AT_ONCE: Final = 128
_DELETED_AT_ONCE: Final = 16
"""Keys that are deleted at the source at once: each takes longer than one that is written."""

_PAUSE_WHILE_IN_DOUBT: Final = 1.0
"""Seconds between retries of pending invalidations."""


class CacheDirectory:
    """One cache directory; each process has one object for each directory.

    Parameters
    ----------
    root : str
        The real path of the directory, which is created at its first use.
    max_size : int, None or UNSET
        The bound in bytes, None for none; UNSET keeps the current bound of the directory.
    default_max_size : int or None
        The bound of a new directory.
    min_free : float or int
        The free space to leave on the file system: a fraction or bytes.
    lock_timeout : float
        Seconds to wait for the lock of the index.
    policy : str
        The eviction policy of this process.

    Attributes
    ----------
    reader, fetch_locks, publisher, writes, negative_cache, metadata, space
        The parts of the directory.
    """

    def __init__(
        self,
        root: str,
        *,
        max_size: int | Unset | None,
        default_max_size: int | None,
        min_free: float | int,
        lock_timeout: float,
        policy: str = "adaptive",
    ) -> None:
        self.root = root
        self._users: set[int] = set()
        self.session = IndexSession(root, lock_timeout, self._see_whether_used)
        self.health = Health(root, self._probe, self._retry_pending)
        self.write_behind = WriteBehind(self._publish_all, self._hangs)
        self._min_free = min_free
        self._policy = policy
        self._quarantine = Quarantine()
        self.ledger = Ledger()
        self._leading: dict[str, Registration] = {}
        self._start(max_size, default_max_size)

    def _start(self, max_size: int | Unset | None, default_max_size: int | None, *, only_raise: bool = False) -> None:
        self.recency = recency_for(POLICIES[self._policy]())
        self.recency.tell = self.ledger.tell
        self.barrier = FaultBarrier(self.session, max_size, default_max_size, self.health, only_raise=only_raise)
        self.session.when_used = self.health.record_progress
        self.space = Space(self.session, self.recency, self.ledger, self._min_free)
        folds = files.folds_case(self.session.meta)
        # A forked child must not serve what its parent must not serve. But it has none of the retries that would end
        # the quarantine, so it takes over the names below and retries them itself
        before, self._quarantine = self._quarantine, Quarantine(self._quarantine)
        self.reader = Reader(self.barrier, folds=folds, quarantine=self._quarantine)
        self.session.when_refused, self.session.when_joined = self.reader.quarantine_all, self.reader.lift_quarantine
        self.fetch_locks = FetchLocks(self.barrier)
        self.publisher = Publisher(self.barrier, self.space, folds=folds)
        self.pending = PendingInvalidations(self.barrier, self.reader)
        self.writes = Writes(self.pending, self.space, self.publisher)
        self.begun_writes = pool.Together(self.writes.begin_write, str, MOST)
        self.ended_writes = pool.Together(self.writes.end_writes, lambda ended: ended[0].key, MOST)
        self.begun_deletes = pool.Together(self.writes.begin_deletes, lambda wanted: wanted[0], _DELETED_AT_ONCE)
        self.ended_deletes = pool.Together(self.writes.end_deletes, lambda ended: ended.beneath.key, _DELETED_AT_ONCE)
        if before.held:
            self.writes.adopt(before.held)
        self.negative_cache = NegativeCache(self.barrier)
        self.metadata = MetadataTracker(self.barrier, self.writes, self.pending)
        self._seen: dict[str, tuple[Totals, tuple[int, int]]] = {}
        self._prepared: tuple[Registration | None, int | Unset | None] | None = None
        self._preparing = threading.Lock()
        self._prepare_after = 0.0
        self._is_trusted = False
        self._under_way: Future[bool] | None = None

    # -- the disk

    def _probe(self) -> None:
        """Try each kind of operation on the disk once; raises if one fails."""
        try:
            # each call below is one that a read would make: a disk that answers from the cached
            # directory may still hang at a file
            os.stat(self.root)
            os.listdir(self.session.meta)
            fd = files.open_own(f"{self.session.meta}/lock")
        except FileNotFoundError:
            # there is no cache, which is no fault of the disk
            return
        try:
            os.fstat(fd)
            os.pread(fd, 64, 0)
        finally:
            os.close(fd)
        if (path := self.reader.slow_path) and os.path.lexists(path):
            # a disk may hang at one file only, while all others can be read
            with suppress(OSError), open(path, "rb", buffering=0, opener=files.open_own) as file:
                file.read(_PROBED)
        # the index has blocks and locks of its own, which can hang while entry files do not
        with self.session.section(_PATIENCE_OF_A_PROBE):
            pass

    def _retry_pending(self) -> bool:
        self._prepare_after = 0.0
        self.pending.retry_pending()
        return not self.pending.has_pending

    def _hangs(self, waited: bool = True) -> bool:
        """Whether a read must go on without the disk; `waited` tells that the read has waited for long already."""
        if self.health.is_aside:
            return True
        if not waited or self.health.makes_progress:
            return False
        # a lock that another process holds explains the wait: then the read goes on without
        # the cache, but the disk is fine
        if not self.session.waits_for_others(LONG):
            self.health.record_slow("its disk has not answered for a second")
        return True

    async def promptly(self, otherwise: T, function: Callable[..., T], *args: object, patience: float = LONG) -> T:
        """Await a blocking function of a read; returns `otherwise` if the disk hangs or is put aside."""
        if self.health.is_aside:
            return otherwise
        return await self._unless_it_hangs(otherwise, pool.submit(self._with_progress, function, args), patience)

    def _with_progress(self, function: Callable[..., T], args: tuple[object, ...]) -> T:
        try:
            return function(*args)
        finally:
            self.health.record_progress()

    async def _unless_it_hangs(
        self, otherwise: T, future: Future[T], patience: float = LONG, longest: float = 0.0
    ) -> T:
        """The result of a future; `otherwise` if the disk hangs, or others keep a lock for longer than `longest`."""
        end = time.monotonic() + longest
        while True:
            try:
                return await asyncio.wait_for(pool.outcome(future), patience)
            except TimeoutError:
                if future.done():
                    # the function itself raised it: since Python 3.11 both exceptions are of one class
                    return await pool.outcome(future)
                if self._hangs() and (self.health.is_aside or time.monotonic() >= end):
                    return otherwise
                patience = LONG

    async def to_completion(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `promptly`, for work that must not be skipped: it is awaited even if the disk hangs."""
        return await self._completed(pool.submit(function, *args, **kwargs))

    async def completed_together(self, together: pool.Together[T, R], items: Sequence[T]) -> list[R]:
        """Like `to_completion`, for work that many tasks bring at once: one transaction does all that waits."""
        return await self._completed(together.submit(items), together.hurry) if items else []

    async def _completed(self, future: Future[T], hurry: Callable[[], object] | None = None) -> T:
        try:
            # an invalidation that is skipped would leave an old value to be served: it may be slow, but must end
            return await asyncio.wait_for(pool.outcome(future), LONG)
        except TimeoutError:
            if not future.done():
                self._hangs()
                if hurry is not None:
                    hurry()
            return await pool.outcome(future)

    async def prepare_promptly(self) -> None:
        """Like `prepare`, limited in time: concurrent callers wait for the same call."""
        if self.health.is_aside:
            self.health.log_if_long()
            return
        # one thread for all callers: if each waited in its own, a hanging disk would use up the pool
        if (future := self._under_way) is None or future.done():
            future = self._under_way = pool.submit(self.prepare)
        # where many processes join at once, each waits for the others, and what is read without the cache is not stored
        await self._unless_it_hangs(False, future, longest=self.session.timeout)

    # -- users

    def used_by(self, user: object) -> weakref.finalize[[int], object]:
        """Register a user of the directory; returns a function that ends the use.

        Without users, this process leaves the directory soon. Every method works without a user: the process joins for
        it.
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
        """Whether the directory has users, or this process has not left it yet."""
        return bool(self._users) or self.session.current is not None

    def _leave(self) -> bool:
        """Leave the directory if it has no users; False if that must be tried again."""
        if self._users:
            return True
        # there is no registration to end, and joining only to leave would create the directory again
        if self.session.current is None:
            self.pending.leave_note()
            return True
        if self.session.writing:
            # the end of the last write tries again; a write that the end of its event loop cut off has none
            return True
        if self.health.is_aside or not self.write_behind.is_idle or self.session.was_just_used:
            return False
        if self.pending.has_pending:
            self.pending.retry_pending()
        return self._close()

    def _publish_all(self, batch: Sequence[PendingEntry]) -> None:
        self.publisher.publish_all(batch)

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` has nothing to do; never waits."""
        return self._prepared is not None and self._prepared == (self.session.current, self.barrier.bound)

    @property
    def is_ready(self) -> bool:
        """Like `is_prepared`, for a hit: the reader checks for quarantined keys itself."""
        prepared = self._prepared
        return prepared is not None and prepared[0] is self.session.current and prepared[1] == self.barrier.bound

    @property
    def may_serve(self) -> bool:
        """Whether entries may be served before this process has joined.

        After a loss of power, until the recovery, entries may be older than a write that the source has.
        """
        if not self._is_trusted:
            self._is_trusted = self.is_ready or not recovery.may_be_stale(self.session)
        return self._is_trusted

    @property
    def wants_preparing(self) -> bool:
        """Whether a read must call `prepare` first; False for some seconds after it failed. Never waits."""
        if self.health.is_aside:
            # `prepare` logs the reason
            return True
        return (not self.is_ready or self.pending.has_pending) and time.monotonic() >= self._prepare_after

    def prepare(self) -> bool:
        """Join the directory, recover from dead processes and enforce the bound; False if that fails."""
        if self.health.is_aside:
            return False
        with self._preparing:
            if self.session.lost and not self.session.is_stand_in():
                # the directory that was away may be back
                self._prepared = None
            if not self.is_prepared and not self.barrier.try_or(self._prepare, False):
                self._prepare_after = time.monotonic() + _PAUSE_AFTER_FAILURE
                return False
            if self._quarantine.has_returned:
                self.writes.adopt(self._quarantine.take_returned())
            self.pending.retry_pending()
            if self.pending.has_pending:
                self._prepare_after = time.monotonic() + _PAUSE_WHILE_IN_DOUBT
            return True

    def _prepare(self) -> bool:
        bound = self.barrier.bound
        # before the bound is enforced: leases and tombstones of dead processes are room that needs no eviction
        left = recovery.recover(self.session)
        self.writes.invalidate_returned()
        self.writes.adopt(left)
        evictions = self.space.evictions
        before, freed = self._apply_bound()
        if freed and before is not UNSET:
            logger.warning(
                "max_size=%s lowers the bound of the cache in %s from %s: %d entries, %s, are evicted",
                shown_bound(self.barrier.bound),
                self.root,
                shown_bound(before),
                self.space.evictions - evictions,
                shown_size(freed),
            )
        if not left and recovery.has_dead_notes(self.session):
            # in a thread, because the sync of a busy disk can take seconds
            pool.spawn(self._remove_dead_notes)
        self._prepared = self.session.current, bound
        return True

    def _apply_bound(self) -> tuple[int | Unset | None, int]:
        """Apply the requested bound; returns the bound before, if it was lowered, and the bytes that were freed."""
        return self.barrier.apply_bound(), self.space.enforce_bound()

    def _remove_dead_notes(self) -> None:
        self.barrier.try_or(lambda: recovery.remove_dead_notes(self.session), None)

    def set_bound(self, max_size: int | None, *, only_raise: bool = False) -> None:
        """Ask for another bound, for all processes; a smaller one evicts at the next use.

        With `only_raise`, a bound that is smaller than that of the directory is logged, and not applied.
        """
        # both are reset, so that the next use applies the bound even if `prepare` has just failed
        if self.barrier.request_bound(max_size, only_raise=only_raise):
            self._prepare_after = 0.0
            self._prepared = None
        if self.session.current is None:
            self.barrier.reapply_bound()

    def change_bound(self, max_size: int | None) -> None:
        """Change the bound now, evicting what it leaves no room for; raises `CacheFault` or `OSError` if that fails."""
        self.barrier.request_bound(max_size)
        self.barrier.reapply_bound()
        self.barrier.with_rebuild(self._apply_bound)

    def clear(self, namespace: str) -> None:
        """Invalidate all entries of a namespace, or, with an empty one, of the cache.

        Raises `CacheFault` or `OSError` if that fails.
        """
        self.write_behind.wait()
        self._must(lambda: self.writes.drop_now(namespace))

    def evict_unused(self, since: int, namespace: str | None = None) -> tuple[int, int]:
        """Evict the entries whose last use was before a time, in ns since the epoch; returns their number and bytes.

        Raises `CacheFault` or `OSError` if that fails.
        """
        self.write_behind.wait()
        return self._must(lambda: self._evict_unused(since, namespace))

    def _evict_unused(self, since: int, namespace: str | None) -> tuple[int, int]:
        after, count, size = -1, 0, 0
        # one section for each window, so that other processes are not kept from the guard
        # while a large cache is scanned
        while True:
            with self.session.section() as (process, index):
                self.recency.flush_to(index)
                rows, end = index.unused_since(since, namespace, after, _WINDOW)
                if len(rows) > self.space.pace.count:
                    rows = rows[: self.space.pace.count]
                    end = rows[-1].id
                tombstones = self.space.mark_deleted(process, index, rows)
            self.space.unlink_deleted(tombstones)
            count, size = count + len(tombstones), size + sum(item.size for item in tombstones)
            if end < 0:
                return count, size
            after = end

    def pin(self, name: str, spans: Sequence[tuple[str, str]], until: int | None) -> None:
        """Pin spans of keys under a name, until a time in ns since the epoch: eviction passes over their entries.

        Raises `CacheFault` or `OSError` if that fails.
        """
        self.write_behind.wait()
        self._must(lambda: self._pin(name, spans, until))

    def _pin(self, name: str, spans: Sequence[tuple[str, str]], until: int | None) -> None:
        # first the rule, in a transaction of its own: a trigger pins what is stored from here
        # on, and the loop what was there
        with self.session.section() as (_, index):
            index.pins.add(name, spans, until)
        for low, high in spans:
            after: str | None = low
            while after is not None:
                with self.session.section() as (_, index):
                    after = index.pins.mark(after, high, _PINNED_AT_ONCE)

    def unpin(self, name: str | None) -> int:
        """End a pin, or all; returns how many there were. Raises `CacheFault` or `OSError` if that fails."""
        return self._must(lambda: self._unpin(name))

    def _unpin(self, name: str | None) -> int:
        with self.session.section() as (_, index):
            count = index.pins.end(name)
        more = True
        while more:
            with self.session.section() as (_, index):
                more = index.pins.release(_PINNED_AT_ONCE)
        return count

    def _must(self, action: Callable[[], T]) -> T:
        self.must_prepare()
        return self.barrier.with_rebuild(action)

    def must_prepare(self) -> None:
        """Like `prepare`, where a failure is the caller's to report; raises `CacheFault` or `OSError`."""
        if self.health.is_aside:
            raise Busy(f"the disk of {self.root} does not answer")
        self.reopen()
        with self._preparing:
            # no pause after a failure, as `prepare` makes: a caller that asked for this wants the error
            self.barrier.with_rebuild(lambda: self.is_prepared or self._prepare())

    def set_min_free(self, min_free: float | int) -> None:
        """Ask for another reserve of free disk, in this process."""
        self._min_free = self.space.min_free = min_free

    def set_policy(self, policy: str) -> None:
        """Set the eviction policy of this process."""
        if policy != self._policy:
            self._policy = policy
            self.recency.policy = POLICIES[policy]()

    def set_lock_timeout(self, seconds: float) -> None:
        """Ask for another time to wait for the lock of the index, in this process."""
        self.session.timeout = seconds
        if (process := self.session.current) is not None:
            process.guard.timeout = seconds

    def reopen(self) -> None:
        """Allow a directory that was removed by `remove_if_last` to be created again."""
        if self.session.is_retired:
            self.session.is_retired = False
            self._prepare_after = 0.0

    def flush(self, *, everything: bool = False) -> None:
        """Write the latest uses to the index; with `everything`, all counters too, so that the figures are exact."""
        if self.session.is_retired:
            # the directory was removed meanwhile, so there is no index
            return
        has_joined = self.session.current is not None
        # a process that has only served hits has not joined yet
        if (self.recency and (has_joined or (self.wants_preparing and self.prepare()))) or (
            everything and has_joined and self.ledger.has_news
        ):
            self.barrier.try_or(lambda: self._flush(everything=everything), None)

    def remember_process(self, name: str) -> None:
        """Keep the counts of this process in the index under this name, also after its end."""
        self.ledger.name = name

    @property
    def counted(self) -> Counts:
        """The counts that this process has reported to the index; all of them after `flush`."""
        return self.ledger.total

    def counted_by(self, names: Collection[str]) -> dict[str, Counts]:
        """The counts of processes that called `remember_process` with these names."""
        return self._looked_up(lambda index: index.statistics.processes(names), {})

    def counted_ever(self) -> Counts:
        """The counts of all processes, since there are statistics."""
        return self._looked_up(lambda index: index.statistics.ever(), Counts())

    def _looked_up(self, look: Callable[[Index], T], default: T) -> T:
        def within() -> T:
            with self.session.section() as (_, index):
                return look(index)

        return self.barrier.try_or(within, default) if self.is_made else default

    def leads(self, purpose: str) -> bool:
        """Whether this process is the leader for a purpose: the first one that asks.

        It stays the leader until it ends, leaves the directory, or resigns. Never waits.
        """
        process = self.session.current
        if process is None or self._leading.get(purpose) is process:
            return process is not None
        # a byte that stands for no object
        offset = lock_offset(f"{META}/{purpose}")
        if not self.barrier.try_or(lambda: process.keys.try_lock(offset), False):
            return False
        self._leading[purpose] = process
        return True

    def resign(self, purpose: str) -> None:
        """Leave a purpose to another process."""
        process = self._leading.pop(purpose, None)
        if process is not None and process is self.session.current:
            process.keys.unlock(lock_offset(f"{META}/{purpose}"))

    def _flush(self, *, everything: bool) -> None:
        with self.session.section() as (_, index):
            self.recency.flush_to(index, everything=everything)
            left = {item.entry.key for item in index.unowned_tombstones()}
        self.space.prepare_policy()
        # files that another process could not remove: this process must not serve them either
        if left:
            self.writes.adopt(list(left))

    @property
    def is_made(self) -> bool:
        """Whether there is a cache directory; calls that only inspect it do not create it."""
        # the directory may have been removed after this process joined
        return os.path.isdir(self.session.meta)

    def totals(self) -> Totals:
        """The totals of the directory; zeros if there is none, or if the index fails."""
        if not self.is_made:
            bound = self.barrier.bound
            return Totals(0, 0, 0, 0, self.barrier.default_bound if isinstance(bound, Unset) else bound)
        return self.barrier.try_or(self._totals, Totals(0, 0, 0, 0, None))

    def _totals(self) -> Totals:
        with self.session.section() as (_, index):
            return index.totals()

    def figures(self, namespace: str) -> tuple[Totals, tuple[int, int]]:
        """The totals of the directory, and number and bytes of the entries of one source, of one moment."""
        if not self.is_made:
            return self.totals(), (0, 0)
        return self.barrier.try_or(lambda: self._figures(namespace), (Totals(0, 0, 0, 0, None), (0, 0)))

    def _figures(self, namespace: str, patience: float | None = None) -> tuple[Totals, tuple[int, int]]:
        with self.session.section(patience) as (_, index):
            return index.totals(), index.share(namespace)

    def glance(self, namespace: str) -> tuple[Totals, tuple[int, int]]:
        """Like `figures`, for a display: the latest known values if the index is busy."""
        if not self.is_made:
            return self.totals(), (0, 0)
        try:
            if self.health.is_aside:
                raise Busy("the disk is to be left alone")
            self._seen[namespace] = self._figures(namespace, _GLANCE)
        except Busy:
            pass
        except (CacheFault, OSError) as error:
            self.barrier.record_fault(error)
        return self._seen.get(namespace, (Totals(0, 0, 0, 0, None), (0, 0)))

    def hashed_keys(self, prefix: str) -> list[str]:
        """Keys beneath a prefix whose files lie under their digests."""
        if not self.is_made:
            return []
        return self.barrier.try_or(lambda: self._hashed_keys(prefix), [])

    def _hashed_keys(self, prefix: str) -> list[str]:
        with self.session.section() as (_, index):
            return index.hashed_keys(prefix)

    def close(self) -> None:
        """Finish pending publishes, write the latest uses and return the lease; the next use joins again.

        A process that is writing at the source stays: others would take it for dead, and what they fetch for current.
        """
        if not self.health.comes_back(LONG):
            # the next process to recover treats this one as dead
            self.health.rest()
            return
        self.write_behind.wait()
        if self.session.current is not None:
            # suspected files must be removed now: later processes would serve them
            self.writes.adopt(self._quarantine.suspected)
            self.pending.retry_pending()
        self._close()

    def _close(self) -> bool:
        # with everything, because what this process has counted is lost when it ends
        last_words = partial(self.recency.flush_to, everything=True)
        left = self.session.close(last_words, has_pending=self.pending.has_pending)
        if not left and not self.session.writing:
            # the index still has rows of writes that have ended
            self.barrier.try_or(lambda: recovery.recover(self.session), None)
            left = self.session.close(last_words, has_pending=self.pending.has_pending)
        if left:
            # another process may finish the pending invalidations
            self.pending.leave_note()
        # a thread may have joined again meanwhile: its registration stays prepared
        if (prepared := self._prepared) is not None and prepared[0] is not self.session.current:
            self._prepared = None
        return left

    def remove_if_last(self) -> bool:
        """Leave, and delete the cache if no other process uses it and none writes; returns whether it was deleted."""
        return self.barrier.try_or(self._remove_if_last, False)

    def _remove_if_last(self) -> bool:
        self.write_behind.wait()
        if not recovery.is_last_to_leave(self.session):
            # stores that are still open join again at their next use
            self.close()
            return False
        # entries lie outside of `.xzcache`, perhaps beside files of the user: they are
        # removed by their rows, one by one
        self.writes.drop_now("")
        # work that still runs in this process must not create the directory again
        self.session.is_retired = True
        self.session.close(for_good=True)
        self._prepared = None
        with suppress(OSError):
            shutil.rmtree(files.inside(self.root, META))
        with suppress(OSError):
            # unless the directory holds other files
            os.rmdir(self.root)
        return True

    def after_fork_in_child(self) -> None:
        """Start anew with only the settings of the parent."""
        # every lock is made anew: the thread that held one in the parent does not exist in the child
        self.session.after_fork_in_child()
        self.health = Health(self.root, self._probe, self._retry_pending)
        self.pending.let_go_of_note()
        self.ledger.after_fork_in_child()
        self._leading = {}
        # the users are there in the child, too
        # the child keeps the bound that was asked for, which the parent may not have applied yet
        self._start(self.barrier.bound, self.barrier.default_bound, only_raise=self.barrier.only_raise)
