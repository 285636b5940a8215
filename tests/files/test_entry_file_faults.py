"""Each system call on the file of an entry fails, in each way of reading: the read is served all the same.

The kernel's answers are replaced by strace, so that what fails is the call itself, whoever makes it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from processes import Team, barrier, execute, traced

pytestmark = pytest.mark.slow

PACKAGE = Path(__file__).parents[2]

READER = """
import asyncio, gc, json, logging, os, sys

import numpy as np
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype

import xzcache

folder, rounds = sys.argv[1], int(sys.argv[2])
told = []

class Listener(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())

logging.getLogger("xzcache").addHandler(Listener())
pipelined = hasattr(xzcache, "pipeline")
if pipelined:
    zarr.config.set({"codec_pipeline.path": "xzcache.pipeline.CachePipeline"})

def open_store(**settings):
    source = zarr.storage.LocalStore(folder + "/source", read_only=True)
    settings = {"namespace": "n", "revalidate": False, **settings}
    return xzcache.CacheStore(source, cache_store=folder + "/cache", **settings)

def content(key):
    with open(f"{folder}/source/{key}", "rb") as file:
        return file.read()

store, local = open_store(), xzcache.LockedLocalStore(folder + "/cache")
wrong, open_files = [], []

async def read():
    # small ones are read on the event loop, large ones in threads
    for key in ("small/c/0", "large/c/0"):
        for _ in range(2):
            value = await store.get(key, default_buffer_prototype())
            if value is None or value.to_bytes() != content(key):
                wrong.append(key)
        # what has no source may be missing, and must not be anything else
        value = local.get_sync("n/" + key)
        if value is not None and value.to_bytes() != content(key):
            wrong.append("local " + key)
    for _ in range(2):
        value = await store.get("pieces/c/0", default_buffer_prototype(), RangeByteRequest(10, 500))
        if value.to_bytes() != content("pieces/c/0")[10:500]:
            wrong.append("range")

for _ in range(rounds):
    asyncio.run(read())
    # as they lie in memory, straight into the result; and through codecs
    for name in ("raw", "packed"):
        array = zarr.open_array(store, path=name, mode="r")
        for _ in range(2):
            if not (array[:] == np.arange(6000).reshape(2, 3000)).all():
                wrong.append(name)
    aged = open_store(max_age_seconds=1e6)
    if zarr.open_array(aged, path="packed", mode="r")[:].sum() != np.arange(6000).sum():
        wrong.append("aged")
    store.cache_info()
    gc.collect()
    open_files.append(len(os.listdir("/proc/self/fd")))

