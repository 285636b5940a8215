"""Pin sources and arrays, so that eviction passes over them."""

from __future__ import annotations

import difflib
import os
import time
from datetime import timedelta
from typing import Any

from xzcache._config import shown_size
from xzcache.directory import PINNED_SHARE, Inspector, open_directory
from xzcache.manage._change import parse_since
from xzcache.manage._results import Pin, Pins, TooLarge, UnknownSource
from xzcache.manage._which import directory_of, find, is_there, must, root_of, settled, sources_of
from xzcache.model import metadata


def pin(
    source: Any,
    array: str | None = None,
    *,
    duration: str | float | timedelta | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Pins:
    """Keep a source, or one of its arrays, in the cache: eviction passes over pinned entries.

    Entries that are cached later are pinned as well. Pinned entries may take 80 % of the bound; entries beyond that are
    evicted like all others. A change at the source invalidates pinned entries too, and `clear` removes them.

    Parameters
    ----------
    source : str, Path or Store
        As for `ls`.
    array : str, optional
        The path of an array or group of the source. Default is all of the source.
    duration : str, timedelta or float, optional
        The time after which the pin ends: ``"7d"``, or a number of seconds. Default is until `unpin`.
    directory : str or Path, optional
        The cache directory. Default is that of a `CacheStore`, else this user's default cache on this machine.

    Returns
    -------
    Pins
        All pins of the cache.

    Raises
    ------
    LookupError
        No source, or more than one, has this name, or nothing of the array is cached.
    TooLarge
        Its cached entries take more than pins may; the message has the figures.
    CacheUnavailable
        The cache cannot be changed; the message says why.
    """
    seconds = None if duration is None else parse_since("duration", duration)
    until = None if seconds is None else time.time_ns() + int(seconds * 1e9)
    root = root_of(directory_of(source, directory))
    # what this process has read must be in the index before its bytes are compared with the bound
    settled(root)
    namespace = must(root, lambda: _namespace(root, source))
    path = "" if array is None else array.strip("/")
    must(root, lambda: _check(root, namespace, path))
    return pin_namespace(root, namespace, path, until)


def pin_namespace(root: str, namespace: str, path: str = "", until: int | None = None) -> Pins:
    """Pin a namespace or a path in it, of which nothing has to be cached yet."""
    name = f"{namespace}/{path}".rstrip("/")
    # "0" is the character after "/"
    spans = [(f"{name}/", f"{name}0")]
    if path:
        # without these documents, the array cannot be opened
        parts = path.split("/")[:-1]
        folders = ["/".join([namespace, *parts[:depth]]) for depth in range(len(parts) + 1)]
        keys = [f"{folder}/{document}" for folder in folders for document in sorted(metadata.DOCUMENTS)]
        spans += [(key, f"{key}\x01") for key in keys]
    must(root, lambda: open_directory(root).pin(name, spans, until))
    return pins(root)


def unpin(source: Any = None, array: str | None = None, *, directory: str | os.PathLike[str] | None = None) -> int:
    """End the pin of a source or of one of its arrays, or all pins; nothing is removed from the cache.

    Parameters
    ----------
    source : str, Path or Store, optional
        As for `ls`. Default is all pins.
    array : str, optional
        The array that was pinned. Default is the source and all its arrays.
    directory : str or Path, optional
        The cache directory. Default is that of a `CacheStore`, else this user's default cache on this machine.

    Returns
    -------
    int
        The number of pins that ended.

    Raises
    ------
    LookupError
        The source or the array is not pinned; the message names what is.
    CacheUnavailable
        The cache cannot be changed; the message says why.
    """
    root = root_of(directory_of(source, directory))
    known = pins(root)
    if source is None:
        names: list[str | None] = [None]
    else:
        namespace = must(root, lambda: _namespace(root, source, known))
        wanted = f"{namespace}/{array.strip('/')}" if array is not None else None
        chosen = [item for item in known if item.namespace == namespace and wanted in (None, item.path)]
        if not chosen:
            there = ", ".join(repr(item.path) for item in known) or "nothing"
            raise UnknownSource(f"{wanted or namespace!r} is not pinned: {there} is")
        names = [item.path for item in chosen]
    if not len(known):
        return 0
    opened = open_directory(root)
    return must(root, lambda: sum(map(opened.unpin, names)))


def pins(directory: str | os.PathLike[str] | None = None) -> Pins:
    """The pins of a cache. Creates, repairs and upgrades nothing."""
    root = root_of(directory)
    if not is_there(root):
        return Pins(root)

    def look() -> Pins:
        with Inspector(root) as inspector:
            found, size = inspector.pins()
            limit = None if (bound := inspector.totals().max_size) is None else int(bound * PINNED_SHARE)
        items = tuple(Pin(item.name, None if item.until is None else item.until / 1e9) for item in found)
        return Pins(root, items, size, limit)

    return must(root, look)


def _namespace(root: str, source: Any, known: Pins | None = None) -> str:
    with Inspector(root) as inspector:
        listed = sources_of(inspector, None)[0]
    if known is not None:
        # a pinned source may have no entries
        there = {item.namespace for item in listed}
        listed += [item.as_source() for item in known if item.namespace not in there]
    return find(source, listed, root).namespace


def _check(root: str, namespace: str, path: str) -> None:
    """Raise unless a path has cached entries and they fit into the share of pins."""
    with Inspector(root) as inspector:
        name = f"{namespace}/{path}".rstrip("/")
        beneath = inspector.objects(name, ())
        if path and not beneath.size:
            arrays = [node for node in inspector.nodes(namespace) if not metadata.is_document(node)]
            close = difflib.get_close_matches(path, arrays, 1) or arrays[:5]
            hint = f"did you mean {close[0]!r}?" if len(close) == 1 else f"it has {', '.join(map(repr, close))}"
            raise UnknownSource(f"nothing is cached of {path!r} in {namespace}: {hint}")
        bound, pinned = inspector.totals().max_size, inspector.pins()[1]
    wanted = pinned + beneath.size - beneath.pinned
    if bound is not None and wanted > bound * PINNED_SHARE:
        already = f" and {shown_size(pinned)} are pinned already" if pinned else ""
        raise TooLarge(
            f"{name} is too large to be pinned: it has {shown_size(beneath.size)}{already}, and pins may take "
            f"{shown_size(bound * PINNED_SHARE)}, {PINNED_SHARE:.0%} of the bound; pin an array, or `xzcache resize`"
        )
