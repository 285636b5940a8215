"""A source's name: readable, without credentials, its own, and the same wherever, whenever and however it is read."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from damage import contents, make_source, read
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import forget_file_systems, needs_obstore, nobody, s3_server, tidy, web_server, words
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, LoggingStore, MemoryStore, ObjectStore, WrapperStore, ZipStore

import xzcache
from xzcache.sources import _locations as locations
from xzcache.sources._locations import stable_token

__all__ = ["nobody", "tidy"]

pytestmark = [
    pytest.mark.usefixtures("tidy", "nobody"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # Zarr, of chains of fsspec's that end at an asynchronous file system: they are read all the same.
    pytest.mark.filterwarnings("ignore:fs .* was not created with `asynchronous=True`"),
]

obstore = pytest.importorskip("obstore.store")


def cached(source: Any, **options: Any) -> xzcache.CacheStore:
    upstream = options.pop("upstream", "auto")
    return xzcache.CacheStore(
        source, cache_store=MemoryStore(), storage_options=options or None, upstream=upstream, read_only=True
    )


def name_of(source: Any, **options: Any) -> str:
    return cached(source, **options).namespace


def s3_at(endpoint: str | None = None, key: str = "KEY", **more: Any) -> dict[str, Any]:
    """How s3fs is told of an endpoint and an account, and not where in the world it is."""
    client = {"region_name": "us-east-1"} | ({"endpoint_url": endpoint} if endpoint else {})
    return {"key": key, "secret": "secret of " + key, "client_kwargs": client, **more}


def s3_of_obstore(endpoint: str | None = None, key: str = "KEY", path: str = "x", **more: Any) -> ObjectStore[Any]:
    where = {"endpoint": endpoint, "client_options": {"allow_http": True}} if endpoint else {}
    made = obstore.S3Store(
        "b", prefix=path, region="us-east-1", access_key_id=key, secret_access_key="s", **where, **more
    )
    return ObjectStore(made, read_only=True)


def over_fsspec(url: str, **options: Any) -> FsspecStore:
    return FsspecStore.from_url(url, storage_options=options, read_only=True)


WRAPS = importlib.util.find_spec("fsspec.implementations.asyn_wrapper") is not None
"""Whether this fsspec makes file systems asynchronous, as chains need it."""
TABLE: dict[str, Any] = {"version": 1, "refs": {".zgroup": '{"zarr_format": 2}', "a/0": ["/data/one.nc", 0, 10]}}
MOVED = {"version": 1, "refs": TABLE["refs"] | {"a/0": ["/data/two.nc", 0, 10]}}
LATER = {"version": 1, "refs": TABLE["refs"] | {"a/0": ["/data/one.nc", 1, 10]}}

URLS: list[tuple[str, dict[str, Any], str]] = [
    ("s3://bucket/era5.zarr", s3_at(), "s3-bucket-era5-zarr"),
    ("s3://bucket", s3_at("http://h:9000"), "s3-bucket"),
    ("s3://bucket/a/B_c/é.zarr", s3_at("http://h:9000"), "s3-bucket-a-b-c-zarr"),
    ("s3://bucket/x", {"anon": True, "client_kwargs": {"region_name": "r"}}, "s3-bucket-x"),
    ("gs://bucket/era5.zarr", {"token": "anon"}, "gs-bucket-era5-zarr"),
    ("abfs://c@acc.dfs.core.windows.net/era5.zarr", {"account_key": "a2V5"}, "az-c-era5-zarr"),
    ("http://example.org/x/era5.zarr", {}, "http-example-org-x-era5-zarr"),
    ("https://example.org:8443/", {}, "https-example-org-8443"),
    ("https://user:secret@example.org/era5.zarr?sig=secret", {}, "https-example-org-era5-zarr"),
    *(
        [
            ("simplecache::http://example.org/era5.zarr", {}, "simplecache-http-example-org-era5-zarr"),
            ("reference://", {"fo": TABLE}, "reference"),
        ]
        if WRAPS
        else []
    ),
]


# -- readable


@needs_obstore
@pytest.mark.parametrize(("url", "options", "beginning"), URLS, ids=[url for url, _, _ in URLS])
def test_a_name_says_what_is_read(url: str, options: dict[str, Any], beginning: str) -> None:
    name = name_of(url, **options)
    assert re.fullmatch(re.escape(beginning) + "-[0-9a-f]{20}", name)


def test_a_long_name_is_cut_and_its_own(tmp_path: Path) -> None:
    names = {name_of(tmp_path / ("d" * 200) / ("e" * 200) / f"{'f' * 200}{number}") for number in range(3)}
    assert len(names) == 3
    assert all(len(name) <= 101 for name in names)


@needs_obstore
def test_a_path_is_what_one_would_give_to_read_it(tmp_path: Path) -> None:
    assert cached("s3://bucket/x.zarr/", **s3_at("http://h:1")).path == "s3://bucket/x.zarr"
    assert cached("abfs://c@acc.dfs.core.windows.net/x", account_key="a2V5").path == "az://c/x"
    assert cached("http://user:secret@h/x?sig=secret").path == "http://h/x"
    assert cached(tmp_path).path == str(tmp_path)
    assert cached(MemoryStore()).path is None


# -- the same everywhere

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import xzcache
from zarr.storage import MemoryStore
import xzcache.sources._obstore
xzcache.sources._obstore.region_of = lambda bucket: None
for source, options in json.load(sys.stdin):
    for upstream in ("auto", "fsspec"):
        try:
            store = xzcache.CacheStore(
                source, cache_store=MemoryStore(), storage_options=options, upstream=upstream, read_only=True
            )
        except ImportError:
            continue
        print(json.dumps([source, upstream, store.namespace]))
"""


