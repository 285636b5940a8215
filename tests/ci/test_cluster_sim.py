"""The simulator of clusters: where its figures can be worked out by hand, they are those."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")
ROOT = Path(__file__).parents[2]
# last: a module of the tests has the name of a benchmark
sys.path.append(str(ROOT / "ci" / "benchmarks"))

from _cluster_sim import Cluster, Costs, Job, Outcome, Peers, Setup, Task, as_placed, recorded, run, session  # noqa: E402

CHUNKS = 4000


def passes(nodes: int, *, times: int = 2, chunks: int = CHUNKS, joined: int = 0) -> list[Job]:
    """The same chunks again and again."""
    tasks = [Task(f"{at}.0", (f"t/{at}",), 0.05) for at in range(chunks)]
    return [Job(str(time), tasks, nodes + joined * (time > 1)) for time in range(times)]


def is_about(count: int, share: float, of: int = CHUNKS) -> bool:
    """Whether a count is within five standard deviations of what a share makes likely."""
    return abs(count - of * share) < 5 * (of * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("nodes", [4, 16])
def test_without_affinity_a_second_pass_finds_one_in_the_number_of_nodes(nodes: int) -> None:
    first, second = run(Setup(affinity=False, peers="off", noise=1), passes(nodes))
    assert (first.reads, first.hits, first.again, first.requests) == (CHUNKS, 0, 0, CHUNKS)
    assert second.again == CHUNKS
    assert is_about(second.hits, 1 / nodes)
    assert second.hits + second.requests == CHUNKS


@pytest.mark.parametrize("nodes", [4, 16])
def test_with_affinity_a_second_pass_finds_all_where_nodes_are_as_busy(nodes: int) -> None:
    """The same number of blocks prefers each node, and all tasks take as long, so that no node takes others' tasks."""
    setup = Setup(affinity=True, peers="off", noise=0)
    cluster = Cluster(setup)
    names = [cluster.join() for _ in range(nodes)]
    blocks: dict[str, list[str]] = {name: [] for name in names}
    for at in range(100 * nodes):
        choice = cluster.nodes.choice(f"{at}.0")
        assert choice is not None
        blocks[choice.first].append(f"{at}.0")
    least = min(map(len, blocks.values()))
    assert least > 50
    tasks = [Task(block, (block,), 0.05) for of_node in blocks.values() for block in of_node[:least]]
    tasks.sort(key=lambda task: int(task.block.partition(".")[0]))
    _, second = (cluster.run(Job(name, tasks, nodes)) for name in "ab")
    assert second.hits == second.reads == least * nodes
    assert set(second.load.values()) == {least}


def test_with_affinity_nearly_all_are_found_where_nodes_are_not() -> None:
    _, second = run(Setup(affinity=True, peers="off"), passes(16))
    assert second.hits >= 0.97 * CHUNKS
    assert max(second.load.values()) < 1.2 * CHUNKS / 16


@pytest.mark.parametrize("nodes", [4, 16])
@pytest.mark.parametrize("affinity", [False, True])
def test_with_peers_the_source_is_asked_once(affinity: bool, nodes: int) -> None:
    first, second = run(Setup(affinity, peers="first", noise=1), passes(nodes))
    assert first.requests == CHUNKS
    assert second.requests == 0
    assert second.hits + second.sent == CHUNKS
    if not affinity:
        # a chunk is with the node that it prefers, wherever its first task ran
        assert is_about(first.sent, 1 - 1 / nodes)


def test_a_chunk_from_a_peer_is_kept_at_the_second_read() -> None:
    cluster = Cluster(Setup(affinity=False, peers="first"))
    names = [cluster.join() for _ in range(2)]
    choice = cluster.nodes.choice("0.0")
    assert choice is not None
    (other,) = set(names) - {choice.first}
    caches = cluster.caches
    for requests, sent, hits in [(1, 1, 0), (1, 2, 0), (1, 2, 1)]:
        caches.read(other, "t/0.0", "0.0")
        assert (caches.requests, caches.sent, caches.hits) == (requests, sent, hits)
    caches.read(choice.first, "t/0.0", "0.0")
    assert (caches.requests, caches.sent, caches.hits) == (1, 2, 2)


@pytest.mark.parametrize(
    ("affinity", "peers"), [(True, "off"), (True, "first"), (True, "second"), (False, "first"), (False, "second")]
)
def test_a_node_that_joins_takes_its_share(affinity: bool, peers: Peers) -> None:
    nodes = 9
    _, before, after, then = run(Setup(affinity, peers), passes(nodes, times=4, joined=1))
    assert after.name == "2"
    share = CHUNKS / (nodes + 1)
    if peers == "second":
        # its blocks are still with the nodes that had them; but what others ask it for, it fetches
        assert after.requests < (0.1 if affinity else 1) * share
    else:
        # the new node begins with nothing and is slower; the others do some of its share with what they have
        assert 0.3 * share < after.requests < 1.2 * share
    assert then.requests < after.requests
    assert len(after.load) == len(before.load) + 1


