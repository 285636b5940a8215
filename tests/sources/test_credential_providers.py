"""Credentials where people keep them: obstore reads with what the tools of AWS, Google and Azure find."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import zarr
from servers import S3Server, forget_file_systems, needs_obstore, nobody, s3_server, serving, tidy
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore

import xzcache

__all__ = ["nobody", "tidy"]

pytestmark = [
    needs_obstore,
    pytest.mark.usefixtures("nobody", "tidy"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # clients that are left to the garbage collector
]

PATIENCE = 30.0
VALUES = list(range(64))
UPSTREAMS = ["auto", "obstore", "fsspec"]


def make_data(root: Path) -> None:
    zarr.create_array(LocalStore(root / "bucket" / "x.zarr"), name="a", data=np.arange(64), chunks=(4,))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    root = tmp_path_factory.mktemp("s3")
    make_data(root)
    with s3_server(root) as server:
        yield server


class Tools(NamedTuple):
    """Where the AWS tools keep their configuration."""

    config: Path
    credentials: Path

    def write(self, config: str = "", credentials: str = "") -> None:
        self.config.write_text(textwrap.dedent(config))
        self.credentials.write_text(textwrap.dedent(credentials))

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_CONFIG_FILE": str(self.config), "AWS_SHARED_CREDENTIALS_FILE": str(self.credentials)}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobody: None) -> Tools:
    made = Tools(tmp_path / "config", tmp_path / "credentials")
    made.write()
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def profiles(tools: Tools, s3: S3Server) -> Tools:
    """A profile that may read, one with a wrong key, and one of another region."""
    where = f"region = eu-west-1\nendpoint_url = {s3.endpoint}\n"
    tools.write(
        f"[profile good]\n{where}\n[profile wrong]\n{where}\n[profile elsewhere]\nregion = us-west-2\n",
        f"[good]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
        f"[wrong]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = no-such-secret\n",
    )
    return tools


def opened(options: dict[str, Any] | None = None, upstream: str = "auto", **given: Any) -> xzcache.CacheStore:
    given = {"cache_store": MemoryStore(), **given}
    return xzcache.CacheStore("s3://bucket/x.zarr", storage_options=options, upstream=upstream, **given)


def values(store: xzcache.CacheStore) -> list[int]:
    return [int(value) for value in zarr.open_array(store, path="a", mode="r")[:]]


# -- AWS


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_profile(profiles: Tools, s3: S3Server, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Key, region and endpoint are in it; and whichever library reads, it is one source."""
    options = {"profile": "good"} if way == "option" else None
    if way == "environment":
        monkeypatch.setenv("AWS_PROFILE", "good")
    stores = {upstream: opened(options, upstream) for upstream in UPSTREAMS}
    assert isinstance(stores["auto"]._store, ObjectStore)
    assert isinstance(stores["obstore"]._store, ObjectStore)
    assert isinstance(stores["fsspec"]._store, FsspecStore)
    assert {tuple(values(store)) for store in stores.values()} == {tuple(VALUES)}
    assert len({store.namespace for store in stores.values()}) == 1
    for store in stores.values():
        for text in (repr(store), str(store), store.namespace, repr(store.__dask_tokenize__())):
            assert s3.access_key not in text
            assert s3.secret_key not in text


