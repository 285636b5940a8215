"""Dask's ways in through the door, on a cluster in this process: the plugin, the preload, what is shown."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from clusters import threads
from processes import Dataset

import xzcache
from xzcache.dask import CacheDashboard, CachePlugin, cluster_info, dask_setup


def test_a_plugin_travels_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    plugin = pickle.loads(pickle.dumps(CachePlugin(tmp_path / "cache", "1 MB", remove_on_close=True)))
    assert plugin.name == "xzcache"
    assert str(tmp_path / "cache") in repr(plugin)
    # as it is documented, in whichever of its forms it was given
    for reserve in (0.05, "5%", " 5.0 %"):
        assert "min_free='5%'" in repr(CachePlugin(min_free=reserve))
    with pytest.raises(TypeError, match="max_sise"):
        CachePlugin(max_sise="1 MB")
    assert not (tmp_path / "cache").exists()


def test_workers_use_the_cache_of_their_plugin_and_show_it(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with threads(1) as client:
        assert all(node.directory != ds.root for node in cluster_info(client))
        client.register_plugin(CachePlugin(ds.root, "1 MB"))
        for _ in range(2):
            client.submit(ds.read, pure=False).result()
        (node,) = cluster_info(client)
        assert (node.directory, node.bound, node.entries) == (ds.root, 1_000_000, 5)
    assert set(ds.chunk_requests().values()) == {1}


def test_the_preload_sets_up_workers_and_the_scheduler(tmp_path: Path) -> None:
    with xzcache.config.set(directory=str(tmp_path / "cache")), threads(1) as client:

        async def preload(dask_scheduler: object = None, dask_worker: object = None) -> None:
            await dask_setup(dask_scheduler or dask_worker)  # type: ignore[arg-type]

        client.run(preload)
        client.run_on_scheduler(preload)
        assert [node.directory for node in cluster_info(client)] == [str(tmp_path / "cache")]
        assert client.run_on_scheduler(lambda dask_scheduler: CacheDashboard.name in dask_scheduler.plugins)