def test_together_caches_hold_more_than_each() -> None:
    """A working set larger than one cache and smaller than all of them: with affinity it stays, without it does not."""
    room = 1.5 * CHUNKS / 8
    hits = {affinity: run(Setup(affinity, "off", room), passes(8, times=4))[-1].hits for affinity in (False, True)}
    assert hits[True] > 0.95 * CHUNKS
    # any node reads any chunk, and holds a small part
    assert hits[False] < 0.25 * CHUNKS


def test_a_bound_is_never_exceeded_and_the_oldest_use_goes() -> None:
    cluster = Cluster(Setup(affinity=False, peers="off", room=2))
    name = cluster.join()
    for chunk in "abacb":
        cluster.caches.read(name, chunk, chunk)
    assert list(cluster.caches._held[name]) == ["c", "b"]
    assert (cluster.caches.hits, cluster.caches.requests) == (1, 4)


def test_nodes_that_are_gone_for_a_while_stop_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for the time between a worker's start and its word of where its cache is."""
    cluster = Cluster(Setup(affinity=True, peers="off"))
    names = [cluster.join() for _ in range(3)]
    reads = 0
    read = cluster.caches.read

    def change(node: str, chunk: str, block: str) -> float:
        nonlocal reads
        reads += 1
        for name in names if reads == 50 else ():
            cluster.nodes.remove(name)
        for name in names[:2] if reads == 120 else ():
            cluster.nodes.add(name, name, None)
        return read(node, chunk, block)

    monkeypatch.setattr(cluster.caches, "read", change)
    outcome = cluster.run(passes(3, times=1, chunks=300)[0])
    assert outcome.reads == sum(outcome.load.values()) == 300


def test_the_time_of_a_job_is_that_of_its_tasks() -> None:
    (outcome,) = run(Setup(False, "off", costs=Costs(source=0.25), noise=0, threads=2), passes(4, times=1, chunks=800))
    assert outcome.seconds == pytest.approx(800 / 8 * (0.05 + 0.25))


def test_a_run_can_be_repeated() -> None:
    first, second = (run(Setup(True, "first", room=100), session(1000, 8, 0.05)) for _ in range(2))
    assert first == second
    assert sum(outcome.reads for outcome in first) == 500 * 7 + 250 + 500


def row(**of: Any) -> str:
    return json.dumps(of)


def test_a_recorded_session_is_read_back(tmp_path: Path) -> None:
    about = {"mode": "off", "nodes": 2, "threads": 1, "latency": 0.03, "chunk_bytes": 10, "peak": 0}
    of_task = {"chunks": ["t 0", "u 0"], "seconds": 0.1}
    path = tmp_path / "recorded"
    lines = [
        row(block="1.0", node="1", priority=[0, 1, 1], **of_task | {"chunks": ["t 1"]}),
        row(block="0.0", node="0", priority=[0, 1, 0], **of_task),
        row(job="first", reads=3, hits=0, requests=3, seconds=1.0, **about),
        row(block="0.0", node="0", priority=[0, 2, 0], **of_task),
        row(block="0.0", node="1", priority=[0, 2, 1], **of_task),
        row(job="second", reads=4, hits=2, requests=2, seconds=1.0, **about),
    ]
    path.write_text("\n".join(lines))
    found = recorded(path)["off"]
    assert [[task.block for task in job.tasks] for job in found.jobs] == [["0.0", "1.0"], ["0.0", "0.0"]]
    assert as_placed(found) == list(zip(found.hits, found.requests, strict=True)) == [(0, 3), (2, 2)]


def simulate(out: Path, *words: str) -> str:
    line = [sys.executable, "ci/benchmarks/cluster-sim.py", "--out", str(out), *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    assert (
        "simulated in" in simulate(tmp_path, "--nodes", "4", "8", "--chunks", "200", "--shares", "inf", "1.5").lower()
    )
    table = (tmp_path / "cluster-sim.md").read_text()
    assert "**8 nodes, 200 chunks; without caches, 4.25 requests a chunk**" in table
    # caches with and without a bound, affinity off and on, peers off and on
    assert table.count("| all chunks |") == table.count("| 1.5 of its share |") == 2 * 5


def outcomes_add_up(outcomes: list[Outcome]) -> bool:
    return all(one.hits + one.sent + one.requests >= one.reads for one in outcomes)


@pytest.mark.parametrize("room", [math.inf, 30])
def test_every_read_is_answered(room: float) -> None:
    for affinity in (False, True):
        assert outcomes_add_up(run(Setup(affinity, "first", room), session(400, 8, 0.05)))