def test_the_default_profile(tools: Tools, s3: S3Server) -> None:
    tools.write(
        credentials=f"[default]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    store = opened({"client_kwargs": {"endpoint_url": s3.endpoint}})
    assert isinstance(store._store, ObjectStore)
    assert values(store) == VALUES


def test_a_profile_is_taken_before_the_keys_of_the_environment(
    profiles: Tools, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "SOMEBODYELSE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-one")
    for upstream in UPSTREAMS:
        assert values(opened({"profile": "good"}, upstream)) == VALUES
    # and the other way round, where it is the environment that names the profile
    monkeypatch.setenv("AWS_PROFILE", "wrong")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    assert values(opened()) == VALUES


def test_a_region_of_a_profile(profiles: Tools, s3: S3Server) -> None:
    store = opened({"profile": "elsewhere", "endpoint_url": s3.endpoint, "key": s3.access_key, "secret": s3.secret_key})
    assert store._store.store.config["region"] == "us-west-2"
    assert values(store) == VALUES


@pytest.mark.parametrize("upstream", ["auto", "obstore"])
def test_a_profile_beside_a_key(profiles: Tools, s3: S3Server, upstream: str) -> None:
    """The key is taken, and where to read is in the profile; which has to be there all the same."""
    keys = {"key": s3.access_key, "secret": s3.secret_key}
    assert values(opened({"profile": "good", **keys}, upstream)) == VALUES
    with pytest.raises(ValueError, match="nosuch"):
        opened({"profile": "nosuch", **keys}, upstream)


@pytest.mark.parametrize("upstream", ["auto", "obstore"])
@pytest.mark.parametrize("way", ["storage_options", "AWS_PROFILE"])
def test_a_profile_that_there_is_not(profiles: Tools, monkeypatch: pytest.MonkeyPatch, way: str, upstream: str) -> None:
    if way == "AWS_PROFILE":
        monkeypatch.setenv("AWS_PROFILE", "nosuch")
    with pytest.raises(ValueError, match=f"{way}.*'nosuch'.*good") as refused:
        opened({"profile": "nosuch"} if way == "storage_options" else None, upstream)
    assert "aws_secret" not in str(refused.value)


def test_no_credentials_at_all(tools: Tools, s3: S3Server) -> None:
    store = opened({"endpoint_url": s3.endpoint})
    with pytest.raises(Exception, match="the AWS tools find no credentials"):
        values(store)


def test_a_wrong_key_is_refused_by_the_server(profiles: Tools) -> None:
    with pytest.raises(Exception, match=r"403|Forbidden|privileges"):
        values(opened({"profile": "wrong"}))


def test_what_obstore_cannot_do_is_left_to_fsspec(profiles: Tools, s3: S3Server) -> None:
    profiles.config.write_text(profiles.config.read_text() + "[profile odd]\nuse_dualstack_endpoint = true\n")
    with pytest.raises(ValueError, match="use_dualstack_endpoint"):
        opened({"profile": "odd", "endpoint_url": s3.endpoint}, "obstore")
    assert isinstance(opened({"profile": "odd", "endpoint_url": s3.endpoint})._store, FsspecStore)


CHILD = """
import pickle, sys, zarr
store = pickle.load(sys.stdin.buffer)
print(store.namespace, [int(value) for value in zarr.open_array(store, path="a", mode="r")[:]])
"""


def elsewhere(store: xzcache.CacheStore, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a process with an environment of its own reads through a copy."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_PROFILE")}
    found = subprocess.run(
        command, input=pickle.dumps(store), env={**inherited, **environment}, capture_output=True, timeout=100
    )
    return subprocess.CompletedProcess(command, found.returncode, found.stdout.decode(), found.stderr.decode())


