"""See, clear, size and check a cache directory: the Python side of the command ``xzcache``.

What only looks creates, repairs and upgrades nothing, and works where this process may only read. Everything here is
synchronous and needs no event loop, so it works in a script and within a running event loop alike.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar, overload

from dask.utils import parse_timedelta
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore

from xzcache._caches import default_directory
from xzcache._config import (
    DEFAULTS,
    as_found,
    chosen_max_size,
    config,
    origin_of,
    parse_bound,
    parse_flag,
    parse_root,
    shown_bound,
    shown_size,
    unknown_settings,
)
from xzcache._display import Table
from xzcache.anystore import StoreBackend
from xzcache.directory import (
    Audit,
    CacheDirectory,
    Inspector,
    Objects,
    audit,
    free_bytes,
    is_plain,
    open_directory,
    opened_directory,
    resolve_directory,
)
from xzcache.local import LockedLocalStore
from xzcache.model import META, Busy, CacheFault, Damaged, Foreign, metadata
from xzcache.sources import identify, is_url, path_of, shown, slug_of
from xzcache.store import CacheStore

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

State = Literal["ok", "absent", "damaged", "foreign", "busy", "unusable"]

_DIGEST: Final = re.compile(r"(?<=.)-[0-9a-f]{20}(-\d+)?$")
_LARGEST_DOCUMENT: Final = 256 << 20
_SINCE_ACCEPTED: Final = 'a time with its unit such as "7d", "12h" or "30m", a timedelta, or a number of seconds'


# -- What is shown.


class CacheUnavailable(OSError):
    """The cache cannot be used or read; the message says why, in one line."""


class UnknownSource(LookupError):
    """No source of the cache, or more than one, has the given name; the message names those that are meant."""

    def __str__(self) -> str:
        return str(self.args[0])


def _shown_time(seconds: float | None) -> str:
    """A last use for people: how long ago it was."""
    if seconds is None:
        return "-"
    ago = max(0.0, time.time() - seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if ago >= 2 * length or (unit != "d" and ago >= length):
            return f"{ago / length:.0f} {unit} ago"
    return "just now"


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    return value


class _Shown:
    """A result with a short display for consoles, a table for notebooks, and a dictionary for programs."""

    def table(self) -> Table:
        """The figures as a table, for displays."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


class _Rows(_Shown, Sequence[T]):
    """A result of several rows."""

    items: tuple[T, ...]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...

    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        return self.items[index]


