"""Entry points for xarray: the engine ``"zcache"``, and `open_zarr` and `open_mfdataset` through the cache.

A path, URL or store becomes a `CacheStore`, and xarray's own Zarr backend opens that store.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from glob import glob
from typing import TYPE_CHECKING, Any, Final

import xarray
import zarr
from xarray.backends.zarr import ZarrBackendEntrypoint
from zarr.abc.store import Store
from zarr.storage import LocalStore, StorePath

from xzcache._config import UNSET, chosen, config, parse_flag, refuse_misspelled
from xzcache._xarray_hook import attribute_warnings_to, is_ours, original
from xzcache.model import SourceUnreachable
from xzcache.pipeline import give, take
from xzcache.sources import as_xarray, is_url, path_of, scrub, shown
from xzcache.store import CacheStore
from xzcache.xarray._errors import explained, hint_of_groups, neighbours
from xzcache.xarray._globs import expanded, is_pattern
from xzcache.xarray._keywords import OpenMfdatasetKeywords, OpenZarrKeywords, tell_all

if TYPE_CHECKING:
    from typing import Unpack

    from xarray import Dataset, DataTree

    from xzcache.sources import SourceLike
    from xzcache.xarray._keywords import Paths


SETTINGS: Final = tuple(
    name for name in inspect.signature(CacheStore).parameters if name not in ("store", "storage_options")
)
"""The keywords of `CacheStore`."""

_PIPELINE: Final = "pipeline"
"""The keyword that turns `xzcache.pipeline.CachePipeline` on or off; the default is the setting of that name."""

_OWN: Final = tuple(name for name in inspect.signature(ZarrBackendEntrypoint.open_dataset).parameters if name != "self")

logger = logging.getLogger("xzcache.xarray")

Finish = Callable[[Any], Any]

_zarr: Final = ZarrBackendEntrypoint()


class ZcacheBackendEntrypoint(ZarrBackendEntrypoint):
    """The engine ``"zcache"``: Zarr, read through this machine's cache.

    Accepts all parameters of the engine ``"zarr"``, all keywords of `xzcache.CacheStore`, and ``pipeline=False`` to
    decode cached chunks with Zarr's pipeline instead of `xzcache.pipeline.CachePipeline`.
    """

    description = "Open Zarr through a cache that all processes on this machine share, using xzcache"
    url = ""
    # xarray reads the parameters from here: without the decoders, `decode_cf=False` would have no effect
    open_dataset_parameters = (*_OWN, *SETTINGS, _PIPELINE)
    is_zcache = True

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Always False: the engine is used only if it is named."""
        return False

    def open_dataset(self, filename_or_obj: Any, *, drop_variables: Any = None, **kwargs: Any) -> Dataset:
        if kwargs.get("store") is not None:
            # the store is open already, so no cache can be added
            return _zarr.open_dataset(filename_or_obj, drop_variables=drop_variables, **kwargs)
        with _through_cache(filename_or_obj, kwargs) as (store, rest, finish):
            opened: Dataset = finish(_zarr.open_dataset(store, drop_variables=drop_variables, **rest))
        _hint(opened, store, filename_or_obj, kwargs.get("group"))
        opened.encoding.update(_hidden(filename_or_obj))
        return opened

    def open_datatree(self, filename_or_obj: Any, **kwargs: Any) -> DataTree:
        with _through_cache(filename_or_obj, kwargs) as (store, rest, finish):
            opened = _zarr.open_datatree(store, **rest)
            for node in opened.subtree:
                finish(node)
        opened.encoding.update(_hidden(filename_or_obj))
        return opened

    def open_groups_as_dict(self, filename_or_obj: Any, **kwargs: Any) -> dict[str, Dataset]:
        with _through_cache(filename_or_obj, kwargs) as (store, rest, finish):
            opened = _zarr.open_groups_as_dict(store, **rest)
            for each in opened.values():
                finish(each).encoding.update(_hidden(filename_or_obj))
        return opened


