"""Whose directories and files a cache uses, and what becomes of reads where there is none to use.

A cache is its user's alone. In a directory that others share, a folder of this user's is the cache; what others may
have touched is not read. Whatever the environment is like, constructing and looking raise nothing, and reads go on.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from containers import PATIENCE, USER, container, environment, needs_containers, reachable, run, run_forked
from processes import run_program, until
from sources import CountingStore
from zarr.storage import LocalStore, MemoryStore

import xzcache

pytestmark = pytest.mark.slow

OTHER = 12345
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="to give files away takes root")
PRIVATE = f"xzcache-{USER}"

USE = """
import json, logging, pickle, sys

told = []

class Listener(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())

logging.getLogger("xzcache").addHandler(Listener())
import zarr, xzcache

source, settings = sys.argv[1], json.loads(sys.argv[2])
store = xzcache.CacheStore(source, **settings)
copy = pickle.loads(pickle.dumps(store))
sums = [int(zarr.open_array(each, mode="r")[:].sum()) for each in (store, copy)]
# to look, and to make a plugin, is never refused either
info = copy.cache_info()
repr(store), store.max_size, store.cache_stats()
xzcache.CachePlugin()
found = {"sums": sums, "told": told, "where": info["cache_directory"], "misses": copy.cache_stats()["misses"]}
print(json.dumps(found))
"""


class Base:
    """A source that everybody can read, and a place for a volume and for temporary files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source, self.volume, self.temporary = path / "source", path / "volume", path / "tmp"
        array = zarr.create_array(str(self.source), shape=(100,), chunks=(10,), dtype="i4")
        array[:] = np.arange(100)
        for top, _, names in os.walk(self.source):
            os.chmod(top, 0o755)
            for name in names:
                os.chmod(os.path.join(top, name), 0o644)
        self.volume.mkdir()
        self.temporary.mkdir()

    def use(
        self,
        *,
        directory: Path | str | None = None,
        argument: Path | str | None = None,
        home: str | None = "/",
        mounts: dict[str | Path, str] | None = None,
        starts: bool = False,
        **how: Any,
    ) -> dict[str, Any]:
        """Read all of it twice in a container: through a store, and through an unpickled copy of it.

        `starts` tells whether an interpreter starts in there, as where its environment is what matters.
        """
        env = {"HOME": home, "TMPDIR": str(self.temporary), **how.pop("env", {})}
        if directory is not None:
            env["XZCACHE_DIRECTORY"] = str(directory)
        settings = {} if argument is None else {"cache_store": str(argument)}
        mounts = {self.temporary: "mode=1777", **(mounts or {})}
        words = [USE, str(self.source), json.dumps(settings)]
        if starts:
            done = run(["-c", *words], env=env, mounts=mounts, **how)
            assert done.returncode == 0, done.stderr
            out = done.stdout
        else:
            out, _ = run_forked(*words, env=env, mounts=mounts, **how)
        found: dict[str, Any] = json.loads(out)
        assert found["sums"] == [4950, 4950]
        return found


@pytest.fixture(scope="module")
def base() -> Iterator[Base]:
    with reachable() as path:
        yield Base(path)


# -- the default directory


@needs_containers
@pytest.mark.parametrize(
    "env",
    [
        {"HOME": None},
        {"HOME": ""},
        {"HOME": "/"},
        {"HOME": "/dev/null"},
        {"HOME": "relative/home"},
        {"HOME": "~"},
        {"HOME": "/no/such/home"},
        {"HOME": "/root"},
        {"HOME": None, "XDG_CACHE_HOME": "relative"},
        {"HOME": "/", "XDG_CACHE_HOME": "/dev/null"},
    ],
    ids=str,
)
def test_no_home_to_keep_a_cache_in(base: Base, env: dict[str, str | None]) -> None:
    """The cache is in a folder of this user's among the temporary files, which is said once."""
    found = base.use(env=env, starts=True)
    assert found["where"] == str(base.temporary / PRIVATE)
    assert found["misses"] <= 1
    assert len(found["told"]) == 1, found["told"]
    assert found["where"] in found["told"][0]
    assert "XZCACHE_DIRECTORY" in found["told"][0]


