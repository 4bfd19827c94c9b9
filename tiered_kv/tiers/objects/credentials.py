"""Finds credentials for object storage in environment variables and AWS profiles. Returns them as options of a connection.

obstore itself finds the identity of a machine or of a pod. No message contains a secret value.

obstore's providers (`obstore.auth`) are used where they suffice: the one for boto3 reads and renews the keys of a profile. This module
covers the rest. A provider exists in one process, but options can be sent to others. A profile with plain keys is read without boto3.
The providers for Google and Azure each need another library, for identities that obstore finds without one.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from configparser import ConfigParser, Error
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from tiered_kv.errors import Kind, TieredKVError

METADATA = "169.254.169.254"
"""Address of the metadata service that gives a machine's identity, in all three clouds."""
_METADATA_WITHIN_S = 1.5
_VALID_FOR = timedelta(minutes=10)
"""How long keys from boto3 are used: boto3 renews them when they have less than this left. obstore's default is 30 minutes."""
_KINDS = {"s3": "AWS_", "s3a": "AWS_", "gs": "GOOGLE_", "az": "AZURE_", "azure": "AZURE_", "abfs": "AZURE_", "abfss": "AZURE_"}
_GOOGLE_FILES = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_OPTIONS = {
    "AWS_": (
        *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "AWS_SKIP_SIGNATURE"),
        *("AWS_REQUEST_PAYER", "AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED"),
        *("AWS_SSE_CUSTOMER_KEY_BASE64", "AWS_UNSIGNED_PAYLOAD", "AWS_CHECKSUM_ALGORITHM", "AWS_S3_EXPRESS"),
    ),
    "GOOGLE_": ("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN", "GOOGLE_BASE_URL", "GOOGLE_SKIP_SIGNATURE", *_GOOGLE_FILES),
    "AZURE_": (
        *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY"),
        *("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN", "AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID"),
        *("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET", "AZURE_STORAGE_TENANT_ID", "AZURE_TENANT_ID"),
        *("AZURE_STORAGE_AUTHORITY_HOST", "AZURE_AUTHORITY_HOST", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        *("AZURE_STORAGE_USE_EMULATOR", "AZURE_SKIP_SIGNATURE"),
    ),
}
_ALLOW_HTTP = "AWS_ALLOW_HTTP"
_SAY_WHO = {
    "AWS_": (*_KEYS[:1], "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    "GOOGLE_": ("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN", *_GOOGLE_FILES),
    "AZURE_": (
        *(name for name in _OPTIONS["AZURE_"] if name.endswith(("_KEY", "_SAS_TOKEN", "_STORAGE_TOKEN", "_CLIENT_SECRET"))),
        *("AZURE_FEDERATED_TOKEN_FILE", "AZURE_USE_AZURE_CLI", "AZURE_STORAGE_USE_EMULATOR", "AZURE_MSI_ENDPOINT"),
        *("AZURE_IDENTITY_ENDPOINT", "AZURE_FABRIC_SESSION_TOKEN"),
    ),
}
_WHAT_TO_SET = {
    "AWS_": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role",
    "GOOGLE_": "set GOOGLE_APPLICATION_CREDENTIALS to the path of a key, or give this machine a service account",
    "AZURE_": "set AZURE_STORAGE_ACCOUNT_KEY, or AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or give the machine an identity",
}
Provider = Callable[[], dict[str, Any]]


class Credentials(dict[str, str]):
    """Environment variables of a caller, sent to other processes that act for it. Its `repr` shows the names only."""

    def __repr__(self) -> str:
        return f"Credentials of {', '.join(self) or 'nobody'}"

    __str__ = __repr__


class Access(NamedTuple):
    """The settings of a connection.

    `config`: options of obstore. `provider`: a function that returns the access keys of S3. `allows_http`: whether TLS is
    optional.

    `is_machines`: no credentials are given, so the machine's own identity is used.
    """

    config: dict[str, str]
    provider: Provider | None
    allows_http: bool
    is_machines: bool


def credentials(url: str, environ: Mapping[str, str] = os.environ) -> Credentials:
    """Returns the credentials that another process needs to use the store at `url` as this process does.

    They are empty for folders, and if this process uses its machine's identity. Keys of an AWS profile and of a Google service
    account are read here, because the other machine lacks their files. Temporary keys are not renewed then. Raises (kind `config`) if
    AWS_PROFILE names a profile that does not exist.
    """
    kind = _KINDS.get(urlsplit(url).scheme)
    if kind is None:
        return Credentials()
    found = {name: environ[name] for name in (*_OPTIONS[kind], *(_KEYS if kind == "AWS_" else ()), _ALLOW_HTTP) if environ.get(name)}
    if kind == "AWS_" and (endpoint := _endpoint(environ)):
        found["AWS_ENDPOINT_URL"] = endpoint
    if kind == "GOOGLE_":
        for name in _GOOGLE_FILES:
            if name in found and (key := _service_account(found[name])):
                del found[name]
                found["GOOGLE_SERVICE_ACCOUNT_KEY"] = key
    if kind == "AWS_" and _KEYS[0] not in found and (profile := AwsProfile.of(environ)):
        keys = profile.keys()
        named = zip(_KEYS, (keys.get("access_key_id"), keys.get("secret_access_key"), keys.get("token")), strict=True)
        found |= {name: value for name, value in named if value}
        found |= {name.upper(): value for name, value in profile.options(found).items()}
    return Credentials(found)


def access(url: str, environ: Mapping[str, str] | None = None) -> Access:
    """Returns the settings to connect to the remote store at `url` with the credentials in `environ` (None: those of this process)."""
    kind = _KINDS[urlsplit(url).scheme]
    given = os.environ if environ is None else environ
    config = {} if environ is None else {name.lower(): environ[name] for name in _OPTIONS[kind] if environ.get(name)}
    known = {**os.environ, **given}  # a caller without credentials means the identity of each process
    says_who = any(known.get(name) for name in _SAY_WHO[kind])
    provider = None
    if kind == "AWS_" and environ is not None:
        config |= _server(environ)
    if kind == "AWS_" and environ and environ.get(_KEYS[0]):
        provider = _given(environ)  # as options they would be mixed with a session token of this process
    elif kind == "AWS_" and not says_who and (profile := AwsProfile.of(os.environ)):
        provider, says_who = profile.provider(), True
        if environ is None:
            config |= profile.options(given)
    elif kind == "GOOGLE_" and not says_who:
        says_who = (Path.home() / ".config/gcloud/application_default_credentials.json").is_file()
    unsigned = _is_yes(known.get(f"{kind}SKIP_SIGNATURE", ""))
    return Access(config, provider, _is_yes(given.get(_ALLOW_HTTP, "")), not (says_who or unsigned))


def what_to_set(url: str) -> str:
    """Returns the error text for a user without credentials for the store at `url`: which variables to set."""
    return f"there are no credentials: {_WHAT_TO_SET[_KINDS[urlsplit(url).scheme]]}"


def machine_answers() -> bool:
    """Whether the metadata service of this machine answers within 1.5 s."""
    said = os.environ.get("AWS_METADATA_ENDPOINT", "")
    at = urlsplit(said if "//" in said else f"//{said or METADATA}")
    with suppress(OSError, ValueError), socket.create_connection((at.hostname, at.port or 80), _METADATA_WITHIN_S):
        return True
    return False


class AwsProfile(NamedTuple):
    """A profile of the AWS configuration files: its settings, and the environment variables that select it."""

    name: str
    settings: dict[str, str]
    environ: Mapping[str, str]

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "AwsProfile | None":
        """Returns the selected profile, or None if it gives no credentials.

        Raises (kind `config`) if AWS_PROFILE names a profile that does not exist.
        """
        name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or ""
        settings = _section(environ, "AWS_CONFIG_FILE", "~/.aws/config", {"profile " + name, name} if name else {"default"})
        settings |= _section(environ, "AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", {name or "default"})
        if name and not settings:
            message = f"AWS_PROFILE: there is no profile {name!r} in ~/.aws/config, ~/.aws/credentials or the files set in place of them"
            raise TieredKVError(Kind.CONFIG, message, setting="AWS_PROFILE")
        says_who = settings.keys() & {"aws_access_key_id", "role_arn", "sso_session", "sso_start_url", "credential_process"}
        return cls(name or "default", settings, environ) if says_who else None

    def options(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Returns the profile's region and server as options, each only if `environ` does not set it."""
        region = "" if environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") else self.settings.get("region")
        server = "" if _endpoint(environ) else self.settings.get("endpoint_url")
        return {name: value for name, value in (("aws_region", region), ("aws_endpoint_url", server)) if value}

    def provider(self) -> Provider:
        """Returns a function that returns the profile's keys: obstore's provider, which renews them, or the keys in the files."""
        if self.environ is os.environ:  # boto3 reads the environment of this process only
            with suppress(ImportError):
                from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]
                from botocore.session import Session  # type: ignore[import-untyped]
                from obstore.auth.boto3 import Boto3CredentialProvider

                try:
                    # boto3's own session would also set the region
                    return cast("Provider", Boto3CredentialProvider(Session(), ttl=_VALID_FOR))
                except (BotoCoreError, ValueError) as error:
                    raise self._unusable(f"{type(error).__name__} in boto3") from error
        if "aws_access_key_id" not in self.settings or "aws_secret_access_key" not in self.settings:
            raise self._unusable("it has no keys; for roles, SSO and processes install boto3: pip install 'tiered-kv[aws]'")
        keys = {"access_key_id": self.settings["aws_access_key_id"], "secret_access_key": self.settings["aws_secret_access_key"]}
        return lambda: {**keys, "token": self.settings.get("aws_session_token"), "expires_at": None}

    def keys(self) -> dict[str, Any]:
        """Returns the current keys of the profile. Raises (kind `config`) if they cannot be obtained."""
        provider = self.provider()
        try:
            return provider()
        except (OSError, ValueError, AssertionError) as error:
            raise self._unusable(f"{type(error).__name__} in boto3") from error

    def _unusable(self, reason: str) -> TieredKVError:
        return TieredKVError(Kind.CONFIG, f"AWS_PROFILE: the profile {self.name!r} cannot be used: {reason}", setting="AWS_PROFILE")


def _section(environ: Mapping[str, str], variable: str, default: str, names: set[str]) -> dict[str, str]:
    """Returns the settings of a profile in one file; {} if there is no such file or it cannot be read."""
    parser = ConfigParser(interpolation=None, default_section="\0", strict=False)
    with suppress(OSError, Error, UnicodeDecodeError):
        parser.read(Path(environ.get(variable) or default).expanduser())
    return {key: value.strip() for name in names if parser.has_section(name) for key, value in parser.items(name) if value.strip()}


def _is_yes(text: str) -> bool:
    return text.lower() in ("1", "true", "yes", "on")


def _endpoint(environ: Mapping[str, str]) -> str | None:
    return next((environ[name] for name in _ENDPOINTS if environ.get(name)), None)


def _server(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns options for server and region from `environ`, which override the variables of this process.

    Raises (kind `config`) if a variable of this process cannot be overridden.
    """
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    wanted, own = _endpoint(environ), _endpoint(os.environ)
    if wanted != own and os.environ.get(_ENDPOINTS[0]):  # obstore prefers it to every option
        message = f"{_ENDPOINTS[0]}: on the node's machine it must name the server to use, but names another; use {_ENDPOINTS[1]} instead"
        raise TieredKVError(Kind.CONFIG, message, setting=_ENDPOINTS[0])
    if wanted or own:
        return {"aws_region": region, "aws_endpoint_url": wanted or f"https://s3.{region}.amazonaws.com"}
    return {"aws_region": region}


def _given(environ: Mapping[str, str]) -> Provider:
    access_key, secret, token = (environ.get(name) for name in _KEYS)
    return lambda: {"access_key_id": access_key, "secret_access_key": secret or "", "token": token, "expires_at": None}


def _service_account(path: str) -> str | None:
    """Returns the content of a Google service account's key file, or None if the file is not such a key."""
    with suppress(OSError, ValueError, AttributeError):
        content = Path(path).read_text()
        if json.loads(content).get("type") == "service_account":
            return content
    return None
