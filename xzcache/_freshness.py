"""When a source has to be asked for what is cached: which documents an opened store, and copies of it, have seen."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from xzcache._documents import is_document

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xzcache._config import Revalidate

_CARRIED: Final = 32
_DIGEST: Final = 8
_LENGTH: Final = 1 + _CARRIED * 2 * _DIGEST
_SAYS_NOTHING: Final = bytes(_DIGEST)


class Seen:
    """The documents that a store has seen, as its copies in other processes and on other machines inherit them.

    Of each document the digest of its key and of its state, so that it takes as much room whatever was seen.

    Parameters
    ----------
    packed : bytes
    """

    def __init__(self, packed: bytes = bytes(_LENGTH)) -> None:
        self.packed = packed
        pairs = (packed[at : at + 2 * _DIGEST] for at in range(1, len(packed), 2 * _DIGEST))
        self._states = {pair[:_DIGEST]: pair[_DIGEST:] for pair in pairs if any(pair)}
        self.everything = packed[:1] == b"\1"
        """Whether there were more documents than there was room for: a copy has to take all for seen."""
        self.tells = any(map(any, self._states.values()))
        """Whether any of the documents describes arrays."""

    @classmethod
    def of(cls, states: dict[bytes, bytes], *, everything: bool) -> Seen:
        """Of states of documents by the digests of their keys, the latest last."""
        # those that describe arrays matter most
        kept = sorted(states.items(), key=lambda item: any(item[1]))[-_CARRIED:]
        told = b"".join(key + state for key, state in kept).ljust(_LENGTH - 1, b"\0")
        return cls(bytes([everything or len(kept) < len(states)]) + told)

    def states(self) -> dict[bytes, bytes]:
        """States of documents by the digests of their keys."""
        return dict(self._states)

    def has(self, key: str) -> bool:
        """Whether a document was seen."""
        return _digest(key) in self._states or self.everything

    def state(self, key: str) -> bytes | None:
        """The state in which a document was seen, if it describes arrays."""
        state = self._states.get(_digest(key), _SAYS_NOTHING)
        return None if state == _SAYS_NOTHING else state


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
        if asked is None and self.inherited.has(key):
            asked = self._opened
        return asked is None or (policy != "open" and time.monotonic() - asked >= policy)

    def note(self, key: str, state: bytes) -> None:
        """Remember that what is cached of a document is what the source has."""
        if is_document(key):
            self._asked[key] = time.monotonic()
            self._states[_digest(key)] = state[:_DIGEST] or _SAYS_NOTHING

    @contextmanager
    def asking(self, key: str) -> Iterator[None]:
        """While a document is being read."""
        self._under_way[key] += 1
        try:
            yield
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]

    def is_asking(self, key: str) -> bool:
        return key in self._under_way

    def seen(self) -> Seen:
        """What a copy inherits."""
        states = {**self.inherited.states(), **self._states}
        return Seen.of(states, everything=self.inherited.everything)
