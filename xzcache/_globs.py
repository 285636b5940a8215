"""Patterns of URLs, such as ``s3://bucket/*.zarr``: what there is that they stand for."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from zarr.abc.store import Store
from zarr.core.sync import sync

from xzcache._sources import open_source


def is_pattern(url: str) -> bool:
    """Whether a URL stands for several."""
    # the query of a web page is none
    signs = "*[" if "http" in url.partition("://")[0] else "*?["
    return any(sign in url for sign in signs)


def expanded(pattern: str, storage_options: Any, upstream: str) -> list[str]:
    """The URLs that a pattern stands for, in order.

    Parameters
    ----------
    pattern : str
        A URL, or a chain of them, of which one has wildcards in its path.
    storage_options : mapping or None
    upstream : {"auto", "obstore", "fsspec"}
    """
    links = pattern.split("::")
    at = next(number for number, link in enumerate(links) if is_pattern(link))
    scheme, _, path = links[at].partition("://")
    parts = path.strip("/").split("/")
    depth = next(number for number, part in enumerate(parts) if is_pattern(part))

    def url(*below: str) -> str:
        link = f"{scheme}://{'/'.join([*parts[:depth], *below])}"
        return "::".join([*links[:at], link, *links[at + 1 :]])

    store = open_source(url(), storage_options, read_only=True, upstream=upstream)
    if hasattr(store, "fs"):
        # what was listed before may have grown
        store.fs.invalidate_cache()
    return sorted(url(each) for each in sync(_matches(store, parts[depth:])))


async def _matches(store: Store, parts: list[str]) -> list[str]:
    found = [""]
    for part in parts:
        if is_pattern(part):
            listed = [(above, name.rstrip("/")) for above in found async for name in store.list_dir(above)]
        else:
            listed = [(above, part) for above in found]
        found = [f"{above}/{name}".lstrip("/") for above, name in listed if name == part or fnmatchcase(name, part)]
    return list(dict.fromkeys(found))
