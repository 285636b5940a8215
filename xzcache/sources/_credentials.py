"""Credential providers for obstore: the files and tools of AWS, Google and Azure.

obstore asks a provider whenever a credential may have expired. A pickled provider finds its credentials anew in each
process: only credentials that the user gave are in the pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final

_FOR_NOW: Final = timedelta(minutes=1)
"""Less than the lifetime that obstore requires to keep a credential, because the AWS tools refresh it themselves."""

_FROM_A_FILE: Final = timedelta(minutes=15)
"""The time after which a file is read again, because its keys may have been replaced."""

_OF_TRANSFERS: Final = ("max_", "multipart_", "io_chunksize", "preferred_transfer_client", "target_bandwidth")
"""Settings of the AWS tools for S3 that change no request that is made here."""

_GOOGLE_SCOPES: Final = ("https://www.googleapis.com/auth/devstorage.full_control",)
"""The scopes that gcsfs requests."""


class NoCredentials(Exception):
    """The tools of a cloud find no credentials on this machine."""


class NoSuchProfile(ValueError):
    """A profile that the AWS configuration does not have."""


@dataclass(frozen=True)
class AwsCredentials:
    """The credentials that the AWS tools find: a profile, SSO, a role, another program or the machine's metadata."""

    profile: str | None = None
    """None for the one that the environment of the process names."""

    def __getstate__(self) -> dict[str, Any]:
        return {"profile": self.profile}

    @cached_property
    def session(self) -> Any:
        """A botocore session; raises `ImportError` without botocore, and `NoSuchProfile`."""
        # imported late, because obstore works without botocore
        import botocore.exceptions
        import botocore.session

        session = botocore.session.Session(profile=self.profile)
        try:
            # read now, so that an error names the profile here and not at the first request
            session.get_scoped_config()
        except botocore.exceptions.ProfileNotFound:
            name = session.profile
            where = "storage_options" if self.profile else "AWS_PROFILE"
            raise NoSuchProfile(
                f"{where} names the profile {name!r}, which the AWS tools do not find: give one of "
                f"{sorted(session.available_profiles)}"
            ) from None
        except botocore.exceptions.BotoCoreError as refusal:
            raise ValueError(f"the configuration of the AWS tools cannot be read ({type(refusal).__name__})") from None
        return session

    @property
    def region(self) -> str | None:
        """The configured region."""
        region: str | None = self.session.get_config_variable("region")
        return region

    @property
    def endpoint(self) -> str:
        """The endpoint of S3: the configured one, or Amazon's own."""
        from botocore import UNSIGNED
        from botocore.config import Config

        # unsigned, because only the endpoint is asked for: no credentials are looked up
        client = self.session.create_client(
            "s3", region_name=self.region or "us-east-1", config=Config(signature_version=UNSIGNED)
        )
        return str(client.meta.endpoint_url)

    @property
    def unsaid(self) -> str | None:
        """The name of a setting that changes requests and that obstore does not support."""
        scoped = self.session.get_scoped_config()
        section = scoped.get("s3")
        names = ["s3." + name for name in section] if isinstance(section, Mapping) else []
        names = [name for name in names if not name.startswith(tuple("s3." + each for each in _OF_TRANSFERS))]
        names += [name for name in ("ca_bundle", "use_fips_endpoint", "use_dualstack_endpoint") if name in scoped]
        return next(iter(names), None)

    @cached_property
    def _found(self) -> Any:
        if (found := self.session.get_credentials()) is None:
            raise NoCredentials("the AWS tools find no credentials: give key and secret, or anon=True")
        return found

    def __call__(self) -> dict[str, Any]:
        found = self._found
        lasting = not hasattr(found, "refresh_needed")
        frozen = found.get_frozen_credentials()
        if lasting:
            # read anew the next time, because the file may hold other keys by then
            for name in ("_found", "session"):
                self.__dict__.pop(name, None)
        until = datetime.now(UTC) + (_FROM_A_FILE if lasting else _FOR_NOW)
        signs = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "token": frozen.token}
        return {**signs, "expires_at": until}


@dataclass(frozen=True)
class GoogleCredentials:
    """The credentials of gcloud or of a Google machine, or credentials that the user gave."""

    given: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given}

    @cached_property
    def provider(self) -> Any:
        """The provider of obstore; raises `ImportError` without google-auth, and `NoCredentials`."""
        import google.auth
        from google.auth.credentials import with_scopes_if_required
        from google.auth.exceptions import DefaultCredentialsError
        from obstore.auth.google import GoogleCredentialProvider

        if self.given is not None:
            return GoogleCredentialProvider(with_scopes_if_required(self.given, _GOOGLE_SCOPES))
        try:
            return GoogleCredentialProvider(google.auth.default(scopes=_GOOGLE_SCOPES)[0])
        except DefaultCredentialsError:
            raise NoCredentials("Google's tools find no credentials") from None

    def __call__(self) -> dict[str, Any]:
        credential: dict[str, Any] = self.provider()
        return credential


@dataclass(frozen=True)
class AzureCredentials:
    """The credentials of Azure's tools or machines, or a credential that the user gave."""

    given: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given}

    @cached_property
    def provider(self) -> Any:
        """The provider of obstore; raises `ImportError` without azure-identity."""
        from obstore.auth.azure import AzureCredentialProvider

        return AzureCredentialProvider(self.given)

    def __call__(self) -> dict[str, Any]:
        credential: dict[str, Any] = self.provider()
        return credential


PROVIDERS: Final = (AwsCredentials, GoogleCredentials, AzureCredentials)
