"""Locations of object stores: the same for every library, and without credentials.

Bucket names of Amazon and Google are unique in the world. On any other server, two servers or two accounts may have
buckets of the same name, so both are part of the location.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from xzcache.sources._credentials import AwsCredentials
from xzcache.sources._urls import host_and_port, links, shown, sounds_secret, without_user

# -- Objects as text that is the same in every process, without possible credentials.

_WHOSE: Final = ("key", "username", "user", "access_key_id", "aws_access_key_id")
"""Names of options that name the user of a source, which may change its contents."""
_PASSING: Final = ("token", "session_token", "aws_session_token")
"""Options of temporary credentials: with one of these, the user's name changes from session to session."""
_BOOKKEEPING: Final = ("_thread", "threading", "asyncio", "multiprocessing", "logging", "collections.Counter")


class Unidentifiable(Exception):
    """An object whose behaviour cannot be identified by its attributes."""


def stable_token(value: Any, known: Callable[[Any], Iterator[str] | None]) -> Iterator[str]:
    """A stable text for a value, for use in identities.

    Locks, events and loggers count by type only, because they do not change the bytes. `known` returns the text of a
    store or file system, and None for other values. Raises `Unidentifiable` for an arbitrary object.
    """
    if isinstance(value, str):
        yield repr(without_user(value))
    elif isinstance(value, bytes | int | float | bool | os.PathLike) or value is None:
        yield repr(value)
    elif isinstance(value, Mapping):
        yield "{"
        passing = any(value.get(name) for name in _PASSING)
        for name, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            # a digest, because a key id is half of a credential
            if name in _WHOSE and isinstance(item, str) and not passing:
                yield f"{name}={blake2b(item.encode(), digest_size=16).hexdigest()}"
            elif isinstance(item, bool | int | float) or item is None or not sounds_secret(str(name)):
                yield f"{name}="
                yield from stable_token(item, known)
        yield "}"
    elif isinstance(value, list | tuple | set | frozenset):
        yield "["
        # the order of a set differs between processes
        for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            yield from stable_token(item, known)
        yield "]"
    elif (text := known(value)) is not None:
        yield from text
    elif type(value).__module__.startswith(_BOOKKEEPING):
        yield type(value).__qualname__
    elif getattr(value, "__qualname__", "<").isidentifier() and getattr(value, "__closure__", None) is None:
        # a function or class that can be imported
        yield f"{value.__module__}.{value.__qualname__}"
    else:
        raise Unidentifiable


# -- Where a source is.

_AMAZON: Final = re.compile(r"([^.]+\.)*s3([.-][^.]+)*\.amazonaws\.com(\.cn)?")
_AZURE: Final = re.compile(r"(?P<account>[^.]+)\.(blob|dfs)\.core\.windows\.net")
_KEYS: Final = ("key", "username", "access_key_id", "aws_access_key_id")
_TOKENS: Final = ("token", "session_token", "aws_session_token")


class Location(NamedTuple):
    """Where the objects beneath a URL are."""

    scheme: str
    server: str
    """The endpoint, where there is more than one; else empty."""
    account: str
    """The owner of the objects, if names depend on the account; else empty. Never shown."""
    path: str
    """Bucket or container, and the path within."""

    @property
    def label(self) -> str:
        """A URL without credentials, for people."""
        return shown(f"{self.scheme}://{self.path}")


def of_s3(path: str, options: Mapping[str, Any], *, boto: bool = True) -> Location:
    """The location of an S3 bucket and prefix; `options` are those of s3fs or obstore.

    `boto` tells that the client finds endpoints where boto does, and not where obstore does.
    """
    given = {**options, **_mapping(options.get("client_kwargs"))}
    profile = str(given.get("profile") or _environment("AWS_PROFILE") or _environment("AWS_DEFAULT_PROFILE"))
    endpoint = str(given.get("endpoint_url") or given.get("endpoint") or "")
    if boto:
        endpoint = endpoint or configured_endpoint(profile)
    else:
        # the first variable overrides the given endpoint, the others do not
        endpoint = _environment("AWS_ENDPOINT_URL_S3") or endpoint
        endpoint = endpoint or _environment("AWS_ENDPOINT_URL") or _environment("AWS_ENDPOINT")
    region = given.get("region_name") or given.get("region") or _environment("AWS_REGION")
    server = _server(endpoint) or _partition(str(region or _environment("AWS_DEFAULT_REGION")))
    return Location("s3", server, _account(given, profile) if server and endpoint else "", path.strip("/"))


