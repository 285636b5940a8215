"""Warm a cache: translate datasets, stores, URLs and selections of labels to parts of Zarr arrays."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store

from xzcache._config import nearest, parse_flag, parse_threads
from xzcache.manage import Part, UnknownSource, Warmed, parse_since, pin_namespace, progress_bar, warm_parts
from xzcache.sources import as_xarray, is_url, scrub, shown
from xzcache.store import CacheStore
from xzcache.xarray._engine import open_zarr
from xzcache.xarray._errors import explained

if TYPE_CHECKING:
    from distributed import Client

    from xzcache.manage import Positions

_CONCURRENCY: Final = 32
_RETRIES: Final = 3

_TIME: Final = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d+)?)?)?Z?)?)?)?")
_SEL: Final = 'a mapping such as {"time": slice("2020-01", "2020-02")}, or texts such as "time=2020-01:2020-02"'
_ISEL: Final = 'a mapping such as {"time": slice(0, 24)}, or texts such as "time=0:24"'

Selection = Mapping[str, Any] | Sequence[str] | None


def warm(
    source: Any,
    variables: str | Sequence[str] | None = None,
    sel: Selection = None,
    *,
    isel: Selection = None,
    client: Client | None = None,
    every_node: bool = False,
    concurrency: int = _CONCURRENCY,
    retries: int = _RETRIES,
    pin: bool | str | float | timedelta = False,
    progress: bool | None = None,
    dry_run: bool = False,
    directory: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Warmed:
    """Fetch what is missing of a dataset into the cache, and no more.

    Synchronous, in a script and within a running event loop alike. Objects that are cached are not requested, nor are
    the chunks of shards that are not needed. After an interruption (Ctrl-C), requests under way end and are stored, and
    the same call goes on with the rest.

    Parameters
    ----------
    source : Dataset, DataArray, DataTree, zarr.Array, zarr.Group, Store, str or Path
        What to warm: a dataset that was opened through the cache, with the selections that were made of it; or a store,
        URL or path, which is opened as by `CacheStore`. Of Dask's arrays, the chunks that are needed are warmed.
    variables : str or list of str, optional
        The names or paths of the variables; their coordinates are warmed as well. Default is all.
    sel, isel : mapping or list of str, optional
        Labels or positions along the dimensions, as for `xarray.Dataset.sel` and `isel`; or texts as on the command
        line: ``["time=2020-01-01:2020-02-01"]``. Default is everything.
    client : distributed.Client, optional
        A cluster whose nodes are warmed instead of this machine, each with its share.
    every_node : bool, optional
        Whether each node of the cluster gets all of it.
    concurrency : int, optional
        The number of concurrent requests, of each node.
    retries : int, optional
        How often failed objects are tried again.
    pin : bool, str, timedelta or float, optional
        Whether what is warmed is pinned, or for how long: ``"7d"``; see `xzcache.pin`.
    progress : bool, optional
        Whether progress is shown. Default is on a terminal and in a notebook.
    dry_run : bool, optional
        Whether to only look for what is missing, and whether it fits: ``refusal`` of the result says why it does not.
    directory : str or Path, optional
        The cache directory, for a URL, path or store. Default is this user's default cache on this machine.
    **settings
        All other keywords of `CacheStore`, for a URL, path or store.

    Returns
    -------
    Warmed
        ``ok``, ``objects``, ``cached``, ``fetched``, ``failed`` and others.

    Raises
    ------
    ValueError, TypeError
        A parameter is invalid; the message names it, its value and the accepted values.
    LookupError
        There is no Zarr array or group at the URL or path.
    PermissionError
        No credentials were found, or the server refuses them.
    TooLarge
        The cache cannot hold what is asked for; the message has the figures. Nothing was fetched. Not with `dry_run`.
    CacheUnavailable
        The cache cannot be used; the message says why.
    KeyboardInterrupt
        After an interruption, when what was fetched so far is stored.
    """
    parse_threads_named("concurrency", concurrency)
    if not (type(retries) is int and retries >= 0):
        raise ValueError(f"retries={retries!r} is not accepted: give a whole number, 0 or more")
    for name, flag in {"every_node": every_node, "dry_run": dry_run}.items():
        parse_flag(name, flag)
    _check_client(client, every_node=every_node, pin=pin)
    until = None
    if not isinstance(pin, bool):
        until = time.time_ns() + int(parse_since("pin", pin) * 1e9)
    names = [variables] if isinstance(variables, str) else None if variables is None else list(variables)
    if names is not None and not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"variables={variables!r} is not accepted: give the name of a variable, or a list of names")
    selections = _Selections(sel, isel)
    if directory is not None:
        settings["cache_store"] = directory
    with _errors_named(source):
        parts = _distinct(_parts_of(source, names, selections, settings))
    selections.check_used()
    if not parts:
        raise ValueError("no variable is read through a CacheStore: open the dataset with engine='zcache'")
    if pin is not False and not dry_run:
        _pin(parts, until, by_array=names is not None)
    with progress_bar(progress) as show:
        return warm_parts(
            parts,
            concurrency=concurrency,
            retries=retries,
            client=client,
            every_node=every_node,
            is_pinned=pin is not False,
            dry_run=dry_run,
            show=show,
        )


def parse_threads_named(name: str, value: Any) -> int:
    """A number of requests, 1 or more."""
    try:
        return parse_threads(name, value)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("threads", "requests")) from None


def _check_client(client: Any, *, every_node: bool, pin: Any) -> None:
    if client is None:
        if every_node:
            raise ValueError("every_node=True is not accepted without a client: give the client of a cluster")
        return
    from distributed import Client

    if not isinstance(client, Client) or getattr(client, "asynchronous", False):
        raise TypeError(f"client={client!r} is not accepted: give a distributed.Client that is not asynchronous")
    if pin is not False:
        raise ValueError("pin is not accepted with a client: pins belong to one cache, so pin on each node")


@contextmanager
def _errors_named(source: Any) -> Iterator[None]:
    """Errors of opening a source, in one line that names it without credentials."""
    if not isinstance(source, str | os.PathLike | Store):
        yield
        return
    text = os.fspath(source) if isinstance(source, str | os.PathLike) else str(source)
    try:
        yield
    except FileNotFoundError as error:
        # before the errors of values, because Zarr's are both
        clear = str(error) if _is_explained(error, text) else ""
        said = clear or f"there is no Zarr array or group at {shown(text)!r}: give its URL or path"
        raise UnknownSource(said) from error
    except UnknownSource:
        raise
    except Exception as error:
        if (isinstance(error, ValueError | TypeError) and "accepted" in str(error)) or _is_explained(error, text):
            raise
        reason = " ".join(str(scrub(error, text)).split()) or type(error).__name__
        raise OSError(f"{shown(text)} cannot be opened: {reason[:500]}") from None


def _is_explained(error: Exception, text: str) -> bool:
    """Whether an error is one of `explained`, which names the source already."""
    return error.__cause__ is not None and shown(text) in str(error).partition(": ")[0]


def _distinct(parts: Iterable[Part]) -> list[Part]:
    """The parts without duplicates, coordinates first, because every opening needs them."""
    found: dict[tuple[Any, ...], Part] = {}
    for part in sorted(parts, key=lambda part: not part.everywhere):
        box = (
            None
            if part.box is None
            else tuple(np.asarray(p).tobytes() if not isinstance(p, range) else p for p in part.box)
        )
        store: Any = part.array.store
        whole = store.namespace, part.array.path, None
        # all of an array includes each part of it
        if whole not in found:
            found.setdefault((*whole[:2], box), part)
    return list(found.values())


def _pin(parts: Sequence[Part], until: int | None, *, by_array: bool) -> None:
    places = [
        (store.cache_info()["cache_directory"], store.namespace, part.array.path if by_array else "")
        for part in parts
        if isinstance(store := part.array.store, CacheStore)
    ]
    # one pin for each source or array, however many parts of it are warmed
    for root, namespace, path in dict.fromkeys(places):
        if root is None:
            raise ValueError("pin is not accepted for a cache that is no directory: leave it out")
        pin_namespace(root, namespace, path, until)


# -- from what is given to parts


def _parts_of(
    source: Any, names: list[str] | None, selections: _Selections, settings: Mapping[str, Any]
) -> Iterator[Part]:
    if isinstance(source, xr.DataArray | xr.Dataset | xr.DataTree | zarr.Array | zarr.Group | CacheStore) and settings:
        given = ", ".join(sorted(settings))
        raise TypeError(f"{given} is not accepted for a {type(source).__name__}: it is as its store was opened")
    if isinstance(source, xr.DataArray):
        yield from _of_dataset(
            source.to_dataset(name="values" if source.name is None else source.name), names, selections
        )
    elif isinstance(source, xr.Dataset):
        yield from _of_dataset(source, names, selections)
    elif isinstance(source, xr.DataTree):
        yield from _of_tree(source, names, selections)
    elif isinstance(source, zarr.Array):
        yield from _of_arrays(source.store, {source.path: source}, "", names, selections)
    elif isinstance(source, zarr.Group):
        yield from _of_arrays(source.store, _arrays_beneath(source), source.path, names, selections)
    elif isinstance(source, Store | str | os.PathLike):
        if isinstance(source, str) and not source:
            raise ValueError("source='' is not accepted: give a dataset, a store, a URL or a path")
        store = source if isinstance(source, CacheStore) else _opened(source, settings)
        try:
            node = zarr.open(store, mode="r")
        except Exception as error:
            if (better := explained(error, store, source)) is not None:
                raise better from error
            raise
        arrays = {"": node} if isinstance(node, zarr.Array) else _arrays_beneath(node, names)
        yield from _of_arrays(store, arrays, "", names, selections)
    else:
        raise TypeError(f"source={source!r} is not accepted: give a dataset, a store, a URL or a path")


def _opened(source: Any, settings: Mapping[str, Any]) -> CacheStore:
    is_path = isinstance(source, str) and not is_url(source)
    is_path = is_path or (isinstance(source, os.PathLike) and not hasattr(source, "protocol"))
    return CacheStore(as_xarray(source) if is_path else source, **{"read_only": True, **settings})


def _arrays_beneath(group: zarr.Group, names: list[str] | None = None) -> dict[str, zarr.Array[Any]]:
    """The arrays of a group and its subgroups, by their paths from the root of the store."""
    try:
        members = group.members(max_depth=None)
    except Exception:
        if names is None:
            raise
        # a source that cannot be listed, without consolidated metadata
        found = ((name, group.get(name)) for name in names)
        return {node.path: node for _, node in found if isinstance(node, zarr.Array)}
    return {node.path: node for _, node in members if isinstance(node, zarr.Array)}


def _of_arrays(
    store: Store, arrays: dict[str, zarr.Array[Any]], top: str, names: list[str] | None, selections: _Selections
) -> Iterator[Part]:
    inner = {path.removeprefix(top).strip("/"): array for path, array in arrays.items()}
    if names is not None:
        inner = {path: inner[path] for name in names for path in _matching(name, inner)}
    if names is None and not selections:
        yield from (Part(array) for array in inner.values())
        return
    folders: dict[str, list[str]] = {}
    for array in inner.values():
        folder, _, name = array.path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    for folder, members in folders.items():
        try:
            opened = open_zarr(store, group=folder or None, chunks=None, decode_timedelta=False)
        except Exception:
            if selections:
                raise
            # without names of dimensions, xarray cannot open it; it has no coordinates either
            yield from (Part(array) for array in inner.values() if array.path.rpartition("/")[0] == folder)
            continue
        yield from _of_dataset(opened, members, selections)


def _matching(name: str, paths: Iterable[str]) -> list[str]:
    """The paths that a name means."""
    paths = list(paths)
    wanted = name.strip("/")
    if wanted in paths:
        return [wanted]
    if found := [path for path in paths if path.rpartition("/")[2] == wanted or path.startswith(f"{wanted}/")]:
        return found
    raise _unknown_variable(name, paths)


def _unknown_variable(name: str, known: Iterable[Any]) -> ValueError:
    names = sorted(map(str, known))
    hint = nearest(name, names, 0.6) or f", give one of {', '.join(map(repr, names[:8]))}"
    hint += f" and {len(names) - 8} more" if len(names) > 8 and "give" in hint else ""
    return ValueError(f"variables={name!r} is not accepted: the dataset has no such variable{hint}")


def _of_tree(tree: xr.DataTree, names: list[str] | None, selections: _Selections) -> Iterator[Part]:
    paths = {
        f"{node.path}/{name}".strip("/"): (node, str(name))
        for node in tree.subtree
        for name in node.to_dataset(False).variables
    }
    chosen = paths if names is None else {path: paths[path] for name in names for path in _matching(name, paths)}
    by_node: dict[str, tuple[xr.DataTree, list[str]]] = {}
    for node, name in chosen.values():
        by_node.setdefault(node.path, (node, []))[1].append(name)
    for node, members in by_node.values():
        yield from _of_dataset(node.to_dataset(), members, selections)


def _of_dataset(dataset: xr.Dataset, names: list[str] | None, selections: _Selections) -> Iterator[Part]:
    if names is not None:
        for name in names:
            if name not in dataset.variables:
                raise _unknown_variable(name, dataset.variables)
        dataset = dataset[names]
    selected = selections.of(_lazy(dataset)) if selections else dataset
    places: dict[tuple[int, str], tuple[Store, str, Any]] = {}
    for variable in dataset.variables.values():
        for array, _ in _behind(variable._data):
            folder = array.path.rpartition("/")[0]
            places[id(array.store), folder] = array.store, folder, array.metadata.zarr_format
    for label, variable in selected.variables.items():
        found = [Part(array, box) for array, box in _behind(variable._data)]
        if not found and label in dataset.xindexes:
            # each opening of the dataset reads an index as a whole
            indexes = [_array_at(*place, str(label)) for place in places.values()]
            found = [Part(array, everywhere=True) for array in indexes if array is not None]
        yield from found


def _array_at(store: Store, folder: str, zarr_format: Any, name: str) -> zarr.Array[Any] | None:
    try:
        found = zarr.open_group(store, path=folder, mode="r", zarr_format=zarr_format).get(name)
    except (FileNotFoundError, KeyError, ValueError):
        return None
    return found if isinstance(found, zarr.Array) else None


# -- from lazy data to positions


def _behind(data: Any) -> Iterator[tuple[zarr.Array[Any], tuple[Positions, ...]]]:
    """The arrays of cached stores that lazy data reads, and the positions that it needs of them."""
    if not hasattr(data, "__dask_graph__"):
        yield from _unwrapped(data, [])
        return
    graph = data.__dask_graph__()
    # only tasks that the data need: a selection leaves the rest of the graph in place
    needed = graph.cull(data.__dask_keys__()).to_dict() if hasattr(graph, "cull") else dict(graph)
    # the name that xarray gives to the array that Dask reads from
    originals = {key: value for key, value in needed.items() if isinstance(key, str) and key.startswith("original-")}
    for key, value in originals.items():
        reads = [slices for task in needed.values() if (slices := _slices(task, key)) is not None]
        original: Any = getattr(value, "value", value)
        if not reads and original.shape:
            raise ValueError(
                "the Dask graph of this dataset is not accepted, because it does not show which chunks it reads: give "
                "the dataset as it was opened, and sel"
            )
        # Dask's chunks along each dimension; a slice is no key of a set in Python 3.11
        spans = [sorted({(part.start, part.stop) for part in along}) for along in zip(*reads, strict=True)]
        hull = [np.unique(np.concatenate([np.arange(*span) for span in along])) for along in spans]
        yield from _unwrapped(original, [hull] if reads else [])


def _slices(task: Any, original: str) -> tuple[slice, ...] | None:
    """The slices that a task takes of an array; None if it takes none."""
    arguments = getattr(task, "args", task if isinstance(task, tuple) else ())
    if not any(
        getattr(each, "key", each) == original for each in arguments if isinstance(getattr(each, "key", each), str)
    ):
        return None
    for each in arguments:
        each = getattr(each, "value", each)
        if isinstance(each, tuple) and each and all(isinstance(part, slice) for part in each):
            return each
    return None


def _unwrapped(data: Any, keys: list[Any]) -> Iterator[tuple[zarr.Array[Any], tuple[Positions, ...]]]:
    keys = list(keys)
    while data is not None and not isinstance(data, zarr.Array):
        if (key := getattr(data, "key", None)) is not None:
            if type(key).__name__ == "VectorizedIndexer":
                raise ValueError(
                    "a selection of points is not accepted: give slices, labels or lists for each dimension"
                )
            keys.append(key.tuple)
        data = getattr(data, "array", getattr(data, "_array", None))
    if data is None or not isinstance(data.store, CacheStore):
        return
    box: list[Positions] = [range(length) for length in data.shape]
    axes = list(range(len(box)))
    for key in reversed(keys):
        if len(key) > len(axes):
            break
        kept = []
        for axis, along in zip(axes, key, strict=False):
            if isinstance(along, int | np.integer):
                box[axis] = box[axis][int(along) :][:1]
                continue
            if isinstance(along, slice):
                box[axis] = box[axis][along]
            elif along is not None:
                box[axis] = np.asarray(box[axis])[np.asarray(along)]
            kept.append(axis)
        # axes that a decoder adds, such as the characters of a string, have no key
        axes = [*kept, *axes[len(key) :]]
    yield data, tuple(box)


def _lazy(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with lazy arrays in place of Dask arrays that only read."""
    lazy = {}
    for name, variable in dataset.variables.items():
        given: Any = variable._data
        layers = getattr(getattr(given, "__dask_graph__", dict)(), "layers", {})
        original = [key for key in layers if str(key).startswith("original-")]
        if len(layers) == 2 and len(original) == 1 and given.name in layers:
            data = layers[original[0]][original[0]]
            data = getattr(data, "value", data)
            data = getattr(data, "array", None)
            if data is not None and data.shape == variable.shape:
                lazy[name] = xr.Variable(variable.dims, data, variable.attrs)
    coordinates = {name: variable for name, variable in lazy.items() if name in dataset.coords}
    others = {name: variable for name, variable in lazy.items() if name not in dataset.coords}
    return dataset.assign(others).assign_coords(coordinates)


