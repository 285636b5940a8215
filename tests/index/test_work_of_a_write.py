"""The work of a miss and of a write beside their source: transactions, and what is read more than once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import xzcache

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="system calls of Linux"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace counts system calls"),
]

TIMES: Final = 20
SCRIPT: Final = """
import asyncio, os, sys
import xzcache
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

prototype, times = default_buffer_prototype(), range(int(sys.argv[2]))
value = prototype.buffer.from_bytes(b"x" * 100)
source = LocalStore(sys.argv[1] + "/source")


async def main():
    store = xzcache.CacheStore(source, cache_store=sys.argv[1] + "/cache", namespace="n", revalidate=False)
    await store.set("a/c/0", value)
    for number in times:
        await source.set(f"a/d/{number}/0", value)

    async def each(name, work):
        os.path.exists("/begin-" + name)
        for number in times:
            await work(number)
        os.path.exists("/end")

    await each("miss", lambda number: store.get(f"a/d/{number}/0", prototype))
    await each("set", lambda number: store.set(f"a/c/{number}", value))
    await each("overwrite", lambda number: store.set(f"a/c/{number}", value))
    await each("delete", lambda number: store.delete(f"a/c/{number}"))
    await each("delete_dir", lambda number: store.delete_dir(f"a/d/{number}"))
    memory = MemoryStore({f"a/c/{number}": value for number in range(len(times) + 1)})
    store = xzcache.CacheStore(memory, cache_store=sys.argv[1] + "/cache", namespace="m", revalidate=False)
    await store.get(f"a/c/{len(times)}", prototype)
    os.path.exists("/begin-together")
    await asyncio.gather(*(store.get(f"a/c/{number}", prototype) for number in times))
    os.path.exists("/end")

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The system calls of each work, which is done some times."""
    path = tmp_path_factory.mktemp("work")
    log = path / "log"
    line = ["strace", "-f", "-y", "-qq", "-o", str(log), sys.executable, "-c", SCRIPT, str(path), str(TIMES)]
    environment = {**os.environ, "PYTHONPATH": str(Path(xzcache.__file__).parents[1])}
    subprocess.run(line, env=environment, check=True, timeout=300)
    found: dict[str, list[str]] = {}
    name = ""
    for text in log.read_text().splitlines():
        if '"/begin-' in text:
            name = text.partition('"/begin-')[2].partition('"')[0]
        elif '"/end"' in text:
            name = ""
        elif name:
            found.setdefault(name, []).append(text)
    return found


def count(lines: list[str], *parts: str) -> float:
    """How often there is a call with all these parts, for each work."""
    return sum(all(part in line for part in parts) for line in lines) / TIMES


@pytest.mark.parametrize(
    ("work", "most"), [("miss", 1), ("set", 2), ("overwrite", 2), ("delete", 2), ("delete_dir", 2)]
)
def test_few_transactions_are_made(calls: dict[str, list[str]], work: str, most: int) -> None:
    guarded = count(calls[work], "flock(", "/.xzcache/lock>", "LOCK_EX", " = 0")
    # a recovery is another one, once a second; a call that is interrupted by another thread's is not found
    assert abs(guarded - most) < 0.7
    # a commit ends the journal
    assert count(calls[work], "pwrite64(", ".db-journal>", ", 28, 0)") <= most + 0.7


def test_misses_at_once_are_stored_together(calls: dict[str, list[str]]) -> None:
    # a commit ends the journal; a recovery, which may be due, changes nothing. On a busy machine, the first to arrive
    # may be stored before the others are here, and some of these before the last
    assert 1 <= round(count(calls["together"], "pwrite64(", ".db-journal>", ", 28, 0)") * TIMES) <= TIMES / 5


def test_an_object_that_is_not_cached_is_looked_for_few_times(calls: dict[str, list[str]]) -> None:
    looks = sum("/ranges/" in line and "ENOENT" in line for line in calls["miss"]) / TIMES
    assert looks <= 1.2


def test_few_counters_of_writes_are_read(calls: dict[str, list[str]]) -> None:
    # eight counters concern a key: one read stands for all of them, for each question
    assert 3 <= count(calls["miss"], "pread64(", "/.xzcache/writes>") < 7.5


@pytest.mark.parametrize(("work", "most"), [("miss", 1), ("set", 2), ("overwrite", 2), ("delete", 2)])
def test_a_transaction_looks_for_a_journal_once(calls: dict[str, list[str]], work: str, most: int) -> None:
    # a query after the commit would be one more transaction
    assert 0 < count(calls[work], "openat(", ".db-journal", "O_RDONLY") < most + 0.7
