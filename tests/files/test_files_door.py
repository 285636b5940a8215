"""Lookup, quarantine and the health of the disk through the door: what is served, and when nothing is."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from xzcache import files
from xzcache.files import Health, Quarantine, Reader, Whose
from xzcache.model import END, META, Damaged, Entry

PATIENCE = 60.0
WHOLE = Entry("s/a/c/0")
DATA = bytes(range(256)) * 4


class Row(NamedTuple):
    size: int
    crc: int


class Barrier:
    """What the lookup asks of the rooms above it: a table of rows, and a list of faults."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.rows: dict[Entry, Row] = {}
        self.faults: list[BaseException] = []
        self.health = Health(root, lambda: None, lambda: True)
        self.session: Any = self

    def is_stand_in(self) -> bool:
        return True

    @contextmanager
    def section(self) -> Iterator[tuple[object, Any]]:
        yield None, self

    def find(self, entry: Entry) -> Row | None:
        return self.rows.get(entry)

    def try_or(self, action: Callable[[], Any], otherwise: Any) -> Any:
        return action()

    def with_rebuild(self, action: Callable[[], Any]) -> Any:
        return action()

    def record_fault(self, error: BaseException) -> None:
        self.faults.append(error)


@pytest.fixture
def barrier(tmp_path: Path) -> Barrier:
    if not files.has_stamps(str(tmp_path)):
        pytest.skip("no extended attributes here")
    return Barrier(str(tmp_path.resolve()))


@pytest.fixture
def reader(barrier: Barrier) -> Reader:
    return Reader(barrier, folds=False)


def path_of(barrier: Barrier, entry: Entry) -> str:
    return f"{barrier.root}/{files.relative_path(entry, hashed=False)}"


def store(barrier: Barrier, entry: Entry, data: bytes = DATA, validator: str = "") -> str:
    """Store an entry as a publisher does: a temporary file with its stamp, then one rename."""
    temporary = f"{barrier.root}/{META}/tmp/1/1"
    files.write(temporary, data, files.stamp_of(entry, data, validator))
    files.move(temporary, path := path_of(barrier, entry))
    return path


def at_once(reader: Reader, entry: Entry = WHOLE, max_age_ns: int | None = None, **options: Any) -> bytes | None:
    """What is read of an entry without waiting."""
    found = reader.get_nowait(entry, max_age_ns, **({"most": 1 << 20} | options))
    return None if found is None else found[0].tobytes()


def served(reader: Reader, entry: Entry = WHOLE) -> bytes | None:
    """What is found of an entry, and the same without waiting."""
    found = reader.open_entry(entry)
    if found is None:
        return None
    span = (0, found.size) if found.entry == entry else (entry.start, entry.stop)
    data = reader.read(found, *span)
    if data is not None:
        assert at_once(reader, entry) == bytes(data)
    return None if data is None else bytes(data)


# -- what is served


def test_what_was_stored_is_served_and_nothing_else_of_the_object(reader: Reader, barrier: Barrier) -> None:
    assert served(reader) is None
    # a file that was not checked yet is not served without waiting
    store(barrier, WHOLE)
    assert at_once(reader) is None
    assert served(reader) == DATA
    place = np.zeros(len(DATA), np.uint8)
    assert at_once(reader, place=place, most=0) == DATA == place.tobytes()
    assert at_once(reader, place=place[1:]) is None
    assert at_once(reader, most=len(DATA) - 1) is None
    assert at_once(reader, most=0, patient=True) == DATA
    # an age of nothing
    assert at_once(reader, max_age_ns=0) is None
    assert served(reader, Entry(WHOLE.key, 5, 9)) == DATA[5:9]
    assert not barrier.faults


def test_a_range_is_served_from_any_piece_that_holds_it(reader: Reader, barrier: Barrier) -> None:
    store(barrier, Entry(WHOLE.key, 10, 20), DATA[10:20], "etag 1")
    assert served(reader, Entry(WHOLE.key, 10, 20)) == DATA[10:20]
    found = reader.open_entry(Entry(WHOLE.key, 12, 15))
    assert found is not None
    assert (found.entry, bytes(reader.read(found, 2, 5) or b"")) == (Entry(WHOLE.key, 10, 20), DATA[12:15])
    for missing in (
        Entry(WHOLE.key, 9, 12),
        Entry(WHOLE.key, 15, 21),
        WHOLE,
        Entry(WHOLE.key, -5),
        Entry("s/a/c/1", 12, 15),
    ):
        assert reader.open_entry(missing) is None
    # pieces that another process stores are found
    store(barrier, Entry(WHOLE.key, 20, 30), DATA[20:30], "etag 1")
    assert [(piece.start, piece.stop) for piece in reader.listed(WHOLE.key)] == [(10, 20), (20, 30)]
    assert reader.states_of(WHOLE.key) == {"etag 1"}
    assert reader.validator(Entry(WHOLE.key, 20, 30)) == "etag 1"


