"""``dataset.zcache``: what is cached of a dataset that was opened through a `CacheStore`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import xarray as xr
import zarr

from xzcache.manage import Arrays, Info, Warmed, info, ls
from xzcache.store import CacheStats, CacheStore
from xzcache.xarray._warm import warm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@xr.register_dataset_accessor("zcache")  # type: ignore[no-untyped-call]
class ZcacheAccessor:
    """What is cached of a dataset, and what its reads found in the cache.

    Each method raises `ValueError` if no variable is read through a `CacheStore` over a directory. Variables that were
    loaded or computed are not read through it any more.

    Examples
    --------
    >>> dataset = xzcache.open_zarr("s3://bucket/era5.zarr")
    >>> dataset.zcache.cached_fraction()
    {'t2m': 0.25, 'lat': 1.0, 'lon': 1.0, 'time': 1.0}
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset
        self._arrays = {str(name): list(_arrays_behind(v._data)) for name, v in dataset.variables.items()}

    def _stores(self) -> list[CacheStore]:
        """One store for each source, in the order of the variables."""
        found = {store.namespace: store for arrays in self._arrays.values() for _, store in arrays}
        if not found:
            raise ValueError("no variable of this dataset is read through a CacheStore: open it with engine='zcache'")
        return list(found.values())

    def info(self) -> Info:
        """The state of the cache directory; as `xzcache.info`."""
        for store in self._stores():
            return info(store.cache_info()["cache_directory"])
        raise AssertionError

    def cached_fraction(self) -> dict[str, float | None]:
        """For each variable, the part of the chunks (or shards) of its whole arrays that is cached, from 0 to 1.

        None for a variable whose array is unknown. What a selection leaves out counts as well.
        """
        listed = {store.namespace: _listed(store) for store in self._stores()}
        places = {
            (store.namespace, path.rpartition("/")[0]) for arrays in self._arrays.values() for path, store in arrays
        }
        found: dict[str, float | None] = {}
        for name, arrays in self._arrays.items():
            # indexes are in memory, and lie beside the other arrays
            keys = [(store.namespace, path) for path, store in arrays] or [
                (namespace, f"{group}/{name}".lstrip("/")) for namespace, group in places
            ]
            known = {key: listed[key[0]][key[1]] for key in keys if key[1] in listed[key[0]]}
            if known:
                there = sum(total for _, total in known.values())
                found[name] = min(1.0, sum(cached for cached, _ in known.values()) / there) if there else 1.0
            else:
                found[name] = 0.0 if arrays else None
        return found

    def stats(self) -> CacheStats:
        """The reads through the stores of this dataset, in this process; as `CacheStore.cache_stats`."""
        total: Counter[str] = Counter()
        stores = self._stores()
        for store in stores:
            total.update(cast(dict[str, Any], store.cache_stats()))
        # both are counted by process and directory, and not by store
        for name in ("evictions", "cache_errors"):
            total[name] = max(cast(dict[str, Any], store.cache_stats())[name] for store in stores)
        total["hit_rate"] = total["hits"] / total["total_requests"] if total["total_requests"] else 0.0  # type: ignore[assignment]
        return cast(CacheStats, dict(total))

    def warm(self, variables: str | Sequence[str] | None = None, sel: Any = None, **options: Any) -> Warmed:
        """Fetch what is missing of this dataset into the cache; as `xzcache.warm`, with all its keywords."""
        self._stores()
        return warm(self._dataset, variables, sel, **options)

    def _parts(self) -> list[Info | Arrays]:
        return [self.info(), *(ls(store) for store in self._stores())]

    def __repr__(self) -> str:
        try:
            return "\n\n".join(map(repr, self._parts()))
        except (ValueError, LookupError, OSError) as error:
            return f"<xzcache: {error}>"

    def _repr_html_(self) -> str | None:
        try:
            return "".join(part._repr_html_() for part in self._parts())
        except (ValueError, LookupError, OSError):
            return None


def _listed(store: CacheStore) -> dict[str, tuple[int, int]]:
    """The cached and the existing objects of each array of a source, by its path; nothing if nothing is cached."""
    try:
        arrays = ls(store)
    except (LookupError, OSError):
        return {}
    return {
        array.name.strip("/"): (array.cached, array.total - array.missing)
        for array in arrays
        if array.total is not None
    }


def _arrays_behind(data: Any) -> Iterator[tuple[str, CacheStore]]:
    """The arrays of cached stores that lazy data, or the graph of Dask's data, reads: path and store."""
    if hasattr(data, "__dask_graph__"):
        seen = set()
        for key, value in data.__dask_graph__().items():
            if isinstance(key, str) and key.startswith("original-"):
                for path, store in _unwrapped(getattr(value, "value", value)):
                    if (path, store.namespace) not in seen:
                        seen.add((path, store.namespace))
                        yield path, store
    else:
        yield from _unwrapped(data)


def _unwrapped(data: Any) -> Iterator[tuple[str, CacheStore]]:
    while data is not None and not isinstance(data, zarr.Array):
        data = getattr(data, "array", getattr(data, "_array", None))
    if data is not None and isinstance(data.store, CacheStore):
        yield data.path, data.store
