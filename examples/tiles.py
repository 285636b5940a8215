"""A service of map tiles with several server processes and one cache.

gunicorn runs `app`, a plain WSGI application, in several processes, as it runs titiler. All of them read the same
dataset in S3, and no plugin is needed: they share the cache directory. Everything is made here and thrown away at the
end. Run it with ``python examples/tiles.py``.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

import xzcache

TILE, TILES, DAYS, SERVERS = 64, 4, 6, 3

# ------------------------------------------------------------------------------------------------------------
# The service: what you would write yourself.


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer ``/tiles/DAY/Y/X`` with an image."""
    day, y, x = (int(number) for number in re.findall(r"\d+", environ["PATH_INFO"]))
    store = xzcache.CacheStore(
        "s3://maps/t2m.zarr", storage_options=json.loads(os.environ["MAPS_OPTIONS"]), read_only=True, revalidate=60
    )
    tile = zarr.open_array(store, path="t2m", mode="r")[day, y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE]
    start_response("200 OK", [("Content-Type", "image/png"), ("X-Process", str(os.getpid()))])
    return [image(np.asarray(tile))]


def image(tile: Any) -> bytes:
    """Draw a tile."""
    import matplotlib.image

    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, tile, vmin=250, vmax=310, cmap="inferno")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------
# The rest makes the data, starts the service and asks it.


def write_dataset(store: zarr.abc.store.Store) -> None:
    """Write some days of temperature."""
    noise = np.random.default_rng(0).normal(size=(DAYS, TILE * TILES, TILE * TILES)).astype("f4")
    dataset = xr.Dataset({"t2m": (("day", "y", "x"), 280 + 10 * noise)})
    warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
    dataset.to_zarr(store, zarr_format=3, encoding={"t2m": {"chunks": (1, TILE, TILE)}})


def main() -> None:
    from _s3 import s3_server

    with tempfile.TemporaryDirectory(prefix="xzcache-tiles-") as name:
        folder = Path(name)
        (folder / "buckets" / "maps").mkdir(parents=True)
        with s3_server(folder / "buckets", latency=0.02) as s3:
            write_dataset(s3.store("maps", "t2m.zarr"))
            s3.reset()
            options = {"key": s3.access_key, "secret": s3.secret_key, "endpoint_url": s3.endpoint}
            command = [
                sys.executable, "-m", "gunicorn", "tiles:app", "--chdir", str(Path(__file__).parent),
                "--bind", "127.0.0.1:0", "--workers", str(SERVERS), "--threads", "4",
            ]  # fmt: skip
            environment = os.environ | {"MAPS_OPTIONS": json.dumps(options), "XZCACHE_DIRECTORY": str(folder / "cache")}
            with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as service:
                assert service.stderr is not None
                lines = iter(service.stderr)
                with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(12) as visitors:
                    try:
                        address = next(m[1] for line in lines if (m := re.search(r"(http://127\S+)", line)))
                        reader.submit(lambda: [None for _ in lines])  # a full pipe would stop the service

                        def visit(tile: str) -> tuple[str, bytes]:
                            with urllib.request.urlopen(f"{address}/tiles/{tile}", timeout=60) as answer:
                                return answer.headers["X-Process"], answer.read()

                        tiles = [f"{d}/{y}/{x}" for d in range(DAYS) for y in range(TILES) for x in range(TILES)]
                        answers = list(visitors.map(visit, tiles * 3))
                    finally:
                        service.terminate()  # whatever happens: the reader waits for its end
            chunks = s3.counts().only("GET", "*/c/*").requests
        processes = len({process for process, _ in answers})
        print(f"{len(answers)} tiles served by {processes} processes; the bucket was asked for {chunks} chunks")
        print(xzcache.info(folder / "cache"))
        assert all(body.startswith(b"\x89PNG") for _, body in answers)
        assert chunks == len(tiles), "each chunk once, for all processes"


if __name__ == "__main__":
    main()