print(json.dumps({"wrong": wrong, "told": told, "files": open_files, **store.cache_stats()}))
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and a cache that holds all of it that is read."""
    import numpy as np
    import zarr

    folder = tmp_path_factory.mktemp("filled")
    for name, codecs in (("raw", None), ("packed", "auto")):
        array: Any = zarr.create_array(
            str(folder / "source" / name), shape=(2, 3000), chunks=(1, 3000), dtype="i4", compressors=codecs
        )
        array[:] = np.arange(6000).reshape(2, 3000)
    for name, size in (("small", 1000), ("large", 3 << 20), ("pieces", 4000)):
        path = folder / "source" / name / "c" / "0"
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(size))
    first = reading(folder, 1)
    assert first["misses"] > 0
    again = reading(folder, 1)
    assert (again["misses"], again["cache_errors"]) == (0, 0)
    return folder


def reading(folder: Path, rounds: int, *strace: str) -> dict[str, Any]:
    with Team() as team:
        child = team.start(_reading, str(folder), rounds)
        child.hear("ready")
        with traced(child, os.devnull, *strace) if strace else nullcontext():
            child.send("go")
            found: dict[str, Any] = json.loads(child.result())
    return found


def _reading(link: Connection, folder: str, rounds: int) -> str:
    barrier(link)
    return execute(link, READER, [folder, str(rounds)])[0]


def entries(folder: Path) -> list[Path]:
    """The files of entries, and the folders of byte ranges."""
    ranges = folder / "cache" / ".xzcache" / "ranges"
    found = [*(folder / "cache" / "n").rglob("*"), *ranges.rglob("*"), ranges]
    return [path for path in found if path.is_file() or ranges in path.parents]


def _can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    attempt = ["strace", "-qq", "-o", os.devnull, "-e", "inject=getppid:error=EIO", "true"]
    return subprocess.run(attempt, capture_output=True, check=False).returncode == 0


needs_strace = pytest.mark.skipif(not _can_trace(), reason="system calls are made to fail by strace")

FAULTS = [
    *(("openat", code) for code in ("EIO", "EACCES", "EMFILE", "ENFILE", "ESTALE", "ENOMEM", "EOVERFLOW", "ENOTCONN")),
    *(("newfstatat,fstat", code) for code in ("EIO", "ESTALE", "EOVERFLOW")),
    *(("fgetxattr", code) for code in ("EIO", "EACCES", "ESTALE")),
    *(("preadv2,preadv,pread64", code) for code in ("EIO", "ESTALE", "ENOMEM")),
    *(("close", code) for code in ("EIO", "EINTR", "ENOSPC")),
    *(("getdents64", code) for code in ("EIO", "ENOTCONN")),
]


@needs_strace
@pytest.mark.parametrize(
    ("calls", "code", "when"),
    [*((*fault, "1+") for fault in FAULTS), *((*fault, "2+3") for fault in FAULTS if fault[1] == "EIO")],
)
def test_a_call_on_an_entry_file_fails(filled: Path, tmp_path: Path, calls: str, code: str, when: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(filled, folder, symlinks=True)
    paths = [word for path in entries(folder) for word in ("-P", str(path))]
    found = reading(folder, 3, *paths, "-e", f"trace={calls}", "-e", f"inject={calls}:error={code}:when={when}")
    assert found["wrong"] == []
    if calls != "getdents64":
        assert found["cache_errors"] > 0
    # once for each kind, however many reads there were; on a busy machine the cache may be put aside a second time
    told = [line for line in found["told"] if " is put aside" not in line]
    assert len(told) == len(set(told)) <= 3, found["told"]
    assert bool(found["told"]) == bool(found["cache_errors"])
    if calls != "close":
        # a descriptor whose closing strace keeps from the kernel stays open
        assert found["files"][-1] <= found["files"][0] + 1


@needs_strace
@pytest.mark.parametrize("code", ["EIO", "ESTALE", "EOPNOTSUPP"])
def test_a_file_system_that_knows_no_flag_and_fails(filled: Path, tmp_path: Path, code: str) -> None:
    """Where it cannot be said that a read must not block, the next way to read may fail as well."""
    folder = tmp_path / "copy"
    shutil.copytree(filled, folder, symlinks=True)
    # the documents of the copied source are other files than those that were cached, so they are fetched anew
    assert reading(folder, 1)["wrong"] == []
    paths = [word for path in entries(folder) for word in ("-P", str(path))]
    calls = "preadv2,pread64"
    without = ("-e", f"trace={calls}", "-e", "inject=preadv2:error=EOPNOTSUPP")
    found = reading(folder, 2, *paths, *without)
    assert (found["wrong"], found["misses"], found["cache_errors"]) == ([], 0, 0)
    found = reading(folder, 3, *paths, *without, "-e", f"inject=pread64:error={code}")
    assert found["wrong"] == []
    assert found["cache_errors"] > 0
    assert found["files"][-1] <= found["files"][0] + 1


@needs_strace
def test_a_hit_takes_four_calls(filled: Path, tmp_path: Path) -> None:
    """Open, fstat, read, close: whose file it is costs nothing."""
    folder = tmp_path / "copy"
    shutil.copytree(filled, folder, symlinks=True)
    code = (
        "import asyncio, sys, zarr, xzcache\n"
        "from zarr.core.buffer import default_buffer_prototype as p\n"
        "s = xzcache.CacheStore(zarr.storage.LocalStore(sys.argv[1] + '/source', read_only=True),\n"
        "    cache_store=sys.argv[1] + '/cache', namespace='n', revalidate=False)\n"
        "async def main():\n"
        "    for _ in range(int(sys.argv[2])):\n"
        "        await s.get('small/c/0', p())\n"
        "asyncio.run(main())\n"
    )
    (folder / "hit.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "XZCACHE_MIN_FREE": "0"}

    def calls(hits: int) -> int:
        log = folder / f"log-{hits}"
        only = ["strace", "-f", "-qq", "-o", str(log), "-P", str(folder / "cache" / "n" / "small" / "c" / "0")]
        line = [*only, sys.executable, str(folder / "hit.py"), str(folder), str(hits)]
        subprocess.run(line, env=environment, check=True, timeout=120)
        return len([text for text in log.read_text().splitlines() if "(" in text])

    assert calls(30) - calls(10) == 20 * 4
