"""Caches of a cluster: their contents and savings, one row for each node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dask.utils import format_time
from distributed import Client

from xzcache._caches import default_directory
from xzcache._config import parse_seconds, shown_size
from xzcache.dask._usage import Usage, exact_usage
from xzcache.directory import Counts, open_directory

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COLUMNS: Final = ("node", "hosts", "workers", "directory", "used", "bound", "entries", "hits", "misses", "saved")


class Node(NamedTuple):
    """One node: all workers that share a cache directory. Sizes in bytes, times in seconds."""

    node: str
    """The uuid of the cache directory; empty if it is unusable."""
    hosts: tuple[str, ...]
    workers: tuple[str, ...]
    """Addresses."""
    directory: str
    used: int
    bound: int | None
    entries: int
    hits: int
    misses: int
    """Hits and misses are those of all workers of the cluster with `CachePlugin`, also of those that have ended."""
    saved_bytes: int
    """Bytes that these workers read from the cache instead of from the source."""
    saved_seconds: float
    """An estimate of the wall-clock time by which the reads of the node would have taken longer without the cache.

    It comes from the remembered price of the source. Parallel reads save their time once.
    """
    ever: Counts = Counts()
    """The reads by all processes of the node, since the cache has statistics."""

    def _cells(self) -> list[str]:
        bound = "-" if self.bound is None else shown_size(self.bound)
        seconds = format_time(self.saved_seconds) if self.saved_seconds else "0 s"
        saved = f"{shown_size(self.saved_bytes)}, {seconds}"
        hosts, workers = ", ".join(self.hosts), str(len(self.workers))
        counts = [f"{number:,}" for number in (self.entries, self.hits, self.misses)]
        return [self.node[:8] or "-", hosts, workers, self.directory, shown_size(self.used), bound, *counts, saved]


@dataclass(frozen=True)
class ClusterInfo(Sequence[Node]):
    """The caches of a cluster: a sequence of `Node`, which shows itself as a table."""

    nodes: tuple[Node, ...]
    unanswered: tuple[str, ...] = ()
    """Addresses of workers that did not answer in time, whose reads no row counts."""

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, index: Any) -> Any:
        return self.nodes[index]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __repr__(self) -> str:
        rows = [list(_COLUMNS), *(node._cells() for node in self.nodes)]
        widths = [max(len(row[at]) for row in rows) for at in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.unanswered:
            lines.append(f"no answer: {', '.join(self.unanswered)}")
        return "\n".join([f"<xzcache: {len(self)} node{'s' * (len(self) != 1)}>", *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in _COLUMNS)
        rows = ("".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in node._cells()) for node in self)
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        foot = f"<p>no answer: {escape(', '.join(self.unanswered))}</p>" if self.unanswered else ""
        return f"<table class='xzcache'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{foot}"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars of each node's reads from the cache and from the source, and of the used space.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            The axes to draw on; default is a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            matplotlib is not installed.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 0.6 + 0.6 * len(self)), layout="constrained")
        names = [f"{node.node[:8]} ({', '.join(node.hosts)})" for node in self.nodes]
        reads = [max(node.hits + node.misses, 1) for node in self.nodes]
        hits = [100 * node.hits / total for node, total in zip(self.nodes, reads, strict=True)]
        fill = [100 * node.used / node.bound if node.bound else 0 for node in self.nodes]
        at = range(len(self))
        ax.barh([y + 0.2 for y in at], hits, height=0.35, label="reads from the cache")
        ax.barh([y - 0.2 for y in at], fill, height=0.35, label="of the bound used")
        ax.set(yticks=list(at), yticklabels=names, xlim=(0, 100), xlabel="%")
        ax.legend(loc="lower right")
        return ax


def cluster_info(client: Client, timeout: float = 10.0) -> ClusterInfo:
    """The contents and savings of the caches of all nodes of a cluster.

    Parameters
    ----------
    client : distributed.Client
        The client of a cluster whose workers have xzcache installed, with or without `CachePlugin`. The result of an
        asynchronous client must be awaited.
    timeout : float, optional
        Seconds to wait for each worker; all are asked at once. A worker that does not answer in time, for example
        because it is stopped, is listed in ``unanswered``.

    Returns
    -------
    ClusterInfo
        One `Node` for each cache directory, for any number of workers that share it.

    Raises
    ------
    TypeError, ValueError
        A parameter is invalid; the message names it.
    """
    if not isinstance(client, Client):
        raise TypeError(f"client={client!r} is not accepted: give a distributed.Client")
    sync: Callable[..., ClusterInfo] = client.sync
    return sync(_asked, client, parse_seconds("timeout", timeout))


async def _asked(client: Client, timeout: float) -> ClusterInfo:
    scheduler: Any = client.scheduler
    info = (await scheduler.identity())["workers"]
    # the index of a node remembers the counts of workers that have ended
    events = await scheduler.events(topic="xzcache")
    processes = sorted({event["process"] for _, event in events if "process" in event})
    answers = await asyncio.gather(*(_ask(client, address, timeout, processes) for address in info))
    hosts = {address: worker["host"] for address, worker in info.items()}
    return _gathered(hosts, dict(zip(info, answers, strict=True)))


async def _ask(client: Client, worker: str, timeout: float, processes: list[str]) -> Usage | BaseException | None:
    """The usage that one worker sees, or the error instead; None if it did not answer in time."""
    try:
        # not one request for all workers, because that ends when the slowest has answered
        answers = client.run(_usage_here, processes, workers=[worker], on_error="return")
        answer: Usage | BaseException = (await asyncio.wait_for(answers, timeout))[worker]
    except TimeoutError:
        return None
    return answer


def _gathered(hosts: dict[str, str], found: dict[str, Usage | BaseException | None]) -> ClusterInfo:
    by_node: dict[tuple[str, ...], dict[str, Usage]] = {}
    for address, seen in found.items():
        if seen is None:
            continue
        if isinstance(seen, OSError):
            # it left, or was killed, while it was asked
            continue
        if isinstance(seen, BaseException):
            raise seen
        node = (seen.node,) if seen.node else ("", hosts.get(address, address), seen.directory)
        by_node.setdefault(node, {})[address] = seen
    nodes = tuple(_node(name, workers, hosts) for (name, *_), workers in sorted(by_node.items()))
    return ClusterInfo(nodes, tuple(address for address, seen in found.items() if seen is None))


def _usage_here(processes: list[str]) -> Usage:
    """The usage of this process, and of processes of the cluster that have ended."""
    return exact_usage(open_directory(default_directory()), processes)


def _node(name: str, workers: dict[str, Usage], hosts: dict[str, str]) -> Node:
    # several workers may be threads of one process, which counts for all of them
    processes = {seen.process: seen for seen in workers.values()}.values()
    latest = next(iter(workers.values()))
    running = {process.process for process in processes}
    ended = {process: counts for process, counts in latest.ended if process not in running}.values()
    counted: list[Usage | Counts] = [*processes, *ended]
    where = tuple(sorted({hosts.get(address, address) for address in workers}))
    facts = (latest.directory, latest.used, latest.bound, latest.entries)
    return Node(
        name,
        where,
        tuple(sorted(workers)),
        *facts,
        hits=sum(each.hits for each in counted),
        misses=sum(each.misses for each in counted),
        saved_bytes=sum(each.bytes_from_cache for each in counted),
        saved_seconds=sum(each.seconds_saved for each in counted),
        ever=max((seen.ever for seen in workers.values()), key=lambda ever: ever.reads),
    )