# -- selections


class _Selections:
    """The user's selections by labels and positions; each must apply to at least one dataset."""

    def __init__(self, sel: Selection, isel: Selection) -> None:
        self._sel = _checked("sel", sel, _SEL)
        self._isel = _checked("isel", isel, _ISEL)
        self._used: set[str] = set()
        self._known: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._sel or self._isel)

    def of(self, dataset: xr.Dataset) -> xr.Dataset:
        """The selected part of a dataset."""
        self._known |= {str(name) for name in (*dataset.dims, *dataset.xindexes)}
        positions = {name: _positions(name, value) for name, value in self._isel.items() if name in dataset.dims}
        labels = {
            name: _labels(name, value, dataset.indexes[name]) if isinstance(value, _Text) else value
            for name, value in self._sel.items()
            if name in dataset.xindexes
        }
        self._used |= {*positions, *labels}
        for name, value in self._sel.items():
            if name in dataset.dims and name not in dataset.xindexes:
                raise ValueError(f"sel={name}={value} is not accepted: {name!r} has no labels, give isel")
        for kind, chosen in (("isel", positions), ("sel", labels)):
            for name, value in chosen.items():
                before = dataset
                try:
                    dataset = getattr(dataset, kind)({name: value})
                except (KeyError, IndexError, ValueError, TypeError) as error:
                    reason = " ".join(str(error).split())
                    raise ValueError(
                        f"{kind}={name}={_as_given(value)} is not accepted ({reason[:200]}): {_extent(before, name)}"
                    ) from None
                if 0 in dataset.sizes.values():
                    raise ValueError(
                        f"{kind}={name}={_as_given(value)} is not accepted, it selects nothing: {_extent(before, name)}"
                    )
        return dataset

    def check_used(self) -> None:
        """Raise `ValueError` for a name that is no dimension of any dataset."""
        for kind, names in (("sel", self._sel), ("isel", self._isel)):
            for name in names:
                if name not in self._used:
                    known = sorted(self._known)
                    hint = nearest(name, known, 0.6) or f", give one of {', '.join(map(repr, known))}"
                    raise ValueError(f"{kind}={name!r} is not accepted: there is no such dimension{hint}")