def test_what_travels(profiles: Tools, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a process finds its credentials itself, none is in a pickle: a worker has a profile of its own."""
    monkeypatch.setenv("AWS_PROFILE", "wrong")
    monkeypatch.setenv("XZCACHE_DIRECTORY", str(tmp_path / "cache"))
    store = opened(cache_store=None)
    for secret in (s3.access_key, s3.secret_key, "no-such-secret", "wrong"):
        assert secret.encode() not in pickle.dumps(store)
    its_own = Tools(tmp_path / "config-of-a-worker", tmp_path / "credentials-of-a-worker")
    its_own.write(
        "[profile worker]\n",
        f"[worker]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n",
    )
    answer = elsewhere(store, {"AWS_PROFILE": "worker", **its_own.environment})
    assert str(VALUES) in answer.stdout, answer.stderr
    assert elsewhere(store, {"AWS_PROFILE": "wrong"}).returncode != 0
    # a profile that was given travels by its name
    named = opened({"profile": "good"}, cache_store=None)
    assert s3.secret_key.encode() not in pickle.dumps(named)
    answer = elsewhere(named, {})
    assert answer.stdout == f"{named.namespace} {VALUES}\n", answer.stderr


def test_credentials_that_expire(tools: Tools, s3: S3Server, tmp_path: Path) -> None:
    """Another program says them for some seconds only: what it says next is taken without opening anything anew."""
    said, calls, program = tmp_path / "said.json", tmp_path / "calls", tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import datetime, json
            open({str(calls)!r}, "a").write(".")
            until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=5)
            print(json.dumps(json.load(open({str(said)!r})) | {{"Expiration": until.isoformat(timespec="seconds")}}))
        """)
    )
    tools.write(f"[default]\nregion = us-east-1\ncredential_process = {sys.executable} {program}\n")

    def say(secret: str) -> None:
        keys = {"AccessKeyId": s3.access_key, "SecretAccessKey": secret, "SessionToken": "of-this-minute"}
        (tmp_path / "next").write_text(json.dumps({"Version": 1, **keys}))
        os.replace(tmp_path / "next", said)

    say(s3.secret_key)
    store = opened({"endpoint_url": s3.endpoint}, cache_store=MemoryStore())
    assert isinstance(store._store, ObjectStore)
    array = zarr.open_array(store, path="a", mode="r")
    assert array[0] == 0
    say("exchanged")
    place = 4

    def refused() -> bool:
        nonlocal place
        place += 4
        try:
            assert array[place] == place
        except Exception:  # obstore's has no common base of its own
            return True
        return False

    end = time.monotonic() + PATIENCE
    while not refused():
        assert time.monotonic() < end
        assert place < 56
        time.sleep(0.2)
    say(s3.secret_key)
    place = 60
    end = time.monotonic() + PATIENCE
    while True:
        try:
            assert array[place] == place
            break
        except Exception:
            assert time.monotonic() < end
            time.sleep(0.2)
    assert len(calls.read_text()) >= 3


def test_keys_that_are_exchanged_in_a_file_are_found_by_new_stores(profiles: Tools, s3: S3Server) -> None:
    assert values(opened({"profile": "good"})) == VALUES
    profiles.credentials.write_text(profiles.credentials.read_text().replace(s3.secret_key, "exchanged"))
    with pytest.raises(Exception, match=r"403|Forbidden|privileges"):
        values(opened({"profile": "good"}))