@needs_containers
@pytest.mark.parametrize("home", [None, "/", "/dev/null"])
def test_neither_a_home_nor_temporary_files(base: Base, home: str | None) -> None:
    read_only = {base.temporary: "mode=755,ro", "/var/tmp": "mode=755,ro"}  # what the system has
    keep = f"mkdir /mnt/base; mount --bind {base.path} /mnt/base"
    hide = f"mount -t tmpfs -o mode=755 tmpfs /tmp; mkdir -p {base.path}; mount --bind /mnt/base {base.path}"
    found = base.use(home=home, mounts=read_only, before=[keep, hide])
    assert found["misses"] > 1
    assert len(found["told"]) == 1, found["told"]


@needs_containers
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_home_is_used(base: Base, umask: int) -> None:
    home = base.volume
    look = f"find {home} -printf '%m %P\\n'"
    code = USE + f"\nimport subprocess; sys.stderr.write(subprocess.check_output({look!r}, shell=True, text=True))"
    out, err = run_forked(
        *(code, base.source, "{}"), env={"HOME": str(home)}, mounts={home: f"uid={USER},mode=755"}, umask=umask
    )
    modes = dict(reversed(line.split(" ", 1)) for line in err.splitlines())
    assert modes.pop(".cache") == f"{0o755 & ~umask:o}"
    assert json.loads(out)["where"] == f"{home}/.cache/xzcache"
    made = {path: int(mode, 8) for path, mode in modes.items() if path}
    assert all(mode & 0o022 == 0 for mode in made.values()), modes
    assert {path: mode for path, mode in made.items() if mode & 0o077 and "/.xzcache/" not in path} == {}


# -- volumes


SHARED = ["mode=777", "mode=1777", f"mode=2775,gid={USER}", "uid=99,mode=777", f"uid=99,gid={USER},mode=770"]
CLOSED = ["mode=755", "mode=777,ro", "mode=750", f"mode=711,gid={USER}"]


@needs_containers
@pytest.mark.parametrize(("way", "options"), [*(("directory", one) for one in SHARED), ("argument", SHARED[0])])
def test_a_volume_that_everybody_may_write(base: Base, options: str, way: str) -> None:
    found = base.use(**{way: base.volume}, mounts={base.volume: options})  # type: ignore[arg-type]
    assert found["where"] == str(base.volume / PRIVATE)
    assert (found["told"], found["misses"]) == ([], 1)


@needs_containers
@pytest.mark.parametrize(("way", "options"), [*(("directory", one) for one in CLOSED), ("argument", CLOSED[0])])
def test_a_volume_that_is_not_to_be_written(base: Base, options: str, way: str) -> None:
    found = base.use(**{way: base.volume}, mounts={base.volume: options})  # type: ignore[arg-type]
    assert found["misses"] > 1
    assert len(found["told"]) == 1, found["told"]
    assert str(base.volume) in found["told"][0]


@needs_containers
@pytest.mark.parametrize("options", [f"uid={USER},mode=755", f"uid={USER},mode=775", f"uid={USER},mode=700"])
def test_a_volume_of_this_user(base: Base, options: str) -> None:
    found = base.use(directory=base.volume, mounts={base.volume: options})
    assert (found["where"], found["told"]) == (str(base.volume), [])


@needs_containers
@pytest.mark.parametrize(
    "command",
    [
        "mkdir -m 777 {real}; ln -s {real} {private}",
        "mkdir -m 700 {real}; chown {user} {real}; ln -s {real} {private}",
        "mkdir -m 777 {private}",
        "mkdir -m 700 {private}",
        "touch {private}",
        "mkdir -m 775 {private}; touch {private}/planted; chown {user} {private}",
        "mkdir -m 700 {private} {private}/.xzcache; chown {user} {private}",
        "mkdir -m 700 {private} {real}; ln -s {real} {private}/.xzcache; chown {user} {private}",
    ],
)
def test_a_folder_that_pretends_to_be_this_users(base: Base, command: str) -> None:
    private = base.volume / PRIVATE
    command = command.format(private=private, real=base.volume / "real", user=USER)
    found = base.use(directory=base.volume, mounts={base.volume: "mode=1777"}, before=[command])
    assert found["misses"] > 1
    assert len(found["told"]) == 1, found["told"]
    assert str(private) in found["told"][0]


