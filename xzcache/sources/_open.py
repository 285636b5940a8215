"""Opening sources: a Zarr store from the user's argument."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping
from html import unescape
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeAlias
from urllib.parse import unquote

import zarr.storage
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath

from xzcache._config import nearest
from xzcache.sources._obstore import SCHEMES, Untranslatable, object_store
from xzcache.sources._urls import certain, check_options, links, plain, scrub, shown, without_colons

logger = logging.getLogger("xzcache.sources")


class HasFileSystem(Protocol):
    """A path within a file system of fsspec, such as a `UPath`."""

    @property
    def protocol(self) -> str: ...

    @property
    def fs(self) -> Any: ...

    @property
    def path(self) -> str: ...


SourceLike: TypeAlias = Store | StorePath | str | os.PathLike[str] | HasFileSystem | MutableMapping[str, Any]
"""The kinds of arguments for a source: a store, a path, a URL, a UPath, an FSMap, or a dictionary of buffers."""

_ALIASES: Final = (("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss", "adl"), ("http", "https"))
_EXTRAS: Final = {"gcs": ("gs", "gcs"), "azure": ("az", "abfs", "abfss", "adl")}
"""The extra of the package for those schemes that `remote` does not serve."""
_ENDPOINT_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_ACCEPTED: Final = "a Zarr store, a path, a URL such as 's3://bucket/x.zarr', a UPath or an FSMap"


_SLASH_MISSING: Final = re.compile(rf"({'|'.join(SCHEMES)}):/*", re.IGNORECASE)


def is_url(store: object) -> bool:
    """Whether a string is a URL or a chain of URLs, and not a path."""
    if not isinstance(store, str) or store.startswith(("file://", "/", ".", "~")):
        return False
    return "://" in store or "::" in store


def is_at_hand(store: Store) -> bool:
    """Whether a request to a store costs as little as a lookup: a directory of this machine, or memory."""
    return type(store) in (LocalStore, MemoryStore)


def local_path(store: object) -> str | None:
    """The absolute path, with links, of a local path; None for other arguments."""
    if isinstance(store, str) and (is_url(store) or store.startswith("file://")):
        return None
    return os.path.abspath(path_of(store)) if isinstance(store, str | Path) else None


def path_of(path: str | os.PathLike[str]) -> str:
    """The local path of a path or of a ``file`` URL, as Zarr finds it.

    Recent versions of Zarr parse a string as a URL, whose ``#`` or ``?`` ends the path. A `pathlib.Path` is a path.
    """
    if isinstance(path, str):
        try:
            from zarr.storage._utils import parse_store_url
        except ImportError:
            # older versions of Zarr take a string as a path, without parsing it
            path = path.removeprefix("file://")
        else:
            parsed = parse_store_url(path)
            local = parsed.path if parsed.scheme in ("", "file") else ""
            path = local or path.removeprefix("file://")
    return os.path.expanduser(os.fspath(path))


def _lacks_slashes(text: str) -> bool:
    """Whether a string is a URL without slashes, and not an existing path."""
    return _SLASH_MISSING.match(text) is not None and not os.path.exists(path_of(text))


def as_xarray(path: str | os.PathLike[str]) -> str:
    """A path as xarray passes it to Zarr: an absolute string."""
    text = os.fspath(path)
    return text if text.startswith("file://") or _lacks_slashes(text) else os.path.abspath(os.path.expanduser(text))


def spelled(store: object) -> str | None:
    """A URL as the user gave it, without credentials; None for other arguments."""
    return shown(store).rstrip("/") if isinstance(store, str) else None


def open_source(store: Any, storage_options: Any, *, read_only: bool, upstream: str = "auto") -> Store:
    """Open a source as a Zarr store.

    Parameters
    ----------
    store : Any
    storage_options : mapping or None
        For a URL only.
    read_only : bool
    upstream : {"auto", "obstore", "fsspec"}
        The library that reads a URL.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter, the value and what is accepted.
    ImportError
        A URL needs a package that is not installed.
    """
    if is_url(store):
        if storage_options is not None and not isinstance(storage_options, Mapping):
            # never with its value, which may be a secret
            kind = type(storage_options).__name__
            raise TypeError(f"storage_options is a {kind}, which is not accepted: give a mapping of options")
        options = _copied(storage_options or {})
        check_options(options)
        url = plain(certain(store, "store"))
        if any(link.scheme in ("s3", "s3a") for link in links(url)):
            _check_endpoints(options)
        return _from_url(url, options, read_only=read_only, upstream=upstream)
    if isinstance(store, str) and _lacks_slashes(store):
        # never with its value, if that may be a secret
        meant = _SLASH_MISSING.sub(r"\1://", store)
        hint = f": give {_ACCEPTED}" if "@" in store else f", did you mean {shown(meant)}?"
        raise ValueError(f"store is not accepted, neither an existing path nor a URL (no slashes){hint}")
    if storage_options is not None:
        is_path = isinstance(store, str | os.PathLike)
        kind = "path" if is_path else f"{type(store).__name__}, which has its options already"
        raise TypeError(f"storage_options goes with a URL only, such as s3://bucket/key: store is a {kind}")
    if isinstance(store, StorePath):
        if store.path:
            raise ValueError(f"store={store.path!r} is a path within a store: give the store itself")
        return store.store
    if type(store) is LocalStore:
        if os.path.realpath(store.root) == str(store.root) and store.read_only >= read_only:
            return store
        # a read-only store does not create the directory
        return _local(store.root, read_only=read_only or store.read_only)
    if isinstance(store, Store):
        if type(store) is FsspecStore:
            _check_path(store.fs, store.path)
        inner: Any = getattr(store, "store", None)
        if type(inner).__name__ == "HTTPStore":
            certain(str(inner.url), "store")
        return store
    if isinstance(store, dict) and all(isinstance(value, Buffer) for value in store.values()):
        return MemoryStore(store, read_only=read_only)
    if isinstance(store, str):
        if not store:
            raise ValueError(f"store='' is not accepted: give {_ACCEPTED}")
        return _local(store, read_only=read_only)
    if type(store).__name__ == "FSMap":
        _check_path(store.fs, store.root)
        return FsspecStore.from_mapper(store, read_only=read_only)
    if hasattr(store, "protocol") and hasattr(store, "fs") and hasattr(store, "path"):
        if store.protocol in ("", "file", "local"):
            return _local(Path(store.path), read_only=read_only)
        _check_path(store.fs, store.path)
        return FsspecStore.from_upath(store, read_only=read_only)
    if isinstance(store, os.PathLike):
        return _local(store, read_only=read_only)
    # never with its value, which may be a secret
    raise TypeError(f"store is a {type(store).__name__}, which is not accepted: give {_ACCEPTED}")


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    # fsspec modifies its arguments
    return {name: _copied(value) if type(value) is dict else value for name, value in options.items()}


def _check_endpoints(options: Mapping[str, Any]) -> None:
    """Reject the address of an S3 server without its scheme, which no client reads; the message names the option."""
    given = list(_endpoints(options))
    if not given and os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
        given = [(name, os.environ.get(name)) for name in _ENDPOINT_VARIABLES]
    for name, address in given:
        if isinstance(address, str) and address and "://" not in address:
            # an address with a user may have a password
            shown_address = "..." if "@" in address else address
            raise ValueError(
                f"{name}={shown_address!r} is not accepted, it has no scheme: give 'https://{shown_address}' or "
                f"'http://{shown_address}'"
            )


def _endpoints(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    # the options of a chained URL, and those of its client, are mappings within
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _endpoints(value)
        elif name in ("endpoint_url", "endpoint"):
            yield name, value


def folder_of(source: Store) -> tuple[Store, str] | None:
    """The folder of a source, as a store, and the name of the source in it; None if the source lies in no folder."""
    if isinstance(source, LocalStore):
        return LocalStore(source.root.parent, read_only=True), source.root.name
    if isinstance(source, WebStore):
        folder, _, name = source.url.rstrip("/").rpartition("/")
        return None if folder.endswith("/") else (WebStore(source.store, folder, read_only=True), name)
    if isinstance(source, FsspecStore):
        folder, _, name = source.path.rstrip("/").rpartition("/")
        # a bucket and a server lie in no folder
        is_top = not folder.strip("/") or folder.endswith("/")
        return None if is_top else (FsspecStore(source.fs, read_only=True, path=folder), name)
    remote: Any = getattr(source, "store", None)
    if prefix := getattr(remote, "prefix", None):
        folder, _, name = str(prefix).strip("/").rpartition("/")
        arguments, options = remote.__getnewargs_ex__()
        again = type(remote)(*arguments, **{**options, "prefix": folder or None})
        return zarr.storage.ObjectStore(again, read_only=True), name
    return None


def _local(path: str | os.PathLike[str], *, read_only: bool) -> Store:
    # resolve the path now: a change of the working directory or of a link must not change it
    place = os.path.realpath(path_of(path))
    # otherwise each read would fail with an error about a directory
    if os.path.isfile(place):
        raise ValueError(f"store={os.fspath(path)!r} {_format_of_file(place)}")
    return LocalStore(Path(place), read_only=read_only)


class _Format(NamedTuple):
    """A format of files that are no Zarr stores."""

    name: str
    advice: str
    beginnings: tuple[bytes, ...]
    endings: tuple[str, ...]


_FORMATS: Final = (
    _Format(
        "a NetCDF file", 'xr.open_dataset(..., engine="netcdf4")', (b"CDF\x01", b"CDF\x02", b"CDF\x05"), (".nc", ".cdf")
    ),
    _Format(
        "a NetCDF or HDF5 file",
        'xr.open_dataset(..., engine="h5netcdf")',
        (b"\x89HDF\r\n",),
        (".nc4", ".h5", ".hdf5", ".he5", ".hdf"),
    ),
    _Format("a GRIB file", 'xr.open_dataset(..., engine="cfgrib")', (b"GRIB",), (".grib", ".grib2", ".grb", ".grb2")),
    _Format("a TIFF file", "rioxarray.open_rasterio(...)", (b"II*\0", b"MM\0*"), (".tif", ".tiff")),
    _Format(
        "a zip file", 'zarr.storage.ZipStore(..., mode="r") as the store', (b"PK\x03\x04", b"PK\x05\x06"), (".zip",)
    ),
    _Format(
        "an HTML page", "the address of the data themselves", (b"<!DOCTYPE", b"<!doctype", b"<html"), (".html", ".htm")
    ),
    _Format(
        "a JSON file",
        '"reference://" with storage_options={"fo": ...} if these are references of kerchunk',
        (b"{",),
        (".json",),
    ),
    _Format("a Parquet file", "pandas.read_parquet(...)", (b"PAR1",), (".parquet",)),
)


def _format_of_file(path: str) -> str:
    """What to say of a file, by its first bytes."""
    try:
        with open(path, "rb") as file:
            first = file.read(16).lstrip()
    except OSError:
        first = b""
    for each in _FORMATS:
        if first.startswith(each.beginnings):
            return f"is {each.name}, not a Zarr store: use {each.advice}"
    return "is a file, not a Zarr store: give a directory or a URL"


def format_by_name(name: str) -> str | None:
    """What to say of a source in which no Zarr store was found, if its name is that of a file."""
    for each in _FORMATS:
        if name.lower().endswith(each.endings):
            return f"this is {each.name} by its name, not a Zarr store: use {each.advice}"
    return None


def _check_path(fs: Any, path: str) -> None:
    """Reject a user name and a password in the path of an fsspec object."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    if "://" in path or protocol in SCHEMES:
        certain(path if "://" in path else f"{protocol}://{path}", "store")


