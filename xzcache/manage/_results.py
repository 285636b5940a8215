"""The results of the calls of this room: figures with displays for consoles, notebooks and programs."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple, TypeVar, overload

from xzcache._config import shown_bound, shown_duration, shown_seconds, shown_size
from xzcache._display import Table
from xzcache.directory import Counts

T = TypeVar("T")

_MOST_LISTED: Final = 20
"""The reasons of failures that a display names."""
_MOST_KEYS: Final = 3
"""The objects that a display names for each reason."""

_UNTIL_TIMES: Final = re.compile(r".*\d[mµn]?s\b", re.DOTALL)
"""The message of a client up to the last time in it: what was asked, and how long that took."""
_ENOUGH: Final = 24
"""The characters after that which tell one reason from another."""

State = Literal["ok", "absent", "damaged", "foreign", "busy", "unusable"]


class CacheUnavailable(OSError):
    """The cache cannot be used or read; the message says why, in one line."""


class UnknownSource(LookupError):
    """No source of the cache, or more than one, has the given name; the message names the candidates."""

    def __str__(self) -> str:
        return str(self.args[0])


class TooLarge(ValueError):
    """The cache cannot hold, or may not pin, so much; the message has the figures, in one line."""


def _shown_time(seconds: float | None) -> str:
    """A last use for people: how long ago it was."""
    if seconds is None:
        return "-"
    ago = max(0.0, time.time() - seconds)
    return f"{shown_duration(ago)} ago" if ago >= 60 else "just now"


def shown_part(part: float | None) -> str:
    """A part of a whole for people; neither all nor nothing is rounded away."""
    if part is None:
        return "-"
    if 0 < part < 0.01 or 0.99 < part < 1:
        return "<1%" if part < 0.5 else ">99%"
    return f"{part:.0%}"


def counts_as_dict(counts: Counts) -> dict[str, Any]:
    """Counts for JSON, with the hit rate."""
    return {**counts._asdict(), "seconds_saved": round(counts.seconds_saved, 3), "hit_rate": _as_json(counts.hit_rate)}


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    return value


class _Shown(ABC):
    """A result with a short display for consoles, a table for notebooks, and a dictionary for programs."""

    @abstractmethod
    def table(self) -> Table:
        """The figures as a table, for displays."""

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
    ever, last_day : Counts
        The reads through the cache by all processes, since there are statistics and in the last 24 hours: ``hits``,
        ``misses``, ``peer_hits`` (reads that the cache of another node of a Dask cluster answered), ``hit_rate`` (of
        both kinds of hits), ``bytes_from_cache``, ``bytes_from_source``, ``seconds_saved``, ``evictions``,
        ``refetched`` and others. The seconds estimate how much longer the reads would have taken without the cache.
        Counts of running processes may lag by some seconds.
    since : float or None
        The beginning of the statistics, in seconds since the epoch; None without any.
    pins, pinned : int, int
        The number of pins, and the bytes of the pinned entries.
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
    ever: Counts = field(default_factory=Counts)
    last_day: Counts = field(default_factory=Counts)
    since: float | None = None
    pins: int = 0
    pinned: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is no trouble; an absent cache is none."""
        return self.state in ("ok", "absent")

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        counts = {"ever": counts_as_dict(self.ever), "last_day": counts_as_dict(self.last_day)}
        return {**vars(self), **counts, "since": _when(self.since)}

    def _statistics(self) -> dict[str, str]:
        ever, day = self.ever, self.last_day
        none = "nothing was read in the last day"
        lately = f"{shown_part(day.hit_rate)} in the last day" if day.reads else none
        saved, saved_lately = (
            f"{shown_size(counts.bytes_from_cache)} and {shown_seconds(counts.seconds_saved)}" for counts in (ever, day)
        )
        given = f", and {ever.peer_hits:,} from other nodes," if ever.peer_hits else ""
        rows = {
            "hits": f"{ever.hits:,}{given} of {ever.reads:,} reads ({shown_part(ever.hit_rate)}); {lately}",
            "saved": f"{saved}; {saved_lately} in the last day",
        }
        if ever.evictions:
            rows["evicted"] = f"{ever.evictions:,} entries, of which {ever.refetched:,} were fetched again"
        return rows

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
            if self.pins:
                rows["pinned"] = f"{shown_size(self.pinned)} by {self.pins:,} pin{'s' * (self.pins != 1)}"
        if self.ever.reads:
            rows |= self._statistics()
        if self.disk_size:
            rows["disk"] = f"{shown_size(self.disk_free)} free of {shown_size(self.disk_size)}"
        rows["policy"] = f"{self.policy}, min_free={self.min_free}"
        if self.node:
            rows["node"] = self.node
        share_used = min(1.0, self.used / self.max_size) if self.max_size else None
        return Table("xzcache", pairs=rows, bar=share_used)


