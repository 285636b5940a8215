"""What the tests of remote sources share: servers on this machine, and an environment without anybody's credentials."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import fsspec.config
import pytest
from botocore.loaders import JSONFileLoader

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from _s3 import S3Server, _find_rclone, s3_server

__all__ = ["S3Server", "s3_server"]

CLOSED = "http://127.0.0.1:9"
"""Nobody listens there."""

_OBSTORE = pytest.importorskip("obstore")
needs_obstore = pytest.mark.skipif(
    tuple(int(part) for part in _OBSTORE.__version__.split(".")[:3]) < (0, 8, 2),
    reason="older obstore misspells the names of some objects, so that it is not used",
)
UPSTREAMS = ["auto", pytest.param("obstore", marks=needs_obstore), "fsspec"]

_THEIRS = ("AWS_", "AZURE_", "GOOGLE_", "FSSPEC_", "STORAGE_EMULATOR_HOST")

# Clients of S3 each parse megabytes that say what there is at Amazon's: a quarter of what these tests take.
_parsed = lru_cache(maxsize=None)(partial(JSONFileLoader.load_file, JSONFileLoader()))
JSONFileLoader.load_file = lambda self, path: _parsed(path)  # type: ignore[method-assign]


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No credentials and no endpoints but those that a test gives; and nobody to ask where a bucket of Amazon's is."""
    for name in [name for name in os.environ if name.startswith(_THEIRS)]:
        monkeypatch.delenv(name)
    nothing = tmp_path_factory.getbasetemp() / "nothing"
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(nothing))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for protocol in list(fsspec.config.conf):
        monkeypatch.delitem(fsspec.config.conf, protocol)
    monkeypatch.setattr("xzcache.sources._obstore.region_of", lambda bucket: None)
    forget_file_systems()
    yield
    forget_file_systems()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody answers, the clients of S3 and Azure try again at once: they would wait for up to a minute."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda delay, *result: sleep(min(delay, 0.01), *result))


@pytest.fixture(scope="module")
def tidy() -> Iterator[None]:
    """Clients that fsspec leaves to the garbage collector go while the module's warnings filter still holds."""
    yield
    forget_file_systems()
    gc.collect()


