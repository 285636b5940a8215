"""Zarr's own tests of a store, on both of ours, and its own state machines on `CacheStore`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from sources import cached
from zarr.core.buffer import Buffer, cpu
from zarr.storage import LocalStore, MemoryStore
from zarr.testing.stateful import ZarrHierarchyStateMachine, ZarrStoreStateMachine
from zarr.testing.store import StoreTests

import xzcache

# The machines draw dtypes that Zarr warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The data type .* does not have a Zarr V3 specification")


def put_file(root: Path, key: str, value: Buffer) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value.to_bytes())


class OurStoreTests(StoreTests[Any, cpu.Buffer]):
    """What is the same for both stores."""

    buffer_cls = cpu.Buffer

    def test_store_supports_writes(self, store: Any) -> None:
        assert store.supports_writes

    def test_store_supports_listing(self, store: Any) -> None:
        assert store.supports_listing


class TestLockedLocalStore(OurStoreTests):
    """Files are put below the root and looked at there, behind the store's back."""

    store_cls = xzcache.LockedLocalStore

    async def set(self, store: xzcache.LockedLocalStore, key: str, value: Buffer) -> None:
        put_file(store.root, key, value)

    async def get(self, store: xzcache.LockedLocalStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes((store.root / key).read_bytes())

    @pytest.fixture
    def store_kwargs(self, tmp_path: Path) -> dict[str, Any]:
        return {"root": str(tmp_path / "store")}

    def test_store_repr(self, store: xzcache.LockedLocalStore) -> None:
        assert str(store) == f"file://{store.root.as_posix()}"
        assert repr(store) == f"LockedLocalStore('file://{store.root.as_posix()}')"


class TestOverDirectory(OurStoreTests):
    """`CacheStore` whose cache is a directory; the source is one, too, so that a pickled copy reads the same."""

    store_cls = xzcache.CacheStore

    async def set(self, store: xzcache.CacheStore, key: str, value: Buffer) -> None:
        put_file(store._store.root, key, value)

    async def get(self, store: xzcache.CacheStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes((store._store.root / key).read_bytes())

    @pytest.fixture
    def store_kwargs(self, tmp_path: Path) -> dict[str, Any]:
        return {"store": LocalStore(tmp_path / "source"), "cache_store": tmp_path / "cache"}

    def test_store_repr(self, store: xzcache.CacheStore) -> None:
        assert repr(store).startswith("CacheStore(store='")
        assert store._store.root.as_posix() in str(store)


class TestOverMemory(OurStoreTests):
    """`CacheStore` whose cache and source are in memory."""

    store_cls = xzcache.CacheStore

    async def set(self, store: xzcache.CacheStore, key: str, value: Buffer) -> None:
        store._store._store_dict[key] = value

    async def get(self, store: xzcache.CacheStore, key: str) -> Buffer:
        return store._store._store_dict[key]

    @pytest.fixture
    def store_kwargs(self) -> dict[str, Any]:
        return {"store": MemoryStore(), "cache_store": MemoryStore()}

    def test_store_repr(self, store: xzcache.CacheStore) -> None:
        assert "MemoryStore" in repr(store)


def run_machine(machine: type[RuleBasedStateMachine], store: Any, *, examples: int, steps: int, fixed: bool) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        # a moderate run has to say the same on every machine; a soak run looks for what nobody thought of
        derandomize=fixed,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: machine(store), settings=chosen)


MACHINES = [ZarrStoreStateMachine, ZarrHierarchyStateMachine]


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_state_machine(machine: type[RuleBasedStateMachine], cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, MemoryStore(), tmp_path)
    run_machine(machine, store, examples=12, steps=20, fixed=True)
    assert store.cache_stats()["hits"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_state_machine_with_little_room(machine: type[RuleBasedStateMachine], cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, MemoryStore(), tmp_path, max_size=1000)
    run_machine(machine, store, examples=6, steps=20, fixed=True)
    assert store.cache_info()["total_size"] <= 1000


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("max_size", [None, 1000])
@pytest.mark.parametrize("machine", MACHINES)
def test_state_machine_for_long(
    machine: type[RuleBasedStateMachine], max_size: int | None, cache_kind: str, tmp_path: Path
) -> None:
    store = cached(cache_kind, MemoryStore(), tmp_path, max_size=max_size)
    run_machine(machine, store, examples=200, steps=50, fixed=False)
    assert store.cache_stats()["hits"] > 0
