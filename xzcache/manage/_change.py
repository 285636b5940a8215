"""Clear, size and repair a cache directory."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any, Final

from dask.utils import parse_timedelta
from zarr.core.sync import sync

from xzcache._config import allowed, chosen_max_size, origin_of, parse_bound, parse_flag, shown_bound, shown_size
from xzcache.anystore import StoreBackend
from xzcache.directory import PINNED_SHARE, Audit, Inspector, audit, open_directory
from xzcache.manage._results import CacheUnavailable, Cleared, Resized, Source, TooLarge
from xzcache.manage._which import directory_of, find, is_there, must, root_of, settled, sources_of, state_of
from xzcache.store import CacheStore

_SINCE_ACCEPTED: Final = 'a time with its unit such as "7d", "12h" or "30m", a timedelta, or a number of seconds'


def parse_since(name: str, value: Any) -> float:
    """Seconds from ``"7d"``, a timedelta or a number of seconds; a text must have a unit."""
    refusal = f"{name}={value!r} is not accepted: give {_SINCE_ACCEPTED}"
    if isinstance(value, bool) or not isinstance(value, str | int | float | timedelta):
        raise TypeError(refusal)
    if isinstance(value, str) and not value[:1].isdigit():
        raise ValueError(refusal)
    try:
        seconds = float(parse_timedelta(value, default=False if isinstance(value, str) else "seconds"))
    except (ValueError, KeyError, OverflowError):
        raise ValueError(refusal) from None
    if not 0 <= seconds < 1e10:
        raise ValueError(refusal)
    return seconds


def clear(
    source: Any = None,
    *,
    older_than: str | float | timedelta | None = None,
    directory: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
) -> Cleared:
    """Remove entries from the cache: all, those of one source, or those that were not used for some time.

    Sources, and files that do not belong to the cache, are not changed. Reads of all processes go on, and fetch the
    removed entries again when they need them.

    Parameters
    ----------
    source : str, Path or Store, optional
        As for `ls`. Default is all sources.
    older_than : str, timedelta or float, optional
        Only remove entries that were not used for this time: ``"7d"``, or a number of seconds. Pinned ones stay.
    directory : str or Path, optional
        The cache directory. Default is that of a `CacheStore`, else this user's default cache on this machine.
    dry_run : bool, optional
        Whether to only count what would be removed.

    Returns
    -------
    Cleared
        With the number of entries and their bytes.

    Raises
    ------
    LookupError
        No source, or more than one, has this name.
    CacheUnavailable
        The cache cannot be changed; the message says why.
    """
    parse_flag("dry_run", dry_run)
    age = None if older_than is None else parse_since("older_than", older_than)
    if directory is None and isinstance(source, CacheStore) and isinstance(source._reads.backend, StoreBackend):
        return _clear_other(source, age, dry_run=dry_run)
    root = root_of(directory_of(source, directory))
    if not is_there(root):
        return Cleared(root, None, 0, 0, dry_run)
    settled(root)
    since = 0 if age is None else time.time_ns() - int(age * 1e9)
    opened = open_directory(root)
    if not dry_run:
        # a damaged index is rebuilt
        must(root, opened.must_prepare)
    what, entries, size = _counted(root, source, since)
    if not dry_run:
        if age is None and what != "":
            must(root, lambda: opened.clear(what or ""))
        else:
            # keys at the top, which belong to no namespace, or entries that were not used
            entries, size = must(root, lambda: opened.evict_unused(since or time.time_ns(), what))
    return Cleared(root, what, entries, size, dry_run)


def _counted(root: str, source: Any, since: int) -> tuple[str | None, int, int]:
    """The namespace that is meant, None for all, and what would be removed of it."""

    def count() -> tuple[list[Source], dict[str, tuple[int, int]]]:
        with Inspector(root) as inspector:
            return sources_of(inspector, since or None)

    found, old = must(root, count)
    if source is not None:
        found = [find(source, found, root)]
    counts = [old[s.namespace] if since else (s.entries, s.size) for s in found]
    return found[0].namespace if source is not None else None, sum(n for n, _ in counts), sum(b for _, b in counts)


def _clear_other(store: CacheStore, age: float | None, *, dry_run: bool) -> Cleared:
    """Clear a cache in another Zarr store, which one process and one source use."""
    if age is not None:
        raise ValueError("older_than is not accepted for a cache that is no directory: leave it out")
    backend = store._backend
    figures = backend.info()
    if not dry_run:
        sync(backend.clear())
    name = str(figures["cache_store_type"])
    return Cleared(name, store.namespace, figures["cached_keys"], figures["current_size"], dry_run)


def resize(max_size: int | str | None, directory: str | os.PathLike[str] | None = None) -> Resized:
    """Change the bound of a cache, for all processes; entries that do not fit any more are evicted at once.

    Parameters
    ----------
    max_size : int, str or None
        The bound in bytes or as ``"50 GB"``; None for no bound.
    directory : str or Path, optional
        The cache directory. Default is this user's default cache on this machine.

    Returns
    -------
    Resized
        With the bounds before and after, and what was evicted.

    Raises
    ------
    ValueError
        The bound is invalid, or larger than the site allows.
    CacheUnavailable
        There is no cache, or it cannot be changed; the message says why.
    TooLarge
        More is pinned than pins may take of that bound.
    """
    bound = parse_bound("max_size", max_size)
    if (most := allowed("max_size", bound)) != bound:
        raise ValueError(
            f"max_size={max_size!r} is not accepted: give {shown_bound(most)} or less ({origin_of('max_size')})"
        )
    root = root_of(directory)
    if not is_there(root):
        words = "" if bound is None else f"; max_size={shown_size(bound)!r} or XZCACHE_MAX_SIZE sets its first bound"
        raise CacheUnavailable(state_of(FileNotFoundError(), root)[1] + words)
    settled(root)
    opened = open_directory(root)
    # a damaged index is rebuilt
    must(root, opened.must_prepare)
    before = must(root, lambda: _totals(root))
    pinned = must(root, lambda: _pinned(root))
    if bound is not None and pinned > bound * PINNED_SHARE:
        raise TooLarge(
            f"{shown_size(pinned)} of the cache in {root} are pinned, and pins may take {PINNED_SHARE:.0%} of the "
            f"bound: give {shown_size(pinned / PINNED_SHARE)} or more, or unpin something first"
        )
    must(root, lambda: opened.change_bound(bound))
    after = must(root, lambda: _totals(root))
    note = ""
    configured = chosen_max_size() if directory is None else bound
    if isinstance(configured, int | None) and configured != bound:
        note = (
            f"note: max_size is configured as {shown_bound(configured)} ({origin_of('max_size')}), "
            "which holds again at the next opening of the default cache"
        )
    if bound is None or before.size <= bound:
        return Resized(root, before.max_size, after.max_size, note=note)
    evicted, size = max(0, before.entries - after.entries), max(0, before.size - after.size)
    return Resized(root, before.max_size, after.max_size, evicted, size, note)


def _totals(root: str) -> Any:
    with Inspector(root) as inspector:
        return inspector.totals()


def _pinned(root: str) -> int:
    with Inspector(root) as inspector:
        return inspector.pins()[1]


def check(directory: str | os.PathLike[str] | None = None, *, repair: bool = False) -> Audit:
    """Compare the index of a cache with its files and the files with their checksums, and look for leftovers.

    Parameters
    ----------
    directory : str or Path, optional
        The cache directory. Default is this user's default cache on this machine.
    repair : bool, optional
        Whether to repair the findings: damaged entries are removed, and fetched again when they are needed.

    Returns
    -------
    Audit
        ``ok``, ``findings``, ``entries``, ``size``, ``repaired``; as of `LockedLocalStore.check`. A missing cache has
        no findings.

    Raises
    ------
    CacheUnavailable
        The cache cannot be used; the message says why.
    """
    parse_flag("repair", repair)
    root = root_of(directory)
    if not is_there(root):
        return Audit(root)
    settled(root)
    opened = open_directory(root)
    # a cache that cannot be used is not one without findings
    must(root, opened.must_prepare)
    return must(root, lambda: audit(opened, repair=repair))
