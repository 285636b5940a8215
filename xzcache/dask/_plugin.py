"""Dask integration: one cache for all workers of a node, and its figures in Dask's displays.

``client.register_plugin(xzcache.CachePlugin(...))``, or ``dask worker --preload xzcache.dask`` and ``dask scheduler
--preload xzcache.dask``.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

import dask
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin
from distributed.protocol.pickle import dumps
from distributed.scheduler import Scheduler
from distributed.worker import Worker

from xzcache import _config as settings
from xzcache._caches import default_directory
from xzcache._config import DEFAULTS, allowed, config
from xzcache.dask import _usage as metering
from xzcache.dask._affinity import Mode
from xzcache.dask._peers import Asking, Neighbours
from xzcache.dask._scheduler import ClusterPlugin
from xzcache.dask._usage import Gauge, Usage
from xzcache.directory import Medium, medium_of, open_directory, private_name, temporary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from os import PathLike

    from xzcache._config import Age, PolicyName, Revalidate, Upstream
    from xzcache.dask._prometheus import Exporter
    from xzcache.directory import CacheDirectory


logger = logging.getLogger("xzcache.dask")
# beneath that of Dask's workers: `Client.get_worker_logs` has its lines, and `silence_logs` silences it
_log = logging.getLogger("distributed.worker.xzcache")

_PARSERS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "max_size": settings.parse_bound,
    "min_free": settings.parse_min_free,
    "max_age_seconds": settings.parse_age,
    "missing_max_age_seconds": settings.parse_age,
    "revalidate": settings.parse_revalidate,
    "cache_set_data": settings.parse_flag,
    "policy": settings.parse_policy,
    "upstream": settings.parse_upstream,
    "pipeline": settings.parse_flag,
    "promote_above": settings.parse_size,
    "fetch_timeout": settings.parse_seconds,
    "lock_timeout": settings.parse_seconds,
    "peer_timeout": settings.parse_seconds,
    "threads": settings.parse_threads,
}
_COUNTED: Final = (
    *("hits", "misses", "peer_hits", "peer_misses"),
    *("bytes_from_cache", "bytes_from_peers", "bytes_from_source", "seconds_saved"),
)
"""The counts of a process, which one of its workers shows."""
_SHARED: Final = ("used", "bound")
"""The sizes of a node, which one of its workers shows, so that sums over workers are right."""
_PROCESS: Final = "xzcache_process"
_OF_PROMETHEUS: Final = "prometheus"


def _parse_affinity(value: Any) -> Mode:
    if value not in get_args(Mode):
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f'affinity={value!r} is not accepted: give "off", "auto" or "on"')
    mode: Mode = value
    return mode


def _parse_peers(value: Any) -> Asking:
    if value not in get_args(Asking):
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f'peers={value!r} is not accepted: give "off" or "on"')
    asking: Asking = value
    return asking


class _Setup(NamedTuple):
    """The settings that a plugin has applied to one worker."""

    place: str
    settings: dict[str, Any]
    gauge: Gauge
    remove_on_close: bool
    peers: Neighbours | None = None


class _Process:
    """The configuration and the exporter that all plugins of a process share."""

    def __init__(self) -> None:
        self._setups: list[_Setup] = []
        self.shown: dict[str, Gauge] = {}
        """The gauge that each worker of this process shows, by the worker's id."""
        self._before: dict[str, Any] = {}
        self._exporter: Exporter | None = None

    def add(self, setup: _Setup) -> None:
        if not self._setups:
            # from before the first plugin, so that the last one to leave can restore it
            self._before = {name: config.get(name) for name in DEFAULTS}
        self._setups.append(setup)
        metering.begin()
        self._apply()

    def remove(self, setup: _Setup) -> None:
        self._setups.remove(setup)
        metering.end()
        self._apply()

    def configured(self) -> dict[str, Any]:
        """The configuration without the settings of the plugins in this process."""
        found = {name: config.get(name) for name in DEFAULTS}
        if self._setups:
            latest = self._setups[-1]
            ours = {**latest.settings, "directory": latest.place}
            found |= {name: self._before[name] for name, value in ours.items() if found[name] == value}
        return found

    def uses(self, place: str) -> bool:
        return any(setup.place == place for setup in self._setups)

    def _apply(self) -> None:
        """Apply the settings of the latest plugin."""
        # closed first: Prometheus refuses a second collector with the same names
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None
        # plugins may leave in any order, so the settings are applied anew from the beginning
        config.set(dict(self._before))
        if self._setups:
            latest = self._setups[-1]
            config.set({**latest.settings, "directory": latest.place})
            self._exporter = _exporter(latest.gauge)


