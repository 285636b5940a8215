"""Object stores by URL, read with obstore: translates fsspec's options to obstore's.

An option without a translation is never dropped: `Untranslatable` is raised, and the caller reads with fsspec.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, quote, urlsplit

from xzcache.sources._credentials import (
    AwsCredentials,
    AzureCredentials,
    GoogleCredentials,
    NoCredentials,
    NoSuchProfile,
)
from xzcache.sources._locations import configured_endpoint, names_region
from xzcache.sources._urls import shown_within

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Remote


# -- Where Amazon keeps a bucket.

_AMAZON: Final = "https://s3.amazonaws.com"
# opening a store waits for this answer, once for each bucket
_SECONDS: Final = 5.0


def region_of(bucket: str, endpoint: str = _AMAZON) -> str | None:
    """The region of a bucket, which Amazon reports without credentials; None if the request fails.

    One request for each bucket and process.
    """
    try:
        return _asked(bucket, endpoint)
    except (OSError, ValueError, KeyError):
        return None


@lru_cache
def _asked(bucket: str, endpoint: str) -> str:
    request = urllib.request.Request(f"{endpoint}/{quote(bucket, safe='')}", method="HEAD")
    try:
        # without redirects: the header of the first answer names the region
        with urllib.request.build_opener(_Stay).open(request, timeout=_SECONDS) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as refusal:
        # forbidden or moved: the header is there all the same
        headers = refusal.headers
    return str(headers["x-amz-bucket-region"] or "") or _unknown()


def _unknown() -> str:
    # an exception, because `lru_cache` would remember an answer
    raise KeyError("x-amz-bucket-region")


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


# -- Stores of obstore.

_OLDEST: Final = (0, 8, 2)

_RETRY: Final = {"max_retries": 5, "retry_timeout": timedelta(minutes=1)}
"""A server that cannot be reached is given up after some seconds, as fsspec does, not after obstore's three minutes."""

_TIMEOUT: Final = "5 minutes"
"""For one whole object: obstore's 30 seconds are too few for a large one over a slow line."""

_BOTH: Final = frozenset({"client_options", "retry_config"})
_S3: Final = {
    "key": "access_key_id",
    "username": "access_key_id",
    "secret": "secret_access_key",
    "password": "secret_access_key",
    "token": "session_token",
    "endpoint_url": "endpoint",
    "anon": "skip_signature",
    "requester_pays": "request_payer",
    # of client_kwargs
    "region_name": "region",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_S3_NATIVE: Final = frozenset(
    {
        *("access_key_id", "secret_access_key", "session_token", "endpoint", "region", "skip_signature"),
        *("request_payer", "virtual_hosted_style_request", "unsigned_payload", "imdsv1_fallback", "s3_express"),
        *("metadata_endpoint", "container_credentials_relative_uri", "sse_customer_key_base64"),
    }
)
_GCS_NATIVE: Final = frozenset(
    {"service_account", "service_account_path", "service_account_key", "application_credentials", "skip_signature"}
)
_AZURE: Final = {"anon": "skip_signature", "sas_token": "sas_key", "tenant_id": "authority_id"}
_AZURE_NATIVE: Final = frozenset(
    {
        *("account_name", "account_key", "sas_key", "client_id", "client_secret", "authority_id", "skip_signature"),
        *("endpoint", "use_emulator", "use_azure_cli", "federated_token_file", "msi_endpoint"),
    }
)
_AWS_TAKEN_IN_TWO_WAYS: Final = (
    *("AWS_ENDPOINT", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "AWS_SKIP_SIGNATURE", "AWS_TOKEN", "AWS_S3_EXPRESS"),
    *("AWS_BUCKET", "AWS_BUCKET_NAME", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"),
)
"""Variables of the environment that obstore and s3fs do not read alike."""
_AZURE_CREDENTIALS: Final = ("account_key", "sas_key", "client_secret", "federated_token_file", "use_azure_cli")

_AZURE_SIGNS: Final = (
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY", "AZURE_STORAGE_KEY"),
    *("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_TOKEN"),
)
"""Variables of the environment in which obstore finds credentials, as adlfs does."""
_AZURE_PARTS: Final = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "SharedAccessSignature": "sas_key",
    "BlobEndpoint": "endpoint",
}
"""The parts of a connection string, and the options that they stand for."""

OPTIONS: Final = frozenset({*_BOTH, *_S3, *_S3_NATIVE, *_GCS_NATIVE, *_AZURE, *_AZURE_NATIVE, "client_kwargs", "token"})
"""The known options of `storage_options`, for suggestions when one is misspelt."""

SCHEMES: Final = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "http", "https")
"""The URL schemes that obstore can read."""


