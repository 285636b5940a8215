"""Peers: what one node of a cluster has cached, the others get from it; and never a wrong or a stale byte."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from clusters import metrics, nodes, pids, total
from containers import needs_containers
from distributed import Client
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.security import Security
from processes import Dataset, Far, Source, until
from servers import S3Server, s3_server, words
from zarr.storage import LocalStore

import xzcache
from xzcache import manage
from xzcache._caches import default_directory
from xzcache.dask import _scheduler, each_node
from xzcache.directory import open_directory
from xzcache.model import END

pytestmark = pytest.mark.slow

# what workers are sent to do, they need not import the tests for
cloudpickle.register_pickle_by_value(sys.modules[__name__])

NODES = 4


def plugin(**settings: Any) -> xzcache.CachePlugin:
    return xzcache.CachePlugin(max_size="10 MB", min_free=0, peers="on", **settings)


class Unhurried(WorkerPlugin):
    """Workers ask each other however long that takes: a test of its own has the rules for it."""

    name = "unhurried"

    def setup(self, worker: Any) -> None:
        from xzcache.dask import _worth

        _worth._SOME = 10**9  # type: ignore[misc]


class Cluster:
    """Simulated nodes that ask each other, and an array whose source notes each request."""

    def __init__(self, client: Client, folder: Path, count: int = NODES) -> None:
        self.client = client
        self.folder = folder
        self.dataset = Dataset(folder, side=6, chunk=8)
        client.register_plugin(Unhurried())
        until(lambda: all(seen["peers"] == count - 1 for seen in metrics(client).values()))
        self.workers = sorted(client.nthreads())

    def store(self, **options: Any) -> xzcache.CacheStore:
        source = Far(LocalStore(self.dataset.place, read_only=options.get("read_only", True)), self.dataset.log)
        return xzcache.CacheStore(source, **{"read_only": True, **options})

    def array(self) -> Any:
        return zarr.open_array(self.store(), mode="r", zarr_format=3)

    def run(self, worker: str, function: Callable[..., Any], *args: Any) -> Any:
        return self.client.submit(function, *args, workers=[worker], pure=False)

    def read(self, worker: str, array: Any = None) -> Any:
        return self.run(worker, _read, self.array() if array is None else array)

    def requests(self) -> list[int]:
        """How often each chunk was requested, most often first, since the last call."""
        found = sorted(self.dataset.chunk_requests().values(), reverse=True)
        self.dataset.forget_requests()
        return found

    def counts(self) -> dict[str, int]:
        seen = metrics(self.client)
        return {name: total(seen, name) for name in ("hits", "misses", "peer_hits", "peer_misses")}


def _read(array: Any) -> Any:
    return array[:]


def _read_at_once(array: Any) -> None:
    """All chunks are on their way at the same time, so that a source that is far away takes no longer than for one."""
    with zarr.config.set({"async.concurrency": array.nchunks}):
        array[:]


def _get(store: xzcache.CacheStore, key: str) -> bytes | None:
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    value = sync(store.get(key, default_buffer_prototype()))
    return None if value is None else value.to_bytes()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Cluster]:
    with nodes(tmp_path, NODES) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin(peer_timeout=30))
        yield Cluster(client, tmp_path)


def test_the_cluster_requests_each_chunk_once(started: Cluster) -> None:
    values = started.dataset.values
    started.requests()
    # all at once, each node all of it
    for result in started.client.gather([started.read(worker) for worker in started.workers]):
        np.testing.assert_array_equal(result, values)
    assert started.requests() == [1] * started.dataset.chunks
    counts = started.counts()
    assert counts["misses"] - started.dataset.chunks <= 4 * NODES
    assert counts["peer_hits"] == (NODES - 1) * started.dataset.chunks
    # each node stores its own chunks, and the caches together hold the array once
    kept = [node.used for node in xzcache.cluster_info(started.client)]
    assert sum(kept) < 1.2 * values.nbytes
    for worker in started.workers:
        np.testing.assert_array_equal(started.read(worker).result(), values)
    assert started.requests() == []
    # what was asked for twice is hot: each node has all of it now
    before = started.counts()
    for worker in started.workers:
        started.read(worker).result()
    after = started.counts()
    assert after["hits"] - before["hits"] >= NODES * started.dataset.chunks
    assert after["peer_hits"] == before["peer_hits"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes of their own, of which each has its part of the array."""
    with nodes(tmp_path, 3) as client, xzcache.config.set(directory=None):
        # a busy machine is no reason to ask the source
        client.register_plugin(plugin(peer_timeout=30))
        cluster = Cluster(client, tmp_path, 3)
        cluster.run(cluster.workers[0], _read_at_once, cluster.array()).result()
        assert cluster.requests() == [1] * cluster.dataset.chunks
        yield cluster


def owned(cluster: Cluster, worker: str) -> dict[str, Path]:
    """The chunks that a node has cached, and their files."""
    (node,) = [node for node in xzcache.cluster_info(cluster.client) if worker in node.workers]
    keys = cluster.dataset.keys()
    return {key: path for key in keys for path in Path(node.directory).glob(f"*/{key}")}


def _hold_the_gil(mark: str) -> None:
    """Make a file, and hold the interpreter's lock from then on until the file is gone."""
    import ctypes

    script = f"touch {shlex.quote(mark)}; while [ -e {shlex.quote(mark)} ]; do sleep 0.05; done"
    ctypes.PyDLL(None).system(script.encode())


def _watched(array: Any) -> dict[str, Any]:
    with xzcache.progress(display=False) as done:
        array[:]
    return {**done.as_dict(), "shown": repr(done)}


