"""When a source has to be asked for what is cached: which documents an opened store, and copies of it, have seen."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from xzcache._documents import is_document, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xzcache._config import Revalidate

_CARRIED: Final = 85
_DIGEST: Final = 3
_LENGTH: Final = 1 + _CARRIED * 2 * _DIGEST


class Seen:
    """The documents that a store has seen, as its copies in other processes and on other machines inherit them.

    Of each document a digest of its key and one of its state, so that it takes as much room whatever was seen. They are
    short: where two keys agree, or a state is not recognized, the source is asked once more.

    Parameters
    ----------
    packed : bytes
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
        told = b"".join(key + state for key, state in kept).ljust(_LENGTH - 1, b"\0")
        return cls(bytes([more or len(kept) < len(states)]) + told)

    def __bool__(self) -> bool:
        return bool(self._states)

    def states(self) -> dict[bytes, bytes]:
        """States of documents by the digests of their keys."""
        return dict(self._states)

    def state(self, key: str) -> bytes | None:
        """The beginning of the state in which a document was seen; None where it was not, or there was no room."""
        return self._states.get(_digest(key))


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()


class Freshness:
    """Which documents have been asked for, by one opened store.

    Parameters
    ----------
    revalidate : {"open", True, False} or float
    immutable : bool
        Whether the source can never change.
    inherited : Seen
        What the store that this one is a copy of has asked for.
    """

    def __init__(self, revalidate: Revalidate, *, immutable: bool = False, inherited: Seen | None = None) -> None:
        self.revalidate: Revalidate = False if immutable else revalidate
        self.inherited = inherited or Seen()
        self._opened = time.monotonic()
        self._asked: dict[str, float] = {}
        self._states: dict[bytes, bytes] = {}
        self._under_way: Counter[str] = Counter()

    def must_ask(self, key: str) -> bool:
        """Whether the source has to be asked for a key whatever the cache holds."""
        policy = self.revalidate
        if policy is True or policy is False:
            return policy
        if not is_document(key):
            return False
        asked = self._asked.get(key)
        return asked is None or (policy != "open" and time.monotonic() - asked >= policy)

    def vouches(self, key: str, document: bytes | memoryview | None) -> bool:
        """Whether the store that this one is a copy of has seen a document as it is cached here."""
        state = self.inherited.state(key)
        vouched = state is not None and key not in self._asked and state_of(document).startswith(state)
        if vouched:
            self._asked[key] = self._opened
        return vouched

    def note(self, key: str, document: bytes | memoryview | None) -> None:
        """Remember that what is cached of a document is what the source has."""
        if is_document(key):
            self._asked[key] = time.monotonic()
            name = _digest(key)
            # the latest last
            self._states.pop(name, None)
            self._states[name] = state_of(document)[:_DIGEST]

    @contextmanager
    def asking(self, key: str) -> Iterator[None]:
        """While a document is being read."""
        self._under_way[key] += 1
        try:
            yield
        finally:
            # those who were called together with this one have not even begun, if this was quick
            asyncio.get_running_loop().call_soon(self._asked_for, key)

    def _asked_for(self, key: str) -> None:
        self._under_way[key] -= 1
        if self._under_way[key] <= 0:
            del self._under_way[key]

    def is_asking(self, key: str) -> bool:
        """Whether a document is being read, or was a moment ago."""
        return key in self._under_way

    def seen(self) -> Seen:
        """What a copy inherits."""
        states = {**self.inherited.states(), **self._states}
        return Seen.of(states, more=self.inherited.more)