def test_a_range_is_read_at_once_from_a_file_that_is_known(reader: Reader, barrier: Barrier) -> None:
    path = store(barrier, WHOLE)
    within = Entry(WHOLE.key, 12, 15)
    assert at_once(reader, within) is None
    assert served(reader) == DATA
    size = len(DATA)
    for start, stop in ((12, 15), (5, END), (-3, END), (-2 * size, END), (7, 7), (size - 2, size + 9), (size + 1, END)):
        expected = DATA[start:] if stop == END else DATA[start:stop]
        assert at_once(reader, Entry(WHOLE.key, start, stop)) == expected
    found = reader.get_nowait(within, None, most=3)
    assert found is not None
    assert found[1] == WHOLE
    assert not found[0].flags.writeable
    # the whole object gives way to a piece of it
    os.unlink(path)
    store(barrier, Entry(WHOLE.key, 10, 20), DATA[10:20])
    assert at_once(reader, within) is None
    opened = reader.open_entry(within)
    assert opened is not None
    assert bytes(reader.read(opened, 2, 5) or b"") == DATA[12:15]
    found = reader.get_nowait(within, None, most=3)
    assert found is not None
    assert (found[0].tobytes(), found[1]) == (DATA[12:15], Entry(WHOLE.key, 10, 20))
    assert at_once(reader, Entry(WHOLE.key, 15, 21)) is None
    assert not barrier.faults


@pytest.mark.parametrize("seen", [False, True], ids=["unseen", "seen"])
@pytest.mark.parametrize("damage", ["bit", "short", "long", "stamp", "another", "unlike"])
def test_other_bytes_than_were_stored_are_not_served(reader: Reader, barrier: Barrier, damage: str, seen: bool) -> None:
    path = store(barrier, WHOLE)
    if seen:
        assert served(reader) == DATA
    if damage == "stamp":
        os.setxattr(path, "user.xzcache", b"garbage")
        os.utime(path)
    elif damage == "another":
        os.replace(store(barrier, Entry("s/a/c/1")), path)
    elif damage == "unlike":
        # a new file, whose stamp is that of other bytes
        files.write(f"{path}.new", DATA[::-1], files.stamp_of(WHOLE, DATA))
        os.replace(f"{path}.new", path)
    else:
        changed = {"bit": b"\1" + DATA[1:], "short": DATA[:-1], "long": DATA + b"\0"}[damage]
        with open(path, "r+b") as file:
            file.write(changed)
            file.truncate(len(changed))
    assert at_once(reader) is None
    assert served(reader) is None
    assert served(reader) is None
    assert any(isinstance(fault, Damaged) for fault in barrier.faults)
    # the entry is stored anew
    store(barrier, WHOLE)
    assert served(reader) == DATA


