"""Dask integration: one cache for all workers of a node, and its figures in Dask's displays.

``client.register_plugin(xzcache.CachePlugin(...))``, or ``dask worker --preload xzcache.dask`` and ``dask scheduler
--preload xzcache.dask``.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import dask
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin
from distributed.scheduler import Scheduler
from distributed.worker import Worker

from xzcache import _config as settings
from xzcache._caches import default_directory
from xzcache._config import DEFAULTS, config
from xzcache.dask import _usage as metering
from xzcache.dask._usage import Gauge, Usage
from xzcache.directory import is_on_network, open_directory, private_name, temporary

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from xzcache._config import Age, PolicyName, Revalidate, Upstream
    from xzcache.dask._prometheus import Exporter
    from xzcache.directory import CacheDirectory


logger = logging.getLogger("xzcache.dask")

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
    "threads": settings.parse_threads,
}
_COUNTED: Final = ("hits", "misses", "bytes_from_cache", "bytes_from_source", "seconds_saved")
"""What a process counts: shown by one of its workers."""
_SHARED: Final = ("used", "bound")
"""What a node has: shown by one of its workers, so that sums over workers are right."""
_PROCESS: Final = "xzcache_process"
_OF_PROMETHEUS: Final = "prometheus"


class _Setup(NamedTuple):
    """The settings that a plugin has applied to one worker."""

    place: str
    settings: dict[str, Any]
    gauge: Gauge


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


class CachePlugin(WorkerPlugin):
    """Gives every worker of a cluster the cache of its node as the default cache.

    Workers that join or restart later get it as well. A second registration replaces the first, except that of a bare
    ``CachePlugin()`` by a client that configures nothing: it keeps the plugin that is there.

    Parameters
    ----------
    directory : str or Path, optional
        The cache directory of a node. Default is the configured one of the client, else of the worker, else this user's
        folder in Dask's ``temporary-directory`` or in the system's.
    max_size : int or str, optional
        The bound of the whole cache of a node, in bytes or as ``"200 GB"``. If it is neither given nor configured, a
        directory keeps its bound.
    remove_on_close : bool, optional
        Whether the last worker of a node that closes normally deletes the cache, if no other process uses it. A restart
        of all workers deletes it too.
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
    threads : int, optional
        Threads of a worker that read large entries and write new ones.

    Raises
    ------
    ValueError, TypeError
        A parameter is invalid; the message names it, its value and the accepted values.

    Notes
    -----
    A setting that is not given, except the directory, has the value of the configuration of the client, never of the
    environment of the workers. Of the preload of a worker, it has the value of the configuration of the worker.

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
        remove_on_close: bool = False,
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
        threads: int | None = None,
    ) -> None:
        self.remove_on_close = settings.parse_flag("remove_on_close", remove_on_close)
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
            "threads": threads,
        }
        configured = _process.configured()
        chosen = {name: given[name] if given.get(name) is not None else configured[name] for name in _PARSERS}
        self.settings = {name: _PARSERS[name](name, value) for name, value in chosen.items()}
        if given["max_size"] is None and configured["max_size"] == DEFAULTS["max_size"]:
            del self.settings["max_size"]
        # a client that chooses nothing must not replace the settings that another client of the cluster has chosen
        chooses = remove_on_close or directory is not None or any(value is not None for value in given.values())
        self.idempotent = not chooses and all(configured[name] == DEFAULTS[name] for name in ("directory", *_PARSERS))
        self._setups: dict[str, _Setup] = {}
        place = configured["directory"] if directory is None else directory
        # the configured directory is meant for the machines of workers, so do not check it here
        with nullcontext() if directory is not None else settings.as_found():
            self.directory = None if place in (None, "") else str(settings.parse_root(place, "directory"))

    def __repr__(self) -> str:
        facts = {"directory": self.directory, **self.settings}
        return f"CachePlugin({', '.join(f'{name}={value!r}' for name, value in facts.items())})"

    def setup(self, worker: Worker) -> None:
        """Make the cache of this node the default cache of the worker's process."""
        place = self.directory or _place_of_worker()
        # without a given bound, that of another worker's plugin in this process must not count
        with config.set(_process.configured()):
            directory = self._open(place, worker)
        setup = _Setup(place, self.settings, Gauge(directory, f"dask {worker.scheduler.address}"))
        metering.remember(directory)
        self._setups[worker.id] = setup
        _process.add(setup)
        _show(setup, worker)
        latest = setup.gauge.read()
        facts = {name: getattr(latest, name) for name in ("node", "directory", "bound", "process")}
        worker.log_event("xzcache", facts)

    def _open(self, place: str, worker: Worker) -> CacheDirectory:
        cause: BaseException | None = None
        asked = {name: self.settings[name] for name in ("max_size", "min_free", "policy") if name in self.settings}
        directory = open_directory(place, **asked)
        directory.set_lock_timeout(self.settings["lock_timeout"])
        if not directory.prepare():
            cause = directory.barrier.latest_fault
        if cause is not None:
            _warn(worker, f"{worker.address} has no cache, and reads from the source: {cause}")
        if place not in _warned and is_on_network(directory.root):
            _warned.add(place)
            _warn(
                worker,
                f"the cache directory {directory.root} is on a network file system: every hit has to cross the "
                "network again, and locks may not hold; give each node a directory on a disk of its own",
            )
        return directory

    def teardown(self, worker: Worker) -> None:
        """Leave the worker's process as it was."""
        if (setup := self._setups.pop(worker.id, None)) is None:
            return
        for name in [name for name in worker.metrics if name.startswith("xzcache_")]:
            del worker.metrics[name]
        _process.shown.pop(worker.id, None)
        setup.gauge.close()
        _process.remove(setup)
        # a plugin under another name may be left
        others = (each for each in worker.plugins.values() if isinstance(each, CachePlugin) and each is not self)
        for left in [each._setups[worker.id] for each in others if worker.id in each._setups][-1:]:
            _show(left, worker)
        leaving = worker.status.name in ("closing", "closing_gracefully", "closed")
        if self.remove_on_close and leaving and not _process.uses(setup.place):
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
        # no bound is shown as none
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
        plugin = CacheDashboard()
        server.add_plugin(plugin)
        await plugin.start(server)
    else:
        await server.plugin_add(CachePlugin(), name=CachePlugin.name)
