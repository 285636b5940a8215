"""A forked child has its own part in a cache directory, and takes nothing from its parent's."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from processes import (
    Dataset,
    Done,
    Gate,
    Team,
    audit,
    barrier,
    made,
    opened_index,
    run,
    tell_when_waiting,
    version_of,
    visit,
)
from zarr.core.buffer import default_buffer_prototype

import xzcache
from xzcache.index._registration import Registration
from xzcache.model.entry import END

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.timeout(60),
]

KEY = "source/k"


def forked(action: Callable[[], Any]) -> Callable[[], None]:
    """Fork a child that does something; what waits for its end and tells whether it went well."""
    pid = os.fork()
    if pid == 0:
        status = 1
        # one that hangs must not outlive a failed test: nobody else knows of it
        signal.alarm(50)
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # as multiprocessing does: no exit handlers
            os._exit(status)

    def end() -> None:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "the child's own trace is on stderr"

    return end


def put(store: xzcache.LockedLocalStore, key: str, version: int = 0) -> None:
    store.set_sync(key, default_buffer_prototype().buffer.from_bytes(made(key, version, 1000)))


def has(store: xzcache.LockedLocalStore, key: str, version: int = 0) -> bool:
    value = store.get_sync(key)
    return value is not None and version_of(key, value.to_bytes(), 1000) == version


def opened(root: str) -> tuple[xzcache.LockedLocalStore, Registration]:
    store = xzcache.LockedLocalStore(root, max_size=1 << 20)
    put(store, "from-parent")
    member = store.directory.session.current
    assert member is not None
    return store, member


def index_descriptors(root: str) -> list[str]:
    """What of the index this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(f"{os.path.realpath(root)}/.xzcache/index-")]


class Prober:
    """Another process, which tells what is locked: this one cannot tell for its own locks."""

    def __init__(self, team: Team, root: str) -> None:
        self._child = team.start(probe, root)
        self._child.hear("ready")

    def is_free(self, kind: str, what: Any) -> bool:
        self._child.send((kind, what))
        return bool(self._child.hear())

    def end(self) -> None:
        self._child.send(None)
        self._child.result()


def probe(link: Connection, root: str) -> None:
    store = xzcache.LockedLocalStore(root)
    assert store.directory.prepare()
    member = store.directory.session.current
    assert member is not None
    link.send("ready")
    while question := link.recv():
        kind, what = question
        if kind == "key":
            unlock = store.directory.fetch_locks.acquire(what, (0, END))
            if not isinstance(unlock, tuple):
                unlock()
            link.send(not isinstance(unlock, tuple))
        else:
            free = member.owners.try_lock(what)
            if free:
                member.owners.unlock(what)
            link.send(free)


# -- each runs in a process of its own, which forks


def host(link: Connection, root: str, scene: str) -> None:
    """Run a scene, asking the test to probe locks."""

    def is_free(kind: str, what: Any) -> bool:
        link.send((kind, what))
        return bool(link.recv())

    SCENES[scene](root, is_free)


def key_lock_stays(root: str, is_free: Callable[[str, Any], bool]) -> None:
    store, _ = opened(root)
    unlock = store.directory.fetch_locks.acquire(KEY, (0, END))
    assert not isinstance(unlock, tuple)
    assert not is_free("key", KEY)

    def child() -> None:
        # the parent leads, for the child as for anybody
        put(store, "from-child")
        assert isinstance(store.directory.fetch_locks.acquire(KEY, (0, END)), tuple)
        store.directory.close()

    forked(child)()
    forked(lambda: None)()
    assert not is_free("key", KEY)
    unlock()
    assert is_free("key", KEY)


def owner_byte_stays(root: str, is_free: Callable[[str, Any], bool]) -> None:
    store, member = opened(root)
    owner = member.owner

    def child() -> None:
        assert store.directory.session.current is None
        put(store, "from-child")
        mine = store.directory.session.current
        assert mine is not None
        assert mine.owner != owner
        assert not is_free("owner", mine.owner)
        assert not is_free("owner", owner)
        store.directory.close()
        assert is_free("owner", mine.owner)

    forked(child)()
    forked(lambda: None)()
    assert not is_free("owner", owner)
    # and nobody takes the parent for dead
    assert store.directory.session.current is member
    put(store, "from-parent-again")
    assert member.owner == owner


def lease_is_not_shared(root: str, is_free: Callable[[str, Any], bool]) -> None:
    """What the parent leased is the parent's: a child that spent it as well would break the bound."""
    store, member = opened(root)
    leased = member.free
    assert leased > 0

    def child() -> None:
        for number in range(5):
            put(store, f"child-{number}")

    forked(child)()
    assert member.free == leased
    with opened_index(root) as index:
        ((lease,),) = index.execute("SELECT lease FROM owner WHERE id = ?", (member.owner,))
    assert lease == leased
    assert all(has(store, f"child-{number}") for number in range(5))


def child_dies_alone(root: str, is_free: Callable[[str, Any], bool]) -> None:
    """A child that leaves without a word is buried; its parent is not."""
    store, _ = opened(root)
    forked(lambda: put(store, "from-child"))()
    store.directory.close()
    assert store.directory.prepare()
    with opened_index(root) as index:
        assert len(index.execute("SELECT id FROM owner").fetchall()) == 2  # this one, and the prober
    assert has(store, "from-child")


