"""Zarr metadata documents: recognize their keys, describe their arrays, and find the arrays that changed."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


DOCUMENTS: Final = frozenset({"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"})

_TELLING: Final = ("zarr.json", ".zarray", ".zmetadata", ".zattrs")

_PLACE: Final = re.compile(r"(^|/)(c(\.\d+)+|\d+(\.\d+)+)$|((^|/)\d+)+$")
"""The part of a chunk's key that gives the chunk's position in its array."""
# so that no document can have the digest of an absent one
_SALT: Final = {True: b"absent", False: b""}
_ATTRIBUTES: Final = ".zattrs"

_NODES: Final = {"zarr.json": b"3", ".zarray": b"2", ".zgroup": b"2"}
"""The Zarr format of the node that a document of this name creates."""

_FORMAT_OF: Final = {"zarr.json": b"3", ".zarray": b"2"}
"""The Zarr format of the array that a document of this name describes."""


# asked several times for each read
@lru_cache(maxsize=4096)
def is_document(key: str) -> bool:
    """Whether a key is a metadata document, of Zarr format 2 or 3."""
    return key.rpartition("/")[2] in DOCUMENTS


def is_json(document: bytes | memoryview) -> bool:
    """Whether a document is a JSON object; an error page of a proxy or half of a document is none."""
    try:
        return isinstance(json.loads(bytes(document)), dict)
    except (ValueError, RecursionError):
        return False


@lru_cache(maxsize=4096)
def is_chunk(key: str) -> bool:
    """Whether a key has the form of a chunk's key."""
    return not is_document(key) and _PLACE.search(key) is not None


def siblings(key: str) -> list[str]:
    """The keys of all other documents that the same node may have."""
    path, slash, own = key.rpartition("/")
    return [f"{path}{slash}{name}" for name in sorted(DOCUMENTS) if name != own]


def overriding_document(key: str) -> str | None:
    """The `zarr.json` that overrides this document of format 2 when both exist."""
    path, slash, name = key.rpartition("/")
    return f"{path}{slash}zarr.json" if name in DOCUMENTS and name != "zarr.json" else None


def fingerprint(document: bytes | memoryview | None) -> bytes:
    """A digest of a document, or of its absence."""
    return blake2b(b"absent" if document is None else document, digest_size=8, salt=_SALT[document is None]).digest()


def arrays_of(key: str) -> list[str]:
    """The paths of the arrays that a chunk may belong to, derived from its key."""
    path = _PLACE.sub("", key)
    # Zarr format 3 has its chunks beneath a "c", which format 2 may call an array
    return [path, path[:-1].rstrip("/")] if path == "c" or path.endswith("/c") else [path]


def array_documents(path: str) -> list[str]:
    """The keys of the documents of a node that may describe arrays."""
    slash = "/" if path else ""
    return [f"{path}{slash}{name}" for name in _TELLING]


class Description(NamedTuple):
    """The arrays that a metadata document describes."""

    arrays: dict[str, bytes]
    """For each array, by its path, the Zarr format and a digest of its description."""
    complete_beneath: str | None
    """The path beneath which no other arrays exist, for a consolidated document; else None."""
    attributes: dict[str, bytes]
    """For Zarr format 2: a digest of the attributes of each node, by the key of its `.zattrs`."""


def describe(key: str, document: bytes | None) -> Description:
    """The arrays that a document describes; `document` is None if the source does not have it.

    Attributes count as a part of the array, as in Zarr format 3: changing a scale factor changes the values.
    Consolidated and single documents give the same digest, so that opening a dataset either way does not look like a
    change.
    """
    path, _, name = key.rpartition("/")
    content = _parse(document)
    if name == "zarr.json":
        if content.get("node_type") == "array":
            return Description({path: _FORMAT_OF[name] + _digest(content)}, None, {})
        consolidated = _mapping(content.get("consolidated_metadata")).get("metadata")
        if isinstance(consolidated, dict):
            nodes = {_join(path, child): doc for child, doc in consolidated.items() if isinstance(doc, dict)}
            arrays = {node: b"3" + _digest(doc) for node, doc in nodes.items() if doc.get("node_type") == "array"}
            return Description(arrays, path, {})
    elif name == ".zarray" and content:
        return Description({path: _FORMAT_OF[name] + _digest(content)}, None, {})
    elif name == ".zmetadata" and content:
        nodes = _mapping(content.get("metadata"))
        arrays = {
            _join(path, child.removesuffix(".zarray").rstrip("/")): b"2" + _digest(doc)
            for child, doc in nodes.items()
            if child.rpartition("/")[2] == ".zarray"
        }
        attributes = {
            _attributes_of(node): _digest(nodes.get(_attributes_of(node.removeprefix(path).strip("/")), {}))
            for node in arrays
        }
        return Description(arrays, path, attributes)
    elif name == _ATTRIBUTES:
        return Description({}, None, {key: _digest(content)})
    return Description({}, None, {})