def test_no_bit_of_a_stamp_can_change(barrier: Barrier) -> None:
    path = store(barrier, Entry(WHOLE.key, 3, 9), DATA[3:9], 'etag "1"')
    stamp = os.getxattr(path, "user.xzcache")
    assert files.read_stamp(path) is not None
    for bit in range(8 * len(stamp)):
        changed = bytearray(stamp)
        changed[bit // 8] ^= 1 << bit % 8
        os.setxattr(path, "user.xzcache", bytes(changed))
        assert files.read_stamp(path) is None or files.look(path, Entry(WHOLE.key, 3, 9)) is Whose.MARKED, bit


def test_what_is_not_the_caches_is_not_served_as_an_entry(reader: Reader, barrier: Barrier) -> None:
    path = Path(path_of(barrier, WHOLE))
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert files.look(str(path), WHOLE) is Whose.FOREIGN
    assert reader.is_foreign_file(str(path), WHOLE.key)
    found = reader.open_entry(WHOLE, anyones=True)
    assert found is not None
    assert reader.is_foreign(found)
    assert reader.read(found, 0, found.size) is None
    # a copy of an entry is its copier's
    copy = store(barrier, Entry("s/a/c/1"))
    os.replace(copy, path)
    assert files.discard_ours(str(path), WHOLE) is Whose.MARKED
    assert path.exists()
    path.unlink()
    # a link leads out of the cache, and a pipe is never waited for
    for make in (lambda: path.symlink_to(store(barrier, Entry("s/b"))), lambda: os.mkfifo(path)):
        make()
        assert served(reader) is None
        path.unlink()
    store(barrier, WHOLE)
    os.rename(path.parent, f"{barrier.root}/elsewhere")
    path.parent.symlink_to(f"{barrier.root}/elsewhere")
    assert served(reader) is None
    with pytest.raises(OSError, match="link") as caught:
        files.inside(barrier.root, WHOLE.key)
    assert caught.value.errno == errno.ELOOP


def test_without_a_stamp_the_index_tells_whose_a_file_is(reader: Reader, barrier: Barrier) -> None:
    path = store(barrier, WHOLE)
    os.setxattr(path, "user.xzcache", b"garbage")
    assert served(reader) is None
    barrier.rows[WHOLE] = Row(len(DATA), files.checksum(DATA))
    assert served(Reader(barrier, folds=False)) == DATA
    barrier.rows[WHOLE] = Row(len(DATA), 0)
    assert served(Reader(barrier, folds=False)) is None


def test_a_file_that_cannot_be_unlinked_is_disowned(reader: Reader, barrier: Barrier) -> None:
    path = store(barrier, WHOLE)
    assert served(reader) == DATA
    assert files.disown(path)
    assert files.look(path, WHOLE) is Whose.DISOWNED
    assert served(reader) is None
    assert files.discard_ours(path, WHOLE) is Whose.DISOWNED
    assert files.look(path, WHOLE) is Whose.GONE
    assert files.discard_ours(path, WHOLE) is Whose.GONE


def test_a_walk_sees_the_entries_and_follows_no_link(
    barrier: Barrier, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = store(barrier, WHOLE)
    outside = tmp_path_factory.mktemp("outside")
    (outside / "file").touch()
    os.symlink(outside, f"{barrier.root}/s/link")
    store(barrier, Entry(WHOLE.key, 0, 5))
    assert list(files.walk(barrier.root)) == [path]
    meta = f"{barrier.root}/{META}"
    os.symlink(outside, f"{meta}/link")
    os.mkfifo(f"{meta}/pipe")
    files.remove_strangers(meta)
    assert sorted(os.listdir(meta)) == ["ranges", "tmp"]
    files.remove_tree(f"{barrier.root}/s")
    assert (outside / "file").exists()


# -- keys that must not be served


def test_what_is_in_quarantine_is_not_served(barrier: Barrier) -> None:
    quarantine = Quarantine()
    reader = Reader(barrier, folds=False, quarantine=quarantine)
    store(barrier, WHOLE)
    store(barrier, Entry(WHOLE.key, 10, 20), DATA[10:20])
    assert served(reader) == DATA
    for name in (WHOLE.key, files.beneath("s/a"), files.beneath("s"), files.beneath("")):
        quarantine.hold([name])
        quarantine.hold([name])
        quarantine.free([name])
        assert served(reader) is served(reader, Entry(WHOLE.key, 10, 20)) is None
        assert at_once(reader) is None
        assert len(reader.listed(WHOLE.key).starts) == 0
        assert not quarantine.holds("t/a/c/0") or name == files.beneath("")
        quarantine.free([name])
        assert quarantine.is_empty
        assert served(reader) == DATA
    quarantine.hold([files.beneath("s/a/c/0"), "s/a", files.beneath("s/ab")])
    assert served(reader) == DATA
    reader.quarantine_all()
    assert served(reader) is None


def test_a_file_that_came_back_is_served_only_if_the_index_has_it(barrier: Barrier) -> None:
    quarantine = Quarantine()
    reader = Reader(barrier, folds=False, quarantine=quarantine)
    store(barrier, WHOLE)
    assert served(reader) == DATA
    quarantine.suspect([WHOLE.key])
    found = reader.open_entry(WHOLE)
    assert at_once(reader) is None
    assert found is not None
    reader.close(found)
    fresh = Reader(barrier, folds=False, quarantine=quarantine)
    assert served(fresh) is None
    assert quarantine.take_returned() == [WHOLE.key]
    assert not quarantine.has_returned
    barrier.rows[WHOLE] = Row(len(DATA), files.checksum(DATA))
    found = fresh.open_entry(WHOLE)
    assert found is not None
    assert fresh.read(found, 0, found.size) == DATA


def test_a_quarantine_forgets_no_name_however_many_there_are() -> None:
    quarantine = Quarantine()
    quarantine.suspect(f"s{number % 5}/a/c/{number}" for number in range(20_000))
    assert len(quarantine.suspected) < 5000
    quarantine.record_away(f"n{number}/a/c/0" for number in range(20_000))
    assert quarantine.is_away("any/thing")
    later = Quarantine(quarantine)
    assert all(later.suspects(f"s{number % 5}/a/c/{number}") for number in range(20_000))
    assert not later.suspects("t/a/c/0")
    assert later.is_away("any/thing")
    later.forget_away()
    assert not later.is_away("any/thing")
    # what one holds, the next does not
    quarantine.hold(["k"])
    assert not Quarantine(quarantine).holds("k")


# -- the health of the disk


def test_errors_of_the_disk_put_a_directory_aside_and_no_others_do() -> None:
    health = Health("there", lambda: None, lambda: True)
    for error in (
        FileNotFoundError(errno.ENOENT, ""),
        OSError(errno.ENOSPC, ""),
        OSError(errno.EROFS, ""),
        Damaged(""),
    ):
        for _ in range(50):
            health.record_fault(error)
    assert not health.is_aside
    for number in range(10):
        assert not health.is_aside, number
        health.record_fault(OSError(errno.EIO, ""))
    assert health.is_aside
    health.rest()
    assert not health.is_aside


def test_a_directory_comes_back_after_a_probe_and_not_before_what_is_pending() -> None:
    order: list[str] = []
    go = threading.Event()

    def probe() -> None:
        order.append("probe")
        assert go.wait(PATIENCE)

    def retry_pending() -> bool:
        order.append(f"pending, aside: {health.is_aside}")
        return True

    health = Health("there", probe, retry_pending)
    assert health.comes_back(0)
    health.record_slow("it took long")
    health.record_slow("it took long")
    assert health.is_aside
    assert not health.comes_back(0)
    go.set()
    assert health.comes_back(PATIENCE)
    assert order == ["probe", "pending, aside: True"]


def test_a_disk_whose_probe_fails_stays_aside(caplog: pytest.LogCaptureFixture) -> None:
    failed, well = threading.Event(), threading.Event()

    def probe() -> None:
        if not well.is_set():
            failed.set()
            raise OSError(errno.EIO, "no")

    health = Health("there", probe, lambda: True)
    health.record_slow("it took long")
    assert failed.wait(PATIENCE)
    assert not health.comes_back(0)
    well.set()
    assert health.comes_back(PATIENCE)
    said = [record.levelname for record in caplog.records if record.name == "xzcache.files"]
    assert said.count("WARNING") == 1


def test_a_larger_file_may_take_longer() -> None:
    assert files.allowance(0) == files.LONG
    assert files.allowance(1 << 30) > files.allowance(1 << 20) > files.LONG


# -- directories


def test_a_directory_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    place = str(tmp_path / "a" / "b" / "cache")
    files.make_private(place)
    assert files.unsafe(place) is None
    assert os.stat(place).st_mode & 0o777 == 0o700
    assert os.stat(os.path.dirname(place)).st_mode & 0o22 == 0
    assert files.resolve_directory(place) == os.path.realpath(place)
    os.chmod(place, 0o777)
    assert "other users" in str(files.unsafe(place))
    Path(place, "file").touch()
    assert files.resolve_directory(place) == f"{os.path.realpath(place)}/{files.private_name()}"
    os.symlink(place, tmp_path / "link")
    assert "link" in str(files.unsafe(str(tmp_path / "link")))
    with pytest.raises(FileNotFoundError):
        files.unsafe(f"{place}/missing")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        if path.name == "pipe":
            os.mkfifo(path)
        with pytest.raises(OSError, match=r"regular|symbolic"):
            files.open_own(str(path))


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "file")
    stamp = files.stamp_of(WHOLE, DATA)
    with pytest.raises(TypeError):
        files.write(path, "text", stamp)  # type: ignore[arg-type]
    assert not files.exists(path)
    files.write(path, DATA, stamp)
    with pytest.raises(FileExistsError):
        files.write(path, DATA[:5], stamp)
    assert Path(path).read_bytes() == DATA
    files.sync(path)
    files.discard(path)
    files.discard(path)
    files.prune(path, str(tmp_path))
    assert os.listdir(tmp_path) == []