def test_other_processes_find_the_same_name(tmp_path: Path) -> None:
    """However their hashes are seeded, in whatever directory they are, and whatever their locale is."""
    make_source(tmp_path / "data.zarr", "a")
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data.zarr")
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    sources: list[Any] = [[url, options or None] for url, options, _ in URLS]
    sources += [[str(tmp_path / "data.zarr"), None]]
    many = s3_at("http://h:1", default_cache_type="none", config_kwargs={"a": [1, {"z": 1, "b": 2}], "c": None})
    sources += [["s3://b/x", many]]
    if WRAPS:
        sources += [[f"zip://::file://{archive}", None], ["simplecache::s3://b/x", {"s3": many}]]
        sources += [[f"reference::{tmp_path}/table.json", None], ["reference://", {"fo": str(tmp_path / "table.json")}]]
    told = []
    for seed, language in [("1", "C"), ("2", "C.UTF-8")]:
        (tmp_path / seed).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=json.dumps(sources),
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
            cwd=tmp_path / seed,
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": language},
        )
        told.append([json.loads(line) for line in done.stdout.splitlines()])
    assert told[0] == told[1]
    assert len(told[0]) >= 2 * len(sources) - 4
    options_of = {url: options or {} for url, options in sources}
    for url, upstream, namespace in told[0]:
        # which was given twice
        if url != "reference://":
            assert name_of(url, upstream=upstream, **options_of[url]) == namespace


@needs_obstore
@pytest.mark.parametrize(("url", "options", "beginning"), URLS, ids=[url for url, _, _ in URLS])
def test_a_copy_has_the_same_name(url: str, options: dict[str, Any], beginning: str) -> None:
    store = cached(url, **options)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.namespace == store.namespace
    assert copy.source == store.source
    written = xzcache.CacheStore(url, cache_store=MemoryStore(), storage_options=options or None, read_only=False)
    assert written.namespace == store.namespace
    # and one that was made of the source alone finds it out again
    source = pickle.loads(pickle.dumps(store._store))
    assert xzcache.CacheStore(source, cache_store=MemoryStore()).namespace == store.namespace


def s3_in_every_way(endpoint: str | None) -> dict[str, Callable[[], Any]]:
    options = s3_at(endpoint)

    def mapped() -> Any:
        import fsspec

        return fsspec.get_mapper("s3://b/x", **options)

    return {
        "auto": lambda: cached("s3://b/x", **options),
        "obstore": lambda: cached("s3://b/x", upstream="obstore", **options),
        "fsspec": lambda: cached("s3://b/x", upstream="fsspec", **options),
        "a slash more": lambda: cached("s3://b/x/", **options),
        "s3a": lambda: cached("s3a://b/x", **options),
        "another size of parts": lambda: cached("s3://b/x", default_block_size=1, **options),
        "no listings": lambda: cached("s3://b/x", use_listings_cache=False, **options),
        "other names": lambda: cached(
            "s3://b/x", username="KEY", password="x", **({"endpoint_url": endpoint} if endpoint else {})
        ),
        "another secret": lambda: cached("s3://b/x", **(options | {"secret": "another"})),
        "another region": lambda: cached(
            "s3://b/x", **(options | {"client_kwargs": options["client_kwargs"] | {"region_name": "eu-west-1"}})
        ),
        "zarr's": lambda: cached(s3_of_obstore(endpoint)),
        "aws_ names": lambda: cached(
            ObjectStore(
                obstore.S3Store(
                    "b",
                    prefix="x/",
                    aws_region="r",
                    aws_access_key_id="KEY",
                    aws_secret_access_key="s",
                    **({"aws_endpoint": endpoint} if endpoint else {}),
                )
            )
        ),
        "zarr's over fsspec": lambda: cached(over_fsspec("s3://b/x", **options)),
        "a mapping": lambda: cached(mapped()),
        "upath": lambda: cached(pytest.importorskip("upath").UPath("s3://b/x", **options)),
        "logged": lambda: cached(LoggingStore(s3_of_obstore(endpoint))),
    }


@needs_obstore
@pytest.mark.parametrize("endpoint", [None, "http://h.example:9000"])
@pytest.mark.parametrize("way", s3_in_every_way(None))
def test_a_bucket_has_one_name_in_whatever_way_it_is_read(endpoint: str | None, way: str) -> None:
    assert s3_in_every_way(endpoint)[way]().namespace == name_of("s3://b/x", **s3_at(endpoint))


