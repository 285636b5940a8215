"""What is on its way into the cache: an entry and its bytes, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from xzcache._errors import NoRoom
    from xzcache._files import Data, Stamp
    from xzcache._keys import Entry
    from xzcache._leaders import Ticket
    from xzcache._schema import Dying, Row

MOST: Final = 32
"""Parcels that are published together: it bounds for how long others wait for the guard."""

MOST_BYTES: Final = 4 << 20
"""Bytes of several parcels that are published together, and so may have to be made room for at once."""


@dataclass(eq=False, slots=True)
class Parcel:
    """An entry that somebody wants to be stored.

    Attributes
    ----------
    ticket : Ticket or None
        From before the bytes were fetched; None for what has no source.
    validator : str
        What tells this state of the object from others, as its source has it.
    exclusive : bool
        Store nothing where the entry is there already.
    done : callable or None
        To be called when it is stored, or will not be.
    is_stored : bool
    """

    entry: Entry
    data: Data
    ticket: Ticket | None
    validator: str = ""
    exclusive: bool = False
    done: Callable[[], None] | None = None
    is_stored: bool = False


@dataclass(eq=False, slots=True)
class InFlight:
    """A parcel whose bytes were taken from the lease, and the file that they are written to.

    Attributes
    ----------
    old, replaced : Row or None, Dying or None
        What the index had of the entry before, and what has become of that.
    has_others : bool
        Whether the index may have other entries of the same object.
    damaged : list of Row
        Those of them whose files do not tell of which state they are.
    is_spent : bool
        Whether the bytes are the index's to count now.
    failure : OSError, NoRoom or None
        Why it cannot be stored.
    """

    parcel: Parcel
    sequence: int
    temporary: str
    stamp: Stamp
    odd: bool = False
    old: Row | None = None
    replaced: Dying | None = None
    has_others: bool = False
    damaged: list[Row] = field(default_factory=list)
    is_spent: bool = False
    failure: OSError | NoRoom | None = None

    @property
    def stamp_in_place(self) -> Stamp:
        """The stamp of the file where it is to lie: only one that does not lie at its own key has to carry that."""
        entry = self.parcel.entry
        return self.stamp._replace(key=entry.key) if self.odd or not entry.is_whole else self.stamp
