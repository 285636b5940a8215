"""A page of the scheduler's dashboard: hit rate, bytes a second, and used space of each node's cache.

The data come with the workers' heartbeats, and are kept from when the page is added, whether or not anyone has it open.
The page uses parts of Dask's dashboard that may change, so callers must handle its failure.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bokeh.layouts import column
from bokeh.models import ColumnDataSource, FactorRange, FixedTicker, Range1d
from bokeh.models.annotations import Legend, LegendItem
from bokeh.models.widgets import Div
from bokeh.plotting import figure
from bokeh.server.tornado import BokehTornado
from distributed.dashboard.components import DashboardComponent, add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from tornado.ioloop import IOLoop, PeriodicCallback

from xzcache._config import shown_bound, shown_seconds, shown_size

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

PAGE: Final = "/individual-xzcache"
_INTERVAL: Final = 500
"""Milliseconds."""
_KEPT: Final = 3600
"""The number of points that are kept: half an hour."""
_RATED: Final = 10
"""The points of one hit rate, because workers report only from time to time."""
_COUNTERS: Final = (
    *("hits", "peer_hits", "misses", "bytes_from_cache", "bytes_from_peers", "bytes_from_source", "seconds_saved"),
)
_CACHE, _PEERS, _SOURCE = "#2a7f62", "#3b6ea8", "#c8553d"
_MARGIN: Final = 0.05
"""The part of an axis beyond its ends, so that no line is hidden by the frame."""
_BAR: Final = 26
"""Pixels."""


class _Point(NamedTuple):
    """The reads since the point before."""

    time: float
    hit_rate: float
    from_cache: float
    from_source: float
    from_peers: float


class _NodeBar(NamedTuple):
    node: str
    used: float
    bound: float
    text: str


class History:
    """The reports of the workers of a scheduler on their caches, point by point."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.points: deque[_Point] = deque(maxlen=_KEPT)
        self.added = 0
        """The number of all points, also of those that are not kept any more."""
        self.sums = [0.0] * len(_COUNTERS)
        self.since = time.time()
        self._counts: dict[str, tuple[float, ...]] = {}
        self._reads: deque[tuple[float, float]] = deque(maxlen=_RATED)
        self._then = self.since
        self._ticks = PeriodicCallback(self.add, _INTERVAL)

    def start(self) -> None:
        """Add a point from time to time, while the scheduler runs."""
        self.add()
        self._ticks.start()

    def reports(self) -> list[dict[str, Any]]:
        """The latest report of each worker that has the plugin."""
        return [w.metrics for w in self.scheduler.workers.values() if "xzcache_process" in w.metrics]

    def add(self) -> None:
        """Add a point from the latest reports of the workers."""
        if self.scheduler.status.name in ("closing", "closed"):
            self._ticks.stop()
            return
        counted = self._counted(self.reports())
        self.sums = [before + more for before, more in zip(self.sums, counted, strict=True)]
        hits, given, misses, cached, passed, fetched, _ = counted
        self._reads.append((hits, given + misses))
        from_cache, of_all = sum(h for h, _ in self._reads), sum(h + m for h, m in self._reads)
        then, self._then = self._then, time.time()
        seconds = max(self._then - then, 1e-9)
        hit_rate = 100 * from_cache / of_all if of_all else math.nan
        rates = [size / seconds / 1e6 for size in (cached, fetched, passed)]
        self.points.append(_Point(self._then * 1e3, hit_rate, *rates))
        self.added += 1

    def _counted(self, workers: list[dict[str, Any]]) -> list[float]:
        """The increase of each counter since the last call."""
        now: dict[str, tuple[float, ...]] = {}
        for metrics in workers:
            # one worker of each process reports its counters, the others zeros; they do it at different times
            name, *_ = metrics["xzcache_process"]
            # a worker with an older release counts no reads from peers
            reported = tuple(float(metrics.get(f"xzcache_{counter}", 0)) for counter in _COUNTERS)
            now[name] = tuple(map(max, now.get(name, reported), reported))
        counted = [0.0] * len(_COUNTERS)
        for name, counts in now.items():
            # the counters of a new process start now
            before = self._counts.get(name, counts)
            # kept for processes that have gone: one that comes back has not read everything again
            self._counts[name] = tuple(map(max, before, counts))
            counted = [total + n - b for total, n, b in zip(counted, self._counts[name], before, strict=True)]
        return counted

    def nodes(self) -> list[_NodeBar]:
        """The caches of the nodes, by the names of their hosts."""
        found: dict[str, tuple[str, float, float]] = {}
        for metrics in self.reports():
            # one worker of a node reports its sizes, and the others zeros
            node, (_, host, *_) = str(metrics["xzcache_node"]), metrics["xzcache_process"]
            _, used, bound = found.get(node, ("", 0.0, 0.0))
            found[node] = (host, max(used, metrics["xzcache_used"]), max(bound, metrics["xzcache_bound"]))
        hosts = Counter(host for host, _, _ in found.values())
        return sorted(
            _NodeBar(
                host if hosts[host] == 1 else f"{host} ({node[:4] or 'no cache'})",
                used / 1e9,
                bound / 1e9,
                f"{shown_size(int(used))} of {shown_bound(int(bound) or None)}",
            )
            for node, (host, used, bound) in found.items()
        )

    def words(self) -> str:
        """A sentence that sums up the lines, or says why there are none."""
        workers, reports = len(self.scheduler.workers), len(self.reports())
        hits, given, misses, cached, passed, fetched, saved = self.sums
        since = time.strftime("%H:%M UTC", time.gmtime(self.since))
        if not workers:
            return "The cluster has no workers."
        if not reports:
            return "No worker reports a cache: call client.register_plugin(xzcache.CachePlugin())."
        some = f" {workers - reports} of {workers} workers report no cache." if reports < workers else ""
        if not hits + given + misses:
            return f"Since {since}, nothing was read through the cache.{some}"
        nodes = f" and {given:,.0f} from other nodes, {shown_size(int(passed))}" if given else ""
        about = f"; about {shown_seconds(saved)} saved" if saved >= 0.0005 else ""
        return (
            f"Since {since}: {hits:,.0f} of {hits + given + misses:,.0f} reads from the cache{nodes}, "
            f"{shown_size(int(cached))} from the cache and {shown_size(int(fetched))} from the source{about}.{some}"
        )


