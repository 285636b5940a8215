"""The index through its door: transactions, totals, leases, write counters, locks, and what a policy learns from."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, until

from xzcache import index as door
from xzcache.index import Index, IndexSession, Registration, WriteCounters
from xzcache.model import Busy, CacheFault, Damaged, Entry, Foreign


def begin(session: IndexSession, generation: int) -> None:
    """Make a new index the current one."""
    with session.guarded() as process:
        Index(process.index_path(generation), create=True).close()
        process.begin_generation(generation)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[IndexSession]:
    session = IndexSession(str(tmp_path / "cache"), PATIENCE)
    begin(session, 7)
    yield session
    session.close()


@pytest.fixture
def other(session: IndexSession) -> Iterator[IndexSession]:
    """A second session of the directory; its locks are those of another process, as they belong to its descriptors."""
    other = IndexSession(session.root, PATIENCE)
    yield other
    other.close()


def add(index: Index, key: str, size: int = 10, *, used: int = 1, start: int = 0, stop: int = -1) -> None:
    index.add(Entry(key, start, stop), hashed=False, size=size, crc=1, used=used, owner=1, seq=1)


def in_section(session: IndexSession, action: Callable[[Index], Any]) -> Any:
    with session.section() as (_, index):
        return action(index)


# -- one transaction, under the guard


def test_a_section_is_one_transaction(session: IndexSession, other: IndexSession) -> None:
    in_section(session, lambda index: add(index, "s/a"))

    def fail(index: Index) -> None:
        add(index, "s/b")
        add(index, "t/b")
        raise KeyError

    with pytest.raises(KeyError):
        in_section(session, fail)
    assert [row.entry.key for row in in_section(other, lambda index: list(index.rows()))] == ["s/a"]
    # a source that only the transaction knew is known again
    in_section(session, lambda index: add(index, "t/b"))
    assert in_section(other, lambda index: index.share("t")) == (1, 10)
    with session.section(), pytest.raises(CacheFault), session.section():
        pass


def test_one_section_at_a_time_among_processes_and_threads(session: IndexSession, other: IndexSession) -> None:
    in_section(other, lambda index: index.serial())
    with ThreadPoolExecutor(2) as threads:
        with session.section() as (_, index):
            add(index, "s/a")
            with pytest.raises(Busy), other.section(0):
                pass
            with pytest.raises(Busy):
                threads.submit(session.section(0).__enter__).result(PATIENCE)
            waiting = [threads.submit(in_section, each, lambda index: index.totals()) for each in (session, other)]
        assert [each.result(PATIENCE).entries for each in waiting] == [1, 1]


def test_an_index_that_was_made_anew_is_opened_by_all(session: IndexSession, other: IndexSession) -> None:
    for each in (session, other):
        in_section(each, lambda index: index.serial())
    in_section(session, lambda index: add(index, "s/a"))
    begin(other, 8)
    with session.section() as (process, index):
        assert process.generation == 8
        assert index.totals().entries == 0
        assert process.owner in index.owners()


def test_an_index_that_lost_transactions_is_damaged(session: IndexSession) -> None:
    in_section(session, lambda index: add(index, "s/a"))
    path = session.process().index_path(7)
    shutil.copy(path, f"{path}.old")
    in_section(session, lambda index: add(index, "s/b"))
    session.close()
    os.replace(f"{path}.old", path)
    with pytest.raises(Damaged) as caught, session.section():
        pass
    assert caught.value.generation == 7


def test_a_directory_that_was_removed_is_joined_anew_and_has_no_index(session: IndexSession) -> None:
    process = session.process()
    os.rename(session.root, f"{session.root}-away")
    with pytest.raises(Damaged), session.section():
        pass
    assert session.current is not process
    assert process.identity in session.lost
    begin(session, 9)
    assert in_section(session, lambda index: index.totals().entries) == 0


def test_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    meta = tmp_path / "cache" / ".xzcache"
    meta.mkdir(parents=True, mode=0o700)
    (tmp_path / "cache").chmod(0o700)
    (meta / "format").write_text("999")
    refused: list[bool] = []
    session = IndexSession(str(tmp_path / "cache"), 1.0)
    session.when_refused = lambda: refused.append(True)
    with pytest.raises(Foreign):
        session.process()
    assert refused
    assert os.listdir(meta) == ["format"]


# -- totals


def test_totals_are_those_of_the_rows(session: IndexSession) -> None:
    with session.section() as (process, index):
        index.set_max_size(100)
        for number in range(4):
            add(index, f"s/{number}")
        add(index, "t/0", 5)
        index.change_lease(process.owner, 20)
        row = index.find(Entry("s/0"))
        assert row is not None
        tombstone = index.add_tombstone(row, process.owner)
        index.remove(row.id)
        assert index.totals() == (4, 35, 20, 10, 100)
        assert index.totals().room == 35
        assert (index.share("s"), index.share("t"), index.share("u")) == ((3, 30), (1, 5), (0, 0))
        index.drop_tombstones([tombstone.id])
        index.drop_leases()
        assert index.totals() == (4, 35, 0, 0, 100)
        assert index.wrong_totals() == []
        assert not index.mend_totals()


def test_totals_that_are_wrong_are_found_and_mended(session: IndexSession) -> None:
    with session.section() as (_, index):
        add(index, "s/0")
        index.connection.execute("UPDATE total SET bytes = 99, dying = 7")
        assert [name for name, _, _ in index.wrong_totals()] == ["bytes", "tombstones"]
        assert index.mend_totals()
        assert index.totals()[:4] == (1, 10, 0, 0)
        assert index.is_sound()
        index.connection.execute("UPDATE entry SET size = -1")
        with pytest.raises(Damaged):
            index.mend_totals()


def test_beneath_a_prefix_is_not_beside_it(session: IndexSession) -> None:
    with session.section() as (_, index):
        for key in ("s/a", "s/a/0", "s/a/1", "s/ab/0", "s/a-/0", "s/a0/0", "t/a/0"):
            add(index, key)
        add(index, "s/a/0", start=5, stop=9)
        assert sorted({row.entry.key for row in index.beneath("s/a", 99)}) == ["s/a/0", "s/a/1"]
        assert len(index.beneath("", 99)) == 8
        assert sorted(row.entry.start for row in index.of_key("s/a/0")) == [0, 5]
        piece = index.piece_of("s/a/0")
        assert piece is not None
        assert piece.entry == Entry("s/a/0", 5, 9)
        assert not index.knows("s/b")
        index.tables.set_absent("s/a/7", 1.0, 3)
        index.tables.set_absent("s/ab/7", 1.0, 3)
        index.tables.drop_absent_beneath("s/a")
        assert index.tables.absent_since("s/a/7", 3) is None
        assert index.tables.absent_since("s/ab/7", 3) == 1.0
        # the key was written since
        assert index.tables.absent_since("s/ab/7", 4) is None


def test_what_is_being_written_is_known_to_all_and_ends_with_its_writer(
    session: IndexSession, other: IndexSession
) -> None:
    with session.section() as (process, index):
        index.tables.add_writing(1, "s/a/0", process.owner, beneath=False)
        index.tables.add_writing(2, "s/b", process.owner, beneath=True)
        owner = process.owner
    with other.section() as (_, index):
        written = [key for key in ("s/a/0", "s/a/1", "s/b/0/1", "s/bc/0") if index.tables.is_written(key)]
        assert written == ["s/a/0", "s/b/0/1"]
        assert index.tables.writings_of_nobody() == []
        index.drop_owner(owner)
        assert sorted(index.tables.writings_of_nobody()) == ["s/a/0", "s/b"]
        index.tables.drop_writings_of_nobody()
        assert not index.tables.is_written("s/a/0")


def test_writes_whose_rows_were_lost_are_seen_until_they_end_or_the_next_index_has_them(
    session: IndexSession, other: IndexSession
) -> None:
    in_section(session, lambda index: None)
    process = other.process()
    assert not process.has_unknown_writes(8)
    write = session.begin_write("s/a", beneath=True)
    assert process.has_unknown_writes(8)
    assert not process.has_unknown_writes(7)
    begin(other, 8)
    begin(other, 9)
    assert process.has_unknown_writes(9)
    with other.section() as (_, index):
        # it may be any key
        index.tables.add_unknown_writes()
        process.end_unknown_writes(index)
        assert index.tables.is_written("t/b/0")
        assert index.tables.writings_of_nobody() == []
    # the first section of the writer records its write
    in_section(session, lambda index: None)
    assert not process.has_unknown_writes(9)
    with other.section() as (_, index):
        assert [index.tables.is_written(key) for key in ("s/a/0", "t/b/0")] == [True, False]
    assert process.has_unknown_writes(10)
    session.end_writes([write])
    assert not process.has_unknown_writes(10)


# -- leases, owners, and who is alive


def test_a_lease_is_not_taken_back_while_it_is_spent(session: IndexSession, other: IndexSession) -> None:
    with session.section() as (process, index):
        index.change_lease(process.owner, 50)
        process.free = 50
    with session.storing() as spending:
        assert spending.free == 50
        assert not other.process().storing.exclude(0.05)
    assert other.process().storing.exclude(PATIENCE)
    try:
        session.timeout = 0.05
        with pytest.raises(Busy):
            session.storing().__enter__()
        with other.section() as (process, index):
            process.revoke_leases(index)
            assert index.totals().lease == 0
    finally:
        other.process().storing.readmit()
    session.timeout = PATIENCE
    with session.storing() as spending:
        assert spending.free == 0


def test_who_wants_to_be_alone_is_not_starved(session: IndexSession, other: IndexSession) -> None:
    in_section(other, lambda index: index.serial())
    sharing, alone = session.process().storing, other.process().storing

    def is_kept_out(lock: Any) -> bool:
        if lock.share(0):
            lock.unshare()
            return False
        return True

    assert sharing.share(0)
    with ThreadPoolExecutor(1) as threads:
        closing_the_door = threads.submit(alone.exclude, PATIENCE)
        until(lambda: is_kept_out(sharing) and is_kept_out(alone))
        assert not closing_the_door.done()
        sharing.unshare()
        assert closing_the_door.result(PATIENCE)
    assert is_kept_out(sharing)
    assert is_kept_out(alone)
    alone.readmit()
    assert not is_kept_out(sharing)
    assert not is_kept_out(alone)


def test_a_process_is_alive_while_its_byte_is_locked(session: IndexSession, other: IndexSession) -> None:
    with session.section() as (process, _):
        owner = process.owner
    with other.section() as (theirs, index):
        assert owner in index.owners()
        assert owner != theirs.owner
        assert not theirs.owners.try_lock(owner)
    # all that a killed process does
    process.close_descriptors()
    assert theirs.owners.try_lock(owner)
    theirs.owners.unlock(owner)


def test_who_leaves_gives_all_back(session: IndexSession, other: IndexSession) -> None:
    said: list[int] = []
    with session.section() as (process, index):
        index.change_lease(process.owner, 50)
        owner = process.owner
    assert session.close(lambda index: said.append(index.totals().lease))
    assert said == [50]
    with other.section() as (_, index):
        assert owner not in index.owners()
        assert index.totals().lease == 0
    # who is writing at the source stays
    with session.section() as (process, index):
        index.tables.add_writing(1, "s/a/0", process.owner, beneath=False)
    assert not session.close()
    assert session.current is process
    in_section(session, lambda index: index.tables.drop_writings([1]))
    assert session.close()
    assert session.current is None


@pytest.mark.parametrize("trouble", ["guard", "storing", "index"])
def test_who_is_writing_stays_even_if_it_cannot_sign_off(
    session: IndexSession, other: IndexSession, trouble: str
) -> None:
    with session.section() as (process, index):
        write = session.begin_write("s/a/0", beneath=False)
        index.tables.add_writing(write, "s/a/0", process.owner, beneath=False)
        path, owner = process.index_path(7), process.owner
    session.timeout = process.guard.timeout = 0.1
    with ExitStack() as held:
        if trouble == "guard":
            held.enter_context(other.guarded())
        elif trouble == "storing":
            held.enter_context(session.storing())
        else:
            held.enter_context(closing(sqlite3.connect(path))).execute("BEGIN EXCLUSIVE")
        assert not session.close()
    assert session.current is process
    with other.section() as (theirs, _):
        assert not theirs.owners.try_lock(owner)
    session.end_writes([write])
    process.guard.impatient_until = 0.0
    session.timeout = process.guard.timeout = PATIENCE
    in_section(session, lambda index: index.tables.drop_writings([write]))
    assert session.close()
    assert session.current is None


def test_who_keeps_storing_slows_down_one_attempt_to_be_alone(session: IndexSession, other: IndexSession) -> None:
    storing = session.process().storing
    with other.storing():
        assert not session.waits_for_others(PATIENCE)
        assert not storing.exclude(1.0)
        # which is no fault of the disk
        assert session.waits_for_others(PATIENCE)
        began = time.monotonic()
        assert not storing.exclude(PATIENCE)
        assert time.monotonic() - began < PATIENCE
    assert storing.exclude(PATIENCE)
    storing.readmit()


def test_a_holder_of_the_guard_slows_down_one_attempt_to_join(session: IndexSession, other: IndexSession) -> None:
    session.close()
    waits: list[float] = []
    session.timeout = 1.0
    with other.guarded():
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(Busy):
                session.process()
            waits.append(time.monotonic() - began)
    assert waits[0] >= session.timeout > waits[1] + waits[2]


def test_a_namespace_that_is_written_has_a_note_until_its_writer_leaves(
    session: IndexSession, other: IndexSession
) -> None:
    session.record_written("source")
    (note,) = door.written_notes(session.meta)
    assert (note.namespace(), note.is_of_this_boot) == ("source", True)
    assert list(other.process().dead_notes()) == []
    session.close()
    assert door.written_notes(session.meta) == []
    session.record_written("source")
    registration = session.current
    assert isinstance(registration, Registration)
    registration.close_descriptors()
    assert [note.namespace() for note in other.process().dead_notes()] == ["source"]


# -- locks of keys and byte ranges


def test_locks_of_keys_are_only_tried(session: IndexSession, other: IndexSession) -> None:
    mine, theirs = session.process().keys, other.process().keys
    assert mine.try_lock(5)
    assert mine.try_lock(5)
    assert not theirs.try_lock(5)
    assert theirs.try_lock(6)
    mine.unlock(5)
    assert not theirs.try_lock(5)
    mine.unlock(5)
    assert theirs.try_lock(5)


def test_a_span_that_another_process_fetches_is_named(session: IndexSession, other: IndexSession) -> None:
    mine, theirs = session.process().keys, other.process().keys
    assert mine.try_lock_span(1, (100, 200)) is None
    assert theirs.try_lock_span(1, (0, 100)) is None
    assert theirs.try_lock_span(1, (150, 300)) == (150, 200)
    assert theirs.try_lock_span(2, (150, 300)) is None
    mine.unlock_span(1, (100, 200))
    assert theirs.try_lock_span(1, (150, 300)) is None


# -- write counters


def test_a_write_is_seen_by_all_that_it_concerns(tmp_path: Path) -> None:
    with closing(WriteCounters(str(tmp_path / "writes"))) as mine, closing(WriteCounters(mine_path(mine))) as theirs:

        def versions() -> dict[str, Any]:
            keys = {"s/a/c/0": True, "s/a/c/1": True, "s/a/zarr.json": False, "s/b/c/0": True, "t/a/c/0": True}
            return {key: theirs.before(door.counters_of(key, data=data)) for key, data in keys.items()}

        def raised(counter: int | str) -> list[str]:
            before = versions()
            if isinstance(counter, int):
                mine.increment(counter)
            else:
                mine.increment_beneath(counter)
            return [key for key, version in versions().items() if version != before[key]]

        assert raised(door.write_counter("s/a/c/0")) == ["s/a/c/0"]
        assert raised("s/a") == ["s/a/c/0", "s/a/c/1", "s/a/zarr.json"]
        # a document says that its chunks are others, not that it is
        assert raised(door.data_counter("s/a")) == ["s/a/c/0", "s/a/c/1"]
        assert raised("s") == ["s/a/c/0", "s/a/c/1", "s/a/zarr.json", "s/b/c/0"]
        assert raised(door.missing_counter("s/a")) == []
        assert theirs.current()[0] == 0
        assert raised("") == list(versions())
        assert theirs.current()[0] != 0


def mine_path(counters: WriteCounters) -> str:
    return os.readlink(f"/proc/self/fd/{counters.fd}")


def test_counters_are_right_whichever_thread_reads(tmp_path: Path) -> None:
    with closing(WriteCounters(str(tmp_path / "writes"))) as counters:
        numbers = door.counters_of("s/a/c/0", data=True)
        stop = threading.Event()

        def watch() -> bool:
            last = 0
            while not stop.is_set():
                (now,) = counters.before(numbers[:1])[1:]
                # of the increment that is under way, one thread may know and the other not yet
                if now < last - 1:
                    return False
                last = now
            return True

        with ThreadPoolExecutor(2) as threads:
            watching = [threads.submit(watch) for _ in range(2)]
            for _ in range(500):
                counters.increment(numbers[0])
            stop.set()
            assert all(each.result(PATIENCE) for each in watching)
        assert counters.before(numbers[:1]) == (0, 500)


# -- the past that a policy learns from


def test_an_entry_that_comes_back_goes_on_from_its_ghost(session: IndexSession) -> None:
    with session.section() as (_, index):
        add(index, "s/a")
        row = index.find(Entry("s/a"))
        assert row is not None
        index.history.add_ghosts([(row.entry, row.id)])
        index.remove(row.id)
        index.history.pass_time(10)
        add(index, "s/a")
        add(index, "s/b")
        gaps = [gap for _, _, gap in index.history.entries_from(0, 0, 9)]
        assert gaps == [11, 0]
        assert index.totals().entries == 2
        index.history.touch([(30, Entry("s/b"), 5)])
        (_, tick, gap) = index.history.entries_from(0, 0, 9)[1]
        assert (tick, gap) == (30, 17)


def test_uses_are_queued_in_order_and_learned_once(session: IndexSession, other: IndexSession) -> None:
    with session.section() as (_, index):
        for number in range(5):
            add(index, f"s/{number}", size=number)
        entries = [Entry(f"s/{number}") for number in range(5)]
        index.history.queue_uses([(door.hash_of(entry), entry) for entry in reversed(entries)])
        index.history.queue_uses([(1, Entry("s/missing"))])
        assert index.history.learned() is None
        assert index.history.set_learned(b"one") == 1
    with other.section() as (_, index):
        assert index.history.queued_uses(99) == 5
        assert [size for _, _, size, _ in index.history.take_queued(3)] == [4, 3, 2]
        assert [size for _, _, size, _ in index.history.take_queued(1)] == [1]
        index.history.drop_queued()
        assert index.history.take_queued(3) == []
        assert index.history.set_learned(b"two") == 2
    assert in_section(session, lambda index: index.history.learned()) == (2, b"two")
    assert door.hash_of(entries[0]) >> 30 == door.lot_of(entries[0])


def test_the_index_of_an_unknown_version_is_damage(tmp_path: Path) -> None:
    path = str(tmp_path / "index-1.db")
    Index(path, create=True).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    for garbage in (None, b"", b"no index"):
        if garbage is not None:
            Path(path).write_bytes(garbage)
        with pytest.raises(Damaged):
            Index(path)
    os.unlink(path)
    with pytest.raises(Damaged):
        Index(path)
