"""Warm a cache: fetch what is missing of some arrays, and no more.

Knows Zarr's arrays and positions in them; `xzcache.xarray` makes them of datasets and selections. Objects are read by
the store's own `get` and `get_ranges`, so that warming and reading are one path: what another task or process fetches
is waited for, and a write to the source is respected.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import zarr
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from xzcache._config import config, parse_min_free, shown_bound, shown_size
from xzcache.directory import PINNED_SHARE, CacheDirectory, Inspector, SharedBackend, free_bytes
from xzcache.manage._results import CacheUnavailable, Failed, TooLarge, Warmed
from xzcache.manage._which import must, settled
from xzcache.model import Entry
from xzcache.sources import scrub
from xzcache.store import CacheStore

T = TypeVar("T")

Positions = range | np.ndarray[Any, Any]
Coords = tuple[int, ...]
Item = tuple[int, Coords]
"""An object: the number of its part, and its place in the grid of the array."""

_TICK: Final = 0.1
_GRACE: Final = 30.0
"""Seconds for which requests that are under way may end after an interruption."""
# after so many looks, the event loop gets a turn: other tasks of the process read on it
_AT_ONCE: Final = 64
_SAMPLE: Final = 16
_FEWEST_KNOWN: Final = 8
_LONGEST_PAUSE: Final = 10.0
_MOST_FAILURES: Final = 64
"""The failures in a row after which the source is taken to be away."""
_ASKED: Final = 5.0
_ANSWER: Final = 30.0


@dataclass(frozen=True)
class Part:
    """A part of an array: the positions along each dimension, or all; `everywhere` tells that each node needs it."""

    array: zarr.Array[Any]
    box: tuple[Positions, ...] | None = None
    everywhere: bool = False


class Share(NamedTuple):
    """One node's share of the work: the contiguous part of this number, of so many."""

    number: int = 0
    of: int = 1


class Progress(NamedTuple):
    """The state of a warming: `done` of `total` objects, of which `cached` were cached before; bytes and seconds."""

    total: int
    cached: int
    done: int
    size: int
    failed: int
    seconds: float

    def text(self) -> str:
        """The state in one line: objects, bytes, rate, and the time that is left."""
        rate = self.size / self.seconds if self.seconds else 0.0
        fetched = self.done - self.cached
        failed = f", {self.failed:,} failed" if self.failed else ""
        left = ""
        if fetched > 0 and self.done < self.total:
            left = f", {_shown_duration((self.total - self.done) * self.seconds / fetched)} left"
        return f"{self.done:,}/{self.total:,} objects, {shown_size(self.size)}, {shown_size(rate)}/s{left}{failed}"


Show = Callable[[Progress], None]


