"""`report`, `top` and `serve-metrics` as users run them, and every command while others read and write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import pytest
from browser import browser, needs_browser
from processes import Team, barrier, opened_index, run_command
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

import xzcache

PROTOTYPE = default_buffer_prototype()
SIZE = 1000


def make(path: Path, chunks: int = 20) -> Path:
    for number in range(chunks):
        file = path / "a" / "c" / str(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number % 251]) * SIZE)
    return path


def opened(source: Path | str, cache: Path | str, **options: Any) -> xzcache.CacheStore:
    store = LocalStore(source, read_only=options.pop("read_only", True))
    return xzcache.CacheStore(store, cache_store=cache, namespace=Path(source).name, revalidate=False, **options)


def read(store: xzcache.CacheStore, chunks: int = 20) -> None:
    for number in range(chunks):
        assert sync(store.get(f"a/c/{number}", PROTOTYPE)) is not None


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "xzcache", *map(str, words)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for _ in range(2):
        read(opened(make(tmp_path / "era5"), tmp_path / "cache"))
    xzcache.cleanup_resources()
    return tmp_path / "cache"


def test_a_report_is_written_and_named(cache: Path, tmp_path: Path) -> None:
    done = run_command("report", "-o", tmp_path / "r.html", "-d", cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/r.html: a report of {cache}, 1 source" in done.stdout
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    done = run_command("report", "-o", tmp_path / "r.html", "-d", cache, "--json")
    assert json.loads(done.stdout)["sources"] == 1
    for place in (tmp_path / "none" / "r.html", tmp_path):
        done = run_command("report", "-o", place, "-d", cache)
        assert done.returncode == 2
        # the file that was asked for, and not a temporary one
        expected = f"path={str(place)!r} is not accepted: give a file in a directory that exists"
        assert done.stderr == f"xzcache: {expected}\n"


def test_a_report_says_without_its_page_what_other_sizes_would_give(tmp_path: Path) -> None:
    store = opened(make(tmp_path / "era5", 300), tmp_path / "cache", max_size="2 MB", policy="lru")
    for _ in range(3):
        read(store, 300)
    xzcache.cleanup_resources()
    done = run_command("report", "-o", tmp_path / "r.html", "-d", tmp_path / "cache")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("misses: ")]
    said, _, since = line.partition("; of the reads since ")
    assert since.endswith(" UTC")
    assert [part.partition("% with ")[2] for part in said.removeprefix("misses: ").split(", ")] == [
        *("500 kB", "1 MB", "2 MB (now)", "4 MB", "8 MB")
    ]
    done = run_command("report", "-o", tmp_path / "r.html", "-d", tmp_path / "cache", "--json")
    first, *_ = json.loads(done.stdout)["curves"]
    table = dict(zip(first["bounds"], first["miss_ratios"], strict=True))
    # everything fits, so that only the first reads are misses
    assert table[2_000_000] < table[250_000] <= 1
    assert f"{table[2_000_000]:.0%} with 2 MB (now)" in said


def test_one_sample_in_a_pipe(cache: Path) -> None:
    for words in (("top",), ("top", "--once")):
        done = run_command(*words, "--seconds", "0.2", "-d", cache)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split()[:2] == ["source", "reads/s"]
        assert "\x1b" not in done.stdout
    assert json.loads(run_command("top", "--seconds", "0.2", "-d", cache, "--json").stdout)["state"] == "ok"
    none = run_command("top", "-d", cache / "none")
    assert none.returncode == 0
    assert "there is no cache" in none.stdout
    bad = run_command("top", "--seconds", "-1", "-d", cache)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)


def test_metrics_are_served_on_this_machine_until_interrupted(cache: Path) -> None:
    # where the tests run in the background of a shell, the signal would be ignored
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command("serve-metrics", "--port", "0", "-d", cache), stdout=subprocess.PIPE, text=True, preexec_fn=heed
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            fetch = build_opener(ProxyHandler({})).open
            with fetch(url, timeout=60) as answer:
                text = answer.read().decode()
            assert 'xzcache_source_hits_total{node="' in text
            assert 'source="era5"} 20\n' in text
            port = url.rpartition(":")[2].partition("/")[0]
            taken = run_command("serve-metrics", "--port", port, "-d", cache)
            assert (taken.returncode, taken.stderr.count("\n")) == (1, 1)
            assert port in taken.stderr
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert run_command("serve-metrics", "--port", "65536", "-d", cache).returncode == 2


def test_hits_are_listed(cache: Path) -> None:
    lines = run_command("ls", "-d", cache).stdout.splitlines()
    assert lines[0].split()[-3:] == ["hits", "hit", "rate"]
    assert lines[1].split()[-2:] == ["20", "50%"]
    info = json.loads(run_command("info", "-d", cache, "--json").stdout)
    assert info["ever"]["hits"] == info["last_day"]["hits"] == 20
    assert info["ever"]["hit_rate"] == 0.5


@pytest.mark.parametrize("words", [["info"], ["ls"], ["top", "--once", "--seconds", "0.1"], ["report"]])
@pytest.mark.parametrize("damage", ["damaged", "foreign", "absent"])
def test_trouble_is_one_line(cache: Path, words: list[str], damage: str, tmp_path: Path) -> None:
    meta = cache / ".xzcache"
    if damage == "damaged":
        (index,) = meta.glob("index-*.db")
        index.write_bytes(b"garbage" * 1000)
    elif damage == "foreign":
        (meta / "format").write_text("99")
    else:
        cache = tmp_path / "nothing"
    output = ["-o", str(tmp_path / "r.html")] if words == ["report"] else []
    done = run_command(*words, *output, "-d", cache)
    assert done.returncode == (0 if damage == "absent" else 1)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


def read_and_write(link: Connection, source: str, cache: str, number: int) -> int:
    store = opened(source, cache, max_size=100 * SIZE, read_only=False)
    value = PROTOTYPE.buffer.from_bytes(b"x" * SIZE)
    barrier(link)
    times = 0
    while not link.poll():
        read(store, 150)
        sync(store.set(f"b/c/{number}", value))
        times += 1
    return times


@pytest.mark.slow
def test_every_command_while_others_read_and_write(tmp_path: Path) -> None:
    source, cache = make(tmp_path / "s", 150), tmp_path / "cache"
    with Team() as team:
        for number in range(4):
            team.start(read_and_write, str(source), str(cache), number)
        team.go()
        for words in (
            ["info"],
            ["ls"],
            ["ls", "s"],
            ["top", "--once", "--seconds", "0.5"],
            ["report", "-o", tmp_path / "r.html"],
            ["info", "--json"],
            ["pin", "s"],
            ["pin"],
            ["unpin", "--all"],
            ["clear", "--older-than", "1h", "--yes"],
            ["check"],
            ["clear", "s", "--yes"],
            ["resize", "90kB", "--yes"],
            ["config"],
        ):
            done = run_command(*words, "-d", cache)
            # a full cache is more than pins may take, and this bound is small
            code, lines = {("pin", "s"): (2, 1), ("resize", "90kB", "--yes"): (0, 1)}.get(tuple(words), (0, 0))
            assert (done.returncode, done.stderr.count("\n")) == (code, lines), (words, done)
        for child in team:
            child.send("enough")
        times = team.results()
    assert min(times) > 0
    ever = xzcache.info(cache).ever
    assert ever.reads == sum(times) * 150
    assert ever.evictions > 0
    assert xzcache.check(cache).ok


def processor_time(words: list[str], cache: Path) -> float:
    """Seconds that a command takes, at best."""
    taken = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(command(*words, "-d", cache), capture_output=True, check=False)
        after = os.times()
        assert done.returncode == 0
        taken.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(taken)


@pytest.mark.slow
def test_a_million_entries_cost_a_command_little(tmp_path: Path) -> None:
    source, cache = make(tmp_path / "s"), tmp_path / "cache"
    for _ in range(2):
        read(opened(source, cache))
    xzcache.cleanup_resources()
    commands = ["info"], ["ls"]
    # most of it is the start of Python; a loop over all entries would take many times as long
    few = [processor_time(words, cache) for words in commands]
    with opened_index(str(cache)) as index:
        index.execute("BEGIN")
        (ns,) = index.execute("SELECT id FROM ns").fetchone()
        rows = ((ns, f"s/m/c/{n}", n % 2**32, n, n) for n in range(1_000_000))
        index.executemany(
            "INSERT INTO entry(ns, key, start, stop, odd, size, crc, used, rank, owner, seq) "
            "VALUES(?, ?, 0, -1, 0, 10, ?, ?, ?, 0, 0)",
            rows,
        )
        index.execute("COMMIT")
    many = [processor_time(words, cache) for words in commands]
    assert all(more < 4 * less for less, more in zip(few, many, strict=True)), (few, many)


# -- in a browser


@needs_browser
@pytest.mark.parametrize("sources", [0, 1, 30])
def test_the_report_in_a_browser(tmp_path: Path, sources: int) -> None:
    cache = tmp_path / "cache"
    for number in range(sources):
        source = make(tmp_path / f"a-dataset-with-quite-a-long-name-{number}", 3)
        for _ in range(2):
            read(opened(source, cache), 3)
    xzcache.report(tmp_path / "r.html", cache)
    with browser(tmp_path) as window:
        for width in (480, 1200):
            window._do("/window/rect", {"width": width, "height": 900})
            window.visit((tmp_path / "r.html").as_uri())
            wide, page = window.run("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide <= page
            assert bool(window.run("return document.querySelectorAll('svg rect').length")) == (sources > 0)
            # nothing is drawn outside of its frame
            assert window.run(
                "return [...document.querySelectorAll('.plot i')].every(dot => {"
                " const at = dot.getBoundingClientRect(), plot = dot.parentNode.getBoundingClientRect();"
                " return at.left >= plot.left - 8 && at.right <= plot.right + 8 && at.bottom <= plot.bottom + 8; })"
            )
        assert window.complaints() == []
        resources = window.run("return performance.getEntriesByType('resource').length")
        assert resources == 0
