"""Caches of a cluster: their contents and savings, one row for each node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from distributed import Client
from distributed.comm.core import CommClosedError

from xzcache._caches import default_directory
from xzcache._config import parse_seconds, shown_seconds, shown_size
from xzcache.dask._usage import Usage, exact_usage
from xzcache.directory import Counts, open_directory

if TYPE_CHECKING:
    from matplotlib.axes import Axes


logger = logging.getLogger("xzcache.dask")

_PEERS: Final = "from peers"
_COLUMNS: Final = (
    *("node", "hosts", "workers", "directory", "used", "bound", "entries", "hits", _PEERS, "misses", "saved"),
)


_ANSWER: Final = 10.0


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
    peer_hits: int = 0
    """Reads of the same workers that the caches of other nodes answered."""

    def _cells(self, *, shows_peers: bool) -> list[str]:
        bound = "-" if self.bound is None else shown_size(self.bound)
        # the price of a source may not be known yet, and a source on this machine may be as fast as the cache
        some_time = f", {shown_seconds(self.saved_seconds)}" if self.saved_seconds >= 0.0005 else ""
        saved = f"{shown_size(self.saved_bytes)}{some_time}"
        hosts, workers = ", ".join(self.hosts), str(len(self.workers))
        reads = (self.hits, *([self.peer_hits] if shows_peers else []), self.misses)
        counts = [f"{number:,}" for number in (self.entries, *reads)]
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

    def _rows(self) -> list[list[str]]:
        """The table, with its head; the column of peers only where there were any."""
        shows_peers = any(node.peer_hits for node in self.nodes)
        names = [name for name in _COLUMNS if shows_peers or name != _PEERS]
        return [names, *(node._cells(shows_peers=shows_peers) for node in self.nodes)]

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.unanswered:
            lines.append(f"no answer: {', '.join(self.unanswered)}")
        return "\n".join([f"<xzcache: {len(self)} node{'s' * (len(self) != 1)}>", *lines])

    def _repr_html_(self) -> str:
        names, *nodes = self._rows()
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in names)
        rows = ("".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in cells) for cells in nodes)
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
        reads = [max(node.hits + node.peer_hits + node.misses, 1) for node in self.nodes]
        hits = [100 * node.hits / total for node, total in zip(self.nodes, reads, strict=True)]
        fill = [100 * node.used / node.bound if node.bound else 0 for node in self.nodes]
        at = range(len(self))
        ax.barh([y + 0.2 for y in at], hits, height=0.35, label="reads from the cache")
        ax.barh([y - 0.2 for y in at], fill, height=0.35, label="of the bound used")
        ax.set(yticks=list(at), yticklabels=names, xlim=(0, 100), xlabel="%")
        ax.legend(loc="lower right")
        return ax


def cluster_info(client: Client, timeout: float = _ANSWER) -> ClusterInfo:
    """The contents and savings of the caches of all nodes of a cluster.

    Parameters
    ----------
    client : distributed.Client
        The client of a cluster whose workers have xzcache installed, with or without `CachePlugin`. The result of an
        asynchronous client must be awaited.
    timeout : float, optional
        Seconds to wait for each worker; all are asked at once. A worker that does not answer in time, for example
        because it is stopped, or that fails, which is logged, is listed in ``unanswered``.

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


def each_node(
    client: Client,
    function: Callable[..., Any],
    *args: Any,
    nodes: str | Collection[str] | None = None,
    timeout: float | None = None,
    **kwargs: Any,
) -> dict[Node, Any]:
    """Call a function once on each node of a cluster, such as `xzcache.clear`, `xzcache.check` and `xzcache.resize`.

    Parameters
    ----------
    client : distributed.Client
        As for `cluster_info`.
    function : callable
        It is called in one worker of each node, on all nodes at once, where the default cache is that of the node. If
        the worker leaves, another worker of the node is asked.
    *args, **kwargs
        Passed to the function.
    nodes : str or collection of str, optional
        Only these nodes: a host, the address of a worker, or the first characters of a node's uuid. Default is all.
    timeout : float, optional
        Seconds to wait for each node. Default is to wait as long as it takes.

    Returns
    -------
    dict
        The result of each `Node`. An exception is returned in the place of a result, so that one node that fails does
        not hide the others.

    Raises
    ------
    TypeError, ValueError
        A parameter is invalid, or there is no such node; the message names it.

    Examples
    --------
    >>> xzcache.dask.each_node(client, xzcache.clear, "era5")
    >>> xzcache.dask.each_node(client, xzcache.check, repair=True, nodes="10.0.0.7")
    """
    if not callable(function):
        raise TypeError(f"function={function!r} is not accepted: give a function, such as xzcache.clear")
    if not isinstance(client, Client):
        raise TypeError(f"client={client!r} is not accepted: give a distributed.Client")
    chosen = None if nodes is None else (nodes,) if isinstance(nodes, str) else tuple(nodes)
    limit = None if timeout is None else parse_seconds("timeout", timeout)
    sync: Callable[..., dict[Node, Any]] = client.sync
    return sync(_called, client, function, args, kwargs, chosen, limit)