def test_reads_from_other_nodes_are_reads_that_no_source_answered(small: Cluster, tmp_path: Path) -> None:
    seen = small.run(small.workers[1], _watched, small.array()).result()
    given = seen["peer_hits"]
    assert given > 0
    assert given + seen["hits"] == small.dataset.chunks
    assert (seen["misses"], seen["bytes_from_source"], seen["hit_rate"]) == (0, 0, 1)
    assert seen["bytes_from_peers"] > 0
    assert re.search(rf"from other nodes +{given} reads", seen["shown"])
    # and they last
    nodes = each_node(small.client, xzcache.info)
    assert sum(info.ever.peer_hits for info in nodes.values()) == small.counts()["peer_hits"]
    (node,) = [node for node in nodes if small.workers[1] in node.workers]
    info = xzcache.info(node.directory)
    assert info == nodes[node]
    ever = info.ever
    assert (ever.peer_hits, ever.bytes_from_peers) == (given, seen["bytes_from_peers"])
    assert ever.reads == ever.hits + given + ever.misses
    assert ever.hit_rate == pytest.approx((ever.hits + given) / ever.reads)
    assert info.last_day == ever
    assert f"{ever.hits}, and {given} from other nodes, of {ever.reads} reads" in repr(info)
    (row,) = xzcache.ls(directory=node.directory)
    assert row.counts == ever
    assert re.search(rf"^xzcache_source_peer_hits_total{{.*}} {given}$", manage.metrics(node.directory), re.MULTILINE)
    xzcache.report(tmp_path / "r.html", node.directory)
    assert "from other nodes" in (tmp_path / "r.html").read_text()
    # also for the cluster, when the process that read is gone
    small.client.restart_workers([small.workers[1]])
    (node,) = [each for each in xzcache.cluster_info(small.client) if each.node == node.node]
    assert (node.peer_hits, node.ever) == (given, ever)


# -- nodes that fail


@pytest.mark.parametrize("trouble", ["stopped", "killed", "holds the GIL"])
def test_an_owner_that_does_not_answer_is_replaced_by_the_source(trouble: str, small: Cluster, tmp_path: Path) -> None:
    reader, owner = small.workers[1:]
    small.client.register_plugin(plugin(peer_timeout=0.1))
    until(lambda: all(seen["peers"] == 2 for seen in metrics(small.client).values()))
    theirs, pid = owned(small, owner), pids(small.client)[owner]
    assert theirs
    array, mark = small.array(), tmp_path / "mark"
    small.requests()
    if trouble == "holds the GIL":
        held = small.run(owner, _hold_the_gil, str(mark))
        until(mark.exists)
    else:
        os.kill(pid, signal.SIGSTOP if trouble == "stopped" else signal.SIGKILL)
    try:
        # the others do not answer at all
        np.testing.assert_array_equal(small.read(reader, array).result(timeout=60), small.dataset.values)
    finally:
        if trouble == "stopped":
            os.kill(pid, signal.SIGCONT)
        mark.unlink(missing_ok=True)
    # the source gave what the owner did not; what the third node had before the registration, it confirmed, and if that
    # took longer than the time-out on a busy machine, the reader asked the source as well
    found = small.requests()
    assert max(found, default=0) <= 2
    if trouble != "killed":
        # or another process in its place has its cache
        assert len(found) >= len(theirs)
    if trouble == "holds the GIL":
        held.result(timeout=60)


def _part(key: str) -> tuple[slice, slice]:
    i, j = (8 * int(number) for number in key.split("/")[1:])
    return slice(i, i + 8), slice(j, j + 8)


def _write(store: xzcache.CacheStore, keys: list[str]) -> None:
    array = zarr.open_array(store, mode="r+", zarr_format=3)
    for key in keys:
        array[_part(key)] = -1


def _chunk(array: Any, key: str) -> Any:
    return array[_part(key)]


def test_what_one_node_has_written_no_node_gives_as_it_was(small: Cluster) -> None:
    """The chunks are on the node that owns them, which is neither the writer nor the reader."""
    owner = max(small.workers, key=lambda worker: len(owned(small, worker)))
    one, other, *untouched = owned(small, owner)
    writer, reader = [worker for worker in small.workers if worker != owner]
    array = small.array()

    def read(worker: str, key: str) -> Any:
        return small.run(worker, _chunk, array, key).result(timeout=60)

    small.run(writer, _write, small.store(read_only=False), [one, other]).result(timeout=60)
    for worker in (reader, writer):
        np.testing.assert_array_equal(read(worker, one), np.full((8, 8), -1.0))

    def asks() -> bool:
        before = small.counts()["peer_hits"]
        read(reader, untouched.pop())
        return small.counts()["peer_hits"] > before

    # for as long as the array counts as being written, nothing of it is asked for
    until(asks)
    # what the owner had before, it fetches anew before it gives it away
    before = small.counts()["peer_hits"]
    np.testing.assert_array_equal(read(reader, other), np.full((8, 8), -1.0))
    assert small.counts()["peer_hits"] == before + 1


def test_a_chunk_that_the_owner_knew_to_be_missing_is_given_as_it_was_written(small: Cluster) -> None:
    owner = max(small.workers, key=lambda worker: len(owned(small, worker)))
    key = next(iter(owned(small, owner)))
    writer, reader = [worker for worker in small.workers if worker != owner]
    (Path(small.dataset.place) / key).unlink()
    each_node(small.client, xzcache.clear)
    store = small.store(missing_max_age_seconds="infinity")
    array = zarr.open_array(store, mode="r", zarr_format=3)
    small.requests()
    for _ in range(2):
        np.testing.assert_array_equal(small.run(owner, _chunk, array, key).result(timeout=60), np.zeros((8, 8)))
    assert small.requests() == [1]
    small.run(writer, _write, small.store(read_only=False), [key]).result(timeout=60)
    keys = small.dataset.keys()
    others = [each for each in keys if each != key]

    def asks() -> bool:
        before = small.counts()["peer_hits"]
        small.run(reader, _chunk, array, others.pop()).result(timeout=60)
        return small.counts()["peer_hits"] > before

    until(asks)
    np.testing.assert_array_equal(small.run(reader, _chunk, array, key).result(timeout=60), np.full((8, 8), -1.0))