def _from_url(url: str, options: dict[str, Any], *, read_only: bool, upstream: str) -> Store:
    outermost, *further = links(url)
    scheme = outermost.scheme if not further else ""
    if upstream != "fsspec":
        try:
            if scheme not in SCHEMES:
                raise Untranslatable(f"obstore does not read the scheme {scheme!r}: {', '.join(SCHEMES)}")
            configured = {**_configured(scheme), **options}
            return _over_obstore(url, configured, read_only=read_only, sure=upstream == "obstore")
        except Untranslatable as reason:
            if upstream == "obstore":
                raise ValueError(f"upstream='obstore' cannot read this: {reason}. Give 'auto' or 'fsspec'") from None
            logger.debug("%s is read with fsspec: %s", shown(url), reason)
        except ImportError:
            if upstream == "obstore":
                raise
    try:
        return _over_fsspec(url, options, read_only=read_only)
    except ImportError as missing:
        if upstream == "auto" and scheme in SCHEMES:
            try:
                # no other library is installed, so obstore must find the credentials itself
                return _over_obstore(url, options, read_only=read_only, sure=True)
            except (Untranslatable, ImportError) as reason:
                extra = next((extra for extra, names in _EXTRAS.items() if scheme in names), "remote")
                raise ImportError(
                    f"{shown(url)} needs a package that reads it: pip install 'xzcache[{extra}]' ({missing}; {reason})"
                ) from missing
        raise