def open_zarr(store: SourceLike, *args: Any, **kwargs: Unpack[OpenZarrKeywords]) -> Dataset:
    """Open a Zarr dataset through this machine's cache.

    Accepts all parameters of `xarray.open_zarr` and all keywords of `xzcache.CacheStore`.

    Parameters
    ----------
    store : Store, str, Path, UPath or FSMap
        A store, a path or a URL: what `xarray.open_zarr` or `xzcache.CacheStore` opens.

    Returns
    -------
    xarray.Dataset
        With Dask arrays whose names depend on the source and not on the cache.

    Raises
    ------
    FileNotFoundError
        The dataset does not exist.
    ValueError, TypeError
        A parameter is invalid; the message names it, its value and the accepted values.
    """
    given: dict[str, Any] = {**kwargs}
    refuse_misspelled("open_zarr", given, _OF_OPEN_ZARR)
    _check_engine(given.pop("engine", None))
    theirs = original()
    settings = {name: given.pop(name) for name in (*SETTINGS, _PIPELINE) if name in given}
    try:
        bound = inspect.signature(theirs).bind(store, *args, **given)
    except TypeError:
        # let xarray raise its own message
        refused: Dataset = theirs(store, *args, **given)
        return refused
    settings["storage_options"] = bound.arguments.pop("storage_options", None)
    with _through_cache(store, settings, bound.arguments.get("group")) as (cached, rest, finish):
        bound.arguments["store"] = cached
        opened: Dataset = finish(theirs(*bound.args, **bound.kwargs, **rest))
    _hint(opened, cached, store, bound.arguments.get("group"))
    if not isinstance(store, CacheStore):
        opened.encoding.pop("source", None)
        opened.encoding.update(_source(store))
    return opened


def open_mfdataset(paths: Paths, **kwargs: Unpack[OpenMfdatasetKeywords]) -> Dataset:
    """Open several Zarr datasets as one, through this machine's cache.

    Accepts all parameters of `xarray.open_mfdataset`, those of `xarray.open_dataset` that it passes on, and all
    keywords of `xzcache.CacheStore`.

    Parameters
    ----------
    paths : str, or nested list of Store, str, Path, UPath or FSMap
        A local or remote pattern such as ``"s3://bucket/*.zarr"``, or the datasets.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    OSError
        No dataset was found.
    """
    given: dict[str, Any] = {**kwargs}
    refuse_misspelled("open_mfdataset", given, _OF_OPEN_MFDATASET)
    _check_engine(given.pop("engine", None))
    storage_options = given.pop("storage_options", None)
    finish = _decoding_cached if chosen(_PIPELINE, given.pop(_PIPELINE, UNSET), parse_flag) else _decoding_plainly
    # `preprocess` runs where a dataset is opened, perhaps on a worker: there its arrays can be reached
    given["preprocess"] = partial(_finished, finish, given.get("preprocess"))
    # as `engine="zcache"` does: a path that does not exist must not be created
    settings = {"read_only": True, **{name: given.pop(name) for name in SETTINGS if name in given}}
    stores: dict[str, Any] = {}
    opened: list[CacheStore] = []

    def cached(item: Any) -> Any:
        if isinstance(item, list | tuple):
            return [cached(each) for each in item]
        if isinstance(item, CacheStore):
            return item
        name = os.fspath(item) if isinstance(item, str | os.PathLike) else None
        store = CacheStore(_as_xarray(item), storage_options=storage_options if is_url(item) else None, **settings)
        opened.append(store)
        # one store for each name, so that `attrs_file` finds the store of its dataset
        return stores.setdefault(name, store) if name is not None else store

    items: Any = paths
    if isinstance(items, str):
        items = _expanded(items, storage_options, settings.get("upstream", config.get("upstream")))
        if not items:
            raise OSError(f"no files to open: nothing matches {shown(str(paths))}")
    is_one = isinstance(items, os.PathLike | Store) or type(items).__name__ == "FSMap"
    datasets = cached([items] if is_one else list(items))
    if (first := given.get("attrs_file")) is not None:
        given["attrs_file"] = stores.get(os.fspath(first), first)
    try:
        return xarray.open_mfdataset(datasets, engine="zarr", **given)
    except FileNotFoundError as missing:
        for store in opened:
            if isinstance(store._store, LocalStore) and not store._store.root.exists():
                raise _absent(_root_of(store), store) from None
            _say(missing, store, store.source.label)
        for store in opened[:1]:
            if (better := explained(missing, store, store.path)) is not None:
                raise better from missing
        raise
    except Exception as error:
        for store in opened[:1]:
            _note_offline(error, store)
            if (better := explained(error, store, store.path)) is not None:
                for note in getattr(error, "__notes__", ()):
                    better.add_note(note)
                raise better from error
        raise


