"""One call, or one command, for the caches of all nodes of a cluster."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import pytest
import zarr
from clusters import nodes, pids
from distributed import Client
from processes import Dataset, until

import xzcache
from xzcache.cli import main
from xzcache.dask import _cluster, each_node

# what workers are sent to do, they need not import the tests for
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Filled(NamedTuple):
    client: Client
    folder: Path
    dataset: Dataset

    def fill(self) -> None:
        """Read all on one worker of each node."""
        for node in xzcache.cluster_info(self.client):
            self.client.submit(_read, self.dataset.place, workers=[node.workers[0]], pure=False).result()


def _read(place: str) -> None:
    zarr.open_array(xzcache.CacheStore(place), mode="r")[:]


@pytest.fixture(scope="module")
def cluster_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    folder = tmp_path_factory.mktemp("each")
    dataset = Dataset(folder, side=2)
    with nodes(folder, 2, per_node=2) as client, xzcache.config.set(directory=None):
        client.register_plugin(xzcache.CachePlugin(max_size="1 MB"))
        yield Filled(client, folder, dataset)


@pytest.fixture
def filled(cluster_of_two: Filled) -> Filled:
    cluster_of_two.fill()
    return cluster_of_two


class Done(NamedTuple):
    code: int
    out: str
    err: str


def command(filled: Filled, *words: str) -> Done:
    """Run the command in this process, as in a pipe."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([*words, "--scheduler", filled.client.scheduler.address])
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def test_a_function_is_called_once_on_each_node(filled: Filled) -> None:
    found = each_node(filled.client, os.getpid)
    assert len(found) == len(set(found.values())) == 2
    assert set(found.values()) <= set(pids(filled.client).values())


def test_caches_are_checked_resized_and_cleared(filled: Filled) -> None:
    found = each_node(filled.client, xzcache.check, repair=True)
    assert [(audit.entries, audit.ok) for audit in found.values()] == [(5, True)] * 2
    assert {audit.root for audit in found.values()} == {str(filled.folder / f"node{node}") for node in range(2)}
    each_node(filled.client, xzcache.resize, "2 MB")
    assert [node.bound for node in xzcache.cluster_info(filled.client)] == [2_000_000] * 2
    cleared = each_node(filled.client, xzcache.clear)
    assert [result.entries for result in cleared.values()] == [5, 5]
    assert [node.entries for node in xzcache.cluster_info(filled.client)] == [0, 0]


def test_only_some_nodes(filled: Filled) -> None:
    first, second = xzcache.cluster_info(filled.client)
    for name in (first.node, first.node[:12], *first.workers):
        assert list(each_node(filled.client, os.getpid, nodes=name)) == [first]
    assert len(each_node(filled.client, os.getpid, nodes="127.0.0.1")) == 2
    each_node(filled.client, xzcache.clear, nodes=[first.node])
    assert {node.node: node.entries for node in xzcache.cluster_info(filled.client)} == {first.node: 0, second.node: 5}


def test_one_that_fails_does_not_hide_the_others(filled: Filled) -> None:
    def fail_on(place: str) -> str:
        if xzcache.info().directory == place:
            raise OSError("no such luck")
        return "done"

    found = each_node(filled.client, fail_on, str(filled.folder / "node0"))
    assert sorted(map(str, found.values())) == ["done", "no such luck"]
    assert sorted(isinstance(result, OSError) for result in found.values()) == [False, True]


def test_a_result_that_cannot_be_sent_is_an_error_of_its_node(filled: Filled) -> None:
    found = each_node(filled.client, threading.Lock)
    assert len(found) == 2
    assert all(isinstance(result, Exception) for result in found.values()), found


def test_events_of_others_under_the_same_topic(filled: Filled) -> None:
    filled.client.log_event("xzcache", 5)
    filled.client.log_event("xzcache", "process")
    assert len(xzcache.cluster_info(filled.client)) == 2


