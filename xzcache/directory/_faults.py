"""The fault barrier: repairs a damaged index, counts and logs faults, and never lets them reach a read."""

from __future__ import annotations

import errno
import logging
import time
from functools import cache
from typing import TYPE_CHECKING, Final, TypeVar

from xzcache._config import UNSET, Unset, allowed, shown_bound, shown_size
from xzcache.directory import _recovery as recovery
from xzcache.model import Busy, Damaged, NoRoom, report_bug, without_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from xzcache.files import Health
    from xzcache.index import IndexSession


logger = logging.getLogger("xzcache.directory")

T = TypeVar("T")

_PAUSE_AFTER_FAILURE: Final = 10.0
_SHARE: Final = 2.0
"""The pause is longer by this factor for each second that the rebuild took."""
# other processes may rebuild in turn, each because of its own damage: the loop must end
_MOST_REPAIRS: Final = 5


class FaultBarrier:
    """Runs actions on the index session for reads that must not fail.

    `bound` is the requested bound in bytes, None for none, or UNSET; with `only_raise`, it may raise the bound of the
    directory but not lower it. `default_bound` is for a directory without a bound of its own. `faults` counts the
    failures of the cache in this process; `latest_fault` is the last one.
    """

    def __init__(
        self,
        session: IndexSession,
        bound: int | Unset | None,
        default_bound: int | None,
        health: Health,
        *,
        only_raise: bool = False,
    ) -> None:
        self.session = session
        self.health = health
        self.bound = bound
        self.only_raise = only_raise
        self.default_bound = default_bound
        self.faults = 0
        self.latest_fault: BaseException | None = None
        self._rebuild_after = 0.0
        self._doubt_after = 0.0
        self._must_revoke = False
        self._applied: int | Unset | None = UNSET
        self._logged_kinds: set[tuple[type[BaseException], int | None]] = set()

    def try_or(self, action: Callable[[], T], otherwise: T) -> T:
        """Run an action; returns `otherwise` if it fails or if the disk is put aside."""
        # asked before anything touches the disk, which could hang
        if self.health.is_aside:
            return otherwise
        try:
            return self.with_rebuild(action)
        except Exception as error:
            self.record_fault(error)
            return otherwise

    def with_rebuild(self, action: Callable[[], T]) -> T:
        """Run an action, rebuilding a damaged index; raises `CacheFault` or `OSError` if it fails."""
        mended, tries = False, 0
        while True:
            try:
                return action()
            except Damaged as damage:
                tries += 1
                # a rebuild empties directories and blocks all processes, so do not repeat it at each read
                if time.monotonic() < (self._rebuild_after if damage.is_certain else self._doubt_after):
                    raise
                if mended or tries > _MOST_REPAIRS:
                    self._pause(0.0)
                    raise
                began = time.monotonic()
                try:
                    # not mended: another process was faster, or the directory was replaced. Then the action is retried
                    mended = self._rebuild(damage)
                except BaseException as error:
                    if not _lacks_descriptors(error):
                        self._pause(time.monotonic() - began)
                    raise
                if mended and not damage.is_certain:
                    # on a disk that fails now and then, a new index is no better than the old one
                    self._doubt_after = self._after(time.monotonic() - began)

    def _pause(self, took: float) -> None:
        self._rebuild_after = self._doubt_after = self._after(took)

    @staticmethod
    def _after(took: float) -> float:
        """When a rebuild may be tried again: failed rebuilds must take only a small share of the time."""
        return time.monotonic() + _PAUSE_AFTER_FAILURE * max(1.0, _SHARE * took)

    def _rebuild(self, damage: Damaged) -> bool:
        generation = self.session.process().generation if damage.generation is None else damage.generation
        bound = self.default_bound if isinstance(self.bound, Unset) else self.bound
        mended = recovery.rebuild(self.session, generation, bound)
        if mended and generation:
            logger.warning("the index of the cache in %s was damaged and has been rebuilt", self.session.root)
        return mended

    def request_bound(self, max_size: int | None, *, only_raise: bool = False) -> bool:
        """Set the requested bound; False if there is nothing new to apply."""
        max_size = allowed("max_size", max_size)
        waiting = self.bound
        if only_raise and not isinstance(waiting, Unset) and waiting != self._applied and _is_lower(max_size, waiting):
            # the larger one was requested a moment ago, and is not applied yet
            _warn_that_it_stays(self.session.root, max_size, waiting)
            return False
        is_new = waiting != max_size or (self.only_raise and not only_raise)
        self.bound, self.only_raise = max_size, only_raise
        if is_new:
            self._applied = UNSET
        return is_new

    def apply_bound(self) -> int | Unset | None:
        """Apply the requested bound to the directory; a lower bound revokes all leases.

        Returns the bound before, if it was lowered; else UNSET.
        """
        if isinstance(self.bound, Unset) or (self.bound == self._applied and not self._must_revoke):
            # a bound that another process requested later holds, even when this process joins again
            return UNSET
        # a look first: the usual case, an unchanged bound, needs neither the storing lock nor a write
        with self.session.section() as (process, index):
            old = index.totals().max_size
        if old == self.bound and not self._must_revoke:
            self._applied = self.bound
            return UNSET
        if self.only_raise and _is_lower(self.bound, old):
            _warn_that_it_stays(self.session.root, self.bound, old)
            self._applied = self.bound
            return UNSET
        # a lease of the old bound could still be spent above the new one, so a lower bound needs all leases back
        lower = self.bound is not None and (old is None or self.bound <= old)
        alone = lower and process.storing.exclude(self.session.timeout)
        try:
            with self.session.section() as (current, index):
                index.set_max_size(self.bound)
                if alone and current is process:
                    process.revoke_leases(index)
                # the file keeps the requested bound even if the index is lost
                recovery.remember_bound(self.session, self.bound)
        finally:
            if alone:
                process.storing.readmit()
        # the new bound is recorded in any case, so that nothing more is leased; the leases
        # are revoked by a later attempt
        self._must_revoke = lower and not alone
        if self._must_revoke:
            raise Busy("another process is writing, and may still use a lease of the old bound")
        self._applied = self.bound
        return old if lower else UNSET

    def reapply_bound(self) -> None:
        """Apply the requested bound again at the next `apply_bound`."""
        self._applied = UNSET

    def record_fault(self, error: BaseException) -> None:
        """Count a fault, and log it once for each kind; a lack of room is no fault.

        An unexpected exception is a bug, which is logged with its traceback.
        """
        if isinstance(error, NoRoom):
            logger.debug("nothing is stored for want of room: %s", error)
            return
        self.faults += 1
        self.health.record_fault(error)
        kind = (type(error), getattr(error, "errno", None))
        if (
            not report_bug(error, f"the cache in {self.session.root}; reads go to the source")
            and kind not in self._logged_kinds
        ):
            self._logged_kinds.add(kind)
            if isinstance(cause := error.__cause__, OSError):
                # reads of a file there will fail with the same error
                self._logged_kinds.add((type(cause), cause.errno))
            logger.warning("trouble with the cache in %s, reads go to the source: %s", self.session.root, error)
        # without its frames, which would keep the store of the failed read alive, and with it the use of the directory
        self.latest_fault = without_frames(error)


def _is_lower(asked: int | None, current: int | None) -> bool:
    return asked is not None and (current is None or asked < current)


@cache
def _warn_that_it_stays(root: str, asked: int, current: int | None) -> None:
    logger.warning(
        "max_size=%s does not lower the bound of the default cache in %s, which other datasets share: it keeps %s. "
        "`xzcache resize %s` lowers it, and cache_store=PATH gives a dataset a cache of its own",
        repr(shown_size(asked)),
        root,
        shown_bound(current),
        shown_size(asked).replace(" ", ""),
    )


def _lacks_descriptors(error: BaseException) -> bool:
    """Whether the process was only out of descriptors, so that a retry is cheap."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in (errno.EMFILE, errno.ENFILE):
            return True
        if getattr(cause, "sqlite_errorname", None) == "SQLITE_CANTOPEN":
            return True
        cause = cause.__cause__
    return False
