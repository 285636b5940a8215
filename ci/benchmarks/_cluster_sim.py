"""A cluster on paper: on which node each task of a stream runs, and what the caches of the nodes hold then.

xzcache's own `Affinity` and `Nodes` decide; the scheduler that they work for is a model of Dask's, with its queue, its
slots and its work stealing. The model is simple where Dask is not: all tasks of a job are alike, except for their work;
tasks that read nothing take no time; a worker is a node. Caches evict the chunk whose last use is the oldest.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush, nlargest
from pathlib import Path
from random import Random
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from xzcache.dask._affinity import Affinity, Choice, Nodes

SATURATION: Final = 1.1
"""Dask's default: tasks that a worker gets from the queue at once, for each of its threads."""
BALANCE: Final = 0.1
"""Seconds between two rounds of Dask's work stealing."""
UNKNOWN: Final = 0.5
"""Seconds that Dask takes a task for whose like has not run yet."""

Chunk = str


class Task(NamedTuple):
    """A task that reads chunks, which lie at the same block of the grid."""

    block: str
    chunks: tuple[Chunk, ...]
    work: float
    """Seconds that it takes when all chunks are local."""


class Job(NamedTuple):
    """The tasks of one graph, in the order of their priorities."""

    name: str
    tasks: Sequence[Task]
    nodes: int
    """How many nodes there are then; those that are missing join before the job."""


class Costs(NamedTuple):
    """Seconds that it takes to read one chunk, and its bytes."""

    hit: float = 0.001
    peer: float = 0.004
    source: float = 0.05
    chunk_bytes: int = 2**20


Peers = Literal["off", "first", "second"]
"""Whom a node asks for a chunk that it has not: nobody, the node that the block prefers, which fetches it if need be,
or that one too, and that one asks the second choice if it has joined later."""


class Setup(NamedTuple):
    """A cluster that a stream of jobs is given to."""

    affinity: bool
    peers: Peers
    room: float = math.inf
    """Chunks that the cache of a node holds."""
    threads: int = 1
    costs: Costs = Costs()
    noise: float = 0.3
    """The spread of the times of tasks that are alike: without it, each job would be placed as the one before."""
    seed: int = 0


class Outcome(NamedTuple):
    """What one job did."""

    name: str
    seconds: float
    reads: int
    hits: int
    """Reads that found their chunk on their node."""
    again: int
    """Reads of chunks that some node has read before."""
    requests: int
    """Reads that the source has answered."""
    sent: int
    """Reads that a peer has answered, whether from its cache or from the source."""
    load: Counter[str]
    """Tasks by the node that they ran on."""


# -- the caches


class Caches:
    """The caches of all nodes, and where a read finds its chunk."""

    def __init__(self, setup: Setup, nodes: Nodes) -> None:
        self._setup, self._nodes = setup, nodes
        self._held: dict[str, OrderedDict[Chunk, None]] = {}
        self._passed: dict[str, set[Chunk]] = {}
        """Chunks that a peer has sent to a node, which did not keep them."""
        self._joined: dict[str, int] = {}
        self._known: set[Chunk] = set()
        self.reads = self.hits = self.again = self.requests = self.sent = 0

    def add(self, node: str) -> None:
        """A node with an empty cache."""
        self._joined[node] = len(self._joined)
        self._held[node], self._passed[node] = OrderedDict(), set()

    def read(self, node: str, chunk: Chunk, block: str) -> float:
        """The seconds that a read of a chunk takes."""
        costs = self._setup.costs
        self.reads += 1
        if chunk in self._known:
            self.again += 1
        else:
            self._known.add(chunk)
        if self._finds(node, chunk):
            self.hits += 1
            return costs.hit
        choice = self._nodes.choice(block) if self._setup.peers != "off" else None
        if choice is None or choice.first == node:
            self._keep(node, chunk)
            if choice is not None and self._had(choice) and self._finds(choice.second, chunk):
                self.sent += 1
                return costs.peer
            self.requests += 1
            return costs.source
        seconds = costs.peer
        if not self._finds(choice.first, chunk):
            self._keep(choice.first, chunk)
            self.requests += 1
            seconds += costs.source
        self.sent += 1
        # one copy in the cluster is enough, unless the chunk is asked for again
        if chunk in self._passed[node]:
            self._keep(node, chunk)
        else:
            self._passed[node].add(chunk)
        return seconds

    def _had(self, choice: Choice) -> bool:
        """Whether the second choice of a block was its first one, before the first one joined."""
        if self._setup.peers != "second":
            return False
        return self._joined[choice.first] > self._joined[choice.second]

    def _finds(self, node: str, chunk: Chunk) -> bool:
        held = self._held[node]
        if chunk in held:
            held.move_to_end(chunk)
            return True
        return False

    def _keep(self, node: str, chunk: Chunk) -> None:
        held = self._held[node]
        held[chunk] = None
        if len(held) > self._setup.room:
            held.popitem(last=False)