@needs_obstore
@pytest.mark.parametrize(
    "urls",
    [
        ["http://h.example/x", "http://H.Example/x", "http://h.example:80/x", "http://h.example/x/"],
        ["https://h.example/x", "https://h.example:443/x/"],
        ["http://h.example", "http://h.example/"],
        ["http://h.example/a b", "http://h.example/a%20b"],
        ["http://u:p@h.example/x", "http://u:q@h.example/x"],
    ],
    ids=lambda urls: urls[0],
)
def test_an_address_has_one_name(urls: list[str]) -> None:
    ways = [name_of(url, upstream=upstream) for url in urls for upstream in ("auto", "fsspec")]
    ways += [name_of(url, headers={"Authorization": "Bearer x"}) for url in urls]
    ways += [name_of(url, client_kwargs={"headers": {"Authorization": "Bearer x"}}) for url in urls]
    if "@" not in urls[0]:
        made = [obstore.HTTPStore.from_url(url, client_options={"allow_http": True}) for url in urls]
        ways += [name_of(ObjectStore(each, read_only=True)) for each in made]
    assert len(set(ways)) == 1


def test_endpoints_are_servers_and_not_texts() -> None:
    texts = ["https://H.example", "https://h.example:443", "https://h.example/", "https://u:p@h.example", "h.example"]
    assert len({locations.of_s3("b/x", s3_at(text)) for text in texts}) == 1


@pytest.mark.parametrize(
    "options",
    [
        s3_at(key="ANOTHER"),
        s3_at(token="t1"),
        {"anon": True, "client_kwargs": {"region_name": "eu-west-1"}},
        s3_at("https://s3.amazonaws.com"),
        s3_at("https://s3.eu-west-1.amazonaws.com"),
        s3_at("https://s3.dualstack.eu-west-1.amazonaws.com"),
        s3_at("https://s3-eu-west-1.amazonaws.com"),
        s3_at("https://S3.Amazonaws.com:443/"),
    ],
    ids=str,
)
def test_a_bucket_of_amazon_is_one_in_the_world(options: dict[str, Any]) -> None:
    assert name_of("s3://b/x", upstream="fsspec", **options) == name_of("s3://b/x", upstream="fsspec", **s3_at())


@pytest.mark.parametrize("endpoint", [None, "http://h:1"])
def test_a_session_goes_on_under_another_token(endpoint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name_of("s3://b/x", **s3_at(endpoint, f"ASIA{number}", token=f"t{number}")) for number in range(3)}
    options = s3_at(endpoint)
    del options["key"], options["secret"]
    for number in range(3):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"ASIA{number}")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"secret{number}")
        monkeypatch.setenv("AWS_SESSION_TOKEN", f"token{number}")
        names.add(name_of("s3://b/x", **options))
        names.add(name_of("s3://b/x", upstream="fsspec", **options))
    assert len(names) == 1


@needs_obstore
def test_a_container_of_azure_has_one_name_per_account() -> None:
    ways = [
        name_of("az://c/x", account_name="acc", account_key="a2V5"),
        name_of("abfs://c/x/", account_name="acc", sas_token="sv=1&sig=x"),
        name_of("abfss://c@acc.dfs.core.windows.net/x", anon=True),
        name_of("abfss://c@ACC.blob.core.windows.net/x", anon=True),
        name_of("az://c/x", account_name="acc", anon=True, endpoint="https://acc.blob.core.windows.net"),
        name_of(ObjectStore(obstore.AzureStore("c", prefix="x", account_name="acc", account_key="a2V5"))),
    ]
    assert len(set(ways)) == 1
    # as adlfs has it, which need not be here
    words_of_adlfs: list[dict[str, Any]] = [
        {"account_name": "acc"},
        {"account_name": "acc", "account_host": "acc.blob.core.windows.net"},
        {"connection_string": "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a2V5=="},
    ]
    found = {locations.of_azure("c/x", given) for given in words_of_adlfs}
    assert found == {locations.of_azure("c/x", {"account_name": "acc", "account_key": "a2V5"}, boto=False)}


@needs_obstore
def test_google_has_one_name() -> None:
    ways = [name_of("gs://b/x", token="anon"), name_of("gcs://b/x/", skip_signature=True)]
    ways += [name_of(ObjectStore(obstore.GCSStore("b", prefix="x", skip_signature=True)))]
    assert len(set(ways)) == 1


def test_a_directory_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways: list[Any] = [tmp_path / "real", f"{tmp_path}/real/", f"file://{tmp_path}/real", "real", "./real", "~/real"]
    ways += [tmp_path / "link", tmp_path / "link" / ".." / "real", LocalStore("real"), LoggingStore(LocalStore("link"))]
    ways += [ObjectStore(obstore.LocalStore(str(tmp_path / "real")))]
    assert len({name_of(way) for way in ways}) == 1


# -- its own


