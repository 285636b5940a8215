"""The power goes while a source is written through the cache: no process of the next boot serves what was before.

The source is elsewhere, so it has the write. Of the cache directory there is what was synced, by strace's account, over
what was on the disk before. Another boot is another boot id, in a mount namespace.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, until

PACKAGE = Path(__file__).parents[2]
BOOT_ID = "/proc/sys/kernel/random/boot_id"

PROGRAM = """
import asyncio, os, signal, sys
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore
import xzcache

xzcache.config.set({"min_free": 0, "lock_timeout": 0.5})
folder, cache, *steps = sys.argv[1:]
store = xzcache.CacheStore(LocalStore(folder + "/source"), cache_store=cache, namespace="n", revalidate=False)

async def main():
    for step in steps:
        what, _, rest = step.partition(":")
        if what == "get":
            got = await store.get(rest, default_buffer_prototype())
            print(rest, None if got is None else got.to_bytes().decode())
        elif what == "set":
            key, _, text = rest.partition("=")
            await store.set(key, cpu.Buffer.from_bytes(text.encode()))
        elif what == "delete":
            await store.delete(rest)
        elif what == "delete_dir":
            await store.delete_dir(rest)
        elif what == "clear":
            await store.clear_cache()
        elif what == "hits":
            print("hits", store.cache_stats()["hits"])
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
store.cache_info()
"""


def another_boot(folder: Path, number: int = 1) -> list[str]:
    """What runs a command in another boot."""
    fake = folder / f"boot-{number}"
    fake.write_text(f"00000000-0000-0000-0000-{number:012}\n")
    return ["unshare", "--mount", "sh", "-c", f'mount --bind "{fake}" {BOOT_ID} && exec "$@"', "sh"]


def _can_boot() -> bool:
    if shutil.which("unshare") is None or shutil.which("strace") is None or not os.path.exists(BOOT_ID):
        return False
    command = ["unshare", "--mount", "sh", "-c", f"mount --bind /dev/null {BOOT_ID}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _can_boot(), reason="mount namespaces and strace show another boot"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for key in ("a/c/0", "a/c/1", "b/c/0"):
        path = tmp_path / "source" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    return tmp_path


def perform(folder: Path, *steps: str, prefix: Any = (), cache: str = "cache", dies: bool = False) -> list[str]:
    """Have a process do something with the source and the cache; what it prints."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PROGRAM, str(folder), str(folder / cache), *steps],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert dies or done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def lose_power(folder: Path, *steps: str) -> None:
    """Do something, and lose the power before the cache directory is synced by itself."""
    before = folder / "before"
    shutil.copytree(folder / "cache", before, symlinks=True)
    log = folder / "fsync"
    trace = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "trace=fsync,fdatasync,syncfs"]
    perform(folder, *steps, "die", prefix=trace, dies=True)
    for path in re.findall(r"fsync\(\d+<([^>]*)>", log.read_text()):
        if os.path.isfile(path):
            target = before / Path(path).relative_to(folder / "cache")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    shutil.rmtree(folder / "cache")
    before.rename(folder / "cache")


def fill(folder: Path) -> None:
    perform(folder, "get:a/c/0", "get:a/c/1", "get:b/c/0")


WRITES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "set": (("set:a/c/0=new",), ["a/c/0 new", "a/c/1 old"]),
    "delete": (("delete:a/c/0",), ["a/c/0 None", "a/c/1 old"]),
    "delete_dir": (("delete_dir:a",), ["a/c/0 None", "a/c/1 None"]),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_when_the_power_went_is_not_stale(folder: Path, write: str) -> None:
    fill(folder)
    steps, expected = WRITES[write]
    lose_power(folder, *steps)
    # a second process, too: the first one's repair lasts
    for number in range(1, 3):
        assert perform(folder, "get:a/c/0", "get:a/c/1", prefix=another_boot(folder, number)) == expected


def test_what_was_cleared_when_the_power_went_stays_cleared(folder: Path) -> None:
    fill(folder)
    (folder / "source/a/c/0").write_text("new")
    lose_power(folder, "clear")
    assert perform(folder, "get:a/c/0", prefix=another_boot(folder)) == ["a/c/0 new"]


def test_nobody_serves_by_path_before_the_loss_of_power_was_seen_to(folder: Path) -> None:
    """The first process of the boot cannot use the index, so it cannot drop anything."""
    fill(folder)
    lose_power(folder, "set:a/c/0=new")
    (index,) = (folder / "cache").glob(".xzcache/index-*.db")
    with closing(sqlite3.connect(index, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        assert perform(folder, "get:a/c/0", "get:a/c/0", prefix=another_boot(folder)) == ["a/c/0 new"] * 2
    assert perform(folder, "get:a/c/0", prefix=another_boot(folder)) == ["a/c/0 new"]


def hits_of(folder: Path, number: int) -> list[str]:
    return perform(folder, "get:a/c/1", "get:b/c/0", "hits", prefix=another_boot(folder, number))


def test_a_writer_that_ended_well_costs_the_next_boot_nothing(folder: Path) -> None:
    fill(folder)
    perform(folder, "set:a/c/0=new", "get:a/c/0")
    assert hits_of(folder, 1) == ["a/c/1 old", "b/c/0 old", "hits 2"]


def test_a_writer_that_was_killed_costs_the_next_boot_nothing_once_another_process_came(folder: Path) -> None:
    fill(folder)
    perform(folder, "set:a/c/0=new", "die", dies=True)
    # what makes it safe waits for the disk, so it is done aside
    notes = folder / "cache/.xzcache/written"
    until(lambda: perform(folder, "get:a/c/0") == ["a/c/0 new"] and not any(notes.iterdir()))
    assert hits_of(folder, 1) == ["a/c/1 old", "b/c/0 old", "hits 2"]


def test_a_clean_start_of_the_machine_keeps_what_is_cached(folder: Path) -> None:
    fill(folder)
    assert hits_of(folder, 1) == ["a/c/1 old", "b/c/0 old", "hits 2"]
    assert hits_of(folder, 2) == ["a/c/1 old", "b/c/0 old", "hits 2"]