@dataclass(frozen=True, repr=False)
class Info(_Shown):
    """The state of a cache directory; sizes in bytes.

    Attributes
    ----------
    directory : str
        The cache directory.
    state : str
        ``"ok"``, ``"absent"`` (there is no cache), ``"damaged"``, ``"foreign"`` (of another user, or of another version
        of xzcache), ``"busy"`` or ``"unusable"``. If it is not ``"ok"``, the figures are zeros.
    trouble : str or None
        The reason for any other state, in one line.
    used, max_size : int, int or None
        The bytes of all entries, and the bound; None for no bound.
    entries, sources, processes : int
        The number of entries, of sources that have any, and of processes that use the cache.
    reserved : int
        Bytes of the bound that running processes have leased, or that are being deleted.
    disk_free, disk_size : int
        Of the file system.
    policy, min_free : str, str
        As configured in this process.
    node : str
        The uuid of this directory; empty if it has none.
    """

    directory: str
    state: State
    trouble: str | None = None
    used: int = 0
    max_size: int | None = None
    entries: int = 0
    sources: int = 0
    processes: int = 0
    reserved: int = 0
    disk_free: int = field(default=0, compare=False)
    disk_size: int = 0
    policy: str = ""
    min_free: str = ""
    node: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is no trouble; an absent cache is none."""
        return self.state in ("ok", "absent")

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return dict(vars(self))

    def table(self) -> Table:
        """The figures as a table, for displays."""
        rows = {"directory": self.directory}
        if self.trouble:
            rows["state"] = self.trouble
        else:
            share = f" ({self.used / self.max_size:.0%})" if self.max_size else ""
            bound = "no bound" if self.max_size is None else f"of {shown_bound(self.max_size)}{share}"
            rows["used"] = f"{shown_size(self.used)} {bound}"
            rows["entries"] = f"{self.entries:,} of {self.sources:,} source{'s' * (self.sources != 1)}"
            rows["processes"] = f"{self.processes:,}"
        if self.disk_size:
            rows["disk"] = f"{shown_size(self.disk_free)} free of {shown_size(self.disk_size)}"
        rows["policy"] = f"{self.policy}, min_free={self.min_free}"
        if self.node:
            rows["node"] = self.node
        share_used = min(1.0, self.used / self.max_size) if self.max_size else None
        return Table("xzcache", pairs=rows, bar=share_used)


class Source(NamedTuple):
    """One source in a cache; the size in bytes, times in seconds since the epoch."""

    name: str
    """The readable part of the namespace."""
    namespace: str
    entries: int
    size: int
    share: float
    """The part of all cached bytes."""
    last_used: float | None


class Array(NamedTuple):
    """One array of a source, as far as it is cached; the size in bytes, times in seconds since the epoch."""

    name: str
    shape: tuple[int, ...] | None
    """None if its document is not cached."""
    dtype: str
    total: int | None
    """The objects (chunks, or shards) of the array; None if its document does not tell."""
    cached: int
    """The objects that are cached whole."""
    partly: int
    """The objects of which byte ranges are cached, as of shards."""
    missing: int
    """The objects that are known to be missing at the source, which are never cached."""
    size: int
    last_used: float | None

    @property
    def fraction(self) -> float | None:
        """The part of the existing objects that is cached whole; None if it is unknown."""
        if self.total is None:
            return None
        there = self.total - self.missing
        return min(1.0, self.cached / there) if there > 0 else 1.0


@dataclass(frozen=True, repr=False)
class Sources(_Rows[Source]):
    """The sources of a cache, largest first; see `Source`."""

    directory: str
    items: tuple[Source, ...] = ()
    state: State = "ok"
    trouble: str | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no trouble; an absent cache is none."""
        return self.state in ("ok", "absent")

    def as_dict(self) -> dict[str, Any]:
        """The rows as plain values, for JSON."""
        rows = [{**item._asdict(), "last_used": _when(item.last_used)} for item in self]
        return {"directory": self.directory, "state": self.state, "trouble": self.trouble, "sources": rows}

    def table(self) -> Table:
        """The figures as a table, for displays."""
        names = _display_names(self.items)
        rows = [
            (name, f"{s.entries:,}", shown_size(s.size), f"{s.share:.0%}", _shown_time(s.last_used))
            for name, s in zip(names, self.items, strict=True)
        ]
        note = self.trouble or ("" if rows else f"the cache in {self.directory} is empty")
        return Table(self.directory, ("source", "entries", "size", "share", "last use"), rows, note=note)


@dataclass(frozen=True, repr=False)
class Arrays(_Rows[Array]):
    """The arrays of one source; see `Array`. `other_size` are the bytes of documents and of unknown arrays."""

    directory: str
    source: Source
    items: tuple[Array, ...] = ()
    other_size: int = 0
    ok = True
    trouble = None

    def as_dict(self) -> dict[str, Any]:
        """The rows as plain values, for JSON."""
        rows = [
            {**item._asdict(), "fraction": _as_json(item.fraction), "last_used": _when(item.last_used)} for item in self
        ]
        source = {**self.source._asdict(), "last_used": _when(self.source.last_used)}
        return {"directory": self.directory, "source": source, "arrays": rows, "other_size": self.other_size}

    def table(self) -> Table:
        """The figures as a table, for displays."""
        rows = []
        for item in self:
            shape = "x".join(map(str, item.shape)) if item.shape else "scalar" if item.shape == () else "?"
            part = "?" if item.fraction is None else f"{item.fraction:.0%}"
            counts = f"{item.cached:,} of {'?' if item.total is None else f'{item.total - item.missing:,}'}"
            counts += f" and parts of {item.partly:,}" if item.partly else ""
            used = _shown_time(item.last_used)
            rows.append((item.name, item.dtype or "?", shape, part, counts, shown_size(item.size), used))
        if self.other_size:
            rows.append(("(documents, others)", "", "", "", "", shown_size(self.other_size), ""))
        columns = ("array", "type", "shape", "cached", "chunks", "size", "last use")
        return Table(self.source.namespace, columns, rows)


