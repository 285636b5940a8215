"""Random changes of a source, and random openings through caches, in several processes and on two machines.

Whatever was done before, each opening shows the source as it is: its arrays, their metadata, and their chunks, but for
those that were rewritten while the metadata stayed the same.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from servers import S3Server, s3_server
from sources import buffer, neighbours
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

import xzcache

pytestmark = pytest.mark.slow

BUCKET = "bucket"
CHUNK = 3
NAMES = st.sampled_from(["x", "y", "deep/z"])
SIZES = st.integers(1, 8)
DTYPES = st.sampled_from(["i4", "f8", "u1"])
POLICIES = st.sampled_from(["open", "open", True, 0])
numbers = itertools.count(1)


class Shown(NamedTuple):
    """An array as somebody saw it."""

    version: int
    dtype: str
    values: np.ndarray[Any, Any]


def shown(array: Any) -> Shown:
    return Shown(array.attrs["version"], array.dtype.str, array[...])


# -- what happens in this process, and in another one


def opened(source: Store, **options: Any) -> Any:
    """The group that an opening shows that begins now; None where there is none."""
    try:
        return zarr.open_group(xzcache.CacheStore(source, **options), mode="r")
    except FileNotFoundError:
        return None


def arrays_of(group: Any) -> dict[str, Any]:
    return {path: node for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}


def look(source: Store, options: dict[str, Any]) -> dict[str, Shown] | None:
    group = opened(source, **options)
    return None if group is None else {name: shown(array) for name, array in arrays_of(group).items()}


def look_at_copies(pickled: bytes) -> dict[str, Shown]:
    return {name: shown(array) for name, array in pickle.loads(pickled).items()}


def on_machine(directory: Path, function: Callable[..., Any], *args: Any) -> Any:
    with xzcache.config.set(directory=str(directory)):
        return function(*args)


# -- the model


class Model:
    """An array as the source has it, and what is left of it elsewhere."""

    def __init__(self, values: np.ndarray[Any, Any], version: int) -> None:
        self.changed(values, version)

    def changed(self, values: np.ndarray[Any, Any], version: int) -> None:
        """Something that its metadata show."""
        self.version = version
        self.past = [values]
        self.doubts: dict[str, set[int]] = {"a": set(), "b": set()}

    @property
    def values(self) -> np.ndarray[Any, Any]:
        return self.past[-1]

    def rewritten(self, chunk: int, values: np.ndarray[Any, Any], *, by: str = "") -> None:
        """A chunk, under the same metadata; only the machine that did it knows."""
        self.past.append(values)
        for machine, doubts in self.doubts.items():
            (doubts.discard if machine == by else doubts.add)(chunk)

    def _accepted(self, chunk: int, machine: str) -> list[np.ndarray[Any, Any]]:
        return self.past if chunk in self.doubts[machine] else [self.values]

    def check_one(self, place: int, value: Any, machine: str) -> None:
        assert value in [values[place] for values in self._accepted(place // CHUNK, machine)]

    def check(self, found: Shown, machine: str, *, exact: bool) -> None:
        assert (found.version, found.dtype) == (self.version, self.values.dtype.str)
        assert found.values.shape == self.values.shape
        for chunk, start in enumerate(range(0, len(self.values), CHUNK)):
            part = slice(start, start + CHUNK)
            accepted = [self.values] if exact else self._accepted(chunk, machine)
            assert any(np.array_equal(found.values[part], each[part]) for each in accepted), (
                f"chunk {chunk} is {found.values[part]}, expected {[each[part] for each in accepted]}"
            )
        if exact:
            self.doubts[machine].clear()


class Hierarchies(RuleBasedStateMachine):
    """A group that changes, and two machines that read it."""

    def __init__(self, writer: Store, reader: Store, machines: Path, options: dict[str, Any]) -> None:
        super().__init__()
        self.writer, self.reader, self.options = writer, reader, options
        self.places = {"a": machines / "a", "b": machines / "b"}
        self.model: dict[str, Model] = {}
        self.format: Any = None
        self.consolidated = False
        self.written = itertools.count(1)
        self.changes = self.reads = 0

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.make(data)
        self.put(data)

    @precondition(lambda self: self.changes < 3)
    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        kinds = ["make"]
        if self.format is not None:
            kinds = ["put", "consolidate_or_not", "let_a_minute_pass"]
        if self.model:
            kinds += ["append", "append", "set_attributes", "rewrite_a_chunk", "delete", "delete_everything"]
        getattr(self, data.draw(st.sampled_from(kinds), "change"))(data)
        self.changes, self.reads = self.changes + 1, 0

    @precondition(lambda self: self.reads < 4)
    @rule(data=st.data(), machine=st.sampled_from(["a", "b"]))
    def read(self, data: st.DataObject, machine: str) -> None:
        kinds = ["open_here", "open_in_another_process", "forget", "let_entries_expire"]
        if self.model:
            kinds += ["read_copies", "read_copies", "read_a_part", "write_through"]
        getattr(self, data.draw(st.sampled_from(kinds), "read"))(data, machine)
        self.changes, self.reads = 0, self.reads + 1

    # -- the source

    def make(self, data: st.DataObject) -> None:
        self.format = data.draw(st.sampled_from([3, 2]), "format")
        self.consolidated = data.draw(st.booleans(), "consolidated")
        zarr.create_group(self.writer, zarr_format=self.format)
        zarr.create_group(self.writer, path="deep", zarr_format=self.format)
        self._consolidate()

    def _consolidate(self) -> None:
        if self.consolidated:
            zarr.consolidate_metadata(self.writer, zarr_format=self.format)
        elif self.format == 2:
            sync(self.writer.delete(".zmetadata"))
        else:
            value = sync(self.writer.get("zarr.json", default_buffer_prototype()))
            assert value is not None
            document = json.loads(value.to_bytes())
            document.pop("consolidated_metadata", None)
            sync(self.writer.set("zarr.json", buffer(json.dumps(document).encode())))

    def put(self, data: st.DataObject) -> None:
        """A new array, or another one in the place of an old one."""
        name, size, dtype = data.draw(NAMES, "name"), data.draw(SIZES, "size"), data.draw(DTYPES, "dtype")
        values, version = self._values(size, dtype), next(self.written)
        separator: Any = data.draw(st.sampled_from("./"), "separator")
        zarr.create_array(
            self.writer,
            name=name,
            data=values,
            chunks=(CHUNK,),
            compressors=None,
            attributes={"version": version},
            chunk_key_encoding={"name": "default" if self.format == 3 else "v2", "separator": separator},
            zarr_format=self.format,
            overwrite=True,
        )
        self.model[name] = Model(values, version)
        self._consolidate()

    def _values(self, size: int, dtype: str) -> np.ndarray[Any, Any]:
        first = next(self.written) * 10 % 240
        return np.arange(first, first + size).astype(dtype)

    def _array(self, name: str) -> Any:
        return zarr.open_array(self.writer, path=name, mode="a", zarr_format=self.format)

    def _choose(self, data: st.DataObject) -> tuple[str, Model]:
        name = data.draw(st.sampled_from(sorted(self.model)), "name")
        return name, self.model[name]

    def append(self, data: st.DataObject) -> None:
        name, model = self._choose(data)
        more = self._values(data.draw(SIZES, "size"), model.values.dtype.str)
        self._array(name).append(more)
        model.changed(np.concatenate([model.values, more]), model.version)
        self._consolidate()

    def set_attributes(self, data: st.DataObject) -> None:
        """And perhaps all values with them."""
        name, model = self._choose(data)
        array, version = self._array(name), next(self.written)
        array.attrs["version"] = version
        values = model.values
        if data.draw(st.booleans(), "also values"):
            values = self._values(len(values), values.dtype.str)
            array[...] = values
        model.changed(values, version)
        self._consolidate()

    def rewrite_a_chunk(self, data: st.DataObject) -> None:
        name, model = self._choose(data)
        chunk, values = self._changed_chunk(data, model)
        self._array(name)[...] = values
        model.rewritten(chunk, values)

    def _changed_chunk(self, data: st.DataObject, model: Model) -> tuple[int, np.ndarray[Any, Any]]:
        chunk = data.draw(st.integers(0, (len(model.values) - 1) // CHUNK), "chunk")
        values = model.values.copy()
        part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        values[part] = self._values(len(values[part]), values.dtype.str)
        return chunk, values

    def delete(self, data: st.DataObject) -> None:
        name, _ = self._choose(data)
        sync(self.writer.delete_dir(name))
        del self.model[name]
        self._consolidate()

    def delete_everything(self, data: st.DataObject) -> None:
        sync(self.writer.delete_dir(""))
        self.model.clear()
        self.format = None

    def consolidate_or_not(self, data: st.DataObject) -> None:
        self.consolidated = not self.consolidated
        self._consolidate()

    def let_a_minute_pass(self, data: st.DataObject) -> None:
        """Times of modification are trusted from now on."""
        if isinstance(self.writer, LocalStore):
            _age(self.writer.root)

    # -- who reads

    def _check(self, found: dict[str, Shown] | None, machine: str, *, exact: bool = False) -> None:
        if self.format is None:
            assert found is None
            return
        assert found is not None
        assert found.keys() == self.model.keys()
        for name, model in self.model.items():
            model.check(found[name], machine, exact=exact)

    def open_here(self, data: st.DataObject, machine: str) -> None:
        revalidate = data.draw(POLICIES, "revalidate")
        found = on_machine(self.places[machine], look, self.reader, {**self.options, "revalidate": revalidate})
        self._check(found, machine, exact=revalidate is True)

    def open_in_another_process(self, data: st.DataObject, machine: str) -> None:
        revalidate = data.draw(POLICIES, "revalidate")
        options = {**self.options, "revalidate": revalidate}
        found = neighbours.run(on_machine, self.places[machine], look, self.reader, options)
        self._check(found, machine, exact=revalidate is True)

    def read_a_part(self, data: st.DataObject, machine: str) -> None:
        name, model = self._choose(data)
        start, length = data.draw(SIZES, "start"), data.draw(SIZES, "length")
        group = on_machine(self.places[machine], lambda: opened(self.reader, **self.options))
        for place, value in enumerate(group[name][start : start + length], start):
            model.check_one(place, value, machine)

    def read_copies(self, data: st.DataObject, machine: str) -> None:
        """Opened on machine a, read on either."""
        options = {**self.options, "revalidate": data.draw(POLICIES, "revalidate")}
        copies = on_machine(self.places["a"], lambda: pickle.dumps(arrays_of(opened(self.reader, **options))))
        if data.draw(st.booleans(), "in another process"):
            found = neighbours.run(on_machine, self.places[machine], look_at_copies, copies)
        else:
            found = on_machine(self.places[machine], look_at_copies, copies)
        self._check(found, machine, exact=options["revalidate"] is True)

    def write_through(self, data: st.DataObject, machine: str) -> None:
        name, model = self._choose(data)
        chunk, values = self._changed_chunk(data, model)

        def write() -> None:
            store = xzcache.CacheStore(self.writer, **self.options)
            part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            zarr.open_array(store, path=name, mode="a", zarr_format=self.format)[part] = values[part]

        on_machine(self.places[machine], write)
        model.rewritten(chunk, values, by=machine)

    def forget(self, data: st.DataObject, machine: str) -> None:
        on_machine(self.places[machine], lambda: sync(xzcache.CacheStore(self.reader).clear_cache()))
        for model in self.model.values():
            model.doubts[machine].clear()

    def let_entries_expire(self, data: st.DataObject, machine: str) -> None:
        store = xzcache.CacheStore(self.reader, cache_store=self.places[machine])
        # what is still being stored is stored first
        store.cache_info()
        _age(self.places[machine] / store.namespace)
        found = on_machine(self.places[machine], look, self.reader, {**self.options, "max_age_seconds": 100})
        self._check(found, machine, exact=True)


def _age(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 1000 * 10**9))


# -- runs of it


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("buckets")
    (directory / BUCKET).mkdir()
    with s3_server(directory) as server:
        yield server


def run_machine(
    s3: S3Server, kind: str, max_size: int | None, tmp_path: Path, *, examples: int, steps: int, fixed: bool
) -> None:
    """Many sources, one after another, through the same two caches."""

    def machine() -> Hierarchies:
        name = f"source-{next(numbers)}"
        options: dict[str, Any] = {"max_size": max_size}
        if kind == "local":
            return Hierarchies(LocalStore(tmp_path / name), LocalStore(tmp_path / name), tmp_path, options)
        return Hierarchies(s3.store(BUCKET, name), s3.store(BUCKET, name), tmp_path, options)

    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        # a moderate run has to say the same on every machine; a soak run looks for what nobody thought of
        derandomize=fixed,
        # to find the shortest example takes minutes
        phases=[Phase.generate] if fixed else list(Phase),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)


places = pytest.mark.parametrize(("kind", "max_size"), [("local", None), ("local", 5000), ("obstore", None)])


@places
def test_each_opening_shows_the_source(s3: S3Server, kind: str, max_size: int | None, tmp_path: Path) -> None:
    run_machine(s3, kind, max_size, tmp_path, examples=8, steps=30, fixed=True)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@places
def test_each_opening_shows_the_source_for_long(s3: S3Server, kind: str, max_size: int | None, tmp_path: Path) -> None:
    run_machine(s3, kind, max_size, tmp_path, examples=200, steps=50, fixed=False)
