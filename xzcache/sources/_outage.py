"""Outages: which exceptions mean that a source cannot be reached, and when such a source is asked again.

In an outage the source gives no answer. A refused key (403, 404), bad credentials (401) and an invalid certificate are
answers, or the user must act: they are no outages. An exception of an unknown kind is no outage either.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import zarr.storage
from zarr.storage import FsspecStore, LocalStore

from xzcache.model import Replaced
from xzcache.sources._urls import shown_within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.abc.store import Store

_UNREACHED: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENONET"),
        *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ETIMEDOUT", "EPIPE", "ESHUTDOWN"),
        # mounts whose server is gone: NFS, FUSE, a disk that was unplugged
        *("ESTALE", "ENOTCONN", "ENODEV", "ENXIO", "EREMOTEIO", "ENOLINK"),
    )
    if hasattr(errno, name)
)
_UNREACHED_NAMES: Final = frozenset(
    {
        *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "httpx.TransportError"),
        *("botocore.ConnectionError", "botocore.ReadTimeoutError", "botocore.ConnectionClosedError"),
        *("botocore.ResponseStreamingError", "botocore.IncompleteReadError"),
        *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
        *("urllib3.NewConnectionError", "urllib3.MaxRetryError", "urllib3.ProtocolError", "urllib3.TimeoutError"),
        *("azure.ServiceRequestError", "azure.ServiceResponseError"),
    }
)
"""Classes of clients, by the package and the name, with their subclasses."""
_SECURITY_NAMES: Final = frozenset(
    {"aiohttp.ClientSSLError", "aiohttp.ServerFingerprintMismatch", "botocore.SSLError", "requests.SSLError"}
)
# obstore's exceptions have no attributes for these: only their texts tell
_OBSTORES_STATUS: Final = re.compile(r"status code: (\d{3})\b|\bstatus: (\d{3}),")
_OBSTORES_HTTP: Final = re.compile(r"HTTP error: (?!builder)|kind: (Connect|Timeout|Interrupted)\b")
_OF_CREDENTIALS: Final = re.compile(r"https?://(169\.254\.\d+\.\d+|metadata\.google\.internal)\b")
# what obstore tells of its requests, which are of keys of a source that is named already
_OBSTORES_REQUEST: Final = re.compile(r"Error performing \S+ \S+ in \S+, after (\d+) retries, .*? - ")
_LONGEST: Final = 200


def is_outage(error: BaseException) -> bool:
    """Whether an exception of a source, after the retries of its client, says that the source cannot be reached.

    That is: no route, a refused or lost connection, no answer in time, a name that cannot be resolved, a proxy or a
    mount that is gone, and an answer of a server that it cannot answer now (408, 429, 5xx but 501 and 505).
    """
    # a group that also holds an answer of the source is not an outage
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_outage, error.exceptions))
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        verdict = _verdict(each)
        if verdict is not None:
            return verdict
        each = each.__cause__
    return False


def _verdict(error: BaseException) -> bool | None:
    """Whether one exception of a chain says that the source cannot be reached; None if it says neither."""
    if isinstance(error, Replaced):
        # our own, with `errno.ESTALE`: the source has answered, with two states
        return False
    if (status := _status_of(error)) is not None:
        return status in (408, 429) or (500 <= status < 600 and status not in (501, 505))
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if isinstance(error, ssl.SSLError) or names & _SECURITY_NAMES:
        # a connection that was cut off shows itself to TLS as an end of file
        cut_off = ssl.SSLEOFError, ssl.SSLZeroReturnError
        return isinstance(error, cut_off) or isinstance(error.__cause__, cut_off)
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or names & _UNREACHED_NAMES:
        return True
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, OSError) and error.errno in _UNREACHED:
        return True
    if "obstore.GenericError" in names:
        text = str(error)
        # these hosts give credentials within a cloud and do not exist elsewhere: their absence is no outage
        is_secure = "certificate" not in text.lower() and not _OF_CREDENTIALS.search(text)
        return is_secure and _OBSTORES_HTTP.search(text) is not None
    return None


def _status_of(error: BaseException) -> int | None:
    """The status of HTTP that an exception of a client reports."""
    status: Any = getattr(error, "status", None)
    # each client has its own name for it
    for name in ("status_code", "code"):
        status = status if isinstance(status, int) else getattr(error, name, None)
    if not isinstance(status, int):
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            # of botocore
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(answer, "status_code", None)
    if not isinstance(status, int) and type(error).__module__.startswith("obstore"):
        found = _OBSTORES_STATUS.search(str(error))
        status = int(found[1] or found[2]) if found else None
    return status if isinstance(status, int) and 400 <= status < 600 else None


def in_short(error: BaseException) -> str:
    """An exception in one line, without credentials."""
    text = " ".join(shown_within(str(error)).partition("\n\n")[0].split())
    text = _OBSTORES_REQUEST.sub(r"after \1 retries, ", text)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    if isinstance(error, TimeoutError):
        text = text or "no answer in time"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_of_a_client(source: Store) -> bool:
    """Whether the exceptions of a source are those of a client that a user did not choose."""
    return isinstance(source, LocalStore | FsspecStore | zarr.storage.ObjectStore)


# -- local sources


_devices: Final[dict[str, int]] = {}
"""The devices of the directories that this process has read from."""


def is_deleted(source: Store) -> bool:
    """Whether a missing key of a local source was certainly deleted, or never existed.

    Otherwise its directory may not be mounted, which looks like an empty or a missing directory.
    """
    root = _root_of(source)
    if root is None:
        return True
    with suppress(OSError):
        if any(_entries(root)):
            return True
    place = root
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    with suppress(OSError):
        # another device at the path means that a mount has come or gone since
        if (known := _devices.get(root)) is not None:
            return os.stat(place).st_dev == known
        # a mount point, or a parent with other contents, shows that the directory is not just unmounted
        is_parent = place in (root, os.path.dirname(root))
        return is_parent and (os.path.ismount(place) or (place != root and any(_entries(place))))
    return False


def remember_place(source: Store) -> None:
    """Remember the device of a local source's directory after a successful read."""
    root = _root_of(source)
    if root is not None and root not in _devices:
        with suppress(OSError):
            _devices[root] = os.stat(root).st_dev


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from entries