class _Text(str):
    """A selection as text from the command line."""

    __slots__ = ()


def _checked(name: str, given: Selection, accepted: str) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if not all(isinstance(key, str) for key in given):
            raise TypeError(f"{name}={given!r} is not accepted: give {accepted}")
        return dict(given)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name}={given!r} is not accepted: give {accepted}")
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = str(text).partition("=")
        if not (key.strip() and equals and value.strip()):
            raise ValueError(f"{name}={text!r} is not accepted: give {accepted}")
        if key.strip() in found:
            raise ValueError(f"{name}={text!r} is not accepted: {key.strip()!r} is given twice")
        found[key.strip()] = _Text(value.strip())
    return found


def _positions(name: str, value: Any) -> Any:
    if not isinstance(value, _Text):
        return value
    try:
        if ":" in value:
            return slice(*(int(part) if part else None for part in value.split(":")))
        return [int(part) for part in value.split(",")] if "," in value else int(value)
    except (ValueError, TypeError):
        raise ValueError(f'isel={name}={value} is not accepted: give "3", "0:24" or "0,6,12"') from None


def _labels(name: str, text: str, index: Any) -> Any:
    """Labels of an index as they are typed: one, several between commas, or a range with a colon."""
    kind = index.dtype.kind

    def label(part: str) -> Any:
        if kind in "iuf":
            return float(part) if kind == "f" else int(part)
        if kind == "M" or type(index).__name__ == "CFTimeIndex":
            if not _TIME.fullmatch(part):
                raise ValueError(part)
            return part
        return part

    ranges = [(text[:at], text[at + 1 :]) for at, character in enumerate(text) if character == ":"]
    whole = [] if kind in "OU" and ":" in text and text not in index else [text]
    for parts in [whole, *ranges]:
        try:
            found = [label(part.strip()) if part.strip() else None for part in parts]
        except ValueError:
            continue
        if len(found) == 2:
            return slice(*found)
        if found and found[0] is not None:
            return found[0]
    if "," in text:
        try:
            return [label(part.strip()) for part in text.split(",")]
        except ValueError:
            pass
    example = {"M": "2020-01-01:2020-02-01", "i": "10:20", "u": "10:20", "f": "10.5:20"}.get(kind, "a:b")
    raise ValueError(
        f"sel={name}={text} is not accepted: give a label, some between commas, or a range such as {example}"
    )


def _as_given(value: Any) -> str:
    if isinstance(value, slice):
        return ":".join("" if part is None else str(part) for part in (value.start, value.stop))
    return str(value)[:100]


def _extent(dataset: xr.Dataset, name: str) -> str:
    """The range of labels or positions along a dimension, for messages."""
    index = dataset.indexes.get(name)
    if index is None or not len(index):
        return f"{name!r} has {dataset.sizes.get(name, 0):,} positions"
    return f"{name!r} runs from {index[0]} to {index[-1]} in {len(index):,} steps"
