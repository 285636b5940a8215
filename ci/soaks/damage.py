"""Damages files of a cache, thousands of them, and reads what they held.

A process fills a cache with whole objects and byte ranges and leaves. Then every file is damaged, each in one of many
ways: bytes flipped, cut, lengthened, zeroed, exchanged with another file, its stamp lost, garbled or taken from another
file, gone, replaced by a directory, a link, a pipe, a file of another user. New processes read everything, whole and in
parts. Whatever they read has to be what the source holds, and the audit after a repair has to find nothing.

    ci/soak damage                  2,000 files
    ci/soak damage --files 10000
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from faults import Forked
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

import xzcache

PROTOTYPE = default_buffer_prototype()
STAMP = "user.xzcache"
SIZE = 3000
PARTS = [RangeByteRequest(0, 500), RangeByteRequest(1000, 1500), RangeByteRequest(2200, 2900)]


def value_of(number: int) -> bytes:
    return (blake2b(str(number).encode(), digest_size=60).digest() * 50)[:SIZE]


def key_of(number: int) -> str:
    return f"a/c/{number // 100}/{number % 100}"


def is_ranged(number: int) -> bool:
    """A quarter of the objects are read in parts: three files each."""
    return number % 6 == 0


# -- the kinds of damage


def flip(path: Path, chance: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def flip_unseen(path: Path, chance: random.Random, other: Path) -> None:
    """The time of modification is as it was."""
    status = path.stat()
    flip(path, chance, other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path, chance: random.Random, other: Path) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def lengthen(path: Path, chance: random.Random, other: Path) -> None:
    with open(path, "ab") as file:
        file.write(bytes(chance.randrange(1, 100)))


def zero(path: Path, chance: random.Random, other: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def exchange(path: Path, chance: random.Random, other: Path) -> None:
    """Another entry's bytes under this entry's stamp."""
    if path != other:
        path.write_bytes(other.read_bytes())


def impersonate(path: Path, chance: random.Random, other: Path) -> None:
    """Another entry's file, stamp and all."""
    if path != other:
        path.unlink()
        shutil.copy2(other, path)


def lose_stamp(path: Path, chance: random.Random, other: Path) -> None:
    os.removexattr(path, STAMP)
    flip(path, chance, other)


def garble_stamp(path: Path, chance: random.Random, other: Path) -> None:
    stamp = bytearray(os.getxattr(path, STAMP))
    stamp[chance.randrange(len(stamp))] ^= 1 << chance.randrange(8)
    os.setxattr(path, STAMP, bytes(stamp))


def cut_stamp(path: Path, chance: random.Random, other: Path) -> None:
    stamp = os.getxattr(path, STAMP)
    os.setxattr(path, STAMP, stamp[: chance.randrange(len(stamp))])


def vanish(path: Path, chance: random.Random, other: Path) -> None:
    path.unlink()


def become_directory(path: Path, chance: random.Random, other: Path) -> None:
    path.unlink()
    path.mkdir()


def become_link(path: Path, chance: random.Random, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def become_pipe(path: Path, chance: random.Random, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def change_hands(path: Path, chance: random.Random, other: Path) -> None:
    """As root only: the file is another user's, and is not what was stored."""
    flip(path, chance, other)
    with suppress(PermissionError):
        os.chown(path, 65534, 65534)


KINDS: list[Callable[[Path, random.Random, Path], None]] = [
    flip, flip_unseen, cut, lengthen, zero, exchange, impersonate, lose_stamp, garble_stamp, cut_stamp, vanish,
    become_directory, become_link, become_pipe, change_hands,
]  # fmt: skip


# -- processes


def read_everything(source: Path, cache: Path, objects: int, seed: int) -> list[str]:
    """Read all objects in an order drawn at random; returns what is wrong."""
    xzcache.config.set({"min_free": 0})
    wrong: list[str] = []

    async def read() -> None:
        store = xzcache.CacheStore(LocalStore(source), cache_store=os.fspath(cache), namespace="soak", max_size=None)
        order = list(range(objects))
        random.Random(seed).shuffle(order)
        for number in order:
            key, value = key_of(number), value_of(number)
            try:
                if is_ranged(number):
                    async for group in store.get_ranges(key, PARTS, prototype=PROTOTYPE):
                        for place, part in group:
                            asked = PARTS[place]
                            if part is None or part.to_bytes() != value[asked.start : asked.end]:
                                wrong.append(f"{key} {asked}")
                    end = await store.get(key, PROTOTYPE, SuffixByteRequest(100))
                    if end is None or end.to_bytes() != value[-100:]:
                        wrong.append(f"the end of {key}")
                else:
                    got = await store.get(key, PROTOTYPE)
                    if got is None or got.to_bytes() != value:
                        wrong.append(key)
            except Exception as error:
                wrong.append(f"{key}: {error!r}")
        store.cache_info()
        store.close()

    asyncio.run(read())
    return wrong


def audit(cache: Path) -> list[str]:
    store = xzcache.LockedLocalStore(cache)
    store.check(repair=True)
    return [str(finding) for finding in store.check().findings]


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/soak damage", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    print(f"seed {seed}", flush=True)
    # in six objects there are nine files: five whole ones, and four byte ranges of the sixth
    objects = max(12, options.files * 6 // 9)
    kinds: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        source, cache = Path(folder).resolve() / "source", Path(folder).resolve() / "cache"
        for number in range(objects):
            path = source / key_of(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value_of(number))
            # a file that was just written may change again without another time of modification
            os.utime(path, (1e9, 1e9))
        bad += Forked(read_everything, source, cache, objects, seed).wait(600) or []
        # sorted, for a seed to do the same again
        files = sorted(p for p in [*cache.glob("soak/**/*"), *cache.glob(".xzcache/ranges/**/*")] if p.is_file())
        for path in files:
            kind = chance.choice(KINDS)
            other = chance.choice(files)
            with suppress(FileNotFoundError, IsADirectoryError, OSError):
                if other.is_file() and not other.is_fifo():
                    kind(path, chance, other)
                    kinds[kind.__name__] += 1
        for number in range(2):
            bad += Forked(read_everything, source, cache, objects, seed + number).wait(600) or []
        left = Forked(audit, cache).wait(600) or []
    print(", ".join(f"{name} {count}" for name, count in kinds.most_common()))
    print(*bad[:20], *left[:20], sep="\n")
    print(f"{sum(kinds.values())} files damaged; wrong or failed reads {len(bad)}; left after a repair {len(left)}")
    return 1 if bad or left or not kinds else 0


if __name__ == "__main__":
    sys.exit(main())