# -- the scheduler, as far as affinity sees it


class _Group:
    name: Final = "reads"


class _Reader:
    """A task, with the names that Dask's tasks have."""

    __slots__ = ("dependents", "key", "loose_restrictions", "of", "priority", "state", "worker_restrictions")
    group = _Group
    dependencies: tuple[()] = ()
    waiting_on: tuple[()] = ()
    _queueable = True

    def __init__(self, key: Any, priority: tuple[int, ...], of: Task) -> None:
        self.key, self.priority, self.of = key, priority, of
        self.state = "waiting"
        self.dependents: Sequence[_Reader] = ()
        self.worker_restrictions: set[str] | None = None
        self.loose_restrictions = False


class _Worker:
    """A node with its only worker."""

    def __init__(self, address: str, nthreads: int) -> None:
        self.address, self.nthreads = address, nthreads
        self.processing: dict[_Reader, None] = {}
        self.long_running: tuple[()] = ()
        self.backlog: deque[_Reader] = deque()
        """Those of `processing` that wait for a thread."""


class _Queue:
    """The queue of the scheduler, in the order of priorities."""

    def __init__(self) -> None:
        self._tasks: deque[_Reader] = deque()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Reader]:
        return (task for task in self._tasks if task.state == "queued")

    def add(self, task: _Reader) -> None:
        self._tasks.append(task)
        self._length += 1

    def left(self) -> None:
        """A task is not queued any more."""
        self._length -= 1

    def peek(self) -> _Reader:
        while self._tasks[0].state != "queued":
            self._tasks.popleft()
        return self._tasks[0]


class _Affinity(Affinity):
    """Affinity that does not hide its failures."""

    def _give_up(self, error: Exception) -> None:
        raise error


