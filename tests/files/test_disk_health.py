"""A disk that fails or hangs puts the cache aside: reads cost what the source costs, and nothing is stale afterwards.

strace makes the system calls of a process on the cache directory fail, or take seconds; the source is elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import zarr
from processes import PATIENCE, Child
from zarr.core import codec_pipeline
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore

import xzcache

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("strace") is None, reason="strace makes the disk fail")]

KEYS = [f"a/c/{number}" for number in range(12)]
PROTOTYPE = default_buffer_prototype()
CALLS = (
    "openat,newfstatat,fstat,statx,lstat,stat,access,faccessat2,readlink,pread64,preadv,preadv2,read,pwrite64,write,"
    "getxattr,lgetxattr,fgetxattr,fsetxattr,getdents64,mkdir,rmdir,unlink,unlinkat,rename,renameat,renameat2,fsync,"
    "fdatasync,utimensat,statfs,fallocate,ftruncate"
)
"""What a process does with a file or a directory, but locking and closing."""


def value(key: str, version: int) -> bytes:
    return f"{key} {version} ".encode() * 300


def store_over(root: Path, **settings: Any) -> xzcache.CacheStore:
    settings = {"revalidate": False, "namespace": "n", **settings}
    return xzcache.CacheStore(LocalStore(root / "source"), cache_store=str(root / "cache"), **settings)


def serve(link: Connection, root: Path, **settings: Any) -> None:
    """Read and write on demand; tell what came of it, and how long each read took."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(f"{record.levelname}: {record.getMessage()}")

    logger = logging.getLogger("xzcache")
    logger.addHandler(Listener())
    logger.setLevel(logging.INFO)
    store = store_over(root, **settings)

    async def read(keys: list[str]) -> list[tuple[int, float]]:
        seen = []
        for key in keys:
            began = time.monotonic()
            got = await store.get(key, PROTOTYPE)
            took = time.monotonic() - began
            versions = [v for v in range(99) if got is not None and got.to_bytes() == value(key, v)]
            seen.append((versions[0] if versions else -1, took))
        return seen

    async def write(key: str, version: int) -> None:
        await store.set(key, cpu.Buffer.from_bytes(value(key, version)))

    async def main() -> None:
        link.send("ready")
        while (message := await asyncio.to_thread(link.recv)) is not None:
            match message:
                case "read", keys:
                    link.send(await read(keys))
                case "write", key, version:
                    await write(key, version)
                    link.send("written")
                case ("stats",):
                    link.send((store.cache_stats()["hits"], list(told)))

    asyncio.run(main())


def serve_array(link: Connection, root: Path, **settings: Any) -> None:
    """Read an array whole on demand, with Zarr's synchronous pipeline; tell its values, and how long it took."""
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}):
        array: Any = zarr.open_array(store_over(root, **settings), path="a", mode="r")
    link.send("ready")
    while link.recv() is not None:
        began = time.monotonic()
        values = array[:].tolist()
        link.send((values, time.monotonic() - began))


class Worker:
    def __init__(self, root: Path, serve: Callable[..., None] = serve, **settings: Any) -> None:
        self.child = Child(serve, root, **settings)
        self.child.hear("ready")

    def read(self, *keys: str) -> list[tuple[int, float]]:
        self.child.send(("read", list(keys)))
        return list(self.child.hear())

    def write(self, key: str, version: int) -> None:
        self.child.send(("write", key, version))
        self.child.hear("written")

    def stats(self) -> tuple[int, list[str]]:
        self.child.send(("stats",))
        hits, told = self.child.hear()
        return hits, told

    def leave(self) -> None:
        self.child.send(None)
        self.child.result()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for key in KEYS:
        path = tmp_path / "source" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value(key, 0))
    return tmp_path


def paths_of(root: Path) -> list[str]:
    """All that is in the cache directory, and what may come."""
    cache = root / "cache"
    found = {cache, *cache.rglob("*"), *(cache / "n" / key for key in KEYS)}
    for index in cache.glob(".xzcache/index-*.db"):
        found.add(Path(f"{index}-journal"))
    found |= {cache / f".xzcache/tmp/{owner}/{n}" for owner in range(1, 5) for n in range(1, 40)}
    found |= {cache / f".xzcache/trash/{n}" for n in range(1, 20)}
    return sorted(map(str, found))