def _over_obstore(url: str, options: Mapping[str, Any], *, read_only: bool, sure: bool) -> Store:
    remote = object_store(url, options, sure=sure)
    if url.startswith(("http://", "https://")):
        return WebStore(remote, url, read_only=read_only)
    return zarr.storage.ObjectStore(remote, read_only=read_only)


def _configured(scheme: str) -> dict[str, Any]:
    """The options for a scheme from fsspec's configuration."""
    from fsspec.config import conf

    names = next((names for names in _ALIASES if scheme in names), (scheme,))
    return {option: value for name in names for option, value in conf.get(name, {}).items()}


def _over_fsspec(url: str, options: dict[str, Any], *, read_only: bool) -> Store:
    import fsspec

    first = links(url := without_colons(url))[0]
    outermost = first.scheme or first.text
    try:
        kind = fsspec.get_filesystem_class(outermost)
    except ValueError:
        if hint := nearest(outermost, SCHEMES):
            raise ValueError(f"store is a URL of the scheme {outermost!r}, which nothing here reads{hint}") from None
        known = ", ".join(sorted(set(fsspec.available_protocols()) - set(SCHEMES)))
        raise ValueError(
            f"store is a URL of the scheme {outermost!r}, which nothing here reads. obstore (in 'xzcache[remote]') "
            f"reads {', '.join(SCHEMES)}; fsspec knows {known}, most of them with a package of their own"
        ) from None
    if outermost in SCHEMES:
        # the listing cache may be outdated
        options = {"use_listings_cache": False, **options}
    if outermost in ("s3", "s3a") and "max_concurrency" in inspect.signature(kind.__init__).parameters:
        # s3fs requests the size of every object first, unless it must not split them
        options = {"max_concurrency": 1, **options}
    try:
        return FsspecStore.from_url(url, storage_options=options, read_only=read_only)
    except Exception as error:
        # the text may hold the URL of a file of references
        if (scrubbed := scrub(error, url)) is error:
            raise
    raise scrubbed


