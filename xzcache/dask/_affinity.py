"""Affinity: tasks that read the same block of an array prefer the same node, which has cached it.

The node of a block is found by weighted rendezvous hashing: every scheduler finds the same one, and a node that joins
or leaves moves only its share. Dask keeps the first tasks of large graphs in a queue on the scheduler, so that workers
hold little in memory, and restricted tasks lose that. So neither a task is restricted nor are the idle workers narrowed
down for longer than one transition: when a worker has room, the first queued task that prefers its node is sent there,
before Dask sends the first one of all.

Only what a plugin of the scheduler may do is used: its hooks, `Scheduler.transitions`, the restrictions of tasks, and
the set of idle workers. All of it runs on the scheduler's event loop, so there are no locks. At the first exception,
the plugin leaves all decisions to Dask.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import zarr
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import Scheduler, TaskState, WorkerState

from xzcache.store import CacheStore

logger = logging.getLogger("xzcache.dask")

Mode = Literal["off", "auto", "on"]
Key = Any
Block = str
Node = str
_Path = tuple[Callable[[Any], Any], ...]
_Waiting = tuple[tuple[Any, ...], int, TaskState, "_Read"]

_HOPS: Final = 16
"""Wrappers around an array that are looked through."""
_PARTS: Final = 256
"""Parts of a task that are looked at for the block that it reads."""
_LIGHT: Final = 1_000_000
"""Bytes of a dependency that may be sent to the node of the block; larger ones count for more than the block."""
_REMEMBERED: Final = 1_000_000
"""Blocks whose nodes are remembered."""
_AT_ONCE: Final = 2**16
"""Scores that are computed at once: as many as a processor has near."""
_TAIL: Final = 2
"""The end of a node's part of the queue that is sent off, in parts of what a node may have from the queue at once."""
_READERS: Final = 4
"""Nodes that are remembered for one block."""
_STEALS: Final = 16
"""Queued tasks of another node among which an idle one looks for a block that it has read before."""


# -- which block a task reads


