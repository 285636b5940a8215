"""Which entries leave first. No disk, no clock, no SQL: entries and a limit in, victims out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class Candidate(Protocol):
    """What a policy sees of an entry: sizes in bytes, times in any unit that grows."""

    @property
    def id(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def rank(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def least_recently_used(rows: Sequence[C], want: int, most: int) -> tuple[list[C], list[tuple[int, int]]]:
    """Choose victims by exact least-recent use, from rows whose ranks may lag behind.

    A hit updates `used` only; the index is ordered by `rank`, which is never above `used`. So an entry of lowest rank
    that was used since is given its true rank and passed over, and one whose rank is true is the oldest of all: the
    update of a hit needs no ordered index.

    Parameters
    ----------
    rows : sequence of Candidate
        The entries of lowest rank, lowest first.
    want : int
        Bytes to free.
    most : int
        How many victims at the most.

    Returns
    -------
    victims : list of Candidate
    ranks : list of (int, int)
        `(rank, id)` of the entries that were passed over. Where there are any, victims stop at the first whose rank
        is not below theirs; call again for more.
    """
    victims: list[C] = []
    ranks: list[tuple[int, int]] = []
    freed = 0
    horizon: int | None = None
    for row in rows:
        if freed >= want or len(victims) >= most or (horizon is not None and row.rank >= horizon):
            break
        if row.used > row.rank:
            ranks.append((row.used, row.id))
            horizon = row.used if horizon is None else min(horizon, row.used)
        else:
            victims.append(row)
            freed += row.size
    return victims, ranks