def test_a_node_that_could_not_be_told_of_a_write_is_silent(small: Cluster) -> None:
    small.client.register_plugin(plugin(peer_timeout=0.1))
    until(lambda: all(seen["peers"] == 2 for seen in metrics(small.client).values()))
    owner = max(small.workers, key=lambda worker: len(owned(small, worker)))
    key = next(iter(owned(small, owner)))
    writer, reader = [worker for worker in small.workers if worker != owner]
    array, pid = small.array(), pids(small.client)[owner]
    os.kill(pid, signal.SIGSTOP)
    try:
        # for as long as the node might still answer others, and no longer
        small.run(writer, _write, small.store(read_only=False), [key]).result(timeout=60)
    finally:
        os.kill(pid, signal.SIGCONT)
    np.testing.assert_array_equal(small.run(reader, _chunk, array, key).result(timeout=60), np.full((8, 8), -1.0))


def _write_and_listen(store: xzcache.CacheStore, keys: list[str]) -> list[str]:
    with _heard("xzcache.dask", logging.WARNING) as said:
        _write(store, keys)
    return said


@pytest.mark.parametrize("how", ["retired", "unregistered"])
def test_a_write_does_not_wait_for_a_node_that_has_ended(
    how: str, small: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one that has not would be waited for longer than any write
    monkeypatch.setattr(_scheduler, "LEASE", 1000.0)
    writer, gone, _ = small.workers
    if how == "retired":
        small.client.retire_workers([gone])
        until(lambda: gone not in small.client.nthreads())
    else:
        # they go on telling for a while
        small.client.unregister_worker_plugin("xzcache")
    store = small.store(read_only=False)
    assert small.run(writer, _write_and_listen, store, small.dataset.keys()[:1]).result(timeout=60) == []


def test_a_changed_document_that_one_node_has_seen_bars_what_others_had(small: Cluster) -> None:
    (owner,) = [worker for worker in small.workers if "c/0/0" in owned(small, worker)]
    other, reader = [worker for worker in small.workers if worker != owner]
    old = small.array()
    small.read(owner, old).result(timeout=60)
    # by another program
    outside = zarr.open_array(LocalStore(small.dataset.place), mode="r+")
    outside[:] = -small.dataset.values
    outside.attrs["version"] = 2
    np.testing.assert_array_equal(small.run(other, _open_and_read, small.store()).result(timeout=60), outside[:])
    each_node(small.client, xzcache.clear, nodes=reader)
    np.testing.assert_array_equal(small.read(reader, old).result(timeout=60), outside[:])


def _open_and_read(store: xzcache.CacheStore) -> Any:
    return zarr.open_array(store, mode="r", zarr_format=3)[:]


@pytest.mark.parametrize("is_hidden", [False, True], ids=["seen", "time kept"])
def test_a_damaged_file_of_the_owner_is_fetched_anew(is_hidden: bool, small: Cluster) -> None:
    reader, owner = small.workers[1:]
    theirs = owned(small, owner)
    for path in theirs.values():
        status = path.stat()
        with open(path, "r+b") as file:
            file.write(b"\xff" * 8)
        if is_hidden:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    np.testing.assert_array_equal(small.read(reader).result(timeout=60), small.dataset.values)
    assert small.requests() == [1] * len(theirs)


def test_the_end_of_a_write_is_told_though_the_plugin_was_registered_again(small: Cluster) -> None:
    owner = max(small.workers, key=lambda worker: len(owned(small, worker)))
    one, *untouched = owned(small, owner)
    writer, reader = [worker for worker in small.workers if worker != owner]
    array = small.array()
    small.run(writer, _write, small.store(read_only=False), [one]).result(timeout=60)
    small.client.register_plugin(plugin(peer_timeout=29))
    until(lambda: all(seen["peers"] == 2 for seen in metrics(small.client).values()))

    def asks() -> bool:
        before = small.counts()["peer_hits"]
        small.run(reader, _chunk, array, untouched.pop()).result(timeout=60)
        return small.counts()["peer_hits"] > before

    until(asks)


class Readers:
    """One node that owns a chunk, one that writes, and one that reads what the owner has."""

    def __init__(self, small: Cluster) -> None:
        self.small, self.array = small, small.array()
        self.owner = max(small.workers, key=lambda worker: len(owned(small, worker)))
        self.writer, self.reader = [worker for worker in small.workers if worker != self.owner]
        self.key, *self.untouched = owned(small, self.owner)

    def write(self) -> None:
        """Have the writer write the chunk."""
        store = self.small.store(read_only=False)
        self.small.run(self.writer, _write, store, [self.key]).result(timeout=60)

    def given(self, key: str) -> tuple[Any, int]:
        """A chunk as the reader finds it, and whether another node gave it."""
        before = self.small.counts()["peer_hits"]
        found = self.small.run(self.reader, _chunk, self.array, key).result(timeout=60)
        return found, self.small.counts()["peer_hits"] - before

    def wait_until_told(self) -> None:
        """Wait until both have heard that all writes are over; what was not written is given then."""
        until(lambda: self.small.client.run_on_scheduler(_have_told, workers=(self.owner, self.reader)))
        until(lambda: self.given(self.untouched.pop())[1])

    def must_be_given_as_written(self) -> None:
        """The first time, it is not stored."""
        found, hits = self.given(self.key)
        np.testing.assert_array_equal(found, np.full((8, 8), -1.0))
        assert hits == 1


def _put_aside(mark: str) -> None:
    """Put the disk of this node aside, as if it failed, for as long as there is a mark."""
    health = open_directory(default_directory()).health
    probe = health._probe

    def look() -> None:
        if os.path.exists(mark):
            raise OSError(errno.EIO, "it still fails")
        probe()

    health._probe = look
    while not health.is_aside:
        health.record_fault(OSError(errno.EIO, "it fails"))


def _is_aside() -> bool:
    return open_directory(default_directory()).health.is_aside


def test_what_an_owner_has_on_a_disk_that_was_put_aside_is_no_newer_for_that(small: Cluster, tmp_path: Path) -> None:
    readers = Readers(small)
    readers.write()
    readers.wait_until_told()
    mark = tmp_path / "fails"
    mark.touch()
    small.client.run(_put_aside, str(mark), workers=[readers.owner])
    readers.must_be_given_as_written()
    mark.unlink()
    until(lambda: not any(small.client.run(_is_aside, workers=[readers.owner]).values()))
    # what the owner had before the write is there again
    readers.must_be_given_as_written()


def _have_told(dask_scheduler: Any, workers: tuple[str, ...]) -> bool:
    """Whether workers have heard that all writes are over."""
    plugin = dask_scheduler.plugins["xzcache-cluster"]
    is_over = not any(each.writers for each in plugin._stale.values())
    return is_over and all(plugin._members[worker].known == plugin._version for worker in workers)


def test_an_owner_whose_index_was_held_up_when_a_write_ended_answers_again(small: Cluster) -> None:
    small.client.register_plugin(plugin(lock_timeout=0.1))
    until(lambda: all(seen["peers"] == 2 for seen in metrics(small.client).values()))
    readers = Readers(small)
    (node,) = [node for node in xzcache.cluster_info(small.client) if readers.owner in node.workers]
    with open(Path(node.directory, ".xzcache", "lock")) as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        readers.write()
        until(lambda: small.client.run_on_scheduler(_have_told, workers=(readers.owner,)))
    until(lambda: readers.given(readers.untouched.pop())[1])
    readers.must_be_given_as_written()


def _deafen(dask_scheduler: Any) -> None:
    """Have the scheduler hear of nothing but the end of writes."""
    hear = dask_scheduler.handlers["xzcache_stale"]
    dask_scheduler.ends = 0

    async def heard(is_written: bool | None, **telling: Any) -> None:
        if is_written is not False:
            raise OSError("as if the connection were lost")
        await hear(is_written=is_written, **telling)
        dask_scheduler.ends += 1

    dask_scheduler.handlers["xzcache_stale"] = heard


def _ends(dask_scheduler: Any) -> int:
    return int(dask_scheduler.ends)


@pytest.mark.parametrize("what", ["written", "cleared"])
def test_what_the_scheduler_did_not_hear_of_is_told_later(what: str, small: Cluster) -> None:
    readers = Readers(small)
    small.client.run_on_scheduler(_deafen)
    if what == "written":
        readers.write()
    else:
        # by another program, and now all nodes are to begin anew
        zarr.open_array(LocalStore(small.dataset.place), mode="r+")[_part(readers.key)] = -1
        each_node(small.client, xzcache.clear, nodes=readers.writer)
    until(lambda: small.client.run_on_scheduler(_ends))
    readers.wait_until_told()
    readers.must_be_given_as_written()


async def _tell_written(dask_worker: Any, worker: str, path: str) -> None:
    await dask_worker.scheduler.xzcache_stale(worker=worker, path=path, is_written=True)


def test_the_writes_of_a_worker_that_was_removed_before_it_told_of_them_end(
    small: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_scheduler, "_LATE", 0.5)
    readers = Readers(small)
    path = readers.array.store.namespace
    small.client.run(_tell_written, worker="tcp://127.0.0.1:9", path=path, workers=[readers.writer])
    readers.wait_until_told()


async def _write_twice(dask_scheduler: Any, path: str) -> list[bool]:
    """Have a worker that was removed write, and another one at its address; whether it is written after each end."""
    plugin = dask_scheduler.plugins["xzcache-cluster"]
    due: list[tuple[Any, ...]] = []
    call_later = dask_scheduler.loop.call_later

    def noted(delay: float, call: Any, *args: Any) -> Any:
        return due.append((call, *args)) if call == plugin._end_writes else call_later(delay, call, *args)

    dask_scheduler.loop.call_later = noted
    try:
        for _ in range(2):
            await dask_scheduler.handlers["xzcache_stale"](worker="tcp://127.0.0.1:9", path=path, is_written=True)
    finally:
        del dask_scheduler.loop.call_later
    found = []
    for call, *args in due:
        call(*args)
        found.append(bool(plugin._stale[path].writers))
    return found


def test_the_writes_of_a_worker_do_not_end_with_those_of_an_earlier_one_at_its_address(started: Cluster) -> None:
    assert started.client.run_on_scheduler(_write_twice, path="another source") == [True, False]


def _bounds(dask_worker: Any) -> list[int]:
    """The bounds of the nodes, as a worker knows them."""
    return sorted(dask_worker.handlers["xzcache_look"].__self__._nodes._bounds.values())


def _weights(dask_scheduler: Any) -> list[int]:
    """The bounds of the nodes, by which tasks are sent to them."""
    return sorted(dask_scheduler.plugins["xzcache-cluster"]._nodes._bounds.values())


def test_a_node_whose_bound_is_changed_owns_more_or_less_from_then_on(small: Cluster) -> None:
    each_node(small.client, xzcache.resize, "40 MB", nodes=small.workers[0])
    new = [10_000_000, 10_000_000, 40_000_000]
    until(lambda: all(seen == new for seen in small.client.run(_bounds).values()))
    assert small.client.run_on_scheduler(_weights) == new


# around the most bytes that are sent within a message, and the most of one message
@pytest.mark.parametrize("size", [0, 1, 128 << 10, (128 << 10) + 1, 4 << 20, (8 << 20) + 1])
def test_a_chunk_of_any_size_comes_as_it_is(size: int, small: Cluster) -> None:
    readers = Readers(small)
    value = np.random.default_rng(size).bytes(size)
    Path(small.dataset.place, readers.key).write_bytes(value)
    each_node(small.client, xzcache.clear)
    before = small.counts()["peer_hits"]
    assert small.run(readers.reader, _get, readers.array.store, readers.key).result(timeout=60) == value
    assert small.counts()["peer_hits"] == before + 1


NAMESPACE = """
import ctypes

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
libc = ctypes.CDLL(None)
assert libc.unshare(CLONE_NEWNS) == 0
assert libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
"""
"""What a worker is to do first, to have mounts of its own."""


def _hide(path: str) -> None:
    """Hide a directory behind a mount, which looks to this node as if its own mount were gone."""
    import ctypes

    assert ctypes.CDLL(None).mount(b"none", path.encode(), b"tmpfs", 0, None) == 0


@needs_containers
def test_a_chunk_is_not_missing_because_its_owner_has_lost_the_mount(tmp_path: Path) -> None:
    preload = tmp_path / "preload.py"
    preload.write_text(NAMESPACE)
    with nodes(tmp_path, 2, preload=[str(preload)]) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin(peer_timeout=30))
        cluster = Cluster(client, tmp_path, 2)
        reader, owner = cluster.workers
        store = xzcache.CacheStore(cluster.dataset.place, read_only=True)
        array = zarr.open_array(store, mode="r", zarr_format=3)
        keys = cluster.dataset.keys()

        def read(keys: list[str]) -> None:
            found = cluster.run(reader, _one_by_one, array, list(map(_part, keys))).result(timeout=60)
            for key, value in zip(keys, found, strict=True):
                np.testing.assert_array_equal(value, cluster.dataset.values[_part(key)])

        read(keys[::2])
        assert cluster.counts()["peer_hits"] > 0
        client.run(_hide, cluster.dataset.place, workers=[owner])
        read(keys[1::2])


