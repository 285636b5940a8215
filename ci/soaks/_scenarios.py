"""What the soaks let processes do with a cache: scripted work whose every byte is checked against the source.

A scenario runs in a process of its own, over a source directory and a cache directory. It returns what it saw go wrong;
an empty list is the only good answer.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore

import xzcache

SIZE = 4096
KEYS = [f"a/c/{number}" for number in range(8)]
OTHERS = [f"b/c/{number}" for number in range(24)]
TAKEN = "a/taken"
"""A key at whose place in the cache directory the user keeps something, so that its entry lies under a hash."""
BOUND = 14 * SIZE + SIZE // 4
"""Room for fewer entries than a scenario reads, and for what processes lease in advance, but not for one more."""
NAMESPACE = "soak"

PROTOTYPE = default_buffer_prototype()


def value_of(key: str, version: int) -> bytes:
    """The bytes of a version of an object: no part of them is in another version or object."""
    block = blake2b(f"{key} {version}".encode(), digest_size=64).digest()
    return block * (SIZE // len(block))


def make_source(place: Path) -> None:
    """Write the objects that the scenarios read."""
    for key in [*KEYS, *OTHERS, TAKEN]:
        path = place / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value_of(key, 0))


def make_users_file(cache: Path) -> Path:
    """Put a file of the user's where the entry of `TAKEN` would lie; no process may touch it."""
    path = cache / NAMESPACE / TAKEN / "notes"
    path.parent.mkdir(parents=True)
    path.write_text("the user's own")
    return path


def truth(place: Path, key: str) -> bytes | None:
    """What the source holds, by the file itself."""
    with suppress(FileNotFoundError):
        return (place / key).read_bytes()
    return None


class Work:
    """A store over a source, and what went wrong with it.

    Parameters
    ----------
    source, cache : Path
    max_age_seconds : float or "infinity"
        As for `CacheStore`.
    """

    def __init__(self, source: Path, cache: Path, max_age_seconds: float | Literal["infinity"] = "infinity") -> None:
        self.source = source
        self.store = xzcache.CacheStore(
            LocalStore(source),
            cache_store=os.fspath(cache),
            namespace=NAMESPACE,
            max_size=BOUND,
            max_age_seconds=max_age_seconds,
        )
        self.wrong: list[str] = []

    async def read(self, *keys: str) -> None:
        """Read whole objects at once, and compare them with the source."""
        for key, got in zip(keys, await asyncio.gather(*(self._get(key) for key in keys)), strict=True):
            self._compare(key, got, truth(self.source, key))

    async def _get(self, key: str) -> bytes | BaseException | None:
        try:
            got = await self.store.get(key, PROTOTYPE)
        except Exception as error:
            return error
        return None if got is None else got.to_bytes()

    def _compare(self, key: str, got: bytes | BaseException | None, want: bytes | None) -> None:
        if isinstance(got, BaseException):
            self.wrong.append(f"reading {key} failed: {got!r}")
        elif got != want:
            self.wrong.append(f"reading {key} gave {'nothing' if got is None else got[:8].hex()}")

    async def read_parts(self, key: str) -> None:
        """Read byte ranges as the sharding codec does: the end of the object, then several parts together."""
        want = truth(self.source, key)
        assert want is not None
        try:
            tail = await self.store.get(key, PROTOTYPE, SuffixByteRequest(256))
            self._compare(f"the end of {key}", None if tail is None else tail.to_bytes(), want[-256:])
            parts = [RangeByteRequest(0, 700), RangeByteRequest(1500, 1900), RangeByteRequest(3000, 3500)]
            async for group in self.store.get_ranges(key, parts, prototype=PROTOTYPE):
                for number, part in group:
                    asked = parts[number]
                    got = None if part is None else part.to_bytes()
                    self._compare(f"a part of {key}", got, want[asked.start : asked.end])
        except Exception as error:
            self._compare(f"parts of {key}", error, None)

    async def write(self, key: str, version: int) -> None:
        """Write an object, then read it."""
        await self._mutate(lambda: self.store.set(key, cpu.Buffer.from_bytes(value_of(key, version))))
        await self.read(key)

    async def delete(self, key: str) -> None:
        """Delete an object, then read it."""
        await self._mutate(lambda: self.store.delete(key))
        await self.read(key)

    async def delete_dir(self, prefix: str, *keys: str) -> None:
        """Delete what is beneath a prefix, then read some of it."""
        await self._mutate(lambda: self.store.delete_dir(prefix))
        await self.read(*keys)

    async def _mutate(self, action: Callable[[], Awaitable[None]]) -> None:
        try:
            await action()
        except Exception as error:
            self.wrong.append(f"a write failed: {error!r}")


