"""Real processes for the tests: started, stopped and killed on cue; sources that count outside of them; the audit.

Most processes come from a fork server that has imported the package and done nothing with it, so that hundreds of them
can be killed in a minute; ``method="spawn"`` starts an interpreter from scratch.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import io
import multiprocessing
import os
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from hashlib import blake2b
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import xzcache
from xzcache.directory._fetchlocks import FetchLocks
from xzcache.files._paths import relative_path
from xzcache.model.entry import META, Entry
from xzcache.model.spans import Span

os.environ.setdefault("XZCACHE_MIN_FREE", "0")
PRELOADED = ["pytest", "xzcache", "google_crc32c", "zarr", "xarray", "obstore.store", "s3fs", "aiohttp"]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

PATIENCE = 60.0
"""Seconds after which something that should have happened long ago is taken for a failure."""


T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Wait for something that nothing announces; returns it. What takes long is looked at less and less often."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(pause)
        pause = min(1.3 * pause, 0.25)
    return found


# -- processes


class Failed(NamedTuple):
    trace: str


class Done(NamedTuple):
    value: Any


def _main(
    link: Connection, settings: dict[str, Any], target: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    xzcache.config.set({"min_free": 0, **settings})
    try:
        outcome: Done | Failed = Done(target(link, *args, **named))
    except BaseException:
        outcome = Failed(traceback.format_exc())
    if multiprocessing.get_start_method(allow_none=True) != "spawn":
        # a child of a fork server does not run what was registered for the exit before it was forked
        xzcache.cleanup_resources()
    with suppress(OSError):
        link.send(outcome)


class Child:
    """A process that runs `target(link, *args, **named)`, where `link` is its end of a pipe."""

    def __init__(
        self,
        target: Callable[..., Any],
        *args: Any,
        method: str = "forkserver",
        settings: dict[str, Any] | None = None,
        **named: Any,
    ) -> None:
        context: Any = multiprocessing.get_context(method)
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, settings or {}, target, args, named), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, message: Any) -> None:
        self.link.send(message)

    def hear(self, expected: Any = None) -> Any:
        """The next message; the child's own exception, if that is what comes."""
        assert self.link.poll(PATIENCE), f"process {self.pid} says nothing"
        try:
            message = self.link.recv()
        except EOFError:
            raise AssertionError(f"process {self.pid} ended with {self.exit_code()}, expected {expected!r}") from None
        if isinstance(message, Failed):
            raise AssertionError(f"in process {self.pid}:\n{message.trace}")
        assert expected is None or message == expected, message
        return message

    def result(self) -> Any:
        """What the target returned, past whatever else it has to say; the process is gone by then."""
        while not isinstance(message := self.hear(), Done):
            pass
        assert self.exit_code() == 0
        return message.value

    def exit_code(self) -> int:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        assert code is not None, f"process {self.pid} does not end"
        return code

    def kill(self) -> int:
        """SIGKILL; the monotonic time of it, in ns."""
        at = time.monotonic_ns()
        os.kill(self.pid, signal.SIGKILL)
        self.exit_code()
        return at

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def clean_up(self) -> None:
        if self.process.is_alive():
            with suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
                self.signal(signal.SIGKILL)
        self.process.join(PATIENCE)
        self.link.close()


class Team(list[Child]):
    """Children that do not outlive the test."""

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self:
            child.clean_up()

    def start(self, target: Callable[..., Any], *args: Any, **options: Any) -> Child:
        self.append(Child(target, *args, **options))
        return self[-1]

    def dismiss(self, child: Child) -> None:
        self.remove(child)
        child.clean_up()

    def go(self) -> None:
        """Let all of them past their barrier at once."""
        for child in self:
            child.hear("ready")
        for child in self:
            child.send("go")

    def results(self) -> list[Any]:
        return [child.result() for child in self]


def barrier(link: Connection) -> None:
    """In a child: wait until `Team.go`."""
    link.send("ready")
    assert link.recv() == "go"


