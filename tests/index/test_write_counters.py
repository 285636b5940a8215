"""The counters that show whether a key was written."""

from __future__ import annotations

from pathlib import Path

from xzcache.index import WriteCounters


def test_counters_are_those_of_the_file(tmp_path: Path) -> None:
    mine, other = (WriteCounters(str(tmp_path / "writes")) for _ in range(2))
    numbers = [3, 5, 7]
    assert mine.before(numbers) == (0, 0, 0, 0)
    for number in (5, 5, 7):
        other.increment(number)
        # incremented by another process, and seen at once
        assert mine.before(numbers) == other.before(numbers) == (0, *map(other.read, numbers))
    assert mine.before(numbers) == (0, 0, 2, 1)
    mine.increment(3)
    assert mine.before(numbers) == other.before(numbers) == (0, 1, 2, 1)
    for counters in (mine, other):
        counters.close()


def test_half_an_increment_is_seen_with_the_next_one(tmp_path: Path) -> None:
    mine, other = (WriteCounters(str(tmp_path / "writes")) for _ in range(2))
    assert mine.before([3]) == (0, 0)
    with (tmp_path / "writes").open("r+b") as file:
        # a process was killed before it incremented the total
        file.seek(3 * 8)
        file.write((1).to_bytes(8, "little"))
    assert mine.before([3]) == (0, 0)
    assert mine.before([11, 3]) == (0, 0, 0)
    other.increment(11)
    assert mine.before([3]) == (0, 1)
    for counters in (mine, other):
        counters.close()


def test_half_an_increment_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    """A fetch that began in between must not have the version of after it."""
    mine, fresh = (WriteCounters(str(tmp_path / "writes")) for _ in range(2))
    assert mine.before([3]) == (0, 0)
    with (tmp_path / "writes").open("r+b") as file:
        # a process was killed before it incremented the total
        file.seek(3 * 8)
        file.write((1).to_bytes(8, "little"))
    begun = fresh.before([3])
    mine.increment(3)
    assert fresh.before([3]) == mine.before([3]) != begun
    for counters in (mine, fresh):
        counters.close()


def test_a_write_that_cannot_be_counted_is_one_to_any_key(tmp_path: Path) -> None:
    mine, other = (WriteCounters(str(tmp_path / "writes")) for _ in range(2))
    seen = {mine.before([3])}
    for _ in range(3):
        other.lose()
        # a counted write keeps it
        other.increment(5)
        assert mine.before([3]) == other.before([3])
        seen.add(mine.before([3]))
    assert len(seen) == 4
    for counters in (mine, other):
        counters.close()


def test_the_counters_that_are_remembered_are_limited(tmp_path: Path) -> None:
    counters = WriteCounters(str(tmp_path / "writes"))
    for number in range(10_000):
        counters.before([number, 1])
    assert len(counters.current()[1]) < 5000
    counters.close()