def _shown_duration(seconds: float) -> str:
    """A time that is left, in its largest unit of which there are some."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{math.ceil(seconds)} s"


# -- the objects of a part


class _Objects:
    """The objects of one part of an array: their keys, their cached parts, and their fetches."""

    def __init__(self, part: Part) -> None:
        array = part.array
        if not isinstance(store := array.store, CacheStore):
            raise ValueError(
                f"{array!r} is not read through a CacheStore, so that it is not accepted: open it with one"
            )
        if store.source.fickle:
            raise ValueError(f"{store!r} is not accepted: its source differs from read to read and is never cached")
        self.part, self.array, self.store = part, array, store
        self.everywhere = part.everywhere
        self.backend = store._reads.backend
        self._prototype = default_buffer_prototype()
        shards = getattr(array, "shards", None)
        try:
            self.grid: tuple[int, ...] = tuple(shards or array.chunks)
        except (NotImplementedError, AttributeError) as error:
            raise ValueError(f"{array!r} has chunks of unequal sizes, which is not accepted yet") from error
        full = tuple(range(length) for length in array.shape)
        box = part.box if part.box is not None and len(part.box) <= array.ndim else ()
        # a dimension that the decoded values do not have is needed as a whole
        self.box = (*box, *full[len(box) :])
        self._axes = [_numbers(positions, size) for positions, size in zip(self.box, self.grid, strict=True)]
        self._is_full = all(len(positions) == len(whole) for positions, whole in zip(self.box, full, strict=True))
        self._index = None if self._is_full else _IndexOfShard.of(array, self.grid)
        self._prefix = f"{array.path}/" if array.path else ""
        self.known: list[int] = []

    def __len__(self) -> int:
        return math.prod(map(len, self._axes))

    def __iter__(self) -> Iterator[Coords]:
        return itertools.product(*(axis.tolist() for axis in self._axes))

    def key(self, coords: Coords) -> str:
        """The key of an object."""
        return self._prefix + self.array.metadata.encode_chunk_key(coords)

    def _chunks(self, coords: Coords) -> np.ndarray[Any, Any] | None:
        """The numbers of the inner chunks that are needed of a shard; None for all of it."""
        if (index := self._index) is None:
            return None
        needed = []
        is_all = True
        for at, positions, size, inner, length in zip(
            coords, self.box, self.grid, index.inner, self.array.shape, strict=True
        ):
            first = at * size
            numbers = _numbers(_between(positions, first, first + size), inner) - first // inner
            is_all &= len(numbers) == -(-(min(length, first + size) - first) // inner)
            needed.append(numbers)
        return None if is_all else np.ravel_multi_index(np.ix_(*needed), index.shape).ravel()

    async def look(self, coords: Coords) -> int | None:
        """The cached bytes of the needed part of an object; None if a request is needed."""
        key, reads = self.key(coords), self.store._reads
        size = await reads.cached_size(key)
        if size is not None:
            self.known.append(size)
            return size
        if await reads.is_known_missing(key):
            return 0
        chunks = self._chunks(coords)
        if chunks is None or self._index is None or reads.reading.must_ask(key):
            return None
        pieces = self.backend.parts(key).pieces
        suffix = Entry(self.backend.prefix + key, *self._index.span)
        # without its index, a shard's chunks cannot be found, and the index would cost a request
        if not any(True for _ in pieces.covering(suffix)):
            return None
        index = await self.store.get(key, self._prototype, self._index.request)
        spans = [] if index is None else self._index.spans(index.to_bytes(), chunks)
        if not all(any(True for _ in pieces.covering(Entry(self.backend.prefix + key, *span))) for span in spans):
            return None
        return sum(stop - start for start, stop in spans)

    async def fetch(self, coords: Coords) -> int | None:
        """Read the needed part of an object through the cache; returns its bytes, None if the source has no object."""
        key = self.key(coords)
        chunks = self._chunks(coords)
        if chunks is None or self._index is None:
            value = await self.store.get(key, self._prototype)
            return None if value is None else len(value)
        index = await self.store.get(key, self._prototype, self._index.request)
        if index is None:
            return None
        requests = [RangeByteRequest(*span) for span in self._index.spans(index.to_bytes(), chunks)]
        if not requests:
            return 0
        size = 0
        async for group in self.store.get_ranges(key, requests, prototype=self._prototype):
            size += sum(len(value) for _, value in group if value is not None)
        return size

    def share_of(self, coords: Coords) -> float:
        """The part of an object that is needed."""
        chunks = self._chunks(coords)
        return 1.0 if chunks is None or self._index is None else len(chunks) / math.prod(self._index.shape)

    @property
    def decoded(self) -> int:
        """The bytes of an object without compression."""
        return math.prod(self.grid) * int(self.array.dtype.itemsize)

    async def typical_size(self, missing: Sequence[Coords]) -> float | None:
        """The mean size of the missing objects, estimated from cached ones or by asking for the size of a few."""
        if len(self.known) >= _FEWEST_KNOWN:
            return sum(self.known) / len(self.known)
        source = self.store._store
        if type(source).getsize is Store.getsize:
            # the default method of Zarr would read the object
            return None
        step = max(1, len(missing) // _SAMPLE)
        keys = [self.key(coords) for coords in missing[::step][:_SAMPLE]]
        sizes = await asyncio.gather(*map(source.getsize, keys), return_exceptions=True)
        if any(isinstance(size, BaseException) and not isinstance(size, FileNotFoundError) for size in sizes):
            return None
        return sum(size for size in sizes if isinstance(size, int)) / len(sizes)


class _IndexOfShard:
    """Where the inner chunks of the shards of an array lie, for shards of which Zarr reads only a part."""

    def __init__(self, codec: ShardingCodec, grid: tuple[int, ...]) -> None:
        self.inner: tuple[int, ...] = codec.chunk_shape
        self.shape = tuple(size // inner for size, inner in zip(grid, self.inner, strict=True))
        self._count = math.prod(self.shape)
        first, *others = codec.index_codecs
        assert isinstance(first, BytesCodec)
        endian = getattr(first.endian, "value", first.endian)
        self._dtype = np.dtype("u8").newbyteorder(">" if endian == "big" else "<")
        size = 16 * self._count + 4 * len(others)
        location = getattr(codec.index_location, "value", codec.index_location)
        self.request = RangeByteRequest(0, size) if location == "start" else SuffixByteRequest(size)
        self.span = (0, size) if location == "start" else (-size, -1)

    @classmethod
    def of(cls, array: zarr.Array[Any], grid: tuple[int, ...]) -> _IndexOfShard | None:
        """The index of an array's shards; None if its objects are read as a whole."""
        codecs: tuple[Any, ...] = tuple(getattr(array.metadata, "codecs", ()))
        # with any other codec around the shards, Zarr reads them as a whole
        if len(codecs) != 1 or not isinstance(codec := codecs[0], ShardingCodec):
            return None
        first, *others = codec.index_codecs
        if not isinstance(first, BytesCodec) or [type(other) for other in others] not in ([], [Crc32cCodec]):
            return None
        return cls(codec, grid)

    def spans(self, index: bytes, chunks: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
        """The byte ranges of chunks; empty chunks have none."""
        pairs = np.frombuffer(index, self._dtype, 2 * self._count).reshape(-1, 2)[chunks]
        # Zarr marks an empty chunk by the largest number
        there = pairs[(pairs != np.uint64(2**64 - 1)).all(axis=1)].tolist()
        return sorted((start, start + length) for start, length in there)


def _numbers(positions: Positions, size: int) -> np.ndarray[Any, Any]:
    """The numbers of the chunks of a dimension that some positions lie in, in order."""
    if not len(positions):
        return np.empty(0, np.int64)
    if isinstance(positions, range) and abs(positions.step) <= size:
        first, last = sorted((positions[0], positions[-1]))
        return np.arange(first // size, last // size + 1)
    return np.unique(np.asarray(positions) // size)


def _between(positions: Positions, first: int, last: int) -> Positions:
    if isinstance(positions, range):
        up = positions if positions.step > 0 else positions[::-1]
        begin = max(0, -(-(first - up.start) // up.step))
        return up[begin : max(begin, -(-(last - up.start) // up.step))]
    return positions[(positions >= first) & (positions < last)]


# -- one process


@dataclass
class Plan:
    """The work of one process: the missing objects, and the figures of the cached ones."""

    missing: list[Item] = field(default_factory=list)
    cached: int = 0
    cached_size: int = 0
    needed: float | None = None
    """An estimate of the bytes of the missing objects; None if their size is unknown."""
    refusal: str = ""
    """Why a node cannot keep the selection; empty if it can. Only a plan of a node has it."""
    capacity: int | None = None
    """The most bytes of the selection that the cache can keep; None if there is no limit."""


@dataclass
class Outcome:
    """The result of one process."""

    fetched: int = 0
    absent: int = 0
    size: int = 0
    failed: list[Failed] = field(default_factory=list)
    not_tried: int = 0
    trouble: str = ""


class Run:
    """The warming of some parts, in this process. Its coroutines run on the event loop of Zarr."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.objects = [_Objects(part) for part in parts]
        self.stores = list({id(each.store): each.store for each in self.objects}.values())
        self.is_stopped = False
        self.outcome = Outcome()
        self._failures_in_row = 0
        self._fetched: list[Item] = []
        self._from_source = self._counted()

    def _counted(self) -> int:
        return sum(store.cache_stats()["bytes_from_source"] for store in self.stores)

    @property
    def size(self) -> int:
        """The bytes that came from the source since this run began."""
        return self._counted() - self._from_source

    def items(self, share: Share) -> Iterator[Item]:
        """The objects of a share, in order."""
        whole = sum(len(each) for each in self.objects if not each.everywhere)
        first, last = (whole * at // share.of for at in (share.number, share.number + 1))
        begin = 0
        for number, each in enumerate(self.objects):
            if each.everywhere:
                yield from ((number, coords) for coords in each)
                continue
            mine = slice(max(0, first - begin), max(0, last - begin))
            yield from ((number, coords) for coords in itertools.islice(each, mine.start, mine.stop))
            begin += len(each)

    async def plan(self, share: Share) -> Plan:
        """Find the missing objects, and whether the cache can keep all of them."""
        plan = Plan()
        for count, (number, coords) in enumerate(self.items(share), 1):
            if self.is_stopped:
                break
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)
            if (size := await self.objects[number].look(coords)) is None:
                plan.missing.append((number, coords))
            else:
                plan.cached += 1
                plan.cached_size += size
        limits = [await _capacity(store, plan.cached_size) for store in self.stores]
        plan.capacity = min((limit for limit in limits if limit is not None), default=None)
        plan.needed = await self._needed(plan)
        return plan

    async def _needed(self, plan: Plan) -> float | None:
        by_part: dict[int, list[Coords]] = {}
        for number, coords in plan.missing:
            by_part.setdefault(number, []).append(coords)
        shares = {number: sum(map(self.objects[number].share_of, missing)) for number, missing in by_part.items()}
        most = sum(self.objects[number].decoded * share for number, share in shares.items())
        # even without compression everything fits, so no size has to be asked for
        if plan.capacity is None or plan.cached_size + most <= plan.capacity:
            return most
        needed = 0.0
        for number, missing in by_part.items():
            if (typical := await self.objects[number].typical_size(missing)) is None:
                return None
            needed += typical * shares[number]
        return needed

    async def fetch(self, items: Sequence[Item], concurrency: int, retries: int, room: float | None) -> None:
        """Fetch objects; failed ones are tried again after the others."""
        left = list(items)
        for attempt in range(retries + 1):
            if attempt:
                await self._pause(min(2.0 ** (attempt - 1), _LONGEST_PAUSE))
            failed: list[Item] = []
            self.outcome.failed = []
            self._failures_in_row = 0
            waiting = iter(left)

            async def work(waiting: Iterator[Item] = waiting, failed: list[Item] = failed) -> None:
                for item in waiting:
                    if self.is_stopped or self._is_over(room):
                        failed.append(item)
                        return
                    await self._one(item, failed)

            await asyncio.gather(*(work() for _ in range(min(concurrency, len(left)))))
            left = [*failed, *waiting]
            if not left or self.is_stopped or self.outcome.trouble:
                break
        self.outcome.not_tried = len(left) - len(self.outcome.failed)

    async def _one(self, item: Item, failed: list[Item]) -> None:
        objects = self.objects[item[0]]
        try:
            size = await objects.fetch(item[1])
        except Exception as error:
            if _is_missing(error):
                size = None
            else:
                failed.append(item)
                self.outcome.failed.append(Failed(objects.key(item[1]), _reason(error)))
                self._failures_in_row += 1
                return
        self._failures_in_row = 0
        if size is None:
            self.outcome.absent += 1
        else:
            self.outcome.fetched += 1
            self._fetched.append(item)

    def _is_over(self, room: float | None) -> bool:
        if self._failures_in_row >= _MOST_FAILURES:
            self.outcome.trouble = f"{self._failures_in_row} failures in a row: the source is not asked any more"
        if room is not None and self.size > room:
            self.outcome.trouble = "the cache is full: more would evict what was just fetched"
        return bool(self.outcome.trouble)

    async def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.is_stopped and time.monotonic() < end:
            await asyncio.sleep(_TICK)

    async def verify(self) -> None:
        """Add the objects that were fetched, and are not in the cache, to the failed ones."""
        for count, (number, coords) in enumerate(self._fetched, 1):
            if self.is_stopped:
                return
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)
            objects = self.objects[number]
            key = objects.key(coords)
            if objects.store._reads.reading.must_ask(key) or await objects.look(coords) is not None:
                continue
            self.outcome.fetched -= 1
            self.outcome.failed.append(Failed(key, "it was fetched, but the cache did not keep it"))

    def settle(self) -> None:
        """Wait until all that was fetched is stored."""
        for store in self.stores:
            if isinstance(backend := store._reads.backend, SharedBackend):
                settled(backend.directory.root)


async def _capacity(store: CacheStore, cached: int) -> int | None:
    """The bytes of one selection that a cache can hold, of which `cached` are there; None if there is no limit."""
    if not isinstance(backend := store._reads.backend, SharedBackend):
        return store.max_size
    return await asyncio.to_thread(_capacity_of, backend.directory, backend.namespace, cached, store.policy)


def _capacity_of(directory: CacheDirectory, namespace: str, cached: int, policy: str) -> int | None:
    must(directory.root, directory.must_prepare)
    with Inspector(directory.root) as inspector:
        totals, (pins, pinned) = inspector.totals(), inspector.pins()
        if pins:
            # pinned entries of the same source are part of the selection
            of_source = {source.id for source in inspector.sources() if source.namespace == namespace}
            pinned -= sum(use.pinned for number, use in inspector.uses().items() if number in of_source)
    free, size = free_bytes(directory.root)
    reserve = parse_min_free("min_free", config.get("min_free"))
    limit = totals.max_size
    if size:
        by_disk = totals.size + free - int(reserve * size if isinstance(reserve, float) else reserve)
        limit = by_disk if limit is None else min(limit, by_disk)
    if limit is None:
        return None
    return max(0, limit - totals.size + cached if policy == "none" else limit - pinned)


def _is_missing(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(FileNotFoundError)[1] is None
    return isinstance(error, FileNotFoundError)


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    # the rest is for the developers of a client
    text = " ".join(str(scrub(error)).partition("Debug source:")[0].split())
    name = type(error).__name__
    return name if not text else text[:300] if text.startswith(name) else f"{name}: {text[:300]}"


def refusal(plan: Plan, where: str, bound: str) -> str:
    """Why the cache cannot keep the selection; empty if it can, or if the size of the selection is unknown."""
    if plan.capacity is None or plan.needed is None or plan.cached_size + plan.needed <= plan.capacity:
        return ""
    return (
        f"about {shown_size(plan.cached_size + plan.needed)} are asked for, of which {shown_size(plan.cached_size)} "
        f"are cached, and {where} has room for {shown_size(plan.capacity)} ({bound}): select less, or enlarge it with "
        "`xzcache resize`"
    )


def drive(run: Run, coroutine: Coroutine[Any, Any, T], tick: Callable[[], None] | None = None) -> T:
    """Run a coroutine on Zarr's event loop; after an interruption, let the requests under way end."""

    async def running() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, sync(running()))
    try:
        while True:
            try:
                return future.result(_TICK)
            except NotYet:
                if future.done():
                    return future.result()
            if tick is not None:
                tick()
    except BaseException:
        # an interruption must not lose the requests under way, whose bytes were transferred
        run.is_stopped = True
        with suppress(NotYet, Exception):
            future.result(_GRACE)
        future.cancel()
        raise


def warm_parts(
    parts: Sequence[Part],
    *,
    concurrency: int,
    retries: int,
    client: Any,
    every_node: bool,
    is_pinned: bool,
    dry_run: bool,
    show: Show | None,
) -> Warmed:
    """Fetch what is missing of some parts, here or on each node of a cluster."""
    began = time.monotonic()
    if client is not None:
        with client.as_current():
            return _on_cluster(client, list(parts), concurrency, retries, every_node, dry_run, show)
    run = Run(parts)
    plan = drive(run, run.plan(Share()))
    where, bound = _names(run)
    if is_pinned and plan.capacity is not None:
        plan.capacity, bound = int(plan.capacity * PINNED_SHARE), f"{bound}, and pins may take {PINNED_SHARE:.0%} of it"
    refused = refusal(plan, where, bound)
    total = len(plan.missing) + plan.cached
    found = Warmed(total, plan.cached, dry_run=dry_run, missing=len(plan.missing), needed=_as_int(plan.needed))
    if dry_run:
        return replace(found, directories=(where,), seconds=time.monotonic() - began, refusal=refused)
    if refused:
        raise TooLarge(refused)
    outcome = run.outcome

    def tick() -> None:
        if show is not None:
            done = plan.cached + outcome.fetched + outcome.absent
            show(Progress(total, plan.cached, done, run.size, len(outcome.failed), time.monotonic() - started))

    started = time.monotonic()
    room = None if plan.capacity is None else float(plan.capacity - plan.cached_size)
    try:
        tick()
        drive(run, run.fetch(plan.missing, concurrency, retries, room), tick)
    finally:
        run.settle()
        tick()
    seconds = time.monotonic() - started
    if not outcome.trouble:
        drive(run, run.verify())
    return replace(
        found,
        fetched=outcome.fetched,
        absent=outcome.absent,
        size=run.size,
        seconds=seconds,
        failed=tuple(sorted(outcome.failed)),
        not_tried=outcome.not_tried,
        trouble=outcome.trouble,
        directories=(where,),
    )


def _as_int(size: float | None) -> int | None:
    return None if size is None else int(size)


def _names(run: Run) -> tuple[str, str]:
    """The cache for people, and its bound."""
    store = run.stores[0]
    backend = store._reads.backend
    if isinstance(backend, SharedBackend):
        return f"the cache in {backend.directory.root}", f"its bound is {shown_bound(backend.bound)}"
    return "the cache", f"its bound is {shown_bound(store.max_size)}"


# -- a cluster of Dask: the client plans, and gives each node one batch after the other


class _There(NamedTuple):
    node: str
    where: str
    bound: str


def _node_there(part: Part) -> _There:
    """The cache that a worker uses for a part."""
    run = Run([part])
    where, bound = _names(run)
    backend = run.stores[0]._reads.backend
    if not isinstance(backend, SharedBackend):
        raise CacheUnavailable(f"{where} cannot be used")
    must(backend.directory.root, backend.directory.must_prepare)
    return _There(backend.directory.barrier.try_or(backend.directory.session.node_id, ""), where, bound)


def _plan_there(parts: list[Part], share: Share) -> Plan:
    run = Run(parts)
    # on each node, so that reads there need no request for these documents either
    for store, path, zarr_format in {(id(o.store), o.array.path): _place(o.array) for o in run.objects}.values():
        _open(store, path, zarr_format)
    plan = drive(run, run.plan(share))
    plan.refusal = refusal(plan, *_names(run))
    return plan


def _place(array: zarr.Array[Any]) -> tuple[Any, str, Any]:
    return array.store, array.path, array.metadata.zarr_format


def _open(store: Store, path: str, zarr_format: Any) -> None:
    """Read the documents that are needed to open an array where this process runs."""
    folder, _, name = path.rpartition("/")
    if name:
        with suppress(FileNotFoundError, KeyError):
            zarr.open_group(store, path=folder, mode="r", zarr_format=zarr_format)[name]
            return
    zarr.open_array(store, path=path, mode="r", zarr_format=zarr_format)


def _fetch_there(parts: list[Part], items: list[Item], concurrency: int, retries: int) -> Outcome:
    run = Run(parts)
    drive(run, run.fetch(items, concurrency, retries, None))
    run.settle()
    if not run.outcome.trouble:
        drive(run, run.verify())
    run.outcome.size = run.size
    return run.outcome


class _Node:
    """A node of a cluster, and its remaining work."""

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where
        self.workers: list[str] = []
        self.plan = Plan()
        self.done = 0
        self.outcome = Outcome()

    def next(self, most: int) -> list[Item]:
        batch = self.plan.missing[self.done : self.done + most]
        self.done += len(batch)
        return batch

    def add(self, outcome: Outcome) -> None:
        total = self.outcome
        self.outcome = Outcome(
            total.fetched + outcome.fetched,
            total.absent + outcome.absent,
            total.size + outcome.size,
            [*total.failed, *outcome.failed],
            total.not_tried + outcome.not_tried,
            outcome.trouble or total.trouble,
        )
        if outcome.trouble:
            self.give_up(outcome.trouble)

    def give_up(self, reason: str) -> None:
        self.outcome.not_tried += len(self.plan.missing) - self.done
        self.done = len(self.plan.missing)
        self.outcome.trouble = f"{self.where}: {reason}"


def _on_cluster(
    client: Any,
    parts: list[Part],
    concurrency: int,
    retries: int,
    every_node: bool,
    dry_run: bool,
    show: Show | None,
) -> Warmed:
    began = time.monotonic()
    nodes = _nodes_of(client, parts[0])
    shares = [Share() if every_node else Share(number, len(nodes)) for number in range(len(nodes))]
    # not pure: the same call has another result after the cache has changed
    options: dict[str, Any] = {"pure": False, "allow_other_workers": False}
    plans = [
        client.submit(_plan_there, parts, share, workers=node.workers, **options)
        for node, share in zip(nodes, shares, strict=True)
    ]
    for node, plan in zip(nodes, client.gather(plans), strict=True):
        node.plan = plan
    cached, missing = sum(node.plan.cached for node in nodes), sum(len(node.plan.missing) for node in nodes)
    total = cached + missing
    needed = [node.plan.needed for node in nodes]
    found = Warmed(
        total,
        cached,
        dry_run=dry_run,
        missing=missing,
        needed=None if None in needed else int(sum(size or 0 for size in needed)),
        directories=tuple(node.where for node in nodes),
    )
    refused = "; ".join(node.plan.refusal for node in nodes if node.plan.refusal)
    if dry_run:
        return replace(found, seconds=time.monotonic() - began, refusal=refused)
    if refused:
        raise TooLarge(refused)
    started = time.monotonic()

    def tick() -> None:
        if show is not None:
            done = cached + sum(node.outcome.fetched + node.outcome.absent for node in nodes)
            size, failed = sum(node.outcome.size for node in nodes), sum(len(node.outcome.failed) for node in nodes)
            show(Progress(total, cached, done, size, failed, time.monotonic() - started))

    tick()
    _work_off(client, parts, nodes, max(_AT_ONCE, 4 * concurrency), (concurrency, retries), tick, options)
    outcomes = [node.outcome for node in nodes]
    return replace(
        found,
        fetched=sum(each.fetched for each in outcomes),
        absent=sum(each.absent for each in outcomes),
        size=sum(each.size for each in outcomes),
        seconds=time.monotonic() - started,
        failed=tuple(sorted(failed for each in outcomes for failed in each.failed)),
        not_tried=sum(each.not_tried for each in outcomes),
        trouble="; ".join(each.trouble for each in outcomes if each.trouble),
    )


def _work_off(
    client: Any,
    parts: list[Part],
    nodes: list[_Node],
    batch: int,
    how: tuple[int, int],
    tick: Callable[[], None],
    options: dict[str, Any],
) -> None:
    """Give each node its batches, one at a time."""
    from distributed import wait

    wait_for: Callable[..., object] = wait
    running: dict[Any, tuple[_Node, list[Item]]] = {}
    is_over = False

    # one batch at a time for each node, so that a node that fails or is slow holds up no other
    def start(node: _Node) -> None:
        if items := [] if is_over else node.next(batch):
            running[client.submit(_fetch_there, parts, items, *how, workers=node.workers, **options)] = node, items

    def finish(timeout: float) -> None:
        with suppress(TimeoutError):
            wait_for(list(running), timeout=timeout, return_when="FIRST_COMPLETED")
        for future in [future for future in running if future.done()]:
            node, items = running.pop(future)
            try:
                node.add(future.result())
            except Exception as error:
                node.outcome.not_tried += len(items)
                node.give_up(_reason(error))
            start(node)

    for node in nodes:
        start(node)
    looked = time.monotonic()
    try:
        while running:
            finish(1.0)
            tick()
            if time.monotonic() > looked + _ASKED:
                looked = time.monotonic()
                # Dask waits for ever for a task whose workers have left
                there = set(client.sync(_addresses, client))
                for future, (node, items) in list(running.items()):
                    if not future.done() and there.isdisjoint(node.workers):
                        del running[future]
                        node.outcome.not_tried += len(items)
                        node.give_up("its workers have left the cluster")
    except BaseException:
        is_over = True
        end = time.monotonic() + _GRACE
        while running and time.monotonic() < end:
            finish(1.0)
        raise
    finally:
        client.cancel(list(running))
        tick()


async def _addresses(client: Any) -> list[str]:
    scheduler: Any = client.scheduler
    return list((await scheduler.identity())["workers"])


def _nodes_of(client: Any, part: Part) -> list[_Node]:
    """The nodes of a cluster, in an order that stays the same: those whose workers answer."""
    answers: dict[str, Any] = client.sync(_asked, client, part)
    if not answers:
        raise ValueError(f"client={client!r} is not accepted: its cluster has no worker yet")
    nodes: dict[str, _Node] = {}
    errors = []
    for address, answer in sorted(answers.items()):
        if isinstance(answer, _There):
            nodes.setdefault(answer.node, _Node(answer.node, answer.where)).workers.append(address)
        else:
            errors.append(f"{address}: {'no answer' if answer is None else _reason(answer)}")
    if not nodes:
        raise CacheUnavailable(f"no worker of the cluster can use its cache: {errors[0]}")
    if errors:
        print(f"xzcache: left out: {'; '.join(errors)}", file=sys.stderr)
    return [nodes[name] for name in sorted(nodes)]


async def _asked(client: Any, part: Part) -> dict[str, Any]:
    async def ask(address: str) -> Any:
        # not one request for all workers, because that ends when the slowest has answered
        answers = client.run(_node_there, part, workers=[address], on_error="return")
        try:
            return (await asyncio.wait_for(answers, _ANSWER))[address]
        except (TimeoutError, OSError) as error:
            return None if isinstance(error, TimeoutError) else error

    addresses = await _addresses(client)
    return dict(zip(addresses, await asyncio.gather(*map(ask, addresses)), strict=True))


# -- progress bars


@contextmanager
def progress_bar(wanted: bool | None) -> Iterator[Show | None]:
    """A progress bar on a terminal or in a notebook, by rich if it is installed; None without either."""
    try:
        from rich.console import Console
    except ImportError:
        if sys.stderr.isatty() if wanted is None else wanted:
            with _plain_bar() as show:
                yield show
        else:
            yield None
        return
    console = Console(stderr=True)
    is_seen = (console.is_terminal and not console.is_dumb_terminal) or console.is_jupyter
    if wanted is False or (wanted is None and not is_seen):
        yield None
    elif not is_seen or (console.is_jupyter and find_spec("ipywidgets") is None):
        # without ipywidgets, rich shows a warning in a notebook
        with _plain_bar() as show:
            yield show
    else:
        with _rich_bar(console) as show:
            yield show


@contextmanager
def _rich_bar(console: Any) -> Iterator[Show]:
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(TextColumn("warm"), BarColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=None)

        def show(state: Progress) -> None:
            bar.update(task, total=max(1, state.total), completed=state.done, description=state.text())

        yield show


@contextmanager
def _plain_bar() -> Iterator[Show]:
    width = 0

    def show(state: Progress) -> None:
        nonlocal width
        text = f"warm: {state.text()}"
        width = max(width, len(text))
        sys.stderr.write(f"\r{text.ljust(width)}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        if width:
            sys.stderr.write("\n")
