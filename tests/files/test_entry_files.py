"""Entry files through the door of the room: where they lie, what they say of themselves, and whose they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xzcache import files
from xzcache.model import END, META, Entry

WHOLE = Entry("n/a/c/0")
PIECE = Entry("n/a/c/0", 10, 20)


@pytest.fixture(autouse=True)
def _has_stamps(tmp_path: Path) -> None:
    if not files.has_stamps(str(tmp_path)):
        pytest.skip("no extended attributes here")


def test_a_whole_object_lies_at_its_key_and_a_range_beside_the_others_of_its_object() -> None:
    assert files.relative_path(WHOLE, hashed=False) == WHOLE.key
    assert os.path.dirname(files.relative_path(PIECE, hashed=False)) == files.range_directory(WHOLE.key)
    assert files.relative_path(PIECE, hashed=False).startswith(META)


@pytest.mark.parametrize("key", ["a/c/0", "zarr.json", "a b/é", "a." + "x" * 250])
def test_keys_that_are_paths(key: str) -> None:
    assert files.is_plain(key)


@pytest.mark.parametrize("key", ["", "../a", "a//b", "./a", "a/..", "a\0b", f"{META}/index", "x" * 256])
def test_keys_that_are_not(key: str) -> None:
    assert not files.is_plain(key)
    assert files.relative_path(Entry(key), hashed=True).startswith(f"{META}/odd/")


def test_keys_that_a_file_system_without_case_would_mix_up() -> None:
    assert files.is_plain("A/c/0")
    assert not files.is_plain("A/c/0", folds=True)


@pytest.mark.parametrize("entry", [WHOLE, PIECE])
@pytest.mark.parametrize("validator", ["", "etag:abc"])
def test_a_file_tells_what_it_was_written_with(tmp_path: Path, entry: Entry, validator: str) -> None:
    path, data = str(tmp_path / "deep" / "file"), b"0123456789"
    stamp = files.stamp_of(entry, data, validator)
    files.write(path, data, stamp)
    assert Path(path).read_bytes() == data
    found = files.read_stamp(path)
    assert found == stamp
    assert found is not None
    assert (found.size, found.crc, found.validator) == (10, files.checksum(data), validator)
    assert (found.start, found.stop) == ((0, END) if entry is WHOLE else (10, 20))


def test_whose_a_file_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert files.look(str(path), WHOLE) is files.Whose.GONE
    files.write(str(path), b"data", files.stamp_of(WHOLE, b"data"))
    assert files.look(str(path), WHOLE) is files.Whose.OURS
    assert files.look(str(path), Entry("n/a/c/1")) is files.Whose.MARKED
    path.unlink()
    path.write_bytes(b"data")
    assert files.look(str(path), WHOLE) is files.Whose.FOREIGN


def test_a_file_is_never_written_over_another(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    files.write(path, b"first", files.stamp_of(WHOLE, b"first"))
    with pytest.raises(FileExistsError):
        files.write(path, b"second", files.stamp_of(WHOLE, b"second"))
    assert Path(path).read_bytes() == b"first"


def test_a_range_of_a_file_is_read_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        found = files.read(file.fileno(), 2, 5)
        assert found is not None
        assert bytes(found) == b"234"
        assert files.read(file.fileno(), 5, 11) is None


def test_empty_folders_go_as_far_as_the_root(tmp_path: Path) -> None:
    deep = tmp_path / "n" / "a" / "c"
    deep.mkdir(parents=True)
    (tmp_path / "n" / "other").touch()
    files.prune(str(deep / "0"), str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["n", "other"]
