"""Stores that are broken on purpose: a comparison that does not notice them notices nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore


class Forgetful(WrapperStore[Store]):
    """Drops every write of a chunk."""

    async def set(self, key: str, value: Buffer) -> None:
        if "/c/" in f"/{key}":
            return
        await self._store.set(key, value)


class Stale(WrapperStore[Store]):
    """Reads each key once, and answers the same for good."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        # kept with what is wrapped, which is wrapped anew whenever it is opened
        self._seen: dict[Any, Buffer] = vars(store).setdefault("seen", {})

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        asked = key, str(byte_range)
        if asked not in self._seen:
            value = await self._store.get(key, prototype, byte_range)
            if value is None:
                return None
            self._seen[asked] = value
        return self._seen[asked]


class Flipping(WrapperStore[Store]):
    """Changes one bit of each chunk that is read."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        value = await self._store.get(key, prototype, byte_range)
        if value is None or len(value) == 0 or "/c/" not in f"/{key}":
            return value
        data = bytearray(value.to_bytes())
        data[-1] ^= 1
        return prototype.buffer.from_bytes(bytes(data))


def _maker(kind: type[WrapperStore[Store]]) -> Callable[[Store, str], Store]:
    def make(store: Store, directory: str) -> Store:
        return store if isinstance(store, kind) else kind(store)

    return make


forgetful, stale, flipping = _maker(Forgetful), _maker(Stale), _maker(Flipping)
