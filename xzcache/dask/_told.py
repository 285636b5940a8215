"""What the scheduler has told a worker: the nodes that may be asked, and what is stale in their caches.

A node that the scheduler could not tell has not heard from it for as long as a *lease*, and is silent as well.

State: the nodes and the stale paths. They change on the worker's event loop only, one look after the other; they are
replaced as a whole, so that any thread reads them without a lock.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache.dask._affinity import Nodes

if TYPE_CHECKING:
    from distributed.worker import Worker

    from xzcache.dask._usage import Gauge
    from xzcache.directory import CacheDirectory


logger = logging.getLogger("xzcache.dask")

LEASE: Final = 10.0
"""Seconds for which a node believes what the scheduler has told it last."""
_BEAT: Final = 0.5
"""Seconds between two looks at what the scheduler knows; longer in large clusters, as Dask's own heartbeats."""
_GREETING: Final = 5.0
"""Seconds for which a connection that nobody waits for is opened."""
_FEW: Final = 64
"""Up to so many workers are connected to in advance."""
_STEP: Final = 0.1
"""Seconds by which the clocks of a node may disagree before times of files are not believed."""

_INDICES: Final = re.compile(r"(?:^|/)(?:c[/.])?(\d+(?:[./]\d+)*)$")


def block_of(key: str) -> str:
    """The block that a chunk's key names, as affinity names it."""
    found = _INDICES.search(key)
    return key if found is None else found[1].replace("/", ".")


class Since(NamedTuple):
    """When this node was told that entries are stale: older ones are not given to others."""

    steady: float
    """First, as it tells which of two was later, whatever is done to the clock."""
    wall: float

    def is_before(self, stored: float | None) -> bool:
        """Whether an entry was stored after that, for certain."""
        steps = abs((time.time() - self.wall) - (time.monotonic() - self.steady))
        return stored is not None and steps < _STEP and stored > self.wall + _STEP


