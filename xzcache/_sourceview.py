"""What only the source can say of a store."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from zarr.abc.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from xzcache._identity import Identity


class SourceView(Store):
    """A store whose listings and abilities are those of another one.

    Derived from `Store` and not from Zarr's `WrapperStore`: a member that is forgotten here ends in `get`, `set` and
    `delete`, where the cache is, instead of at the source behind the cache's back.
    """

    _store: Store
    source: Identity
    _given_path: str | None = None

    @property
    def path(self) -> str | None:
        """The URL or path of the source, as it was given but without credentials; None where it has none."""
        return self._given_path

    @property
    def supports_writes(self) -> bool:
        return self._store.supports_writes

    @property
    def supports_deletes(self) -> bool:
        return self._store.supports_deletes

    @property
    def supports_listing(self) -> bool:
        return self._store.supports_listing

    @property
    def supports_consolidated_metadata(self) -> bool:
        return self._store.supports_consolidated_metadata

    def list(self) -> AsyncIterator[str]:
        return self._store.list()

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        return self._store.list_prefix(prefix)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        return self._store.list_dir(prefix)

    async def is_empty(self, prefix: str) -> bool:
        return await self._store.is_empty(prefix)

    async def getsize_prefix(self, prefix: str) -> int:
        return await self._store.getsize_prefix(prefix)

    async def _open(self) -> None:
        if self._is_open:
            raise ValueError("store is already open")
        # a source that cannot be opened now says so at the first read that needs it: what is cached does not
        with suppress(OSError):
            await self._store._ensure_open()
        self._is_open = True

    def close(self) -> None:
        """Close the source. What is cached stays, and the store can be used again."""
        self._store.close()
        self._is_open = False
