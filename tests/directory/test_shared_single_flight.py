"""However many processes, threads and tasks want a cold object, the source is asked once; and somebody always asks."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from processes import Dataset, Gate, Team, audit, barrier, tell_when_waiting, visit
from sources import Part, between, by_ranges, read
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype

THREADS = 8


def read_at_once(link: Connection, data: Dataset) -> None:
    barrier(link)
    data.read()


def read_by_threads(link: Connection, data: Dataset, seed: int) -> None:
    """Every thread reads every chunk, each in an order of its own."""
    barrier(link)
    array = data.array()
    side = int(data.chunks**0.5)
    step = array.shape[0] // side
    start = threading.Barrier(THREADS)

    def read(number: int) -> None:
        places = [(i, j) for i in range(side) for j in range(side)]
        random.Random(seed * THREADS + number).shuffle(places)
        start.wait()
        for i, j in places:
            part = slice(i * step, (i + 1) * step), slice(j * step, (j + 1) * step)
            np.testing.assert_array_equal(array[part], data.values[part])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(THREADS)))


@pytest.mark.parametrize("processes", [4, 8])
@pytest.mark.parametrize("by_threads", [False, True], ids=["tasks", "threads"])
@pytest.mark.slow
def test_one_request_a_chunk(tmp_path: Path, processes: int, by_threads: bool) -> None:
    data = Dataset(tmp_path)
    # an interpreter from scratch takes a second of a core; the fork server's processes have as little in common
    method = "spawn" if processes == 4 else "forkserver"
    with Team() as team:
        for number in range(processes):
            if by_threads:
                team.start(read_by_threads, data, number, method=method)
            else:
                team.start(read_at_once, data, method=method)
        team.go()
        team.results()
    counts = data.chunk_requests()
    print(f"{processes} processes: {sum(counts.values()) / data.chunks:.2f} requests a chunk")
    assert counts == dict.fromkeys(data.keys(), 1)
    assert audit(data.root) >= data.chunks


# -- leaders that do not come back


PARTS: dict[str, Part] = {"whole": None, "range": RangeByteRequest(8, 800), "ranges": between((8, 800), (4000, 4100))}
WHAT = pytest.mark.parametrize("what", ["whole", "range", pytest.param("ranges", marks=by_ranges)])


def get(link: Connection, data: Dataset, keys: list[str], part: Part = None) -> list[bytes]:
    """Get keys one after the other, each on a word; tell when another process turns out to have the lead."""
    tell_when_waiting(link)
    store = data.store()

    async def get_all() -> list[bytes]:
        found = []
        for key in keys:
            assert link.recv() == "get"
            value = await read(store, key, part)
            assert value is not None
            found.append(value)
            link.send("got")
        return found

    return asyncio.run(get_all())


def value_of(data: Dataset, key: str, part: Part = None) -> bytes:
    value = Path(data.place, key).read_bytes()
    if part is None:
        return value
    return b"".join(value[each.start : each.end] for each in (part if isinstance(part, list) else [part]))


@WHAT
def test_a_killed_leader_is_followed(tmp_path: Path, what: str) -> None:
    gate = Gate(tmp_path / "gate")
    data = Dataset(tmp_path, side=5, gate=gate)
    keys, part = data.keys()[: 20 if what == "whole" else 8], PARTS[what]
    delays = []
    with Team() as team:
        waiter = team.start(get, data, keys, part)
        for key in keys:
            leader = team.start(get, data, [key], part)
            leader.send("get")
            arrived = gate.arrival()
            assert (arrived.pid, arrived.key) == (leader.pid, key)
            waiter.send("get")
            waiter.hear("waiting")
            killed = leader.kill()
            arrived = gate.arrival()
            assert (arrived.pid, arrived.key) == (waiter.pid, key)
            delays.append((arrived.at - killed) / 1e6)
            gate.open()
            waiter.hear("got")
            gate.shut()
            team.dismiss(leader)
        assert waiter.result() == [value_of(data, key, part) for key in keys]
    gate.close()
    print(f"taken over after {statistics.median(delays):.1f} ms in the median, {max(delays):.1f} ms at the most")
    # one or another may have to wait for a processor
    assert statistics.median(delays) < 1000
    assert data.chunk_requests() == dict.fromkeys(keys, 2)
    visit(data.root)
    assert audit(data.root) == len(keys)


@WHAT
def test_a_stopped_leader_is_waited_for_until_the_deadline(tmp_path: Path, what: str) -> None:
    gate = Gate(tmp_path / "gate")
    data = Dataset(tmp_path, side=2, gate=gate)
    key, part = data.keys()[0], PARTS[what]
    with Team() as team:
        leader = team.start(get, data, [key], part)
        leader.send("get")
        assert gate.arrival().pid == leader.pid
        leader.signal(signal.SIGSTOP)
        waiter = team.start(get, data, [key], part, settings={"fetch_timeout": 0.5})
        patient = team.start(get, data, [key], part)
        for child in (waiter, patient):
            child.send("get")
            child.hear("waiting")
        assert gate.arrival().pid == waiter.pid
        gate.open()
        assert waiter.result() == [value_of(data, key, part)]
        # what the impatient one stored serves the patient one, although the leader still has the lock
        assert patient.result() == [value_of(data, key, part)]
        assert len(data.requests()) == 2
        leader.signal(signal.SIGCONT)
        assert leader.result() == [value_of(data, key, part)]
    gate.close()
    assert data.chunk_requests() == {key: 2}
    assert audit(data.root) == 1


def be_cancelled(link: Connection, data: Dataset, key: str, part: Part) -> None:
    """Lead, with a second task of the same process waiting; both are cancelled, and the process lives on."""

    async def lead() -> None:
        store = data.store()
        leader = asyncio.create_task(read(store, key, part))
        assert await asyncio.to_thread(link.recv) == "cancel"
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        assert await asyncio.to_thread(link.recv) == "end"

    asyncio.run(lead())


@WHAT
def test_a_cancelled_leader_hands_over_to_another_process(tmp_path: Path, what: str) -> None:
    gate = Gate(tmp_path / "gate")
    data = Dataset(tmp_path, side=2, gate=gate)
    key, part = data.keys()[0], PARTS[what]
    with Team() as team:
        leader = team.start(be_cancelled, data, key, part)
        assert gate.arrival().pid == leader.pid
        waiter = team.start(get, data, [key], part)
        waiter.send("get")
        waiter.hear("waiting")
        leader.send("cancel")
        assert gate.arrival().pid == waiter.pid
        gate.open()
        assert waiter.result() == [value_of(data, key, part)]
        leader.send("end")
        leader.result()
    gate.close()
    assert data.chunk_requests() == {key: 2}
    assert audit(data.root) == 1


def cancel_one_of_two(link: Connection, data: Dataset, key: str, part: Part) -> bytes:
    async def read_twice() -> bytes:
        store = data.store()
        leader = asyncio.create_task(read(store, key, part))
        waiter = asyncio.create_task(read(store, key, part))
        assert await asyncio.to_thread(link.recv) == "cancel"
        leader.cancel()
        value = await waiter
        assert leader.cancelled()
        assert value is not None
        return value

    return asyncio.run(read_twice())


@WHAT
def test_a_cancelled_leader_hands_over_to_a_task_of_its_own(tmp_path: Path, what: str) -> None:
    gate = Gate(tmp_path / "gate")
    data = Dataset(tmp_path, side=2, gate=gate)
    key, part = data.keys()[0], PARTS[what]
    with Team() as team:
        child = team.start(cancel_one_of_two, data, key, part)
        gate.arrival()
        child.send("cancel")
        gate.arrival()
        gate.open()
        assert child.result() == value_of(data, key, part)
    gate.close()
    assert data.chunk_requests() == {key: 2}
    assert audit(data.root) == 1


@by_ranges
@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_bytes_that_a_lost_leader_was_to_fetch_are_fetched_by_who_waits_for_them(tmp_path: Path, end: str) -> None:
    """Who wants some of them as well asks for the others at once, and waits for those."""
    gate = Gate(tmp_path / "gate")
    data = Dataset(tmp_path, side=2, gate=gate)
    key, theirs, ours = data.keys()[0], between((0, 1000)), between((500, 2000))
    with Team() as team:
        leader = team.start(get, data, [key], theirs)
        leader.send("get")
        assert gate.arrival().pid == leader.pid
        waiter = team.start(get, data, [key], ours, settings={"fetch_timeout": 0.5 if end == "stopped" else 60})
        other = team.start(get, data, [key], between((2000, 3000)))
        for child in (waiter, other):
            child.send("get")
            assert gate.arrival().pid == child.pid
        waiter.hear("waiting")
        leader.signal(signal.SIGSTOP)
        gate.open()
        # of the same object, but nobody's
        assert other.result() == [value_of(data, key, between((2000, 3000)))]
        if end == "killed":
            leader.kill()
        assert waiter.result() == [value_of(data, key, ours)]
        if end == "stopped":
            leader.signal(signal.SIGCONT)
            assert leader.result() == [value_of(data, key, theirs)]
    gate.close()
    visit(data.root)
    audit(data.root)


# -- a directory that is not there yet


def begin_anew(link: Connection, places: list[Dataset], number: int) -> int:
    """Read one chunk of each of several arrays, each in a cache directory of its own, at the same time as others."""
    troubles = 0
    for data in places:
        barrier(link)
        store = data.store()
        for key in (data.keys()[0], data.keys()[1 + number % 3]):
            value = asyncio.run(store.get(key, default_buffer_prototype()))
            assert value is not None
            assert value.to_bytes() == value_of(data, key)
        troubles += store.cache_stats()["cache_errors"]
    return troubles


def test_a_directory_that_many_make_at_once_works_from_the_first_chunk(tmp_path: Path) -> None:
    places = []
    for number in range(15):
        (tmp_path / str(number)).mkdir()
        places.append(Dataset(tmp_path / str(number), side=2, chunk=8))
    with Team() as team:
        for number in range(8):
            team.start(begin_anew, places, number)
        for _ in places:
            team.go()
        troubles = team.results()
    for data in places:
        assert data.chunk_requests() == dict.fromkeys(data.keys(), 1)
        assert audit(data.root) == 4
    assert troubles == [0] * 8
