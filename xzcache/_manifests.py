"""What tells a store of VirtualiZarr's, whose chunks are parts of other files, from all others: its references."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

from xzcache._urls import without_user


def manifest_parts(store: Any, known: Callable[[Any], Iterator[str]]) -> Iterator[str]:
    """The references of a `ManifestStore`, and where they lead.

    Parameters
    ----------
    store : virtualizarr.manifests.ManifestStore
    known : callable
        What tells an object store from others.

    Raises
    ------
    AttributeError, TypeError
        The store is laid out in another way than in the versions that are known here.
    """
    yield "virtual"
    yield from _group(store._group)
    for (scheme, host), entry in sorted(store._registry.map.items(), key=lambda item: str(item[0])):
        yield f"{scheme}://{without_user(host)}"
        for each in entry.iter_stores():
            yield from known(each)


def _group(group: Any) -> Iterator[str]:
    yield json.dumps(group.metadata.to_dict(), sort_keys=True, default=str)
    for name, member in sorted(group.items()):
        yield name
        if (manifest := getattr(member, "manifest", None)) is None:
            yield from _group(member)
            continue
        yield json.dumps(member.metadata.to_dict(), sort_keys=True, default=str)
        references = blake2b(digest_size=16)
        for path in manifest._paths.flat:
            references.update(f"{path}\0".encode())
        references.update(manifest._offsets.tobytes() + manifest._lengths.tobytes())
        for where, data in sorted(manifest._inlined.items()):
            references.update(repr(where).encode() + bytes(data))
        yield references.hexdigest()
