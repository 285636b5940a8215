"""The scheduler's side of the plugin: settings that clients have given, and caches that share a machine."""

from __future__ import annotations

import logging
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import Scheduler

from xzcache.dask._affinity import Affinity, Mode, Nodes

logger = logging.getLogger("xzcache.dask")


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
        modes = [known["given"]["affinity"] for known in self._known.values() if "affinity" in known["given"]]
        mode: Mode = modes[-1] if modes else "off"
        if self._scheduler is None or mode == ("off" if self._affinity is None else self._affinity.asked):
            return
        if self._affinity is not None:
            self._scheduler.remove_plugin(self._affinity.name)
            self._affinity = None
        if mode != "off":
            self._affinity = Affinity(self._scheduler, self._nodes, mode)
            self._scheduler.add_plugin(self._affinity, name=self._affinity.name)

    async def _placed(self) -> dict[str, int]:
        """How many tasks that read blocks were sent to the nodes that these prefer, and how many elsewhere."""
        return {} if self._affinity is None else self._affinity.placed()

    def log_event(self, topic: str, msg: Any) -> None:
        """Note where a worker has its cache."""
        if topic == "xzcache" and isinstance(msg, dict) and msg.get("node") and msg.get("worker"):
            self._machines.setdefault(msg.get("machine", ""), {})[msg["worker"]] = msg["node"]
            self._check(msg.get("machine", ""))
            self._nodes.add(msg["worker"], msg["node"], msg.get("bound"))

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Forget a worker that has left."""
        self._nodes.remove(worker)
        for workers in self._machines.values():
            workers.pop(worker, None)

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
