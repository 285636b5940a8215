"""Which node a block prefers, the same for every process and for as long as it is there; and how a task gets there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr

import xzcache
from xzcache.dask._affinity import Affinity, Choice, Nodes, source_of

BLOCKS = [f"{number}.{number % 7}" for number in range(20_000)]


def of_nodes(*names: str, bound: int | None = 100) -> Nodes:
    nodes = Nodes()
    for name in names:
        nodes.add(f"tcp://{name}", name, bound)
    return nodes


def choices(nodes: Nodes) -> dict[str, Choice]:
    nodes.choose(BLOCKS)
    found = {block: nodes.choice(block) for block in BLOCKS}
    return {block: choice for block, choice in found.items() if choice is not None}


def is_about(count: int, share: float) -> bool:
    """Whether a count is within five standard deviations of what a share of all blocks makes likely."""
    return abs(count - len(BLOCKS) * share) < 5 * (len(BLOCKS) * share * (1 - share)) ** 0.5


CHOOSE = """
import sys
from xzcache.dask._affinity import Nodes
nodes = Nodes()
for name in sys.argv[1].split():
    nodes.add("tcp://" + name, name, 100)
for block in sys.argv[2].split():
    print(block, *nodes.choice(block))
"""


def test_every_process_chooses_the_same_nodes() -> None:
    some = BLOCKS[:50]
    here = choices(of_nodes("a", "b", "c", "d"))
    # nodes join in another order, blocks are chosen for one by one, and strings hash differently
    line = [sys.executable, "-c", CHOOSE, "d b a c", " ".join(some)]
    said = subprocess.run(line, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    assert [line.split() for line in said.stdout.splitlines()] == [[block, *here[block]] for block in some]


def test_the_choice_is_that_of_earlier_releases() -> None:
    """Another one would empty the caches of every cluster that is updated, and split those that are updated in part."""
    nodes = of_nodes("a", "b", "c", "d")
    found = [nodes.choice(block) for block in ("0.0.0", "1.0.0", "2.0.0", "10.3")]
    assert found == [("d", "b"), ("d", "c"), ("a", "b"), ("b", "a")]


def test_nodes_share_the_blocks_evenly() -> None:
    firsts = Counter(choice.first for choice in choices(of_nodes(*"abcdefghij")).values())
    seconds = Counter(choice.second for choice in choices(of_nodes(*"abcdefghij")).values())
    for found in (firsts, seconds):
        assert len(found) == 10
        assert all(is_about(count, 0.1) for count in found.values())


def test_nodes_have_shares_as_their_caches_have_bounds() -> None:
    nodes = Nodes()
    bounds = {"small": 100, "medium": 200, "large": 700}
    for name, bound in bounds.items():
        nodes.add(f"tcp://{name}", name, bound)
    found = Counter(choice.first for choice in choices(nodes).values())
    assert all(is_about(found[name], bound / 1000) for name, bound in bounds.items())


def test_a_cache_without_a_bound_counts_as_the_mean_of_the_others() -> None:
    nodes = Nodes()
    for name, bound in {"small": 100, "large": 300, "unbounded": None}.items():
        nodes.add(f"tcp://{name}", name, bound)
    found = Counter(choice.first for choice in choices(nodes).values())
    assert is_about(found["unbounded"], 1 / 3)
    assert is_about(found["small"], 1 / 6)


def test_a_bound_that_changes_moves_its_share_and_nothing_else() -> None:
    nodes = of_nodes(*"abcd")
    before = choices(nodes)
    for name in "bcd":
        nodes.add(f"tcp://{name}", name, 100)
    assert choices(nodes) == before
    nodes.add("tcp://a", "a", 200)
    after = choices(nodes)
    assert {after[block].first for block in BLOCKS if after[block].first != before[block].first} == {"a"}
    assert is_about(sum(choice.first == "a" for choice in after.values()), 2 / 5)


@pytest.mark.parametrize("count", [1, 4, 63])
def test_a_node_that_joins_takes_its_share_and_gives_it_back(count: int) -> None:
    nodes = of_nodes(*(f"node{number}" for number in range(count)))
    before = choices(nodes)
    nodes.add("tcp://new", "new", 100)
    after = choices(nodes)
    moved = [block for block in BLOCKS if after[block].first != before[block].first]
    assert {after[block].first for block in moved} == {"new"}
    assert is_about(len(moved), 1 / (count + 1))
    # those that it took have their old node as the second choice
    assert all(after[block].second == before[block].first for block in moved)
    nodes.remove("tcp://new")
    assert choices(nodes) == before


def test_the_blocks_of_a_node_that_leaves_go_to_their_second_choices() -> None:
    nodes = of_nodes(*"abcde")
    before = choices(nodes)
    nodes.remove("tcp://c")
    after = choices(nodes)
    for block, (first, second) in before.items():
        assert after[block].first == (second if first == "c" else first)


def test_a_node_leaves_with_its_last_worker() -> None:
    nodes = of_nodes("a", "b")
    nodes.add("tcp://a2", "a", 100)
    before, changes = choices(nodes), nodes.changes
    assert nodes.workers("a") == {"tcp://a", "tcp://a2"}
    nodes.remove("tcp://a")
    assert (choices(nodes), nodes.changes) == (before, changes)
    nodes.remove("tcp://a2")
    assert "a" not in nodes
    assert {choice.first for choice in choices(nodes).values()} == {"b"}


def test_the_second_choice_is_another_node_if_there_is_one() -> None:
    assert all(choice.first != choice.second for choice in choices(of_nodes("a", "b")).values())
    assert of_nodes("a").choice("0.0") == Choice("a", "a")
    assert Nodes().choice("0.0") is None


def test_variables_on_one_grid_have_the_same_blocks(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path, mode="w")
    for name, dtype in {"t": "f4", "u": "i8"}.items():
        root.create_array(name, shape=(8, 6), chunks=(2, 3), dtype=dtype)
    root.create_array("sharded", shape=(8, 6), chunks=(1, 1), shards=(2, 3), dtype="f4")
    cached = zarr.open_group(xzcache.CacheStore(zarr.storage.LocalStore(tmp_path)), mode="r")
    found = {name: source_of(cached[name]) for name in ("t", "u", "sharded")}
    index = slice(4, 6), slice(3, 6)
    assert {source.block(index) for source in found.values() if source is not None} == {"2.1"}
    assert len(found) == 3
    # what is read without the cache is none of affinity's business
    assert source_of(root["t"]) is None
    assert source_of(np.zeros((8, 6))) is None


class Narrowed:
    """A scheduler that sees a worker fill up, or fails, during the one transition of a queued task."""

    def __init__(self, *, fills: bool = False, fails: bool = False) -> None:
        self.idle_task_count = {"first", "second"}
        self.seen: list[tuple[dict[str, str], set[str]]] = []
        self._fills, self._fails = fills, fails

    def transitions(self, wanted: dict[str, str], _: str) -> None:
        self.seen.append((wanted, set(self.idle_task_count)))
        if self._fails:
            raise RuntimeError("no")
        if self._fills:
            self.idle_task_count.discard("second")


@pytest.mark.parametrize("fills", [False, True])
def test_a_queued_task_goes_to_the_chosen_one_of_the_idle_workers_in_one_transition(fills: bool) -> None:
    scheduler: Any = Narrowed(fills=fills)
    idle = scheduler.idle_task_count
    task: Any = SimpleNamespace(state="queued", key="t")
    Affinity(scheduler, Nodes(), "auto")._send(task, "second", "here")  # type: ignore[arg-type]
    assert scheduler.seen == [({"t": "processing"}, {"second"})]
    assert scheduler.idle_task_count is idle
    assert idle == ({"first"} if fills else {"first", "second"})


def test_no_worker_is_forgotten_if_the_transition_fails() -> None:
    scheduler: Any = Narrowed(fails=True)
    task: Any = SimpleNamespace(state="queued", key="t")
    with pytest.raises(RuntimeError, match="no"):
        Affinity(scheduler, Nodes(), "auto")._send(task, "second", "here")  # type: ignore[arg-type]
    assert scheduler.idle_task_count == {"first", "second"}
