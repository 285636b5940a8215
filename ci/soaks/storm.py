"""Lets processes do everything at once to one cache directory, kills and stops them at random, and checks every byte.

Readers, writers and deleters of several processes share a cache whose bound changes, over a source that fails, stalls
and is rewritten, with clocks that jump, on a disk that fills and empties, while entry files and the index are damaged.
An oracle knows for each object which versions a read may return. From time to time all processes are stopped, and the
files are measured. At the end a new process reads everything, and the audit looks for what was left behind.

    ci/soak storm                        two minutes
    ci/soak storm --seconds 3600         an hour
    ci/soak storm --seed 7               the same choices again (not the same timing)
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from _scenarios import entry_bytes
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.storage import LocalStore, WrapperStore

import xzcache

PROTOTYPE = default_buffer_prototype()
BLOCK = 64
WRITTEN = 24
"""Objects that are written and deleted through the cache: what was written before a read began must be seen."""
REWRITTEN = 8
"""Objects that are rewritten at the source: a read through a store that revalidates each use must see it."""
COUNTS = ("reads", "parts", "writes", "deletes", "source errors", "again", "forks", "wrong", "failed")
SETTINGS = {"lock_timeout": 1.0, "fetch_timeout": 2.0, "min_free": 0, "missing_max_age_seconds": 5}


def key_of(number: int) -> str:
    return f"{'w' if number < WRITTEN else 'r'}{number % 3}/c/{number}"


def size_of(number: int) -> int:
    """Bytes of an object: from 512 bytes to 96 KiB."""
    return BLOCK * (8 << (number * 5 % 8)) + BLOCK * (number % 7)


def is_deletion(number: int, version: int) -> bool:
    """Some versions of what is written are that it is not there."""
    return number < WRITTEN and version % 5 == 4


def value_of(number: int, version: int) -> bytes:
    """A version of an object: each block of 64 bytes says which object and version it is of, and where it lies."""
    size = size_of(number)
    head = f"{number} {version} ".encode()
    return b"".join(blake2b(head + str(at).encode(), digest_size=BLOCK).digest() for at in range(0, size, BLOCK))


class SourceDown(Exception):
    """What the source raises while it fails."""


class Board:
    """What all processes see: versions, counts and orders, in a file that they map.

    Parameters
    ----------
    path : Path
    processes : int
    """

    def __init__(self, path: Path, processes: int) -> None:
        total = WRITTEN + REWRITTEN
        fields = 2 * total + 4 + processes * len(COUNTS)
        if not path.exists():
            path.write_bytes(bytes(8 * fields))
        raw = np.memmap(path, dtype=np.int64, mode="r+")
        self.floor = raw[:total]
        """The version that was surely written before now."""
        self.ceiling = raw[total : 2 * total]
        """The newest version that anyone has begun to write."""
        self.orders = raw[2 * total : 2 * total + 4]
        """Stop, the source's mood (0 well, 1 failing, 2 stalling), the offset of clocks in s, the bound in bytes."""
        self.counts = raw[2 * total + 4 :].reshape(processes, len(COUNTS))


class Source(WrapperStore[LocalStore]):
    """A directory that fails and stalls on order."""

    def __init__(self, store: LocalStore, board: Board) -> None:
        super().__init__(store)
        self.board = board

    def _with_store(self, store: LocalStore) -> Source:
        return type(self)(store, self.board)

    async def _pass(self) -> None:
        mood = int(self.board.orders[1])
        if mood == 1:
            raise SourceDown("the source is down")
        if mood == 2:
            await asyncio.sleep(0.2)

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Buffer | None:
        await self._pass()
        return await super().get(key, *args, **kwargs)

    def get_ranges(self, key: str, *args: Any, **kwargs: Any) -> Any:
        return Store.get_ranges(self, key, *args, **kwargs)

    async def set(self, key: str, value: Buffer) -> None:
        await self._pass()
        await super().set(key, value)

    async def delete(self, key: str) -> None:
        await self._pass()
        await super().delete(key)


# -- one process


