"""The alerts and the board of the documentation name metrics that exist, and Prometheus accepts what they ask."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import pytest
import yaml
from processes import PATIENCE, until
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

import xzcache
from xzcache import manage

DOCS = Path(__file__).resolve().parents[2] / "docs"
ALERTS = DOCS / "files" / "xzcache-alerts.yaml"
BOARD = DOCS / "files" / "xzcache-grafana.json"
PROTOTYPE = default_buffer_prototype()

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here")


def documented() -> set[str]:
    """The metrics that the reference lists, which another test compares with those that are exported."""
    text = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(xzcache_\w+)` \| (?:counter|gauge) \|", text, re.M))


def asked_by_the_board() -> list[str]:
    """The queries of the board, with a value in the place of each variable."""
    board = json.loads(BOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) >= len(board["panels"])
    return [query.replace("$__rate_interval", "1m").replace("$node", ".*") for query in queries]


def promtool(*words: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alerts_and_the_board_ask_for_metrics_that_exist() -> None:
    rules = [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    names = documented()
    assert names
    for query in [*rules, *asked_by_the_board()]:
        found = set(re.findall(r"\bxzcache_\w+", query))
        assert found
        assert found <= names, query


def test_the_board_is_whole() -> None:
    board = json.loads(BOARD.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    }
    # no panel lies on another one, or outside of the 24 columns
    assert len(places) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in panels)
    assert max(x for x, _ in places) == 23
    names = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", BOARD.read_text())) - {"__rate_interval", "__all"} == names


@needs_promtool
def test_prometheus_accepts_the_alerts_and_the_queries(tmp_path: Path) -> None:
    assert "SUCCESS" in promtool("check", "rules", ALERTS)
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(asked_by_the_board())]
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    assert "SUCCESS" in promtool("check", "rules", tmp_path / "board.yaml")


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    inside = ",".join(f'{key}="{value}"' for key, value in {"instance": "a:1", "node": "n", **labels}.items())
    return {"series": f"{name}{{{inside}}}", "values": values}


@needs_promtool
@pytest.mark.parametrize("trouble", [False, True])
def test_alerts_are_raised_by_trouble_and_by_nothing_else(tmp_path: Path, trouble: bool) -> None:
    again, misses = ("0+50x600", "0+100x600") if trouble else ("0+1x600", "0+100x600")
    source = {"source": "era5"}
    inputs = [
        series("xzcache_up", "0x600" if trouble else "1x600"),
        series("xzcache_node_disk_free_bytes", "1e9x600" if trouble else "9e10x600"),
        series("xzcache_node_disk_bytes", "1e11x600"),
        series("xzcache_source_refetched_total", again, **source),
        series("xzcache_source_misses_total", misses, **source),
        series("xzcache_source_hits_total", "0+1x600", **source),
        # what another node had is a hit as well
        series("xzcache_source_peer_hits_total", "0x600" if trouble else "0+900x600", **source),
        series("xzcache_errors_total", "0+5x600" if trouble else "0x600"),
        series("xzcache_used_bytes", "95x600"),
        series("xzcache_bound_bytes", "100x600"),
        series("xzcache_node_refetched_total", again),
        series("xzcache_node_misses_total", misses),
    ]
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    # the time at which each is looked at is long after it should be raised
    expected = "1" if trouble else "0"
    tests = [
        {
            "expr": f'count(ALERTS{{alertname="{rule["alert"]}",alertstate="firing"}}) or vector(0)',
            "eval_time": "9h",
            "exp_samples": [{"labels": "{}", "value": int(expected)}],
        }
        for rule in rules
    ]
    text = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": tests}],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(text))
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "tests.yaml")


def read_some(cache: Path) -> None:
    values = {f"a/c/{number}": PROTOTYPE.buffer.from_bytes(bytes(1000)) for number in range(20)}
    store = xzcache.CacheStore(MemoryStore(values), cache_store=cache, namespace="era5", read_only=True)

    async def read() -> None:
        for key in [*values, *values]:
            assert await store.get(key, PROTOTYPE) is not None

    asyncio.run(read())
    xzcache.info(cache)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not here")
def test_every_panel_of_the_board_has_figures_in_prometheus(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    read_some(cache)
    fetch = build_opener(ProxyHandler({})).open
    with manage.metrics_server(0, cache) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = f"127.0.0.1:{server.server_address[1]}"
        scrape = {"job_name": "xzcache", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
        config = {"scrape_configs": [scrape], "rule_files": [str(ALERTS)]}
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
        with subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path}/prometheus.yaml",
                f"--storage.tsdb.path={tmp_path}/data",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stderr is not None
                told = ""
                for line in process.stderr:
                    told += line
                    if "ready to receive" in line:
                        break
                # the port that it was given, and not the 0 that was asked for
                (address, *_) = re.findall(r"address=(127\.0\.0\.1:[1-9]\d*)", told)
                # a full pipe would stop it
                threading.Thread(target=process.stderr.read, daemon=True).start()

                def ask(query: str) -> list[Any]:
                    with fetch(f"http://{address}/api/v1/query?query={quote(query)}", timeout=PATIENCE) as answer:
                        found: dict[str, Any] = json.load(answer)
                    assert found["status"] == "success"
                    return list(found["data"]["result"])

                until(lambda: ask("count_over_time(xzcache_up[1m]) >= 2"))
                assert [query for query in asked_by_the_board() if not ask(query)] == []
            finally:
                process.terminate()
            server.shutdown()
