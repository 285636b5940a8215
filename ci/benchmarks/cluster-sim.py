"""A cluster on paper: what affinity, peers and the size of caches do on 4, 64 and 1,000 nodes.

xzcache's own `Affinity` chooses the nodes, for a model of Dask's scheduler. ``--replay FILE`` checks the model: it
takes what ``ci/bench cluster --record FILE`` did on a real cluster, and shows both.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

from _cluster_sim import Bill, Costs, Peers, Setup, as_placed, bill, recorded, run, session, without_reads
from _report import Report, arguments

JOINED = -2
"""The job of a session before which a node joins."""


class Case(NamedTuple):
    """One row of the table."""

    nodes: int
    chunks: int
    share: float
    work: float
    setup: Setup


def simulate(case: Case) -> tuple[Bill, float]:
    """A session, and the seconds of CPU that this took."""
    began = time.process_time()
    outcomes = run(case.setup, session(case.chunks, case.nodes, case.work))
    return bill(outcomes, case.chunks, case.setup.costs, JOINED), time.process_time() - began


def name(case: Case) -> tuple[str, str, str]:
    room = "all chunks" if math.isinf(case.share) else f"{case.share:g} of its share"
    return room, "on" if case.setup.affinity else "off", case.setup.peers


def plan(report: Report, cases: list[Case], processes: int) -> None:
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        bills = pool.map(simulate, cases, chunksize=1)
    for nodes in dict.fromkeys(case.nodes for case in cases):
        rows = []
        for case, (found, _) in zip(cases, bills, strict=True):
            if case.nodes == nodes:
                rows.append(
                    (
                        *name(case),
                        f"{found.requests:.2f}",
                        f"{found.source_bytes / 1e9:.1f}",
                        f"{found.peer_bytes / 1e9:.1f}",
                        f"{found.local:.0%}",
                        f"{found.balance:.2f}",
                        f"{found.joined:.0%}",
                        f"{found.seconds:.0f}",
                    )
                )
        chunks, reads = next(
            (case.chunks, found.reads) for case, (found, _) in zip(cases, bills, strict=True) if case.nodes == nodes
        )
        columns = ["a cache holds", "affinity", "peers", "requests a chunk", "source GB", "peer GB", "local"]
        columns += ["load", "not local after a join", "s"]
        title = f"{nodes} nodes, {chunks} chunks; without caches, {reads:.2f} requests a chunk"
        report.table(title, columns, rows)
    report.say(
        "Local: of the reads of chunks that were read before, those that found the chunk on their node. Load: the "
        "tasks of the node with the most over the mean. Peers, first: a miss asks the node that the block prefers, "
        "which fetches the chunk; the node that has asked keeps it from its second read on. Second: as well, the node "
        "that a block prefers asks the second choice for a chunk that it has not, if it has joined later."
    )
    took = {
        nodes: sum(t for case, (_, t) in zip(cases, bills, strict=True) if case.nodes == nodes)
        for nodes in dict.fromkeys(case.nodes for case in cases)
    }
    report.say("Simulated in " + ", ".join(f"{t:.0f} s of CPU for {nodes} nodes" for nodes, t in took.items()) + ".")


def replay(report: Report, path: Path, seeds: int) -> None:
    for mode, real in recorded(path).items():
        placed = as_placed(real)
        jobs = without_reads(real)
        setups = [Setup(mode != "off", "off", math.inf, real.threads, real.costs, seed=seed) for seed in range(seeds)]
        simulated = [run(setup, jobs) for setup in setups]
        rows = []
        for at, job in enumerate(jobs):
            outcomes = [each[at] for each in simulated]
            reads = outcomes[0].reads
            local = sorted(each.hits / reads for each in outcomes)
            requests = sorted(each.requests for each in outcomes)
            rows.append(
                (
                    job.name,
                    f"{real.hits[at] / max(1, real.reads[at]):.0%}",
                    f"{placed[at][0] / reads:.0%}",
                    f"{local[0]:.0%} to {local[-1]:.0%}",
                    str(real.requests[at]),
                    str(placed[at][1]),
                    f"{requests[0]} to {requests[-1]}",
                    f"{real.seconds[at]:.1f}",
                    f"{sum(each.seconds for each in outcomes) / seeds:.1f}",
                )
            )
        columns = ["job", "local", "as placed", "simulated", "requests", "as placed", "simulated", "s", "simulated"]
        report.table(f"Affinity {mode}: a real cluster of {jobs[0].nodes} nodes, and the model", columns, rows)
    report.say(
        "As placed: the model of the caches, with each task on the node that it really ran on. Simulated: the model "
        f"places the tasks as well, for {seeds} sets of names of nodes."
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nodes", type=int, nargs="*", default=[4, 64, 1000])
    parser.add_argument("--chunks", type=int, help="of two variables together; 100 for each node unless given")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="*",
        default=[1.5],
        help="what a cache holds, in parts of what each node has of all chunks if none is cached twice; inf is all",
    )
    parser.add_argument("--threads", type=int, default=4, help="of each node")
    parser.add_argument("--work", type=float, default=0.05, help="seconds of a task, without its reads")
    parser.add_argument("--mebibytes", type=float, default=1, help="of a chunk")
    parser.add_argument("--hit", type=float, default=0.001, help="seconds of a read from the node's cache")
    parser.add_argument("--peer", type=float, default=0.004, help="seconds of a read from a peer's")
    parser.add_argument("--source", type=float, default=0.05, help="seconds of a read from the source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that simulate at once")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="check the model against a recorded session")
    options = parser.parse_args()
    if options.replay is not None:
        with Report("cluster-sim-replay", options.out) as report:
            replay(report, options.replay, 5)
        return
    costs = Costs(options.hit, options.peer, options.source, int(options.mebibytes * 2**20))
    cases = []
    kinds: tuple[Peers, ...] = ("off", "first", "second")
    for nodes, share, affinity, peers in product(options.nodes, options.shares, (False, True), kinds):
        if peers == "second" and not affinity:
            continue
        chunks = options.chunks or 100 * nodes
        setup = Setup(affinity, peers, share * chunks / nodes, options.threads, costs, seed=options.seed)
        cases.append(Case(nodes, chunks, share, options.work, setup))
    with Report("cluster-sim", options.out) as report:
        plan(report, cases, options.processes)


if __name__ == "__main__":
    main()