# -- whom not to ask


def _count_questions(dask_worker: Any) -> None:
    """Count the questions to this worker, by key."""
    answer = dask_worker.handlers["xzcache_ask"]
    dask_worker.questions = {}

    async def counted(**question: Any) -> Any:
        key = question["key"]
        dask_worker.questions[key] = dask_worker.questions.get(key, 0) + 1
        return await answer(**question)

    dask_worker.handlers["xzcache_ask"] = counted


def _questions(dask_worker: Any) -> dict[str, int]:
    return dict(dask_worker.questions)


def _one_by_one(array: Any, parts: list[tuple[slice, ...]]) -> list[Any]:
    return [array[part] for part in parts]


class Hanging(Source):
    """A store whose chunks do not arrive at some nodes."""

    def __init__(self, store: LocalStore, log: str, hanging: list[str]) -> None:
        super().__init__(store, log)
        self.hanging = hanging

    def _with_store(self, store: LocalStore) -> Hanging:
        return Hanging(store, self.log, self.hanging)

    def __reduce__(self) -> Any:
        return Hanging, (self._store, self.log, self.hanging)

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if key.startswith("c/") and os.environ.get("XZCACHE_DIRECTORY") in self.hanging:
            await asyncio.Event().wait()
        return await super().get(key, *args, **kwargs)


