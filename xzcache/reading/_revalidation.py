"""Revalidation: reads that must ask the source, and updates of the cache."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from zarr.core.buffer import default_buffer_prototype

from xzcache.model import (
    MISSING,
    WHOLE,
    Claim,
    LeaderCancelled,
    array_documents,
    arrays_of,
    is_document,
    is_from_source,
    overriding_document,
)
from xzcache.reading._request import Request, contents

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.core.buffer import Buffer

    from xzcache.model import Entry
    from xzcache.reading._request import Reading
    from xzcache.sources import FetchResult


# nodes in memory; a node that is forgotten is confirmed again, by a look at the index
_REMEMBERED: Final = 4096


class Revalidation:
    """Reads of one source that revalidate."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._backend = reading.backend
        self._claims = reading.claims
        self._freshness = reading.freshness
        self._seen = self._freshness.inherited
        asks = not isinstance(self._freshness.revalidate, bool)
        self.may_confirm = bool(self._seen) and asks
        self._confirmed: set[str] = set()

    async def read(self, request: Request) -> Buffer | None:
        """Read from the source, and update the cache."""
        if is_document(request.key):
            if await self._is_overridden(request):
                return self._reading.hit(request, None)
            data, is_hit = await self._document(request, unless_asked=True)
            if is_hit:
                return self._reading.hit(request, data)
            return None if data is None else request.prototype.buffer.from_bytes(data)
        version = self._backend.write_version(request.key)
        answer, data = await self._reading.revalidate(request)
        if data is not None:
            return self._reading.hit(request, data)
        value = None if answer.value is None else contents(answer.value)
        await self._agree(request, value, version, answer)
        return answer.value

    async def _is_overridden(self, request: Request) -> bool:
        """Whether a missing document does not matter because the node's `zarr.json` overrides it.

        Opening a node of unknown format requests the documents of both formats at once. If the `zarr.json` still
        exists, the documents of format 2 that were missing before need no request.
        """
        rules = None if self._reading.writable else overriding_document(request.key)
        if rules is None or not self._freshness.are_rules_asked(rules) or not await self._is_missing(request.entry):
            return False
        entry = self._reading.entry(rules)
        if entry is None:
            return False
        if self._reading.must_ask(rules):
            other = Request(rules, entry, default_buffer_prototype(), None, time.perf_counter())
            # no hit of its own: nobody has read that document
            return (await self._document(other, unless_asked=True))[0] is not None
        return await self._reading.get_cached(entry, "infinity") is not None

    async def _is_missing(self, document: Entry) -> bool:
        max_age = self._reading.max_age
        return await self._backend.get(document, max_age, max_age) is MISSING

    async def _document(self, request: Request, *, unless_asked: bool = False) -> tuple[memoryview | None, bool]:
        """A metadata document from the source, in one request for all tasks that need it; and whether it is a hit.

        The caller counts the hit if the document is what was read. Tasks that began before the request share it. A
        later task may know of a change that the answer lacks, so it joins only if the policy accepts an answer of that
        age. With `unless_asked`, a validation by another task in the meantime is enough.
        """
        key, entry = request.key, request.entry
        since = request.started - self._freshness.tolerance(writable=self._reading.writable)
        while True:
            version = began = self._backend.write_version(key)
            # nothing can be published without a version, so other readers get nothing from this request
            if began is None:
                claim: Claim = Claim(WHOLE)
                break
            # named by the policy's object as well: another store may accept an older answer
            joined, is_leader = self._claims.join((id(self._freshness), key, began), since=since)
            assert joined is not None
            claim = joined
            if is_leader:
                break
            try:
                fetched = await claim.outcome(self._reading.timeout)
            except LeaderCancelled:
                continue
            if fetched is None:
                claim = Claim(WHOLE)
                break
            return fetched.data, True
        try:
            if unless_asked and not self._reading.must_ask(key):
                # another task has validated the document between the check and the join
                cached = await self._backend.get(entry, self._reading.max_age, self._reading.max_age)
                if cached is not None:
                    data = None if cached is MISSING else cached
                    claim.set_result(data)
                    return data, True
            # tasks that started together with this one get a turn to join the request
            await asyncio.sleep(0)
            # read again, so that changes which these tasks found in other documents do not count as later writes
            version = self._backend.write_version(key)
            claim.mark_sent()
            asked = time.monotonic()
            answer, data = await self._reading.revalidate(request._replace(prototype=default_buffer_prototype()))
            is_hit = data is not None
            if answer.value is not None and not is_hit:
                data = contents(answer.value)
            if not answer.exact:
                # such an answer proves nothing about the document
                claim.set_result(data)
                return data, is_hit
            if data is None or await self._reading.get_cached(entry, "infinity") != data:
                version = await self._backend.apply_document(key, None if data is None else bytes(data), version)
            if not answer.unchanged:
                await self._agree(request, data, version, answer)
            self._freshness.mark_validated(key, data, asked)
            claim.set_result(data)
            return data, is_hit
        except BaseException as error:
            claim.set_exception(error)
            if isinstance(error, FileNotFoundError):
                # the directory of the document is missing as well
                await self._backend.apply_document(key, None, version)
            raise
        finally:
            self._claims.release((id(self._freshness), key, began), claim)

    async def _agree(self, request: Request, data: memoryview | None, version: Any, answer: FetchResult) -> None:
        """Store the answer of the source if the cache differs."""
        key, entry, validator = request.key, request.entry, answer.validator
        if not answer.exact:
            return
        # of any age, because an old entry must be compared as well
        cached = await self._reading.get_cached(entry, "infinity")
        if data is not None and cached == data:
            known = self._backend.parts(key).validator(entry)
            is_same = not is_from_source(validator) or validator == known
            if is_same and await self._reading.get_cached(entry) is not None:
                if is_document(key):
                    await self._backend.mark_validated(entry, self._reading.max_age)
                return
        if cached is not None:
            # before the new value is published: other processes must not serve the old one meanwhile
            version = await self._backend.invalidate(key, version)
        elif data is not None:
            version, validator, _ = await self._reading.agree(key, entry, validator, version, data)
        if data is not None and version is not None:
            await self._backend.publish(entry, data, version, validator)
            # waited for, so that the next read in any process finds the new value
            await self._backend.stored(key)

    # -- metadata that the original of a copy has seen

    def is_confirmed(self, key: str) -> bool:
        """Whether `confirm_metadata` has nothing to do."""
        # the nodes above were confirmed with it
        return not self._freshness.unverified and key.rpartition("/")[0] in self._confirmed

    def forget_confirmed(self) -> None:
        """Have `confirm_metadata` look again, as this machine may have seen other documents since."""
        self._confirmed.clear()

    async def verify(self) -> None:
        """Revalidate the documents that were served offline, once the source can be reached again.

        Entries that were cached under documents that have changed since are invalidated before they are served again.
        """
        if self._reading.reach.is_down:
            return
        began = time.monotonic()
        for key in list(self._freshness.unverified):
            entry = self._reading.entry(key)
            assert entry is not None
            request = Request(key, entry, default_buffer_prototype(), None, time.perf_counter())
            try:
                await self._document(request, unless_asked=True)
            except Exception as error:
                if not self._reading.is_outage(error):
                    raise
                # the other documents would each wait for the same outage
                break
        if self._freshness.unverified:
            self._reading.reach.failed(time.monotonic() - began)

    async def confirm_metadata(self, key: str) -> None:
        """Confirm that this machine's chunks of an array were cached under the documents that the original has seen.

        The original's machine may have seen a change that this machine has missed. Unconfirmed documents are
        revalidated, once in a process.
        """
        if self._freshness.unverified:
            await self.verify()
        nodes = [path for path in _nodes_above(key) if path not in self._confirmed]
        vouched = {
            document: state
            for path in nodes
            for document in array_documents(path)
            if (state := self._seen.state(document))
        }
        if self._seen.more:
            # the document of the array may not have fit into the table
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
            joined, is_leader = self._claims.join(name)
            assert joined is not None
            claim = joined
            if is_leader:
                break
            try:
                if await claim.outcome(self._reading.timeout) is not None:
                    return
            except LeaderCancelled:
                continue
            claim = Claim(WHOLE)
            break
        try:
            asked = await self._backend.unconfirmed(vouched)
            for key in asked:
                if (entry := self._reading.entry(key)) is not None:
                    await self._document(Request(key, entry, default_buffer_prototype(), None, time.perf_counter()))
            await self._backend.unconfirmed(vouched, asked)
            claim.set_result(None)
        except BaseException as error:
            claim.set_exception(error)
            raise
        finally:
            self._claims.release(name, claim)


def _nodes_above(key: str) -> Iterator[str]:
    """Paths of all nodes in which a key may lie, the root's included."""
    at = key.find("/")
    while at >= 0:
        yield key[:at]
        at = key.find("/", at + 1)
    yield ""
