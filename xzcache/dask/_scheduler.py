"""The scheduler's side of the plugin: settings that clients have given, and caches that share a machine."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any, Final

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import Scheduler

from xzcache.dask._affinity import Affinity, Mode, Nodes
from xzcache.dask._told import LEASE

logger = logging.getLogger("xzcache.dask")


_MOST_STALE: Final = 10_000
_SOON: Final = 1.0
"""Seconds to wait for a node before it is asked again."""
_LATE: Final = 60.0
"""Seconds for which a worker that was killed may still be writing."""


class _Member:
    """A worker that asks others, and answers."""

    def __init__(self, node: str, bound: int | None) -> None:
        self.node, self.bound = node, bound
        self.has_left = False
        self.heard = time.monotonic()
        """When it was last told what has changed."""
        self.known = -1
        """The version that it has certainly been told."""

    def is_late(self, version: int) -> bool:
        """Whether it may act as before a version."""
        return self.known < version and time.monotonic() < self.heard + LEASE


class _Stale:
    """What nodes have beneath a path is stale."""

    def __init__(self) -> None:
        self.version = 0
        self.state = ""
        self.writers: dict[str, object] = {}
        """Each with a mark of when it last told of a begin: a worker that is restarted may have the same address."""


class ClusterPlugin(SchedulerPlugin):
    """Keeps what the cluster has in common; the plugin of each worker registers it.

    Dask keeps the plugin of workers as bytes that only the latest client has chosen. Here, the settings of all clients
    are merged, so that workers which join later get the same.
    """

    name = "xzcache-cluster"
    idempotent = True

    def __init__(self) -> None:
        self._scheduler: Scheduler | None = None
        self._nodes = Nodes()
        self._affinity: Affinity | None = None
        self._known: dict[str, dict[str, Any]] = {}
        self._machines: dict[str, dict[str, str]] = {}
        self._warned: set[str] = set()
        self._members: dict[str, _Member] = {}
        self._stale: dict[str, _Stale] = {}
        self._version = self._changed = 0
        self._id = uuid.uuid4().hex

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    async def start(self, scheduler: Scheduler) -> None:
        """Answer the questions of workers."""
        self._scheduler = scheduler
        scheduler.handlers |= {
            "xzcache_join": self._join,
            "xzcache_leave": self._leave,
            "xzcache_placed": self._placed,
            "xzcache_peers": self._peers,
            "xzcache_stale": self._mark_stale,
        }

    async def _join(
        self, plugin: str, registration: str, given: dict[str, Any], configured: dict[str, Any]
    ) -> dict[str, Any]:
        """The settings that all clients have given to the plugin of this name, with those of a new registration."""
        known = self._known.get(plugin)
        if known is None:
            known = self._known[plugin] = {"registration": registration, "given": given, "configured": configured}
        elif known["registration"] != registration:
            known |= {"registration": registration, "given": {**known["given"], **given}}
        self._switch()
        return {"given": known["given"], "configured": known["configured"]}

    async def _leave(self) -> None:
        """Forget the settings of plugins that were unregistered."""
        if self._scheduler is not None:
            for name in self._known.keys() - self._scheduler.worker_plugins.keys():
                del self._known[name]
        self._switch()

    def _switch(self) -> None:
        """Begin or end with affinity, as the latest plugin of workers has it that gives it."""
        given = {name: value for known in self._known.values() for name, value in known["given"].items()}
        mode: Mode = given.get("affinity", "off")
        has_peers = given.get("peers", "off") == "on"
        now = ("off", has_peers) if self._affinity is None else (self._affinity.asked, self._affinity.has_peers)
        if self._scheduler is None or now == (mode, has_peers):
            return
        if self._affinity is not None:
            self._scheduler.remove_plugin(self._affinity.name)
            self._affinity = None
        if mode != "off":
            self._affinity = Affinity(self._scheduler, self._nodes, mode, has_peers=has_peers)
            self._scheduler.add_plugin(self._affinity, name=self._affinity.name)

    async def _placed(self) -> dict[str, int]:
        """How many tasks that read blocks were sent to the nodes that these prefer, and how many elsewhere."""
        return {} if self._affinity is None else self._affinity.placed()

    def log_event(self, topic: str, msg: Any) -> None:
        """Note where a worker has its cache, and that it has ended."""
        if topic != "xzcache" or not isinstance(msg, dict):
            return
        if msg.get("has_left"):
            self._leaves(msg.get("worker", ""), has_ended=True)
        if msg.get("node") and msg.get("worker"):
            self._machines.setdefault(msg.get("machine", ""), {})[msg["worker"]] = msg["node"]
            self._check(msg.get("machine", ""))
            self._nodes.add(msg["worker"], msg["node"], msg.get("bound"))

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Forget a worker that has left."""
        self._nodes.remove(worker)
        self._leaves(worker)
        for path in [path for path, each in self._stale.items() if worker in each.writers]:
            self._end_late(path, worker)
        for workers in self._machines.values():
            workers.pop(worker, None)

    # -- peers

    def _leaves(self, worker: str, *, has_ended: bool = False) -> None:
        if (member := self._members.get(worker)) is not None:
            member.has_left = True
            if has_ended:
                del self._members[worker]
            # else it may still ask others, until its lease ends
            self._members_changed()

    def _members_changed(self) -> None:
        over = time.monotonic() - LEASE
        self._members = {name: each for name, each in self._members.items() if not each.has_left or each.heard > over}
        self._version += 1
        self._changed = self._version

    async def _peers(self, worker: str, node: str, bound: int | None, known: int) -> dict[str, Any]:
        """The nodes that may be asked and the stale paths, as far as they have changed since the version `known`."""
        assert self._scheduler is not None
        member = self._members.get(worker)
        if not node:
            self._leaves(worker, has_ended=True)
            return {}
        if not self._members:
            # what the nodes have cached before may be older than writes that nobody was told of
            self._distrust_everything()
        if member is None or member.has_left or (member.node, member.bound) != (node, bound):
            member = self._members[worker] = _Member(node, bound)
            member.has_left = worker not in self._scheduler.workers
            if not member.has_left:
                # the bound may have been changed
                self._nodes.add(worker, node, bound)
            self._members_changed()
        member.heard, member.known = time.monotonic(), known
        nodes = {address: (each.node, each.bound) for address, each in self._members.items() if not each.has_left}
        # if everything is stale, the answer has all paths that are being written as well
        oldest = -1 if "" in self._stale and self._stale[""].version > known else known
        stale = [(path, bool(each.writers)) for path, each in self._stale.items() if each.version > oldest]
        return {
            "cluster": self._id,
            "version": self._version,
            "nodes": nodes if self._changed > known else None,
            "stale": stale,
        }

    async def _mark_stale(self, worker: str, path: str, is_written: bool | None, state: str = "") -> None:
        """Note that what nodes have beneath a path is stale, and that a worker writes there or has ended to.

        Returns once no node gives it to another one.
        """
        assert self._scheduler is not None
        found = self._stale.get(path)
        if is_written is None and found is not None and not found.writers and state and found.state == state:
            # another node has found the same
            await self._agreed(found.version)
            return
        if found is None:
            self._forget()
            found = self._stale[path] = _Stale()
        was_written = bool(found.writers)
        if is_written:
            found.writers[worker] = object()
            if worker not in self._scheduler.workers:
                # it was removed before
                self._end_late(path, worker)
        elif is_written is False:
            # though its begin was not heard
            mark = found.writers[worker] = object()
            self._end_writes(path, worker, mark)
            return
        if not was_written:
            self._version += 1
            found.version, found.state = self._version, state
        await self._agreed(found.version)

    def _forget(self) -> None:
        """Replace the stale paths by the whole cache, once they are too many to remember."""
        if len(self._stale) >= _MOST_STALE:
            self._distrust_everything()

    def _distrust_everything(self) -> None:
        self._stale = {path: each for path, each in self._stale.items() if each.writers}
        self._version += 1
        everything = self._stale[""] = _Stale()
        everything.version = self._version

    def _end_late(self, path: str, worker: str) -> None:
        """End the writes of a worker that has left, whose last one may still be on the way to the source."""
        assert self._scheduler is not None
        mark = self._stale[path].writers[worker]
        self._scheduler.loop.call_later(_LATE, self._end_writes, path, worker, mark)

    def _end_writes(self, path: str, worker: str, mark: object) -> None:
        found = self._stale.get(path)
        if found is not None and found.writers.get(worker) is mark:
            del found.writers[worker]
            if not found.writers:
                self._version += 1
                found.version, found.state = self._version, ""

    async def _agreed(self, version: int) -> None:
        """Wait until all nodes know of a version, or have no lease."""
        assert self._scheduler is not None
        while late := [(address, each) for address, each in self._members.items() if each.is_late(version)]:
            asked = [asyncio.ensure_future(self._tell(address, each)) for address, each in late if not each.has_left]
            if asked:
                await asyncio.wait(asked, timeout=_SOON)
                for task in asked:
                    task.cancel()
            if any(each.is_late(version) for _, each in late):
                await asyncio.sleep(_SOON / 10)

    async def _tell(self, address: str, member: _Member) -> None:
        """Have a node ask what has changed."""
        assert self._scheduler is not None
        try:
            member.known = max(member.known, await self._scheduler.rpc(address).xzcache_look())
        except Exception as error:
            logger.debug("%s does not answer: %s", address, error)

    def _check(self, machine: str) -> None:
        """Warn once of a machine whose workers have several caches."""
        workers = self._machines[machine]
        if machine and machine not in self._warned and len(set(workers.values())) > 1 and self._scheduler is not None:
            self._warned.add(machine)
            first: dict[str, str] = {}
            for worker, node in workers.items():
                first.setdefault(node, worker)
            message = (
                f"workers of one machine have {len(first)} caches (one each of {', '.join(first.values())}): what one "
                "has fetched, the others fetch again; give them one directory that all of them see"
            )
            logger.warning(message)
            self._scheduler.log_event("warn", message)