_process: Final = _Process()
_warned: Final[set[str]] = set()
_preloaded: Final[dict[str, dict[str, Any]]] = {}
"""The settings that the preload of each worker in this process has found."""


class CachePlugin(WorkerPlugin):
    """Gives every worker of a cluster the cache of its node as the default cache.

    Workers that join or restart later get it as well. A second registration, by this or another client, changes the
    parameters that it gives, and nothing else.

    Parameters
    ----------
    directory : str or Path, optional
        The cache directory of a node. Default is the configured one of the client, else of the worker, else this user's
        folder in Dask's ``temporary-directory`` or in the system's.
    max_size : int or str, optional
        The bound of the whole cache of a node, in bytes or as ``"200 GB"``. If it is neither given nor configured, a
        directory keeps its bound.
    remove_on_close : bool, optional
        Whether the last worker of a node that closes normally deletes the cache, if no other process uses it and no
        write to a source is under way. A restart of all workers deletes it too. Default is False.
    affinity : {"off", "auto", "on"}, optional
        Whether the scheduler prefers, for a task that reads a block of an array, the node that reads this block each
        time. ``"auto"``: where the scheduler's queue stays in use, so that workers hold few chunks in memory. ``"on"``:
        also where Dask queues nothing (``worker-saturation: inf``). Default is ``"off"``.
    peers : {"off", "on"}, optional
        Whether a node that lacks a chunk asks the node that owns it before the source, so that the cluster requests
        each chunk once. Default is ``"off"``.
    min_free : float or str, optional
        The free space to leave on the file system of each node: ``"5%"``, a fraction below 1, or a size.
    max_age_seconds : float or "infinity", optional
        How long an entry is served without revalidation, in seconds.
    missing_max_age_seconds : float or "infinity", optional
        How long a missing chunk is not requested again, in seconds.
    revalidate : {"open", "strict", True, False} or float, optional
        When metadata documents are asked for again.
    cache_set_data : bool, optional
        Whether values that are written through the cache are cached.
    policy : {"lru", "adaptive", "none"}, optional
        Which entries are evicted first.
    upstream : {"auto", "obstore", "fsspec"}, optional
        The library that reads URLs.
    pipeline : bool, optional
        Whether xzcache's codec pipeline reads arrays over a `CacheStore`.
    promote_above : int or str, optional
        Bytes read in ranges of one object after which the object is fetched whole.
    fetch_timeout, lock_timeout : float, optional
        Seconds to wait for another process's fetch of the same object, and for the lock on the index.
    peer_timeout : float, optional
        Seconds without a sign of life from another node after which the source is asked.
    threads : int, optional
        Threads of a worker that read large entries and write new ones.

    Raises
    ------
    ValueError, TypeError
        A parameter is invalid; the message names it, its value and the accepted values.

    Notes
    -----
    A setting that is not given has the value that the cluster has: of an earlier registration or of the preload of
    the worker, else of the configuration of the client, never of the environment of the workers. After
    ``client.unregister_worker_plugin("xzcache")`` the next registration begins anew.

    Examples
    --------
    >>> client.register_plugin(xzcache.CachePlugin(max_size="200 GB"))
    """

    name = "xzcache"
    idempotent = False

    @settings.with_hints
    def __init__(
        self,
        directory: str | PathLike[str] | None = None,
        max_size: int | str | None = None,
        *,
        remove_on_close: bool | None = None,
        affinity: Mode | None = None,
        peers: Asking | None = None,
        min_free: float | str | None = None,
        max_age_seconds: Age | None = None,
        missing_max_age_seconds: Age | None = None,
        revalidate: Revalidate | None = None,
        cache_set_data: bool | None = None,
        policy: PolicyName | None = None,
        upstream: Upstream | None = None,
        pipeline: bool | None = None,
        promote_above: int | str | None = None,
        fetch_timeout: float | None = None,
        lock_timeout: float | None = None,
        peer_timeout: float | None = None,
        threads: int | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "max_size": max_size,
            "min_free": min_free,
            "max_age_seconds": max_age_seconds,
            "missing_max_age_seconds": missing_max_age_seconds,
            "revalidate": revalidate,
            "cache_set_data": cache_set_data,
            "policy": policy,
            "upstream": upstream,
            "pipeline": pipeline,
            "promote_above": promote_above,
            "fetch_timeout": fetch_timeout,
            "lock_timeout": lock_timeout,
            "peer_timeout": peer_timeout,
            "threads": threads,
        }
        given = {name: _PARSERS[name](name, value) for name, value in given.items() if value is not None}
        configured = _process.configured()
        rest = {name: _PARSERS[name](name, configured[name]) for name in _PARSERS.keys() - given.keys()}
        if configured["max_size"] == DEFAULTS["max_size"]:
            rest.pop("max_size", None)
        if remove_on_close is not None:
            given["remove_on_close"] = settings.parse_flag("remove_on_close", remove_on_close)
        if affinity is not None:
            given["affinity"] = _parse_affinity(affinity)
        if peers is not None:
            given["peers"] = _parse_peers(peers)
        # the configured directory is meant for the machines of workers, so do not check it here
        if directory is not None:
            given["directory"] = str(settings.parse_root(directory, "directory"))
        elif configured["directory"] not in (None, ""):
            with settings.as_found():
                rest["directory"] = str(settings.parse_root(configured["directory"], "directory"))
        self.given, self.configured = given, rest
        # the cluster keeps what it has if nothing is given
        self.idempotent = not given
        self._id = uuid.uuid4().hex
        self._is_local = False
        self._setups: dict[str, _Setup] = {}

    @classmethod
    def of_preload(cls) -> CachePlugin:
        """The plugin of a preload, whose settings are those of its worker alone."""
        plugin = cls()
        plugin._is_local = True
        return plugin

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as this client has them; the cluster may have others."""
        chosen = {**self.configured, **self.given}
        return {name: chosen[name] for name in _PARSERS if name in chosen}

    @property
    def directory(self) -> str | None:
        """The directory that is given or configured."""
        return self.given.get("directory", self.configured.get("directory"))

    def __repr__(self) -> str:
        facts = {"directory": self.directory, **self.settings}
        if isinstance(facts.get("min_free"), float):
            facts["min_free"] = settings.shown_min_free(facts["min_free"])
        return f"CachePlugin({', '.join(f'{name}={value!r}' for name, value in facts.items())})"

    async def setup(self, worker: Worker) -> None:
        """Make the cache of this node the default cache of the worker's process."""
        chosen = await self._chosen(worker)
        if self not in worker.plugins.values():
            # another one has taken its place meanwhile
            return
        place = allowed("directory", chosen.get("directory")) or _place_of_worker()
        applied = {name: chosen[name] for name in _PARSERS if name in chosen}
        # without a given bound, that of another worker's plugin in this process must not count
        with config.set(_process.configured()):
            directory = self._open(place, applied, worker)
        gauge = Gauge(directory, f"dask {worker.scheduler.address}")
        latest = gauge.read()
        asks = chosen.get("peers", "off") == "on" and bool(latest.node)
        neighbours = Neighbours(worker, directory, gauge, applied["peer_timeout"]) if asks else None
        setup = _Setup(place, applied, gauge, chosen.get("remove_on_close", False), neighbours)
        metering.remember(directory)
        self._setups[worker.id] = setup
        _process.add(setup)
        _show(setup, worker)
        facts = {name: getattr(latest, name) for name in ("node", "directory", "bound", "process")}
        facts["machine"] = _machine()
        worker.log_event("xzcache", facts)
        if neighbours is not None:
            await neighbours.start()
        if latest.node:
            _log.info("The cache of this node: %s (%s)", latest.directory, settings.shown_bound(latest.bound))

    async def _chosen(self, worker: Worker) -> dict[str, Any]:
        """The settings of this worker: given by any client, else preloaded, else configured by the first client."""
        if self._is_local:
            _preloaded[worker.id] = {**self.configured, **self.given}
            return _preloaded[worker.id]
        preloaded = _preloaded.get(worker.id, {})
        try:
            plugin: bytes = dumps(ClusterPlugin())  # type: ignore[no-untyped-call]
            await worker.scheduler.register_scheduler_plugin(plugin=plugin, name=ClusterPlugin.name, idempotent=True)
            known = await worker.scheduler.xzcache_join(
                plugin=_name_of(self, worker), registration=self._id, given=self.given, configured=self.configured
            )
        except Exception as error:
            # such as a scheduler without xzcache, or one that accepts no plugins: clients are not told of each other
            logger.info("the scheduler keeps no settings of the cluster: %s", error)
            # nor of nodes
            known = {"given": {**self.given, "peers": "off"}, "configured": self.configured}
        return {**known["configured"], **preloaded, **known["given"]}

    def _open(self, place: str, applied: dict[str, Any], worker: Worker) -> CacheDirectory:
        cause: BaseException | None = None
        asked = {name: applied[name] for name in ("max_size", "min_free", "policy") if name in applied}
        directory = open_directory(place, **asked)
        directory.set_lock_timeout(applied["lock_timeout"])
        if not directory.prepare():
            cause = directory.barrier.latest_fault
        if cause is not None:
            _warn(worker, f"{worker.address} has no cache, and reads from the source: {cause}")
        if place not in _warned:
            for trouble in _troubles(directory.root, usable=cause is None):
                _warned.add(place)
                _warn(worker, f"the cache directory {directory.root} {trouble}")
        return directory

    async def teardown(self, worker: Worker) -> None:
        """Leave the worker's process as it was."""
        leaving = worker.status.name in ("closing", "closing_gracefully", "closed")
        if (setup := self._setups.pop(worker.id, None)) is not None:
            if setup.peers is not None:
                await setup.peers.leave() if not leaving else setup.peers.close()
            self._tear_down(setup, worker, leaving=leaving)
        if leaving:
            _preloaded.pop(worker.id, None)
        elif not self._is_local:
            # the scheduler knows whether this plugin is replaced or removed
            with suppress(Exception):
                await worker.scheduler.xzcache_leave()

    def _tear_down(self, setup: _Setup, worker: Worker, *, leaving: bool) -> None:
        for name in [name for name in worker.metrics if name.startswith("xzcache_")]:
            del worker.metrics[name]
        _process.shown.pop(worker.id, None)
        setup.gauge.close()
        _process.remove(setup)
        # a plugin under another name may be left
        others = (each for each in worker.plugins.values() if isinstance(each, CachePlugin) and each is not self)
        for left in [each._setups[worker.id] for each in others if worker.id in each._setups][-1:]:
            _show(left, worker)
        if setup.remove_on_close and leaving and not _process.uses(setup.place):
            setup.gauge.directory.remove_if_last()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_setups": {}}