def pairwise_distinct(names: list[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, [number for number, name in enumerate(names) if name in twice]


@needs_obstore
@pytest.mark.parametrize("upstream", ["obstore", "fsspec"])
def test_places_of_s3_that_differ(upstream: str) -> None:
    places = [
        ("s3://b/x", s3_at()),
        ("s3://b/X", s3_at()),
        ("s3://b/x/y", s3_at()),
        ("s3://b", s3_at()),
        ("s3://x/b", s3_at()),
        ("s3://b-x", s3_at()),
        ("s3://b/x?y", s3_at()),
        ("s3://b/x@y", s3_at()),
        ("s3://b/z@y", s3_at()),
        ("s3://b/x%20y", s3_at()),
        ("s3://b/x y", s3_at()),
        ("s3://b/x", s3_at("http://h:1")),
        ("s3://b/x", s3_at("http://h:2")),
        ("s3://b/x", s3_at("http://h")),
        ("s3://b/x", s3_at("https://h")),
        ("s3://b/x", s3_at("http://h:1/path")),
        ("s3://b/x", s3_at("http://h:1", "OTHER")),
        ("s3://b/x", {"anon": True, "client_kwargs": {"endpoint_url": "http://h:1"}}),
        ("s3://b/x", s3_at("http://h:1", token="t")),
        # not Amazon's S3, but somebody's server on a machine of Amazon's
        ("s3://b/x", s3_at("http://ec2-1-2-3-4.compute-1.amazonaws.com:9000")),
        ("s3://b/x", s3_at("http://ec2-5-6-7-8.compute-1.amazonaws.com:9000")),
        ("s3://b/x", s3_at("https://one.eu-west-1.elb.amazonaws.com")),
        ("s3://b/x", s3_at("https://two.eu-west-1.elb.amazonaws.com")),
        ("s3://b/x", s3_at("https://s3.amazonaws.com.example.org")),
        # other parts of the world have buckets of their own
        ("s3://b/x", s3_at("https://s3.us-gov-west-1.amazonaws.com")),
        ("s3://b/x", s3_at("https://s3.cn-north-1.amazonaws.com.cn")),
    ]
    pairwise_distinct([name_of(url, upstream=upstream, **options) for url, options in places])


@needs_obstore
def test_places_elsewhere_that_differ() -> None:
    account: dict[str, Any] = {"account_key": "a2V5"}
    pairwise_distinct(
        [
            name_of("gs://b/x", token="anon"),
            name_of("gs://b/y", token="anon"),
            name_of("s3://b/x", **s3_at()),
            name_of("az://b/x", account_name="one", **account),
            name_of("az://b/x", account_name="two", **account),
            name_of("az://b/y", account_name="one", **account),
            name_of("az://b/x", account_name="one", use_emulator=True, **account),
            name_of("az://b/x", account_name="one", endpoint="http://h:1/one", **account),
            name_of("az://b/x", account_name="one", endpoint="http://h:2/one", **account),
            name_of("http://h/x"),
            name_of("https://h/x"),
            name_of("http://h:81/x"),
            name_of("http://h/X"),
            name_of("http://h/x?sig=1"),
            name_of("http://h/x?sig=2"),
            name_of("http://u:p@h/x"),
            name_of("http://v:p@h/x"),
            name_of("http://h/x", upstream="fsspec") + " is the first of these",
        ]
    )
    given: list[dict[str, Any]] = [
        {"account_name": "one"},
        {"account_name": "one", "account_host": "127.0.0.1:10000"},
        {"account_name": "one", "account_host": "one.blob.core.chinacloudapi.cn"},
        {"connection_string": "AccountName=two;AccountKey=x"},
        {"connection_string": "AccountName=one;AccountKey=x;BlobEndpoint=http://127.0.0.1:10000/one"},
    ]
    pairwise_distinct([str(locations.of_azure("b/x", options)) for options in given])
    pairwise_distinct(
        [str(locations.of_google("b/x", {"endpoint_url": url})) for url in (None, "http://h:1", "http://h:2")]
    )


@needs_obstore
@pytest.mark.parametrize("upstream", ["auto", "fsspec"])
def test_the_environment_says_where(upstream: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = s3_at()
    names = [name_of("s3://b/x", upstream=upstream, **plain)]
    for variable, value in [
        ("AWS_ENDPOINT_URL", "http://h:1"),
        ("AWS_ENDPOINT_URL", "http://h:2"),
        ("AWS_ENDPOINT_URL_S3", "http://h:3"),
    ]:
        monkeypatch.setenv(variable, value)
        names.append(name_of("s3://b/x", upstream=upstream, **plain))
    # given goes before found
    assert name_of("s3://b/x", upstream=upstream, **s3_at("http://h:1")) == names[1]
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert name_of("s3://b/x", upstream="fsspec", **plain) == names[0]
    pairwise_distinct(names)
    for variable in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"):
        monkeypatch.delenv(variable)
    # what obstore alone looks at
    monkeypatch.setenv("AWS_ENDPOINT", "http://h:4")
    assert name_of("s3://b/x", upstream="fsspec", **plain) == names[0]
    names.append(name_of(s3_of_obstore()))
    pairwise_distinct(names)


def test_profiles_say_where_and_who(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = "aws_access_key_id = {0}\naws_secret_access_key = {0}\n"
    (tmp_path / "config").write_text(
        "".join(
            f"[profile {name}]\nendpoint_url = http://{host}\nregion = us-east-1\n{keys.format(key)}"
            for name, host, key in [("one", "h:1", "A"), ("two", "h:2", "A"), ("three", "h:1", "B")]
        )
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    names = [name_of("s3://b/x", profile=profile) for profile in ("one", "two", "three")]
    for profile in ("one", "two", "three"):
        monkeypatch.setenv("AWS_PROFILE", profile)
        assert name_of("s3://b/x") == name_of("s3://b/x", profile=profile)
    at_one = [name_of("s3://b/x", profile=profile, endpoint_url="http://h:9") for profile in ("one", "three")]
    pairwise_distinct([*names, *at_one])


def test_amazon_is_amazon_whatever_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("[profile one]\nregion = us-east-1\n[profile two]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert name_of("s3://b/x", profile="one") == name_of("s3://b/x", profile="two") == name_of("s3://b/x", **s3_at())


@needs_obstore
def test_whoever_provides_credentials() -> None:
    """At a server of one's own, two providers may be two accounts."""

    class Provider:
        def __init__(self, key: str) -> None:
            self.account = key

        def __call__(self) -> Any:
            return {"access_key_id": self.account, "secret_access_key": "s", "expires_at": None}

    def made(key: str, **where: Any) -> str:
        remote = obstore.S3Store(
            "b",
            prefix="x",
            region="us-east-1",
            credential_provider=Provider(key),
            **where,  # type: ignore[arg-type]
        )
        return name_of(ObjectStore(remote, read_only=True))

    assert made("A") == made("B")
    assert made("A", endpoint="http://h:1") != made("B", endpoint="http://h:1")


def test_obstore_behind_fsspecs_face() -> None:
    fsspec_of_obstore = pytest.importorskip("obstore.fsspec").FsspecStore

    def made(endpoint: str, key: str) -> str:
        files = fsspec_of_obstore(
            "s3", asynchronous=True, region="r", endpoint=endpoint, access_key_id=key, secret_access_key="s"
        )
        return name_of(FsspecStore(files, read_only=True, path="b/x"))

    pairwise_distinct([made("http://h:1", "A"), made("http://h:2", "A"), made("http://h:1", "B")])


def test_chains_that_differ(tmp_path: Path) -> None:
    pytest.importorskip("fsspec.implementations.asyn_wrapper")
    for number in (1, 2):
        make_source(tmp_path / "in" / f"run@{number}" / "data.zarr", "ab"[:number])
        make_source(tmp_path / "in" / f"test@{number}" / "data.zarr", "ab"[:number])
    archive = shutil.make_archive(str(tmp_path / "one"), "zip", tmp_path / "in")
    other = shutil.copy(archive, tmp_path / "two.zip")
    urls = [f"zip://{name}@{number}/data.zarr" for name in ("run", "test") for number in (1, 2)]
    names = [name_of(f"{url}::file://{file}") for url in urls for file in (archive, other)]
    pairwise_distinct(names)
    # the same archive is the same, until it is another one
    assert name_of(f"{urls[0]}::{archive}") == names[0]
    with Path(archive).open("ab") as file:
        file.write(b"more")
    assert name_of(f"{urls[0]}::file://{archive}") != names[0]


def test_chains_to_servers_that_differ() -> None:
    pytest.importorskip("fsspec.implementations.asyn_wrapper")
    names = [
        name_of("simplecache::s3://b/x", s3=s3_at("http://h:1")),
        name_of("simplecache::s3://b/x", s3=s3_at("http://h:2")),
        name_of("simplecache::s3://b/x", s3=s3_at("http://h:1", "OTHER")),
        name_of("simplecache::s3://b/y", s3=s3_at("http://h:1")),
        name_of("simplecache::s3://b/x", s3=s3_at()),
        name_of("simplecache::http://h/x"),
        name_of("simplecache::http://i/x"),
    ]
    pairwise_distinct(names)
    sessions = {name_of("simplecache::s3://b/x", s3=s3_at(key=f"ASIA{n}", token=f"t{n}")) for n in range(3)}
    assert len(sessions) == 1


@pytest.mark.parametrize("how", ["options", "environment"])
def test_archives_of_one_name_on_two_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Nothing of one is served as the other's."""
    pytest.importorskip("fsspec.implementations.asyn_wrapper")
    truths = []
    for number, names in enumerate(["a", "ba"]):
        make_source(tmp_path / f"in{number}" / "data.zarr", names)
        (tmp_path / f"buckets{number}" / "b").mkdir(parents=True)
        shutil.make_archive(str(tmp_path / f"buckets{number}" / "b" / "x"), "zip", tmp_path / f"in{number}")
        truths.append(contents(tmp_path / f"in{number}" / "data.zarr", "a"))
    assert truths[0] != truths[1]
    with s3_server(tmp_path / "buckets0") as one, s3_server(tmp_path / "buckets1") as two:
        for server, truth in [(one, truths[0]), (two, truths[1]), (one, truths[0])]:
            options = words(server)
            if how == "environment":
                # by whoever's name, all is the same but the environment
                monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
                monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
                monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
                options = {}
            forget_file_systems()
            store = xzcache.CacheStore(
                "zip://data.zarr::s3://b/x.zip", cache_store=tmp_path / "cache", storage_options={"s3": options}
            )
            assert read(store, "a") == truth


@needs_obstore
@pytest.mark.parametrize("upstream", ["auto", "fsspec"])
def test_a_copy_that_is_used_where_the_environment_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upstream: str
) -> None:
    """Whatever it reads there, it does not tell the first one that it was its own."""
    truths = []
    for number, names in enumerate(["a", "ba"]):
        make_source(tmp_path / f"buckets{number}" / "b" / "x", names)
        truths.append(contents(tmp_path / f"buckets{number}" / "b" / "x", "a"))

    def move(server: Any) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
        forget_file_systems()

    def make() -> xzcache.CacheStore:
        return xzcache.CacheStore("s3://b/x", cache_store=tmp_path / "cache", upstream=upstream)

    with s3_server(tmp_path / "buckets0") as one, s3_server(tmp_path / "buckets1") as two:
        move(one)
        copied = pickle.dumps(make())
        move(two)
        copy = pickle.loads(copied)
        with suppress(Exception):
            # it may go back to where it was made, with what opens the other door
            read(copy, "a")
        copy.cache_info()
        assert read(make(), "a") == truths[1]
        move(one)
        assert read(make(), "a") == truths[0]


def test_directories_within_a_file_system() -> None:
    pytest.importorskip("fsspec.implementations.asyn_wrapper")
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    def made(root: str, path: str) -> str:
        files = AsyncFileSystemWrapper(DirFileSystem(root, LocalFileSystem()), asynchronous=True)
        return name_of(FsspecStore(files, read_only=True, path=path))

    places = [("/r", "run@1/x"), ("/r", "test@1/x"), ("/r", "1/x"), ("/s", "1/x"), ("/r", "x")]
    pairwise_distinct([made(root, path) for root, path in places])


# -- references


def test_references_are_what_they_say(tmp_path: Path) -> None:
    pytest.importorskip("fsspec.implementations.asyn_wrapper")
    tables = [TABLE, MOVED, LATER, {"version": 1, "refs": {**TABLE["refs"], "b": "more"}}]
    names = [name_of("reference://", fo=table) for table in tables]
    pairwise_distinct(names)
    turned = {"refs": dict(reversed(TABLE["refs"].items())), "version": 1}
    assert name_of("reference://", fo=turned) == names[0]
    files = []
    for number, table in enumerate(tables):
        (tmp_path / "table.json").write_text(json.dumps(table))
        os.utime(tmp_path / "table.json", ns=(number, number))
        files.append(name_of("reference://", fo=str(tmp_path / "table.json"), skip_instance_cache=True))
    pairwise_distinct(files)


def test_references_that_lead_to_servers_that_differ() -> None:
    table = {"version": 1, "refs": {"a/0": ["s3://b/one.nc", 0, 10]}}

    def made(*where: Any) -> str:
        remote = s3_at(*where, asynchronous=True)
        return name_of("reference://", fo=table, remote_protocol="s3", remote_options=remote)

    pairwise_distinct([made("http://h:1"), made("http://h:2"), made("http://h:1", "OTHER"), made()])
    assert made("http://h:1") == made("http://h:1")


def manifests(path: str, offset: int, *, stores: dict[str, Any] | None = None, fill: int = 0) -> Any:
    """A virtual dataset of one array, written by hand."""
    virtual = pytest.importorskip("virtualizarr.manifests")
    registry = pytest.importorskip("obspec_utils.registry").ObjectStoreRegistry
    array = zarr.create_array(MemoryStore(), shape=(2,), chunks=(2,), dtype="i4", compressors=None, fill_value=fill)
    entries = {"0": {"path": path, "offset": offset, "length": 8}}
    made = virtual.ManifestArray(metadata=array.metadata, chunkmanifest=virtual.ChunkManifest(entries=entries))
    return virtual.ManifestStore(
        virtual.ManifestGroup(arrays={"a": made}),
        registry=registry(stores or {"file://": obstore.LocalStore()}),
    )


def test_virtual_datasets_are_what_they_say() -> None:
    names = [
        name_of(manifests("file:///one.nc", 0)),
        name_of(manifests("file:///two.nc", 0)),
        name_of(manifests("file:///one.nc", 8)),
        name_of(manifests("file:///one.nc", 0, fill=7)),
    ]
    pairwise_distinct(names)
    assert name_of(manifests("file:///one.nc", 0)) == names[0]

    def at(*where: Any) -> str:
        return name_of(manifests("s3://b/one.nc", 0, stores={"s3://b": s3_of_obstore(*where, path="").store}))

    pairwise_distinct([at("http://h:1"), at("http://h:2"), at("http://h:1", "OTHER"), at()])
    assert at(None, "OTHER") == at()


def test_a_virtual_dataset_is_read_by_its_name(tmp_path: Path) -> None:
    for name, value in [("one.nc", 1), ("two.nc", 2)]:
        (tmp_path / name).write_bytes(np.full(2, value, "<i4").tobytes())
        store = xzcache.CacheStore(manifests(f"file://{tmp_path / name}", 0), cache_store=tmp_path / "cache")
        assert zarr.open_array(store, path="a", mode="r")[:].tolist() == [value, value]


# -- Icechunk


def test_snapshots() -> None:
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.in_memory_storage())
    snapshots = []
    for number in range(3):
        session = repository.writable_session("main")
        zarr.create_group(session.store, path=f"g{number}")
        snapshots.append(session.commit(f"{number}"))
    repository.create_tag("first", snapshot_id=snapshots[0])
    names = [name_of(repository.readonly_session(snapshot_id=snapshot).store) for snapshot in snapshots]
    pairwise_distinct(names)
    assert name_of(repository.readonly_session(tag="first").store) == names[0]
    assert name_of(repository.readonly_session("main").store) == names[2]
    session = repository.readonly_session("main")
    assert name_of(pickle.loads(pickle.dumps(session.store))) == names[2]
    # two who write have two names, and neither is that of what was committed
    writing = [repository.writable_session("main") for _ in range(2)]
    pairwise_distinct([*names, *(name_of(session.store) for session in writing)])
    assert not cached(writing[0].store).source.lasting


# -- stores of one's own


class Shifted(WrapperStore[Store]):
    """Serves something else than what is beneath."""

    def __init__(self, store: Store, header_lines: int = 0, keyword: bool = False, also: Any = None) -> None:
        super().__init__(store)
        self.header_lines = header_lines
        self.keyword = keyword
        self.also = also


def test_wrappers_that_differ(tmp_path: Path) -> None:
    """Numbers are no credentials, whatever they are called."""
    beneath = LocalStore(tmp_path)
    wrappers = [
        Shifted(beneath),
        Shifted(beneath, header_lines=1),
        Shifted(beneath, keyword=True),
        Shifted(beneath, also={"a": {"b": 1}, "c": 2}),
        Shifted(beneath, also={"a": {"b": 1, "c": 2}}),
        Shifted(beneath, also=[["a"], "b"]),
        Shifted(beneath, also=[["a", "b"]]),
        Shifted(LocalStore(tmp_path / "x")),
        LoggingStore(beneath),
    ]
    pairwise_distinct([name_of(wrapper) for wrapper in wrappers])
    assert name_of(Shifted(LocalStore(tmp_path), header_lines=1)) == name_of(wrappers[1])


def test_zip_stores(tmp_path: Path) -> None:
    names = []
    for number in range(3):
        make_source(tmp_path / str(number), "abc"[: number + 1])
        archive = Path(shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / str(number)))
        os.utime(archive, ns=(number, number))
        names += [name_of(ZipStore(archive, mode="r")), name_of(ZipStore(str(archive), mode="r"))]
    assert len(set(names)) == 3
    assert names[::2] == names[1::2]


# -- any at all

hosts = st.from_regex(r"[a-z][a-z0-9]{0,5}(\.[a-z]{1,4}){0,2}", fullmatch=True)
ports = st.one_of(st.just(""), st.integers(1, 65535).map(lambda port: f":{port}"))
endpoints = st.one_of(
    st.none(),
    st.sampled_from(["http://h:1", "http://h:11", "http://h", "https://h", "http://h:1/a", "http://h:443"]),
    st.builds(lambda scheme, host, port: f"{scheme}://{host}{port}", st.sampled_from(["http", "https"]), hosts, ports),
)
accounts = st.one_of(
    st.sampled_from(["A", "B", "anonymous", "a session", "key A"]),
    st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=6),
)
buckets = st.one_of(st.sampled_from(["b", "b2", "a.b", "x"]), st.from_regex(r"[a-z0-9][a-z0-9.-]{1,8}", fullmatch=True))
segments = st.text(st.characters(exclude_categories=["C"], exclude_characters="/"), min_size=1, max_size=5)
paths = st.one_of(
    st.sampled_from(["x", "b", "b/x", "x/y", "x/y/z", "@", "u@x", "u:p@x", "?", "x?y", "x%2Fy", ":x", "A"]),
    st.lists(segments.filter(lambda text: text.strip(".") != ""), min_size=1, max_size=3).map("/".join),
)
places = st.tuples(endpoints, accounts, buckets, paths)


def one_place(place: tuple[str | None, str, str, str]) -> tuple[Any, ...]:
    """What makes a place that place."""
    endpoint, account, bucket, path = place
    if endpoint is None:
        return None, None, bucket, path
    scheme, _, rest = endpoint.partition("://")
    host, slash, beneath = rest.partition("/")
    if ":" not in host:
        host += ":443" if scheme == "https" else ":80"
    return host + slash + beneath, account, bucket, path


@settings(max_examples=200)
@given(one=places, two=places)
def test_any_two_places(one: Any, two: Any) -> None:
    """Two are one if, and only if, server, account, bucket and path are: in the words of either library."""

    def found(place: Any, words_of: str) -> str:
        endpoint, account, bucket, path = place
        if words_of == "s3fs":
            location = locations.of_s3(f"{bucket}/{path}", s3_at(endpoint, account))
        else:
            given = {"access_key_id": account, "region": "us-east-1"} | ({"endpoint": endpoint} if endpoint else {})
            location = locations.of_s3(f"{bucket}/{path}", given, boto=False)
        from xzcache.sources._identity import identity

        return identity(location.label, location, lasting=True).namespace

    same = one_place(one) == one_place(two)
    for words_of_one in ("s3fs", "obstore"):
        for words_of_two in ("s3fs", "obstore"):
            assert (found(one, words_of_one) == found(two, words_of_two)) == same


@needs_obstore
@settings(max_examples=60, deadline=None)
@given(place=places)
def test_any_place_by_either_library(place: Any) -> None:
    endpoint, account, bucket, path = place
    url, options = f"s3://{bucket}/{path}", s3_at(endpoint, account)
    by_fsspec = cached(url, upstream="fsspec", **options)
    assert cached(url, **options).namespace == by_fsspec.namespace
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,100}", by_fsspec.namespace)


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from(["", "a", "b", "a=", "[", "]", "'a'", "a b"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)),
    max_leaves=6,
)