def _root_of(source: Store) -> str | None:
    """The directory of a local source; None for any other one."""
    if isinstance(source, LocalStore):
        return os.path.abspath(source.root)
    if isinstance(source, FsspecStore):
        fs: Any = getattr(source.fs, "sync_fs", source.fs)
        return os.path.abspath(source.path) if type(fs).__name__ == "LocalFileSystem" else None
    if isinstance(source, zarr.storage.ObjectStore):
        remote: Any = source.store
        prefix = getattr(remote, "prefix", None) if type(remote).__name__ == "LocalStore" else None
        return None if prefix is None else os.path.abspath(prefix)
    return None


# -- when to ask again

_SHORTEST: Final = 5.0
_LONGEST_PAUSE: Final = 60.0


class Reach:
    """Whether one source can be reached, as this process has seen it; shared by all stores that read the source.

    While it cannot, it is asked again after a pause, by one reader at a time: the others do not wait for the answer.
    """

    def __init__(self) -> None:
        self.is_suspect = False
        """Whether the last request has failed."""
        self._again = 0.0
        self.is_told = False
        """Whether the user was warned."""

    @property
    def is_down(self) -> bool:
        """Whether the source must not be asked now. After each pause, the first call returns False: its caller asks."""
        if not self.is_suspect:
            return False
        now = time.monotonic()
        if now < self._again:
            return True
        # the others go on with the cache while this reader asks, which may take long
        self._again = now + _LONGEST_PAUSE
        return False

    def failed(self, seconds: float) -> None:
        """Record a failure that took `seconds`; the next pause depends on them."""
        self._again = time.monotonic() + min(_LONGEST_PAUSE, max(_SHORTEST, 2 * seconds))
        self.is_suspect = True

    def answered(self) -> None:
        """The source has answered."""
        self.is_suspect = False


_reaches: Final[dict[str, Reach]] = {}


def reach_of(namespace: str) -> Reach:
    """The `Reach` of a source in this process."""
    return _reaches.setdefault(namespace, Reach())
