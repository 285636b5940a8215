"""The page of Dask's dashboard on the caches of all nodes, as a browser is served it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from browser import browser, needs_browser
from distributed import Client, LocalCluster, Scheduler, SpecCluster, Worker
from processes import PATIENCE, Dataset, until

import xzcache
from xzcache.dask import CacheDashboard
from xzcache.reading._stats import process

PAGE = "/individual-xzcache"

needs_bokeh = pytest.mark.skipif(
    importlib.util.find_spec("bokeh") is None, reason="without bokeh there is no dashboard"
)


@contextmanager
def dashboard(**options: Any) -> Iterator[tuple[Client, str]]:
    """A cluster in this process, and where its dashboard is."""
    options = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "processes": False,
        "dashboard_address": "127.0.0.1:0",
        **options,
    }
    with LocalCluster(**options) as made, Client(made) as client:
        yield client, f"http://127.0.0.1:{made.scheduler.http_server.port}"


def status(url: str) -> int:
    try:
        with urlopen(url, timeout=PATIENCE) as answer:
            return int(answer.status)
    except HTTPError as error:
        with error:
            return error.code


class Watched:
    """The page as a browser has it: a session with the server, where the page lives on and is looked at anew."""

    def __init__(self, url: str, page: str = PAGE) -> None:
        self._url = url + page
        self._name = uuid.uuid4().hex
        # a thread that has a loop of its own
        self._thread = ThreadPoolExecutor(1)
        self._open = self._thread.submit(self._connect).result()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.submit(self._open.close).result()
        self._thread.shutdown()

    def _connect(self) -> Any:
        from bokeh.client import pull_session

        return pull_session(url=self._url, session_id=self._name)

    def _look(self, read: Callable[[Any], Any]) -> Any:
        with closing(self._connect()) as session:
            return read(session.document)

    def look(self, read: Callable[[Any], Any]) -> Any:
        """Read the page as it is now, through a connection of its own, to change which means nothing."""
        return self._thread.submit(self._look, read).result()

    def sources(self) -> dict[str, dict[str, list[Any]]]:
        from bokeh.models import ColumnDataSource

        def read(document: Any) -> dict[str, dict[str, list[Any]]]:
            return {
                source.name or source.id: {column: list(values) for column, values in source.data.items()}
                for source in document.select({"type": ColumnDataSource})
            }

        return self.look(read)

    def source(self, name: str) -> dict[str, list[Any]]:
        return self.sources()[name]

    def titles(self) -> set[str]:
        from bokeh.models import Title

        return self.look(lambda document: {title.text for title in document.select({"type": Title})})

    def words(self) -> str:
        return self.look(lambda document: document.select_one({"name": "words"}).text)

    def points(self) -> list[dict[str, float]]:
        series = self.source("series")
        return [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]

    def bytes(self, name: str) -> float:
        """What the line of a source adds up to."""
        points = self.points()
        return sum(point[name] * 1e6 * (point["time"] - before["time"]) / 1e3 for before, point in pairwise(points))


@needs_bokeh
def test_the_page_shows_what_the_workers_do(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=4)
    with dashboard(n_workers=1) as (client, url):
        assert status(url + PAGE) == 404
        client.register_plugin(CacheDashboard())
        assert status(url + PAGE) == 200
        with Watched(url) as page:
            assert {title.split(" (")[0] for title in page.titles()} == {
                "Reads served from the cache",
                "MB a second",
                "GB in the cache of each node, of its bound",
            }
            # before there is a plugin there is nothing to show
            assert not any(page.source("nodes").values())
            assert "register_plugin" in page.words()
            client.register_plugin(xzcache.CachePlugin(ds.root, "1 GB"))
            until(lambda: page.source("nodes")["bound"] == [1.0] and len(page.points()) >= 2)
            assert page.source("nodes")["used"] == [0]
            # this process may have read before the plugin came, of which the page says nothing
            (before,) = xzcache.cluster_info(client)
            check_flows(client, page, ds)
            (node,) = xzcache.cluster_info(client)
            reads = node.hits + node.misses - before.hits - before.misses
            until(lambda: page.source("nodes")["used"] == [node.used / 1e9])
            assert page.source("nodes")["node"] == [socket.gethostname()]
            until(lambda: f" of {reads:,} reads" in page.words())
            rates = [point["hit_rate"] for point in page.points() if not math.isnan(point["hit_rate"])]
            assert rates[0] < 50 < rates[-1]
            times = [point["time"] for point in page.points()]
            assert times == sorted(times)


def check_flows(client: Client, page: Watched, ds: Dataset) -> None:
    """Read something, from the source and then from the cache: the lines have to add up to what it was."""
    shown = [page.bytes(name) for name in ("from_source", "from_cache")]
    began = process.as_dict()
    client.submit(ds.read, pure=False).result()
    cold = process.as_dict()
    size = cold["bytes_from_source"] - began["bytes_from_source"]
    assert size > ds.values.nbytes
    until(lambda: page.bytes("from_source") - shown[0] == pytest.approx(size))
    for _ in range(3):
        client.submit(ds.read, pure=False).result()
    now = process.as_dict()
    size = now["bytes_from_cache"] - began["bytes_from_cache"]
    assert size >= 3 * ds.values.nbytes
    until(lambda: page.bytes("from_cache") - shown[1] == pytest.approx(size))


@needs_bokeh
def test_workers_of_one_process_count_once(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=4)
    with dashboard(n_workers=2) as (client, url):
        client.register_plugin(CacheDashboard())
        client.register_plugin(xzcache.CachePlugin(ds.root, "1 GB"))
        with Watched(url) as page:
            until(lambda: page.source("nodes")["bound"] == [1.0])
            check_flows(client, page, ds)


@needs_bokeh
def test_what_was_read_before_is_no_flow(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=4)
    ds.read()
    with dashboard(n_workers=1) as (client, url):
        client.register_plugin(CacheDashboard())
        with Watched(url) as page:
            until(lambda: len(page.points()) >= 2)
            client.register_plugin(xzcache.CachePlugin(ds.root, "1 GB"))
            until(lambda: page.source("nodes")["bound"] == [1.0])
            seen = len(page.points())
            until(lambda: len(page.points()) > seen + 1)
            assert page.bytes("from_source") == page.bytes("from_cache") == 0


@needs_bokeh
def test_registered_again_it_is_one_page(tmp_path: Path) -> None:
    with dashboard() as (client, url):
        for _ in range(2):
            client.register_plugin(CacheDashboard())
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache", "1 GB"))
        with urlopen(url + "/status", timeout=PATIENCE) as answer:
            assert answer.read().decode().count(PAGE.strip("/")) == 1
        with Watched(url) as one, Watched(url) as other:
            for page in (one, other):
                until(lambda page=page: page.source("nodes")["bound"] == [1.0])


@needs_bokeh
def test_workers_come_and_go_while_the_page_is_open(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with dashboard(n_workers=1) as (client, url):
        client.register_plugin(CacheDashboard())
        client.register_plugin(xzcache.CachePlugin(ds.root, "1 GB"))
        with Watched(url) as page:
            client.submit(ds.read, pure=False).result()
            until(lambda: page.source("nodes")["used"] not in ([], [0]))
            client.cluster.scale(0)
            until(lambda: page.source("nodes")["node"] == [])
            seen = len(page.points())
            client.cluster.scale(2)
            client.wait_for_workers(2)
            until(lambda: page.source("nodes")["bound"] == [1.0])
            client.unregister_worker_plugin("xzcache")
            until(lambda: page.source("nodes")["node"] == [])
            assert len(page.points()) > seen
            # nobody reads: neither a rate below nothing, nor one made up
            assert all(point["from_cache"] >= 0 <= point["from_source"] for point in page.points())


@needs_bokeh
def test_several_nodes_have_a_bar_each(tmp_path: Path) -> None:
    bounds = [1.0, 2.0]
    with dashboard(n_workers=0) as (client, url):
        client.register_plugin(CacheDashboard())
        for name, bound in zip("ab", bounds, strict=True):
            plugin = xzcache.CachePlugin(tmp_path / name, f"{bound} GB")
            worker = {"cls": Worker, "options": {"nthreads": 1, "plugins": (plugin,)}}
            client.cluster.worker_spec[name] = worker
            client.cluster.scale(len(client.cluster.worker_spec))
            client.wait_for_workers(len(client.cluster.worker_spec))
        with Watched(url) as page:
            until(lambda: sorted(page.source("nodes")["bound"]) == bounds)
            assert len(set(page.source("nodes")["node"])) == 2


@needs_bokeh
def test_a_cache_without_a_bound(tmp_path: Path) -> None:
    with dashboard() as (client, url), xzcache.config.set(max_size=None):
        client.register_plugin(CacheDashboard())
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache"))
        with Watched(url) as page:
            until(lambda: page.source("nodes")["bound"] == [0])
        assert xzcache.cluster_info(client)[0].bound is None


async def _beat(dask_worker: Worker) -> None:
    await dask_worker.heartbeat()


@needs_bokeh
def test_dasks_own_table_of_workers_takes_our_figures(tmp_path: Path) -> None:
    with dashboard() as (client, url):
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache", "1 GB"))
        client.run(_beat)
        with Watched(url, "/individual-workers") as page:

            def ours() -> dict[str, list[Any]]:
                tables = (table for table in page.sources().values() if len(table.get("xzcache_hits", ())) == 3)
                return next(tables, {})

            table = until(ours)
    # the first row is the sum of the others
    assert sorted(table["xzcache_bound"]) == [0, 10**9, 10**9]
    assert table["xzcache_bound"][0] == 10**9
    assert len(table["xzcache_node"]) == len(table["name"]) == 3


@pytest.mark.skipif(importlib.util.find_spec("bokeh") is not None, reason="there is a dashboard here")
def test_without_bokeh_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    with dashboard() as (client, url):
        client.register_plugin(CacheDashboard())
        assert status(url + PAGE) == 404
        assert client.submit(sum, [1, 2]).result() == 3
    assert not [record for record in caplog.records if record.name.startswith("xzcache")]


def test_quietly_absent_where_the_dashboard_is_off(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0"}}
    workers = {0: {"cls": Worker, "options": {"nthreads": 1}}}
    with SpecCluster(workers, scheduler=scheduler) as made, Client(made) as client:
        client.register_plugin(CacheDashboard())
        port = made.scheduler.http_server.port
        assert status(f"http://127.0.0.1:{port}{PAGE}") == 404
        assert client.submit(sum, [1, 2]).result() == 3
    assert not [record for record in caplog.records if record.name.startswith("xzcache")]


@pytest.mark.parametrize("broken", ["History", "template_variables", "BokehApplication"])
@needs_bokeh
def test_quietly_absent_where_the_dashboard_is_another(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from xzcache.dask import _dashboard

    monkeypatch.delattr(_dashboard, broken)
    with dashboard(n_workers=1) as (client, url):
        client.register_plugin(CacheDashboard())
        assert status(url + PAGE) == 404
        assert status(url + "/individual-workers") == 200
        assert client.submit(sum, [1, 2]).result() == 3
    assert not [record for record in caplog.records if record.name.startswith("xzcache")]


# what a visitor's browser has of the page, by the names of its sources
SHOWN = """
const found = {};
for (const document of Bokeh.documents)
    for (const model of document._all_models.values())
        if (model.type === "ColumnDataSource" && model.name)
            found[model.name] = Object.fromEntries(
                Object.entries(model.data).map(([name, values]) => [name, Array.from(values)])
            );