def tell_when_waiting(link: Connection) -> None:
    """In a child: send "waiting" once for each entry, or object of which bytes are wanted, that another process has."""
    acquire = FetchLocks.acquire
    told = set()

    def watched(self: FetchLocks, key: str, span: Span, **options: bool) -> Any:
        if isinstance(answer := acquire(self, key, span, **options), tuple) and key not in told:
            told.add(key)
            link.send("waiting")
        return answer

    # so that a race can be an event
    FetchLocks.acquire = watched  # type: ignore[method-assign]


def run(target: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run one process to its end."""
    with Team() as team:
        return team.start(target, *args, **options).result()


@contextmanager
def traced(child: Child, log: Path | str, *options: str) -> Iterator[None]:
    """Have strace meddle with a process."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-o", log, "-p", str(child.pid), *options], stderr=subprocess.PIPE, text=True
    )
    try:
        assert tracer.stderr is not None
        if "attached" not in (said := tracer.stderr.readline()):
            pytest.skip(f"strace may not trace here: {said}")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        try:
            tracer.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            # it waits in vain for a process that was killed while it was held up
            tracer.kill()
            tracer.communicate()


def run_program(text: str, *arguments: object) -> tuple[str, str]:
    """Run the text of a program in a process of its own, to its end: what it wrote to its standard streams."""
    return run(execute, text, [str(argument) for argument in arguments])


def execute(link: Connection, text: str, arguments: list[str]) -> tuple[str, str]:
    """In a child: run the text of a program; what it wrote."""
    sys.argv[1:] = arguments
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        exec(compile(text, "<program>", "exec"), {"__name__": "__main__"})
        # while what is said is still heard
        xzcache.cleanup_resources()
    return out.getvalue(), err.getvalue()


class Ended(NamedTuple):
    """A command that has run to its end."""

    returncode: int
    stdout: str
    stderr: str


