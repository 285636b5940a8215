"""Freshness: when metadata documents must be revalidated, and which documents a store and its copies have seen."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import Counter
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from zarr.core import codec_pipeline

from xzcache.model import fingerprint, is_document

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.abc.store import Store
    from zarr.core.array_spec import ArraySpec

    from xzcache._config import Revalidate


# 511 bytes in each pickled copy of a store, which Dask sends to its workers
_CARRIED: Final = 85
_DIGEST: Final = 3
_LENGTH: Final = 1 + _CARRIED * 2 * _DIGEST

_RULES: Final = "zarr.json"
"""The document that overrides those of format 2 beside it."""

_WRITING: Final = ("write", "_encode_partial")
"""Parts of the names of Zarr functions that read a chunk to change a part of it."""
_EITHER: Final = ("_fetch_and_decode_as_completed",)
"""Functions of Zarr's `FusedCodecPipeline` that read for reads and for writes."""
_DEEPEST: Final = 32
"""The most frames to check; fewer lie between a store and Zarr's task."""


class Seen:
    """The documents that a store has seen, for its copies in other processes and on other machines.

    A fixed-size table of 3-byte key and 3-byte content hashes. A collision, or a state that is not recognized, costs
    one more request.
    """

    def __init__(self, packed: bytes = bytes(_LENGTH)) -> None:
        self.packed = packed
        pairs = (packed[at : at + 2 * _DIGEST] for at in range(1, len(packed), 2 * _DIGEST))
        self._states = {pair[:_DIGEST]: pair[_DIGEST:] for pair in pairs if any(pair)}
        self.more = packed[:1] == b"\1"
        """Whether there were more documents than there was room for."""

    @classmethod
    def of(cls, states: dict[bytes, bytes], *, more: bool) -> Seen:
        """Of states of documents by the digests of their keys, the latest last."""
        kept = list(states.items())[-_CARRIED:]
        entries = b"".join(key + state for key, state in kept).ljust(_LENGTH - 1, b"\0")
        return cls(bytes([more or len(kept) < len(states)]) + entries)

    def __bool__(self) -> bool:
        return bool(self._states)

    def states(self) -> dict[bytes, bytes]:
        """States of documents by the digests of their keys."""
        return dict(self._states)

    def state(self, key: str) -> bytes | None:
        """The first bytes of a document's state when it was seen; None if it was not, or did not fit."""
        return self._states.get(_digest(key))


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()


class Freshness:
    """The documents that one opened store has validated.

    `immutable` tells that the source never changes. `inherited` are the documents that the original of this copy has
    seen.
    """

    def __init__(self, revalidate: Revalidate, *, immutable: bool = False, inherited: Seen | None = None) -> None:
        self.revalidate: Revalidate = False if immutable else revalidate
        self.inherited = inherited or Seen()
        self._opened = time.monotonic()
        self._asked: dict[str, float] = {}
        self._states: dict[bytes, bytes] = {}
        # by node, as its documents are read together
        self._under_way: Counter[str] = Counter()
        self._rules_asked: set[str] = set()
        self.unverified: set[str] = set()
        """Documents that were served from the cache because the source could not be reached."""
        self._listeners: WeakSet[Any] = WeakSet()

    @property
    def serves_offline(self) -> bool:
        """Whether cached values are served while the source cannot be reached."""
        return self.revalidate == "open" or self.revalidate is False

    def tell(self, reads: Any) -> None:
        """Call `reads.must_verify` when a document is served without the confirmation of the source."""
        self._listeners.add(reads)
        if self.unverified:
            reads.must_verify()

    def mark_unverified(self, key: str) -> None:
        """Record that a cached document is served although the source cannot be reached."""
        self.unverified.add(key)
        for reads in list(self._listeners):
            reads.must_verify()

    def must_ask(self, key: str, *, writable: bool) -> bool:
        """Whether a key must be revalidated even if it is cached.

        `writable` tells that the result may be the base of a write. Appending to an array needs its current shape, so
        each read of a document then revalidates, unless the policy is a number of seconds.
        """
        policy = self.revalidate
        if policy is True or policy is False:
            return policy
        if not is_document(key):
            return False
        if policy == "open" or policy == "strict":
            return writable or key not in self._asked
        asked = self._asked.get(key)
        return asked is None or time.monotonic() - asked >= policy

    def tolerance(self, *, writable: bool) -> float:
        """The age in seconds that a validation of a document may have when a read begins."""
        policy = self.revalidate
        at_opening = policy == "open" or policy == "strict"
        if policy is True or (at_opening and writable):
            return 0.0
        return math.inf if policy == "open" or policy == "strict" or policy is False else float(policy)

    def vouches(self, key: str, document: bytes | memoryview | None) -> bool:
        """Whether the original of this copy has seen the cached state of a document."""
        state = self.inherited.state(key)
        # not for a document that this copy has asked for itself, whose answer is newer
        vouched = state is not None and key not in self._asked and fingerprint(document).startswith(state)
        if vouched:
            # of the time when this copy was opened: the original saw the document before that
            self._asked[key] = self._opened
        return vouched

    def mark_validated(self, key: str, document: bytes | memoryview | None, asked: float | None = None) -> None:
        """Record that the cached document equals that of the source, at the time of the request."""
        if is_document(key):
            self._asked[key] = time.monotonic() if asked is None else asked
            self.unverified.discard(key)
            name = _digest(key)
            # the latest last
            self._states.pop(name, None)
            self._states[name] = fingerprint(document)[:_DIGEST]

    @contextmanager
    def asking(self, key: str) -> Iterator[None]:
        """While a document is being read."""
        node, _, name = key.rpartition("/")
        self._under_way[node] += 1
        if name == _RULES:
            self._rules_asked.add(node)
        try:
            yield
        finally:
            try:
                # tasks that were started together with this one may not have begun yet
                asyncio.get_running_loop().call_soon(self._asked_for, node)
            except RuntimeError:
                # the loop was closed meanwhile
                self._asked_for(node)

    def _asked_for(self, node: str) -> None:
        self._under_way[node] -= 1
        if self._under_way[node] <= 0:
            del self._under_way[node]
            self._rules_asked.discard(node)

    def are_rules_asked(self, key: str) -> bool:
        """Whether the `zarr.json` beside a document is read together with it.

        It may have been read already: of several reads that begin together and wait for the cache to open, one may end
        long before another. So this holds until all of them have ended.
        """
        return key.rpartition("/")[0] in self._rules_asked

    def seen(self) -> Seen:
        """The documents for a copy to inherit."""
        states = {**self.inherited.states(), **self._states}
        return Seen.of(states, more=self.inherited.more)


