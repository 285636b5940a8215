"""See what is in a cache directory: nothing here creates, repairs or upgrades anything."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from typing import Any, Final, overload

from zarr.abc.store import Store

from xzcache._config import (
    DEFAULTS,
    config,
    origin_of,
    parse_min_free,
    shown_bound,
    shown_min_free,
    unknown_settings,
)
from xzcache.directory import Counts, Inspector, Objects, free_bytes, is_plain
from xzcache.manage._results import (
    Array,
    Arrays,
    CacheUnavailable,
    Info,
    Setting,
    Settings,
    Source,
    Sources,
)
from xzcache.manage._which import directory_of, find, root_of, settled, sources_of, state_of
from xzcache.model import CacheFault, metadata

# metadata of a large store have some megabytes; a larger file is no document
_LARGEST_DOCUMENT: Final = 256 << 20


def info(directory: str | os.PathLike[str] | None = None) -> Info:
    """The state of a cache directory: how full it is, of how many sources, and what is wrong with it.

    Parameters
    ----------
    directory : str or Path, optional
        The cache directory. Default is this user's default cache on this machine.

    Returns
    -------
    Info
        With the attributes ``used``, ``max_size``, ``entries``, ``sources``, ``trouble`` and others.

    Notes
    -----
    Creates, repairs and upgrades nothing.
    """
    root = root_of(directory)
    reserve = config.get("min_free")
    with suppress(TypeError, ValueError):
        reserve = shown_min_free(parse_min_free("min_free", reserve))
    found = Info(root, "ok", None, policy=str(config.get("policy")), min_free=str(reserve))
    place = root
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    with suppress(OSError):
        disk_free, disk_size = free_bytes(place)
        found = replace(found, disk_free=disk_free, disk_size=disk_size)
    try:
        settled(root)
        with Inspector(root) as inspector:
            totals, statistics = inspector.totals(), inspector.statistics()
            pins, pinned = inspector.pins()
            return replace(
                found,
                ever=reduce(Counts.plus, statistics.of_sources.values(), Counts()),
                last_day=reduce(Counts.plus, statistics.of_the_day.values(), Counts()),
                since=statistics.since,
                used=totals.size,
                max_size=totals.max_size,
                entries=totals.entries,
                sources=len(inspector.sources()),
                processes=len(inspector.processes()),
                reserved=totals.lease + totals.tombstones,
                node=inspector.note("node"),
                pins=len(pins),
                pinned=pinned,
            )
    except (CacheFault, OSError) as error:
        state, trouble = state_of(error, root)
        return replace(found, state=state, trouble=trouble)


@overload
def ls(source: None = None, directory: str | os.PathLike[str] | None = None) -> Sources: ...


@overload
def ls(source: str | os.PathLike[str] | Store, directory: str | os.PathLike[str] | None = None) -> Arrays: ...


def ls(source: Any = None, directory: str | os.PathLike[str] | None = None) -> Sources | Arrays:
    """The sources of a cache or, with a source, its arrays and the part of each that is cached.

    Parameters
    ----------
    source : str, Path or Store, optional
        A name from the list of sources or an unambiguous part of one, the URL or path of a source, or a `CacheStore`.
    directory : str or Path, optional
        The cache directory. Default is that of a `CacheStore`, else this user's default cache on this machine.

    Returns
    -------
    Sources or Arrays
        A sequence of `Source` or of `Array`.

    Raises
    ------
    LookupError
        No source, or more than one, has this name.
    CacheUnavailable
        The arrays cannot be listed because the cache cannot be read.

    Notes
    -----
    Creates, repairs and upgrades nothing.
    """
    root = root_of(directory_of(source, directory))
    settled(root)
    try:
        with Inspector(root) as inspector:
            found, _ = sources_of(inspector, 0 if source is None else None)
            if source is None:
                return Sources(root, tuple(found))
            return _arrays(inspector, find(source, found, root))
    except (CacheFault, OSError) as error:
        state, trouble = state_of(error, root)
        if source is not None:
            raise CacheUnavailable(trouble) from error
        return Sources(root, (), state, trouble)


def _arrays(inspector: Inspector, source: Source) -> Arrays:
    nodes = inspector.nodes(source.namespace)
    grids: dict[str, metadata.Grid] = {}
    folders = dict.fromkeys(["", *(node for node in nodes if not metadata.is_document(node))])
    for key in (key for folder in folders for key in metadata.array_documents(folder)):
        if (document := _document(f"{source.namespace}/{key}", inspector.root)) is not None:
            # the first document counts: a consolidated one has all arrays, and a look is only a display
            grids.update({path: grid for path, grid in metadata.grids(key, document).items() if path not in grids})
    rows = []
    size = 0
    for path in sorted({*grids, *(folder for folder in folders if folder)}):
        prefix = f"{source.namespace}/{path}".rstrip("/")
        objects = inspector.objects(prefix, sorted(metadata.DOCUMENTS))
        size += objects.size
        if (grid := grids.get(path)) is not None or objects != Objects():
            rows.append(_row(path or "/", grid, objects))
    source = source._replace(last_used=max((row.last_used for row in rows if row.last_used is not None), default=None))
    return Arrays(inspector.root, source, tuple(rows), max(0, source.size - size))


def _row(name: str, grid: metadata.Grid | None, objects: Objects) -> Array:
    last = objects.last / 1e9 if objects.last else None
    shape, dtype, total = (grid.shape, grid.dtype, grid.objects) if grid is not None else (None, "", None)
    counts = objects.whole, objects.partial, objects.missing, objects.size
    return Array(name, shape, dtype, total, *counts, last, objects.pinned)


def _document(key: str, root: str) -> bytes | None:
    """A cached document; None if it is not cached at its own key."""
    if not is_plain(key):
        return None
    try:
        with open(os.path.join(root, key), "rb", opener=_regular) as file:
            return file.read(_LARGEST_DOCUMENT)
    except OSError:
        return None


def _regular(path: str, flags: int) -> int:
    # neither through a link nor into a pipe, as for all entry files
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))


def settings(directory: str | os.PathLike[str] | None = None) -> Settings:
    """Each setting of this process, its value, and where it came from; and the bound that the cache has by now."""
    items = tuple(Setting(name, config.get(name, default), origin_of(name)) for name, default in DEFAULTS.items())
    now = info(directory)
    bound = shown_bound(now.max_size) if now.state == "ok" else None
    return Settings(items, tuple(unknown_settings()), now.directory, bound)