@dataclass(frozen=True, repr=False)
class Cleared(_Shown):
    """What was removed from a cache or, with `dry_run`, what would be.

    Attributes
    ----------
    directory : str
        The cache directory.
    what : str or None
        The namespace that was cleared; None for all sources.
    entries, size : int
        The number and the bytes of the entries.
    dry_run : bool
        Whether nothing was removed.
    """

    directory: str
    what: str | None
    entries: int
    size: int
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return dict(vars(self))

    def __repr__(self) -> str:
        did = "would remove" if self.dry_run else "removed"
        where = f" of {self.what}" if self.what else ""
        return f"{did} {self.entries:,} entr{'y' if self.entries == 1 else 'ies'}{where}, {shown_size(self.size)}"

    def table(self) -> Table:
        """The figures as a table, for displays."""
        return Table("xzcache", note=repr(self))


@dataclass(frozen=True, repr=False)
class Resized(_Shown):
    """A changed bound: the bounds before and after, in bytes, and what was evicted for it.

    `note` says if the configuration will change the bound again.
    """

    directory: str
    before: int | None
    max_size: int | None
    evicted: int = 0
    evicted_size: int = 0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return dict(vars(self))

    def __repr__(self) -> str:
        text = f"the bound of {self.directory} is {shown_bound(self.max_size)}, and was {shown_bound(self.before)}"
        if self.evicted:
            text += f"; {self.evicted:,} entries, {shown_size(self.evicted_size)}, were evicted"
        return f"{text}\n{self.note}" if self.note else text

    def table(self) -> Table:
        """The figures as a table, for displays."""
        return Table("xzcache", note=repr(self))


@dataclass(frozen=True, repr=False)
class Settings(_Rows["Setting"]):
    """The settings of this process and their origins.

    `problems` are names that xzcache does not know; `directory` is the cache that is meant, and `bound` the bound that
    it has, which a configured one changes only when the cache is opened.
    """

    items: tuple[Setting, ...]
    problems: tuple[str, ...]
    directory: str
    bound: str | None

    @property
    def ok(self) -> bool:
        """Whether all configured names are known."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        rows = [item._asdict() for item in self]
        return {"settings": rows, "problems": list(self.problems), "directory": self.directory, "bound": self.bound}

    def table(self) -> Table:
        """The figures as a table, for displays."""
        rows = [(item.name, str(item.value), item.origin) for item in self]
        bound = f", its bound is {self.bound}" if self.bound else ""
        note = "\n".join([f"the cache is {self.directory}{bound}", *self.problems])
        return Table("xzcache", ("setting", "value", "from"), rows, note=note)


class Setting(NamedTuple):
    """One setting: its value, and where it came from."""

    name: str
    value: Any
    origin: str


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _display_names(items: Sequence[Source]) -> list[str]:
    """The readable names, with so much of the namespace as tells two of the same name apart."""
    names = [item.name for item in items]
    return [item.name if names.count(item.name) == 1 else item.namespace for item in items]


# -- Which cache and which source are meant.


def _root(directory: Any) -> str:
    """The cache directory from the user's argument."""
    if isinstance(directory, LockedLocalStore):
        return directory.directory.root
    if isinstance(directory, LocalStore):
        directory = directory.root
    with as_found():
        if directory is None:
            return resolve_directory(default_directory())
        return resolve_directory(str(parse_root(directory, "directory")))


def _settled(root: str) -> CacheDirectory | None:
    """Bring the index up to date with the reads of this process, so that figures are exact."""
    opened = opened_directory(root)
    if opened is not None and opened.is_made and not opened.health.is_aside:
        opened.write_behind.wait()
        opened.flush()
    return opened


def _state_of(error: BaseException, root: str) -> tuple[State, str]:
    if isinstance(error, FileNotFoundError):
        return "absent", f"there is no cache in {root} yet: the first read through xzcache makes it"
    if isinstance(error, Damaged):
        return "damaged", f"{error}; the next read through xzcache, or `xzcache check --repair`, rebuilds the index"
    if isinstance(error, Foreign):
        return "foreign", str(error)
    return "busy" if isinstance(error, Busy) else "unusable", str(error)