def test_an_owner_whose_source_hangs_is_given_up_after_the_time_out_and_left_alone(small: Cluster) -> None:
    reader, owner = small.workers[1:]
    theirs = sorted(owned(small, owner))
    small.client.register_plugin(plugin(peer_timeout=1))
    until(lambda: all(seen["peers"] == 2 for seen in metrics(small.client).values()))
    each_node(small.client, xzcache.clear)
    hanging = list(small.client.run(os.getenv, "XZCACHE_DIRECTORY", workers=[owner]).values())
    source = Hanging(LocalStore(small.dataset.place, read_only=True), small.dataset.log, hanging)
    array = zarr.open_array(xzcache.CacheStore(source, read_only=True), mode="r", zarr_format=3)
    small.client.run(_count_questions, workers=[owner])
    parts = [_part(key) for key in theirs]
    found = small.run(reader, _one_by_one, array, parts).result(timeout=60)
    for part, value in zip(parts, found, strict=True):
        np.testing.assert_array_equal(value, small.dataset.values[part])
    (asked,) = small.client.run(_questions, workers=[owner]).values()
    # the store was sent, and the owner said twice that it is fetching: how long the source takes is not known yet
    assert 1 <= asked[theirs[0]] <= 4
    assert len(asked) <= len(theirs) / 2


def test_what_an_owner_always_refuses_is_not_asked_for_each_time(tmp_path: Path) -> None:
    """Byte ranges of shards without validators."""
    with nodes(tmp_path, 2) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin(peer_timeout=30))
        until(lambda: all(seen["peers"] == 1 for seen in metrics(client).values()))
        values = np.random.default_rng(3).random(256 * 40)
        place, log = tmp_path / "shards.zarr", tmp_path / "shards.log"
        log.touch()
        made = zarr.create_array(
            LocalStore(place), shape=values.shape, chunks=(64,), shards=(256,), dtype="f8", compressors=None
        )
        made[:] = values
        source = Source(LocalStore(place, read_only=True), str(log))
        array = zarr.open_array(xzcache.CacheStore(source, read_only=True), mode="r", zarr_format=3)
        reader, owner = sorted(client.nthreads())
        client.run(_count_questions, workers=[owner])
        parts = [(slice(start, start + 64),) for start in range(0, len(values), 256)]
        found = client.submit(_one_by_one, array, parts, workers=[reader], pure=False).result(timeout=60)
        np.testing.assert_array_equal(np.concatenate(found), np.concatenate([values[part] for (part,) in parts]))
        (asked,) = client.run(_questions, workers=[owner]).values()
        # of some twenty shards
        assert 1 <= len(asked) <= 14


async def _ask(dask_worker: Any, address: str, **question: Any) -> Any:
    return dict(await dask_worker.rpc(address).xzcache_ask(**question))


def _hold_looks(dask_scheduler: Any) -> None:
    """Hold up what workers ask the scheduler."""
    answer = dask_scheduler.handlers["xzcache_peers"]
    dask_scheduler.held, dask_scheduler.gate = 0, asyncio.Event()

    async def held(node: str, **question: Any) -> Any:
        if node:
            dask_scheduler.held += 1
            await dask_scheduler.gate.wait()
        return await answer(node=node, **question)

    dask_scheduler.handlers["xzcache_peers"] = held


def _held(dask_scheduler: Any) -> int:
    return int(dask_scheduler.held)


async def _let_go(dask_scheduler: Any) -> None:
    dask_scheduler.gate.set()


def _has_plugin(dask_worker: Any) -> bool:
    return "xzcache" in dask_worker.plugins


async def _tasks() -> list[str]:
    return [str(task.get_coro()) for task in asyncio.all_tasks()]


def _members(dask_scheduler: Any) -> list[str]:
    members = dask_scheduler.plugins["xzcache-cluster"]._members
    return [name for name, member in members.items() if not member.has_left]