class Cluster:
    """Runs jobs, one after the other, on nodes whose caches stay."""

    WORKER_SATURATION = SATURATION

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.nodes = Nodes()
        self.caches = Caches(setup, self.nodes)
        self.tasks: dict[Any, _Reader] = {}
        self.workers: dict[str, _Worker] = {}
        self.running: set[_Worker] = set()
        self.queued = _Queue()
        self._idle: dict[_Worker, None] = {}
        # affinity compares it with sets; the order of a dictionary is the same in each run
        self.idle_task_count = self._idle.keys()
        self._least: list[tuple[float, int, _Worker]] = []
        self._ends: list[tuple[float, int, _Worker | None, _Reader | None]] = []
        self._now, self._count, self._jobs = 0.0, 0, 0
        self._mean: float | None = None
        self._load: Counter[str] = Counter()
        self._random = Random(setup.seed)
        self._affinity: Affinity | None = None
        if setup.affinity:
            here: Any = self
            self._affinity = _Affinity(here, self.nodes, "auto", has_peers=setup.peers != "off")

    @property
    def total_nthreads(self) -> int:
        return self._setup.threads * len(self.workers)

    def is_rootish(self, task: _Reader) -> bool:
        return True

    def join(self) -> str:
        """Add a node with an empty cache."""
        name = f"node {len(self.workers)} of {self._setup.seed}"
        worker = self.workers[name] = _Worker(name, self._setup.threads)
        self.running.add(worker)
        self.caches.add(name)
        self.nodes.add(name, name, None)
        self._note(worker)
        return name

    def run(self, job: Job) -> Outcome:
        """Do a job, after nodes have joined as it needs them."""
        while len(self.workers) < job.nodes:
            self.join()
        before, began = self._counts(), self._now
        self._mean = None
        self._load = Counter(dict.fromkeys(self.workers, 0))
        self._jobs += 1
        readers = [_Reader((self._jobs, at), (0, self._jobs, at), task) for at, task in enumerate(job.tasks)]
        # what holds the array ends, and so all that read it are ready
        holder = _Reader((self._jobs, "array"), (0, self._jobs, -1), Task("", (), 0))
        holder.dependents = readers
        self.tasks = {reader.key: reader for reader in (holder, *readers)}
        if self._affinity is not None:
            self._affinity.note({reader.key: reader.of.block for reader in readers})
        self._tell(holder, "processing", "memory", next(iter(self.workers)))
        for reader in readers:
            if reader.state == "waiting":
                self._place(reader)
        self._wait(self._now + BALANCE, None, None)
        while self._ends:
            when, _, worker, ended = heappop(self._ends)
            if worker is not None and ended is not None:
                self._now = when
                self._end(worker, ended)
            elif self._ends:
                self._now = when
                self._balance()
                self._wait(self._now + BALANCE, None, None)
        for reader in readers:
            self._tell(reader, "released", "forgotten")
        did = {name: count - before[name] for name, count in self._counts().items()}
        return Outcome(job.name, self._now - began, load=self._load, **did)

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self.caches, name) for name in ("reads", "hits", "again", "requests", "sent")}

    def transitions(self, recommendations: Mapping[Any, str], stimulus_id: str) -> None:
        """What affinity asks for: a queued or ready task goes to a worker, or first leaves the queue."""
        for key, finish in recommendations.items():
            task = self.tasks[key]
            if task.state == "queued" and finish == "released":
                self.queued.left()
                task.state = "released"
                self._tell(task, "queued", "released")
                task.state = "waiting"
                self._tell(task, "released", "waiting")
            self._place(task)

    def _tell(self, task: _Reader, start: str, finish: str, worker: str = "") -> None:
        if self._affinity is not None:
            self._affinity.transition(task.key, start, finish, stimulus_id="", worker=worker)

    def _place(self, task: _Reader) -> None:
        """Send a task to the worker that it is restricted to, else to the one with the least to do, or queue it."""
        start = task.state
        worker = self.workers[next(iter(task.worker_restrictions))] if task.worker_restrictions else self._emptiest()
        if worker is None:
            if start != "queued":
                task.state = "queued"
                self.queued.add(task)
                self._tell(task, start, "queued")
            return
        if start == "queued":
            self.queued.left()
        task.state = "processing"
        worker.processing[task] = None
        if len(worker.processing) - len(worker.backlog) <= worker.nthreads:
            self._begin(worker, task)
        else:
            worker.backlog.append(task)
        self._note(worker)
        self._tell(task, start, "processing")

    def _begin(self, worker: _Worker, task: _Reader) -> None:
        reads = sum(self.caches.read(worker.address, chunk, task.of.block) for chunk in task.of.chunks)
        seconds = (task.of.work + reads) * self._random.lognormvariate(0, self._setup.noise)
        # as Dask does it, but as the task begins
        self._mean = seconds if self._mean is None else (self._mean + seconds) / 2
        self._wait(self._now + seconds, worker, task)

    def _wait(self, until: float, worker: _Worker | None, task: _Reader | None) -> None:
        self._count += 1
        heappush(self._ends, (until, self._count, worker, task))

    def _end(self, worker: _Worker, task: _Reader) -> None:
        del worker.processing[task]
        task.state = "memory"
        self._load[worker.address] += 1
        if worker.backlog:
            self._begin(worker, worker.backlog.popleft())
        self._note(worker)
        self._tell(task, "processing", "memory", worker.address)
        while self.queued and self._idle:
            self._place(self.queued.peek())

    def _note(self, worker: _Worker) -> None:
        """Note whether the queue may send a worker something."""
        if len(worker.processing) < max(math.ceil(SATURATION * worker.nthreads), 1):
            self._idle[worker] = None
            self._count += 1
            heappush(self._least, (len(worker.processing) / worker.nthreads, self._count, worker))
        else:
            self._idle.pop(worker, None)

    def _emptiest(self) -> _Worker | None:
        while self._least:
            load, _, worker = self._least[0]
            if worker in self._idle and load == len(worker.processing) / worker.nthreads:
                return worker
            heappop(self._least)
        return None

    def _balance(self) -> None:
        """Workers without enough to do take what others have not begun, if Dask's rule has it that this saves time."""
        mean = UNKNOWN if self._mean is None else self._mean
        thieves = [worker for worker in self._idle if len(worker.processing) < worker.nthreads]
        if not thieves:
            return
        for victim in nlargest(10, (w for w in self.workers.values() if w.backlog), key=lambda w: len(w.processing)):
            while victim.backlog and len(victim.processing) * mean > 0.2:
                thief = min(thieves, key=lambda worker: len(worker.processing))
                if (len(thief.processing) + 1.5) * mean > len(victim.processing) * mean:
                    break
                task = victim.backlog.pop()
                del victim.processing[task]
                thief.processing[task] = None
                if len(thief.processing) <= thief.nthreads:
                    self._begin(thief, task)
                else:
                    thief.backlog.append(task)
                for worker in (victim, thief):
                    self._note(worker)


def run(setup: Setup, jobs: Iterable[Job]) -> list[Outcome]:
    """All jobs, one after the other, on one cluster."""
    cluster = Cluster(setup)
    return [cluster.run(job) for job in jobs]


# -- streams