def fork_during_a_section(root: str, is_free: Callable[[str, Any], bool]) -> None:
    """A thread is within a section, with the guard, when another one forks."""
    store, _ = opened(root)
    inside, forking = threading.Event(), threading.Event()
    os.register_at_fork(before=forking.set)
    order = []

    def hold() -> None:
        with store.directory.session.section() as (_, index):
            inside.set()
            # the handlers that are registered last run first: the fork has begun, and waits for this section
            assert forking.wait(30)
            assert index.totals().entries == 1
            order.append("section")

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)

    def child() -> None:
        assert order == ["section"]
        put(store, "from-child")
        store.directory.close()

    end = forked(child)
    put(store, "from-parent-again")
    end()
    thread.join()
    assert has(store, "from-child")


def connection_is_not_touched(root: str, is_free: Callable[[str, Any], bool]) -> None:
    """SQLite forbids to use or close a parent's connection in a child."""
    store, _ = opened(root)
    assert len(index_descriptors(root)) == 1

    def child() -> None:
        assert index_descriptors(root) == [], "there is nothing of the parent's that could be used or closed"
        put(store, "from-child")
        assert len(index_descriptors(root)) == 1
        store.directory.close()
        assert index_descriptors(root) == []

    forked(child)()
    put(store, "from-parent-again")
    assert has(store, "from-child")


def grandchildren(root: str, is_free: Callable[[str, Any], bool]) -> None:
    store, _ = opened(root)

    def child() -> None:
        put(store, "child")
        forked(lambda: put(store, "grandchild"))()
        put(store, "child-again")
        store.directory.close()

    for end in [forked(child) for _ in range(3)]:
        end()
    assert all(has(store, key) for key in ("from-parent", "child", "grandchild", "child-again"))


SCENES: dict[str, Callable[[str, Callable[[str, Any], bool]], None]] = {
    scene.__name__: scene
    for scene in (
        key_lock_stays,
        owner_byte_stays,
        lease_is_not_shared,
        child_dies_alone,
        fork_during_a_section,
        connection_is_not_touched,
        grandchildren,
    )
}


@pytest.mark.parametrize("scene", SCENES)
def test_fork(tmp_path: Path, scene: str) -> None:
    root = str(tmp_path)
    with Team() as team:
        prober = Prober(team, root)
        child = team.start(host, root, scene)
        while not isinstance(question := child.hear(), Done):
            child.send(prober.is_free(*question))
        assert child.exit_code() == 0
        prober.end()
    visit(root)
    assert audit(root) >= 1


# -- reads through a cache, from a parent and its children


def read_in_family(link: Connection, data: Dataset) -> None:
    """Read in the parent, which has an event loop and threads then, and in children made before and after."""
    store = data.store()
    first, second, *_ = data.keys()

    def read(key: str) -> None:
        value = asyncio.run(store.get(key, default_buffer_prototype()))
        assert value is not None
        assert value.to_bytes() == Path(data.place, key).read_bytes()

    barrier(link)
    for end in [forked(lambda: read(first)) for _ in range(3)]:
        end()
    read(first)
    for end in [forked(lambda: [read(first), read(second)]) for _ in range(3)]:
        end()
    read(second)


def test_a_family_asks_once(tmp_path: Path) -> None:
    data = Dataset(tmp_path, side=2)
    with Team() as team:
        team.start(read_in_family, data)
        team.start(read_in_family, data)
        team.go()
        team.results()
    assert data.chunk_requests() == dict.fromkeys(data.keys()[:2], 1)
    visit(data.root)
    assert audit(data.root) == 2


def fork_while_fetching(link: Connection, data: Dataset) -> None:
    """The child of a process that waits for the source wants the same object."""
    store = data.store()
    key = data.keys()[0]

    def read() -> None:
        value = asyncio.run(store.get(key, default_buffer_prototype()))
        assert value is not None
        assert value.to_bytes() == Path(data.place, key).read_bytes()

    thread = threading.Thread(target=read)
    thread.start()
    assert link.recv() == "fork"
    # its table of fetches must be empty: nobody in the child will land this one
    tell_when_waiting(link)
    forked(read)()
    thread.join()


def test_a_child_waits_for_its_parents_fetch(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    data = Dataset(tmp_path, side=2, gate=gate)
    with Team() as team:
        child = team.start(fork_while_fetching, data)
        gate.arrival()
        child.send("fork")
        child.hear("waiting")
        gate.open()
        child.result()
    gate.close()
    assert data.chunk_requests() == {data.keys()[0]: 1}
    visit(data.root)
    assert audit(data.root) == 1


def test_fork_of_a_process_that_never_used_it(tmp_path: Path) -> None:
    run(fork_first, str(tmp_path))
    visit(str(tmp_path))
    assert audit(str(tmp_path)) == 1


def fork_first(link: Connection, root: str) -> None:
    store = xzcache.LockedLocalStore(root)
    forked(lambda: put(store, "from-child"))()
    assert has(store, "from-child")