class Xzcache(DashboardComponent):
    """A sentence and three plots, one below the other."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._shown = 0
        self.series = ColumnDataSource({name: [] for name in _Point._fields}, name="series")
        self.nodes = ColumnDataSource({name: [] for name in _NodeBar._fields}, name="nodes")
        self.words = Div(text="", name="words", sizing_mode="stretch_width")
        wide: dict[str, Any] = {"sizing_mode": "stretch_width", "tools": ""}
        timed: dict[str, Any] = {**wide, "height": 220, "x_axis_type": "datetime"}
        rate = figure(title="Reads served from the cache (%)", y_range=_range(100), **timed)
        rate.yaxis.ticker = FixedTicker(ticks=[0, 25, 50, 75, 100])
        rate.line("time", "hit_rate", source=self.series, line_width=2, color=_CACHE)
        # a rate between two times without reads is a line of no length
        rate.scatter("time", "hit_rate", source=self.series, size=3, color=_CACHE)
        self._flow = _range(1)
        flow = figure(title="MB a second", y_range=self._flow, x_range=rate.x_range, **timed)
        lines: list[tuple[str, list[Any]]] = []
        titles = {"from_cache": "from the cache", "from_source": "from the source", "from_peers": "from other nodes"}
        for (name, title), color in zip(titles.items(), (_CACHE, _SOURCE, _PEERS), strict=True):
            line = flow.line("time", name, source=self.series, line_width=2, color=color)
            lines.append((title, [line]))
        legend = Legend(orientation="horizontal", border_line_color=None)
        legend.items = [LegendItem(label=label, renderers=renderers) for label, renderers in lines]
        # not within the frame, where it would hide lines
        flow.add_layout(legend, "above")
        flow.xaxis.axis_label = "UTC"
        self._names = FactorRange()
        self._sizes = _range(1)
        self._fill = figure(
            title="GB in the cache of each node, of its bound",
            y_range=self._names,
            x_range=self._sizes,
            height=80,
            **wide,
        )
        self._fill.hbar("node", right="bound", height=0.7, source=self.nodes, fill_alpha=0.15, color=_CACHE)
        self._fill.hbar("node", right="used", height=0.5, source=self.nodes, color=_CACHE, fill_alpha=0.6)
        self._fill.text(0, "node", "text", source=self.nodes, text_baseline="middle", text_font_size="12px", x_offset=4)
        self.root = column(self.words, rate, flow, self._fill, name="xzcache", sizing_mode="stretch_width")
        self.update()

    def update(self, messages: object = None) -> None:
        """Show the new points of the history."""
        history = self._history
        count = min(history.added - self._shown, len(history.points))
        self._shown = history.added
        if count:
            points = list(history.points)[-count:]
            self.series.stream(dict(zip(_Point._fields, map(list, zip(*points, strict=True)), strict=True)), _KEPT)
        _set_end(self._flow, max((max(p.from_cache, p.from_source, p.from_peers) for p in history.points), default=0.0))
        nodes = history.nodes()
        names = [bar.node for bar in nodes]
        if names != self._names.factors:
            self._names.factors = names
            self._fill.height = 80 + _BAR * len(names)
        _set_end(self._sizes, max((max(bar.used, bar.bound) for bar in nodes), default=0.0))
        self.nodes.data = {name: [getattr(bar, name) for bar in nodes] for name in _NodeBar._fields}
        words = escape(history.words())
        if words != self.words.text:
            self.words.text = words


def _range(end: float) -> Range1d:
    return Range1d(start=-_MARGIN * end, end=(1 + _MARGIN) * end)


def _set_end(axis: Range1d, end: float) -> None:
    """Set the end of an axis a little beyond a value; small changes of the value do not move it."""
    now = float(axis.end)  # type: ignore[arg-type]
    if end > 0 and not 0.5 * now < end * (1 + _MARGIN) <= now:
        axis.update(start=-_MARGIN * end, end=(1 + 2 * _MARGIN) * end)


def _document(history: History, scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    """The page of one visitor, with the navigation of Dask's own pages."""
    page = Xzcache(history)
    add_periodic_callback(doc, page, _INTERVAL)  # type: ignore[no-untyped-call]
    doc.add_root(page.root)
    doc.theme = BOKEH_THEME
    doc.title = "Dask: xzcache"
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)


def add_page(scheduler: Scheduler) -> None:
    """Serve the page from a scheduler that runs its dashboard; once, and not where that is off."""
    boards = [board for board in scheduler.http_application.applications if isinstance(board, BokehTornado)]
    if not boards or any(PAGE in board.app_paths for board in boards):
        return
    variables = template_variables(scheduler)
    history = History(scheduler)
    pages = {PAGE: partial(_document, history)}
    page = BokehApplication(pages, scheduler, boards[0].prefix, variables)  # type: ignore[no-untyped-call]
    scheduler.http_application.add_application(page)
    page.initialize(IOLoop.current())
    page.start()
    history.start()
    entry = {"url": PAGE.strip("/"), "name": "Xzcache"}
    if entry not in variables["plots"]:
        variables["plots"].append(entry)