def forget_file_systems() -> None:
    """fsspec keeps its file systems by their options, whatever the environment says meanwhile."""
    for protocol in ("s3", "http", "zip", "simplecache", "filecache", "reference"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


def words(s3: S3Server, **more: Any) -> dict[str, Any]:
    """How s3fs is told where a server is and how to sign in."""
    where = {"endpoint_url": s3.endpoint, "region_name": "us-east-1"}
    return {"key": s3.access_key, "secret": s3.secret_key, "client_kwargs": where, **more}


def obstores_words(s3: S3Server, **more: Any) -> dict[str, Any]:
    where = {"endpoint": s3.endpoint, "region": "us-east-1"}
    return {"access_key_id": s3.access_key, "secret_access_key": s3.secret_key, **where, **more}


# -- the web


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Web:
    """A web server that notes what it is asked for."""

    url: str
    requests: list[Request] = field(default_factory=list)

    def chunks(self) -> int:
        """How many chunks were asked for."""
        return sum("/c/" in request.path for request in self.requests)


class _Strict(SimpleHTTPRequestHandler):
    """Serves files, and lists folders; a slash too many is another name, as with an object store."""

    protocol_version = "HTTP/1.1"
    web: Web

    def do_GET(self) -> None:
        self.web.requests.append(Request(self.command, self.path, dict(self.headers)))
        if "//" in self.path:
            self.send_error(404)
        else:
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """A server with a handler of one's own; its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def web_server(directory: Path) -> Iterator[Web]:
    handler = type("Handler", (_Strict,), {"web": Web("")})
    with serving(partial(handler, directory=str(directory))) as url:
        handler.web.url = url
        yield handler.web


class Rclone:
    """A server of a directory at one address that can be killed and started again; `kind` is "s3" or "http"."""

    key, secret = "AKOFTESTS", "secret-of-tests"

    def __init__(self, kind: str, directory: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._kind, self._directory = kind, directory
        self.start()

    def start(self) -> None:
        address = ["--addr", f"127.0.0.1:{self.port}", "--config", os.devnull, "--dir-cache-time", "0"]
        keys = {"RCLONE_AUTH_KEY": f'"{self.key},{self.secret}"'} if self._kind == "s3" else {}
        self._process = subprocess.Popen(
            [_find_rclone(), "serve", self._kind, str(self._directory), *address],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")} | keys,
        )
        deadline = time.monotonic() + 30
        while True:
            assert self._process.poll() is None, "the server has ended"
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.02)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def words(self, secret: str = secret) -> dict[str, Any]:
        """The options for a client of S3."""
        return {"key": self.key, "secret": secret, "endpoint_url": self.url, "client_kwargs": {"region_name": "x"}}


@contextmanager
def nginx_server(directory: Path, scratch: Path) -> Iterator[str]:
    """The server that most of the web is behind; its address."""
    if (nginx := shutil.which("nginx")) is None:
        pytest.skip("there is no nginx")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    paths = " ".join(
        f"{kind}_temp_path {scratch}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (scratch / "nginx.conf").write_text(f"""
        daemon off; pid {scratch}/pid; {"user root;" if os.geteuid() == 0 else ""}
        events {{}}
        http {{ access_log off; {paths} server {{ listen 127.0.0.1:{port}; root {directory}; autoindex on; }} }}
    """)
    command = [nginx, "-p", str(scratch), "-c", str(scratch / "nginx.conf"), "-e", str(scratch / "errors")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as server:
        try:
            while True:
                assert server.poll() is None, (scratch / "errors").read_text()
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    continue
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


# -- a server with a delay, in a process of its own


class Delayed:
    """A web server whose answers take a while; `served` are the paths that it answered, with 200 or 206."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def served(self) -> list[str]:
        return [line.split(" ", 1)[1] for line in self._log.read_text().splitlines() if line.startswith("2")]

    def chunks(self) -> list[str]:
        """The chunks that were sent, each as often as it was."""
        return [path for path in self.served() if "/c/" in path]

    def forget(self) -> None:
        os.truncate(self._log, 0)


@contextmanager
def delayed_server(directory: Path, scratch: Path, seconds: float, refused: str = "") -> Iterator[Delayed]:
    """Serve files, each answer after some seconds; paths that end in a text of the file `refused` are refused (500)."""
    log = scratch / "served"
    log.touch()
    command = [sys.executable, __file__, str(directory), str(log), str(seconds), refused]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield Delayed(f"http://127.0.0.1:{int(server.stdout.readline())}", log)
        finally:
            server.terminate()


async def _serve_delayed(directory: str, log: str, seconds: float, refused: str) -> None:
    lines = open(log, "a", buffering=1)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path = head.split(" ", 2)[:2]
                await asyncio.sleep(seconds)
                status, headers, body = _answer(directory, path, head, refused)
                lines.write(f"{status} {path}\n" if method == "GET" else f"{method} {path}\n")
                lengths = f"Content-Length: {len(body)}\r\n"
                writer.write(
                    f"HTTP/1.1 {status} x\r\n{headers}{lengths}\r\n".encode() + (body if method == "GET" else b"")
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _answer(directory: str, path: str, head: str, refused: str) -> tuple[int, str, bytes]:
    if refused and any(path.endswith(text) for text in Path(refused).read_text().split()):
        return 500, "", b""
    try:
        body = Path(directory + path).read_bytes()
    except OSError:
        return 404, "", b""
    tag = f'Accept-Ranges: bytes\r\nETag: "{len(body)}-{zlib.crc32(body)}"\r\n'
    asked = re.search(r"\r\nrange: bytes=(\d*)-(\d*)\r\n", head, re.IGNORECASE)
    if asked is None:
        return 200, tag, body
    first = int(asked[1]) if asked[1] else len(body) - int(asked[2])
    last = min(len(body) - 1, int(asked[2])) if asked[1] and asked[2] else len(body) - 1
    return 206, f"{tag}Content-Range: bytes {first}-{last}/{len(body)}\r\n", body[first : last + 1]


if __name__ == "__main__":
    asyncio.run(_serve_delayed(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]))
