"""The command ``xzcache`` as users run it: on caches that real reads filled, in pipes and on terminals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import zarr
from processes import Team, index_path, opened_index
from zarr.storage import LocalStore

import xzcache
from xzcache.cli import main

CHUNK = 1000


class Filled(NamedTuple):
    """A cache of two sources, as two processes left it."""

    root: Path
    era5: Path
    hrrr: Path


def make(path: Path, *, shards: bool = False) -> Path:
    """A group of two arrays of 8 chunks each, of which the second has no compression and the first may have shards."""
    group = zarr.create_group(LocalStore(path))
    more: dict[str, Any] = {"shards": (4 * CHUNK,)} if shards else {}
    for name in ("t2m", "u10"):
        array = group.create_array(name, shape=8 * CHUNK, chunks=(CHUNK,), dtype="f4", compressors=None, **more)
        array[:] = np.arange(8 * CHUNK, dtype="f4")
        more = {}
    zarr.consolidate_metadata(LocalStore(path), zarr_format=3)
    return path


def fill(source: Path, root: Path, *, part: int = 4) -> None:
    """Read a part of one array and all of another, as one process does, and leave the cache."""
    store = xzcache.CacheStore(source, cache_store=root, read_only=True)
    group = zarr.open_group(store, mode="r")
    group["t2m"][: part * CHUNK]
    group["u10"][:]
    xzcache.cleanup_resources()


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    made = Filled(tmp_path / "cache", make(tmp_path / "era5.zarr"), make(tmp_path / "hrrr.zarr"))
    fill(made.era5, made.root)
    fill(made.hrrr, made.root, part=8)
    return made


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*words: str | Path, directory: Path | None = None) -> Done:
    """Run the command in this process, as in a pipe."""
    arguments = [str(word) for word in words] + ([] if directory is None else ["--directory", str(directory)])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def real(*words: str | Path, env: dict[str, str] | None = None) -> Done:
    """Run the command as a process, in a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "xzcache", *map(str, words)],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def on_terminal(words: Sequence[str | Path], answer: str = "") -> tuple[int, str]:
    """Run the command on a terminal and type an answer; returns the exit code and what was shown."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "xzcache", *map(str, words)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        os.write(ours, answer.encode())
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        os.close(ours)
    return process.returncode, shown.decode()


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def figures(root: Path) -> tuple[int, int, int | None]:
    """What no command may change unasked."""
    now = xzcache.info(root)
    return now.entries, now.used, now.max_size


# -- seeing


def test_info_shows_how_full_the_cache_is(filled: Filled) -> None:
    found = run("info", "--json", directory=filled.root).json
    assert (found["state"], found["entries"], found["sources"]) == ("ok", 4 + 8 + 1 + 16 + 1, 2)
    with opened_index(str(filled.root)) as index:
        assert found["used"] == index.execute("SELECT bytes FROM total").fetchone()[0]
    assert found["max_size"] == 10 << 30
    done = run("info", directory=filled.root)
    assert done.code == 0
    assert "10.7 GB" in done.out
    assert "30 of 2 sources" in done.out


def test_ls_shows_sources_and_the_part_of_each_array(filled: Filled) -> None:
    sources = run("ls", "--json", directory=filled.root).json["sources"]
    assert [source["entries"] for source in sources] == [17, 13]
    assert sum(source["share"] for source in sources) == pytest.approx(1)
    listed = run("ls", "era5", "--json", directory=filled.root).json
    t2m, u10 = listed["arrays"]
    assert (t2m["name"], t2m["cached"], t2m["total"], t2m["fraction"]) == ("t2m", 4, 8, 0.5)
    assert (u10["name"], u10["cached"], u10["total"], u10["fraction"]) == ("u10", 8, 8, 1.0)
    assert t2m["size"] == 4 * 4 * CHUNK
    assert t2m["shape"] == [8 * CHUNK]
    # in a pipe, with the words of a table and no colours
    done = real("ls", filled.era5, "--directory", filled.root)
    assert done.code == 0
    assert "4 of 8" in done.out
    assert "\x1b" not in done.out


def test_shards_of_which_parts_are_cached(tmp_path: Path) -> None:
    source, root = make(tmp_path / "x.zarr", shards=True), tmp_path / "cache"
    fill(source, root, part=1)
    (t2m, u10) = run("ls", "x.zarr", "--json", directory=root).json["arrays"]
    assert (t2m["cached"], t2m["partly"], t2m["total"]) == (0, 1, 2)
    assert (u10["cached"], u10["partly"], u10["total"]) == (8, 0, 8)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_chunks_that_the_source_does_not_have(tmp_path: Path, zarr_format: Any) -> None:
    """They cannot be cached, and an array of which all others are is cached as a whole."""
    array = zarr.create_array(
        LocalStore(tmp_path / "x.zarr"), name="a", shape=(4, 4), chunks=(2, 2), dtype="i4", zarr_format=zarr_format
    )
    array[:2, :2] = 1
    store = xzcache.CacheStore(
        tmp_path / "x.zarr", cache_store=tmp_path / "cache", read_only=True, missing_max_age_seconds=60
    )
    # it asks for the documents of the other format as well, which are no chunks
    zarr.open_array(store, path="a", mode="r")[:]
    xzcache.cleanup_resources()
    (item,) = xzcache.ls("x.zarr", tmp_path / "cache")
    assert (item.name, item.total, item.cached, item.missing, item.fraction) == ("a", 4, 1, 3, 1.0)


@pytest.mark.parametrize("name", ["era5", "ERA5.zarr", "{era5}", "{namespace}", "file://{era5}"])
def test_a_source_by_any_of_its_names(filled: Filled, name: str) -> None:
    namespace = xzcache.CacheStore(filled.era5, cache_store=filled.root).namespace
    given = name.format(era5=filled.era5, namespace=namespace)
    assert run("ls", given, "--json", directory=filled.root).json["source"]["namespace"] == namespace


def test_on_a_terminal_in_colours(filled: Filled) -> None:
    pytest.importorskip("rich")
    code, shown = on_terminal(["info", "-d", filled.root])
    assert code == 0
    assert "\x1b[" in shown
    assert "░" in shown


def test_settings_and_where_they_come_from(tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".config" / "xzcache"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("policy: adaptive\n")
    env = {"HOME": str(tmp_path / "home"), "XZCACHE_MAX_SIZE": "5 GB", "DASK_XZCACHE__THREADS": "7"}
    done = real("config", "--json", env=env)
    assert done.code == 0
    found = {row["name"]: (row["value"], row["origin"]) for row in done.json["settings"]}
    assert found["max_size"] == ("5 GB", "environment, XZCACHE_MAX_SIZE")
    assert found["policy"] == ("adaptive", f"file {folder / 'mine.yaml'}, line 1")
    assert found["threads"][0] == 7
    assert "Dask" in found["threads"][1]
    assert found["revalidate"] == ("open", "default")
    misspelled = real("config", env={**env, "XZCACHE_MAX_SISE": "5 GB"})
    assert misspelled.code == 1
    assert "XZCACHE_MAX_SISE" in misspelled.out
    assert "did you mean max_size?" in misspelled.out


# -- clearing


def test_clear_removes_one_source_and_no_other(filled: Filled) -> None:
    before = xzcache.info(filled.root)
    dry = run("clear", "era5", "--dry-run", "--json", directory=filled.root).json
    assert (dry["entries"], dry["dry_run"]) == (13, True)
    assert xzcache.info(filled.root).entries == before.entries
    assert run("clear", "era5", "--yes", directory=filled.root).code == 0
    (left,) = xzcache.ls(directory=filled.root)
    assert (left.entries, left.size) == (17, before.used - dry["size"])
    assert xzcache.check(filled.root).ok
    # the source is as before, and is cached again
    fill(filled.era5, filled.root)
    assert xzcache.info(filled.root).used == before.used


def test_clear_what_was_not_used(filled: Filled) -> None:
    long_ago = time.time_ns() - 10 * 86_400 * 10**9
    with opened_index(str(filled.root)) as index:
        index.execute("UPDATE entry SET used = ? WHERE key LIKE '%/u10/c/%'", (long_ago,))
        index.commit()
    assert run("clear", "--older-than", "20d", "--yes", "--json", directory=filled.root).json["entries"] == 0
    assert run("clear", "era5", "--older-than", "7d", "--dry-run", "--json", directory=filled.root).json["entries"] == 8
    cleared = run("clear", "--older-than", "7d", "--yes", "--json", directory=filled.root).json
    assert (cleared["entries"], cleared["size"]) == (16, 16 * 4 * CHUNK)
    (t2m, u10) = xzcache.ls("era5", filled.root)
    assert (t2m.cached, u10.cached) == (4, 0)
    assert xzcache.check(filled.root).ok


@pytest.mark.parametrize("words", [["clear"], ["clear", "era5"], ["resize", "10kB"], ["clear", "--older-than", "0s"]])
def test_nothing_is_removed_unasked(filled: Filled, words: list[str]) -> None:
    before = figures(filled.root)
    done = run(*words, directory=filled.root)
    assert done.code == 2
    assert "--yes" in done.err
    assert len(done.err.splitlines()) == 1
    assert figures(filled.root) == before


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 1, 30), ("y\n", 0, 17)])
def test_a_terminal_is_asked(filled: Filled, answer: str, code: int, left: int) -> None:
    found, shown = on_terminal(["clear", "era5", "-d", filled.root], answer)
    assert "remove 13 entries" in shown
    assert found == code
    assert xzcache.info(filled.root).entries == left


# -- sizing and checking


def test_resize_evicts_what_does_not_fit(filled: Filled) -> None:
    used = xzcache.info(filled.root).used
    done = run("resize", "80kB", "--yes", "--json", directory=filled.root).json
    assert (done["before"], done["max_size"]) == (10 << 30, 80_000)
    now = xzcache.info(filled.root)
    assert now.max_size == 80_000
    assert now.used <= 80_000
    assert now.used + done["evicted_size"] == used
    assert "80 kB" in run("resize", "none", directory=filled.root).out
    assert xzcache.info(filled.root).max_size is None


def test_resize_tells_that_the_configuration_changes_it_again(tmp_path: Path, filled: Filled) -> None:
    env = {"XZCACHE_DIRECTORY": str(filled.root), "XZCACHE_MAX_SIZE": "5 GB"}
    assert "XZCACHE_MAX_SIZE" in real("resize", "6GB", env=env).out
    assert "note" not in real("resize", "5GB", env=env).out


def test_check_finds_and_repairs(filled: Filled) -> None:
    assert run("check", directory=filled.root).code == 0
    chunk = next(filled.root.glob("*era5*/u10/c/0"))
    chunk.unlink()
    done = run("check", "--json", directory=filled.root)
    assert done.code == 1
    assert [finding["kind"] for finding in done.json["findings"]] == ["missing"]
    assert run("check", "--repair", directory=filled.root).code == 0
    assert run("check", directory=filled.root).code == 0


# -- caches that are none, or cannot be used


def test_no_cache_is_created(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for words, code in [
        (["info"], 0),
        (["ls"], 0),
        (["ls", "era5"], 1),
        (["clear", "--yes"], 0),
        (["clear", "era5", "--yes"], 0),
        (["resize", "5GB"], 1),
        (["check", "--repair"], 0),
        (["config"], 0),
    ]:
        done = run(*words, directory=nowhere)
        assert done.code == code, words
        assert not nowhere.exists(), words
    assert "max_size" in run("resize", "5GB", directory=nowhere).err


def damaged(root: Path) -> None:
    with open(index_path(str(root)), "r+b") as file:
        file.write(os.urandom(8192))


def cut_short(root: Path) -> None:
    os.truncate(index_path(str(root)), 5000)


def without_index(root: Path) -> None:
    os.unlink(index_path(str(root)))


def without_table(root: Path) -> None:
    with opened_index(str(root)) as index:
        index.execute("DROP TABLE entry")
        index.commit()


def with_texts_for_numbers(root: Path) -> None:
    with opened_index(str(root)) as index:
        index.execute("UPDATE entry SET size = 'x', used = 'y'")
        index.execute("UPDATE ns SET bytes = 'z'")
        index.commit()


def with_garbage_in_statistics(root: Path) -> None:
    with opened_index(str(root)) as index:
        index.execute("UPDATE stat SET hits = 'x', saved = 'y'")
        index.execute("UPDATE sample SET uses = 'text', shift = 'z'")
        index.commit()


def newer(root: Path) -> None:
    (root / ".xzcache" / "format").write_text("2")


def newer_index(root: Path) -> None:
    with opened_index(str(root)) as index:
        index.execute("PRAGMA user_version = 99")


def without_lock(root: Path) -> None:
    (root / ".xzcache" / "lock").unlink()


def emptied(root: Path) -> None:
    shutil.rmtree(root / ".xzcache")
    (root / ".xzcache").mkdir(0o700)


def linked(root: Path) -> None:
    elsewhere = root.with_name(f"{root.name}-elsewhere")
    (root / ".xzcache").rename(elsewhere)
    (root / ".xzcache").symlink_to(elsewhere)


def of_another(root: Path) -> None:
    try:
        os.chown(root / ".xzcache", 12345, -1)
    except PermissionError:
        pytest.skip("to give files away takes root")


def a_file_within(root: Path) -> None:
    shutil.rmtree(root / ".xzcache")
    (root / ".xzcache").write_text("mine")


def a_file(root: Path) -> None:
    shutil.rmtree(root)
    root.write_text("mine")


def absent(root: Path) -> None:
    shutil.rmtree(root)


def of_other_files(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()
    (root / "thesis.txt").write_text("mine")


UNUSABLE = [newer, linked, of_another, a_file_within, a_file]
DAMAGED = [
    *(damaged, cut_short, without_index, without_table, with_texts_for_numbers, newer_index, without_lock, emptied),
]
NONE = [absent, of_other_files]
LOOKING = [
    *("info", "ls", "ls era5", "top --once --seconds 0.1", "report", "pin", "clear --dry-run", "clear era5 --dry-run"),
    "config",
]
CHANGING = [
    *("pin era5", "unpin era5", "unpin --all", "resize 1GB --yes", "check", "check --repair", "clear era5 --yes"),
    *("clear --older-than 0s --yes", "clear --yes", "warm ERA5 --dry-run", "warm ERA5 --variable u10"),
]


def all_of(place: Path) -> Any:
    return contents(place) if place.is_dir() else place.exists() and place.read_text()


@pytest.mark.parametrize("spoil", [*UNUSABLE, *DAMAGED, *NONE, with_garbage_in_statistics])
def test_every_command_on_a_cache_of_any_state(filled: Filled, tmp_path: Path, spoil: Any) -> None:
    """A clear line, no traceback, nothing lost."""
    source = contents(filled.era5)
    for number, line in enumerate([*LOOKING, *CHANGING]):
        # a cache for each, of which this process knows nothing yet
        root = tmp_path / f"cache-{number}"
        shutil.copytree(filled.root, root)
        spoil(root)
        before = all_of(root)
        words = [str(filled.era5) if word == "ERA5" else word for word in line.split()]
        if line == "report":
            words += ["-o", str(tmp_path / "report.html")]
        done = run(*words, directory=root)
        xzcache.cleanup_resources()
        about = line, done
        # trouble is one line that names the place, below what the log may have said
        told = (done.out + done.err).splitlines()
        assert "Traceback" not in done.out + done.err, about
        assert len(done.err.splitlines()) <= 2, about
        # a source without a pin is bad input, and so is a file for a directory
        assert done.code in ((0, 1, 2) if line == "unpin era5" or spoil is a_file else (0, 1)), about
        if done.code == 1 or spoil is a_file:
            assert any(str(root) in one for one in told), about
            assert all_of(root) == before, about
        if line in LOOKING or spoil in UNUSABLE:
            assert all_of(root) == before, about
        if spoil is a_file:
            assert done.code == 2, about
        elif spoil in UNUSABLE and line != "config":
            assert done.code == 1, about
        if spoil in DAMAGED and line in CHANGING[3:]:
            assert done.code == 0, about
            if not line.startswith("clear"):
                # what the index had lost was found again by the files
                assert xzcache.info(root).entries >= 29, about
                assert run("check", directory=root).code == 0, about
        if spoil is of_other_files:
            assert (root / "thesis.txt").read_text() == "mine", about
    assert contents(filled.era5) == source


def test_a_damaged_index_is_rebuilt_to_clear(filled: Filled) -> None:
    damaged(filled.root)
    assert run("clear", "era5", "--yes", "--json", directory=filled.root).json["entries"] == 13
    assert xzcache.info(filled.root).entries == 17


def test_a_transaction_of_a_killed_process(filled: Filled) -> None:
    """Its journal is rolled back, as by any process."""
    path = index_path(str(filled.root))
    entries = xzcache.info(filled.root).entries
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = PERSIST")
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN EXCLUSIVE")
    connection.execute("DELETE FROM entry")
    # as the disk is when a process dies now
    copy = filled.root.parent / "copy"
    shutil.copytree(filled.root, copy, symlinks=True)
    connection.close()
    assert xzcache.info(copy).entries == entries


EACH: Final = """
import os, sys
from xzcache.cli import main
for line in sys.argv[2:]:
    if (child := os.fork()) == 0:
        main([*line.split(), "--directory", sys.argv[1]])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for stream in (sys.stdout, sys.stderr):
        print(f"code {code} of {line}", file=stream, flush=True)