def _place_of_worker() -> str:
    """The cache directory if the client gives none."""
    # a nanny sets the environment of its worker after the imports of the main module
    configured = config.get("directory") or os.environ.get("XZCACHE_DIRECTORY")
    if configured:
        with settings.as_found():
            return str(settings.parse_root(configured, "directory"))
    parent = dask.config.get("temporary-directory", None) or temporary()
    # without a temporary directory, use the default directory
    return default_directory() if parent is None else os.path.join(os.path.abspath(parent), private_name())


def _name_of(plugin: CachePlugin, worker: Worker) -> str:
    """The name under which a plugin is registered."""
    return next((name for name, each in worker.plugins.items() if each is plugin), CachePlugin.name)


def _machine() -> str:
    """An id that all processes of a machine have in common, in containers too; else the host's name."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


def _troubles(path: str, *, usable: bool) -> Iterator[str]:
    """What is wrong with the place of a cache directory, if that is known."""
    medium, kind = medium_of(path)
    if medium is Medium.ELSEWHERE:
        yield (
            f"is on a network file system, or on one that is not known to be local ({kind}): every hit may have to "
            "cross the network again, and locks may not hold; give each node a directory on a disk of its own"
        )
    if medium is Medium.MEMORY and usable:
        yield (
            f"is in memory ({kind}): the cache takes memory that the workers need, and is lost when the machine "
            "restarts; give each node a directory on a disk of its own"
        )
    if usable and (job := _job_of(path)) is not None:
        yield (
            f"is that of one job ({job}): other jobs of this node do not share it, and it goes with the job; give each "
            "node a directory that outlives its jobs"
        )


_JOB_IDS: Final = (
    *("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "OAR_JOB_ID", "COBALT_JOBID", "FLUX_JOB_ID", "PJM_JOBID"),
)
_JOB_FOLDERS: Final = ("SLURM_TMPDIR", "_CONDOR_SCRATCH_DIR", "PBS_JOBFS", "PBS_JOBDIR", "JOBFS", "FLUX_JOB_TMPDIR")


def _job_of(path: str) -> str | None:
    """The variable of a batch system that says that a directory is of one job; None if there is none."""
    for name in _JOB_IDS:
        job = os.environ.get(name)
        if job and re.search(rf"(?<![0-9A-Za-z]){re.escape(job)}(?![0-9A-Za-z])", path):
            return f"${name} is {job}"
    for name in _JOB_FOLDERS:
        folder = os.environ.get(name)
        if folder and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            return f"${name} is {folder}"
    return None


def _warn(worker: Worker, message: str) -> None:
    """Warn in the worker's log and at every client."""
    logger.warning(message)
    worker.log_event("warn", message)