def test_a_plugin_that_is_removed_while_it_begins_leaves_nothing_behind(tmp_path: Path) -> None:
    with nodes(tmp_path, 1) as client, xzcache.config.set(directory=None), ThreadPoolExecutor(2) as threads:
        # the scheduler knows of peers
        client.register_plugin(plugin())
        client.unregister_worker_plugin("xzcache")
        client.run_on_scheduler(_hold_looks)
        coming = threads.submit(client.register_plugin, plugin())
        until(lambda: client.run_on_scheduler(_held))
        going = threads.submit(client.unregister_worker_plugin, "xzcache")
        until(lambda: not any(client.run(_has_plugin).values()))
        client.run_on_scheduler(_let_go)
        for each in (coming, going):
            each.result(timeout=60)
        (tasks,) = client.run(_tasks).values()
        assert not [task for task in tasks if "_beat" in task and "Neighbours" in task]
        assert client.run_on_scheduler(_members) == []


def test_a_scheduler_that_takes_no_plugins_is_not_asked_for_other_nodes(tmp_path: Path) -> None:
    with (
        _heard("distributed.core", logging.WARNING) as said,
        dask.config.set({"distributed.scheduler.blocked-handlers": ["register_scheduler_plugin"]}),
        nodes(tmp_path, 1) as client,
        xzcache.config.set(directory=None),
    ):
        client.register_plugin(plugin())
        (seen,) = metrics(client).values()
        assert seen["node"]
        assert "peers" not in seen
    assert not [line for line in said if "No handler" in line]


class Bound(Far):
    """A store of the user's that no other process can have."""

    attempts = 0

    def __reduce__(self) -> Any:
        type(self).attempts += 1
        raise TypeError("it holds a lock")


@contextmanager
def _heard(logger: str, level: int) -> Iterator[list[str]]:
    """What is logged meanwhile."""
    said: list[str] = []
    listener = logging.Handler(level)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(listener)
    try:
        yield said
    finally:
        logging.getLogger(logger).removeHandler(listener)


def _read_bound(place: str, log: str, parts: list[tuple[slice, slice]]) -> tuple[Any, int, list[str]]:
    with _heard("xzcache", logging.ERROR) as said:
        store = xzcache.CacheStore(Bound(LocalStore(place, read_only=True), log), read_only=True)
        array = zarr.open_array(store, mode="r", zarr_format=3)
        found = np.empty(array.shape)
        for part in parts:
            found[part] = array[part]
    return found, Bound.attempts, said


def test_a_store_that_cannot_be_sent_reads_for_itself(small: Cluster) -> None:
    # of which others have most; one chunk after the other takes a second each
    dataset, parts = small.dataset, list(map(_part, small.dataset.keys()))[:9]
    reads = small.run(small.workers[1], _read_bound, dataset.place, dataset.log, parts)
    found, attempts, said = reads.result(timeout=60)
    for part in parts:
        np.testing.assert_array_equal(found[part], dataset.values[part])
    # Dask tries it in three ways
    assert attempts <= 3
    assert said == []


@pytest.mark.parametrize("is_kept", [False, True], ids=["unregistered", "switched off"])
def test_a_node_that_has_left_refuses(is_kept: bool, tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin())
        until(lambda: all(seen["peers"] == 1 for seen in metrics(client).values()))
        if is_kept:
            client.register_plugin(xzcache.CachePlugin(peers="off"))
        else:
            client.unregister_worker_plugin("xzcache")
        one, other = sorted(client.nthreads())
        # as if it were under way
        question = {"store": "a", "key": "c/0", "spans": [[0, 8]], "namespace": "b", "hold": 0.1}
        (told,) = client.run(_ask, address=other, **question, workers=[one]).values()
        assert told == {"status": "refused"}
        assert "No handler" not in str(client.get_worker_logs(workers=[other]))


async def _ask_for_first_pieces(dask_worker: Any, address: str, store: Any, keys: list[str]) -> list[int]:
    """Ask for the beginning of each chunk, and never for the rest; returns sizes."""
    from hashlib import blake2b

    from distributed.protocol.pickle import dumps

    from xzcache.dask._asking import place_of

    pickled = dumps((store, place_of(store)))
    question = {"store": blake2b(pickled, digest_size=16).hexdigest(), "pickled": pickled, "spans": [[0, END]]}
    sizes = []
    for key in keys:
        told = await dask_worker.rpc(address).xzcache_ask(**question, key=key, namespace=store.namespace, hold=30.0)
        assert told["status"] == "given"
        sizes += told["sizes"]
    return sizes


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what memory a process has")
def test_answers_that_nobody_fetches_are_kept_in_bounded_memory(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, per_node=2) as client, xzcache.config.set(directory=None):
        client.register_plugin(xzcache.CachePlugin(max_size="2 GB", min_free=0, peers="on", peer_timeout=30))
        place, chunk = tmp_path / "large.zarr", 2 << 20
        made = zarr.create_array(LocalStore(place), shape=(24 * chunk,), chunks=(chunk,), dtype="f8", compressors=None)
        made[:] = np.arange(24.0 * chunk)
        store = xzcache.CacheStore(str(place), read_only=True)
        array = zarr.open_array(store, mode="r", zarr_format=3)
        one, other = sorted(client.nthreads())
        client.submit(_ends_of, array, workers=[other]).result(timeout=60)
        (before,) = client.run(_memory, workers=[other]).values()
        keys = [f"c/{number}" for number in range(24)]
        (sizes,) = client.run(_ask_for_first_pieces, address=other, store=store, keys=keys, workers=[one]).values()
        (after,) = client.run(_memory, workers=[other]).values()
        assert sum(sizes) == 24 * 16 << 20
        assert after - before < 200 << 20


def _ends_of(array: Any) -> float:
    return sum(float(array[start]) for start in range(0, array.shape[0], array.chunks[0]))


class Known(Far):
    """A store that some nodes cannot unpickle."""

    def __init__(self, store: LocalStore, log: str, refused: list[str]) -> None:
        super().__init__(store, log)
        self.refused = refused

    def _with_store(self, store: LocalStore) -> Known:
        return Known(store, self.log, self.refused)

    def __reduce__(self) -> Any:
        return _known, (self._store, self.log, self.refused)


