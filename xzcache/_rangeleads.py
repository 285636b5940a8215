"""Who fetches which bytes of an object, among the tasks of this process and among the processes of a machine."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from xzcache._flights import Claim
from xzcache._reading import contents
from xzcache._spans import Cover, cut

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from xzcache._anystore import StoreBackend
    from xzcache._shared import SharedBackend
    from xzcache._spans import Span
    from xzcache._upstream import Answer

_PIECE: Final = 1 << 20
"""Bytes of one cached piece, unless a single range has more: all of it is checked when a process first reads of it."""


class Plan(Protocol):
    """What is asked for as one, of what is needed and without what is had."""

    def __call__(self, spans: Iterable[Span], *, walls: Cover) -> list[Span]: ...


@dataclass(eq=False)
class Lead:
    """Bytes that one task fetches for all who wait, here and in other processes."""

    claim: Claim
    what: Hashable = None
    unlock: Callable[[], None] | None = None
    unstored: int = 0
    """Pieces that are yet to be stored; whoever stores the last one lets go."""


class Piece(NamedTuple):
    """Bytes that are to be stored."""

    lead: Lead
    span: Span
    data: memoryview
    validator: str


class Leads:
    """Makes claims of bytes of the objects of one source.

    Parameters
    ----------
    backend : SharedBackend or StoreBackend
    """

    def __init__(self, backend: SharedBackend | StoreBackend) -> None:
        self._backend = backend

    def claim(
        self, key: str, what: Hashable, needs: list[Span], cached: list[Span], plan: Plan
    ) -> tuple[list[Lead], list[Claim]]:
        """Claim what nobody fetches yet, with what lies between.

        Parameters
        ----------
        key : str
        what : hashable
            The object as it is now.
        needs : list of (int, int)
        cached : list of (int, int)
            What lies among them and is there.
        plan : callable

        Returns
        -------
        mine : list of Lead
        others : list of Claim
            What is needed and other tasks of this process are fetching. What other processes are fetching is neither.
        """
        taken: list[Span] = []

        def choose(flying: list[Span]) -> list[Span]:
            away = Cover([*flying, *taken])
            # what only lies between is not asked for where others do already
            asked = plan([part for need in needs for part in away.missing(need)], walls=Cover([*cached, *away.spans]))
            return [part for span in asked for part in away.missing(span)]

        mine: list[Lead] = []
        while True:
            made, others = self._backend.claims.make(what, choose)
            refused = False
            for lead in [Lead(claim, what) for claim in made]:
                answer = self._backend.claim(key, lead.claim.span)
                if isinstance(answer, tuple):
                    taken.append(answer)
                    refused = True
                    self.leave(lead)
                else:
                    lead.unlock = answer
                    mine.append(lead)
            if not refused:
                break
        ours = {lead.claim for lead in mine}
        wanted = Cover(needs)
        return mine, [claim for claim in others if claim not in ours and next(wanted.parts(claim.span), None)]

    def leave(self, lead: Lead) -> None:
        """Let go of a claim; again if need be."""
        if lead.what is not None:
            self._backend.claims.leave(lead.what, lead.claim)
        unlock, lead.unlock = lead.unlock, None
        if unlock is not None:
            # a lock that cannot be given back goes with the process
            with suppress(OSError):
                unlock()

    async def store(self, key: str, pieces: Sequence[Piece], ticket: Any, max_size: int | None) -> None:
        """Store pieces; whoever stores the last one of a claim lets go of it."""
        for piece in pieces:
            piece.lead.unstored += 1
        try:
            for lead, (first, last), data, validator in pieces:
                entry = self._backend.entry(key, first, last)
                assert entry is not None
                await self._backend.publish_soon(entry, data, ticket, max_size, validator, partial(self._stored, lead))
        except BaseException:
            for piece in pieces:
                piece.lead.unstored = 0
            raise

    def _stored(self, lead: Lead) -> None:
        lead.unstored -= 1
        if lead.unstored == 0:
            self.leave(lead)


def pieces_of(leads: Sequence[Lead], answers: Sequence[Answer], there: list[Span], seams: set[int]) -> list[Piece]:
    """What was fetched, but for what is there already, in pieces that end where ranges do."""
    cached = Cover(there)
    pieces = []
    for lead, answer in zip(leads, answers, strict=True):
        if answer.value is None:
            continue
        asked, data = lead.claim.span, contents(answer.value)
        for part in cached.missing(asked):
            for first, last in cut(part, seams, _PIECE):
                if of := data[first - asked[0] : last - asked[0]]:
                    pieces.append(Piece(lead, (first, last), of, answer.validator))
    return pieces
