"""Settings that the site enforces in /etc/xzcache: no user overrides them, by whatever way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

SITE = """\
xzcache:
  threads: 3
enforced:
  directory: {folder}/of-the-site
  max-size: 5 MB
  min_free: 0
  policy: lru
  revalidate: strict
  polcy: lru
"""
LAYER = """
set -e
mkdir -p "$1/upper/xzcache" "$1/layer"
cp "$1/site.yaml" "$1/upper/xzcache/"
mount -t tmpfs none "$1/layer"
mkdir "$1/layer/upper" "$1/layer/work"
cp -r "$1/upper/xzcache" "$1/layer/upper/"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/layer/upper,workdir=$1/layer/work" /etc
shift
exec "$@"
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs Python where /etc/xzcache has the file above, in a mount namespace of its own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a file in /etc takes root and a mount namespace")
    (tmp_path / "site.yaml").write_text(SITE.format(folder=tmp_path))
    layer = ["unshare", "--mount", "--propagation", "private", "sh", "-c", LAYER, "sh", str(tmp_path)]

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("XZCACHE_", "DASK_"))}
        line = [*layer, sys.executable, *words]
        return subprocess.run(line, env={**mine, **env}, capture_output=True, text=True, timeout=60, check=False)

    if "mount" in (tried := run("-c", "")).stderr:
        pytest.skip(f"no layer over /etc here: {tried.stderr.strip()}")
    return run


READ = """
import json, logging, sys, numpy, zarr, xzcache
logging.basicConfig(stream=sys.stderr)
zarr.create_array(sys.argv[1] + "/x.zarr", data=numpy.arange(10), chunks=(2,), overwrite=True)
xzcache.config.set(**json.loads(sys.argv[2]))
store = xzcache.CacheStore(sys.argv[1] + "/x.zarr", **json.loads(sys.argv[3]))
zarr.open_array(store, mode="r")[:]
info = xzcache.info()
print(json.dumps([info.directory, info.max_size, store.policy, store.revalidate, xzcache.config.get("threads")]))
"""
LARGER: dict[str, Any] = {"max_size": "9 GB", "min_free": "0", "policy": "adaptive", "revalidate": False}


@pytest.mark.parametrize(
    ("env", "configured", "given"),
    [
        ({}, {}, {}),
        ({f"XZCACHE_{name.upper()}": str(value) for name, value in LARGER.items()}, {}, {}),
        ({"XZCACHE_ROOT_CONFIG": "/nowhere", "XZCACHE_DIRECTORY": "/elsewhere"}, {}, {}),
        ({}, {**LARGER, "directory": "/elsewhere"}, {}),
        ({}, {}, {"max_size": "9 GB", "policy": "adaptive", "revalidate": False}),
        ({}, {"max_size": None}, {"max_size": None}),
    ],
)
def test_no_user_overrides_the_site(
    env: dict[str, str], configured: dict[str, Any], given: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    found = run("-c", READ, str(tmp_path), json.dumps(configured), json.dumps(given), **env)
    assert found.returncode == 0, found.stderr
    directory, bound, policy, revalidate, threads = json.loads(found.stdout)
    assert (directory, bound, policy, revalidate) == (str(tmp_path / "of-the-site"), 5_000_000, "lru", "strict")
    assert threads == (4 if "XZCACHE_ROOT_CONFIG" in env else 3)


@pytest.mark.parametrize(("configured", "given"), [({"max_size": "3 MB"}, {}), ({}, {"max_size": "3 MB"})])
def test_a_user_may_take_less(configured: dict[str, Any], given: dict[str, Any], run: Run, tmp_path: Path) -> None:
    found = run("-c", READ, str(tmp_path), json.dumps(configured), json.dumps(given))
    assert json.loads(found.stdout)[1] == 3_000_000


def test_a_cache_cannot_be_resized_beyond_the_site(run: Run, tmp_path: Path) -> None:
    run("-c", READ, str(tmp_path), "{}", "{}")
    refused = run("-m", "xzcache", "resize", "6MB", "--yes")
    assert refused.returncode == 2
    assert "give 5 MB or less" in refused.stderr
    assert "site.yaml, line 5, enforced" in refused.stderr
    assert run("-m", "xzcache", "resize", "4MB", "--yes").returncode == 0


def test_it_is_shown_where_a_setting_comes_from(run: Run) -> None:
    shown = run("-m", "xzcache", "config").stdout
    assert shown.count("site.yaml") == 7
    assert shown.count(", enforced") == 5
    assert "polcy is no setting, did you mean policy?" in shown


WORKERS = """
import json, sys, xzcache
from distributed import Client, LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as made:
        with Client(made) as client:
            client.register_plugin(xzcache.CachePlugin("/elsewhere", "9 GB", policy="adaptive"))
            (node,) = xzcache.cluster_info(client)
            print(json.dumps([node.directory, node.bound]))
"""


def test_the_plugin_of_a_cluster_overrides_nothing_either(run: Run, tmp_path: Path) -> None:
    found = run("-c", WORKERS)
    assert json.loads(found.stdout) == [str(tmp_path / "of-the-site"), 5_000_000], found.stderr
