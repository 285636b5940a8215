"""What storing takes at least: a file that is named once an index knows of it, in one transaction, under a lock.

The index knows a path, a size, a checksum and the last use of each entry. There are no leases, no tombstones and no
stamps, nothing notices damage, and a write at the source or a lost index makes the cache wrong.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import WrapperStore


class Files:
    """Files and their index, in a directory of their own."""

    def __init__(self, root: Path) -> None:
        self.root, self._numbers = root, count()
        for name in ("tmp", "data"):
            (root / name).mkdir(parents=True)
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
        self.index = sqlite3.connect(root / "index.db", isolation_level=None, check_same_thread=False)
        self.index.executescript(
            "PRAGMA synchronous=OFF; PRAGMA journal_mode=PERSIST;"
            "CREATE TABLE entry(id INTEGER PRIMARY KEY, path TEXT UNIQUE, size INTEGER, crc INTEGER, used INTEGER);"
            "CREATE INDEX by_use ON entry(used);"
            "CREATE TABLE total(n INTEGER, bytes INTEGER); INSERT INTO total VALUES(0, 0);"
        )

    def add(self, path: str, data: Any) -> None:
        """Add a row; within a transaction."""
        row = path, len(data), zlib.crc32(data), time.time_ns()
        self.index.execute("INSERT INTO entry(path, size, crc, used) VALUES(?, ?, ?, ?)", row)
        self.index.execute("UPDATE total SET n = n + 1, bytes = bytes + ?", (len(data),))

    def put(self, path: str, data: Any, *, evict: bool = False) -> None:
        """Store a file; with `evict`, the oldest one goes."""
        temporary, oldest = self.root / f"tmp/{next(self._numbers)}", None
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(file, data)
        os.close(file)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.index.execute("BEGIN IMMEDIATE")
        self.add(path, data)
        if evict:
            id_, oldest, size = self.index.execute("SELECT id, path, size FROM entry ORDER BY used LIMIT 1").fetchone()
            self.index.execute("DELETE FROM entry WHERE id = ?", (id_,))
            self.index.execute("UPDATE total SET n = n - 1, bytes = bytes - ?", (size,))
        self.index.execute("COMMIT")
        os.rename(temporary, self.root / path)
        if oldest is not None:
            os.unlink(self.root / oldest)
        fcntl.flock(self._lock, fcntl.LOCK_UN)


class Keeping(WrapperStore[Store]):
    """A store that keeps the objects it reads, in one thread; whole objects only."""

    def __init__(self, store: Store, files: Files) -> None:
        super().__init__(store)
        self._files = files
        self._thread = ThreadPoolExecutor(1)

    def _with_store(self, store: Store) -> Keeping:
        return type(self)(store, self._files)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        prototype = prototype or default_buffer_prototype()
        path = "data/" + key.replace("/", "_")
        if byte_range is not None:
            return await super().get(key, prototype, byte_range)
        try:
            return prototype.buffer.from_bytes((self._files.root / path).read_bytes())
        except FileNotFoundError:
            value = await super().get(key, prototype)
            if value is not None:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._thread, self._files.put, path, value.as_numpy_array().tobytes())
            return value