@needs_containers
@pytest.mark.parametrize(
    ("path", "before"),
    [
        ("{volume}/file", "touch {volume}/file"),
        ("{volume}/file/beneath", "touch {volume}/file"),
        ("{volume}/loop", "ln -s {volume}/loop {volume}/loop"),
        ("{volume}/dangling", "ln -s /no/such/place {volume}/dangling"),
        ("{volume}/closed", "mkdir -m 600 {volume}/closed; chown 54321 {volume}/closed"),
        ("{volume}/closed/beneath", "mkdir -m 600 {volume}/closed; chown 54321 {volume}/closed"),
        ("{volume}/" + "long/" * 818, "true"),
        ("{volume}/" + "n" * 256, "true"),
        ("~/cache", "true"),
    ],
    ids=["a file", "beneath a file", "a loop", "dangling", "no x", "beneath no x", "4,096 bytes", "a long name", "~"],
)
def test_a_configured_path_that_cannot_be_a_cache(base: Base, path: str, before: str) -> None:
    found = base.use(
        directory=path.format(volume=base.volume),
        home=None,
        mounts={base.volume: "mode=777"},
        before=[before.format(volume=base.volume)],
    )
    assert found["misses"] > 1
    assert len(found["told"]) == 1, found["told"]


def test_a_path_whose_name_cannot_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    store = xzcache.CacheStore(_source(tmp_path), cache_store=path)
    for _ in range(2):
        assert zarr.open_array(pickle.loads(pickle.dumps(store)), mode="r")[:].sum() == 45
    assert (path / ".xzcache").is_dir()
    assert store.cache_info()["cached_keys"] == 6


# -- what is a mistake of the caller's


@pytest.mark.parametrize(("given", "error"), [("", ValueError), (7, TypeError), (b"/tmp", TypeError)])
def test_a_mistake_is_named(given: Any, error: type[Exception], tmp_path: Path) -> None:
    for name, make in {
        "cache_store": lambda: xzcache.CacheStore(MemoryStore(), cache_store=given),
        "root": lambda: xzcache.LockedLocalStore(given),
    }.items():
        with pytest.raises(error, match=rf"{name}={re.escape(repr(given))} is not accepted: give "):
            make()
    if given == 7:
        with xzcache.config.set(directory=given), pytest.raises(error, match="directory=7 is not accepted: give "):
            xzcache.CacheStore(MemoryStore())


