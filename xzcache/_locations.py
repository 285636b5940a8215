"""Where an object store keeps things: the same words, whichever library reads them, and no credentials.

A bucket of Amazon's or Google's is one in the world. Anywhere else two servers, and two accounts on one server, may
each have a bucket of the same name, so that both are part of the location.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from xzcache._credentials import AwsCredentials
from xzcache._described import Indescribable
from xzcache._urls import host_and_port, links, shown

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
    """Whose the objects are, where names are by account; else empty. Never shown."""
    path: str
    """Bucket or container, and the path within."""

    @property
    def label(self) -> str:
        """A URL without credentials, for people."""
        return shown(f"{self.scheme}://{self.path}")


def of_s3(path: str, options: Mapping[str, Any], *, boto: bool = True) -> Location:
    """Of an S3 bucket and prefix.

    Parameters
    ----------
    path : str
    options : mapping
        In s3fs's or obstore's words.
    boto : bool
        Whether a client reads it that finds endpoints where boto does, and not where obstore does.
    """
    given = {**options, **_mapping(options.get("client_kwargs"))}
    profile = str(given.get("profile") or _environment("AWS_PROFILE") or _environment("AWS_DEFAULT_PROFILE"))
    endpoint = str(given.get("endpoint_url") or given.get("endpoint") or "")
    if boto:
        endpoint = endpoint or configured_endpoint(profile)
    else:
        # one wins over what is given, the others do not
        endpoint = _environment("AWS_ENDPOINT_URL_S3") or endpoint
        endpoint = endpoint or _environment("AWS_ENDPOINT_URL") or _environment("AWS_ENDPOINT")
    region = given.get("region_name") or given.get("region") or _environment("AWS_REGION")
    server = _server(endpoint) or _partition(str(region or _environment("AWS_DEFAULT_REGION")))
    return Location("s3", server, _account(given, profile) if server and endpoint else "", path.strip("/"))


def configured_endpoint(profile: str) -> str:
    """The endpoint that boto finds when none is given; something that stands for it where only boto can tell."""
    if _true(_environment("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")):
        return ""
    if endpoint := _environment("AWS_ENDPOINT_URL_S3") or _environment("AWS_ENDPOINT_URL"):
        return endpoint
    if b"endpoint_url" not in (text := _configuration()):
        return ""
    try:
        found = AwsCredentials(profile or None).endpoint
        return "" if _AMAZON.fullmatch(_taken_apart(found)[0]) else found
    except (ImportError, ValueError):
        pass
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
    # the key of a session is another one the next hour
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
    # libraries differ in whether they say a space, or %20
    path = quote(path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    user = re.split(":|%3A", link.user, maxsplit=1, flags=re.IGNORECASE)[0]
    where = link.host.lower().removesuffix(usual) + path + (mark + query if query else "")
    return Location(link.scheme, "", user, where)


def _server(endpoint: str) -> str:
    """Host, port and path; of Amazon's own the part of the world whose names of buckets are its own."""
    host, port, path = _taken_apart(endpoint)
    if not host or _AMAZON.fullmatch(host):
        return _partition(host)
    return f"{host}:{port}{path}"


def _taken_apart(endpoint: str) -> tuple[str, int, str]:
    if not endpoint:
        return "", 0, ""
    if (parts := host_and_port(endpoint)) is None:
        # where one reads from is not known: nobody else reads from there
        raise Indescribable
    return parts


def _partition(region: str) -> str:
    """The part of Amazon's world that a region or host of it belongs to; empty for the large one."""
    found = re.search(r"us-gov|us-iso|eusc|\.cn$|(^|[.-])cn-", region)
    return f"amazon {found[0].strip('.-')[:6]}" if found else ""


def _environment(name: str) -> str:
    return os.environ.get(name, "")


def _true(value: object) -> bool:
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in ("true", "1", "yes"))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