class Grid(NamedTuple):
    """The shape of an array and of the objects that hold it; `sharded` objects hold several chunks each."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...] | None
    """The shape of one object; None if the document does not tell one shape for all."""
    dtype: str
    sharded: bool

    @property
    def objects(self) -> int | None:
        """The number of objects of the array; None if it is unknown."""
        if self.chunks is None or len(self.chunks) != len(self.shape) or min(self.chunks, default=1) < 1:
            return None
        return math.prod(-(-length // chunk) for length, chunk in zip(self.shape, self.chunks, strict=True))


def grids(key: str, document: bytes) -> dict[str, Grid]:
    """The arrays that a document describes, by their paths."""
    path, _, name = key.rpartition("/")
    content = _parse(document)
    nodes: dict[str, object] = {}
    if name == "zarr.json":
        nodes = {"": content, **_mapping(_mapping(content.get("consolidated_metadata")).get("metadata"))}
    elif name == ".zarray":
        nodes = {"": content}
    elif name == ".zmetadata":
        found = _mapping(content.get("metadata")).items()
        nodes = {key.removesuffix(".zarray").rstrip("/"): doc for key, doc in found if key.endswith(".zarray")}
    known = {_join(path, node): _grid(_mapping(doc)) for node, doc in nodes.items()}
    return {node: grid for node, grid in known.items() if grid is not None}


def _grid(content: dict[str, Any]) -> Grid | None:
    shape = _lengths(content.get("shape"))
    if shape is None or content.get("node_type", "array") != "array":
        return None
    if "chunk_grid" not in content:
        return Grid(shape, _lengths(content.get("chunks")), str(content.get("dtype", "")), False)
    grid, codecs = _mapping(content.get("chunk_grid")), content.get("codecs")
    chunks = _lengths(_mapping(grid.get("configuration")).get("chunk_shape")) if grid.get("name") == "regular" else None
    names = [_mapping(codec).get("name") for codec in codecs] if isinstance(codecs, list) else []
    dtype = content.get("data_type", "")
    return Grid(shape, chunks, str(_mapping(dtype).get("name", dtype) if dtype else ""), "sharding_indexed" in names)


def _lengths(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(type(length) is int and length >= 0 for length in value):
        return None
    return tuple(value)


def changed_arrays(
    key: str,
    described: Description,
    known: Callable[[str], bytes | None],
    beneath: Callable[[str], Iterable[str]],
    *,
    gone: bool,
) -> list[str]:
    """The paths of the arrays that a document shows to have changed or to be gone.

    `known` returns the digest that is recorded for a path, or None. `beneath` returns the recorded array paths beneath
    a path. `gone` says that the document existed before and does not exist any more.
    """
    changed = [path for path, digest in described.arrays.items() if known(path) != digest]
    if described.complete_beneath is not None:
        changed += [path for path in beneath(described.complete_beneath) if path not in described.arrays]
    for document, digest in described.attributes.items():
        path = document.rpartition("/")[0]
        # the attributes of a group apply to no array
        if path not in changed and known(document) not in (None, digest) and known(path) is not None:
            changed.append(path)
    own, _, name = key.rpartition("/")
    # an array of the other format is not gone because it has no document of this name
    if not described.arrays and (known(own) or b"").startswith(_FORMAT_OF.get(name, b"none")):
        changed.append(own)
    if gone and name in _NODES:
        # all arrays beneath a deleted node are gone, even if the node is created again
        kind = _NODES[name]
        changed += [path for path in beneath(own) if path not in changed and (known(path) or b"").startswith(kind)]
    return [path for path in changed if path.rpartition("/")[2] != _ATTRIBUTES]


def _parse(document: bytes | None) -> dict[str, Any]:
    try:
        return _mapping(json.loads(document)) if document is not None else {}
    except (ValueError, RecursionError):
        return {}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def of_array(path: str) -> tuple[str, str]:
    """The two names under which the digests of an array and of its attributes are recorded."""
    return path, _attributes_of(path)


def _attributes_of(path: str) -> str:
    return f"{path}/{_ATTRIBUTES}".lstrip("/")


def _join(path: str, child: str) -> str:
    return f"{path}/{child}".strip("/")


def _digest(content: object) -> bytes:
    # sorted, because writers put the same members in different orders
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()