def test_a_file_is_a_mistake_where_it_is_named_and_none_in_a_copy(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    stores = [xzcache.CacheStore(_source(tmp_path), cache_store=cache), xzcache.LockedLocalStore(cache)]
    pickled = [pickle.dumps(store) for store in stores]
    cache.write_text("the user's")
    with pytest.raises(ValueError, match="is a file"):
        xzcache.CacheStore(MemoryStore(), cache_store=cache)
    copy, local = map(pickle.loads, pickled)
    assert zarr.open_array(copy, mode="r")[:].sum() == 45
    assert copy.cache_stats()["cache_errors"] > 0
    assert local.get_sync("zarr.json") is None
    assert cache.read_text() == "the user's"


# -- looking


def _source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    if not path.exists():
        array = zarr.create_array(str(path), shape=(10,), chunks=(2,), dtype="i4")
        array[:] = np.arange(10)
    return path


def test_looking_makes_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "made" / "cache"
    store = xzcache.CacheStore(_source(tmp_path), cache_store=cache, max_size="3 MB")
    unbounded = xzcache.CacheStore(_source(tmp_path), cache_store=tmp_path / "other", namespace="x")
    local = xzcache.LockedLocalStore(cache)
    looks: list[Callable[[], object]] = [
        lambda: repr(store),
        lambda: store._repr_html_(),
        lambda: str(store),
        lambda: repr(local),
        store.cache_stats,
        lambda: store == pickle.loads(pickle.dumps(store)),
        lambda: store.with_read_only(True),
        lambda: repr(xzcache.CachePlugin(cache)),
    ]
    for look in looks:
        look()
    info = store.cache_info()
    assert (info["total_size"], info["current_size"], info["cached_keys"]) == (0, 0, 0)
    assert (info["max_size"], store.max_size) == (3_000_000, 3_000_000)
    # what a new one would get
    assert unbounded.cache_info()["max_size"] == 10 << 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    # and it is made as soon as there is something to keep
    assert zarr.open_array(store, mode="r")[:].sum() == 45
    assert store.cache_info()["cached_keys"] == 6


def test_looking_at_a_cluster_makes_nothing(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    place = str(tmp_path / "none" / "yet")
    options: dict[str, Any] = {"processes": False, "dashboard_address": None}
    with LocalCluster(1, **options) as made, Client(made) as client, xzcache.config.set(directory=place):
        (node,) = xzcache.cluster_info(client)
        assert (node.node, node.directory, node.used, node.entries) == ("", place, 0, 0)
        assert os.listdir(tmp_path) == []
        client.register_plugin(xzcache.CachePlugin(place))
        (node,) = xzcache.cluster_info(client)
        assert node.node
        source = xzcache.CacheStore(_source(tmp_path / "data"))
        assert zarr.open_array(source, mode="r")[:].sum() == 45
        until(lambda: min(client.run(_used).values()) > 0)
        # taken away meanwhile: the figures of the worker do not bring it back
        shutil.rmtree(tmp_path / "none")
        until(lambda: set(client.run(_used).values()) == {0})
        assert xzcache.cluster_info(client)[0].node == ""
        assert os.listdir(tmp_path) == ["data"]


def _used(dask_worker: Any) -> float:
    """As the worker tells the scheduler, and with it the dashboard."""
    used: float = dask_worker.metrics["xzcache_used"](dask_worker)
    return used


# -- umask


@pytest.mark.parametrize("umask", ["000", "002", "077"])
def test_nobody_else_may_write_what_is_made(tmp_path: Path, umask: str) -> None:
    cache = tmp_path / "a" / "b" / "cache"
    code = (
        "import sys, zarr, xzcache\n"
        "from zarr.abc.store import RangeByteRequest\n"
        "from zarr.core.buffer import default_buffer_prototype as p\n"
        "from zarr.core.sync import sync\n"
        "store = xzcache.CacheStore(sys.argv[1], cache_store=sys.argv[2])\n"
        "zarr.open_array(store, mode='r')[:]\n"
        "sync(store.get('c/0', p(), RangeByteRequest(1, 3)))\n"
        "xzcache.LockedLocalStore(sys.argv[2]).set_sync('deep/er/key', p().buffer.from_bytes(b'1'))\n"
    )
    line = f'umask {umask}; exec "$0" -c "$1" "$2" "$3"'
    subprocess.run(["sh", "-c", line, sys.executable, code, str(_source(tmp_path)), str(cache)], check=True)
    folders = [Path(top) for top, _, _ in os.walk(tmp_path / "a")]
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in folders}
    ours = {name: mode for name, mode in modes.items() if name.startswith("a/b/cache")}
    assert len(ours) > 5
    assert set(ours.values()) == {0o700}, ours
    assert all(mode & 0o022 == 0 for mode in modes.values()), modes


# -- what others may have put there


class Filled:
    """A cache whose source has other bytes by now: whoever gets the old ones got them from the cache."""

    def __init__(self, tmp_path: Path) -> None:
        self.cache = tmp_path / "cache"
        self.source = tmp_path / "source"
        self.put(b"old" * 100)
        self.store = self.open()
        assert self.read() == b"old" * 100
        assert self.read() == b"old" * 100
        self.put(b"new" * 100)
        self.entry = self.cache / "n" / "a" / "c" / "0"
        assert self.entry.read_bytes() == b"old" * 100

    def put(self, value: bytes) -> None:
        path = self.source / "a" / "c" / "0"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)

    def open(self) -> xzcache.CacheStore:
        source = CountingStore(LocalStore(self.source, read_only=True))
        return xzcache.CacheStore(source, cache_store=self.cache, namespace="n", revalidate=False)

    def read(self, store: xzcache.CacheStore | None = None) -> bytes:
        from sources import read
        from zarr.core.sync import sync

        value = sync(read(store or self.store, "a/c/0"))
        assert value is not None
        return value

    def read_anew(self) -> bytes:
        """As another process reads it."""
        code = (
            "import sys, zarr, xzcache\n"
            "from zarr.core.buffer import default_buffer_prototype as p\n"
            "from zarr.core.sync import sync\n"
            "source = zarr.storage.LocalStore(sys.argv[1], read_only=True)\n"
            "store = xzcache.CacheStore(source, cache_store=sys.argv[2], namespace='n', revalidate=False)\n"
            "print(sync(store.get('a/c/0', p())).to_bytes().decode())\n"
        )
        out, _ = run_program(code, self.source, self.cache)
        return out.rstrip("\n").encode()


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    found = Filled(tmp_path)
    assert found.read_anew() == b"old" * 100
    return found