def _known(store: LocalStore, log: str, refused: list[str]) -> Known:
    if os.environ.get("XZCACHE_DIRECTORY") in refused:
        raise ModuleNotFoundError("not installed on this node")
    return Known(store, log, refused)


def test_a_node_that_cannot_read_the_source_is_not_used(small: Cluster) -> None:
    reader, owner = small.workers[1:]
    refused = list(small.client.run(os.getenv, "XZCACHE_DIRECTORY", workers=[owner]).values())
    source = Known(LocalStore(small.dataset.place, read_only=True), small.dataset.log, refused)
    array = zarr.open_array(xzcache.CacheStore(source, read_only=True), mode="r", zarr_format=3)
    small.requests()
    before = small.counts()["peer_misses"]
    np.testing.assert_array_equal(small.read(reader, array).result(timeout=60), small.dataset.values)
    assert small.requests() == [1] * small.dataset.chunks
    # it was asked until it had refused twice
    assert small.counts()["peer_misses"] - before >= 2


def test_encrypted_connections(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    with nodes(tmp_path, 2, security=Security.temporary()) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin(peer_timeout=30))
        cluster = Cluster(client, tmp_path, 2)
        assert all(worker.startswith("tls://") for worker in cluster.workers)
        for worker in cluster.workers:
            np.testing.assert_array_equal(cluster.read(worker).result(timeout=60), cluster.dataset.values)
        assert cluster.requests() == [1] * cluster.dataset.chunks
        assert cluster.counts()["peer_hits"] >= cluster.dataset.chunks


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"peers='always' is not accepted: give \"off\" or \"on\""):
        xzcache.CachePlugin(peers="always")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="peers=True"):
        xzcache.CachePlugin(peers=True)  # type: ignore[arg-type]


def test_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    def known(client: Client) -> set[Any]:
        return {seen.get("peers") for seen in metrics(client).values()}

    with nodes(tmp_path, 2) as client, xzcache.config.set(directory=None):
        client.register_plugin(xzcache.CachePlugin(max_size="1 MB", min_free=0))
        assert known(client) == {None}
        client.register_plugin(xzcache.CachePlugin(peers="on"))
        until(lambda: known(client) == {1})
        client.register_plugin(xzcache.CachePlugin(policy="lru"))
        until(lambda: known(client) == {1})
        client.register_plugin(xzcache.CachePlugin(peers="off"))
        assert known(client) == {None}


def test_what_another_node_gave_is_as_old_as_it_was_there(small: Cluster) -> None:
    owner = max(small.workers, key=lambda worker: len(owned(small, worker)))
    (reader, *_) = [worker for worker in small.workers if worker != owner]
    keys, array = owned(small, owner), small.array()
    an_hour_ago = time.time() - 3600
    for path in keys.values():
        os.utime(path, (an_hour_ago, an_hour_ago))
    # often enough to be stored here as well
    for _ in range(3):
        small.read(reader, array).result(timeout=60)
    assert keys.keys() <= owned(small, reader).keys()
    small.requests()
    limited = zarr.open_array(small.store(max_age_seconds=1800), mode="r", zarr_format=3)
    np.testing.assert_array_equal(small.read(reader, limited).result(timeout=60), small.dataset.values)
    assert small.requests() == [1] * len(keys)


# -- a source with validators: byte ranges, and secrets


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, S3Server]]:
    """Two nodes, and a server that is far away."""
    folder = tmp_path_factory.mktemp("remote")
    (folder / "s3" / "bucket").mkdir(parents=True)
    with s3_server(folder / "s3", latency=0.5) as s3, nodes(folder, 2) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin(peer_timeout=30))
        until(lambda: all(seen["peers"] == 1 for seen in metrics(client).values()))
        yield client, s3


def _shards(s3: S3Server, name: str, values: Any) -> Any:
    """A sharded array on the server, opened through the cache."""
    where = f"s3://bucket/{name}"
    source = xzcache.CacheStore(where, storage_options=words(s3))._store
    array = zarr.create_array(
        source, shape=values.shape, chunks=(64,), shards=(256,), dtype="f8", compressors=None, overwrite=True
    )
    array[:] = values
    store = xzcache.CacheStore(where, storage_options=words(s3), read_only=True)
    return zarr.open_array(store, mode="r", zarr_format=3)


def _some(array: Any) -> Any:
    """The first chunk of each shard, and then the third: byte ranges, of many shards at once."""
    first = (np.arange(0, array.shape[0], 256)[:, None] + np.arange(64)).ravel()
    return np.concatenate([array[first], array[first + 128]])


def _apart(array: Any) -> Any:
    """The same chunks, but each is read by itself: it is of one state."""
    return np.concatenate([array[start : start + 64] for start in range(0, array.shape[0], 128)])


def test_byte_ranges_of_shards(remote: tuple[Client, S3Server]) -> None:
    client, s3 = remote
    values = np.random.default_rng(1).random(4096)
    array = _shards(s3, "shards.zarr", values)
    expected = _some(values)
    s3.reset()
    first, second = sorted(client.nthreads())

    def read(worker: str) -> Any:
        return client.submit(_some, array, workers=[worker], pure=False).result(timeout=60)

    np.testing.assert_array_equal(read(first), expected)
    cold = s3.counts().only("GET", "*/c/*")
    given = total(metrics(client), "peer_hits")
    np.testing.assert_array_equal(read(second), expected)
    # the first node may have the source confirm its own shards, whose age it does not know
    assert s3.counts().only("GET", "*/c/*").bytes == cold.bytes
    assert total(metrics(client), "peer_hits") > given
    # as many bytes as one node alone fetches: an index and two chunks of each shard
    assert cold.bytes <= 16 * (2 * 64 * 8 + 2 * (4 * 16 + 4))


def test_a_shard_that_was_replaced_is_never_mixed(remote: tuple[Client, S3Server]) -> None:
    client, s3 = remote
    first, second = sorted(client.nthreads())
    values = np.random.default_rng(2).random(512)
    array = _shards(s3, "replaced.zarr", values)
    for worker in (first, second):
        client.submit(_index, array, workers=[worker], pure=False).result(timeout=60)
    # by another program, unseen
    _shards(s3, "replaced.zarr", values + 1)
    for worker in (second, first, second, first):
        found = client.submit(_apart, array, workers=[worker], pure=False).result(timeout=60)
        for start in range(0, len(found), 64):
            chunk, old = found[start : start + 64], _apart(values)[start : start + 64]
            assert np.array_equal(chunk, old) or np.array_equal(chunk, old + 1)
    # whichever node has seen the new state
    np.testing.assert_array_equal(found, _apart(values + 1))