# -- Azure

ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of the emulator, the same for everybody."""


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Azure's Blob Storage, emulated by Azurite; the endpoint of its account."""
    place = tmp_path_factory.mktemp("azurite")
    if (program := shutil.which("azurite-blob")) is None:
        if (npm := shutil.which("npm")) is None:
            pytest.skip("there is neither Azurite nor npm")
        command = [npm, "install", "--prefix", str(place / "npm"), "azurite@3"]
        if subprocess.run(command, capture_output=True, timeout=110, check=False).returncode:
            pytest.skip("npm does not install Azurite")
        program = str(place / "npm" / "node_modules" / ".bin" / "azurite-blob")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(place / "blobs")]
    quiet = ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    with subprocess.Popen([program, *where, *quiet], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + PATIENCE
            while True:
                assert server.poll() is None
                assert time.monotonic() < end
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
            fill(endpoint)
            yield endpoint
        finally:
            server.terminate()


def signed(method: str, path: str, query: dict[str, str], date: str) -> str:
    """The header of a request that an account's key signs."""
    import base64
    import hashlib
    import hmac

    lines = [method, *[""] * 11, f"x-ms-date:{date}", "x-ms-version:2021-08-06", f"/{ACCOUNT}/{ACCOUNT}{path}"]
    text = "\n".join([*lines, *(f"{name}:{value}" for name, value in sorted(query.items()))])
    mark = hmac.new(base64.b64decode(AZURITE_KEY), text.encode(), hashlib.sha256).digest()
    return f"SharedKey {ACCOUNT}:{base64.b64encode(mark).decode()}"


def fill(endpoint: str) -> None:
    import urllib.request
    from email.utils import formatdate

    obstore = pytest.importorskip("obstore")
    date = formatdate(usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    headers["Authorization"] = signed("PUT", "/container", {"restype": "container"}, date)
    request = urllib.request.Request(f"{endpoint}/container?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=30).close()
    store = obstore.store.AzureStore(
        "container",
        prefix="x.zarr",
        account_name=ACCOUNT,
        account_key=AZURITE_KEY,
        endpoint=endpoint,
        client_options={"allow_http": True},
    )
    zarr.create_array(ObjectStore(store), name="a", data=np.arange(64), chunks=(4,))


def sas(days: int = 1) -> str:
    """A signature that lets its bearer read and list the container."""
    import base64
    import hashlib
    import hmac
    from urllib.parse import urlencode

    until = (datetime.now(UTC) + timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
    version, place = "2021-08-06", f"/blob/{ACCOUNT}/container"
    text = "\n".join(["rl", "", until, place, "", "", "", version, "c", "", "", "", "", "", "", ""])
    mark = base64.b64encode(hmac.new(base64.b64decode(AZURITE_KEY), text.encode(), hashlib.sha256).digest()).decode()
    return urlencode({"sp": "rl", "se": until, "sv": version, "sr": "c", "sig": mark})


def in_azure(options: dict[str, Any], url: str = "az://container/x.zarr") -> xzcache.CacheStore:
    return xzcache.CacheStore(url, cache_store=MemoryStore(), storage_options=options)


def connection(endpoint: str) -> str:
    parts = {"DefaultEndpointsProtocol": "http", "AccountName": ACCOUNT, "AccountKey": AZURITE_KEY}
    return ";".join(f"{name}={value}" for name, value in {**parts, "BlobEndpoint": endpoint}.items()) + ";"


@pytest.mark.parametrize("scheme", ["az", "abfs"])
@pytest.mark.parametrize("way", ["key", "connection string", "connection string of the environment", "signature"])
def test_azure(azurite: str, monkeypatch: pytest.MonkeyPatch, way: str, scheme: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "key": {"account_name": ACCOUNT, "account_key": AZURITE_KEY, "endpoint": azurite},
        "connection string": {"connection_string": connection(azurite)},
        "connection string of the environment": {},
        "signature": {"account_name": ACCOUNT, "sas_token": sas(), "endpoint": azurite},
    }
    if way.endswith("environment"):
        # without the library that reads it, such a variable is none of the cache's business
        pytest.importorskip("adlfs")
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection(azurite))
    store = in_azure(options[way], f"{scheme}://container/x.zarr")
    assert isinstance(store._store, ObjectStore)
    assert values(store) == VALUES
    assert store.namespace == in_azure(options["key"]).namespace
    for text in (repr(store), store.namespace, repr(store.__dask_tokenize__()), store.path):
        assert AZURITE_KEY not in str(text)


def test_azure_by_fsspec_is_the_same_source(azurite: str) -> None:
    pytest.importorskip("adlfs")
    options = {"connection_string": connection(azurite)}
    given = xzcache.CacheStore(
        "az://container/x.zarr", cache_store=MemoryStore(), storage_options=options, upstream="fsspec"
    )
    assert isinstance(given._store, FsspecStore)
    assert values(given) == VALUES
    assert given.namespace == in_azure(options).namespace


def test_a_signature_that_has_expired(azurite: str) -> None:
    store = in_azure({"account_name": ACCOUNT, "sas_token": sas(days=-1), "endpoint": azurite})
    with pytest.raises(Exception, match=r"403|Forbidden|privileges"):
        values(store)


def test_a_connection_string_that_says_more_is_left_to_fsspec() -> None:
    text = connection("http://127.0.0.1:9/x") + "Other=1"
    with pytest.raises(ValueError, match="connection_string") as refused:
        xzcache.CacheStore("az://c/x", storage_options={"connection_string": text}, upstream="obstore")
    assert AZURITE_KEY not in str(refused.value)


class Token(NamedTuple):
    token: str
    expires_on: int


class OfAzure:
    """What an object of azure-identity does: it is asked for tokens, which expire."""

    def __init__(self) -> None:
        self.asked = 0

    def get_token(self, *scopes: str, **_: Any) -> Token:
        assert scopes == ("https://storage.azure.com/.default",)
        self.asked += 1
        return Token(f"token-{self.asked}", int(time.time()) + 2)


class Notes(BaseHTTPRequestHandler):
    """Answers nothing, and notes who asks."""

    who: list[str]

    def do_GET(self) -> None:
        self.who.append(self.headers.get("Authorization", ""))
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_tokens_of_azure(tmp_path: Path) -> None:
    """They are sent, and others are asked for when they have expired."""
    pytest.importorskip("azure.identity")
    handler = type("Handler", (Notes,), {"who": []})
    credential = OfAzure()
    with serving(handler) as url:
        store = in_azure({"account_name": "a", "endpoint": f"{url}/a", "credential": credential})
        assert isinstance(store._store, ObjectStore)
        end = time.monotonic() + PATIENCE
        while credential.asked < 3:
            assert time.monotonic() < end
            with pytest.raises(FileNotFoundError):
                zarr.open_array(store, path=f"{credential.asked}-{time.monotonic()}", mode="r")
    assert set(handler.who) >= {"Bearer token-1", "Bearer token-2"}
    assert "token-1" not in repr(store)


def test_azure_finds_its_credentials_in_each_process() -> None:
    pytest.importorskip("azure.identity")
    store = in_azure({"account_name": "a"})
    assert isinstance(store._store, ObjectStore)
    assert len(pickle.dumps(store)) < 2_000
    assert pickle.loads(pickle.dumps(store)).namespace == store.namespace


# -- Google


class Grants(BaseHTTPRequestHandler):
    """Exchanges what a service account signed for a token."""

    granted: list[str]

    def do_POST(self) -> None:
        assert b"assertion=" in self.rfile.read(int(self.headers["Content-Length"]))
        self.granted.append(f"token-{len(self.granted)}")
        body = json.dumps({"access_token": self.granted[-1], "expires_in": 3600, "token_type": "Bearer"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("way", ["gcloud", "object"])
def test_credentials_of_google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Google itself is not here: what is shown is that its library signs, and that obstore is given its token."""
    pytest.importorskip("google.auth")
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives import serialization
    from google.oauth2 import service_account

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    handler = type("Handler", (Grants,), {"granted": []})
    with serving(handler) as url:
        account = {"type": "service_account", "client_email": "a@b.example", "private_key": key.decode()}
        account |= {"token_uri": f"{url}/token", "project_id": "p"}
        options = None
        if way == "gcloud":
            monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
            (tmp_path / "application_default_credentials.json").write_text(json.dumps(account))
        else:
            options = {"token": service_account.Credentials.from_service_account_info(account)}
        store = xzcache.CacheStore("gs://bucket/x.zarr", cache_store=MemoryStore(), storage_options=options)
        assert isinstance(store._store, ObjectStore)
        credential = store._store.store.credential_provider()
    assert credential["token"] == handler.granted[-1]
    assert credential["expires_at"] > datetime.now(UTC)
    assert credential["token"] not in repr(store)
    if way == "gcloud":
        assert b"PRIVATE KEY" not in pickle.dumps(store)


# -- none of it where it is not wanted


def test_the_tools_are_imported_only_where_they_are_wanted() -> None:
    code = """
    import sys, tempfile, xzcache, zarr
    from zarr.storage import MemoryStore
    xzcache.CacheStore(tempfile.mkdtemp(), cache_store=MemoryStore())
    xzcache.CacheStore("http://127.0.0.1:9/x", cache_store=MemoryStore(), upstream="obstore")
    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}
    xzcache.CacheStore("s3://b/x", cache_store=MemoryStore(), storage_options=options, upstream="obstore")
    heavy = ("boto3", "botocore", "google.auth", "azure.identity")
    print([name for name in heavy if name in sys.modules])
    """
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100
    )
    assert answer.stdout == "[]\n", answer.stderr
    forget_file_systems()