class WebStore(zarr.storage.ObjectStore[Any]):
    """A web server: obstore reads from it, and fsspec lists it by the links of its pages."""

    def __init__(self, store: Any, url: str, *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.url = url

    def with_read_only(self, read_only: bool = False) -> WebStore:
        return type(self)(self.store, self.url, read_only=read_only)

    def linked(self) -> Store:
        """The same server through fsspec."""
        headers = dict((self.store.client_options or {}).get("default_headers") or {})
        text = {name: value.decode("latin-1") if isinstance(value, bytes) else value for name, value in headers.items()}
        options = {"client_kwargs": {"headers": text}} if text else {}
        return FsspecStore.from_url(self.url, storage_options=options, read_only=True)

    def list(self) -> AsyncIterator[str]:  # type: ignore[override]
        return _named(self.linked().list())

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:  # type: ignore[override]
        return _named(self.linked().list_prefix(prefix))

    def list_dir(self, prefix: str) -> AsyncIterator[str]:  # type: ignore[override]
        return _named(self.linked().list_dir(prefix))

    async def getsize_prefix(self, prefix: str) -> int:
        return await self.linked().getsize_prefix(prefix)


async def _named(links: AsyncIterator[str]) -> AsyncIterator[str]:
    """Keys, from how pages spell them in links."""
    async for link in links:
        yield unquote(unescape(link))
