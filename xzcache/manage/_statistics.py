"""Statistics of a cache: predictions for other bounds, current activity, and figures for Prometheus."""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from xzcache._config import config, parse_policy, shown_bound, shown_size
from xzcache._display import Table, one_line
from xzcache.directory import Counts, Inspector, Sample, predicted
from xzcache.manage._look import info
from xzcache.manage._results import CacheUnavailable, State, _Shown, counts_as_dict, shown_part
from xzcache.manage._which import must, name_of, root_of, settled, state_of
from xzcache.model import CacheFault

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xzcache.directory import Arrival


OTHER_SOURCES: Final = "(others)"
_FACTORS: Final = (0.25, 0.5, 1, 2, 4)


# -- Predictions for other bounds.


@dataclass(frozen=True, repr=False)
class Curve(_Shown):
    """The part of the reads that would be misses with other bounds.

    Attributes
    ----------
    directory : str
        The cache directory.
    policy : str
        The eviction policy.
    bound : int
        The bound, in bytes; the size of the cache if it has no bound.
    bounds : tuple of int
        Other bounds, in bytes.
    miss_ratios : tuple of float
        The predicted part of the reads that are misses, for each of `bounds`; empty if too little was read yet.
    uses : int
        The uses in the sample.
    since : float or None
        When the reads that were predicted began, in seconds since the epoch.
    """

    directory: str
    policy: str
    bound: int
    bounds: tuple[int, ...] = ()
    miss_ratios: tuple[float, ...] = ()
    uses: int = 0
    since: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return dict(vars(self))

    def table(self) -> Table:
        """The figures as a table, for displays."""
        if not self.miss_ratios:
            return Table("xzcache", note="too little was read to tell what other bounds would give")
        rows = [
            (shown_size(bound), f"{bound / self.bound:.3g}", f"{ratio:.1%}", f"{1 - ratio:.1%}")
            for bound, ratio in zip(self.bounds, self.miss_ratios, strict=True)
        ]
        return Table("xzcache", ("bound", "times", "misses", "hits"), rows, note=f"policy {self.policy}")


def curve(
    directory: str | os.PathLike[str] | None = None,
    *,
    factors: Sequence[float] = _FACTORS,
    policy: str | None = None,
    most: int | None = None,
) -> Curve:
    """What smaller and larger bounds would give, predicted from a sample of the latest uses.

    Parameters
    ----------
    directory : str or Path, optional
        The cache directory. Default is this user's default cache on this machine.
    factors : sequence of float, optional
        The bounds, as multiples of the current one.
    policy : str, optional
        The eviction policy. Default is the configured one.
    most : int, optional
        Look at so many uses at the most: a larger sample is more exact and takes longer.

    Returns
    -------
    Curve

    Raises
    ------
    CacheUnavailable
        The cache cannot be read; the message says why.
    """
    policy = parse_policy("policy", config.get("policy") if policy is None else policy)
    root = root_of(directory)
    settled(root)

    def look() -> tuple[int, Sample]:
        with Inspector(root) as inspector:
            totals = inspector.totals()
            usual = totals.size // totals.entries if totals.entries else 1
            bound = totals.size if totals.max_size is None else totals.max_size
            return max(1, bound), Sample.of(inspector.sampled(), usual)

    bound, sample = must(root, look)
    if most is not None:
        sample = sample.thinned(most)
    bounds = tuple(max(1, int(bound * factor)) for factor in factors)
    ratios = predicted(sample, bounds, policy)
    if ratios is None:
        return Curve(root, policy, bound)
    since = float(sample.at[sample.counted_from]) / 1e9
    return Curve(root, policy, bound, bounds, tuple(ratios), len(sample.at), since)


# -- Current activity.


class Process(NamedTuple):
    """A process that uses a cache; `command` is empty where the system does not tell."""

    pid: int
    command: str


class Fetched(NamedTuple):
    """The objects of one array that were stored lately, and their bytes; parts of objects count as well."""

    source: str
    array: str
    objects: int
    size: int


