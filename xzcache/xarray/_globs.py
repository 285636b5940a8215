"""Patterns of URLs, such as ``s3://bucket/*.zarr``: find the matching URLs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from fnmatch import fnmatchcase
from typing import Any, Final
from urllib.parse import unquote

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from xzcache.sources import open_source

_MEANS_MORE: Final = re.compile("[?#%]")


def is_pattern(url: str) -> bool:
    """Whether a URL stands for several."""
    # the query of a web page is none
    signs = "*[" if "http" in url.partition("://")[0] else "*?["
    return any(sign in url for sign in signs)


def expanded(pattern: str, storage_options: Any, upstream: str) -> list[str]:
    """The URLs that match a pattern, in order; one URL of the chain has wildcards in its path."""
    links = pattern.split("::")
    at = next(number for number, link in enumerate(links) if is_pattern(link))
    scheme, _, path = links[at].partition("://")
    parts = path.strip("/").split("/")
    depth = next(number for number, part in enumerate(parts) if is_pattern(part))

    def url(*below: str) -> str:
        if scheme in ("http", "https"):
            below = tuple(_MEANS_MORE.sub(lambda sign: f"%{ord(sign[0]):02X}", each) for each in below)
        link = f"{scheme}://{'/'.join([*parts[:depth], *below])}"
        return "::".join([*links[:at], link, *links[at + 1 :]])

    store = open_source(url(), storage_options, read_only=True, upstream=upstream)
    if isinstance(store, FsspecStore) and scheme in ("http", "https"):
        # fsspec returns names as the links of pages spell them
        found = sync(_listed(store, parts[depth:], unquote))
    elif isinstance(store, FsspecStore):
        found = sync(_globbed(store, parts[depth:]))
    else:
        found = sync(_listed(store, parts[depth:], str))
    return sorted(url(each) for each in found)


async def _globbed(store: Any, parts: list[str]) -> list[str]:
    # the listing cache may be outdated
    store.fs.invalidate_cache()
    base = str(store.path).rstrip("/")
    found = await store.fs._glob("/".join([base, *parts]).lstrip("/"))
    return [path.rstrip("/").removeprefix(base).strip("/") for path in found]


async def _listed(store: Store, parts: list[str], spelled: Callable[[str], str]) -> list[str]:
    found = [""]
    for part in parts:
        if part == "**":
            found = [place async for place in _beneath(store, found)]
            continue
        listed = [(above, spelled(name.rstrip("/"))) for above in found async for name in store.list_dir(above)]
        found = [_join(above, name) for above, name in listed if name == part or fnmatchcase(name, part)]
    return list(dict.fromkeys(found))


async def _beneath(store: Store, places: list[str]) -> AsyncIterator[str]:
    """Some directories, and everything beneath them."""
    for place in places:
        yield place
        async for below in _beneath(store, [_join(place, name.rstrip("/")) async for name in store.list_dir(place)]):
            yield below


def _join(above: str, name: str) -> str:
    return f"{above}/{name}".lstrip("/")