def configured_endpoint(profile: str) -> str:
    """The endpoint that boto finds if none is given; a placeholder if only boto can find it."""
    if _true(_environment("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")):
        return ""
    if endpoint := _environment("AWS_ENDPOINT_URL_S3") or _environment("AWS_ENDPOINT_URL"):
        return endpoint
    # without it in the file there is none to find, and botocore need not be imported
    if b"endpoint_url" not in (text := _configuration()):
        return ""
    try:
        found = AwsCredentials(profile or None).endpoint
        return "" if _AMAZON.fullmatch(_taken_apart(found)[0]) else found
    except (ImportError, ValueError):
        pass
    # the whole configuration stands for the endpoint that cannot be read from it
    return f"{blake2b(text + profile.encode(), digest_size=8).hexdigest()}.configured"


def names_region() -> bool:
    """Whether boto may find a region in its configuration file."""
    return b"region" in _configuration()


def _configuration() -> bytes:
    try:
        with open(os.path.expanduser(_environment("AWS_CONFIG_FILE") or "~/.aws/config"), "rb") as file:
            return file.read()
    except OSError:
        return b""


def _account(given: Mapping[str, Any], profile: str) -> str:
    if _true(given.get("anon")) or _true(given.get("skip_signature")):
        return "anonymous"
    key = next((given[name] for name in _KEYS if given.get(name)), None)
    token = next((given[name] for name in _TOKENS if given.get(name)), None)
    if key is None and not given.get("profile"):
        key, token = _environment("AWS_ACCESS_KEY_ID"), _environment("AWS_SESSION_TOKEN")
    # the key of a temporary session changes within hours, so it cannot name the account
    return "a session" if token else f"key {key}" if key else f"profile {profile}"


def of_google(path: str, options: Mapping[str, Any], *, boto: bool = True) -> Location:
    """Of a bucket and prefix of Google Cloud Storage."""
    endpoint = options.get("endpoint_url") or (_environment("STORAGE_EMULATOR_HOST") if boto else "")
    return Location("gs", _server(str(endpoint or "")), "", path.strip("/"))


def of_azure(path: str, options: Mapping[str, Any], *, boto: bool = True) -> Location:
    """Of a container and prefix of Azure Blob Storage."""
    string = options.get("connection_string") or (_environment("AZURE_STORAGE_CONNECTION_STRING") if boto else "")
    said = dict(part.partition("=")[::2] for part in str(string or "").split(";"))
    endpoint = str(options.get("endpoint") or said.get("BlobEndpoint") or "")
    account = options.get("account_name") or said.get("AccountName") or _environment("AZURE_STORAGE_ACCOUNT_NAME")
    host = str(options.get("account_host") or _taken_apart(endpoint)[0]).lower()
    server = "emulator" if _true(options.get("use_emulator")) else _server(endpoint) or host
    if known := _AZURE.fullmatch(host):
        account, server = account or known["account"], ""
    return Location("az", server, str(account or "").partition(".")[0].lower(), path.strip("/"))


def of_web(url: str) -> Location:
    """Of a URL of a web server; its user is part of it, the password is not."""
    link = links(url)[-1]
    usual = {"https": ":443", "http": ":80"}.get(link.scheme, ":")
    # a fragment is never sent
    path, mark, query = link.rest.partition("#")[0].partition("?")
    # libraries differ in writing a space or %20
    path = quote(path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    user = re.split(":|%3A", link.user, maxsplit=1, flags=re.IGNORECASE)[0]
    where = link.host.lower().removesuffix(usual) + path + (mark + query if query else "")
    return Location(link.scheme, "", user, where)


def _server(endpoint: str) -> str:
    """Host, port and path; for Amazon, the partition of bucket names."""
    host, port, path = _taken_apart(endpoint)
    if not host or _AMAZON.fullmatch(host):
        return _partition(host)
    return f"{host}:{port}{path}"


def _taken_apart(endpoint: str) -> tuple[str, int, str]:
    if not endpoint:
        return "", 0, ""
    if (parts := host_and_port(endpoint)) is None:
        # an unknown location must not equal another one
        raise Unidentifiable
    return parts


def _partition(region: str) -> str:
    """The part of Amazon's world that a region or host of it belongs to; empty for the large one."""
    # each partition has bucket names of its own
    found = re.search(r"us-gov|us-iso|eusc|\.cn$|(^|[.-])cn-", region)
    return f"amazon {found[0].strip('.-')[:6]}" if found else ""


def _environment(name: str) -> str:
    return os.environ.get(name, "")


def _true(value: object) -> bool:
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in ("true", "1", "yes"))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# -- Locations of paths on fsspec file systems.

