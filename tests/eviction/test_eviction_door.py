"""Eviction through its door: who leaves, what a policy learns, and uses that are not in the index yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xzcache
from xzcache.eviction import POLICIES, Policy, Recency, Sample, predicted, recency_for
from xzcache.index import USES, Index, UsesRow, hash_of
from xzcache.model import Entry

SIZE = 100
COUNT = 40
ENTRIES = [Entry(f"s/a/c/{number}") for number in range(COUNT)]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    """An index of entries that were stored in their order; nothing is cached, as no policy touches a file."""
    with closing(Index(str(tmp_path / "index-1.db"), create=True)) as index:
        index.begin()
        for number, entry in enumerate(ENTRIES):
            add(index, entry, used=number + 1)
        yield index


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]()


def add(index: Index, entry: Entry, *, used: int, size: int = SIZE) -> None:
    index.add(entry, hashed=False, size=size, crc=1, used=used, owner=1, seq=1)


class Alone:
    """Sections of an index that nothing else uses: one transaction without an end."""

    def __init__(self, index: Index) -> None:
        self._index = index

    @contextmanager
    def section(self) -> Iterator[tuple[None, Index]]:
        yield None, self._index


def evict(index: Index, policy: Policy, want: int) -> list[Entry]:
    policy.prepare(Alone(index), want)
    rows = policy.choose(index, want)
    for row in rows:
        index.remove(row.id)
    return [row.entry for row in rows]


# -- who leaves


def test_what_was_used_last_leaves_last(index: Index) -> None:
    for name in ("lru", "none"):
        policy = POLICIES[name]()
        recency = Recency(policy)
        recency.record_use(ENTRIES[0])
        recency.record_use(ENTRIES[2])
        recency.flush_to(index)
        assert [row.entry for row in policy.choose(index, 3 * SIZE)] == [ENTRIES[1], ENTRIES[3], ENTRIES[4]]
    assert {name: POLICIES[name].evicts for name in POLICIES} == {"lru": True, "adaptive": True, "none": False}


def test_as_much_leaves_as_is_wanted_and_no_more(index: Index, policy: Policy) -> None:
    index.connection.execute("UPDATE entry SET size = id")
    index.mend_totals()
    left = {row.entry: row.size for row in index.rows()}
    for want in (1, 30, 150):
        freed = 0
        while freed < want:
            rows = policy.choose(index, want - freed)
            assert rows
            assert sum(row.size for row in rows[:-1]) < want - freed
            for row in rows:
                index.remove(row.id)
                freed += left.pop(row.entry)
    assert {row.entry for row in index.rows()} == set(left)


def test_all_leave_if_all_must_and_then_none(index: Index, policy: Policy) -> None:
    gone: list[Entry] = []
    while chosen := evict(index, policy, 1000 * SIZE):
        gone += chosen
    assert sorted(gone) == sorted(ENTRIES)
    assert policy.choose(index, 1) == []


def test_a_use_that_came_in_time_saves_an_entry(index: Index, policy: Policy) -> None:
    recency = Recency(policy)
    kept = ENTRIES[: COUNT // 2]
    for _ in range(4):
        for entry in kept:
            recency.record_use(entry)
        recency.flush_to(index)
    gone: list[Entry] = []
    while len(gone) < COUNT // 4:
        gone += evict(index, policy, SIZE)
    assert not set(gone) & set(kept)


def test_uses_of_what_has_left_harm_nothing(index: Index, policy: Policy) -> None:
    recency = Recency(policy)
    for entry in (*ENTRIES[:3], Entry("s/never"), Entry(ENTRIES[0].key, 5, 9)):
        recency.record_use(entry)
    (row,) = index.of_key(ENTRIES[0].key)
    index.remove(row.id)
    recency.flush_to(index)
    assert index.totals().entries == COUNT - 1
    assert index.wrong_totals() == []


# -- what "adaptive" has learned lies in the index


def rounds(index: Index, policy: Policy, count: int, begin: int = 0) -> int:
    """Read one more entry than there is room for, over and over; returns the hits of the last round."""
    recency, hits = Recency(policy), 0
    for number in range(begin, begin + count):
        hits = 0
        for entry in (Entry(f"s/loop/{each}") for each in range(COUNT + COUNT // 4)):
            if index.find(entry) is not None:
                hits += 1
                recency.record_use(entry)
                recency.flush_to(index)
            else:
                while index.totals().entries >= COUNT:
                    evict(index, policy, SIZE)
                add(index, entry, used=1_000_000 * number + 1)
                recency.flush_to(index, [entry])
    return hits


def test_a_loop_that_is_larger_than_the_cache_is_learned_by_all(index: Index) -> None:
    assert rounds(index, POLICIES["lru"](), 2) == 0
    assert rounds(index, POLICIES["adaptive"](), 30, 2) > COUNT // 4
    assert index.history.learned_serial() > 0
    # a process that begins knows what the others have learned
    assert rounds(index, POLICIES["adaptive"](), 1, 32) > COUNT // 4


@pytest.mark.parametrize("state", [b"", b"garbage", b"\0" * 5000])
def test_a_learned_state_that_is_garbage_is_learned_anew(index: Index, state: bytes) -> None:
    index.history.set_learned(state)
    policy = POLICIES["adaptive"]()
    rounds(index, policy, 5)
    learned = index.history.learned()
    assert learned is not None
    assert learned.state != state


def test_an_entry_that_adaptive_evicts_leaves_a_ghost(index: Index) -> None:
    gone = evict(index, POLICIES["adaptive"](), 3 * SIZE)
    assert index.history.ghosts() == len(gone) == 3
    evict(index, POLICIES["lru"](), SIZE)
    assert index.history.ghosts() == 3


# -- uses that are not in the index yet


class Told:
    """A policy that is told of uses."""

    name = "told"
    evicts = True

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def record(self, index: Index, batch: Any) -> None:
        self.batches.append(batch)

    def choose(self, index: Index, want: int) -> list[Any]:
        return []


def test_a_use_is_told_once_in_a_batch(index: Index) -> None:
    told = Told()
    recency = Recency(told, most=4, longest=1e9)
    assert not recency
    due = [recency.record_use(entry) for entry in (*ENTRIES[:2], *ENTRIES[:4])]
    assert due == [False, False, False, False, False, True]
    assert recency
    recency.flush_to(index, [ENTRIES[9]])
    recency.flush_to(index)
    assert not recency
    (batch,) = told.batches
    assert set(batch.uses) == set(ENTRIES[:4])
    assert batch.arrived == [ENTRIES[9]]
    assert sorted(batch.uses.values()) == list(batch.uses.values())


def test_a_use_is_told_at_last_though_there_are_few(index: Index) -> None:
    recency = Recency(Told(), most=1000, longest=0.0)
    assert recency.record_use(ENTRIES[0])
    # the flush is under way
    assert not recency.record_use(ENTRIES[1])


def told_after(recency: Recency, index: Index) -> int:
    """After how many uses a flush is due; flushes."""
    count = next(number for number in range(1, 1000) if recency.record_use(Entry(f"s/used/{number}")))
    recency.flush_to(index)
    return count


def test_uses_are_told_sooner_while_entries_of_others_leave(index: Index) -> None:
    recency = Recency(Told(), most=64, longest=1e9)
    for _ in range(2):
        index.add_owner(1)
    for number in range(40, 320):
        add(index, Entry(f"s/a/c/{number}"), used=number + 1)
    assert told_after(recency, index) == 64
    evict(index, POLICIES["lru"](), SIZE)
    assert told_after(recency, index) == 64
    # some 320 entries, of which the other process may keep a 32nd to itself
    assert told_after(recency, index) == 9
    # none leaves
    assert [told_after(recency, index) for _ in range(3)] == [18, 36, 64]
    while index.totals().entries > 20:
        evict(index, POLICIES["lru"](), SIZE)
    told_after(recency, index)
    assert told_after(recency, index) == 8
    # alone, it evicts with all of its uses told
    index.drop_owner(1)
    evict(index, POLICIES["lru"](), SIZE)
    assert [told_after(recency, index) for _ in range(4)] == [16, 32, 64, 64]


def test_fewer_uses_of_a_large_cache_are_told_at_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    recency = Recency(Told(), longest=1e9)
    assert [told_after(recency, index) for _ in range(2)] == [128, 128]
    monkeypatch.setattr(index, "turnover", lambda: (1_000_000, 20, 0))
    told_after(recency, index)
    assert told_after(recency, index) == 64


def test_memory_is_bounded_while_the_index_cannot_be_told(index: Index) -> None:
    recency = Recency(told := Told(), most=4, longest=1e9)
    due = sum(recency.record_use(Entry(f"s/{number}")) for number in range(10_000))
    recency.flush_to(index)
    assert len(told.batches[0].uses) <= 64 * 4
    assert due >= 1


def test_a_use_is_recorded_while_others_are_told(index: Index) -> None:
    recency = Recency(told := Told(), most=1 << 20)
    ready = threading.Barrier(3)

    def use(part: int) -> None:
        ready.wait(60)
        for number in range(2000):
            recency.record_use(Entry(f"s/{part}/{number}"))

    with ThreadPoolExecutor(2) as threads:
        using = [threads.submit(use, part) for part in range(2)]
        ready.wait(60)
        while not all(each.done() for each in using):
            recency.flush_to(index)
        for each in using:
            each.result()
    recency.flush_to(index)
    uses = [entry for batch in told.batches for entry in batch.uses]
    # a hit that came just before may be lost with the dictionary that it is added to: a hint, as all uses are
    assert len(uses) == len(set(uses)) >= 3990


def test_a_trace_has_all_uses_and_the_policy_too(index: Index, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with xzcache.config.set({"trace": str(path)}):
        recency = recency_for(told := Told())
    for entry in (ENTRIES[0], ENTRIES[1], ENTRIES[0], Entry("s/never")):
        recency.record_use(entry)
    recency.flush_to(index, [ENTRIES[2]])
    lines = [line.split() for line in path.read_text().splitlines()]
    assert [int(line[1], 16) for line in lines] == [hash_of(ENTRIES[number]) for number in (0, 1, 0, 2)]
    assert {line[2] for line in lines} == {str(SIZE)}
    assert len(told.batches[0].uses) == 3
    # one that cannot be written fails nothing
    path.unlink()
    path.mkdir()
    recency.record_use(ENTRIES[0])
    recency.flush_to(index)
    assert len(told.batches) == 2
    assert type(recency_for(told)) is Recency
    with xzcache.config.set({"trace": 5}), pytest.raises(TypeError, match="trace=5"):
        recency_for(told)


# -- what other bounds would give


@pytest.mark.parametrize("seed", range(6))
def test_a_thinned_sample_predicts_what_the_whole_one_does(seed: int) -> None:
    """Although a few hot keys have most of the uses, and only one key of eight stays."""
    rng, weights = np.random.default_rng(seed), 1 / np.arange(1, 4001)
    keys = rng.permutation(4000)[rng.choice(4000, 40_000, p=weights / weights.sum())]
    uses = np.zeros(len(keys), USES)
    uses["at"], uses["size"] = np.arange(1, len(keys) + 1) * 1000, SIZE
    uses["key"] = rng.choice(1 << 32, 4000, replace=False)[keys]
    whole = Sample.of([UsesRow(len(keys), 0, len(keys), 0, 0, uses.tobytes())], SIZE)
    thinned = whole.thinned(5000)
    assert thinned.shift == 3
    bounds = [200 * SIZE, 800 * SIZE, 2000 * SIZE]
    assert predicted(thinned, bounds, "lru") == pytest.approx(predicted(whole, bounds, "lru"), abs=0.02)