class Untranslatable(ValueError):
    """A URL or an option that cannot be translated for obstore."""

    def __init__(self, reason: str) -> None:
        # the name of an option may be a URL
        super().__init__(shown_within(reason))


def object_store(url: str, options: Mapping[str, Any], *, sure: bool) -> Remote:
    """An obstore store for a URL of one of `SCHEMES`, with options of fsspec or of obstore.

    `sure` tells that the user chose obstore. It finds credentials in fewer places than fsspec's clients, so without
    `sure` the credentials must be visible. Raises `Untranslatable` with the name of the option, or `ImportError`
    without obstore.
    """
    import obstore.exceptions

    if tuple(int(part) for part in re.findall(r"\d+", obstore.__version__)[:3]) < _OLDEST:
        raise Untranslatable(f"obstore {obstore.__version__} is too old: it misspells the names of some objects")
    try:
        return _made(url, options, sure=sure)
    except (Untranslatable, NoSuchProfile):
        raise
    except (TypeError, ValueError, OSError, obstore.exceptions.BaseError) as refusal:
        # never with its text, which may hold a value
        raise Untranslatable(f"obstore refuses the URL or one of the options ({type(refusal).__name__})") from None


def _made(url: str, options: Mapping[str, Any], *, sure: bool) -> Remote:
    import obstore.store as stores

    scheme, _, rest = url.partition("://")
    place, _, path = rest.partition("/")
    given = {name: value for name, value in options.items() if value is not None}
    common: dict[str, Any] = {name: given.pop(name) for name in _BOTH if name in given}
    common["client_options"] = {"timeout": _TIMEOUT, **common.get("client_options", {})}
    common.setdefault("retry_config", _RETRY)
    if scheme in ("http", "https"):
        common["client_options"] |= _of_web(urlsplit(url, allow_fragments=False), given)
        return stores.HTTPStore.from_url(url.rstrip("/"), **common)
    prefix = path.strip("/")
    if "//" in prefix or not place:
        raise Untranslatable("the URL has an empty part, which obstore does not take")
    if scheme in ("s3", "s3a"):
        config = dict(_of_s3(place, given, sure=sure))
        if str(config.get("endpoint", "")).startswith("http://"):
            common["client_options"].setdefault("allow_http", True)
        return stores.S3Store(place, prefix=prefix or None, **config, **common)
    if scheme in ("gs", "gcs"):
        return stores.GCSStore(place, prefix=prefix or None, **dict(_of_gcs(given, sure=sure)), **common)
    config = dict(_of_azure(place, given, sure=sure))
    if str(config.get("endpoint", "")).startswith("http://"):
        common["client_options"].setdefault("allow_http", True)
    return stores.AzureStore(place.partition("@")[0], prefix=prefix or None, **config, **common)