async def reading(work: Work) -> None:
    """Cold and warm reads, whole and in parts; a warm read by a second store."""
    await work.read(*KEYS[:6])
    await work.read(*KEYS[:6])
    await work.read_parts(KEYS[6])
    await work.read_parts(KEYS[6])
    await work.read(KEYS[6])
    await work.read(TAKEN)


async def writing(work: Work) -> None:
    """Writes and deletes of what is cached and of what is not."""
    await work.read(*KEYS[:4])
    await work.write(KEYS[0], 1)
    await work.write(KEYS[7], 1)
    await work.delete(KEYS[1])
    await work.read_parts(KEYS[2])
    await work.write(KEYS[2], 2)
    await work.read(*OTHERS[:2])
    await work.delete_dir("b", *OTHERS[:2])
    await work.read(*KEYS)


async def evicting(work: Work) -> None:
    """More than fits, twice."""
    for start in range(0, len(OTHERS), 4):
        await work.read(*OTHERS[start : start + 4])
    for start in range(0, len(OTHERS), 8):
        await work.read(*OTHERS[start : start + 8])
    await work.store.clear_cache()
    await work.read(*KEYS[:3])


SCENARIOS: dict[str, Callable[[Work], Awaitable[None]]] = {
    "reading": reading,
    "writing": writing,
    "evicting": evicting,
}


def perform(name: str, source: Path, cache: Path) -> list[str]:
    """Run a scenario to its end, its background work included; returns what went wrong."""

    async def run() -> list[str]:
        work = Work(source, cache)
        await SCENARIOS[name](work)
        work.store.cache_info()
        work.store.close()
        return work.wrong

    return asyncio.run(run())


def fill(source: Path, cache: Path, ready: int, go: int) -> list[str]:
    """Open the cache, say so, wait; then read more than fits, and leave it there. Returns what went wrong."""

    async def run() -> list[str]:
        work = Work(source, cache)
        await work.read(KEYS[0])
        os.write(ready, b"r")
        os.read(go, 1)
        for key in OTHERS[:20]:
            await work.read(key)
        work.store.cache_info()
        work.store.close()
        return work.wrong

    return asyncio.run(run())


def read_all(source: Path, cache: Path) -> list[str]:
    """Read every object, as a process that knows nothing of what happened does; returns what went wrong."""

    async def run() -> list[str]:
        work = Work(source, cache)
        for _ in range(2):
            for key in [*KEYS, TAKEN, *OTHERS[:5]]:
                await work.read(key)
        work.store.close()
        return work.wrong

    return asyncio.run(run())


def copy(template: Path, target: Path) -> None:
    """Make a directory what another one is, extended attributes and times included."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(template, target, symlinks=True)


def entry_bytes(cache: Path) -> int:
    """Bytes of all entry files, of those in flight and of those on their way out."""
    sizes: dict[tuple[int, int], int] = {}
    stack = [cache]
    while stack:
        here = stack.pop()
        with suppress(OSError):
            for item in os.scandir(here):
                if item.is_dir(follow_symlinks=False):
                    if here.name != ".xzcache" or item.name in ("tmp", "trash", "odd", "ranges"):
                        stack.append(Path(item.path))
                elif item.name.startswith("undone-"):
                    # a note of what is still to be done
                    continue
                elif here.name != ".xzcache" and item.name not in (".damaged", "notes"):
                    with suppress(FileNotFoundError):
                        status = item.stat(follow_symlinks=False)
                        sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