def session(chunks: int, nodes: int, work: float) -> list[Job]:
    """What `ci/bench cluster` does, with two variables that have so many chunks together; then a node joins."""
    steps = max(2, chunks // 2)

    def reads(*variables: str, stop: int = steps, times: int = 1) -> list[Task]:
        return [
            Task(f"{at}.0.0", tuple(f"{variable}/{at}" for variable in variables), work)
            for at in range(stop)
            for _ in range(times)
        ]

    skewed = [task._replace(work=(10 if at < steps / 8 else 1) * work) for at, task in enumerate(reads("t"))]
    return [
        Job("sum(t), cold", reads("t"), nodes),
        Job("mean((t-1)*2+u), half of it cold", reads("t", "u"), nodes),
        Job("std(t)", reads("t"), nodes),
        Job("max(u), half", reads("u", stop=steps // 2), nodes),
        Job("rechunk and mean", reads("t"), nodes),
        Job("skewed work", skewed, nodes),
        Job("max(t), a node has joined", reads("t"), nodes + 1),
        Job("min(t), after that", reads("t"), nodes + 1),
    ]


class Recorded(NamedTuple):
    """A session on a real cluster."""

    jobs: list[Job]
    placed: list[list[tuple[str, Task]]]
    """For each job, the nodes that its tasks ran on, in the order in which they ended."""
    reads: list[int]
    hits: list[int]
    requests: list[int]
    seconds: list[float]
    threads: int
    costs: Costs


def recorded(path: Path) -> dict[str, Recorded]:
    """The sessions that `ci/bench cluster --record` has written, by what was on."""
    found: dict[str, Recorded] = {}
    tasks: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "block" in row:
            tasks.append(row)
            continue
        costs = Costs(source=row["latency"], chunk_bytes=row["chunk_bytes"])
        one = found.setdefault(row["mode"], Recorded([], [], [], [], [], [], row["threads"], costs))
        made = [Task(each["block"], tuple(each["chunks"]), each["seconds"]) for each in tasks]
        order = sorted(range(len(tasks)), key=lambda at: tasks[at]["priority"])
        one.jobs.append(Job(row["job"], [made[at] for at in order], row["nodes"]))
        one.placed.append([(each["node"], task) for each, task in zip(tasks, made, strict=True)])
        for name in ("reads", "hits", "requests", "seconds"):
            getattr(one, name).append(row[name])
        tasks = []
    return found


def as_placed(session: Recorded) -> list[tuple[int, int]]:
    """The hits and requests of each job if the tasks run on the nodes that they really ran on."""
    caches = Caches(Setup(affinity=False, peers="off"), Nodes())
    known: set[str] = set()
    found = []
    for placed in session.placed:
        hits, requests = caches.hits, caches.requests
        for node, task in placed:
            if node not in known:
                known.add(node)
                caches.add(node)
            for chunk in task.chunks:
                caches.read(node, chunk, task.block)
        found.append((caches.hits - hits, caches.requests - requests))
    return found


def without_reads(session: Recorded) -> list[Job]:
    """The jobs, with the work of each task as long as it took less the request that it waited for, if it did."""
    jobs = []
    caches = Caches(Setup(affinity=False, peers="off"), Nodes())
    known: set[str] = set()
    for job, placed in zip(session.jobs, session.placed, strict=True):
        work: dict[int, float] = {}
        for node, task in placed:
            if node not in known:
                known.add(node)
                caches.add(node)
            before = caches.requests
            for chunk in task.chunks:
                caches.read(node, chunk, task.block)
            work[id(task)] = max(0.0, task.work - (caches.requests - before) * session.costs.source)
        jobs.append(job._replace(tasks=[task._replace(work=work[id(task)]) for task in job.tasks]))
    return jobs


# -- what it comes to


class Bill(NamedTuple):
    """A session in figures."""

    reads: float
    """A chunk: what the source would answer without any cache."""
    requests: float
    """Of the source, a chunk."""
    source_bytes: int
    peer_bytes: int
    local: float
    """Of the reads of chunks that were read before, those that found the chunk on their node."""
    balance: float
    """Tasks of the node with the most, over the mean: the mean of the jobs, by their tasks."""
    joined: float
    """Of the chunks, those that the first job after a node has joined did not find on its nodes."""
    seconds: float


def bill(outcomes: Sequence[Outcome], chunks: int, costs: Costs, joined: int) -> Bill:
    """Add up a session; `joined` is the number of the first job after a node has joined."""
    requests = sum(each.requests for each in outcomes)
    again = sum(each.again for each in outcomes)
    first = outcomes[joined]
    loads = [max(each.load.values()) / np.mean(list(each.load.values())) for each in outcomes]
    return Bill(
        sum(each.reads for each in outcomes) / chunks,
        requests / chunks,
        requests * costs.chunk_bytes,
        sum(each.sent for each in outcomes) * costs.chunk_bytes,
        sum(each.hits for each in outcomes) / max(1, again),
        float(np.average(loads, weights=[sum(each.load.values()) for each in outcomes])),
        (first.reads - first.hits) / max(1, first.reads),
        sum(each.seconds for each in outcomes),
    )