class Told:
    """What one worker was told."""

    def __init__(self, worker: Worker, directory: CacheDirectory, gauge: Gauge) -> None:
        self._worker, self._directory, self._gauge = worker, directory, gauge
        self._node = gauge.read().node
        self._nodes = Nodes()
        self._elders: frozenset[str] = frozenset()
        """The nodes that joined before this one: they have cached the share that is now this node's."""
        self._version, self._heard = -1, (-LEASE, -LEASE)
        self._cluster, self.has_ended = "", False
        self._stale: dict[str, Since | None] = {}
        """The paths whose entries another node has found to be stale; None while they are being written."""
        self._failed: dict[str, bool] = {}
        """Of these, the paths with which this node could not begin anew; none of them is being written."""
        self._looking = asyncio.Lock()
        self._greetings: set[asyncio.Future[None]] = set()

    @property
    def is_valid(self) -> bool:
        """Whether what the scheduler told last may still be believed."""
        steady, wall = self._heard
        # one clock stands still while the machine sleeps, the other may be set
        return not self.has_ended and time.monotonic() < steady + LEASE and time.time() < wall + LEASE

    @property
    def known(self) -> int:
        """How many other nodes may be asked."""
        return max(0, len(self._nodes) - 1) if self.is_valid else 0

    @property
    def beat(self) -> float:
        """The seconds until the scheduler should be asked again."""
        return _BEAT + len(self._nodes) / 200

    # -- on the worker's event loop

    async def look(self) -> int:
        """Ask the scheduler what has changed; returns up to where this node knows it."""
        # one after the other: what was told first must not be applied last
        async with self._looking:
            sent = time.monotonic(), time.time()
            bound = self._gauge.read().bound
            ask = self._worker.scheduler.xzcache_peers(
                worker=self._worker.address, node=self._node, bound=bound, known=self._version
            )
            told = await asyncio.wait_for(ask, LEASE)
            if told["cluster"] != (self._cluster or told["cluster"]):
                raise RuntimeError("another scheduler does not know what the nodes have learned")
            stale, news = dict(self._stale), dict(told["stale"])
            if "" in news:
                # it covers all that was told before; paths that are being written are told with it
                stale.clear()
            else:
                news = self._failed | news
            failed: dict[str, bool] = {}
            for path, is_written in news.items():
                # after one failure, the others would wait for the index as well
                stale[path] = None if is_written or failed else await self._distrusted(path)
                if stale[path] is None and not is_written:
                    failed[path] = False
            self._stale, self._failed = stale, failed
            if told["nodes"] is not None:
                self._see(told["nodes"])
            self._cluster, self._version, self._heard = told["cluster"], told["version"], sent
            return self._version

    async def leave(self) -> None:
        """Have the scheduler tell the others not to ask this worker any more."""
        # the last that the scheduler hears; a look may wait for a disk that hangs
        async with asyncio.timeout(LEASE), self._looking:
            await self._worker.scheduler.xzcache_peers(worker=self._worker.address, node="", bound=None, known=0)

    def end(self) -> None:
        """Believe nothing of it any more."""
        self.has_ended = True

    async def _distrusted(self, path: str) -> Since | None:
        """Store nothing that was requested before now; None if that fails."""
        try:
            # in a thread of the worker's: those of this package may be waiting for this very answer
            await asyncio.to_thread(self._directory.writes.distrust, path)
        except Exception as error:
            logger.debug("nothing beneath %s is given to other nodes: %s", path, error)
            return None
        return Since(time.monotonic(), time.time())

    def _see(self, members: dict[str, tuple[str, int | None]]) -> None:
        """Note which nodes there are."""
        nodes = Nodes()
        for address, (node, bound) in members.items():
            nodes.add(address, node, bound)
        # sorted before any thread sees it
        nodes.choose(())
        self._nodes = nodes
        # in the order in which they joined
        names = list(dict.fromkeys(node for node, _ in members.values()))
        self._elders = frozenset(names[: names.index(self._node)] if self._node in names else ())
        if len(members) <= _FEW:
            # it takes a moment to connect, which the first question would wait for
            others = [address for address, (node, _) in members.items() if node != self._node]
            self._greetings = {asyncio.ensure_future(self._greet(address)) for address in others}

    async def _greet(self, address: str) -> None:
        with suppress(Exception):
            await asyncio.wait_for(self._worker.rpc(address).echo(data=""), _GREETING)

    # -- on any thread

    def owns(self, key: str) -> bool:
        """Whether this node is the one that others ask for a chunk."""
        choice = self._nodes.choice(block_of(key))
        return choice is not None and choice.first == self._node

    def workers_for(self, key: str) -> list[str]:
        """The workers that may be asked for a chunk; none if no other node owns it or has owned it."""
        nodes, choice = self._nodes, self._nodes.choice(block_of(key))
        if choice is None:
            return []
        # a node that has just joined owns blocks that were those of their second choice until then
        owner = choice.second if choice.first == self._node else choice.first
        if owner == self._node or (choice.first == self._node and owner not in self._elders):
            return []
        scheme = self._worker.address.partition("://")[0]
        return sorted(address for address in nodes.workers(owner) if address.startswith(f"{scheme}://"))

    def stale_since(self, full: str) -> Since | tuple[()] | None:
        """Since when an entry is not given to others if it is older; None if it is not given at all."""
        latest: Since | tuple[()] = ()
        stale = self._stale
        for path in _paths_above(full) if stale else ():
            since = stale.get(path, ())
            if since is None:
                return None
            latest = max(latest, since)
        return latest


async def look_no_more() -> int:
    """Answer the scheduler for a worker that has left: it knows of nothing, but its lease ends."""
    return -1


def _paths_above(full: str) -> list[str]:
    """A key, and all paths that it lies beneath; the empty one is the whole cache."""
    parts = full.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) + 1)]