def _pieces(client: Client, worker: str) -> dict[Path, float]:
    """The files of byte ranges on a node, and their times."""
    (node,) = [node for node in xzcache.cluster_info(client) if worker in node.workers]
    folder = Path(node.directory, ".xzcache", "ranges")
    return {path.relative_to(folder): path.stat().st_mtime for path in folder.rglob("*_*") if path.is_file()}


def test_byte_ranges_of_another_node_are_as_old_as_they_were_there(remote: tuple[Client, S3Server]) -> None:
    client, s3 = remote
    array = _shards(s3, "aged.zarr", np.random.default_rng(4).random(4096))
    first, second = sorted(client.nthreads())
    began = time.time()
    for worker in (first, second):
        client.submit(_some, array, workers=[worker], pure=False).result(timeout=60)
    # what one node has, the other one has now, and both know how old it is
    owners, there = _pieces(client, first), _pieces(client, second)
    both = [path for path in owners.keys() & there.keys() if max(owners[path], there[path]) > began - 1]
    assert len(both) >= 8
    for path in both:
        assert abs(owners[path] - there[path]) < 60
        assert min(owners[path], there[path]) > began - 60


def _index(array: Any) -> Any:
    return array[::256]


def test_a_chunk_that_one_node_has_found_rewritten_is_given_by_none(remote: tuple[Client, S3Server]) -> None:
    client, s3 = remote
    first, second = sorted(client.nthreads())
    where = "s3://bucket/rewritten.zarr"
    source = xzcache.CacheStore(where, storage_options=words(s3))._store
    outside = zarr.create_array(source, shape=(64,), chunks=(8,), dtype="f8", compressors=None)
    outside[:] = np.arange(64.0)

    def opened(**options: Any) -> Any:
        store = xzcache.CacheStore(where, storage_options=words(s3), read_only=True, **options)
        return zarr.open_array(store, mode="r", zarr_format=3)

    def read(worker: str, array: Any) -> Any:
        return client.submit(_read, array, workers=[worker], pure=False).result(timeout=60)

    array, watchful = opened(), opened(revalidate=True)
    # each of them has its own chunks, and the first has all of them
    for worker in (first, first, second):
        read(worker, array)
    read(first, array)
    outside[:] = -np.arange(64.0)
    np.testing.assert_array_equal(read(first, watchful), -np.arange(64.0))
    each_node(client, xzcache.clear, nodes=first)
    # what the second node has of its own is not given away as it was
    np.testing.assert_array_equal(read(first, array), -np.arange(64.0))


# -- many at once


@pytest.mark.soak
def test_nodes_that_ask_each_other_at_the_same_time(tmp_path: Path) -> None:
    """Two workers with several threads a node, which read the same chunks in different orders, and cross each other."""
    with nodes(tmp_path, 2, per_node=2, nthreads=4) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin(peer_timeout=30))
        cluster = Cluster(client, tmp_path, 2)
        array = cluster.array()
        results = [cluster.run(worker, _read_by, array, seed) for worker in cluster.workers for seed in range(4)]
        for result in results:
            np.testing.assert_array_equal(result.result(timeout=120), cluster.dataset.values)
        # on a busy machine, an answer may come too late
        found = cluster.requests()
        assert len(found) == cluster.dataset.chunks
        assert max(found) <= 2
        assert sum(found) <= 1.1 * len(found)


def _read_by(array: Any, seed: int) -> Any:
    """Chunk by chunk, in an order of its own."""
    found = np.empty(array.shape)
    for number in np.random.default_rng(seed).permutation(array.nchunks):
        i, j = divmod(int(number), array.cdata_shape[1])
        part = (slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
        found[part] = array[part]
    return found


@pytest.mark.soak
def test_with_affinity_the_source_is_asked_once_whatever_is_computed(tmp_path: Path) -> None:
    with nodes(tmp_path, 3) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin(peer_timeout=30, affinity="auto"))
        cluster = Cluster(client, tmp_path, 3)
        array = cluster.array()
        lazy = da.from_array(array, chunks=array.chunks)
        values = cluster.dataset.values
        assert lazy.sum().compute() == values.sum()
        np.testing.assert_allclose(lazy.std().compute(), values.std())
        shifted = (lazy[1:] - lazy[:-1]).max().compute()
        assert shifted == (values[1:] - values[:-1]).max()
        # Dask's chunks are not those of the source
        assert lazy.rechunk((16, 24)).min().compute() == 0
        assert cluster.requests() == [1] * cluster.dataset.chunks


@pytest.mark.soak
def test_a_node_that_joins_gets_its_share_from_the_nodes_that_had_it(tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as client, xzcache.config.set(directory=None):
        client.register_plugin(plugin(peer_timeout=30))
        cluster = Cluster(client, tmp_path, 2)
        for _ in range(2):
            # asked for twice, so that each node has all
            for worker in cluster.workers:
                cluster.read(worker).result()
        cluster.requests()
        made: Any = client.cluster
        spec = made.worker_spec["1.0"]
        made.worker_spec["2.0"] = {
            **spec,
            "options": {**spec["options"], "env": {"XZCACHE_DIRECTORY": str(tmp_path / "node2")}},
        }
        client.sync(made._correct_state)
        until(lambda: [seen.get("peers") for seen in metrics(client).values()] == [2] * 3)
        (joined,) = client.nthreads().keys() - set(cluster.workers)
        np.testing.assert_array_equal(cluster.read(joined).result(), cluster.dataset.values)
        assert cluster.requests() == []
        # it keeps its share at once, and what is the others' once it was asked for again
        used = {node.workers[0]: node.used for node in xzcache.cluster_info(client)}
        assert 0 < used[joined] < 0.7 * used[cluster.workers[0]]
