"""Reading what the source has to be asked for whatever is cached, and making the cache agree with it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from zarr.core.buffer import default_buffer_prototype

from xzcache.model import (
    Flight,
    LeaderCancelled,
    array_documents,
    arrays_of,
    is_document,
    is_from_source,
    overriding_document,
)
from xzcache.reading._request import Request, contents, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.core.buffer import Buffer

    from xzcache.reading._request import Reading
    from xzcache.sources import FetchResult


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
        self.may_confirm = bool(self._seen) and asks
        self._confirmed: set[str] = set()

    async def read(self, request: Request) -> Buffer | None:
        """Read from the source, and make the cache agree with it."""
        if is_document(request.key):
            if await self._is_overridden(request):
                return self._reading.hit(request, None)
            data = await self._document(request, unless_asked=True)
            return None if data is None else request.prototype.buffer.from_bytes(data)
        version = self._backend.write_version(request.entry)
        answer, data = await self._reading.revalidate(request)
        if data is not None:
            return self._reading.hit(request, data)
        value = None if answer.value is None else contents(answer.value)
        await self._agree(request, value, version, answer)
        return answer.value

    async def _is_overridden(self, request: Request) -> bool:
        """Whether a document is known to be missing from a node whose ruling document somebody is asking for now.

        Who opens a node of unknown format asks for the documents of both, all at once. If the one that comes first in
        the order of formats is still there, those that were not there before do not matter.
        """
        rules = None if self._reading.writable else overriding_document(request.key)
        if rules is None or not self._freshness.is_asking(rules) or not await self._is_document_missing(request.key):
            return False
        entry = self._backend.entry(rules, *whole())
        if entry is None:
            return False
        if self._reading.must_ask(rules):
            other = Request(rules, entry, default_buffer_prototype(), None, time.perf_counter())
            return await self._document(other, unless_asked=True) is not None
        return await self._backend.get(entry, "infinity") is not None

    async def _is_document_missing(self, key: str) -> bool:
        return await self._backend.is_document_missing(key, self._reading.max_age)

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
            version = began = self._backend.write_version(entry)
            if began is None:
                flight: Flight[memoryview | None] = Flight()
                break
            flight, leads = self._backend.flights.join((id(self._freshness), key, began), since)
            if leads:
                break
            try:
                data = await asyncio.wait_for(flight.outcome(), self._reading.timeout)
            except LeaderCancelled:
                continue
            except TimeoutError:
                flight = Flight()
                break
            self._reading.hit(request, data)
            return data
        try:
            if unless_asked and not self._reading.must_ask(key):
                # the flight of another task has landed between the look at what was asked for and the lead
                data = await self._reading.get_cached(entry)
                if data is not None or await self._is_document_missing(key):
                    flight.set_result(data)
                    self._reading.hit(request, data)
                    return data
            # tasks that were called together with this one share the request
            await asyncio.sleep(0)
            # what they found of other documents meanwhile is no write since this one was asked for
            version = self._backend.write_version(entry)
            flight.mark_sent()
            asked = time.monotonic()
            answer, data = await self._reading.revalidate(request._replace(prototype=default_buffer_prototype()))
            if data is not None:
                self._reading.hit(request, data)
            elif answer.value is not None:
                data = contents(answer.value)
            if not answer.exact:
                # it tells nothing of the document
                flight.set_result(data)
                return data
            if data is None or await self._backend.get(entry, "infinity") != data:
                version = await self._backend.apply_document(key, None if data is None else bytes(data), version)
            if not answer.unchanged:
                await self._agree(request, data, version, answer)
            self._freshness.mark_validated(key, data, asked)
            flight.set_result(data)
            return data
        except BaseException as error:
            flight.set_exception(error)
            if isinstance(error, FileNotFoundError):
                # there is not even a place where it could be
                await self._backend.apply_document(key, None, version)
            raise
        finally:
            self._backend.flights.finish((id(self._freshness), key, began), flight)

    async def _agree(self, request: Request, data: memoryview | None, version: Any, answer: FetchResult) -> None:
        """Store what the source has now, where the cache has something else."""
        key, entry, validator = request.key, request.entry, answer.validator
        if data is not None and not answer.exact:
            return
        cached = await self._backend.get(entry, "infinity")
        if data is not None and cached == data:
            known = await self._backend.validator(entry)
            told = not is_from_source(validator) or validator == known
            if told and await self._reading.get_cached(entry) is not None:
                return
        if cached is not None:
            version = await self._backend.invalidate(key, version)
        elif data is not None:
            version, validator, _ = await self._reading.agree(key, entry, validator, version, data)
        if data is not None and version is not None:
            await self._backend.publish(entry, data, version, self._reading.max_size, validator)

    # -- what a copy was told by the store that it is a copy of

    def is_confirmed(self, key: str) -> bool:
        """Whether `confirm_metadata` has nothing to do."""
        # those above were settled with it
        return key.rpartition("/")[0] in self._confirmed

    async def confirm_metadata(self, key: str) -> None:
        """See that what this machine has cached of an array was filled under the documents that the original has seen.

        Another machine may not have noticed a change that the one of the original has. Where it is in doubt, the source
        is asked for the document, once in a process.
        """
        nodes = [path for path in _nodes_above(key) if path not in self._confirmed]
        vouched = {
            document: state
            for path in nodes
            for document in array_documents(path)
            if (state := self._seen.state(document))
        }
        if self._seen.more:
            # there may have been no room to tell of its array
            arrays = [path for path in arrays_of(key) if path in nodes]
            vouched = (
                dict.fromkeys((document for path in arrays for document in array_documents(path)[:2]), b"") | vouched
            )
        if vouched:
            await self._confirm(vouched)
        if len(self._confirmed) > _REMEMBERED:
            self._confirmed.clear()
        self._confirmed.update(nodes)

    async def _confirm(self, vouched: dict[str, bytes]) -> None:
        name = ("settle", self._backend.namespace, tuple(sorted(vouched.items())))
        while True:
            flight, leads = self._backend.flights.join(name)
            if leads:
                break
            try:
                await asyncio.wait_for(flight.outcome(), self._reading.timeout)
            except LeaderCancelled:
                continue
            except TimeoutError:
                flight = Flight()
                break
            return
        try:
            asked = await self._backend.unconfirmed(vouched)
            for key in asked:
                if (entry := self._backend.entry(key, *whole())) is not None:
                    await self._document(Request(key, entry, default_buffer_prototype(), None, time.perf_counter()))
            await self._backend.confirm(vouched, asked)
            flight.set_result(None)
        except BaseException as error:
            flight.set_exception(error)
            raise
        finally:
            self._backend.flights.finish(name, flight)


def _nodes_above(key: str) -> Iterator[str]:
    """Paths of all nodes in which a key may lie, the root's included."""
    at = key.find("/")
    while at >= 0:
        yield key[:at]
        at = key.find("/", at + 1)
    yield ""
