"""Reading what the source has to be asked for whatever is cached, and making the cache agree with it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from zarr.core.buffer import default_buffer_prototype

from xzcache.model import Flight, HandedOver, arrays_of, is_document, ruling, telling, tells
from xzcache.reading._request import Request, contents, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.core.buffer import Buffer

    from xzcache.reading._request import Reading
    from xzcache.sources import Answer


_REMEMBERED: Final = 4096


class Revalidation:
    """Reads that ask.

    Parameters
    ----------
    reading : Reading
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._backend = reading.backend
        self._freshness = reading.freshness
        self._seen = self._freshness.inherited
        asks = not isinstance(self._freshness.revalidate, bool)
        self.may_settle = bool(self._seen) and asks
        self._settled: set[str] = set()

    async def read(self, request: Request) -> Buffer | None:
        """Read from the source, and make the cache agree with it."""
        if is_document(request.key):
            if await self._goes_without_saying(request):
                return self._reading.hit(request, None)
            data = await self._document(request, unless_asked=True)
            return None if data is None else request.prototype.buffer.from_bytes(data)
        ticket = self._backend.ticket(request.entry)
        answer, data = await self._reading.ask_again(request)
        if data is not None:
            return self._reading.hit(request, data)
        value = None if answer.value is None else contents(answer.value)
        await self._agree(request, value, ticket, answer)
        return answer.value

    async def _goes_without_saying(self, request: Request) -> bool:
        """Whether a document is known to be missing from a node whose ruling document somebody is asking for now.

        Who opens a node of unknown format asks for the documents of both, all at once. If the one that comes first in
        the order of formats is still there, those that were not there before do not matter.
        """
        rules = None if self._reading.writable else ruling(request.key)
        if rules is None or not self._freshness.is_asking(rules) or not await self._is_known_absent(request.key):
            return False
        entry = self._backend.entry(rules, *whole())
        if entry is None:
            return False
        if self._reading.must_ask(rules):
            other = Request(rules, entry, default_buffer_prototype(), None, time.perf_counter())
            return await self._document(other, unless_asked=True) is not None
        return await self._backend.find(entry, "infinity") is not None

    async def _is_known_absent(self, key: str) -> bool:
        return await self._backend.is_absent(key, self._reading.max_age)

    async def _document(self, request: Request, *, unless_asked: bool = False) -> memoryview | None:
        """A metadata document from the source, asked for once by all tasks that want it now.

        A request is shared by the tasks that began before it was sent. One that began later may know of a change that
        the answer does not show: it joins only where the policy allows an answer as old as that.

        Parameters
        ----------
        request : Request
        unless_asked : bool
            Whether an answer that another task got meanwhile will do.
        """
        key, entry = request.key, request.entry
        since = request.started - self._freshness.tolerance(writable=self._reading.writable)
        while True:
            ticket = began = self._backend.ticket(entry)
            if began is None:
                flight: Flight[memoryview | None] = Flight()
                break
            flight, leads = self._backend.flights.join((id(self._freshness), key, began), since)
            if leads:
                break
            try:
                data = await asyncio.wait_for(flight.outcome(), self._reading.timeout)
            except HandedOver:
                continue
            except TimeoutError:
                flight = Flight()
                break
            self._reading.hit(request, data)
            return data
        try:
            if unless_asked and not self._reading.must_ask(key):
                # the flight of another task has landed between the look at what was asked for and the lead
                data = await self._reading.find(entry)
                if data is not None or await self._is_known_absent(key):
                    flight.land(data)
                    self._reading.hit(request, data)
                    return data
            # tasks that were called together with this one share the request
            await asyncio.sleep(0)
            # what they found of other documents meanwhile is no write since this one was asked for
            ticket = self._backend.ticket(entry)
            flight.depart()
            asked = time.monotonic()
            answer, data = await self._reading.ask_again(request._replace(prototype=default_buffer_prototype()))
            if data is not None:
                self._reading.hit(request, data)
            elif answer.value is not None:
                data = contents(answer.value)
            if not answer.exact:
                # it tells nothing of the document
                flight.land(data)
                return data
            if data is None or await self._backend.find(entry, "infinity") != data:
                ticket = await self._backend.compare(key, None if data is None else bytes(data), ticket)
            if not answer.unchanged:
                await self._agree(request, data, ticket, answer)
            self._freshness.note(key, data, asked)
            flight.land(data)
            return data
        except BaseException as error:
            flight.fail(error)
            if isinstance(error, FileNotFoundError):
                # there is not even a place where it could be
                await self._backend.compare(key, None, ticket)
            raise
        finally:
            self._backend.flights.leave((id(self._freshness), key, began), flight)

    async def _agree(self, request: Request, data: memoryview | None, ticket: Any, answer: Answer) -> None:
        """Store what the source has now, where the cache has something else."""
        key, entry, validator = request.key, request.entry, answer.validator
        if data is not None and not answer.exact:
            return
        cached = await self._backend.find(entry, "infinity")
        if data is not None and cached == data:
            known = await self._backend.validator(entry)
            told = not tells(validator) or validator == known
            if told and await self._reading.find(entry) is not None:
                return
        if cached is not None:
            ticket = await self._backend.forget(key, ticket)
        elif data is not None:
            ticket, validator, _ = await self._reading.agree(key, entry, validator, ticket, data)
        if data is not None and ticket is not None:
            await self._backend.publish(entry, data, ticket, self._reading.max_size, validator)

    # -- what a copy was told by the store that it is a copy of

    def is_settled(self, key: str) -> bool:
        """Whether `settle` has nothing to do."""
        # those above were settled with it
        return key.rpartition("/")[0] in self._settled

    async def settle(self, key: str) -> None:
        """See that what this machine has cached of an array was filled under the documents that the original has seen.

        Another machine may not have noticed a change that the one of the original has. Where it is in doubt, the source
        is asked for the document, once in a process.
        """
        nodes = [path for path in _nodes_above(key) if path not in self._settled]
        vouched = {
            document: state for path in nodes for document in telling(path) if (state := self._seen.state(document))
        }
        if self._seen.more:
            # there may have been no room to tell of its array
            arrays = [path for path in arrays_of(key) if path in nodes]
            vouched = dict.fromkeys((document for path in arrays for document in telling(path)[:2]), b"") | vouched
        if vouched:
            await self._settle(vouched)
        if len(self._settled) > _REMEMBERED:
            self._settled.clear()
        self._settled.update(nodes)

    async def _settle(self, vouched: dict[str, bytes]) -> None:
        name = ("settle", self._backend.namespace, tuple(sorted(vouched.items())))
        while True:
            flight, leads = self._backend.flights.join(name)
            if leads:
                break
            try:
                await asyncio.wait_for(flight.outcome(), self._reading.timeout)
            except HandedOver:
                continue
            except TimeoutError:
                flight = Flight()
                break
            return
        try:
            asked = await self._backend.doubtful(vouched)
            for key in asked:
                if (entry := self._backend.entry(key, *whole())) is not None:
                    await self._document(Request(key, entry, default_buffer_prototype(), None, time.perf_counter()))
            await self._backend.settled(vouched, asked)
            flight.land(None)
        except BaseException as error:
            flight.fail(error)
            raise
        finally:
            self._backend.flights.leave(name, flight)


def _nodes_above(key: str) -> Iterator[str]:
    """Paths of all nodes in which a key may lie, the root's included."""
    at = key.find("/")
    while at >= 0:
        yield key[:at]
        at = key.find("/", at + 1)
    yield ""
