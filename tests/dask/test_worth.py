"""Whom a node asks, and how long it waits, as the latest answers tell; with a clock of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xzcache.dask import _worth
from xzcache.dask._worth import Whom, Worth

SLOW, FAST = Whom("tcp://slow", "source", "source/a"), Whom("tcp://fast", "source", "source/a")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(_worth, "time", clock)
    return clock


def test_one_slow_owner_is_left_alone_and_the_others_are_not(clock: SimpleNamespace) -> None:
    worth = Worth(0.1)
    worth.source_took("source", 0.03)
    # each of its answers is in time, and later than the source
    for _ in range(16):
        worth.gave(SLOW, 0.09)
        for _ in range(2):
            worth.gave(FAST, 0.002)
    assert not worth.may_ask(SLOW)
    assert worth.may_ask(FAST)
    assert worth.may_ask(SLOW._replace(namespace="slower source"))
    clock.now += 1.0
    assert worth.may_ask(SLOW)
    for _ in range(16):
        worth.gave(SLOW, 0.09)
    clock.now += 1.0
    # longer each time
    assert not worth.may_ask(SLOW)


def test_where_most_answers_are_slow_nobody_is_asked(clock: SimpleNamespace) -> None:
    worth = Worth(0.1)
    worth.source_took("source", 0.001)
    for _ in range(8):
        worth.gave(SLOW, 0.002)
        worth.gave(FAST, 0.002)
    assert not worth.may_ask(SLOW)
    assert not worth.may_ask(FAST)


def test_twice_in_a_row_in_vain(clock: SimpleNamespace) -> None:
    worth = Worth(0.1)
    other_array = SLOW._replace(array="source/b")
    worth.refused(SLOW, clock.now)
    # at the same time
    worth.refused(SLOW, clock.now)
    assert worth.may_ask(SLOW)
    clock.now += 0.1
    worth.refused(SLOW, clock.now)
    assert not worth.may_ask(SLOW)
    assert worth.may_ask(other_array)
    worth.was_late(FAST, clock.now)
    clock.now += 0.1
    worth.gave(FAST, 0.002)
    worth.was_late(FAST, clock.now)
    assert worth.may_ask(FAST)
    clock.now += 0.1
    worth.was_late(FAST, clock.now)
    assert not worth.may_ask(FAST)
    assert not worth.may_ask(FAST._replace(array="source/b"))


def test_how_long_to_wait(clock: SimpleNamespace) -> None:
    worth = Worth(0.1)
    # nothing is known of the source here, and perhaps there
    assert worth.limit("source", None) == 0.1
    assert worth.limit("source", 2.0) == 2.1
    worth.source_took("source", 0.03)
    assert worth.limit("source", 2.0) == pytest.approx(0.03 + 4 * 0.015 + 0.1)