def _renamed(given: Iterable[tuple[str, Any]], names: Mapping[str, str], native: frozenset[str]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for name, value in given:
        if value is None:
            continue
        if (word := names.get(name, name)) not in native:
            raise Untranslatable(f"obstore does not support the option {name!r}")
        # two names of one option may have different values
        if word in said:
            raise Untranslatable(f"the option {name!r} duplicates another one")
        said[word] = value
    return said


def _of_s3(bucket: str, given: dict[str, Any], *, sure: bool) -> Iterator[tuple[str, Any]]:
    client = given.pop("client_kwargs", {})
    if not isinstance(client, Mapping):
        raise Untranslatable("the option 'client_kwargs' is no mapping")
    if not given.pop("use_ssl", True):
        raise Untranslatable("obstore does not support the option 'use_ssl'")
    profile = given.pop("profile", None)
    config = _renamed([*given.items(), *client.items()], _S3, _S3_NATIVE)
    if profile and _with_tools(profile) is None:
        raise Untranslatable("without botocore, obstore does not support the option 'profile'")
    signed = not config.get("skip_signature", False)
    if signed:
        config.pop("skip_signature", None)
        if "access_key_id" not in config and (profile or not _signs()):
            if (tools := _with_tools(profile)) is not None:
                config["credential_provider"] = tools
            elif not sure:
                raise Untranslatable("without botocore, obstore may not find the credentials that s3fs finds")
        if "access_key_id" in config and "session_token" not in config and os.environ.get("AWS_SESSION_TOKEN"):
            # obstore would combine it with the given key
            raise Untranslatable("AWS_SESSION_TOKEN in the environment does not belong to the key that was given")
    # which library reads a URL must not change what it reads
    if ambiguous := next((name for name in _AWS_TAKEN_IN_TWO_WAYS if os.environ.get(name)), None):
        raise Untranslatable(f"obstore and s3fs do not take {ambiguous} of the environment alike")
    if "endpoint" not in config and (endpoint := configured_endpoint(profile or "")):
        if "://" not in endpoint:
            raise Untranslatable("without botocore, it is not known which endpoint the AWS tools are configured for")
        config["endpoint"] = endpoint
    if os.environ.get("AWS_CA_BUNDLE") and not str(config.get("endpoint", "")).startswith("http://"):
        raise Untranslatable("obstore does not look at AWS_CA_BUNDLE of the environment")
    if os.environ.get("AWS_ENDPOINT_URL_S3", config.get("endpoint")) != config.get("endpoint"):
        # obstore would take it before the one that was given
        raise Untranslatable("AWS_ENDPOINT_URL_S3 in the environment is not the endpoint that was given")
    if "endpoint" in config and "region" not in config:
        # obstore would take AWS_REGION, which boto does not know
        region = os.environ.get("AWS_DEFAULT_REGION")
        if "credential_provider" in config or (not region and names_region()):
            if (tools := _with_tools(profile)) is None:
                raise Untranslatable("without botocore, it is not known which region the AWS tools are configured for")
            region = tools.region
        config["region"] = region or "us-east-1"
    if "endpoint" not in config and "region" not in config:
        # other clients follow Amazon's redirection to the right region, obstore does not
        if (region := region_of(bucket)) is None and names_region():
            tools = _with_tools(profile)
            region = tools.region if tools is not None else None
        if region is None:
            raise Untranslatable("the region of the bucket could not be found out: give region_name")
        config["region"] = region
    yield from config.items()


def _with_tools(profile: str | None) -> AwsCredentials | None:
    """The AWS tools, if they are installed and their configuration can be translated."""
    tools = AwsCredentials(profile)
    try:
        unsaid = tools.unsaid
    except ImportError:
        return None
    if unsaid is not None:
        raise Untranslatable(f"obstore does not support {unsaid!r} of the configuration of the AWS tools")
    return tools


def _signs() -> bool:
    """Whether there are credentials in the environment that obstore and boto both find first."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return True
    file = os.path.expanduser(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")
    role = os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE") and os.environ.get("AWS_ROLE_ARN")
    return bool(role) and not os.path.exists(file)


def _of_gcs(given: dict[str, Any], *, sure: bool) -> Iterator[tuple[str, Any]]:
    token = given.pop("token", None)
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        raise Untranslatable("obstore does not look at STORAGE_EMULATOR_HOST of the environment")
    if token == "anon":
        given["skip_signature"] = True
    elif isinstance(token, Mapping) and token.get("type") == "service_account":
        given["service_account_key"] = json.dumps(dict(token))
    elif isinstance(token, str) and token.endswith(".json"):
        given["application_credentials"] = os.path.expanduser(token)
    elif hasattr(token, "refresh"):
        yield "credential_provider", GoogleCredentials(token)
    elif token not in (None, "google_default"):
        raise Untranslatable("obstore does not support this kind of the option 'token'")
    elif not (given.keys() & _GCS_NATIVE or _google_file_is_native()):
        try:
            (tools := GoogleCredentials()).provider  # noqa: B018
            yield "credential_provider", tools
        except (ImportError, NoCredentials):
            if not sure:
                raise Untranslatable("without google-auth, or where that finds none, gcsfs looks for more") from None
    yield from _renamed(given.items(), {}, _GCS_NATIVE).items()


def _google_file_is_native() -> bool:
    """Whether the environment names a credentials file of a kind that obstore supports."""
    try:
        with open(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or "", "rb") as file:
            return json.load(file).get("type") in ("service_account", "authorized_user")
    except (OSError, ValueError):
        return False


def _of_azure(place: str, given: dict[str, Any], *, sure: bool) -> Iterator[tuple[str, Any]]:
    _, at, host = place.partition("@")
    given = _without_connection_string(given)
    credential = given.pop("credential", None)
    config = _renamed(given.items(), _AZURE, _AZURE_NATIVE)
    if at:
        if not re.fullmatch(r"[^.]+\.(blob|dfs)\.core\.windows\.net", host, re.IGNORECASE):
            raise Untranslatable("obstore would not read from the host of the URL")
        config.setdefault("account_name", host.partition(".")[0].lower())
    named = config.get("account_name") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not named and not config.get("use_emulator"):
        raise Untranslatable("obstore needs the option 'account_name'")
    if not config.get("skip_signature", False):
        config.pop("skip_signature", None)
        signs = config.keys() & {*_AZURE_CREDENTIALS} or any(os.environ.get(name) for name in _AZURE_SIGNS)
        if credential is not None and (signs or not hasattr(credential, "get_token")):
            raise Untranslatable("obstore does not support this kind of the option 'credential'")
        if not signs:
            try:
                (tools := AzureCredentials(credential)).provider  # noqa: B018
                yield "credential_provider", tools
            except ImportError:
                if credential is not None or not sure:
                    raise Untranslatable("without azure-identity, obstore may not find what adlfs finds") from None
    yield from config.items()


def _without_connection_string(given: dict[str, Any]) -> dict[str, Any]:
    """Options with the parts of a connection string, of the options or the environment, as options of their own."""
    given = dict(given)
    text = given.pop("connection_string", None) or os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    if not text:
        return given
    if given.keys() & {*_AZURE_CREDENTIALS, "sas_token", "credential"}:
        raise Untranslatable("a connection string and other credentials are given")
    parts = dict(part.partition("=")[::2] for part in str(text).split(";") if part)
    said = {word: parts.pop(name, None) for name, word in _AZURE_PARTS.items()}
    scheme, suffix = parts.pop("DefaultEndpointsProtocol", "https"), parts.pop("EndpointSuffix", "core.windows.net")
    if parts.keys() - {"QueueEndpoint", "TableEndpoint", "FileEndpoint"} or not said["account_name"]:
        raise Untranslatable("obstore does not support a part of the option 'connection_string'")
    if not said["endpoint"] and (scheme, suffix) != ("https", "core.windows.net"):
        said["endpoint"] = f"{scheme}://{said['account_name']}.blob.{suffix}"
    for word, value in said.items():
        if value and given.setdefault(word, value) != value:
            raise Untranslatable("the connection string and another option differ")
    return given


def _of_web(parts: SplitResult, given: dict[str, Any]) -> dict[str, Any]:
    """Options of the HTTP client."""
    if parts.query or "@" in parts.netloc:
        raise Untranslatable("the URL has a query or a user, which obstore would not send with every request")
    client = given.pop("client_kwargs", {})
    headers = client.get("headers") if isinstance(client, Mapping) else None
    if given or (client and (headers is None or len(client) > 1)):
        name = next(iter(given), "client_kwargs")
        raise Untranslatable(f"obstore does not support the option {name!r}")
    return {"allow_http": parts.scheme == "http"} | ({"default_headers": dict(headers)} if headers else {})
