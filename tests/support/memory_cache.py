"""A cache that only the tests have: the contract of `xzcache.model.Backend` in as few lines as it takes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from xzcache.model import (
    MISSING,
    Backend,
    Cached,
    Data,
    Entry,
    Listed,
    are_compatible,
    clip,
    is_document,
    metadata,
    nothing,
    within,
)


class Stored(NamedTuple):
    data: bytes
    validator: str
    at: float


class MemoryParts:
    def __init__(self, stored: dict[Entry, Stored], key: str) -> None:
        self._stored = stored
        self._key = key

    @property
    def is_empty(self) -> bool:
        return not self._of_key()

    @property
    def pieces(self) -> Listed:
        spans = [(entry.start, entry.stop) for entry in self._of_key() if not entry.is_whole]
        return Listed(self._key, spans)

    @property
    def states(self) -> set[str]:
        return {self._stored[entry].validator for entry in self._of_key()}

    def validator(self, entry: Entry) -> str:
        return self._stored[entry].validator if entry in self._stored else ""

    def size(self, max_age: Any) -> int | None:
        stored = self._stored.get(Entry(self._key))
        return None if stored is None or time.time() - stored.at >= float(max_age) else len(stored.data)

    def validated(self, entry: Entry | None = None) -> float | None:
        stored = self._stored.get(entry or Entry(self._key))
        return None if stored is None else stored.at

    def _of_key(self) -> list[Entry]:
        return [entry for entry in self._stored if entry.key == self._key]


class MemoryCache(Backend):
    """Everything in dictionaries; no bound, no other process."""

    namespace = "tests"
    prefix = ""

    def __init__(self) -> None:
        self._stored: dict[Entry, Stored] = {}
        self._missing: dict[str, float] = {}
        self._written: Counter[str] = Counter()
        self._writes: Counter[str] = Counter()
        self._arrays: dict[str, bytes] = {}

    @property
    def cache_id(self) -> object:
        return self

    async def get(self, entry: Entry, max_age: Any, missing_max_age: Any = 0) -> Cached:
        now = time.time()
        for held in (entry, entry.whole, *self.parts(entry.key).pieces.covering(entry)):
            if held in self._stored and now - self._stored[held].at < float(max_age):
                data = memoryview(self._stored[held].data)
                span = clip(entry.start, entry.stop, len(data)) if held.is_whole else within(entry, held, len(data))
                return data[slice(*span)]
        return MISSING if now - self._missing.get(entry.key, -math.inf) < float(missing_max_age) else None

    def parts(self, key: str) -> MemoryParts:
        return MemoryParts(self._stored, key)

    async def mark_validated(self, entry: Entry, max_age: Any) -> None:
        if entry in self._stored:
            self._stored[entry] = self._stored[entry]._replace(at=time.time())

    def write_version(self, key: str) -> Any:
        return (
            self._writes[key],
            *(self._writes[key[: at + 1]] for at in range(len(key)) if key[at] == "/"),
            self._writes["/"],
        )

    async def publish(
        self,
        entry: Entry,
        data: Data | None,
        version: Any,
        validator: str = "",
        done: Callable[[], None] = nothing,
        *,
        age: float = 0.0,
    ) -> None:
        key = entry.key
        is_written = any(name in ("/", key) or (name[-1] == "/" and key.startswith(name)) for name in +self._written)
        others = [stored.validator for held, stored in self._stored.items() if held.key == key and held != entry]
        if version is not None and version == self.write_version(key) and not is_written:
            if data is None:
                self._missing[key] = time.time()
            elif all(are_compatible(validator, other) for other in others):
                if entry.is_whole:
                    self._forget(key)
                self._stored[entry] = Stored(bytes(data), validator, time.time())
        done()

    async def begin_write(self, keys: Sequence[str], beneath: str | None = None) -> Any:
        names = [*keys, *([] if beneath is None else [f"{beneath}/"])]
        self._written.update(names)
        for name in names:
            self._invalidate(name)
        return names, [self.write_version(key) for key in keys]

    async def end_write(self, begun: Any, values: Sequence[Data | None] = ()) -> None:
        names, versions = begun
        self._written.subtract(names)
        alone = [version == self.write_version(name) for name, version in zip(names, versions, strict=False)]
        for name in names:
            self._invalidate(name)
        for name, value, is_alone in zip(names, values, alone, strict=False):
            if value is not None and is_alone:
                await self.publish(Entry(name), value, self.write_version(name))

    async def invalidate(self, key: str, since: Any) -> Any:
        is_alone = since is not None and since == self.write_version(key)
        self._invalidate(key)
        return self.write_version(key) if is_alone else None

    async def apply_document(self, key: str, document: bytes | None, version: Any, *, is_written: bool = False) -> Any:
        described = metadata.describe(key, document).arrays
        if not is_written and is_document(key):
            for path, digest in described.items():
                if self._arrays.get(path, digest) != digest:
                    is_alone = version == self.write_version(key)
                    self._invalidate(f"{path}/")
                    version = self.write_version(key) if is_alone else None
        self._arrays.update(described)
        if document is None and version is not None:
            self._missing[key] = time.time()
        return version

    def _invalidate(self, name: str) -> None:
        self._writes[name] += 1
        self._forget(name)

    def _forget(self, name: str) -> None:
        def is_named(key: str) -> bool:
            return name in ("/", key) or (name.endswith("/") and key.startswith(name))

        self._stored = {entry: stored for entry, stored in self._stored.items() if not is_named(entry.key)}
        self._missing = {key: at for key, at in self._missing.items() if not is_named(key)}
