"""Resolve the user's arguments to a cache directory and a source, and describe faults of the directory."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from zarr.abc.store import Store
from zarr.storage import LocalStore

from xzcache._caches import default_directory
from xzcache._config import as_found, parse_root
from xzcache.directory import CacheDirectory, Counts, Inspector, opened_directory, resolve_directory
from xzcache.local import LockedLocalStore
from xzcache.manage._results import Arrays, CacheUnavailable, Source, State, UnknownSource, display_names
from xzcache.model import META, Busy, CacheFault, Damaged, Foreign
from xzcache.sources import identify, is_url, path_of, shown, slug_of
from xzcache.store import CacheStore

T = TypeVar("T")

_DIGEST: Final = re.compile(r"(?<=.)-[0-9a-f]{20}(-\d+)?$")


def root_of(directory: Any) -> str:
    """The cache directory that the user's argument names."""
    if isinstance(directory, LockedLocalStore):
        return directory.directory.root
    if isinstance(directory, LocalStore):
        directory = directory.root
    with as_found():
        if directory is None:
            return resolve_directory(default_directory())
        return resolve_directory(str(parse_root(directory, "directory")))


def directory_of(source: Any, directory: Any) -> Any:
    if directory is None and isinstance(source, CacheStore):
        cache = source._cache
        if not isinstance(cache, LockedLocalStore):
            raise TypeError(f"{source!r} has no cache directory: its cache is a {type(cache).__name__}")
        return cache
    return directory


def settled(root: str) -> CacheDirectory | None:
    """Bring the index up to date with the reads of this process, so that figures are exact."""
    # only a directory that this process has opened: a call that looks must not open one
    opened = opened_directory(root)
    if opened is not None and opened.is_made and not opened.health.is_aside:
        opened.write_behind.wait()
        opened.flush(everything=True)
    return opened


def state_of(error: BaseException, root: str) -> tuple[State, str]:
    if isinstance(error, FileNotFoundError):
        return "absent", f"there is no cache in {root} yet: the first read through xzcache makes it"
    # an error of SQLite does not know the directory
    text = str(error) if root in str(error) else f"the cache in {root} cannot be used: {error}"
    if isinstance(error, Damaged):
        return "damaged", f"{text}; the next read through xzcache, or `xzcache check --repair`, rebuilds the index"
    if isinstance(error, Foreign):
        return "foreign", text
    return "busy" if isinstance(error, Busy) else "unusable", text


def is_there(root: str) -> bool:
    """Whether there is a cache, in any state; raises `CacheUnavailable` where the system does not tell."""
    try:
        os.lstat(f"{root}/{META}")
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise CacheUnavailable(f"{root} cannot be used: is a file, where a directory should be") from None
    except OSError as error:
        raise CacheUnavailable(f"{root} cannot be used: {error.strerror}") from error
    return True


def must(root: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except (CacheFault, OSError) as error:
        if isinstance(error, CacheUnavailable):
            raise
        raise CacheUnavailable(state_of(error, root)[1]) from error


def name_of(namespace: str) -> str:
    """The readable part of a namespace."""
    return _DIGEST.sub("", namespace) or "(top)"


def sources_of(inspector: Inspector, before: int | None = 0) -> tuple[list[Source], dict[str, tuple[int, int]]]:
    """The sources, and for each the entries and bytes not used since a time, in ns; with None, uses are not counted."""
    found = inspector.sources()
    uses = {} if before is None else inspector.uses(before)
    whole = sum(source.size for source in found)
    counts = inspector.statistics().of_sources
    listed = []
    old = {}
    for source in found:
        use = uses.get(source.id)
        last = use.last / 1e9 if use is not None and use.last else None
        name = name_of(source.namespace)
        share = source.size / whole if whole else 0.0
        count = counts.get(source.namespace, Counts())
        pinned = use.pinned if use is not None else 0
        listed.append(Source(name, source.namespace, source.entries, source.size, share, last, count, pinned))
        old[source.namespace] = (use.old_entries, use.old_size) if use is not None else (0, 0)
    return listed, old


def find(given: Any, sources: Sequence[Source], root: str) -> Source:
    """The source that the user's argument names; raises `UnknownSource` for none or several."""
    if isinstance(given, Source | Arrays):
        given = given.namespace if isinstance(given, Source) else given.source.namespace
    if isinstance(given, CacheStore):
        given = given.namespace
    elif isinstance(given, Store):
        given = identify(given).namespace
    if not isinstance(given, str | os.PathLike):
        accepted = "a name of `xzcache ls`, the URL or path of a source, or a store"
        raise TypeError(f"source={given!r} is not accepted: give {accepted}")
    text = os.fspath(given)
    # from the exact name to the vaguest match: the first kind that matches anything decides
    for candidates in _candidates(text):
        if len(matching := [source for source in sources if candidates(source)]) == 1:
            return matching[0]
        if matching:
            several = _listed([source.namespace for source in matching])
            raise UnknownSource(f"{shown(text)!r} matches {len(matching)} sources of {root}, give one of: {several}")
    names = display_names(sources)
    close = difflib.get_close_matches(_slug(text), names, 3, 0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {_listed(names)}"
    raise UnknownSource(f"no source of the cache in {root} is called {shown(text)!r}: {hint}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more if names else "none"


def _slug(text: str) -> str:
    return slug_of(shown(text).rstrip("/"))


def _candidates(text: str) -> Iterator[Callable[[Source], bool]]:
    yield lambda source: source.namespace == text
    yield lambda source: source.name == text
    if not is_url(text) and ("/" in text or os.path.exists(text)):
        namespace = identify(LocalStore(path_of(text))).namespace
        yield lambda source: source.namespace == namespace
    slug = _slug(text)
    if not text.strip("/"):
        return
    yield lambda source: source.name == slug
    if is_url(text):
        # the same place under another scheme, or at an endpoint of its own
        place = slug_of(shown(text).partition("://")[2].rstrip("/"))
        yield lambda source: bool(place) and f"-{source.name}-".endswith(f"-{place}-")
    else:
        yield lambda source: f"-{slug}-" in f"-{source.name}-"
        yield lambda source: slug in source.name or source.namespace.startswith(text)
