"""Where an object store keeps things: the same words, whichever library reads them, and no credentials.

A bucket of Amazon's or Google's is one in the world. Anywhere else two servers, and two accounts on one server, may
each have a bucket of the same name, so that both are part of the location.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

_AMAZON: Final = ".amazonaws.com"
_KEYS: Final = ("key", "username", "access_key_id", "aws_access_key_id")
_TOKENS: Final = ("token", "session_token", "aws_session_token")


class Location(NamedTuple):
    """Where the objects beneath a URL are."""

    scheme: str
    server: str
    """The endpoint, where there is more than one; else empty."""
    account: str
    """Whose the objects are, where names are by account; else empty. Never shown."""
    path: str
    """Bucket or container, and the path within."""

    @property
    def label(self) -> str:
        """A URL without credentials, for people."""
        path = self.path.partition("?")[0]
        return f"{self.scheme}://{path}"


def of_s3(path: str, options: Mapping[str, Any]) -> Location:
    """Of an S3 bucket and prefix, with options in s3fs's or obstore's words."""
    given = {**options, **_mapping(options.get("client_kwargs"))}
    endpoint = given.get("endpoint_url") or given.get("endpoint") or _environment("AWS_ENDPOINT_URL_S3")
    server = _server(str(endpoint or _environment("AWS_ENDPOINT_URL") or _environment("AWS_ENDPOINT")))
    return Location("s3", server, _account(given) if server else "", path.strip("/"))


def _account(given: Mapping[str, Any]) -> str:
    if _true(given.get("anon")) or _true(given.get("skip_signature")):
        return "anonymous"
    key = next((given[name] for name in _KEYS if given.get(name)), None)
    token = next((given[name] for name in _TOKENS if given.get(name)), None)
    if key is None:
        key, token = _environment("AWS_ACCESS_KEY_ID"), _environment("AWS_SESSION_TOKEN")
    # the key of a session is another one the next hour
    return "a session" if token else f"key {key}" if key else ""


def of_google(path: str, options: Mapping[str, Any]) -> Location:
    """Of a bucket and prefix of Google Cloud Storage."""
    endpoint = options.get("endpoint_url") or _environment("STORAGE_EMULATOR_HOST")
    return Location("gs", _server(str(endpoint or "")), "", path.strip("/"))


def of_azure(path: str, options: Mapping[str, Any]) -> Location:
    """Of a container and prefix of Azure Blob Storage."""
    account = options.get("account_name") or options.get("account_host") or _environment("AZURE_STORAGE_ACCOUNT_NAME")
    said = dict(part.partition("=")[::2] for part in str(options.get("connection_string") or "").split(";"))
    endpoint = options.get("endpoint") or said.get("BlobEndpoint") or ""
    account = str(account or said.get("AccountName") or "").partition(".")[0]
    return Location("az", _server(str(endpoint)), account, path.strip("/"))


def of_web(url: str) -> Location:
    """Of a URL of a web server; its user is part of it, the password is not."""
    parts = urlsplit(url, allow_fragments=False)
    user, at, host = parts.netloc.rpartition("@")
    usual = {"https": ":443", "http": ":80"}.get(parts.scheme, ":")
    path = host.lower().removesuffix(usual) + parts.path.rstrip("/") + (f"?{parts.query}" if parts.query else "")
    return Location(parts.scheme, "", user.partition(":")[0] if at else "", path)


def _server(endpoint: str) -> str:
    """Scheme, host and port; empty for Amazon's own."""
    parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    host = (parts.hostname or "").lower()
    if not host or host.endswith(_AMAZON):
        return ""
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{host}:{port}{parts.path.rstrip('/')}"


def _environment(name: str) -> str:
    return os.environ.get(name, "")


def _true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in ("true", "1", "yes"))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