class Source(NamedTuple):
    """A cached array that tasks read blocks of."""

    grid: tuple[int, ...]
    """The shape of a chunk, or of a shard."""
    offsets: tuple[int, ...]
    """Where the array that Dask sees begins in the stored one."""

    def block(self, index: Any) -> Block | None:
        """A name of the chunk that an index begins in, which arrays on one grid share; None for what is no index."""
        if type(index) is not tuple or len(index) != len(self.grid):
            return None
        places = []
        has_slice = False
        for part, offset, size in zip(index, self.offsets, self.grid, strict=True):
            if type(part) is slice:
                has_slice = True
                places.append(str(((part.start or 0) + offset) // size))
            elif type(part) is int:
                places.append(str((part + offset) // size))
            else:
                return None
        return ".".join(places) if has_slice else None


def source_of(value: Any) -> Source | None:
    """The array in a `CacheStore` that is wrapped in a value; None if there is none."""
    offsets: list[int] = []
    for _ in range(_HOPS):
        if isinstance(value, zarr.Array):
            if not isinstance(value.store, CacheStore) or not value.shape:
                return None
            grid = value.shards or value.chunks
            if len(offsets) != len(grid):
                offsets = [0] * len(grid)
            return Source(tuple(max(1, size) for size in grid), tuple(offsets))
        # xarray keeps a selection that was made before the array was split into blocks
        if isinstance(parts := getattr(getattr(value, "key", None), "tuple", None), tuple):
            offsets = [part.start or 0 if isinstance(part, slice) and part.step in (None, 1) else 0 for part in parts]
        inner = getattr(value, "array", None)
        value = getattr(value, "_array", None) if inner is None else inner
        if value is None:
            return None
    return None


def _parts(spec: Any) -> Iterator[tuple[Any, _Path]]:
    """The parts of a task and the ways to them, outermost first; fused tasks are in the arguments of others."""
    queue: deque[tuple[Any, _Path]] = deque([(spec, ())])
    for _ in range(_PARTS):
        if not queue:
            return
        part, path = queue.popleft()
        yield part, path
        if isinstance(part, dict):
            # the keys differ from task to task, their order does not
            queue.extend((value, (*path, partial(_value_at, number))) for number, value in enumerate(part.values()))
        elif isinstance(part, tuple | list):
            queue.extend((value, (*path, itemgetter(number))) for number, value in enumerate(part))
        elif not isinstance(part, zarr.Array):
            for name in ("args", "kwargs", "value"):
                if (inner := getattr(part, name, None)) is not None and not callable(inner):
                    queue.append((inner, (*path, attrgetter(name))))


def _value_at(number: int, parts: dict[Any, Any]) -> Any:
    return next(islice(parts.values(), number, None))


class Reads:
    """The blocks that the tasks of a graph read; nothing for tasks that read none, or none that is understood.

    Tasks of one group are built alike, so what is found in the first one is looked for in the others, and nowhere else.
    """

    def __init__(self) -> None:
        self._paths: dict[tuple[str, int], _Path] = {}
        self._sources: dict[str, Source | bool] = {}
        """For each group: the array in the arguments of its tasks, True if tasks are arrays themselves, else False."""

    def of(self, task: TaskState) -> list[tuple[TaskState, Block]]:
        """The tasks that read the array which a task holds, and their blocks; or the task itself if it reads one."""
        group = task.group.name
        if (source := self._sources.get(group)) is None:
            source = self._sources[group] = self._look(task)
        if source is False:
            return []
        readers: Iterable[TaskState] = (task,)
        if source is True:
            found = _held(task)
            if found is None:
                return []
            source, readers = found, task.dependents
        blocks = ((reader, self._block(reader, source)) for reader in readers)
        return [(reader, block) for reader, block in blocks if block is not None]

    @staticmethod
    def _look(task: TaskState) -> Source | bool:
        if _held(task) is not None:
            return True
        if task.dependencies:
            return False
        # the array may be an argument of the task, as it then is of all tasks of the group
        found = (source_of(part) for part, _ in _parts(task.run_spec))
        return next((source for source in found if source is not None), False)

    def _block(self, task: TaskState, source: Source) -> Block | None:
        like = task.group.name, len(source.grid)
        if (path := self._paths.get(like)) is not None:
            try:
                part: Any = task.run_spec
                for step in path:
                    part = step(part)
                if (block := source.block(part)) is not None:
                    return block
            except (AttributeError, LookupError, TypeError, StopIteration):
                pass
        for part, path in _parts(task.run_spec):
            if (block := source.block(part)) is not None:
                self._paths[like] = path
                return block
        return None


def _held(task: TaskState) -> Source | None:
    """The array that a task is."""
    spec = task.run_spec
    return source_of(getattr(spec, "value", spec))


# -- which node a block prefers


class Choice(NamedTuple):
    """The first and the second choice of a block, which are the same if there is only one node."""

    first: Node
    second: Node


class Nodes:
    """The nodes of a cluster, their workers and weights, and which of them each block prefers."""

    def __init__(self) -> None:
        self._of_worker: dict[str, Node] = {}
        self._workers: dict[Node, set[str]] = {}
        self._bounds: dict[Node, int] = {}
        self._choices: dict[Block, Choice] = {}
        self._names: list[Node] = []
        self._keys = np.empty(0, dtype=np.uint64)
        self._weights = np.empty(0)
        """Of each node; empty if all weigh the same."""
        self._is_sorted = True
        self.changes = 0
        """How often nodes have come, gone, or changed their bounds."""

    def __len__(self) -> int:
        return len(self._bounds)

    def __contains__(self, node: Node) -> bool:
        return node in self._bounds

    def add(self, worker: str, node: Node, bound: int | None) -> None:
        """A worker has said where its cache is, and how much that may hold."""
        if self._of_worker.get(worker) != node or self._bounds.get(node) != (bound or 0):
            self.remove(worker)
            self._of_worker[worker], self._bounds[node] = node, bound or 0
            self._workers.setdefault(node, set()).add(worker)
            self._changed()

    def remove(self, worker: str) -> None:
        """A worker has left."""
        node = self._of_worker.pop(worker, None)
        if node is not None:
            self._workers[node].discard(worker)
            if not self._workers[node]:
                del self._workers[node], self._bounds[node]
                self._changed()

    def of(self, worker: str) -> Node | None:
        """The node of a worker."""
        return self._of_worker.get(worker)

    def workers(self, node: Node) -> set[str]:
        """The addresses of the workers of a node."""
        return self._workers.get(node, set())

    def _changed(self) -> None:
        self.changes += 1
        self._choices.clear()
        # a cluster that starts has many changes, and no block yet
        self._is_sorted = False

    def _sort(self) -> None:
        self._is_sorted = True
        self._names = sorted(self._bounds)
        self._keys = np.array([_hash(name) for name in self._names], dtype=np.uint64)
        known = [bound for bound in self._bounds.values() if bound]
        # a cache without a bound counts as the mean of the others
        usual = sum(known) / len(known) if known else 1
        weights = [(self._bounds[name] or usual) / usual for name in self._names]
        self._weights = np.array(weights if len(set(weights)) > 1 else [])

    def choose(self, blocks: Iterable[Block]) -> None:
        """Find the nodes of many blocks at once, which takes less time."""
        if not self._bounds:
            return
        if not self._is_sorted:
            self._sort()
        if len(self._choices) > _REMEMBERED:
            self._choices.clear()
        new = [block for block in dict.fromkeys(blocks) if block not in self._choices]
        step = max(1, _AT_ONCE // len(self._names))
        pairs: dict[tuple[int, int], Choice] = {}
        for start in range(0, len(new), step):
            part = new[start : start + step]
            keys = np.array([_hash(block) for block in part], dtype=np.uint64)
            scores = _mixed(keys[:, None] ^ self._keys[None, :])
            if self._weights.size:
                scores = self._weights / -np.log((scores + 0.5) / 2**53)
            first = scores.argmax(axis=1)
            scores[np.arange(len(part)), first] = 0
            second = scores.argmax(axis=1)
            for block, pair in zip(part, zip(first.tolist(), second.tolist(), strict=True), strict=True):
                if (choice := pairs.get(pair)) is None:
                    choice = pairs[pair] = Choice(*(self._names[at] for at in pair))
                self._choices[block] = choice

    def choice(self, block: Block) -> Choice | None:
        """The nodes that a block prefers; None if there are no nodes."""
        if (found := self._choices.get(block)) is None:
            self.choose([block])
            found = self._choices.get(block)
        return found


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _mixed(numbers: Any) -> Any:
    """Numbers of 53 bits that look drawn by lot, from 64 bits each (the finalizer of splitmix64), in their place."""
    spare = numbers >> np.uint64(30)
    for factor, shift in ((0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
        numbers ^= spare
        numbers *= np.uint64(factor)
        np.right_shift(numbers, np.uint64(shift), out=spare)
    numbers ^= spare
    numbers >>= np.uint64(11)
    return numbers


# -- where the scheduler sends a task


class _Read:
    """What a task reads, and the node that it prefers as long as it is queued."""

    __slots__ = ("block", "owner")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.owner: Node | None = None


class _Line:
    """Tasks by priority. Most come in that order, and need no heap; those that have left are still in it."""

    def __init__(self) -> None:
        self._ordered: deque[_Waiting] = deque()
        self._others: list[_Waiting] = []

    def push(self, waiting: _Waiting) -> None:
        if not self._ordered or waiting > self._ordered[-1]:
            self._ordered.append(waiting)
        else:
            heapq.heappush(self._others, waiting)

    def _is_ordered_first(self) -> bool:
        return not self._others or (bool(self._ordered) and self._ordered[0] < self._others[0])

    def first(self) -> _Waiting | None:
        if not self._ordered and not self._others:
            return None
        return (self._ordered if self._is_ordered_first() else self._others)[0]

    def pop(self) -> None:
        if self._is_ordered_first():
            self._ordered.popleft()
        else:
            heapq.heappop(self._others)

    def some(self, count: int) -> Iterator[_Waiting]:
        """Some of the first ones."""
        return islice(chain(self._others, self._ordered), count)

    def all(self) -> Iterator[_Waiting]:
        return chain(self._others, self._ordered)


class Affinity(SchedulerPlugin):
    """Has the scheduler send the tasks that read blocks to the nodes that these prefer.

    With peers, a node that reads a block of another one gets it from there and keeps no copy, so that the next task
    that reads it prefers the same node as ever. Without them, it prefers the node that read the block last.
    """

    name = "xzcache-affinity"

    def __init__(self, scheduler: Scheduler, nodes: Nodes, mode: Mode, *, has_peers: bool = False) -> None:
        self._scheduler = scheduler
        self._nodes = nodes
        self.has_peers = has_peers
        self.asked: Final = mode
        self._mode: Mode = mode
        self._preferred = self._elsewhere = 0
        self._reads: dict[Key, _Read] = {}
        self._readers: dict[Block, tuple[Node, ...]] = {}
        """The nodes of blocks that others than the first choice have read, the latest first."""
        self._waiting: dict[Node, _Line] = {}
        self._pushed = 0
        self._counts: dict[Node, int] = {}
        """How many queued tasks prefer a node."""
        self._queued = 0
        """How many queued tasks prefer any node."""
        self._awaited: set[Key] = set()
        """Tasks that are sent before the room of the worker that has ended the last one is filled."""
        self._seen = nodes.changes
        self._top: Key = None
        self._passed = 0
        self._is_sending = False

    def placed(self) -> dict[str, int]:
        """How many tasks that read blocks were sent to the nodes that these prefer, and how many elsewhere."""
        return {"preferred": self._preferred, "elsewhere": self._elsewhere}

    # what the scheduler tells

    def update_graph(self, scheduler: Scheduler, *, tasks: Iterable[Key], **_: Any) -> None:
        """Note which of the new tasks read what."""
        try:
            if self._mode == "off" or not self._nodes:
                return
            reads = Reads()
            found: dict[Key, Block] = {}
            for key in tasks:
                task = scheduler.tasks.get(key)
                if task is not None and task.run_spec is not None:
                    for reader, block in reads.of(task):
                        if _is_free(reader):
                            found[reader.key] = block
            self.note(found)
        except Exception as error:
            self._give_up(error)

    def note(self, blocks: dict[Key, Block]) -> None:
        """Note the blocks that tasks read."""
        self._reads |= {key: _Read(block) for key, block in blocks.items()}
        self._nodes.choose(blocks.values())

    def transition(
        self, key: Key, start: str, finish: str, *_: Any, stimulus_id: str, worker: str = "", **__: Any
    ) -> None:
        """Follow the queue; when a task has ended, send others to the worker that has room now."""
        if not self._reads:
            return
        try:
            if start == "processing":
                if finish == "memory":
                    self._ended(self._scheduler.tasks[key], worker, stimulus_id)
            elif finish == "queued":
                self._enqueue(self._scheduler.tasks[key])
            elif start == "queued":
                if (read := self._reads.get(key)) is not None and read.owner is not None:
                    self._counts[read.owner] -= 1
                    self._queued -= 1
                    read.owner = None
                    if not self._queued:
                        self._waiting.clear()
            elif start == "waiting":
                if key in self._awaited:
                    self._awaited.discard(key)
                    if not self._awaited:
                        self._refill(stimulus_id)
            elif finish == "waiting":
                if start == "released" and key in self._reads and not self._is_sending:
                    task = self._scheduler.tasks[key]
                    if not task.waiting_on:
                        self._place([task], stimulus_id, is_alone=True)
            elif finish == "forgotten":
                self._reads.pop(key, None)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Leave all to Dask, whose next release may work differently."""
        self._mode = "off"
        self._queued = 0
        for each in (self._reads, self._readers, self._waiting, self._counts, self._awaited):
            each.clear()
        logger.warning("affinity is off from now on: %s: %s", type(error).__name__, error, exc_info=error)

    # the queue, by the nodes that its tasks prefer

    def _owner(self, block: Block) -> Node | None:
        """The node that read a block last, else the one that it prefers."""
        if (choice := self._nodes.choice(block)) is None:
            return None
        if (readers := self._readers.get(block)) is None:
            return choice.first
        return next((node for node in readers if node in self._nodes), choice.first)

    def _enqueue(self, task: TaskState) -> None:
        if (read := self._reads.get(task.key)) is None or task.priority is None:
            return
        owner = read.owner = self._owner(read.block)
        if owner is not None:
            self._counts[owner] = self._counts.get(owner, 0) + 1
            self._queued += 1
            self._pushed += 1
            if (line := self._waiting.get(owner)) is None:
                line = self._waiting[owner] = _Line()
            line.push((task.priority, self._pushed, task, read))

    def _sort(self) -> None:
        """Sort the queue anew if nodes have come or gone."""
        if self._seen != self._nodes.changes:
            self._seen = self._nodes.changes
            self._queued = 0
            for each in (self._waiting, self._counts):
                each.clear()
            queued = list(self._scheduler.queued)
            self._nodes.choose(self._reads[task.key].block for task in queued if task.key in self._reads)
            for task in queued:
                self._enqueue(task)

    def _count(self, block: Block, worker: str) -> None:
        """Note where a block was read: that node has it from now on."""
        node, choice = self._nodes.of(worker), self._nodes.choice(block)
        if node is None or choice is None:
            return
        readers = self._readers.get(block, ())
        if node == choice.first or node in readers:
            self._preferred += 1
        else:
            self._elsewhere += 1
        if not self.has_peers and (readers or node != choice.first):
            others = [each for each in (*readers, choice.first) if each != node]
            self._readers[block] = (node, *others)[:_READERS]
            if len(self._readers) > _REMEMBERED:
                self._readers.clear()

    # when there is room

    def _ended(self, ended: TaskState, worker: str, stimulus: str) -> None:
        """A task has ended: place the reads that are ready now, and fill the room that is left from the queue."""
        if (read := self._reads.get(ended.key)) is not None:
            self._count(read.block, worker)
        ready = [task for task in ended.dependents if not task.waiting_on and task.state == "waiting"]
        reads = [task for task in ready if task.key in self._reads] if ready else ready
        if not reads and not (self._queued and self._scheduler.idle_task_count):
            return
        # what uses results comes before what makes more, as in Dask
        if ready and not reads:
            # Dask sends them next
            self._awaited = {task.key for task in ready}
            return
        if len(reads) < len(ready):
            others = sorted((task for task in ready if task.key not in self._reads), key=_priority, reverse=True)
            self._scheduler.transitions({task.key: "processing" for task in others}, stimulus)
        if reads:
            self._place(reads, stimulus)
        self._refill(stimulus)

    def _place(self, reads: list[TaskState], stimulus: str, *, is_alone: bool = False) -> None:
        """Send reads that are ready to the nodes that they prefer, as far as Dask would send them somewhere now.

        One that is ready alone cannot be compared with those that follow, so its node may get some more than it has
        room for.
        """
        scheduler = self._scheduler
        queues = not math.isinf(scheduler.WORKER_SATURATION)
        kinds: dict[str, bool] = {}
        for task in sorted(reads, key=_priority):
            group = task.group.name
            if group not in kinds:
                kinds[group] = scheduler.is_rootish(task)
            is_queued = kinds[group] and queues and task._queueable
            if is_queued and not scheduler.idle_task_count:
                # all others go to the queue
                continue
            if kinds[group] and not is_queued and self._mode != "on":
                # Dask sends all of them at once, neighbours to one worker, so that little has to move later
                continue
            if not kinds[group] and any(dependency.nbytes > _LIGHT for dependency in task.dependencies):
                continue
            owner = self._owner(self._reads[task.key].block)
            worker = None if owner is None else self._least_busy(owner)
            if worker is None:
                continue
            room = _slots(worker, scheduler.WORKER_SATURATION) if is_queued else math.inf
            if len(worker.processing) - len(worker.long_running) < room * (1 + is_alone):
                self._send(task, worker, stimulus)

    def _least_busy(self, node: Node) -> WorkerState | None:
        workers = (self._scheduler.workers.get(address) for address in self._nodes.workers(node))
        running = [worker for worker in workers if worker is not None and worker in self._scheduler.running]
        return min(running, key=lambda worker: len(worker.processing) / worker.nthreads, default=None)

    def _refill(self, stimulus: str) -> None:
        """Send queued tasks to the workers with room, as far as these prefer them; Dask fills the rest."""
        self._sort()
        scheduler = self._scheduler
        for worker in list(scheduler.idle_task_count):
            node = self._nodes.of(worker.address)
            while node is not None and self._queued and scheduler.queued and worker in scheduler.idle_task_count:
                top = scheduler.queued.peek()
                self._passed = self._passed + 1 if top.key == self._top else 0
                self._top = top.key
                if self._passed > 8 + 4 * scheduler.total_nthreads:
                    # what depends on the first task may wait in memory
                    return
                task = self._first(node)
                if task is None:
                    if self._is_last(worker):
                        self._flush(_turn(top), stimulus)
                        break
                    task = self._steal(node)
                if task is None or _turn(task) != _turn(top):
                    break
                self._send(task, worker, stimulus)

    def _is_last(self, thief: WorkerState) -> bool:
        """Whether the rest of the queue is better left to the nodes that it prefers, as the thief is busy yet."""
        if len(thief.processing) < thief.nthreads:
            return False
        # of workers that are alike, as most are
        room = len(self._scheduler.running) * _slots(thief, self._scheduler.WORKER_SATURATION)
        return max(self._counts.values()) * len(self._nodes) <= _TAIL * room

    def _flush(self, turn: tuple[Any, ...], stimulus: str) -> None:
        """Send the rest of the queue to the nodes that it prefers; Dask's work stealing balances what they have."""
        rest = [(waiting, owner) for owner, line in self._waiting.items() for waiting in line.all()]
        for (_, _, task, read), owner in sorted(rest, key=itemgetter(0)):
            worker = self._least_busy(owner) if read.owner == owner and _turn(task) == turn else None
            if worker is not None and task.state == "queued":
                self._send(task, worker, stimulus)

    def _first(self, node: Node) -> TaskState | None:
        """The first queued task that prefers a node."""
        if (line := self._waiting.get(node)) is not None:
            while (waiting := line.first()) is not None:
                _, _, task, read = waiting
                if read.owner == node and task.state == "queued":
                    return task
                line.pop()
        return None

    def _steal(self, thief: Node) -> TaskState | None:
        """A queued task of the node with the most, for one that has none; one that it is the best other choice for."""
        victim = max(self._counts, key=lambda node: self._counts[node])
        first = self._first(victim)
        second: TaskState | None = None
        for _, _, task, read in self._waiting[victim].some(_STEALS) if first is not None else ():
            if read.owner == victim and task.state == "queued":
                if thief in self._readers.get(read.block, ()):
                    return task
                if second is None and (choice := self._nodes.choice(read.block)) is not None and choice.second == thief:
                    second = task
        return second or first

    def _send(self, task: TaskState, worker: WorkerState, stimulus: str) -> None:
        """Have Dask send a ready or queued task to a worker, or anywhere if that is not possible."""
        scheduler = self._scheduler
        idle = scheduler.idle_task_count
        if task.state == "queued" and worker in idle:
            # Dask sends a queued task to the least busy of these. With one to choose from, it takes one transition, as
            # always; a task that is restricted has to leave the queue first, which takes three
            scheduler.idle_task_count = {worker}
            try:
                scheduler.transitions({task.key: "processing"}, stimulus)
            finally:
                if worker not in scheduler.idle_task_count:
                    idle.discard(worker)
                scheduler.idle_task_count = idle
            return
        before = task.worker_restrictions, task.loose_restrictions
        task.worker_restrictions, task.loose_restrictions = {worker.address}, True
        self._is_sending = True
        try:
            scheduler.transitions({task.key: "released" if task.state == "queued" else "processing"}, stimulus)
        finally:
            task.worker_restrictions, task.loose_restrictions = before
            self._is_sending = False


def _is_free(task: TaskState) -> bool:
    """Whether neither a user nor another plugin has said where a task runs."""
    return not (task.actor or task.worker_restrictions or task.host_restrictions or task.resource_restrictions)


def _slots(worker: WorkerState, saturation: float) -> int:
    """How many tasks Dask sends to a worker from its queue at once."""
    return max(math.ceil(saturation * worker.nthreads), 1)


def _priority(task: TaskState) -> tuple[Any, ...]:
    return task.priority or ()


def _turn(task: TaskState) -> tuple[Any, ...]:
    """The part of a priority that the tasks of one graph have in common."""
    return _priority(task)[:-1]
