"""A whole object put together from what is cached of it and the rest, which alone is asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from zarr.abc.store import OffsetByteRequest, RangeByteRequest

from xzcache import _upstream as upstream
from xzcache._keys import END
from xzcache._reading import contents
from xzcache._spans import NEGLIGIBLE, Mosaic
from xzcache._states import tells

if TYPE_CHECKING:
    from xzcache._reading import Reading, Request
    from xzcache._spans import Span

_MOST_REQUESTS: Final = 8


async def assembled(reading: Reading, request: Request) -> upstream.Answer | None:
    """The whole of an object of which pieces are cached.

    Returns
    -------
    Answer or None
        None where it is better asked for as it is: too little of it is cached, or in too many places; or nothing tells
        whether the pieces are of the object as it is now.

    Raises
    ------
    Exception
        The source's own.
    """
    backend, key = reading.backend, request.key
    listed = backend.listed(key)
    pieces = [piece for piece in listed if piece.start >= 0 and piece.stop != END]
    if sum(piece.stop - piece.start for piece in pieces) <= NEGLIGIBLE or len(states := backend.states_of(key)) != 1:
        return None
    if not tells(state := min(states)):
        return None
    had = Mosaic()
    ends = 0
    for piece in pieces:
        # looked at one by one: they may have been stored before and after the object changed
        fitting = await backend.validator(piece) == state and (data := await reading.find(piece))
        if fitting and data and await backend.validator(piece) == state:
            had.add((piece.start, piece.start + len(data)), data)
            ends = max(ends, piece.start + len(data))
    holes = had.missing((0, ends))
    if ends <= NEGLIGIBLE or len(holes) >= _MOST_REQUESTS:
        return None
    begun = time.perf_counter()
    # the last byte is asked for again: who asks for what is beyond the end gets an error
    asked = [RangeByteRequest(*hole) for hole in holes] + [OffsetByteRequest(ends - 1)]
    answers = await upstream.all_of(
        upstream.ask(reading.source, key, request.prototype, part, fixed=reading.fixed, states=lambda: states)
        for part in asked
    )
    fetched = [contents(answer.value) for answer in answers if answer.value is not None]
    reading.stats.miss(sum(map(len, fetched)), time.perf_counter() - begun)
    if len(fetched) < len(asked) or any(answer.validator != state or not answer.exact for answer in answers):
        return None
    for hole, data in zip(holes, fetched, strict=False):
        had.add(hole, data)
    whole: Span = (0, ends - 1)
    data = memoryview(b"".join([had.of(whole), fetched[-1]]))
    size = answers[-1].size
    if size is not None and len(data) != size:
        return None
    return upstream.Answer(request.prototype.buffer.from_bytes(data), state, size=size)