class Source(NamedTuple):
    """One source in a cache; the size in bytes, times in seconds since the epoch.

    `counts` are the reads by all processes since there are statistics; see `Info`.
    """

    name: str
    """The readable part of the namespace."""
    namespace: str
    entries: int
    size: int
    share: float
    """The part of all cached bytes."""
    last_used: float | None
    counts: Counts = Counts()
    pinned: int = 0
    """The bytes that eviction passes over."""

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return {**self._asdict(), "last_used": _when(self.last_used), "counts": counts_as_dict(self.counts)}


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
    pinned: int = 0
    """The bytes that eviction passes over."""

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
        rows = [item.as_dict() for item in self]
        return {"directory": self.directory, "state": self.state, "trouble": self.trouble, "sources": rows}

    def table(self) -> Table:
        """The figures as a table, for displays."""
        names = display_names(self.items)
        rows = [
            (
                name,
                f"{s.entries:,}",
                shown_size(s.size),
                f"{s.share:.0%}",
                _shown_time(s.last_used),
                f"{s.counts.hits:,}" if s.counts.reads else "-",
                shown_part(s.counts.hit_rate),
            )
            for name, s in zip(names, self.items, strict=True)
        ]
        note = self.trouble or ("" if rows else f"the cache in {self.directory} is empty")
        columns = ("source", "entries", "size", "share", "last use", "hits", "hit rate")
        return Table(self.directory, *_with_pinned(columns, rows, self.items), note=note)


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
        return {
            "directory": self.directory,
            "source": self.source.as_dict(),
            "arrays": rows,
            "other_size": self.other_size,
        }

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
        return Table(self.source.namespace, *_with_pinned(columns, rows, self))


@dataclass(frozen=True, repr=False)
class Cleared(_Shown):
    """The entries that were removed from a cache or, with `dry_run`, would be.

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


def _with_pinned(
    columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], items: Sequence[Source | Array]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A column more, if anything is pinned."""
    if not any(item.pinned for item in items):
        return columns, list(rows)
    cells = [shown_size(item.pinned) if item.pinned else "-" for item in items]
    cells += [""] * (len(rows) - len(cells))
    return (*columns, "pinned"), [(*row, cell) for row, cell in zip(rows, cells, strict=True)]


class Failed(NamedTuple):
    """An object that is not in the cache after a warming, and why."""

    key: str
    reason: str