def _show(setup: _Setup, worker: Worker) -> None:
    """Add the figures of a cache to the metrics that the worker sends to the scheduler, whose table adds them up."""
    gauge = _process.shown[worker.id] = setup.gauge
    shown = _process.shown
    worker.metrics["xzcache_node"] = lambda _: gauge.read().node
    for name in _COUNTED:
        # the workers of a process count the same reads
        worker.metrics[f"xzcache_{name}"] = _metric(gauge, name, lambda: next(iter(shown)) == worker.id)
    for name in _SHARED:
        worker.metrics[f"xzcache_{name}"] = _metric(gauge, name, lambda: _leads(worker.id, gauge))
    if (neighbours := setup.peers) is not None:
        worker.metrics["xzcache_peers"] = lambda _: neighbours.known
    process, host = gauge.read().process, gauge.read().host
    # Dask's table shows no lists
    worker.metrics[_PROCESS] = lambda _: [process, host, gauge.directory.root]


def _leads(worker: str, gauge: Gauge) -> bool:
    """Whether this worker shows the sizes of its node."""
    of_directory = (name for name, other in _process.shown.items() if other.directory is gauge.directory)
    return next(of_directory, None) == worker and gauge.leads()


def _metric(gauge: Gauge, name: str, is_shown: Callable[[], bool]) -> Callable[[Worker], float]:
    def read(worker: Worker) -> float:
        latest: Usage = gauge.read()
        value: float | None = getattr(latest, name)
        # a cache without a bound shows 0
        return value if value is not None and is_shown() else 0

    return read


def _exporter(gauge: Gauge) -> Exporter | None:
    """The exporter for Prometheus; None if its client is not installed."""
    try:
        from xzcache.dask._prometheus import Exporter
    except ImportError:
        return None
    return Exporter(gauge, _OF_PROMETHEUS)


class CacheDashboard(SchedulerPlugin):
    """Adds a page on the caches of all nodes to the scheduler's dashboard, ``/individual-xzcache``."""

    name = "xzcache-dashboard"
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Add the page, unless the dashboard of this Dask is unknown."""
        try:
            from xzcache.dask._dashboard import add_page

            add_page(scheduler)
        except Exception as error:
            # another release of Dask or Bokeh may lack parts of the page, which is no error of the cache
            logger.debug("no page on the dashboard: %s", error, exc_info=error)


async def dask_setup(server: Worker | Scheduler) -> None:
    """Set up ``--preload xzcache.dask``: register the plugin with the configuration of this process."""
    if isinstance(server, Scheduler):
        for plugin in (CacheDashboard(), ClusterPlugin()):
            await plugin.start(server)
            server.add_plugin(plugin, name=plugin.name, idempotent=True)
    else:
        await server.plugin_add(CachePlugin.of_preload(), name=CachePlugin.name)