@needs_root
@pytest.mark.parametrize("process", ["same", "new"])
def test_a_file_of_another_user_is_not_served(filled: Filled, process: str) -> None:
    os.chown(filled.entry, OTHER, OTHER)
    assert (filled.read() if process == "same" else filled.read_anew()) == b"new" * 100
    # what was fetched takes its place
    assert filled.read_anew() == b"new" * 100
    assert filled.entry.stat().st_uid == os.geteuid()


@needs_root
def test_a_locked_local_store_serves_no_entry_of_another_user(filled: Filled) -> None:
    local = xzcache.LockedLocalStore(filled.cache)
    (filled.cache / "note").write_bytes(b"whoever wrote it")
    os.chown(filled.cache / "note", OTHER, OTHER)
    os.chown(filled.entry, OTHER, OTHER)
    assert local.get_sync("n/a/c/0") is None
    # what does not pretend to be an entry is a file in a store like any other
    value = local.get_sync("note")
    assert value is not None
    assert value.to_bytes() == b"whoever wrote it"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o770, 0o1777])
def test_a_cache_that_others_may_write_is_not_read(filled: Filled, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    filled.cache.chmod(mode)
    assert filled.read_anew() == b"new" * 100
    # a process that had it open notices when it opens it again
    store = pickle.loads(pickle.dumps(filled.store))
    assert filled.entry.read_bytes() == b"old" * 100, "nothing is written there either"
    filled.cache.chmod(0o700)
    assert filled.read_anew() == b"old" * 100
    assert filled.read(store) == b"old" * 100


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_directory_that_others_may_write_gets_a_folder_of_ours(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "scratch"
    shared.mkdir()
    (shared / "README").write_text("of the team")
    shared.chmod(mode)
    store = xzcache.CacheStore(_source(tmp_path), cache_store=shared)
    assert zarr.open_array(store, mode="r")[:].sum() == 45
    where = Path(store.cache_info()["cache_directory"])
    assert where == shared / f"xzcache-{os.geteuid()}"
    assert stat.S_IMODE(where.stat().st_mode) == 0o700
    assert stat.S_IMODE(shared.stat().st_mode) == mode
    assert sorted(path.name for path in shared.iterdir()) == ["README", where.name]
    # the same one, whoever names it in whichever way
    for again in (shared, where, xzcache.LockedLocalStore(shared), LocalStore(shared)):
        assert xzcache.CacheStore(MemoryStore(), cache_store=again).cache_info()["cache_directory"] == str(where)


@needs_root
def test_a_directory_of_another_user_gets_a_folder_of_ours(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    (tmp_path / "link").symlink_to(theirs)
    for given in (theirs, tmp_path / "link"):
        store = xzcache.CacheStore(_source(tmp_path), cache_store=given)
        assert zarr.open_array(store, mode="r")[:].sum() == 45
        assert store.cache_info()["cache_directory"] == str(theirs / f"xzcache-{os.geteuid()}")


@needs_root
@pytest.mark.parametrize("what", ["root", "meta", "root and all"])
def test_a_directory_that_is_swapped_while_it_is_used(filled: Filled, tmp_path: Path, what: str) -> None:
    """What lies at the path then is another user's, though all of its entries are as they were."""
    swapped = filled.cache if what != "meta" else filled.cache / ".xzcache"
    aside = tmp_path / "aside"
    shutil.copytree(swapped, aside, symlinks=True)
    os.chown(aside, OTHER, OTHER)
    if what == "root and all":
        for top, folders, names in os.walk(aside):
            for name in folders + names:
                os.chown(os.path.join(top, name), OTHER, OTHER)
    swapped.rename(tmp_path / "before")
    aside.rename(swapped)
    before = _listing(filled.cache)
    if what == "root and all":
        assert filled.read() == b"new" * 100
    # whoever opens it anew, and whoever stores something, notices
    filled.put(b"newer" * 100)
    from zarr.core.sync import sync

    sync(filled.store.clear_cache())
    assert filled.read() == b"newer" * 100
    if what == "meta":
        assert filled.read_anew() == b"newer" * 100
    assert _listing(filled.cache) == before, "nothing is written where others are"


def _listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("level", ["n", "n/a", "n/a/c"])
def test_what_lies_behind_a_link_is_not_served(filled: Filled, tmp_path: Path, level: str) -> None:
    """It is this user's and bears the right stamp, but it is not in the cache: a write would not make it go."""
    folder = filled.cache / level
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert filled.read_anew() == b"new" * 100


# -- README's recipes


@contextmanager
def started(line: list[str], **env: str) -> Iterator[None]:
    with subprocess.Popen(line, env=environment() | env, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            yield
        finally:
            # its workers are its own to end
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


@needs_containers
@pytest.mark.parametrize(
    ("options", "cached"),
    [("mode=777", True), (f"mode=2775,gid={USER}", True), ("mode=755", False)],
    ids=["emptyDir", "fsGroup", "hostPath"],
)
def test_a_worker_in_a_container(base: Base, tmp_path: Path, options: str, cached: bool) -> None:
    """As dask-kubernetes starts it: another user, no home, a volume that is root's, and the preload."""
    from distributed import Client

    where = tmp_path / "scheduler.json"
    scheduler = [sys.executable, "-m", "dask", "scheduler", "--preload", "xzcache.dask", "--host", "127.0.0.1"]
    scheduler += ["--port", "0", "--dashboard-address", ":0", "--scheduler-file", str(where)]
    with started(scheduler):
        until(lambda: where.exists() and where.stat().st_size > 0)
        with Client(scheduler_file=str(where)) as client:
            address = client.scheduler.address
            worker = container(
                [*("-m", "dask", "worker", address, "--nworkers", "2", "--nthreads", "1"), "--no-dashboard"],
                mounts={base.volume: options, base.temporary: "mode=1777"},
                env={
                    "HOME": "/",
                    "TMPDIR": str(base.temporary),
                    "XZCACHE_DIRECTORY": str(base.volume),
                    "DASK_DISTRIBUTED__WORKER__PRELOAD": '["xzcache.dask"]',
                },
            )
            with started(worker):
                client.wait_for_workers(2, timeout=PATIENCE)
                source = str(base.source)
                for worker_address in client.scheduler_info(n_workers=-1)["workers"]:
                    found = client.submit(_sum, source, workers=[worker_address], pure=False).result(PATIENCE)
                    assert found == (4950, USER)
                (node,) = xzcache.cluster_info(client)
                assert len(node.workers) == 2
                assert node.directory == str(base.volume / PRIVATE)
                # the second worker reads what the first one fetched
                assert (bool(node.node), node.entries, node.hits >= 10) == (cached, 11 if cached else 0, cached)


def _sum(source: str) -> tuple[int, int]:
    import os

    import zarr

    import xzcache

    return int(np.asarray(zarr.open_array(xzcache.CacheStore(source), mode="r")[:]).sum()), os.geteuid()