def telling(value: Any) -> str:
    """A value as text that no other one has; lists and tuples are alike."""
    return json.dumps(value, sort_keys=True)


@settings(max_examples=500)
@given(one=values, two=values)
def test_any_two_values_are_described_as_two(one: Any, two: Any) -> None:
    texts = ["\0".join(stable_token(value, lambda _: None)) for value in (one, two)]
    assert (texts[0] == texts[1]) == (telling(one) == telling(two))


# long enough not to be part of anything by chance
secrets = st.text(
    st.sampled_from("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789+/=_-"), min_size=14, max_size=40
)


def told_by(store: xzcache.CacheStore) -> Iterator[str]:
    yield store.namespace
    yield f"{store!r} {store} {store.source.label} {store.path} {store._repr_html_()}"
    yield repr(store.__dask_tokenize__())


@needs_obstore
@settings(max_examples=40, deadline=None)
@given(secret=secrets, endpoint=endpoints, path=st.sampled_from(["x", "a/b.zarr"]))
def test_any_secret_stays_one(secret: str, endpoint: str | None, path: str) -> None:
    """Wherever a credential may be given, the names and texts of the source do not tell it."""
    from urllib.parse import quote

    sources: list[tuple[str, dict[str, Any]]] = [
        (f"s3://b/{path}", {**s3_at(endpoint), "key": secret, "secret": secret, "token": secret}),
        (f"http://h/{path}?sig={quote(secret)}", {}),
        (f"http://user:{quote(secret, safe='')}@h/{path}", {}),
        (f"http://{quote(secret, safe='')}@h/{path}", {}),
        (f"http://h/{path}", {"headers": {"Authorization": secret}, "cookies": {"session": secret}}),
        (f"http://h/{path}", {"client_kwargs": {"headers": {"Authorization": secret}}}),
        (f"az://c/{path}", {"account_name": "acc", "sas_token": f"sv=1&sig={quote(secret)}"}),
        (f"az://c/{path}", {"account_name": "acc", "client_id": "i", "client_secret": secret, "tenant_id": "t"}),
        (f"simplecache::s3://b/{path}", {"s3": {**s3_at(endpoint), "key": secret, "secret": secret}}),
        (f"simplecache::http://user:{quote(secret, safe='')}@h/{path}?next=http://z/&sig={quote(secret)}", {}),
    ]
    for url, options in sources:
        if url.startswith("simplecache") and not WRAPS:
            continue
        for text in told_by(cached(url, **options)):
            assert secret not in text
            assert quote(secret, safe="") not in text
            assert secret.lower() not in text


@pytest.mark.parametrize("url", ["s3://KEY:very-secret@b/x", "gs://KEY:very-secret@b/x", "az://KEY:very-secret@b/x"])
@pytest.mark.parametrize("upstream", ["auto", "fsspec"])
def test_a_bucket_has_no_password(url: str, upstream: str) -> None:
    with pytest.raises(ValueError, match="storage_options") as refused:
        cached(url, upstream=upstream, anon=True)
    assert "very-secret" not in str(refused.value)


def test_what_is_served_is_what_was_asked_for(tmp_path: Path) -> None:
    """Two accounts that look at one address and see different things, in one cache."""
    for number, names in enumerate(["a", "ba"]):
        make_source(tmp_path / f"site{number}" / "data.zarr", names)
    truths = [contents(tmp_path / f"site{number}" / "data.zarr", "a") for number in range(2)]
    with web_server(tmp_path / "site0") as one, web_server(tmp_path / "site1") as two:
        for web, truth in [(one, truths[0]), (two, truths[1]), (one, truths[0])]:
            store = xzcache.CacheStore(f"{web.url}/data.zarr", cache_store=tmp_path / "cache")
            assert read(store, "a") == truth
