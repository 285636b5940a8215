"""Writing through a cache, as Zarr's stores are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xzcache._sourceview import SourceView

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.core.buffer import Buffer

    from xzcache._writethrough import WriteThrough


class WritableView(SourceView):
    """A view of a source that is written first and last, so that the cache is never ahead of it."""

    _writes: WriteThrough
    cache_set_data: bool

    async def set(self, key: str, value: Buffer) -> None:
        """Write a value to the source, and, where so configured, to the cache."""
        self._check_writable()
        await self._writes.values([(key, value)], lambda: self._store.set(key, value), keep=self.cache_set_data)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a value unless the key has one, by the source's own means."""
        self._check_writable()
        await self._writes.values(
            [(key, value)], lambda: self._store.set_if_not_exists(key, value), keep=False, certain=False
        )

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        self._check_writable()
        pairs = list(values)
        await self._writes.values(pairs, lambda: self._store._set_many(pairs), keep=self.cache_set_data)

    async def delete(self, key: str) -> None:
        """Delete a key at the source and in the cache."""
        self._check_writable()
        await self._writes.deletion(key, lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        """Delete everything beneath a prefix, at the source and in the cache."""
        self._check_writable()
        await self._writes.deletion_beneath(prefix, lambda: self._store.delete_dir(prefix))

    async def clear(self) -> None:
        """Delete everything at the source, and what is cached of it."""
        self._check_writable()
        await self._writes.deletion_beneath("", self._store.clear)