class Worker:
    """What one process of the storm does until it is told to stop, or killed."""

    def __init__(self, place: Path, slot: int, processes: int, seed: int) -> None:
        self.place = place
        self.board = Board(place / "board", processes)
        self.slot = slot
        self.chance = random.Random(seed)
        self.log = place / "wrong"

    def count(self, what: str) -> None:
        self.board.counts[self.slot, COUNTS.index(what)] += 1

    def complain(self, kind: str, text: str) -> None:
        self.count(kind)
        with open(self.log, "a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} process {os.getpid()}: {kind}: {text}\n")

    def source(self) -> Store:
        """A source that tells the states of its objects, or one that does not, but fails and stalls."""
        store = LocalStore(self.place / "source")
        return store if self.chance.random() < 0.3 else Source(store, self.board)

    def open_store(self) -> xzcache.CacheStore:
        """A store with settings drawn at random."""
        return xzcache.CacheStore(
            self.source(),
            cache_store=os.fspath(self.place / "disk" / "cache"),
            namespace="storm",
            max_size=int(self.board.orders[3]),
            policy=self.chance.choice(["lru", "lru", "adaptive", "none"]),
            max_age_seconds=self.chance.choice(["infinity", 3, 1000]),
            cache_set_data=self.chance.random() < 0.7,
            missing_max_age_seconds=self.chance.choice([0, 5, "infinity"]),
        )

    async def run(self) -> None:
        board = self.board
        while not board.orders[0]:
            store = self.open_store()
            strict = xzcache.CacheStore(
                self.source(),
                cache_store=os.fspath(self.place / "disk" / "cache"),
                namespace="storm",
                revalidate=True,
            )
            tasks = [self.task(store, strict) for _ in range(4)]
            await asyncio.gather(*tasks)
            if self.chance.random() < 0.1:
                await store.clear_cache()
            if self.chance.random() < 0.3:
                self.fork()
            store.close()

    async def task(self, store: xzcache.CacheStore, strict: xzcache.CacheStore) -> None:
        for _ in range(self.chance.randrange(10, 60)):
            if self.board.orders[0]:
                return
            number = self.chance.randrange(WRITTEN + REWRITTEN)
            try:
                if number >= WRITTEN:
                    await self.read(strict, number)
                elif self.chance.random() < 0.2:
                    await self.write(store, number)
                else:
                    await self.read(store, number)
            except Exception as error:
                self.take(error, number)

    def take(self, error: Exception, number: int) -> None:
        """Count an exception that the source or its change is the cause of; complain of any other."""
        if isinstance(error, ExceptionGroup):
            for inner in error.exceptions:
                self.take(inner, number)
        elif isinstance(error, SourceDown):
            self.count("source errors")
        elif isinstance(error, OSError) and error.errno == errno.ESTALE:
            # parts of an object that was replaced meanwhile: to be read again
            self.count("again")
        else:
            self.complain("failed", f"{key_of(number)}: {''.join(traceback.format_exception(error))}")

    async def read(self, store: xzcache.CacheStore, number: int) -> None:
        key, floor = key_of(number), int(self.board.floor[number])
        kind = self.chance.randrange(4)
        size = size_of(number)
        start = self.chance.randrange(size // 2)
        if kind == 0:
            stop = start + self.chance.randrange(1, size // 2)
            got = await store.get(key, PROTOTYPE, RangeByteRequest(start, stop))
            self.judge(number, floor, [(start, stop, got)])
        elif kind == 1:
            got = await store.get(key, PROTOTYPE, SuffixByteRequest(BLOCK))
            self.judge(number, floor, [(size - BLOCK, size, got)])
        elif kind == 2 and number >= WRITTEN:
            parts = [RangeByteRequest(at, at + size // 8) for at in range(0, size, size // 4)]
            found: list[tuple[int, int, Buffer | None]] = []
            async for group in store.get_ranges(key, parts, prototype=PROTOTYPE):
                found += [(parts[n].start, parts[n].end, part) for n, part in group]
            self.judge(number, floor, found)
            self.count("parts")
        else:
            self.judge(number, floor, [(0, size, await store.get(key, PROTOTYPE))])
        self.count("reads")

    def judge(self, number: int, floor: int, parts: Sequence[tuple[int, int, Buffer | None]]) -> None:
        """Complain unless each part is of a version that a read may see."""
        versions = range(floor, int(self.board.ceiling[number]) + 1)
        for part in parts:
            if not any(self.agrees(number, version, part) for version in versions):
                start, stop, got = part
                seen = "nothing" if got is None else f"{len(got)} bytes"
                older = [version for version in range(floor) if self.agrees(number, version, part)]
                text = f"stale, of version {older[-1]}" if older else "of no version"
                self.complain("wrong", f"{key_of(number)} {start}-{stop}: {seen}, {text}; right: {versions}")

    @staticmethod
    def agrees(number: int, version: int, part: tuple[int, int, Buffer | None]) -> bool:
        start, stop, got = part
        if is_deletion(number, version):
            return got is None
        return got is not None and got.to_bytes() == value_of(number, version)[start:stop]

    async def write(self, store: xzcache.CacheStore, number: int) -> None:
        """Write or delete an object through the cache, unless another process is just doing so."""
        with open(self.place / "locks" / str(number), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            version = int(self.board.ceiling[number]) + 1
            self.board.ceiling[number] = version
            if is_deletion(number, version):
                await store.delete(key_of(number))
                self.count("deletes")
            else:
                await store.set(key_of(number), cpu.Buffer.from_bytes(value_of(number, version)))
                self.count("writes")
            self.board.floor[number] = version

    def fork(self) -> None:
        """Let a forked child read on with what it inherited."""
        self.count("forks")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                worker = Worker(self.place, self.slot, len(self.board.counts), self.chance.randrange(1 << 30))

                async def read_some() -> None:
                    store = worker.open_store()
                    for number in range(0, WRITTEN, 3):
                        with suppress(SourceDown):
                            await worker.read(store, number)
                    store.close()

                # a loop of its own: the parent's is running in another process now
                asyncio.set_event_loop(None)
                asyncio._set_running_loop(None)
                asyncio.run(read_some())
                xzcache.cleanup_resources()
                code = 0
            except BaseException:
                worker.complain("failed", f"after a fork: {traceback.format_exc()}")
            finally:
                os._exit(code)
        os.waitpid(pid, 0)


def shift_clocks(board: Board) -> None:
    """Have this process see the time that the board orders."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + float(board.orders[2])
    time.time_ns = lambda: real_ns() + int(board.orders[2]) * 1_000_000_000


# -- the storm


class Storm:
    """The process that starts, stops, kills, damages and measures."""

    def __init__(self, place: Path, seed: int, options: argparse.Namespace) -> None:
        self.place = place
        self.chance = random.Random(seed)
        self.processes = processes = options.processes
        self.bound = options.bound
        self.kills, self.stops, self.snapshots = options.kills, options.stops, options.snapshots
        self.steady = options.steady
        self.board = Board(place / "board", processes)
        self.pids: dict[int, int] = {}
        self.stopped: dict[int, float] = {}
        self.done = {"kills": 0, "stops": 0, "damaged": 0, "snapshots": 0, "filled": 0, "exceeded": 0}
        self.rewrites = 0
        self.largest = 0
        self.spoiled: set[str] = set()
        """Paths below the cache directory that were damaged here."""

    def start(self, slot: int) -> None:
        seed = self.chance.randrange(1 << 30)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                xzcache.config.set(SETTINGS)
                worker = Worker(self.place, slot, self.processes, seed)
                shift_clocks(worker.board)
                asyncio.run(worker.run())
                xzcache.cleanup_resources()
                code = 0
            except BaseException:
                worker.complain("failed", traceback.format_exc())
            finally:
                os._exit(code)
        self.pids[slot] = pid

    def weather(self, seconds: float) -> None:
        """Let it rage for so long."""
        for slot in range(self.processes):
            self.start(slot)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
            self.reap()
            now = time.monotonic()
            for pid in [pid for pid, until in self.stopped.items() if until < now]:
                del self.stopped[pid]
                self.signal(pid, signal.SIGCONT)
            if self.chance.random() < self.kills * 0.05:
                self.kill(self.chance.choice(list(self.pids)))
            if self.chance.random() < self.stops * 0.05:
                self.stop(self.chance.choice(list(self.pids.values())))
            if self.chance.random() < self.snapshots * 0.05:
                self.snapshot()
            if self.chance.random() < 0.2:
                self.rewrite()
            if self.chance.random() < 0.03:
                self.change_orders()
            if self.chance.random() < 0.1:
                self.damage()
            if self.chance.random() < 0.01:
                self.fill_disk()

    def reap(self) -> None:
        for slot, pid in list(self.pids.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.stopped.pop(pid, None)
                self.start(slot)

    @staticmethod
    def signal(pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self, slot: int) -> None:
        pid = self.pids[slot]
        self.signal(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.stopped.pop(pid, None)
        self.done["kills"] += 1
        self.start(slot)

    def stop(self, pid: int) -> None:
        if pid not in self.stopped:
            self.signal(pid, signal.SIGSTOP)
            self.stopped[pid] = time.monotonic() + self.chance.choice([0.05, 0.3, 1.5, 4.0])
            self.done["stops"] += 1

    @contextmanager
    def still(self) -> Iterator[None]:
        """Stop every process, wherever it is, its forked children included."""
        family = [pid for slot in self.pids.values() for pid in (slot, *_children(slot))]
        try:
            for pid in family:
                self.signal(pid, signal.SIGSTOP)
            for pid in family:
                _until_stopped(pid)
            yield
        finally:
            for pid in family:
                if pid not in self.stopped:
                    self.signal(pid, signal.SIGCONT)

    def snapshot(self) -> None:
        """Measure all files that count against the bound, in one instant."""
        with self.still():
            size = entry_bytes(self.place / "disk" / "cache")
        self.done["snapshots"] += 1
        self.largest = max(self.largest, size)
        # the bound changes between this and half of it; what was lowered takes a while
        if size > self.bound:
            self.done["exceeded"] += 1

    def rewrite(self) -> None:
        """Replace an object at the source, behind the cache's back."""
        number = WRITTEN + self.chance.randrange(REWRITTEN)
        version = int(self.board.ceiling[number]) + 1
        self.board.ceiling[number] = version
        path = self.place / "source" / key_of(number)
        new = path.with_name("new")
        new.write_bytes(value_of(number, version))
        os.replace(new, path)
        self.board.floor[number] = version
        self.rewrites += 1

    def change_orders(self) -> None:
        self.board.orders[1] = self.chance.choice([0, 0, 0, 0, 1, 2])
        self.board.orders[2] = self.chance.choice([0, 0, 100_000, -100_000, 5])
        if not self.steady:
            self.board.orders[3] = self.chance.choice([self.bound, self.bound, self.bound // 2])

    def damage(self) -> None:
        """Damage a file: the index in its place, an entry by a copy that takes its place, or is simply gone.

        An entry is not changed in place: between a reader's look at a file and its read, no cache could notice.
        """
        cache = self.place / "disk" / "cache"
        index = list(cache.glob(".xzcache/index-*.db"))
        entries = [path for path in cache.rglob("*") if path.is_file() and ".xzcache" not in path.parts]
        entries += cache.glob(".xzcache/ranges/*/*/*")
        with suppress(OSError):
            if index and self.chance.random() < 0.2:
                self.spoiled.add("index")
                with open(index[0], "r+b") as file:
                    size = file.seek(0, os.SEEK_END)
                    if self.chance.random() < 0.5:
                        file.truncate(size // 2)
                    else:
                        file.seek(self.chance.randrange(size + 1))
                        file.write(bytes(100))
            elif entries:
                path = self.chance.choice(entries)
                self.spoiled.add(str(path.relative_to(cache)))
                if self.chance.random() < 0.2:
                    path.unlink()
                else:
                    self._replace_by_damaged(path)
            self.done["damaged"] += 1

    def _replace_by_damaged(self, path: Path) -> None:
        copy = path.with_name(".damaged")
        shutil.copy2(path, copy)
        data = bytearray(copy.read_bytes())
        if data and self.chance.random() < 0.5:
            data[self.chance.randrange(len(data))] ^= 0x55
        else:
            data = data[: len(data) // 2]
        copy.write_bytes(data)
        os.replace(copy, path)

    def fill_disk(self) -> None:
        """Leave no byte free for a moment."""
        path = self.place / "disk" / "filler"
        if not (self.place / "disk").is_mount():
            return
        with suppress(OSError), open(path, "wb") as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(0.3)
        path.unlink(missing_ok=True)
        self.done["filled"] += 1

    def calm(self) -> None:
        """End all processes as they would end by themselves."""
        self.board.orders[0] = 1
        self.board.orders[1] = self.board.orders[2] = 0
        for pid in self.stopped:
            self.signal(pid, signal.SIGCONT)
        end = time.monotonic() + 60
        for pid in self.pids.values():
            while not os.waitpid(pid, os.WNOHANG)[0]:
                if time.monotonic() > end:
                    raise SystemExit(f"process {pid} does not end")
                time.sleep(0.01)


def _children(pid: int) -> list[int]:
    found = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(word) for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


def _until_stopped(pid: int) -> None:
    with suppress(OSError):
        while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "TtZX":
            time.sleep(0.0005)


@contextmanager
def disk(place: Path, size: int) -> Iterator[bool]:
    """A small file system of its own for the cache, where this user may mount one; whether it is one."""
    image, point = place / "image", place / "disk"
    point.mkdir()
    made = False
    if os.geteuid() == 0 and shutil.which("mkfs.ext4"):
        with open(image, "wb") as file:
            file.truncate(size)
        made = (
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], capture_output=True, check=False).returncode == 0
            and subprocess.run(["mount", "-o", "loop", image, point], capture_output=True, check=False).returncode == 0
        )
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "-l", point], check=False)


def aftermath(place: Path, spoiled: set[str], result: int) -> None:
    """As a new process: read everything, compare it with the source, audit the directory; writes down what is wrong.

    Damage that the storm did, and that no reader has come upon since, is for the audit to find and to repair.
    """
    xzcache.config.set(SETTINGS)
    wrong: list[str] = []

    async def read() -> None:
        for revalidate in ("open", True):
            store = xzcache.CacheStore(
                LocalStore(place / "source"),
                cache_store=os.fspath(place / "disk" / "cache"),
                namespace="storm",
                revalidate=revalidate,
            )
            for number in range(WRITTEN if revalidate == "open" else WRITTEN + REWRITTEN):
                path = place / "source" / key_of(number)
                want = path.read_bytes() if path.exists() else None
                got = await store.get(key_of(number), PROTOTYPE)
                if (None if got is None else got.to_bytes()) != want:
                    wrong.append(f"in the end {key_of(number)} is not what the source has")
            store.close()

    asyncio.run(read())
    store = xzcache.LockedLocalStore(place / "disk" / "cache")
    report = store.check()
    kinds = {finding.kind for finding in report.findings}
    is_index = "index" in spoiled and "index" in kinds
    known = [f for f in report.findings if f.kind in ("damaged", "missing") and f.where in spoiled]
    if is_index or known:
        # what follows from a damaged index cannot be told from other faults
        wrong.extend(map(str, [] if is_index else [f for f in report.findings if f not in known]))
        store.check(repair=True)
        asyncio.run(read())
        report = store.check()
    wrong.extend(map(str, report.findings))
    counted = report.size
    if (size := entry_bytes(place / "disk" / "cache")) != counted:
        wrong.append(f"the files take {size} bytes, {counted} are counted")
    xzcache.cleanup_resources()
    os.write(result, "\n".join(wrong).encode())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/soak storm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--bound", type=int, default=300_000, help="bytes; at times it is half of that")
    parser.add_argument("--kills", type=float, default=3, help="SIGKILLs a second")
    parser.add_argument("--stops", type=float, default=1.5, help="SIGSTOPs a second")
    parser.add_argument("--snapshots", type=float, default=2, help="measurements of the disk a second")
    parser.add_argument("--steady", action="store_true", help="the bound does not change, and nobody clears the cache")
    return parser.parse_args()


def main() -> int:
    options = parse()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        place = Path(folder).resolve()
        (place / "locks").mkdir()
        for number in range(WRITTEN + REWRITTEN):
            path = place / "source" / key_of(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value_of(number, 0))
        with disk(place, 24 << 20) as mounted:
            storm = Storm(place, seed, options)
            storm.board.orders[3] = options.bound
            try:
                storm.weather(options.seconds)
                storm.calm()
            finally:
                for pid in storm.pids.values():
                    storm.signal(pid, signal.SIGKILL)
            reader, writer = os.pipe()
            if (pid := os.fork()) == 0:
                try:
                    aftermath(place, storm.spoiled, writer)
                except BaseException:
                    os.write(writer, traceback.format_exc().encode())
                finally:
                    os._exit(0)
            os.close(writer)
            with open(reader, "rb") as file:
                left = file.read().decode()
            os.waitpid(pid, 0)
        counts = dict(zip(COUNTS, map(int, storm.board.counts.sum(axis=0)), strict=True))
        if (place / "wrong").exists():
            print((place / "wrong").read_text()[:20_000])
    print(*(f"{name} {count}" for name, count in (counts | storm.done).items()), sep=", ")
    print(f"rewritten at the source {storm.rewrites}; a disk of its own: {'yes' if mounted else 'no'}")
    print(f"most bytes on disk {storm.largest} of {options.bound}")
    print(f"left behind: {left or 'nothing'}")
    return 1 if counts["wrong"] or counts["failed"] or storm.done["exceeded"] or left else 0


if __name__ == "__main__":
    sys.exit(main())