_reads_batch: Final = getattr(getattr(codec_pipeline, "FusedCodecPipeline", None), "read", None)
_READS_BATCH: Final = getattr(_reads_batch, "__code__", None)
"""The code of the function of Zarr that asks a store whether it can be read synchronously, before it reads a batch."""
SMALL: Final = 256 << 10
"""The most decoded bytes of a single chunk that are read on the event loop: a thread would take longer to wake."""
_NEAR: Final = 4
"""The number of frames between that function and the caller of `keys_to_read`, at most."""


def decoded_size(spec: ArraySpec) -> int:
    """The size of a chunk in memory, in bytes."""
    return math.prod(spec.shape) * int(getattr(spec.dtype, "item_size", None) or 1)


def keys_to_read(store: Store) -> list[str] | None:
    """The keys of the batch that Zarr is about to read.

    None if that cannot be told, if Zarr reads parts of chunks, and for a single small chunk: no thread pays for it.

    Called by the property by which a store says whether it can be read synchronously. Zarr does not tell it what is to
    be read, but the function that asks is on the stack. A Zarr in which that is different reads asynchronously.
    """
    for depth in range(2, 2 + _NEAR):
        try:
            frame = sys._getframe(depth)
        except ValueError:
            return None
        if frame.f_code is _READS_BATCH:
            names = frame.f_locals
            batch, pipeline = names.get("batch"), names.get("self")
            if not isinstance(batch, list) or getattr(pipeline, "supports_partial_decode", True):
                return None
            if len(batch) == 1 and decoded_size(batch[0][1]) <= SMALL:
                return None
            places = [item[0] for item in batch]
            return [place.path for place in places] if all(place.store is store for place in places) else None
    return None


class _Tellings(dict[str, bool]):
    """Whether the name of a Zarr function can show why it reads; most names cannot."""

    def __missing__(self, name: str) -> bool:
        found = self[name] = any(part in name for part in (*_WRITING, *_EITHER))
        return found


_tells: Final = _Tellings()


def _module_by_frame(depth: int) -> str | None:
    try:
        return str(sys._getframe(depth + 1).f_globals.get("__name__", ""))
    except ValueError:
        return None


# of Python 3.12; makes no object of a frame, which takes longer than the rest of the check
_module: Final = getattr(sys, "_getframemodulename", _module_by_frame)


def is_read_for_a_write() -> bool | None:
    """Whether Zarr reads in order to change a part of a chunk or shard.

    Called by the `get` of a store: Zarr gives it no reason, but the functions that await the `get` are on the stack.
    None means that they serve reads and writes alike.
    """
    for depth in range(2, 2 + _DEEPEST):
        module = _module(depth)
        if module is None and (module := _module_by_frame(depth)) is None:
            break
        if module.startswith("zarr."):
            name = sys._getframe(depth).f_code.co_qualname
            if not _tells[name]:
                # most functions of Zarr tell nothing, and their names are looked at only once
                continue
            return True if any(part in name for part in _WRITING) else None
        if module.startswith("asyncio."):
            # below the event loop are frames of the program, which say nothing about this read
            break
    return False