@dataclass(frozen=True, repr=False)
class Warmed(_Shown):
    """What a warming did, on all nodes.

    Attributes
    ----------
    objects : int
        The objects (chunks, or shards) that were asked for.
    cached : int
        Those that were cached before, and were not requested.
    fetched, absent : int, int
        Those that were fetched, and those that the source does not have.
    missing : int
        Those that were not cached before.
    needed : int or None
        An estimate of the bytes of the missing objects, made before they were fetched; None if it could not be made.
    size : int
        The bytes that came from the source.
    seconds : float
        The time that it took to fetch them.
    failed : tuple of Failed
        Objects that are not cached in spite of retries, with their keys and the reasons.
    not_tried : int
        Objects that were not requested because of `trouble`.
    trouble : str
        Why the warming stopped before its end; empty if it did not.
    directories : tuple of str
        The caches, one for each node.
    dry_run : bool
        Whether nothing was fetched.
    refusal : str
        Of a dry run: why the same call without it would raise `TooLarge`; empty if the cache can hold everything.
    """

    objects: int
    cached: int
    fetched: int = 0
    absent: int = 0
    missing: int = 0
    needed: int | None = None
    size: int = 0
    seconds: float = 0.0
    failed: tuple[Failed, ...] = ()
    not_tried: int = 0
    trouble: str = ""
    directories: tuple[str, ...] = ()
    dry_run: bool = False
    refusal: str = ""

    @property
    def ok(self) -> bool:
        """Whether all that was asked for is cached now, as far as the source has it."""
        return not (self.failed or self.not_tried or self.trouble)

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return {"ok": self.ok, **vars(self), "failed": [item._asdict() for item in self.failed]}

    def __repr__(self) -> str:
        where = f" on {len(self.directories)} nodes" if len(self.directories) > 1 else ""
        objects = f"{self.objects:,} object{'s' * (self.objects != 1)}{where}: {self.cached:,} cached before"
        if self.dry_run:
            about = "" if self.needed is None else f", at most about {shown_size(self.needed)}"
            more = f"\ndoes not fit: {self.refusal}" if self.refusal else ""
            return f"{objects}, {self.missing:,} to be fetched{about}{more}"
        rate = f", {shown_size(self.size / self.seconds)}/s" if self.size and self.seconds else ""
        lines = [f"{objects}, {self.fetched:,} fetched ({shown_size(self.size)} in {self.seconds:.1f} s{rate})"]
        if self.absent:
            lines[0] += f", {self.absent:,} missing at the source"
        if self.trouble:
            lines.append(f"stopped: {self.trouble}; {self.not_tried:,} objects were not requested")
        if self.failed:
            lines.append(f"failed: {len(self.failed):,}")
            lines += self._failures()
        return "\n".join(lines)

    def _failures(self) -> Iterator[str]:
        """A line for each reason, with the first keys that failed for it."""
        keys: dict[str, list[str]] = {}
        said: dict[str, str] = {}
        for item in self.failed:
            # one reason has many keys, and names each of them, and how long each request took
            reason = item.reason.replace(item.key, "...")
            kind = reason
            if times := _UNTIL_TIMES.match(reason):
                # a message that was shortened ends sooner if its times have more digits
                kind = reason.partition(":")[0] + reason[times.end() :][:_ENOUGH]
            keys.setdefault(kind, []).append(item.key)
            said.setdefault(kind, reason)
        for kind, of_it in list(keys.items())[:_MOST_LISTED]:
            more = f" and {len(of_it) - _MOST_KEYS:,} more" if len(of_it) > _MOST_KEYS else ""
            yield f"  {', '.join(of_it[:_MOST_KEYS])}{more}: {said[kind]}"
        if len(keys) > _MOST_LISTED:
            yield f"  and {len(keys) - _MOST_LISTED:,} more reasons"

    def table(self) -> Table:
        """The figures as a table, for displays."""
        return Table("xzcache", note=repr(self))


class Pin(NamedTuple):
    """One pin: a source or an array of it, and when the pin ends, in seconds since the epoch; None for never."""

    path: str
    """The namespace of the source, and the path of the array."""
    until: float | None

    @property
    def namespace(self) -> str:
        """The namespace of the source."""
        return self.path.partition("/")[0]

    def as_source(self) -> Source:
        """The source, of which nothing may be cached."""
        return Source(self.namespace, self.namespace, 0, 0, 0.0, None)


@dataclass(frozen=True, repr=False)
class Pins(_Rows[Pin]):
    """The pins of a cache; `size` are the bytes of all pinned entries, and `limit` what they may take."""

    directory: str
    items: tuple[Pin, ...] = ()
    size: int = 0
    limit: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The rows as plain values, for JSON."""
        rows = [{**item._asdict(), "until": _when(item.until)} for item in self]
        return {"directory": self.directory, "pins": rows, "size": self.size, "limit": self.limit}

    def table(self) -> Table:
        """The figures as a table, for displays."""
        rows = [(item.path, "unpinned" if item.until is None else (_when(item.until) or "")) for item in self]
        limit = "" if self.limit is None else f" of {shown_size(self.limit)} that may be"
        note = f"{shown_size(self.size)}{limit} pinned" if rows else f"nothing is pinned in {self.directory}"
        return Table(self.directory, ("pinned", "until"), rows, note=note)


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def display_names(items: Sequence[Source]) -> list[str]:
    """The readable names, with so much of the namespace as tells two of the same name apart."""
    names = [item.name for item in items]
    return [item.name if names.count(item.name) == 1 else item.namespace for item in items]