async def _called(
    client: Client,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    chosen: tuple[str, ...] | None,
    timeout: float | None,
) -> dict[Node, Any]:
    info = await _asked(client, _ANSWER)
    found = {}
    for name in chosen or ():
        found[name] = [node for node in info if name in (*node.hosts, *node.workers) or node.node.startswith(name)]
        if not name or not found[name]:
            known = ", ".join(f"{node.node[:8]} ({', '.join(node.hosts)})" for node in info)
            raise ValueError(f"nodes={name!r} is not accepted: give a host, a worker, or the start of an id: {known}")
    nodes = list(info) if chosen is None else [node for node in info if any(node in each for each in found.values())]
    calls = (_call(client, node, function, args, kwargs, timeout) for node in nodes)
    results: dict[Node, Any] = dict(zip(nodes, await asyncio.gather(*calls), strict=True))
    if chosen is None:
        for address in info.unanswered:
            nobody = Node("", (), (address,), "", 0, None, 0, 0, 0, 0, 0.0)
            results[nobody] = TimeoutError(f"{address} does not answer")
    return results


async def _call(
    client: Client,
    node: Node,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout: float | None,
) -> Any:
    """The result on one node, or the error."""
    answer: Any = None
    for worker in node.workers:
        answers = client.run(_in_thread, function, args, kwargs, workers=[worker], on_error="return")
        try:
            answer = (await asyncio.wait_for(answers, timeout))[worker]
        except TimeoutError:
            # without a limit of ours, that of Dask's connections
            within = "" if timeout is None else f" within {timeout:g} s"
            return TimeoutError(f"{worker} does not answer{within}")
        except KeyError:
            answer = OSError(f"{worker} has left")
        except Exception as error:
            # such as a result that cannot be pickled
            answer = error
        # a worker that has just left may still be known to the scheduler, but its connection is closed
        has_left = isinstance(answer, CommClosedError) or worker not in (await _workers(client))
        if not (isinstance(answer, OSError) and has_left):
            break
    return answer


async def _in_thread(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Not on the event loop, where the worker could not answer while it reads a whole cache."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def _workers(client: Client) -> dict[str, Any]:
    scheduler: Any = client.scheduler
    workers: dict[str, Any] = (await scheduler.identity())["workers"]
    return workers


async def _asked(client: Client, timeout: float) -> ClusterInfo:
    scheduler: Any = client.scheduler
    info = await _workers(client)
    # the index of a node remembers the counts of workers that have ended
    events = await scheduler.events(topic="xzcache")
    processes = sorted({event["process"] for _, event in events if isinstance(event, dict) and "process" in event})
    answers = await asyncio.gather(*(_ask(client, address, timeout, processes) for address in info))
    hosts = {address: worker["host"] for address, worker in info.items()}
    found = dict(zip(info, answers, strict=True))
    if any(isinstance(answer, BaseException) for answer in answers):
        # a worker that left meanwhile, or was killed, is no longer in the list
        there = await _workers(client)
        found = {address: answer for address, answer in found.items() if address in there}
    return _gathered(hosts, found)


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
    silent: list[str] = []
    for address, seen in found.items():
        if seen is None:
            silent.append(address)
            continue
        if isinstance(seen, BaseException):
            # the scheduler may still know a worker that has left
            if not isinstance(seen, CommClosedError):
                logger.warning("%s does not tell of its cache: %s: %s", address, type(seen).__name__, seen)
                silent.append(address)
            continue
        node = (seen.node,) if seen.node else ("", hosts.get(address, address), seen.directory)
        by_node.setdefault(node, {})[address] = seen
    nodes = tuple(_node(name, workers, hosts) for (name, *_), workers in sorted(by_node.items()))
    return ClusterInfo(nodes, tuple(silent))


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
        peer_hits=sum(each.peer_hits for each in counted),
    )