return found;
"""
DRAWN = """
const [root] = Object.values(Bokeh.index.roots ?? Bokeh.index);
return [...(root.child_views ?? [])].filter(view => view.model.title)
    .map(view => [view.model.title.text, view.bbox.width, view.bbox.height]);
"""
# where the line of a rate of 100 % is, and the frame that it must not touch
LINE = """
const [root] = Object.values(Bokeh.index.roots ?? Bokeh.index);
const {frame} = [...root.child_views].find(view => view.model.title);
return [frame.y_scale.compute(100) - frame.bbox.top, frame.bbox.bottom - frame.y_scale.compute(0)];
"""


@needs_bokeh
@needs_browser
def test_a_browser_shows_live_figures(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=4)
    with dashboard() as (client, url), browser(tmp_path) as window:
        client.register_plugin(CacheDashboard())
        client.register_plugin(xzcache.CachePlugin(ds.root, "1 MB"))
        window.visit(url + PAGE)
        window.until("return typeof Bokeh !== 'undefined' && Bokeh.documents.length === 1")
        window.until(SHOWN, lambda shown: shown.get("nodes", {}).get("bound") == [0.001])
        empty = window.screenshot(tmp_path / "empty.png")
        client.submit(ds.read, pure=False).result()

        def rates(shown: Any) -> list[float]:
            return [rate for rate in shown["series"]["hit_rate"] if isinstance(rate, int | float) and rate == rate]

        shown = window.until(SHOWN, lambda shown: sum(shown["series"]["from_source"]) > 0)
        assert max(rates(shown)) < 50
        for _ in range(9):
            client.submit(ds.read, pure=False).result()
        shown = window.until(SHOWN, lambda shown: len(rates(shown)) > 1 and rates(shown)[-1] > 50)
        (node,) = xzcache.cluster_info(client)
        shown = window.until(SHOWN, lambda shown: shown["nodes"]["used"] == [node.used / 1e9])
        assert shown["nodes"]["node"] == [socket.gethostname()]
        assert sum(shown["series"]["from_cache"]) > 0
        drawn = window.until(DRAWN, lambda drawn: len(drawn) == 3)
        assert all(width > 500 and height > 100 for _, width, height in drawn), drawn
        full = window.screenshot(tmp_path / "full.png")
        assert full != empty
        assert min(window.run(LINE)) > 2
        # a telephone, which the page was not open on when all this was read
        window.resize(480, 900)
        window.visit(url + PAGE)
        again = window.until(SHOWN, lambda shown: sum(shown.get("series", {}).get("from_cache", [])) > 0)
        assert again["series"]["time"][0] <= shown["series"]["time"][0]
        drawn = window.until(DRAWN, lambda drawn: len(drawn) == 3)
        assert all(300 < width <= 480 and height > 50 for _, width, height in drawn), drawn
        assert window.run("return document.documentElement.scrollWidth") <= 480
        # Dask's navigation is on it
        assert "status" in window.run(
            "return [...document.querySelectorAll('.navbar a')].map(a => a.getAttribute('href'))"
        )
        # it is found from the other pages
        window.visit(url + "/status")
        links = "return [...document.querySelectorAll('a')].map(link => link.getAttribute('href'))"
        assert any(PAGE.strip("/") in str(link) for link in window.until(links))
        assert not window.complaints()


@contextmanager
def scheduler_command(folder: Path, *words: str) -> Iterator[str]:
    """A scheduler from a command line; its dashboard's address once it runs."""
    where = folder / "scheduler.json"
    line = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0"]
    line += ["--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(where), *words]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            # what follows the line that says where it is comes through a pipe that has room for it
            for said in process.stderr:
                if "Scheduler at" in said:
                    break
            until(where.exists)
            with Client(scheduler_file=str(where)):
                services = json.loads(where.read_text())["services"]
                yield f"http://127.0.0.1:{services['dashboard']}" if services else ""
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)


@needs_bokeh
def test_a_preloaded_scheduler_has_the_page(tmp_path: Path) -> None:
    with scheduler_command(tmp_path, "--preload", "xzcache.dask") as url:
        assert status(url + PAGE) == 200
        with Watched(url) as page:
            until(page.points)


@needs_bokeh
def test_a_dashboard_with_a_prefix(tmp_path: Path) -> None:
    with scheduler_command(tmp_path, "--preload", "xzcache.dask", "--dashboard-prefix", "/behind/a/proxy") as url:
        assert status(f"{url}/behind/a/proxy{PAGE}") == 200


def test_a_preloaded_scheduler_without_a_dashboard(tmp_path: Path) -> None:
    with scheduler_command(tmp_path, "--preload", "xzcache.dask", "--no-dashboard") as url:
        assert not url or status(url + PAGE) == 404
    assert os.path.isdir(tmp_path)