_NOT_LOCATING: Final = (
    *("asynchronous", "loop", "max_concurrency", "anon", "skip_instance_cache", "use_listings_cache"),
    *("listings_expiry_time", "max_paths", "default_block_size", "default_cache_type", "default_fill_cache"),
)
_OBJECT_STORES: Final[Mapping[str, Callable[[str, dict[str, Any]], Location]]] = {
    **dict.fromkeys(("s3", "s3a"), of_s3),
    **dict.fromkeys(("gs", "gcs"), of_google),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), of_azure),
    **dict.fromkeys(("http", "https"), lambda path, _: of_web(path)),
}


def is_filesystem(value: object) -> bool:
    """Whether an object has the attributes of an fsspec file system."""
    return hasattr(value, "storage_options") and hasattr(value, "protocol")


def protocol_of(fs: Any) -> str:
    fs = _inmost(fs)
    return str(fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0])


def is_object_store(fs: Any) -> bool:
    """Whether a file system is a client of an object store, and not of a web server."""
    return _is_known(fs) and protocol_of(fs) in _OBJECT_STORES.keys() - {"http", "https"}


def label_of(fs: Any, path: str) -> str:
    """A URL without credentials, for people."""
    if (location := _location(fs, path)) is not None:
        return location.label
    return shown(f"{protocol_of(fs)}::{path}" if "://" in path else f"{protocol_of(fs)}://{path}")


def parts_of(fs: Any, path: str) -> Iterator[str]:
    """The texts that identify a path on a file system; raises `Unidentifiable` for an arbitrary object."""
    if (location := _location(fs, path)) is not None:
        yield from location
        if _options(_inmost(fs)).get("version_aware"):
            yield "version_aware"
        return
    yield without_user(path)
    yield from filesystem_token(fs)


def filesystem_token(fs: Any) -> Iterator[str]:
    """The texts that identify a file system and those behind it."""
    fs = _inmost(fs)
    if (location := _location(fs, "")) is not None:
        yield from location
        return
    yield f"{type(fs).__module__}.{type(fs).__qualname__}"
    options = _options(fs)
    yield from _references(fs, options.pop("fo", None))
    shown = {name: value for name, value in options.items() if name not in _NOT_LOCATING}
    yield from stable_token(shown, lambda value: filesystem_token(value) if is_filesystem(value) else None)
    behind = getattr(fs, "fss", None)
    inner = [*(behind.values() if isinstance(behind, Mapping) else ()), getattr(fs, "fs", None)]
    inner.append(getattr(getattr(fs, "fo", None), "fs", None))
    for other in inner:
        # the options contain no credentials, but the account of the other file systems matters
        if other is not fs and is_filesystem(other):
            yield from filesystem_token(other)


def _references(fs: Any, given: object) -> Iterator[str]:
    """The digest of references, which are data: other references are another source."""
    table = getattr(fs, "references", given)
    if not isinstance(table, dict):
        table = given
    if isinstance(table, Mapping):
        # all of it, not by `stable_token`, which would leave out keys that look like names of credentials
        yield blake2b(repr(sorted(table.items())).encode(), digest_size=16).hexdigest()
    elif isinstance(given, str):
        path = given.removeprefix("file://")
        yield repr(without_user(os.path.realpath(path) if os.path.exists(path) else given))
        yield from _state(path)
    elif given is not None:
        yield from stable_token(given, lambda _: None)


def _state(path: str) -> Iterator[str]:
    for name in (path, os.path.join(path, ".zmetadata")):
        if os.path.isfile(name):
            status = os.stat(name)
            yield f"{status.st_size} {status.st_mtime_ns}"


def _location(fs: Any, path: str) -> Location | None:
    fs = _inmost(fs)
    if not _is_known(fs):
        return None
    return _OBJECT_STORES[protocol_of(fs)](path, _options(fs)) if protocol_of(fs) in _OBJECT_STORES else None


def _is_known(fs: Any) -> bool:
    # a subclass may read other data
    return type(_inmost(fs)).__module__.startswith(("s3fs", "gcsfs", "adlfs", "fsspec.implementations.http"))


def _inmost(fs: Any) -> Any:
    """The file system within asynchronous wrappers."""
    while hasattr(fs, "sync_fs"):
        fs = fs.sync_fs
    return fs


def _options(fs: Any) -> dict[str, Any]:
    # an instance of fsspec keeps positional arguments apart from named ones
    names = list(inspect.signature(type(fs).__init__).parameters)[1:]
    given = dict(zip(names, getattr(fs, "storage_args", ()), strict=False))
    return {**given, **(getattr(fs, "storage_options", None) or {})}
