"""``dataset.zcache``: what is cached of a dataset that was opened through a `CacheStore`."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import xarray as xr
import zarr

from xzcache.manage import Arrays, Info, Warmed, info, ls
from xzcache.store import CacheStats, CacheStore
from xzcache.xarray._warm import warm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


_STATES: Final = {"none": 0, "part": 1, "whole": 2, "missing": 3}
_MOST_EDGES: Final = 60
"""Chunks along one side of a map up to which they have edges."""


@xr.register_dataset_accessor("zcache")  # type: ignore[no-untyped-call]
class ZcacheAccessor:
    """The cached parts of a dataset, and the hits and misses of its reads.

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
        found = {_store_of(array).namespace: _store_of(array) for arrays in self._arrays.values() for array in arrays}
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

        None where it cannot be told. Chunks outside of a selection count as well.
        """
        listed = {store.namespace: _listed(store) for store in self._stores()}
        places = {
            (_store_of(array).namespace, array.path.rpartition("/")[0])
            for arrays in self._arrays.values()
            for array in arrays
        }
        found: dict[str, float | None] = {}
        for name, arrays in self._arrays.items():
            if arrays:
                counts = [_counted(listed[_store_of(array).namespace], array.path, array) for array in arrays]
            else:
                # indexes are in memory, and lie beside the other arrays
                of_index = {_counted(listed[namespace], f"{group}/{name}".lstrip("/")) for namespace, group in places}
                counts = [count for count in of_index if count is not None]
            known = [count for count in counts if count is not None]
            if not counts or len(known) < len(counts):
                found[name] = None
                continue
            there = sum(total for _, total in known)
            found[name] = min(1.0, sum(cached for cached, _ in known) / there) if there > 0 else 1.0
        return found

    def chunks(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """For each chunk (or shard) of the whole array of a variable, how much of it is cached.

        Parameters
        ----------
        name : str
            A variable that is read through one array of a `CacheStore`.

        Returns
        -------
        numpy.ndarray
            With the shape of the grid of chunks. 0: not cached; 1: byte ranges of it are; 2: cached; 3: known to be
            missing at the source.

        Raises
        ------
        ValueError
            The variable is not read through one array of a `CacheStore`.
        """
        array = self._array(name)
        store: CacheStore = array.store  # type: ignore[assignment]
        states = np.zeros(_grid(array), np.uint8)
        names = map(array.metadata.encode_chunk_key, np.ndindex(states.shape))
        parts = store.cached_parts("/".join(filter(None, (array.path, name))) for name in names)
        states.flat = [_STATES[part] for part in parts]
        return states

    def map(self, name: str, *, ax: Any = None) -> Any:
        """Draw which chunks (or shards) of the array of a variable are cached.

        Parameters
        ----------
        name : str
            As for `chunks`.
        ax : matplotlib.axes.Axes, optional
            Where it is drawn. Default is a new figure.

        Returns
        -------
        matplotlib.axes.Axes
            The first dimension runs from left to right; the chunks along all others lie above one another.

        Raises
        ------
        ImportError
            matplotlib is not installed; `chunks` gives the same as an array.
        """
        states = self.chunks(name)
        try:
            from matplotlib import pyplot
            from matplotlib.colors import ListedColormap
            from matplotlib.patches import Patch
        except ImportError as missing:
            raise ImportError(f"a map is drawn by matplotlib, and chunks({name!r}) gives it as an array") from missing
        colors = {"not cached": "#d9d9d9", "in part": "#92c5de", "cached": "#2166ac", "absent": "#ffffff"}
        image = states.reshape(states.shape[0] if states.ndim else 1, -1).T
        if ax is None:
            _, ax = pyplot.subplots(figsize=(7, 1.2 + min(3.5, 0.12 * image.shape[0])), layout="constrained")
        mesh = ax.pcolormesh(image, cmap=ListedColormap(list(colors.values())), vmin=0, vmax=3)
        if max(image.shape) <= _MOST_EDGES:
            mesh.set_edgecolor("#80808060")
        first, *others = [*map(str, self._dataset[name].dims), ""][: max(1, states.ndim)]
        ax.set(title=f"{name}: {(states == 2).mean():.0%} of the chunks are cached", xlabel=f"chunk along {first}")
        ax.set_ylabel(f"chunks along {', '.join(others)}" if others and others[0] else "")
        if image.shape[0] == 1:
            ax.set_yticks([])
        found = [Patch(facecolor=color, edgecolor="#808080", label=label) for label, color in colors.items()]
        handles = [found[state] for state in np.unique(states)]
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        return ax

    def _array(self, name: str) -> zarr.Array[Any]:
        self._stores()
        if name not in self._arrays:
            raise ValueError(f"name={name!r} is no variable of this dataset: it has {', '.join(self._arrays)}")
        # the arrays that are open already, because opening them again would ask the source
        arrays = {(_store_of(array).namespace, array.path): array for array in self._arrays[name]}
        if not arrays:
            # indexes are in memory, and lie beside the other arrays
            for array in (each for others in self._arrays.values() for each in others):
                arrays[_store_of(array).namespace, array.path.rpartition("/")[0]] = array
        if len(arrays) != 1:
            raise ValueError(f"name={name!r} is not read from one array of one source")
        (array,) = arrays.values()
        return array if self._arrays[name] else _beside(array, name)

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


_Row = tuple[int, int, int | None]
"""The objects of an array that are cached, that are missing at the source, and all; None if its document is unknown."""


def _listed(store: CacheStore) -> dict[str, _Row] | None:
    """The objects of each array of a source, by its path; None if it cannot be told."""
    try:
        return {array.name.strip("/"): (array.cached, array.missing, array.total) for array in ls(store)}
    except LookupError:
        # nothing is cached
        return {}
    except OSError:
        return None


def _counted(listed: dict[str, _Row] | None, path: str, array: zarr.Array[Any] | None = None) -> tuple[int, int] | None:
    """The cached and the existing objects of an array; None if it cannot be told."""
    if listed is None:
        return None
    cached, missing, total = listed.get(path, (0, 0, None))
    if total is None and array is not None:
        # its document may have been evicted
        with suppress(NotImplementedError):
            total = math.prod(_grid(array))
    return None if total is None else (cached, total - missing)


def _grid(array: zarr.Array[Any]) -> list[int]:
    """The chunks (or shards) of an array along each dimension."""
    return [-(-length // size) for length, size in zip(array.shape, array.shards or array.chunks, strict=True)]


def _beside(array: zarr.Array[Any], name: str) -> zarr.Array[Any]:
    """The array of a name in the group of another; from consolidated metadata, if the group has them."""
    folder = array.path.rpartition("/")[0]
    group = zarr.open_group(_store_of(array), path=folder, mode="r", zarr_format=array.metadata.zarr_format)
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise ValueError(f"name={name!r} is not read from one array of one source")
    return found


def _arrays_behind(data: Any) -> Iterator[zarr.Array[Any]]:
    """The arrays of cached stores that lazy data, or the graph of Dask's data, reads."""
    if hasattr(data, "__dask_graph__"):
        seen = set()
        for key, value in data.__dask_graph__().items():
            if isinstance(key, str) and key.startswith("original-"):
                for array in _unwrapped(getattr(value, "value", value)):
                    if (place := (array.path, _store_of(array).namespace)) not in seen:
                        seen.add(place)
                        yield array
    else:
        yield from _unwrapped(data)


def _unwrapped(data: Any) -> Iterator[zarr.Array[Any]]:
    while data is not None and not isinstance(data, zarr.Array):
        data = getattr(data, "array", getattr(data, "_array", None))
    if data is not None and isinstance(data.store, CacheStore):
        yield data


def _store_of(array: zarr.Array[Any]) -> CacheStore:
    """The store of an array of `_arrays_behind`."""
    return cast(CacheStore, array.store)