def run_command(*words: object) -> Ended:
    """Run the command ``xzcache`` in a process of its own, which has imported the package already, as in a pipe."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = run(_command, [str(word) for word in words], DupFd(out.fileno()), DupFd(err.fileno()))
        for file in (out, err):
            file.seek(0)
        return Ended(code, out.read(), err.read())


def _command(link: Connection, words: list[str], out: Any, err: Any) -> int:
    from xzcache.cli import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.detach(), 1)
    os.dup2(err.detach(), 2)
    # that of the tests' own process
    xzcache.config.refresh()
    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        xzcache.cleanup_resources()
        sys.stdout.flush()
        sys.stderr.flush()


# -- sources


class Request(NamedTuple):
    """One request that a source was sent."""

    pid: int
    at: int
    """Monotonic time, in ns."""
    key: str

    @property
    def is_chunk(self) -> bool:
        return not self.key.endswith(("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata"))

    @classmethod
    def parse(cls, line: str) -> Request:
        pid, at, key = line.split(" ", 2)
        return cls(int(pid), int(at), key)


class Source(WrapperStore[LocalStore]):
    """Objects in a directory. Each request is one line in `log`, whichever process sent it.

    Where there is a `gate`, requests of chunks wait there.
    """

    def __init__(self, store: LocalStore, log: str, gate: str = "") -> None:
        super().__init__(store)
        self.log = log
        self.gate = gate

    def _with_store(self, store: LocalStore) -> Source:
        return type(self)(store, self.log, self.gate)

    def _note(self, key: str) -> None:
        line = f"{os.getpid()} {time.monotonic_ns()} {key}\n".encode()
        _append(self.log, line)
        if self.gate and Request.parse(line.decode().rstrip()).is_chunk:
            _append(_arrivals(self.gate), line)

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Buffer | None:
        self._note(key)
        if self.gate and Request(0, 0, key).is_chunk:
            await asyncio.to_thread(_pass, self.gate)
        return await super().get(key, *args, **kwargs)

    def get_ranges(self, key: str, *args: Any, **kwargs: Any) -> Any:
        # each request by itself
        return Store.get_ranges(self, key, *args, **kwargs)

    async def exists(self, key: str) -> bool:
        self._note(key)
        return await super().exists(key)

    async def getsize(self, key: str) -> int:
        self._note(key)
        return await super().getsize(key)

    def list_dir(self, prefix: str) -> Any:
        self._note(prefix)
        return super().list_dir(prefix)


class Far(Source):
    """As `Source`, but a chunk takes as long as from a server that is far away."""

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Buffer | None:
        if Request(0, 0, key).is_chunk:
            await asyncio.sleep(1.0)
        return await super().get(key, *args, **kwargs)


def _append(path: str, line: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)


def _arrivals(gate: str) -> str:
    return gate + ".arrivals"


def _pass(gate: str) -> None:
    with open(gate) as file:
        fcntl.flock(file, fcntl.LOCK_SH)


class Gate:
    """Holds requests up: a file lock that the test holds and whoever wants to pass waits for."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._file = open(path, "w")
        self.shut()
        os.mkfifo(_arrivals(self.path))
        self._arrivals = os.open(_arrivals(self.path), os.O_RDWR | os.O_NONBLOCK)
        self._waiting = b""

    def shut(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def arrival(self, timeout: float = PATIENCE) -> Request:
        """The next request of a chunk that reached the source."""
        while b"\n" not in self._waiting:
            poll = select.poll()
            poll.register(self._arrivals, select.POLLIN)
            assert poll.poll(1000 * timeout), "no request reached the source"
            self._waiting += os.read(self._arrivals, 4096)
        line, _, self._waiting = self._waiting.partition(b"\n")
        return Request.parse(line.decode())

    def close(self) -> None:
        self._file.close()
        os.close(self._arrivals)


class Dataset:
    """A Zarr array of `side` times `side` chunks in a source that counts, and a place for a cache."""

    def __init__(self, path: Path, *, side: int = 8, chunk: int = 32, gate: Gate | None = None) -> None:
        self.root = str(path / "cache")
        self.log = str(path / "requests")
        self.gate = gate.path if gate is not None else ""
        self.place = str(path / "source")
        self.chunks = side * side
        self.chunk_bytes = chunk * chunk * 8
        self.values = np.arange(float((side * chunk) ** 2)).reshape(side * chunk, -1)
        array = zarr.create_array(
            LocalStore(self.place), shape=self.values.shape, chunks=(chunk, chunk), dtype="f8", compressors=None
        )
        array[:] = self.values

    def store(self, **options: Any) -> xzcache.CacheStore:
        """In any process: the same source through the same cache."""
        source = Source(LocalStore(self.place, read_only=True), self.log, self.gate)
        return xzcache.CacheStore(source, cache_store=self.root, **options)

    def array(self, **options: Any) -> Any:
        # where no format is given, Zarr asks for the documents of the other as well
        return zarr.open_array(self.store(**options), mode="r", zarr_format=3)

    def read(self, **options: Any) -> None:
        """Read all of it, and check it."""
        np.testing.assert_array_equal(self.array(**options)[:], self.values)

    def requests(self) -> list[Request]:
        with suppress(FileNotFoundError), open(self.log) as file:
            return [Request.parse(line.rstrip("\n")) for line in file]
        return []

    def chunk_requests(self) -> Counter[str]:
        return Counter(request.key for request in self.requests() if request.is_chunk)

    def forget_requests(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.log)

    def keys(self) -> list[str]:
        side = int(self.chunks**0.5)
        return [f"c/{i}/{j}" for i in range(side) for j in range(side)]


# -- values that show whose they are


def made(key: str, version: int, size: int) -> bytes:
    """A value of `size` bytes that no other key or version has in any part longer than its first 8 bytes."""
    pattern = blake2b(f"{key} {version} {size}".encode(), digest_size=56).digest()
    body = pattern * ((size - 8) // len(pattern) + 1)
    return version.to_bytes(8, "little") + body[: size - 8]


def version_of(key: str, data: bytes, size: int) -> int:
    """The version of a value or of the beginning of one, which is checked to the last byte."""
    version = int.from_bytes(data[:8], "little")
    assert data == made(key, version, size)[: len(data)], f"wrong bytes for {key}: {len(data)} of {size}"
    return version


class Made(WrapperStore[MemoryStore]):
    """A source that makes its values up: `sizes` of keys."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__(MemoryStore())
        self.sizes = sizes

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        data = made(key, 0, self.sizes[key])
        if byte_range is not None:
            assert isinstance(byte_range, RangeByteRequest)
            data = data[byte_range.start : byte_range.end]
        return default_buffer_prototype().buffer.from_bytes(data)

    def get_ranges(self, key: str, *args: Any, **kwargs: Any) -> Any:
        return Store.get_ranges(self, key, *args, **kwargs)


# -- the disk


_FILES_OF_OURS = re.compile(
    r"guard\.lock|lock|writes|(format|node|max_size)(\.new)?|index-(\d+)\.db(-journal)?"
    r"|tmp|trash|odd|ranges|made|written"
)
_PLACES = ("tmp", "trash", "odd", "ranges")


def walk(directory: str, *, skip: str = "") -> Iterator[os.DirEntry[str]]:
    """All files beneath a directory that may be changing."""
    stack = [directory]
    while stack:
        try:
            with os.scandir(stack.pop()) as found:
                for item in found:
                    if item.is_dir(follow_symlinks=False):
                        if item.name != skip:
                            stack.append(item.path)
                    else:
                        yield item
        except FileNotFoundError:
            continue


def stored(root: str) -> Iterator[os.DirEntry[str]]:
    """All files that count against the bound: entries, files in flight, and files on their way out."""
    yield from walk(root, skip=META)
    for place in _PLACES:
        yield from walk(f"{root}/{META}/{place}")


class Usage(NamedTuple):
    size: int
    """Bytes of all files that count."""
    in_flight: int
    """How many of them have not got their name yet."""


def usage(root: str) -> Usage:
    """What is on the disk now. A file that was renamed during the walk counts once."""
    sizes: dict[tuple[int, int], int] = {}
    in_flight = 0
    for item in stored(root):
        with suppress(FileNotFoundError):
            status = item.stat(follow_symlinks=False)
            sizes[status.st_dev, status.st_ino] = status.st_size
            in_flight += f"{META}/tmp" in item.path
    return Usage(sum(sizes.values()), in_flight)


@contextmanager
def frozen(children: list[Child]) -> Iterator[None]:
    """Stop processes wherever they are, so that a walk sees one instant and not a blend of several."""
    try:
        for child in children:
            with suppress(ProcessLookupError):
                child.signal(signal.SIGSTOP)
        # a thread that runs on another processor goes on for a moment
        deadline = time.monotonic() + PATIENCE
        while not all(map(_is_stopped, children)):
            assert time.monotonic() < deadline
        yield
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                child.signal(signal.SIGCONT)


def _is_stopped(child: Child) -> bool:
    """Whether no thread of a process runs, as far as the platform tells."""
    for task in Path(f"/proc/{child.pid}/task").glob("*/stat"):
        with suppress(OSError):
            if task.read_text().rpartition(")")[2].split()[0] not in "TtZX":
                return False
    return True


# -- the audit


def _is_free(path: str) -> bool:
    """Whether nobody holds any lock on a file."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if hasattr(fcntl, "F_OFD_SETLK"):
                whole = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, whole)
            else:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def index_path(root: str) -> str:
    """The index that is current, by the first bytes of the guard's file."""
    with open(f"{root}/{META}/lock", "rb") as file:
        return f"{root}/{META}/index-{int.from_bytes(file.read(8), 'little')}.db"


@contextmanager
def opened_index(root: str) -> Iterator[sqlite3.Connection]:
    """The index by SQLite's own means, under the guard."""
    with open(f"{root}/{META}/lock", "r+b") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        with closing(sqlite3.connect(f"file:{index_path(root)}?mode=rw", uri=True)) as connection:
            yield connection


def _becomes_free(path: str) -> bool:
    """Whether no process keeps a lock; a neighbour may hold it for a moment, as it tells its last uses."""
    if _is_free(path):
        return True
    # a store of this process that only the garbage collector finds is still in use
    gc.collect()
    with suppress(AssertionError):
        return until(lambda: _is_free(path), 10)
    return False


def findings(root: str) -> list[str]:
    """What is wrong with a directory that no process uses."""
    meta = f"{root}/{META}"
    found = [f"{name} is locked" for name in ("lock", "writes") if not _becomes_free(f"{meta}/{name}")]
    with opened_index(root) as index:

        def one(query: str) -> Any:
            (row,) = index.execute(query)
            return row[0] if len(row) == 1 else row

        if (answer := one("PRAGMA integrity_check")) != "ok":
            found.append(f"the index: {answer}")
        rows = index.execute("SELECT key, start, stop, odd, size, crc FROM entry").fetchall()
        total = one("SELECT n, bytes, lease, dying FROM total")
        bound = one("SELECT max_size FROM total")
        sums = (len(rows), sum(row[4] for row in rows), 0, 0)
        if total != sums:
            found.append(f"totals (entries, bytes, lease, dying) are {total}, the rows say {sums}")
        for table in ("owner", "dying", "writing"):
            if left := index.execute(f"SELECT * FROM {table}").fetchall():
                found.append(f"{table} rows are left: {left}")
        shares = one("SELECT coalesce(sum(n), 0), coalesce(sum(bytes), 0) FROM ns")
        if shares != total[:2]:
            found.append(f"the shares of the sources are {shares} in all, of {total[:2]}")
        current = os.path.basename(index_path(root))
    if bound is not None and total[1] > bound:
        found.append(f"{total[1]} bytes are more than the bound of {bound}")
    expected = {f"{root}/{relative_path(Entry(*row[:3]), hashed=bool(row[3]))}": row for row in rows}
    there = {item.path: item.stat().st_size for item in stored(root)}
    found += [f"a file without a row: {path}, {size} bytes" for path, size in there.items() if path not in expected]
    for path, row in expected.items():
        if path not in there:
            found.append(f"a row without a file: {path}")
        elif there[path] != row[4] or _crc(path) != row[5]:
            found.append(f"a file that is not what its row says: {path}")
    for place in ("tmp", "trash"):
        found += [f"left in {place}: {name}" for name in os.listdir(f"{meta}/{place}")]
    for name in os.listdir(meta):
        match = _FILES_OF_OURS.fullmatch(name)
        if match is None or (name.startswith("index-") and not name.startswith(current)):
            found.append(f"litter: {name}")
    return found


def _crc(path: str) -> int:
    with open(path, "rb") as file:
        return int(google_crc32c.value(file.read()))


def audit(root: str) -> int:
    """The closing check of a test, once every process has left; returns the number of entries."""
    found = findings(root)
    assert not found, "\n".join(found)
    # by the package's own audit, too, which has to agree
    store = xzcache.LockedLocalStore(root)
    report = store.check()
    store.directory.close()
    assert report.ok, str(report)
    with opened_index(root) as index:
        return int(index.execute("SELECT n FROM total").fetchone()[0])


def visit(root: str) -> None:
    """Let a new process use a directory and leave: what it finds of dead ones, it has to clean up."""
    run(_visit, root)


def _visit(link: Connection, root: str) -> None:
    assert xzcache.LockedLocalStore(root).directory.prepare()
