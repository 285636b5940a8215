"""Who leaves to make room: the policies by themselves, and in directories that several processes share."""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Team, audit, barrier, made, run, until, version_of
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

import xzcache
from xzcache.eviction._adaptive import HASH_BITS, Adaptive, Reuse, Uses, limit_for, next_gap, rate
from xzcache.index._history import hash_of, lot_of
from xzcache.index._sql import VERSION
from xzcache.model.entry import Entry

sys.path.append(str(Path(__file__).parents[2] / "ci" / "benchmarks"))

import _policies as simulated
import _traces as traces

VALUE = 1000
POLICIES = ["lru", "adaptive", "none"]


def put(key: str) -> Any:
    return default_buffer_prototype().buffer.from_bytes(made(key, 0, VALUE))


def read_through(store: xzcache.LockedLocalStore, key: str) -> bool:
    """Read a key, as through a cache; whether it was there."""
    value = store.get_sync(key)
    if value is None:
        store.set_sync(key, put(key))
        return False
    version_of(key, value.to_bytes(), VALUE)
    return True


def index_file(root: str) -> str:
    (path,) = Path(root, ".xzcache").glob("index-*.db")
    return str(path)


def query(root: str, statement: str, *values: object) -> list[Any]:
    """Ask, or tell, the index of a directory that nobody uses."""
    with closing(sqlite3.connect(index_file(root), isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


# -- by themselves


def uses(keys: list[int], begin: int = 1) -> Uses:
    hashes = simulated.hashed(np.array(keys, np.int64))
    return Uses(np.arange(begin, begin + len(keys)), hashes, np.ones(len(keys), np.int64), np.array(keys, np.int64))


def test_without_any_knowledge_who_was_used_last_leaves_last() -> None:
    ages = np.array([0, 5, 100, 3000, 10**6])
    worth = Adaptive().worth_of(np.zeros(5, np.int64), ages)
    assert (np.diff(worth) < 0).all()


def test_what_comes_again_at_once_or_never_is_told_apart() -> None:
    reuse = Reuse()
    often, never = np.full(100, 10), np.zeros(100, np.int64)
    for _ in range(50):
        reuse.used(often, np.full(100, 10))
        reuse.wait(np.concatenate([often, never]), np.concatenate([np.full(100, 5), np.full(100, 5000)]), 100, 1.0)
    worth = rate(reuse.worth(), np.array([10, 0]), np.array([5, 5000]))
    assert worth[0] > 20 * worth[1]


def test_the_gap_between_uses_follows_slowly() -> None:
    gaps = np.array([0, 100, 100])
    assert next_gap(gaps, np.array([40, 100, 500])).tolist() == [40, 100, 200]


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_loop_larger_than_the_cache_is_served_in_part(share: float) -> None:
    trace = traces.make("epochs over everything", 7, 800, 20_000)
    room = int(800 * share)
    assert not simulated.least_recent(trace, room).any()
    assert simulated.adaptive(trace, room).mean() > 0.85 * simulated.best(trace, room).mean()


@pytest.mark.parametrize(("kind", "least"), [("epochs over everything", 0.9), ("a fresh shuffle each epoch", 0.7)])
def test_a_few_passes_are_enough(kind: str, least: float) -> None:
    """Who reads everything four times does not want to wait for three of them until it is noticed."""
    trace = traces.make(kind, 7, 800, 4 * 800)
    assert simulated.adaptive(trace, 240).mean() > least * simulated.best(trace, 240).mean()


@pytest.mark.parametrize(("room", "keys"), [(50, 62), (50, 200), (150, 600), (600, 750), (600, 1200)])
def test_what_suits_least_recent_use_is_left_to_it(room: int, keys: int) -> None:
    trace = traces.make("ping-pong scan", 7, keys, 40 * keys)
    assert simulated.adaptive(trace, room).mean() > simulated.least_recent(trace, room).mean() - 0.02


def test_min_is_best() -> None:
    """Against all that could be done, on traces small enough for that."""

    def most(trace: tuple[int, ...], held: frozenset[int], room: int) -> int:
        if not trace:
            return 0
        key, rest = trace[0], trace[1:]
        if key in held:
            return 1 + most(rest, held, room)
        options = [held] + [held - {gone} | {key} for gone in held]
        if len(held) < room:
            options = [held | {key}]
        return max(most(rest, option, room) for option in options)

    draw = random.Random(3)
    for _ in range(50):
        trace = tuple(draw.randrange(5) for _ in range(10))
        assert simulated.best(np.array(trace), 2).sum() == pytest.approx(most(trace, frozenset(), 2))


def test_memory_is_bounded_whatever_comes() -> None:
    policy = Adaptive()
    for round_ in range(10):
        policy.learn(uses(list(range(round_ * 5000, round_ * 5000 + 5000)), 1 + round_ * 5000), 1000, 1000)
    assert len(policy) <= 20480 + 5000
    # of a large cache, few keys are watched
    policy.learn(uses([1], 10**6), 1_000_000, 1e6)
    assert len(policy) < 2000
    assert len(policy.to_bytes()) < 1 << 20


def test_of_large_caches_some_thousand_entries_are_watched() -> None:
    for entries in (1, 100, 2000, 5000, 10**5, 10**7):
        assert min(entries, 1000) <= entries * limit_for(entries) / (1 << HASH_BITS) <= 2048


@pytest.mark.parametrize("name", ["c/{0}", "c/{0:06d}", "c/{1}/{2}/{3}", "ranges"])
def test_keys_are_watched_without_a_pattern(name: str) -> None:
    numbers = range(100_000)
    if name == "ranges":
        entries = [Entry("k", 8 * at, 8 * at + 8) for at in numbers]
    else:
        entries = [Entry(name.format(at, at // 1000, at // 30 % 34, at % 30)) for at in numbers]
    hashes = np.array([hash_of(entry) for entry in entries])
    assert len(np.unique(hashes)) == len(entries)
    assert [lot_of(entry) for entry in entries] == (hashes >> 30).tolist()
    for entries_held in (8_000, 40_000):
        watched = hashes < limit_for(entries_held)
        share = limit_for(entries_held) / (1 << HASH_BITS)
        # of any thousand in a row as many as of all, give or take no more than chance would
        counted = watched.reshape(-1, 1000).mean(1).std() / np.sqrt(share * (1 - share) / 1000)
        assert counted < 1.3


def test_what_was_learned_survives_being_written_down() -> None:
    policies: list[Adaptive] = []
    simulated.adaptive(traces.make("Zipf 1.0", 5, 500, 5000), 100, made=policies)
    data = policies[0].to_bytes()
    copy = Adaptive.from_bytes(data)
    assert copy.to_bytes() == data
    assert len(copy) == len(policies[0]) > 400
    assert copy.prefers_recency == policies[0].prefers_recency


@pytest.mark.parametrize("cut", [0, 1, 100, 5000, -1])
def test_what_was_not_learned_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="learned"):
        Adaptive.from_bytes(Adaptive().to_bytes()[:cut])
    with pytest.raises(ValueError, match="learned"):
        Adaptive.from_bytes(b"\x93NUMPY" + bytes(100))
    damaged = bytearray(Adaptive().to_bytes())
    # the numbers of an array's header would make numpy raise all kinds of things
    damaged[20 + cut] ^= 0x5B
    with pytest.raises(ValueError, match="learned"):
        Adaptive.from_bytes(bytes(damaged))


# -- in a directory


@pytest.mark.parametrize("policy", POLICIES)
def test_all_ways_in_take_it(tmp_path: Path, policy: str) -> None:
    assert xzcache.LockedLocalStore(tmp_path / "a", policy=policy).directory.recency.policy.name == policy
    xzcache.CacheStore(MemoryStore(), cache_store=tmp_path / "b", policy=policy)
    assert xzcache.LockedLocalStore(tmp_path / "b").directory.recency.policy.name == policy
    with xzcache.config.set(policy=policy):
        assert xzcache.LockedLocalStore(tmp_path / "c").directory.recency.policy.name == policy
        assert xzcache.CachePlugin(tmp_path / "d").settings["policy"] == policy
    assert xzcache.CachePlugin(tmp_path / "d", policy=policy).settings["policy"] == policy


def test_it_can_be_changed_while_it_runs(tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path, max_size=100 * VALUE)
    for policy in [*POLICIES, *reversed(POLICIES)]:
        copy = xzcache.LockedLocalStore(tmp_path, policy=policy).with_read_only(False)
        assert store.directory.recency.policy.name == policy
        for number in range(300):
            if policy != "none":
                read_through(copy, f"k{number % 150}")


def test_a_cache_store_that_contradicts_is_refused(tmp_path: Path) -> None:
    locked = xzcache.LockedLocalStore(tmp_path, policy="adaptive")
    with pytest.raises(ValueError, match=r"policy='none' contradicts policy='adaptive'"):
        xzcache.CacheStore(MemoryStore(), cache_store=locked, policy="none")
    xzcache.CacheStore(MemoryStore(), cache_store=locked, policy="adaptive")
    xzcache.CacheStore(MemoryStore(), cache_store=locked)
    assert locked.directory.recency.policy.name == "adaptive"


def loop(link: Connection, root: str, policy: str, keys: int, rounds: int, *, join: bool = True) -> int:
    """Pass over more than fits; how often it was there in the second half of the rounds."""
    store = xzcache.LockedLocalStore(root, max_size=400 * VALUE, policy=policy)
    if join:
        barrier(link)
    hits = 0
    for round_, number in itertools.product(range(rounds), range(keys)):
        hits += read_through(store, f"k{number}") and round_ >= rounds // 2
    return hits


@pytest.mark.slow
def test_a_loop_larger_than_the_cache_by_several_processes(tmp_path: Path) -> None:
    """With least recent use nothing is ever there again: here each process passes over 800 where 400 fit."""
    with Team() as team:
        for _ in range(2):
            team.start(loop, str(tmp_path), "adaptive", 800, 8)
        team.go()
        hits = team.results()
    assert audit(str(tmp_path)) <= 400
    assert sum(hits) > 0.35 * 2 * 4 * 800


@pytest.mark.slow
def test_a_loop_with_each_policy(tmp_path: Path) -> None:
    ratios = {}
    for policy in ("lru", "adaptive"):
        hits = run(loop, str(tmp_path / policy), policy, 600, 12, join=False)
        ratios[policy] = hits / (6 * 600)
        audit(str(tmp_path / policy))
    assert ratios["lru"] < 0.05
    assert ratios["adaptive"] > 0.5


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_no_more_leaves_than_has_to(tmp_path: Path, policy: str) -> None:
    store = xzcache.LockedLocalStore(tmp_path, max_size=400 * VALUE, policy=policy)
    large = default_buffer_prototype().buffer.from_bytes(bytes(20 * VALUE))
    for number in range(300):
        if number % 10:
            store.set_sync(f"small/{number}", put(f"small/{number}"))
        else:
            store.set_sync(f"large/{number}", large)
        store.get_sync("small/1")
    for want in (1, VALUE, 5 * VALUE, 30 * VALUE):
        before = store.directory.totals().size
        freed = store.directory.space.evict(want)
        assert want <= freed < want + 20 * VALUE
        assert store.directory.totals().size == before - freed


def hear_a_little(link: Connection, root: str) -> None:
    store = xzcache.LockedLocalStore(root, max_size=1000 * VALUE, policy="adaptive")
    for _ in range(25):
        for number in range(20):
            read_through(store, f"k{number}")
        store.directory.flush()
    store.directory.close()


def test_what_short_sessions_heard_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaves before it has heard enough; the next one goes on from there."""
    root = str(tmp_path)
    for _ in range(3):
        run(hear_a_little, root)
    assert query(root, "SELECT count(*) FROM heard") == [(3 * 25 * 20,)]
    monkeypatch.setattr("xzcache.eviction._policies._QUEUED", 1000)
    monkeypatch.setattr("xzcache.eviction._policies._MOST_QUEUED", 400)
    store = xzcache.LockedLocalStore(root, policy="adaptive")
    store.get_sync("k1")
    store.directory.flush()
    store.directory.close()
    assert query(root, "SELECT count(*) FROM heard") == [(0,)]
    assert query(root, "SELECT serial FROM learned") == [(1,)]


def evict_one(link: Connection, root: str) -> int:
    directory = xzcache.LockedLocalStore(root, policy="adaptive").directory
    assert directory.space.evict(1) == VALUE
    with directory.session.section() as (_, index):
        return index.history.learned_serial()


def test_what_another_process_has_just_learned_is_not_learned_again(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(loop, root, "adaptive", 500, 4, join=False)
    first = run(evict_one, root)
    assert first > 1
    # each chooses by itself, and has nothing to learn
    assert [run(evict_one, root) for _ in range(3)] == [first] * 3


def read_often(link: Connection, root: str) -> None:
    store = xzcache.LockedLocalStore(root, policy="lru")
    for _ in range(3):
        for number in range(100):
            assert store.get_sync(f"hot{number}") is not None
        store.directory.flush()
    store.directory.close()


def test_uses_by_others_with_least_recent_use_count(tmp_path: Path) -> None:
    """Time does not pass for them, but who was used is not old any more."""
    store = xzcache.LockedLocalStore(tmp_path, max_size=300 * VALUE, policy="adaptive")
    for name, number in itertools.product(("hot", "cold"), range(100)):
        store.set_sync(f"{name}{number}", put(f"{name}{number}"))
    run(read_often, str(tmp_path))
    store.directory.close()
    assert query(str(tmp_path), "SELECT DISTINCT tick FROM entry WHERE key LIKE 'hot%'") == [(200,)]
    assert query(str(tmp_path), "SELECT max(tick) FROM entry WHERE key = 'cold0'") == [(101,)]


@pytest.mark.parametrize("is_watched", [True, False])
@pytest.mark.slow
@pytest.mark.soak
def test_of_a_large_cache_a_part_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_watched: bool
) -> None:
    """After many rounds the ids of those who stayed are few and far between: any of them must be as likely to be seen.

    Looked for by ids alone, it is always the same ones who are seen, and who leave.
    """
    monkeypatch.setattr("xzcache.eviction._policies._LOOKED_AT", 64)
    monkeypatch.setattr("xzcache.eviction._policies._RUNS", 16)
    monkeypatch.setattr("xzcache.eviction._policies._ROWS_AT_ONCE", 64)
    monkeypatch.setattr("xzcache.eviction._policies._ANYWHERE", 0.1 if is_watched else 1.0)
    # as often for the size of the cache as for a large one
    monkeypatch.setattr("xzcache.eviction._policies._REFRESHED", 0)
    if not is_watched:
        monkeypatch.setattr(Adaptive, "some_ids", lambda *_: [])
    store = xzcache.LockedLocalStore(tmp_path, max_size=150 * VALUE, policy="adaptive")
    hits, rounds = 0, 30 if is_watched else 15
    for round_, number in itertools.product(range(rounds), range(500)):
        hits += read_through(store, f"k{number}") and round_ >= rounds - 10
    assert store.directory.barrier.faults == 0
    best = 10 * 150
    assert hits > 0.75 * best if is_watched else hits < 0.6 * best


def read_when_asked(link: Connection, root: str) -> None:
    store = xzcache.LockedLocalStore(root)
    assert store.directory.prepare()
    while numbers := link.recv():
        for number in numbers:
            assert store.get_sync(f"k{number}") is not None
        link.send("read")


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_few_uses_of_a_small_cache_are_told_while_another_process_evicts(tmp_path: Path, policy: str) -> None:
    """A use that the index does not hear of saves no entry: 128 uses are more than a quarter of this cache."""
    store = xzcache.LockedLocalStore(tmp_path, max_size=450 * VALUE, policy="lru")
    for number in range(440):
        store.set_sync(f"k{number}", put(f"k{number}"))

    def last_use(number: int) -> int:
        with store.directory.session.section() as (_, index):
            (row,) = index.of_key(f"k{number}")
            return row.used

    with Team() as team:
        reader = team.start(read_when_asked, str(tmp_path), settings={"policy": policy})

        def read(numbers: range, least: int) -> None:
            """Have these read, and wait until the index has heard of so many."""
            before = {number: last_use(number) for number in numbers}
            reader.send(list(numbers))
            reader.hear("read")
            until(lambda: sum(last_use(number) > before[number] for number in numbers) >= least)

        read(range(140, 270), least=128)
        for number in range(50):
            store.set_sync(f"new/{number}", put(f"new/{number}"))
        read(range(140, 270), least=128)
        # now it knows that entries leave
        read(range(140, 180), least=8)
        reader.send([])
        reader.result()


def mixed(link: Connection, root: str, policy: str, seed: int, seconds: float) -> None:
    store = xzcache.LockedLocalStore(root, max_size=100 * VALUE, policy=policy)
    barrier(link)
    draw, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        key = f"k{draw.randrange(400)}"
        if policy != "none":
            read_through(store, key)
        elif (value := store.get_sync(key)) is not None:
            version_of(key, value.to_bytes(), VALUE)


def test_processes_that_disagree_work_side_by_side(tmp_path: Path) -> None:
    with Team() as team:
        for seed, policy in enumerate([*POLICIES, "adaptive"]):
            team.start(mixed, str(tmp_path), policy, seed, 2.0)
        team.go()
        team.results()
    assert 50 <= audit(str(tmp_path)) <= 100


async def test_none_admits_until_it_is_full_and_then_passes_through(tmp_path: Path) -> None:
    source = MemoryStore()
    for number in range(60):
        await source.set(f"c/{number}", put(f"c/{number}"))
    store = xzcache.CacheStore(source, cache_store=tmp_path, max_size=20 * VALUE, policy="none")
    prototype = default_buffer_prototype()
    for _, number in itertools.product(range(2), range(60)):
        value = await store.get(f"c/{number}", prototype)
        assert value is not None
        version_of(f"c/{number}", value.to_bytes(), VALUE)
    info, stats = store.cache_info(), store.cache_stats()
    assert 15 <= info["cached_keys"] <= 20
    assert stats["evictions"] == stats["cache_errors"] == 0
    # who came first stays
    assert stats["hits"] >= 15
    # a bound that is lowered holds nevertheless
    lower = xzcache.CacheStore(source, cache_store=tmp_path, max_size=5 * VALUE, policy="none")
    await lower.get("c/0", prototype)
    assert lower.cache_info()["total_size"] <= 5 * VALUE


async def test_none_with_a_generic_cache_store() -> None:
    source = MemoryStore()
    for number in range(10):
        await source.set(f"c/{number}", put(f"c/{number}"))
    store = xzcache.CacheStore(source, cache_store=MemoryStore(), max_size=4 * VALUE, policy="none")
    for _, number in itertools.product(range(2), range(10)):
        assert await store.get(f"c/{number}", default_buffer_prototype()) is not None
    assert store.cache_info()["cached_keys"] == 4
    assert store.cache_stats()["hits"] == 4


def test_a_directory_that_was_taken_away_is_not_told_of_uses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = xzcache.LockedLocalStore(tmp_path / "cache")
    assert [read_through(store, "k") for _ in range(2)] == [False, True]
    assert store.directory.remove_if_last()
    store.directory.recency.record_use(Entry("k"))
    store.directory.flush()
    assert store.directory.barrier.faults == 0
    assert not (tmp_path / "cache").exists()
    assert caplog.records == []


# -- ghosts


@pytest.mark.slow
@pytest.mark.soak
def test_ghosts_are_bounded_and_count_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xzcache.eviction._policies._FEWEST_GHOSTS", 256)
    # they are forgotten in one of 16 rounds of learning
    monkeypatch.setattr("xzcache.eviction._policies._REFRESHED", 0)
    store = xzcache.LockedLocalStore(tmp_path, max_size=50 * VALUE, policy="adaptive")
    directory = store.directory
    for number in range(6000):
        store.set_sync(f"made/k{number}", put(f"made/k{number}"))
    with directory.session.section() as (_, index):
        ghosts, totals = index.history.ghosts(), index.totals()
    # those of two rounds of looking for old ones, at the most
    assert 100 < ghosts < 256 + 8 * 50 + 4 * 32 * 16
    assert totals.entries <= 50
    assert totals.size == totals.entries * VALUE <= 50 * VALUE
    assert directory.figures("made")[1] == (totals.entries, totals.size)
    directory.close()
    assert audit(str(tmp_path)) <= 50


def test_who_comes_back_is_remembered(tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path, max_size=50 * VALUE, policy="adaptive")
    for number in itertools.chain(range(200), range(200)):
        read_through(store, f"k{number}")
    store.directory.close()
    (gaps,) = query(str(tmp_path), "SELECT count(*) FROM entry WHERE gap BETWEEN 100 AND 300")
    assert gaps[0] > 30


def test_a_hit_counts_once_told(tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path, max_size=50 * VALUE, policy="adaptive")
    for key in ("a", "b", "a"):
        read_through(store, key)
    store.directory.flush()
    store.directory.close()
    assert query(str(tmp_path), "SELECT key, tick, gap FROM entry ORDER BY key") == [("a", 3, 2), ("b", 2, 0)]
    assert query(str(tmp_path), "SELECT tick, key FROM heard") == [
        (tick, hash_of(Entry(key))) for tick, key in enumerate("aba", 1)
    ]


# -- what is lost costs hints only


def die_in_the_middle(link: Connection, root: str) -> None:
    store = xzcache.LockedLocalStore(root, max_size=100 * VALUE, policy="adaptive")
    for number in range(1000):
        read_through(store, f"k{number % 150}")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "loss",
    [
        "DELETE FROM learned",
        "DELETE FROM ghost",
        "DELETE FROM heard",
        "UPDATE learned SET state = x'00'",
        "UPDATE learned SET state = zeroblob(50000)",
        "UPDATE total SET tick = 0",
        "UPDATE entry SET tick = 0, gap = 0",
        "UPDATE entry SET tick = 1 << 60, gap = 1 << 60",
        "UPDATE heard SET size = -1",
    ],
)
def test_what_is_lost_in_a_crash_costs_hints_only(tmp_path: Path, loss: str) -> None:
    root = str(tmp_path)
    with Team() as team:
        assert team.start(die_in_the_middle, root).exit_code() == -signal.SIGKILL
    query(root, loss)
    store = xzcache.LockedLocalStore(root, policy="adaptive")
    for number in range(900):
        read_through(store, f"k{number % 150}")
    assert store.directory.barrier.faults == 0
    assert store.directory.space.evictions > 0
    store.directory.close()
    assert 50 <= audit(root) <= 100
    assert query(root, "SELECT length(state) > 1000 FROM learned") == [(1,)]


# -- indexes of old

VERSION_2 = """
CREATE TABLE ns(
  id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, n INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0);
CREATE TABLE entry(
  id INTEGER PRIMARY KEY, ns INTEGER NOT NULL, key TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
  odd INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL, used INTEGER NOT NULL, rank INTEGER NOT NULL,
  owner INTEGER NOT NULL, seq INTEGER NOT NULL, UNIQUE(key, start, stop));
CREATE INDEX entry_rank ON entry(rank);
CREATE INDEX entry_odd ON entry(key) WHERE odd = 1;
CREATE TABLE dying(
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
  odd INTEGER NOT NULL, size INTEGER NOT NULL, owner INTEGER NOT NULL);
CREATE TABLE owner(
  id INTEGER PRIMARY KEY AUTOINCREMENT, lease INTEGER NOT NULL DEFAULT 0 CHECK(lease >= 0), pid INTEGER NOT NULL);
CREATE TABLE node(path TEXT PRIMARY KEY, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE seen(document TEXT PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE writing(id INTEGER PRIMARY KEY, key TEXT NOT NULL, beneath INTEGER NOT NULL, owner INTEGER NOT NULL);
CREATE INDEX writing_key ON writing(beneath, key);
CREATE TABLE absent(key TEXT PRIMARY KEY, noted REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE total(
  one INTEGER PRIMARY KEY CHECK(one = 1), n INTEGER NOT NULL, bytes INTEGER NOT NULL, lease INTEGER NOT NULL,
  dying INTEGER NOT NULL, max_size INTEGER, serial INTEGER NOT NULL);
INSERT INTO total VALUES(1, 0, 0, 0, 0, NULL, 0);
CREATE TRIGGER entry_comes AFTER INSERT ON entry BEGIN
  UPDATE total SET n = n + 1, bytes = bytes + NEW.size, serial = serial + 1;
  UPDATE ns SET n = n + 1, bytes = bytes + NEW.size WHERE id = NEW.ns; END;
CREATE TRIGGER entry_goes AFTER DELETE ON entry BEGIN
  UPDATE total SET n = n - 1, bytes = bytes - OLD.size, serial = serial + 1;
  UPDATE ns SET n = n - 1, bytes = bytes - OLD.size WHERE id = OLD.ns; END;
CREATE TRIGGER dying_comes AFTER INSERT ON dying BEGIN UPDATE total SET dying = dying + NEW.size; END;
CREATE TRIGGER dying_goes AFTER DELETE ON dying BEGIN UPDATE total SET dying = dying - OLD.size; END;
CREATE TRIGGER lease_changes AFTER UPDATE OF lease ON owner BEGIN
  UPDATE total SET lease = lease + NEW.lease - OLD.lease; END;
CREATE TRIGGER lease_goes AFTER DELETE ON owner BEGIN UPDATE total SET lease = lease - OLD.lease; END;
"""
"""The tables as version 0.1 of the package made them first."""

FROM_2_TO_3 = """
CREATE TABLE heard(tick INTEGER PRIMARY KEY, key INTEGER NOT NULL, size INTEGER NOT NULL);
CREATE TABLE ghost(key INTEGER PRIMARY KEY, tick INTEGER NOT NULL, gap INTEGER NOT NULL);
CREATE TABLE learned(
  one INTEGER PRIMARY KEY CHECK(one = 1), serial INTEGER NOT NULL, state BLOB NOT NULL,
  chosen INTEGER NOT NULL DEFAULT 0);
ALTER TABLE entry ADD COLUMN tick INTEGER NOT NULL DEFAULT 0;
ALTER TABLE entry ADD COLUMN gap INTEGER NOT NULL DEFAULT 0;
ALTER TABLE total ADD COLUMN tick INTEGER NOT NULL DEFAULT 0;
"""
"""What version 3 had more; some of its entries were ranked below 0, to leave first."""

AS_IT_WAS_USED = """
INSERT INTO heard VALUES(1, 2, 3);
INSERT INTO learned VALUES(1, 5, x'934e554d5059', 7);
UPDATE entry SET tick = id, rank = -id WHERE id % 3 = 0;
UPDATE total SET tick = 100;
"""


def make_old(root: str, version: int = 2) -> None:
    """Turn the index of a directory into one of an older version with the same entries."""
    path = index_file(root)
    columns = "id, ns, key, start, stop, odd, size, crc, used, rank, owner, seq"
    with closing(sqlite3.connect(path)) as new, closing(sqlite3.connect(path + ".old")) as old:
        old.execute("PRAGMA journal_mode=WAL")
        old.executescript(VERSION_2)
        if version == 3:
            old.executescript(FROM_2_TO_3)
        old.executemany("INSERT INTO ns(id, name) VALUES(?, ?)", new.execute("SELECT id, name FROM ns"))
        rows = new.execute(f"SELECT {columns} FROM entry").fetchall()
        old.executemany(f"INSERT INTO entry({columns}) VALUES({', '.join('?' * 12)})", rows)
        totals = new.execute("SELECT max_size, serial FROM total").fetchone()
        old.execute("UPDATE total SET max_size = ?, serial = ?", totals)
        if version == 3:
            old.executescript(AS_IT_WAS_USED)
        old.execute(f"PRAGMA user_version = {version}")
        old.commit()
    for suffix in ("-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    os.replace(path + ".old", path)


def fill(link: Connection, root: str) -> None:
    store = xzcache.LockedLocalStore(root, max_size=100 * VALUE)
    for number in range(80):
        store.set_sync(f"k{number}", put(f"k{number}"))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_older_index_is_upgraded_in_place(
    tmp_path: Path, policy: str, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path)
    run(fill, root)
    make_old(root, version)
    name = index_file(root)
    caplog.set_level(logging.INFO, "xzcache")
    store = xzcache.LockedLocalStore(root, policy=policy)
    assert sum(read_through(store, f"k{number}") for number in range(80)) == 80
    assert store.directory.prepare()
    assert store.directory.barrier.faults == 0
    if policy != "none":
        for number in range(400):
            read_through(store, f"k{number % 200}")
        assert store.directory.space.evictions > 0
    store.directory.close()
    assert index_file(root) == name
    assert query(root, "PRAGMA user_version") == [(VERSION,)]
    assert {name for _, name, *_ in query(root, "PRAGMA table_info(heard)")} == {"tick", "key", "size", "id"}
    if policy != "none":
        # whoever comes makes time pass, by the trigger of today
        assert query(root, "SELECT tick >= 200 FROM total") == [(1,)]
    assert audit(root) >= 80
    told = [record.getMessage() for record in caplog.records if "version" in record.getMessage()]
    assert len(told) == 1


def upgrade(link: Connection, root: str) -> int:
    barrier(link)
    store = xzcache.LockedLocalStore(root, policy="adaptive")
    found = sum(store.get_sync(f"k{number}") is not None for number in range(80))
    assert store.directory.prepare()
    assert store.directory.barrier.faults == 0
    return found


def test_several_processes_upgrade_it_once(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(fill, root)
    make_old(root)
    with Team() as team:
        for _ in range(4):
            team.start(upgrade, root)
        team.go()
        assert team.results() == [80] * 4
    assert audit(root) == 80


def test_an_index_of_an_unknown_version_is_made_anew(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(fill, root)
    make_old(root, version=1)
    store = xzcache.LockedLocalStore(root)
    assert sum(read_through(store, f"k{number}") for number in range(80)) == 80
    assert store.directory.prepare()
    store.directory.close()
    assert query(root, "PRAGMA user_version") == [(VERSION,)]
    assert audit(root) == 80


# -- traces


def traced(link: Connection, root: str, begin: int) -> None:
    store = xzcache.LockedLocalStore(root, max_size=400 * VALUE)
    for number in range(begin, begin + 50):
        read_through(store, f"k{number}")
        read_through(store, f"k{number}")
        read_through(store, f"k{number}")
    store.directory.close()


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_a_trace_is_recorded_and_can_be_replayed(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "trace"
    settings = {"trace": str(path), "policy": policy}
    for begin in (0, 25):
        run(traced, str(tmp_path / "cache"), begin, settings=settings)
    lines = path.read_text().splitlines()
    assert len(lines) == 300
    assert all(len(line.split()) == 3 for line in lines)
    assert "k0" not in path.read_text()
    keys, sizes = simulated.recorded(path)
    assert len(keys) == 300
    assert set(sizes.tolist()) == {VALUE}
    assert len(set(keys.tolist())) == 75
    # everything is read three times, a third of it in both processes
    assert simulated.best(keys, 75).mean() == pytest.approx(225 / 300)


def test_a_trace_that_cannot_be_written_harms_nothing(tmp_path: Path) -> None:
    with xzcache.config.set(trace=str(tmp_path / "missing" / "trace")):
        store = xzcache.LockedLocalStore(tmp_path / "cache")
    assert [read_through(store, "k") for _ in range(2)] == [False, True]
    store.directory.flush()
    assert store.directory.barrier.faults == 0
    with xzcache.config.set(trace=7), pytest.raises(TypeError, match="trace=7 is not accepted"):
        xzcache.LockedLocalStore(tmp_path / "other")
