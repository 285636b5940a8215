"""A page of the scheduler's dashboard: hit rate, bytes a second, and used space of each node's cache.

The data come with the workers' heartbeats. The page uses parts of Dask's dashboard that may change, so callers must
handle its failure.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any, Final

from bokeh.layouts import column
from bokeh.models import ColumnDataSource, DataRange1d, FactorRange, Range1d
from bokeh.plotting import figure
from bokeh.server.tornado import BokehTornado
from distributed.dashboard.components import DashboardComponent
from distributed.dashboard.components.scheduler import individual_doc
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from distributed.scheduler import Scheduler
from tornado.ioloop import IOLoop

PAGE: Final = "/individual-xzcache"
_INTERVAL: Final = 500
"""Milliseconds."""
_KEPT: Final = 600
_RATED: Final = 10
"""The points of one hit rate, because workers report only from time to time."""
_COUNTERS: Final = ("hits", "misses", "bytes_from_cache", "bytes_from_source")
_CACHE, _SOURCE = "#2a7f62", "#c8553d"


class Xzcache(DashboardComponent):
    """Three plots, one below the other; `kwargs` are passed to bokeh."""

    def __init__(self, scheduler: Scheduler, **kwargs: Any) -> None:
        self.scheduler = scheduler
        self._counts: dict[str, tuple[float, ...]] = {}
        self._reads: deque[tuple[float, float]] = deque(maxlen=_RATED)
        self._then = time.time()
        names = ("time", "hit_rate", "from_cache", "from_source")
        self.series = ColumnDataSource({name: [] for name in names}, name="series")
        self.nodes = ColumnDataSource({"node": [], "used": [], "bound": []}, name="nodes")
        wide: dict[str, Any] = {"sizing_mode": "stretch_both", "tools": "", "x_axis_type": "datetime"}
        rate = figure(title="Reads served from the cache (%)", y_range=Range1d(start=0, end=100), **wide)
        rate.line("time", "hit_rate", source=self.series, line_width=2, color=_CACHE)
        flow = figure(title="MB a second", y_range=DataRange1d(start=0), x_range=rate.x_range, **wide)
        flow.line("time", "from_cache", source=self.series, line_width=2, color=_CACHE, legend_label="from the cache")
        flow.line(
            "time", "from_source", source=self.series, line_width=2, color=_SOURCE, legend_label="from the source"
        )
        flow.legend.location = "top_left"
        self._names = FactorRange()
        fill = figure(
            title="GB in the cache of each node, of its bound",
            y_range=self._names,
            sizing_mode="stretch_both",
            tools="",
            x_range=DataRange1d(start=0),
        )
        fill.hbar("node", right="bound", height=0.7, source=self.nodes, fill_alpha=0.15, color=_CACHE)
        fill.hbar("node", right="used", height=0.5, source=self.nodes, color=_CACHE)
        self.root = column(rate, flow, fill, name="xzcache", **kwargs)

    def update(self, messages: object = None) -> None:
        """Add a point from the latest reports of the workers."""
        workers = [w.metrics for w in self.scheduler.workers.values() if "xzcache_process" in w.metrics]
        hits, misses, cached, fetched = self._counted(workers)
        self._reads.append((hits, misses))
        from_cache, of_all = sum(h for h, _ in self._reads), sum(h + m for h, m in self._reads)
        then, self._then = self._then, time.time()
        seconds = max(self._then - then, 1e-9)
        point = {
            "time": self._then * 1e3,
            "hit_rate": 100 * from_cache / of_all if of_all else math.nan,
            "from_cache": cached / seconds / 1e6,
            "from_source": fetched / seconds / 1e6,
        }
        self.series.stream({name: [value] for name, value in point.items()}, _KEPT)
        nodes = {str(m.get("xzcache_node", "")): m for m in workers}
        shown = sorted(nodes)
        self._names.factors = [name[:8] for name in shown]
        self.nodes.data = {
            "node": [name[:8] for name in shown],
            "used": [nodes[name]["xzcache_used"] / 1e9 for name in shown],
            "bound": [max(nodes[name]["xzcache_bound"], 0) / 1e9 for name in shown],
        }

    def _counted(self, workers: list[dict[str, Any]]) -> list[float]:
        """The increase of each counter since the last call."""
        counted = [0.0] * len(_COUNTERS)
        for metrics in workers:
            # each worker reports the counters of its process at a different time; those of a new process start now
            (name,) = metrics["xzcache_process"]
            now = tuple(float(metrics[f"xzcache_{counter}"]) for counter in _COUNTERS)
            before = self._counts.get(name, now)
            # kept for processes that have gone: one that comes back has not read everything again
            self._counts[name] = tuple(map(max, before, now))
            counted = [sum(n) - b for *n, b in zip(counted, self._counts[name], before, strict=True)]
        return counted


def add_page(scheduler: Scheduler) -> None:
    """Serve the page from a scheduler that runs its dashboard; once, and not where that is off."""
    boards = [board for board in scheduler.http_application.applications if isinstance(board, BokehTornado)]
    if not boards or any(PAGE in board.app_paths for board in boards):
        return
    variables = template_variables(scheduler)
    pages = {PAGE: individual_doc(Xzcache, _INTERVAL)}
    page = BokehApplication(pages, scheduler, boards[0].prefix, variables)  # type: ignore[no-untyped-call]
    scheduler.http_application.add_application(page)
    page.initialize(IOLoop.current())
    page.start()
    entry = {"url": PAGE.strip("/"), "name": "Xzcache"}
    if entry not in variables["plots"]:
        variables["plots"].append(entry)