@dataclass(frozen=True, repr=False)
class Activity(_Shown):
    """The recent reads of all processes through a cache.

    Processes report misses about twice a second, and hits after five seconds at the latest.

    Attributes
    ----------
    directory : str
        The cache directory.
    seconds : float
        The time that was looked at.
    counts : Counts
        The reads in this time, of all sources.
    by_source : dict
        The same by the name of the source, those with the most bytes first.
    processes : tuple of Process
        The processes that use the cache.
    fetching : int or None
        How many objects are being fetched at this moment; None if the system does not tell.
    fetched : tuple of Fetched
        The arrays of which something was stored in this time, those with the most bytes first. Of more than 5,000
        objects, the latest count.
    used, max_size : int, int or None
        The bytes of all entries, and the bound.
    state, trouble
        As of `Info`.
    """

    directory: str
    seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)
    by_source: dict[str, Counts] = field(default_factory=dict)
    processes: tuple[Process, ...] = ()
    fetching: int | None = None
    fetched: tuple[Fetched, ...] = ()
    used: int = 0
    max_size: int | None = None
    state: State = "ok"
    trouble: str | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no trouble; an absent cache is none."""
        return self.state in ("ok", "absent")

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return {
            **vars(self),
            "seconds": round(self.seconds, 3),
            "counts": counts_as_dict(self.counts),
            "by_source": {name: counts_as_dict(counts) for name, counts in self.by_source.items()},
            "processes": [process._asdict() for process in self.processes],
            "fetched": [fetched._asdict() for fetched in self.fetched],
        }

    def _row(self, name: str, counts: Counts) -> tuple[str, ...]:
        seconds = self.seconds or 1.0
        from_peers = [counts.bytes_from_peers] if self.counts.peer_hits else []
        sizes = counts.bytes_from_cache, *from_peers, counts.bytes_from_source
        return (
            name,
            f"{counts.reads / seconds:,.1f}",
            shown_part(counts.hit_rate),
            *(f"{shown_size(size / seconds)}/s" for size in sizes),
            f"{counts.evictions / seconds:,.1f}",
        )

    def table(self) -> Table:
        """The figures as a table, for displays."""
        if self.trouble:
            return Table("xzcache", note=self.trouble)
        rows = [self._row(name, counts) for name, counts in self.by_source.items()]
        rows.append(self._row("all", self.counts))
        from_peers = ["from nodes"] if self.counts.peer_hits else []
        columns = ("source", "reads/s", "hit rate", "from cache", *from_peers, "from source", "evicted/s")
        named = [f"{process.pid} {process.command}".rstrip() for process in self.processes]
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        note = (
            f"{self.directory}: {shown_size(self.used)} of {shown_bound(self.max_size)}; in the last "
            f"{self.seconds:.0f} s\n{len(named)} process{'es' * (len(named) != 1)}"
            f"{': ' if named else ''}{', '.join(named[:8])}{more}{self._fetches()}"
        )
        return Table("xzcache", columns, rows, note=note)

    def _fetches(self) -> str:
        """A line on the objects that are being fetched, and one on the arrays of those that were stored."""
        lines = [f"fetching now: {_objects(self.fetching)}"] if self.fetching else []
        # the names come from the keys of a source
        named = [
            f"{one_line(f'{each.source} {each.array}'.rstrip())} ({_objects(each.objects)}, {shown_size(each.size)})"
            for each in self.fetched
        ]
        more = f" and {len(named) - 4} more" if len(named) > 4 else ""
        lines += [f"fetched: {', '.join(named[:4])}{more}"] if named else []
        return "".join(f"\n{line}" for line in lines)


def _objects(count: int) -> str:
    return f"{count:,} object{'s' * (count != 1)}"


class Meter:
    """Measures the reads through a cache between two looks at its index.

    Parameters
    ----------
    directory : str or Path, optional
        The cache directory. Default is this user's default cache on this machine.
    window : float, optional
        The seconds to look back.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, window: float = 10.0) -> None:
        self._root = root_of(directory)
        self._window = window
        self._looks: deque[tuple[float, dict[str, Counts], int]] = deque()

    def read(self) -> Activity:
        """The reads since the look at the beginning of the window, or since the first look."""
        now = time.monotonic()
        try:
            with Inspector(self._root) as inspector:
                totals, counts, pids = inspector.totals(), inspector.statistics().of_sources, inspector.processes()
                # in this order: the next look lists an entry again that arrives in between, and misses none
                latest = inspector.latest()
                arrivals = inspector.arrivals(self._first(now)[2]) if self._looks else []
                fetching = inspector.fetching()
        except (CacheFault, OSError) as error:
            # after an error, counters may be of another index: the window begins anew
            self._looks.clear()
            state, trouble = state_of(error, self._root)
            return Activity(self._root, state=state, trouble=trouble)
        self._looks.append((now, counts, latest))
        then, before, _ = self._first(now)
        lately: dict[str, Counts] = {}
        for namespace, count in counts.items():
            count = count.minus(before.get(namespace, Counts()))
            if count.reads > 0 or count.evictions > 0:
                lately[_named(namespace)] = lately.get(_named(namespace), Counts()).plus(count)
        order = sorted(lately, key=lambda name: -_size_of_reads(lately[name]))
        return Activity(
            self._root,
            now - then,
            reduce(Counts.plus, lately.values(), Counts()),
            {name: lately[name] for name in order},
            tuple(Process(pid, _command(pid)) for pid in pids),
            fetching,
            _by_array(arrivals),
            totals.size,
            totals.max_size,
        )

    def _first(self, now: float) -> tuple[float, dict[str, Counts], int]:
        """The look at the beginning of the window: the latest that is old enough, or the first one."""
        while len(self._looks) > 1 and self._looks[1][0] <= now - self._window:
            self._looks.popleft()
        return self._looks[0]