@contextmanager
def failing(worker: Worker, root: Path, how: str, calls: str = CALLS) -> Iterator[Path]:
    """Have the calls of a process on the cache directory fail; yields the log of those calls."""
    log = root / "strace"
    paths = [option for path in paths_of(root) for option in ("-P", path)]
    known = [call for call in calls.split(",") if _knows(call)]
    options = ["-e", f"trace={','.join(known)}", "-e", f"inject={','.join(known)}:{how}"]
    command = ["strace", "-f", "-y", "-tt", "-o", str(log), *paths, *options, "-p", str(worker.child.pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        for line in tracer.stderr:
            if "attached" in line:
                break
        else:
            pytest.skip("strace may not trace here")
        yield log
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()


_known: dict[str, bool] = {}


def _knows(call: str) -> bool:
    """Whether this platform has a system call."""
    if call not in _known:
        tried = subprocess.run(["strace", "-e", f"trace={call}", "true"], capture_output=True, check=False)
        _known[call] = tried.returncode == 0
    return _known[call]


def calls_in(log: Path, *, but: str = "") -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if "resumed" not in line and not (but and line.startswith(but))]


def until_hits(worker: Worker, key: str) -> None:
    """Read until the cache answers again."""
    end = time.monotonic() + PATIENCE
    before = worker.stats()[0]
    while time.monotonic() < end:
        worker.read(key)
        if (now := worker.stats()[0]) > before:
            return
        before = now
        time.sleep(0.05)
    raise AssertionError("the cache does not come back")


def test_errors_put_the_cache_aside_until_a_probe_succeeds(root: Path) -> None:
    worker = Worker(root)
    worker.read(*KEYS)
    worker.stats()
    with failing(worker, root, "error=EIO") as log:
        assert all(version == 0 for version, _ in worker.read(*KEYS, *KEYS))
        before = len(calls_in(log))
        assert before > 0
        told = worker.stats()[1]
        assert len([line for line in told if "put aside" in line and line.startswith("WARNING")]) == 1
        began = time.monotonic()
        for _ in range(20):
            assert all(version == 0 for version, _ in worker.read(*KEYS))
        took = time.monotonic() - began
        # each probe begins with one call that fails, and a thread or two may still be at theirs; reads make hundreds
        assert len(calls_in(log)) - before <= 10 + took
    until_hits(worker, KEYS[0])
    hits, told = worker.stats()
    assert all(version == 0 for version, _ in worker.read(*KEYS))
    assert worker.stats()[0] > hits
    assert [line for line in told if line.startswith("INFO") and "used again" in line]
    worker.leave()
    assert xzcache.LockedLocalStore(root / "cache").check().ok


def test_a_disk_that_hangs_costs_reads_a_second_at_most_after_the_first_few(root: Path) -> None:
    worker = Worker(root)
    worker.read(*KEYS)
    worker.stats()
    with failing(worker, root, "delay_enter=2s"):
        # the first one waits for all its calls
        first = worker.read(KEYS[0], KEYS[1])
        rest = worker.read(*KEYS * 5)
        assert all(version == 0 for version, _ in first + rest)
        # one or another may have to wait for a processor
        assert sorted(seconds for _, seconds in rest)[len(rest) * 9 // 10] < 1.5
    until_hits(worker, KEYS[0])
    assert any("put aside" in line for line in worker.stats()[1])
    worker.leave()


@pytest.mark.skipif(not hasattr(codec_pipeline, "FusedCodecPipeline"), reason="this Zarr has no such pipeline")
def test_a_disk_that_hangs_is_looked_at_for_one_chunk_and_not_for_all(root: Path) -> None:
    """By the event loop, before a batch of chunks is read synchronously."""
    expected = list(range(12 * 64))
    zarr.create_array(LocalStore(root / "source"), name="a", shape=12 * 64, chunks=64, dtype="i4")[:] = expected
    worker = Worker(root, serve_array)

    def read() -> float:
        worker.child.send("read")
        values, took = worker.child.hear()
        assert values == expected
        return float(took)

    for _ in range(3):
        read()
    with failing(worker, root, "delay_enter=2s", "newfstatat,statx,stat"):
        assert read() < 12
        assert read() < 5
    worker.leave()


def test_a_publisher_that_hangs_costs_reads_a_second_at_most(root: Path) -> None:
    """Nothing is cached yet: what hangs is done by threads."""
    worker = Worker(root)
    worker.read(KEYS[0])
    worker.stats()
    with failing(worker, root, "delay_enter=5s", "pwrite64,write,fsetxattr,rename,renameat,renameat2"):
        seen = worker.read(*KEYS)
        assert all(version == 0 for version, _ in seen)
        assert max(seconds for _, seconds in seen) < 4.5
        assert sum(seconds for _, seconds in seen) < 10
    until_hits(worker, KEYS[0])
    worker.leave()
    assert xzcache.LockedLocalStore(root / "cache").check().ok


@pytest.mark.parametrize(("how", "calls"), [("error=EIO", CALLS), ("delay_enter=1200ms", "preadv2")])
def test_what_is_written_while_the_cache_is_aside_is_not_stale_afterwards(root: Path, how: str, calls: str) -> None:
    worker, other = Worker(root, cache_set_data=False), Worker(root)
    for each in (worker, other):
        each.read(*KEYS)
        each.stats()
    with failing(worker, root, how, calls):
        worker.read(*KEYS, *KEYS)
        for key in KEYS[:3]:
            worker.write(key, 1)
            assert worker.read(key)[0][0] == 1
    until_hits(worker, KEYS[5])
    for each in (worker, other, fresh := Worker(root)):
        assert [version for version, _ in each.read(*KEYS[:4])] == [1, 1, 1, 0]
    for each in (worker, other, fresh):
        each.leave()
    assert xzcache.LockedLocalStore(root / "cache").check().ok


def test_a_disk_that_flaps_is_tried_more_and_more_rarely(root: Path) -> None:
    worker = Worker(root)
    worker.read(*KEYS)
    for version in range(1, 4):
        with failing(worker, root, "error=EIO"):
            assert all(seen == version - 1 for seen, _ in worker.read(*KEYS, *KEYS))
            worker.write(KEYS[0], version)
            assert worker.read(KEYS[0])[0][0] == version
            (root / "source" / KEYS[0]).write_bytes(value(KEYS[0], version))
        until_hits(worker, KEYS[1])
        assert worker.read(KEYS[0])[0][0] == version
        for key in KEYS[1:]:
            worker.write(key, version)
    waits = [float(m[1]) for line in worker.stats()[1] if (m := re.search(r"after ([\d.]+) s and", line))]
    assert len(waits) == 3
    assert waits == sorted(waits)
    worker.leave()
    assert xzcache.LockedLocalStore(root / "cache").check().ok