def _no_usage(*_: object) -> None:
    raise RuntimeError("no usage")


def test_a_worker_that_fails_is_listed_and_hides_no_other(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, *others = sorted(filled.client.nthreads())
    usage = _cluster._usage_here

    def here(processes: list[str], dask_worker: Any = None) -> Any:
        return _no_usage() if dask_worker.address == first else usage(processes)

    monkeypatch.setattr(_cluster, "_usage_here", here)
    info = xzcache.cluster_info(filled.client)
    assert info.unanswered == (first,)
    assert sorted(worker for node in info for worker in node.workers) == others
    assert [record.getMessage() for record in caplog.records if record.name == "xzcache.dask"] == [
        f"{first} does not tell of its cache: RuntimeError: no usage"
    ]


def test_a_node_that_does_not_answer(filled: Filled) -> None:
    client = filled.client
    node = xzcache.cluster_info(client)[0]
    stopped = pids(client)[node.workers[0]]

    def stop(pid: int) -> str:
        if os.getpid() == pid:
            os.kill(pid, signal.SIGSTOP)
        return "done"

    try:
        found = each_node(client, stop, stopped, timeout=1)
        assert sorted(map(type, found.values()), key=str) == [TimeoutError, str]
        assert found[node].args == (f"{node.workers[0]} does not answer within 1 s",)
    finally:
        os.kill(stopped, signal.SIGCONT)
    until(lambda: not xzcache.cluster_info(client).unanswered)


def test_another_worker_of_the_node_is_asked_if_the_first_leaves(filled: Filled) -> None:
    node = xzcache.cluster_info(filled.client)[0]
    first = pids(filled.client)[node.workers[0]]

    def leave(pid: int) -> int:
        if os.getpid() == pid:
            os.kill(pid, signal.SIGKILL)
        return os.getpid()

    found = each_node(filled.client, leave, first)
    assert isinstance(found[node], int)
    assert found[node] != first
    filled.client.wait_for_workers(4)


@pytest.mark.parametrize(
    ("words", "named", "error", "text"),
    [
        ((None,), {}, TypeError, "function=None"),
        ((os.getpid,), {"nodes": "elsewhere"}, ValueError, "nodes='elsewhere'"),
        ((os.getpid,), {"nodes": ["127.0.0.1", ""]}, ValueError, "nodes=''"),
        ((os.getpid,), {"timeout": 0}, ValueError, "timeout=0"),
    ],
)
def test_bad_arguments(
    words: tuple[Any, ...], named: dict[str, Any], error: type[Exception], text: str, filled: Filled
) -> None:
    with pytest.raises(error, match=text):
        each_node(filled.client, *words, **named)
    with pytest.raises(TypeError, match="client=None"):
        each_node(None, os.getpid)  # type: ignore[arg-type]


def test_on_the_command_line(filled: Filled) -> None:
    first, second = xzcache.cluster_info(filled.client)
    line = [sys.executable, "-m", "xzcache", "info", "--scheduler", filled.client.scheduler.address]
    shown = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(text in shown for text in ("127.0.0.1", first.node[:8], second.node[:8], first.directory))
    rows = json.loads(command(filled, "check", "--json").out)
    assert [(row["node"], row["result"]["entries"]) for row in rows] == [(first.node, 5), (second.node, 5)]
    refused = command(filled, "clear")
    assert (refused.code, "give --yes" in refused.err) == (2, True)
    assert command(filled, "clear", "--yes", "--node", first.node).code == 0
    assert {node.node: node.entries for node in xzcache.cluster_info(filled.client)} == {first.node: 0, second.node: 5}
    assert command(filled, "resize", "3MB", "--yes").code == 0
    assert [node.bound for node in xzcache.cluster_info(filled.client)] == [3_000_000] * 2
    failed = command(filled, "clear", "no-such-source", "--yes", "--json")
    assert failed.code == 1
    assert all("no-such-source" in row["error"] for row in json.loads(failed.out))
