"""The guard is taken in turns: a process that takes it again and again leaves it to those that wait."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from processes import PATIENCE, Team, barrier, until

from xzcache.index import Index, IndexSession

TURNS = 40


@pytest.fixture
def session(tmp_path: Path) -> Iterator[IndexSession]:
    session = IndexSession(str(tmp_path / "cache"), PATIENCE)
    with session.guarded() as process:
        Index(process.index_path(7), create=True).close()
        process.begin_generation(7)
    yield session
    session.close()


def test_a_process_that_has_the_guard_all_the_time_leaves_it_to_one_that_waits(session: IndexSession) -> None:
    other = IndexSession(session.root, PATIENCE)
    count, ends = 0, threading.Event()

    def take_on() -> None:
        nonlocal count
        while not ends.is_set():
            with other.section() as (_, index):
                end = time.perf_counter() + 0.001
                while time.perf_counter() < end:
                    index.totals()
            count += 1

    thread = threading.Thread(target=take_on)
    thread.start()
    passed = []
    try:
        for _ in range(TURNS):
            before = count
            with session.section():
                passed.append(count - before)
            # the other one goes on meanwhile
            now = count
            while count == now and thread.is_alive():
                time.sleep(0)
    finally:
        ends.set()
        thread.join()
        other.close()
    assert statistics.median(passed) <= 3, passed


def take_turns(link: Connection, root: str) -> int:
    """Take the guard again and again, until told to stop."""
    session = IndexSession(root, PATIENCE)
    count = 0
    barrier(link)
    while not link.poll():
        with session.section():
            count += 1
    session.close()
    return count


def is_next(root: str) -> bool:
    """Whether a process holds the byte of the one that gets the guard next."""
    held = f":{os.stat(f'{root}/.xzcache/lock').st_ino} {(1 << 62) + 1} "
    return held in Path("/proc/locks").read_text()


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="the kernel lists no locks")
def test_a_process_that_is_stopped_while_it_waits_keeps_nobody_out(session: IndexSession) -> None:
    with Team() as team:
        child = team.start(take_turns, session.root)
        with session.section():
            team.go()
            until(lambda: is_next(session.root))
            os.kill(child.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            for _ in range(TURNS):
                with session.section():
                    pass
            # a courtesy of 20 ms from time to time, and not in each turn
            assert time.monotonic() - began < 10
        finally:
            os.kill(child.pid, signal.SIGCONT)
        child.send("stop")
        team.results()