def _as_xarray(given: Any) -> Any:
    """The store argument as xarray passes it to Zarr: paths of any kind become strings."""
    is_path = isinstance(given, str) and given and not is_url(given)
    is_path = is_path or (isinstance(given, os.PathLike) and not hasattr(given, "protocol"))
    return as_xarray(given) if is_path else given


def _expanded(pattern: str, storage_options: Any, upstream: str) -> list[str]:
    """The paths or URLs that match a pattern, in order."""
    if not is_url(pattern):
        return sorted(glob(os.path.abspath(os.path.expanduser(pattern.removeprefix("file://")))))
    return expanded(pattern, storage_options, upstream) if is_pattern(pattern) else [pattern]


def _source(given: Any) -> dict[str, str]:
    """The source that xarray notes in the encoding, without credentials."""
    path = getattr(given, "path", given)
    if not isinstance(path, str | os.PathLike):
        return {}
    name = os.fspath(path)
    return {"source": shown(name) if "://" in name else os.path.abspath(os.path.expanduser(name))}


def _hidden(given: Any) -> dict[str, str]:
    """The source to note in place of xarray's own note, if that has credentials."""
    source = _source(given)
    return source if source.get("source") != getattr(given, "path", given) and "://" in str(source) else {}


def _check_engine(engine: object) -> None:
    if engine is not None and not is_ours(engine):
        raise ValueError(f"engine={engine!r} is not accepted: this function reads with 'zcache'")