"""


@pytest.mark.slow
def test_every_command_on_a_cache_that_may_only_be_read(filled: Filled, tmp_path: Path) -> None:
    (tmp_path / "each.py").write_text(EACH)
    looking = [line.replace("report", f"report -o {tmp_path}/r.html") for line in LOOKING]
    changing = [line.replace("ERA5", str(filled.era5)) for line in CHANGING]
    words = " ".join(f"'{line}'" for line in [*looking, *changing])
    mount = f"mount --bind {filled.root} {filled.root} && mount -o remount,ro,bind {filled.root}"
    command = f"{mount} && {sys.executable} {tmp_path}/each.py {filled.root} {words}"
    before = contents(filled.root)
    done = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no mounts here")
    codes = {line: int(code) for code, line in re.findall(r"^code (\d+) of (.*)$", done.stdout, re.M)}
    assert {codes[line] for line in looking} == {0}
    assert (codes.pop("unpin era5"), codes.pop("unpin --all")) == (2, 0)
    assert {codes[line] for line in changing if line in codes} == {1}
    assert "30 of 2 sources" in done.stdout
    assert "4 of 8" in done.stdout
    assert "Traceback" not in done.stderr
    for told in re.split(r"^code .*\n", done.stderr, flags=re.M):
        assert len(told.splitlines()) <= 2, told
        assert not told or "Read-only" in told or "is not pinned" in told, told
    assert contents(filled.root) == before


# -- bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "ear5"], ["ear5", "era5"]),
        (["ls", "zarr"], ["matches 2 sources", "era5", "hrrr"]),
        (["clear", "s3://me:secret@bucket/x.zarr", "--yes"], ["bucket/x.zarr", "era5"]),
        (["clear", "--older-than", "7", "--yes"], ["'7'", "7d"]),
        (["clear", "--older-than", "soon", "--yes"], ["'soon'", "7d"]),
        (["clear", "--older-than", "-1d", "--yes"], ["-1d", "7d"]),
        (["resize", "5XB"], ["5XB", "50GB"]),
        (["resize", "plenty"], ["plenty", "50GB"]),
        (["resize", "-5GB", "--yes"], ["-5GB", "50GB"]),
        (["warm", "s3:/bucket/era5.zarr"], ["not accepted", "did you mean s3://bucket/era5.zarr?"]),
        (["resize"], ["SIZE"]),
        (["lss"], ["lss", "'ls'"]),
        (["frobnicate"], ["frobnicate", "info"]),
        (["ls", "--jsn"], ["--jsn", "--json"]),
        (["info", "--directory", ""], ["directory"]),
        (["info", "--directory", "s3://me:secret@bucket"], ["directory", "URL"]),
    ],
)
def test_bad_input_is_one_line(filled: Filled, words: list[str], said: list[str]) -> None:
    before = figures(filled.root)
    given = words if "--directory" in words or words == ["lss"] else [*words, "--directory", str(filled.root)]
    done = run(*given)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert all(word in done.err for word in said), done.err
    assert "secret" not in done.err
    assert figures(filled.root) == before


def test_help_has_examples() -> None:
    for words in ([], ["info"], ["ls"], ["clear"], ["resize"], ["check"], ["config"]):
        shown = run(*words, "--help").out
        assert "Examples:" in shown
        assert f"xzcache {' '.join(words)}".strip() in shown


def test_without_a_command_it_shows_help() -> None:
    done = run()
    assert (done.code, done.err) == (0, "")
    assert done.out == run("--help").out


def test_the_shell_completes_commands_and_sources(filled: Filled) -> None:
    name = xzcache.ls(directory=filled.root)[0].name
    words = {"_XZCACHE_COMPLETE": "bash_complete", "XZCACHE_DIRECTORY": str(filled.root)}
    assert "resize" in real(env={**words, "COMP_WORDS": "xzcache re", "COMP_CWORD": "1"}).out
    assert name in real(env={**words, "COMP_WORDS": "xzcache ls ", "COMP_CWORD": "2"}).out


def test_the_package_stays_light() -> None:
    heavy = ("click", "rich", "xarray", "xzcache.manage")
    look = f"import sys, xzcache; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    loaded = done.stdout.strip()
    # Dask's configuration may load click by itself
    assert loaded in ("[]", "['click']")


def test_the_reader_of_a_pipe_that_has_seen_enough(filled: Filled) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "xzcache", "ls", "--json", "-d", filled.root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


# -- while others work


def _use(link: Any, source: str, root: str) -> int:
    """Read all of a source again and again, until told to stop; returns how often it was wrong."""
    array = zarr.open_array(xzcache.CacheStore(source, cache_store=root, read_only=True), path="t2m", mode="r")
    expected = np.arange(8 * CHUNK, dtype="f4")
    link.send("reading")
    wrong = 0
    while not link.poll():
        wrong += not np.array_equal(array[:], expected)
    return wrong


def test_every_command_while_processes_read(filled: Filled) -> None:
    with Team() as team:
        children = [team.start(_use, str(filled.era5), str(filled.root)) for _ in range(3)]
        for child in children:
            child.hear("reading")
        for words in (
            ["info"],
            ["ls"],
            ["ls", "hrrr"],
            ["clear", "era5", "--yes"],
            ["clear", "--older-than", "0s", "--yes"],
            ["resize", "50kB", "--yes"],
            ["resize", "1GB"],
            ["check"],
            ["clear", "--yes"],
        ):
            done = run(*words, directory=filled.root)
            assert done.code == (0 if words != ["ls", "hrrr"] else done.code), (words, done)
            if words == ["info"]:
                assert xzcache.info(filled.root).processes >= 3
        for child in children:
            child.send("stop")
            assert child.result() == 0
    assert xzcache.check(filled.root).ok