def _is_there(root: str) -> bool:
    return os.path.lexists(f"{root}/{META}")


def _must(root: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except (CacheFault, OSError) as error:
        if isinstance(error, CacheUnavailable):
            raise
        raise CacheUnavailable(_state_of(error, root)[1]) from error


def _sources(inspector: Inspector, before: int | None = 0) -> tuple[list[Source], dict[str, tuple[int, int]]]:
    """The sources, and for each what was not used since a time, in ns; with None, their uses are left out."""
    found = inspector.sources()
    uses = {} if before is None else inspector.uses(before)
    whole = sum(source.size for source in found)
    listed = []
    old = {}
    for source in found:
        use = uses.get(source.id)
        last = use.last / 1e9 if use is not None and use.last else None
        name = _DIGEST.sub("", source.namespace) or "(top)"
        share = source.size / whole if whole else 0.0
        listed.append(Source(name, source.namespace, source.entries, source.size, share, last))
        old[source.namespace] = (use.old_entries, use.old_size) if use is not None else (0, 0)
    return listed, old


def _find(given: Any, sources: Sequence[Source], root: str) -> Source:
    """The one source that is meant."""
    if isinstance(given, Source | Arrays):
        given = given.namespace if isinstance(given, Source) else given.source.namespace
    if isinstance(given, CacheStore):
        given = given.namespace
    elif isinstance(given, Store):
        given = identify(given).namespace
    if not isinstance(given, str | os.PathLike):
        accepted = "a name of `xzcache ls`, the URL or path of a source, or a store"
        raise TypeError(f"source={given!r} is not accepted: give {accepted}")
    text = os.fspath(given)
    for candidates in _candidates(text):
        if len(matching := [source for source in sources if candidates(source)]) == 1:
            return matching[0]
        if matching:
            several = _listed([source.namespace for source in matching])
            raise UnknownSource(f"{shown(text)!r} matches {len(matching)} sources of {root}, give one of: {several}")
    names = _display_names(sources)
    close = difflib.get_close_matches(_slug(text), names, 3, 0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {_listed(names)}"
    raise UnknownSource(f"no source of the cache in {root} is called {shown(text)!r}: {hint}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more if names else "none"


def _slug(text: str) -> str:
    return slug_of(shown(text).rstrip("/"))


def _candidates(text: str) -> Iterator[Callable[[Source], bool]]:
    yield lambda source: source.namespace == text
    yield lambda source: source.name == text
    if not is_url(text) and ("/" in text or os.path.exists(text)):
        namespace = identify(LocalStore(path_of(text))).namespace
        yield lambda source: source.namespace == namespace
    slug = _slug(text)
    if not text.strip("/"):
        return
    yield lambda source: source.name == slug
    if is_url(text):
        # the same place under another scheme, or at an endpoint of its own
        place = slug_of(shown(text).partition("://")[2].rstrip("/"))
        yield lambda source: bool(place) and f"-{source.name}-".endswith(f"-{place}-")
    else:
        yield lambda source: f"-{slug}-" in f"-{source.name}-"
        yield lambda source: slug in source.name or source.namespace.startswith(text)


# -- The calls.


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
    root = _root(directory)
    found = Info(root, "ok", None, policy=str(config.get("policy")), min_free=str(config.get("min_free")))
    place = root
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    with suppress(OSError):
        disk_free, disk_size = free_bytes(place)
        found = replace(found, disk_free=disk_free, disk_size=disk_size)
    try:
        _settled(root)
        with Inspector(root) as inspector:
            totals = inspector.totals()
            return replace(
                found,
                used=totals.size,
                max_size=totals.max_size,
                entries=totals.entries,
                sources=len(inspector.sources()),
                processes=inspector.processes(),
                reserved=totals.lease + totals.tombstones,
                node=inspector.note("node"),
            )
    except (CacheFault, OSError) as error:
        state, trouble = _state_of(error, root)
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
    root = _root(_directory_of(source, directory))
    _settled(root)
    try:
        with Inspector(root) as inspector:
            found, _ = _sources(inspector, 0 if source is None else None)
            if source is None:
                return Sources(root, tuple(found))
            return _arrays(inspector, _find(source, found, root))
    except (CacheFault, OSError) as error:
        state, trouble = _state_of(error, root)
        if source is not None:
            raise CacheUnavailable(trouble) from error
        return Sources(root, (), state, trouble)


def _directory_of(source: Any, directory: Any) -> Any:
    if directory is None and isinstance(source, CacheStore):
        cache = source._cache
        if not isinstance(cache, LockedLocalStore):
            raise TypeError(f"{source!r} has no cache directory: its cache is a {type(cache).__name__}")
        return cache
    return directory


def _arrays(inspector: Inspector, source: Source) -> Arrays:
    nodes = inspector.nodes(source.namespace)
    grids: dict[str, metadata.Grid] = {}
    folders = dict.fromkeys(["", *(node for node in nodes if not metadata.is_document(node))])
    for key in (key for folder in folders for key in metadata.array_documents(folder)):
        if (document := _document(f"{source.namespace}/{key}", inspector.root)) is not None:
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
    return Array(name, shape, dtype, total, objects.whole, objects.partial, objects.missing, objects.size, last)


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
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))


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
    """Remove what is cached: all of it, one source, or what was not used for some time.

    The sources themselves, and files that do not belong to the cache, are left alone. Reads of any process go on, and
    fetch again what they need.

    Parameters
    ----------
    source : str, Path or Store, optional
        As for `ls`. Default is all sources.
    older_than : str, timedelta or float, optional
        Only remove entries that were not used for this time: ``"7d"``, or a number of seconds.
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
    root = _root(_directory_of(source, directory))
    if not _is_there(root):
        return Cleared(root, None, 0, 0, dry_run)
    _settled(root)
    since = 0 if age is None else time.time_ns() - int(age * 1e9)
    opened = open_directory(root)
    if not dry_run:
        # a damaged index is rebuilt
        _must(root, opened.must_prepare)
    what, entries, size = _counted(root, source, since)
    if not dry_run:
        if age is None and what != "":
            _must(root, lambda: opened.clear(what or ""))
        else:
            # keys at the top, which are no namespace, or what was not used
            entries, size = _must(root, lambda: opened.evict_unused(since or time.time_ns(), what))
    return Cleared(root, what, entries, size, dry_run)


def _counted(root: str, source: Any, since: int) -> tuple[str | None, int, int]:
    """The namespace that is meant, None for all, and what would be removed of it."""

    def count() -> tuple[list[Source], dict[str, tuple[int, int]]]:
        with Inspector(root) as inspector:
            return _sources(inspector, since or None)

    found, old = _must(root, count)
    if source is not None:
        found = [_find(source, found, root)]
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
    """Change the bound of a cache, for all processes; what does not fit any more is evicted at once.

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
    CacheUnavailable
        There is no cache, or it cannot be changed; the message says why.
    """
    bound = parse_bound("max_size", max_size)
    root = _root(directory)
    if not _is_there(root):
        words = "" if bound is None else f"; max_size={shown_size(bound)!r} or XZCACHE_MAX_SIZE sets its first bound"
        raise CacheUnavailable(_state_of(FileNotFoundError(), root)[1] + words)
    _settled(root)
    opened = open_directory(root)
    # a damaged index is rebuilt
    _must(root, opened.must_prepare)
    before = _must(root, lambda: _totals(root))
    _must(root, lambda: opened.change_bound(bound))
    after = _must(root, lambda: _totals(root))
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
    root = _root(directory)
    if not _is_there(root):
        return Audit(root)
    _settled(root)
    opened = open_directory(root)
    return _must(root, lambda: audit(opened, repair=repair))


def settings(directory: str | os.PathLike[str] | None = None) -> Settings:
    """Each setting of this process, its value, and where it came from; and the bound that the cache has by now."""
    items = tuple(Setting(name, config.get(name, default), origin_of(name)) for name, default in DEFAULTS.items())
    now = info(directory)
    bound = shown_bound(now.max_size) if now.state == "ok" else None
    return Settings(items, tuple(unknown_settings()), now.directory, bound)