@contextmanager
def _through_cache(
    given: Any, keywords: Mapping[str, Any], group: object = None
) -> Iterator[tuple[Any, dict[str, Any], Finish]]:
    """The store that xarray opens instead, its remaining keywords, and a function for the result."""
    refuse_misspelled("open_dataset", keywords, _OF_ENGINE)
    rest = {name: value for name, value in keywords.items() if name not in SETTINGS}
    finish = _decoding_cached if chosen(_PIPELINE, rest.pop(_PIPELINE, UNSET), parse_flag) else _decoding_plainly
    settings = {name: value for name, value in keywords.items() if name in SETTINGS}
    path = given.path if isinstance(given, StorePath) else ""
    source = given.store if isinstance(given, StorePath) else given
    options = rest.pop("storage_options", None)
    if rest.get("mode", "r") == "r":
        # otherwise a missing path would be created
        settings.setdefault("read_only", True)
    elif rest["mode"] == "r+" and isinstance(source, str | os.PathLike) and not is_url(source):
        name = path_of(as_xarray(source))
        if not os.path.exists(name):
            raise FileNotFoundError(f"{name} does not exist")
    if isinstance(source, CacheStore) and not settings.keys() - {"read_only"}:
        store = source
    else:
        store = CacheStore(_as_xarray(source), storage_options=options, **settings)
    try:
        yield StorePath(store, path) if path else store, rest, finish
    except (FileNotFoundError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        if missing and isinstance(store._store, LocalStore) and not store._store.root.exists():
            root = source.root if isinstance(source, LocalStore) else _root_of(store)
            raise _absent(root, store) from None
        if missing and isinstance(store._store, LocalStore) and store._store.root.is_file():
            text = "is a file and not a Zarr store: another engine may read it"
            raise FileNotFoundError(f"{_root_of(store)} {text}") from None
        _say(error, store, given)
        # of a path within a store, Zarr's message names it
        if not path and (better := explained(error, store, source)) is not None:
            raise better from error
        raise
    except Exception as error:
        _note_offline(error, store)
        if (better := explained(error, store, source, group or keywords.get("group"))) is not None:
            for note in getattr(error, "__notes__", ()):
                better.add_note(note)
            raise better from error
        raise


def _absent(root: object, store: CacheStore) -> FileNotFoundError:
    """The error for a local path that does not exist, in the words of xarray; a note has its neighbours."""
    error = FileNotFoundError(f"{root} does not exist")
    if hint := neighbours(store._store):
        error.add_note(hint.lstrip(",; "))
    return error


def _hint(opened: Dataset, store: Any, given: object, group: object) -> None:
    """Log which groups there are, for a dataset that is empty because its arrays are not at the root."""
    is_empty = not opened.variables and not group and isinstance(store, CacheStore)
    if is_empty and (hint := hint_of_groups(store, given)):
        logger.warning(hint)


def _note_offline(error: Exception, store: CacheStore) -> None:
    """Note in an error of a source that cannot be reached how to read what is cached of it."""
    is_of_arguments = isinstance(error, TypeError | ValueError | LookupError | AttributeError | FileNotFoundError)
    if is_of_arguments or isinstance(error, SourceUnreachable) or store.revalidate is False:
        return
    with suppress(Exception):
        # a hint to read offline helps only if there is something to read
        if store.cache_info()["cached_keys"]:
            error.add_note("revalidate=False reads what is cached of this source without asking it")


def _decoding_plainly(opened: Any) -> Any:
    """Remove the `xzcache.pipeline.CachePipeline` from the arrays of a dataset, or of a node of a tree."""
    for array in _arrays_of(opened):
        take(array)
    return opened


def _decoding_cached(opened: Any) -> Any:
    """Give the arrays of a dataset, or of a node of a tree, the `xzcache.pipeline.CachePipeline`."""
    for array in _arrays_of(opened):
        give(array)
    return opened


def _finished(finish: Finish, preprocess: Callable[[Dataset], Dataset] | None, opened: Dataset) -> Dataset:
    """A dataset as `xarray.open_mfdataset` combines it with others."""
    finish(opened)
    return opened if preprocess is None else preprocess(opened)


def _arrays_of(opened: Any) -> Iterator[zarr.Array[Any]]:
    """The Zarr arrays of a dataset or node, as far as they can be found; Zarr decodes the others as configured."""
    store: Any = getattr(opened._close, "__self__", None)
    if getattr(store, "_cache_members", False):
        # these are the array objects that are read, even by way of Dask's arrays
        yield from (member for member in store.members.values() if isinstance(member, zarr.Array))
        return
    for variable in opened.variables.values():
        inner = variable._data
        while inner is not None and not isinstance(inner, zarr.Array):
            inner = getattr(inner, "array", getattr(inner, "_array", None))
        if inner is not None:
            yield inner


def _root_of(store: CacheStore) -> str:
    return (store.path or store.source.label).removeprefix("file://")


def _say(error: Exception, store: CacheStore, given: object) -> None:
    """Name the user's argument in an error, without credentials."""
    if isinstance(given, str | os.PathLike) and not is_url(given):
        given = os.path.abspath(os.path.expanduser(os.fspath(given)))
    text = str(given) if isinstance(error, FileNotFoundError) else str(store._store)
    error.args = tuple(
        part.replace(repr(store), repr(given)).replace(str(store), text) if isinstance(part, str) else part
        for part in error.args
    )
    scrub(error, *(each for each in (given, getattr(given, "path", None)) if isinstance(each, str) and is_url(each)))


_OF_OPEN_ZARR: Final = tell_all(open_zarr, OpenZarrKeywords, original())
_OF_OPEN_MFDATASET: Final = tell_all(
    open_mfdataset,
    OpenMfdatasetKeywords,
    xarray.open_mfdataset,
    xarray.open_dataset,
    ZarrBackendEntrypoint.open_dataset,
)
_OF_ENGINE: Final = frozenset({*_OWN, *SETTINGS, _PIPELINE, *inspect.signature(_zarr.open_datatree).parameters})

# warnings of xarray are meant for the line of the user, which they find by the file of these functions
for _function in (
    open_zarr,
    open_mfdataset,
    ZcacheBackendEntrypoint.open_dataset,
    ZcacheBackendEntrypoint.open_datatree,
    ZcacheBackendEntrypoint.open_groups_as_dict,
):
    attribute_warnings_to(_function, ZarrBackendEntrypoint.open_dataset)
