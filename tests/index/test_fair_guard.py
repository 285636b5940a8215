"""The guard is taken in turns: a process that takes it again and again leaves it to those that wait."""

from __future__ import annotations

import os
import signal
import statistics
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


def take_on(link: Connection, root: str, count: str) -> None:
    """Have the guard for 3 ms again and again, and count how often."""
    session = IndexSession(root, PATIENCE)
    file = os.open(count, os.O_WRONLY)
    number = 0
    barrier(link)
    while not link.poll():
        with session.section() as (_, index):
            end = time.perf_counter() + 0.003
            while time.perf_counter() < end:
                index.totals()
            number += 1
            os.pwrite(file, number.to_bytes(8, "little"), 0)
    os.close(file)
    session.close()


def test_a_process_that_has_the_guard_all_the_time_leaves_it_to_one_that_waits(
    session: IndexSession, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    count.write_bytes(bytes(8))

    def number() -> int:
        return int.from_bytes(count.read_bytes(), "little")

    def go_on(to: int) -> None:
        until(lambda: number() >= to)

    passed = []
    with Team() as team:
        child = team.start(take_on, session.root, str(count))
        team.go()
        for _ in range(TURNS):
            # it has gone on since
            go_on(number() + 2)
            before = number()
            with session.section():
                passed.append(number() - before)
        child.send("stop")
        team.results()
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