def _by_array(arrivals: Iterable[Arrival]) -> tuple[Fetched, ...]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for arrival in arrivals:
        array = _named(arrival.namespace), arrival.array
        count, size = found.get(array, (0, 0))
        found[array] = count + 1, size + arrival.size
    return tuple(sorted((Fetched(*array, *sums) for array, sums in found.items()), key=lambda each: -each.size))


def _named(namespace: str) -> str:
    return name_of(namespace) if namespace else OTHER_SOURCES


def _size_of_reads(counts: Counts) -> int:
    return counts.bytes_from_cache + counts.bytes_from_peers + counts.bytes_from_source


def _command(pid: int) -> str:
    """The name of a process; empty if the system does not tell."""
    with suppress(OSError), open(f"/proc/{pid}/comm", errors="replace") as file:
        return file.read(64).strip()
    return ""


# -- Figures for Prometheus, in its text format.

_COUNTERS: Final = {
    "hits": ("xzcache_source_hits_total", "Reads that the cache answered."),
    "misses": ("xzcache_source_misses_total", "Reads that the source answered."),
    "peer_hits": ("xzcache_source_peer_hits_total", "Reads that the cache of another node answered."),
    "bytes_from_cache": ("xzcache_source_from_cache_bytes_total", "Bytes read from the cache."),
    "bytes_from_peers": ("xzcache_source_from_peers_bytes_total", "Bytes read from the caches of other nodes."),
    "bytes_from_source": ("xzcache_source_from_source_bytes_total", "Bytes read from the source."),
    "seconds_saved": ("xzcache_source_saved_seconds_total", "Estimated wall-clock seconds saved on this machine."),
    "evictions": ("xzcache_source_evictions_total", "Entries that were evicted."),
    "refetched": ("xzcache_source_refetched_total", "Entries that were evicted and then fetched again."),
}
_GAUGES: Final = {
    "used": ("xzcache_node_used_bytes", "Bytes in the cache."),
    "max_size": ("xzcache_node_bound_bytes", "The most that the cache may hold."),
    "entries": ("xzcache_node_entries", "Entries in the cache."),
    "processes": ("xzcache_node_processes", "Processes that use the cache."),
    "disk_free": ("xzcache_node_disk_free_bytes", "Free bytes of the file system."),
    "disk_size": ("xzcache_node_disk_bytes", "All bytes of the file system."),
}


def metrics(directory: str | os.PathLike[str] | None = None) -> str:
    """The figures of a cache in the text format of Prometheus, by all processes and since there are statistics."""
    root = root_of(directory)
    found = info(root)
    lines = [
        "# HELP xzcache_up Whether the cache can be read.",
        "# TYPE xzcache_up gauge",
        f"xzcache_up {int(found.state == 'ok')}",
    ]
    if found.state != "ok":
        return "\n".join([*lines, ""])
    for name, (metric, meaning) in _GAUGES.items():
        if (value := getattr(found, name)) is not None:
            lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} gauge"]
            lines.append(f'{metric}{{node="{_label(found.node)}"}} {value}')
    for name, (metric, meaning) in _COUNTERS.items():
        lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} counter"]
        for namespace, counts in _counts(root).items():
            labels = f'node="{_label(found.node)}",source="{_label(namespace or OTHER_SOURCES)}"'
            lines.append(f"{metric}{{{labels}}} {getattr(counts, name)}")
    return "\n".join([*lines, ""])


def _counts(root: str) -> dict[str, Counts]:
    with suppress(CacheFault, OSError), Inspector(root) as inspector:
        return inspector.statistics().of_sources
    return {}


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def metrics_server(port: int, directory: str | os.PathLike[str] | None = None) -> ThreadingHTTPServer:
    """A server of `metrics` at ``/metrics`` that only this machine reaches; port 0 is any free one.

    Raises
    ------
    CacheUnavailable
        The port cannot be used; the message says why.
    """
    root = root_of(directory)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                self.send_error(404)
                return
            body = metrics(root).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        # only this machine: the page names sources and has no authentication
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "a port is a number from 0 to 65535"
        raise CacheUnavailable(f"port {port} of 127.0.0.1 cannot be used: {why}") from error
