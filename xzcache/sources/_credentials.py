"""Credentials where people keep them, for obstore: the files and tools of AWS, gcloud's and Azure's.

A provider is asked whenever a request needs credentials that may have passed. It is pickled by what it was given and
finds its credentials anew in each process: where it was given nothing, no credential travels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final

_FOR_NOW: Final = timedelta(minutes=1)
"""Less than what obstore wants of a credential that it keeps: the AWS tools know when to fetch another one."""

_FROM_A_FILE: Final = timedelta(minutes=15)
"""After this, a file is read again: keys in it may have been exchanged."""

_OF_TRANSFERS: Final = ("max_", "multipart_", "io_chunksize", "preferred_transfer_client", "target_bandwidth")
"""Settings of the AWS tools for S3 that change no request that is made here."""

_GOOGLE_SCOPES: Final = ("https://www.googleapis.com/auth/devstorage.full_control",)
"""What gcsfs asks for."""


class NoCredentials(Exception):
    """The tools of a cloud find no credentials on this machine."""


class NoSuchProfile(ValueError):
    """A profile that the configuration of the AWS tools does not have."""


@dataclass(frozen=True)
class AwsCredentials:
    """Whatever the AWS tools find: of a profile, of SSO, of a role, of another program, of the machine."""

    profile: str | None = None
    """None for the one that the environment of the process names."""

    def __getstate__(self) -> dict[str, Any]:
        return {"profile": self.profile}

    @cached_property
    def session(self) -> Any:
        """A session of botocore's.

        Raises
        ------
        ImportError
            There is no botocore.
        NoSuchProfile
            It is not configured.
        """
        import botocore.exceptions
        import botocore.session

        session = botocore.session.Session(profile=self.profile)
        try:
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

        client = self.session.create_client(
            "s3", region_name=self.region or "us-east-1", config=Config(signature_version=UNSIGNED)
        )
        return str(client.meta.endpoint_url)

    @property
    def unsaid(self) -> str | None:
        """The name of a setting that changes requests and that obstore has no word for."""
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
            for name in ("_found", "session"):
                self.__dict__.pop(name, None)
        until = datetime.now(UTC) + (_FROM_A_FILE if lasting else _FOR_NOW)
        signs = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "token": frozen.token}
        return {**signs, "expires_at": until}


@dataclass(frozen=True)
class GoogleCredentials:
    """What gcloud and Google's machines provide, or credentials that were given."""

    given: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given}

    @cached_property
    def provider(self) -> Any:
        """Obstore's.

        Raises
        ------
        ImportError
            There is no google-auth.
        NoCredentials
            Google's tools find none.
        """
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
    """What Azure's tools and machines provide, or a credential that was given."""

    given: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given}

    @cached_property
    def provider(self) -> Any:
        """Obstore's.

        Raises
        ------
        ImportError
            There is no azure-identity.
        """
        from obstore.auth.azure import AzureCredentialProvider

        return AzureCredentialProvider(self.given)

    def __call__(self) -> dict[str, Any]:
        credential: dict[str, Any] = self.provider()
        return credential


PROVIDERS: Final = (AwsCredentials, GoogleCredentials, AzureCredentials)
