"""Credentials for object storage over the network: from environment variables and AWS profiles, as options of a connection.

What the library finds by itself, such as the identity of a machine or of a pod, is left to it. Values are in no message.

obstore's providers (`obstore.auth`) do what they can: the one for boto3 reads and renews the keys of a profile. Ours stay where
they do not reach: a provider lives in one process, and options are sent to others; a profile that holds plain keys is read without
boto3; those for Google and Azure need a further library each, for identities that obstore finds without one.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from configparser import ConfigParser, Error
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tiered_kv.errors import Kind, TieredKVError

METADATA = "169.254.169.254"
"""Where machines of all three clouds tell who they are."""
_METADATA_WITHIN_S = 1.5
_VALID_FOR = timedelta(minutes=10)
"""How long keys of boto3 are used: it renews them when they have less than this left. obstore would use them for 30 minutes."""
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
    """Environment variables of whoever asked for something, for processes that do it elsewhere. Shows the names only."""

    def __repr__(self) -> str:
        return f"Credentials of {', '.join(self) or 'nobody'}"

    __str__ = __repr__


class Access(NamedTuple):
    """How to connect. `config`: options of the library. `provider`: gives the keys of S3. `allows_http`: whether TLS may be missing.

    `is_machines`: nobody has said who this is, so that it is whom the machine is taken for.
    """

    config: dict[str, str]
    provider: Provider | None
    allows_http: bool
    is_machines: bool


def credentials(url: str, environ: Mapping[str, str] = os.environ) -> Credentials:
    """What a process elsewhere needs to use the store at `url` as this one does; nothing for folders, and for a machine's identity.

    Keys of an AWS profile and of a Google service account are read here, for their files are here: should they be temporary, they
    end when they end. Raises (kind `config`) for a profile that is not there.
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
    if kind == "AWS_" and _KEYS[0] not in found and (profile := Profile.of(environ)):
        keys = profile.keys()
        named = zip(_KEYS, (keys.get("access_key_id"), keys.get("secret_access_key"), keys.get("token")), strict=True)
        found |= {name: value for name, value in named if value}
        found |= {name.upper(): value for name, value in profile.options(found).items()}
    return Credentials(found)


def access(url: str, environ: Mapping[str, str] | None = None) -> Access:
    """How to connect to the remote store at `url`, as the one who has these variables (None: as this process does)."""
    kind = _KINDS[urlsplit(url).scheme]
    given = os.environ if environ is None else environ
    config = {} if environ is None else {name.lower(): environ[name] for name in _OPTIONS[kind] if environ.get(name)}
    known = {**os.environ, **given}  # who says nothing of who he is means each process's own identity
    says_who = any(known.get(name) for name in _SAY_WHO[kind])
    provider = None
    if kind == "AWS_" and environ is not None:
        config |= _server(environ)
    if kind == "AWS_" and environ and environ.get(_KEYS[0]):
        provider = _given(environ)  # as options they would be mixed with a session token of this process's
    elif kind == "AWS_" and not says_who and (profile := Profile.of(os.environ)):
        provider, says_who = profile.provider(), True
        if environ is None:
            config |= profile.options(given)
    elif kind == "GOOGLE_" and not says_who:
        says_who = (Path.home() / ".config/gcloud/application_default_credentials.json").is_file()
    unsigned = _is_yes(known.get(f"{kind}SKIP_SIGNATURE", ""))
    return Access(config, provider, _is_yes(given.get(_ALLOW_HTTP, "")), not (says_who or unsigned))


def what_to_set(url: str) -> str:
    """What is said to somebody who has no credentials for the store at `url`."""
    return f"there are no credentials: {_WHAT_TO_SET[_KINDS[urlsplit(url).scheme]]}"


def machine_answers() -> bool:
    """Whether this machine can be asked who it is, within a moment."""
    said = os.environ.get("AWS_METADATA_ENDPOINT", "")
    at = urlsplit(said if "//" in said else f"//{said or METADATA}")
    with suppress(OSError, ValueError), socket.create_connection((at.hostname, at.port or 80), _METADATA_WITHIN_S):
        return True
    return False


class Profile(NamedTuple):
    """A profile of AWS's files: its settings, and the variables that name it."""

    name: str
    settings: dict[str, str]
    environ: Mapping[str, str]

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Profile | None":
        """The profile that applies, None where there is none; raises (kind `config`) if AWS_PROFILE names one that is not there."""
        name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or ""
        settings = _section(environ, "AWS_CONFIG_FILE", "~/.aws/config", {"profile " + name, name} if name else {"default"})
        settings |= _section(environ, "AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", {name or "default"})
        if name and not settings:
            message = f"AWS_PROFILE: there is no profile {name!r} in ~/.aws/config and ~/.aws/credentials, or where these are said to be"
            raise TieredKVError(Kind.CONFIG, message, setting="AWS_PROFILE")
        says_who = settings.keys() & {"aws_access_key_id", "role_arn", "sso_session", "sso_start_url", "credential_process"}
        return cls(name or "default", settings, environ) if says_who else None

    def options(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Returns its region and its server, each only if the profile names one and these variables do not."""
        region = "" if environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") else self.settings.get("region")
        server = "" if _endpoint(environ) else self.settings.get("endpoint_url")
        return {name: value for name, value in (("aws_region", region), ("aws_endpoint_url", server)) if value}

    def provider(self) -> Provider:
        """Returns what gives its keys whenever they are needed: obstore's provider, which renews them, or the keys in the files."""
        if self.environ is os.environ:  # boto3 reads no other
            with suppress(ImportError):
                from botocore.exceptions import BotoCoreError
                from botocore.session import Session
                from obstore.auth.boto3 import Boto3CredentialProvider

                try:
                    return Boto3CredentialProvider(Session(), ttl=_VALID_FOR)  # boto3's own session would set the region, too
                except (BotoCoreError, ValueError) as error:
                    raise self._unusable(f"{type(error).__name__} in boto3") from error
        if "aws_access_key_id" not in self.settings or "aws_secret_access_key" not in self.settings:
            raise self._unusable("it has no keys; for roles, SSO and processes install boto3: pip install 'tiered-kv[aws]'")
        keys = {"access_key_id": self.settings["aws_access_key_id"], "secret_access_key": self.settings["aws_secret_access_key"]}
        return lambda: {**keys, "token": self.settings.get("aws_session_token"), "expires_at": None}

    def keys(self) -> dict[str, Any]:
        """Its keys as they are now."""
        provider = self.provider()
        try:
            return provider()
        except (OSError, ValueError, AssertionError) as error:
            raise self._unusable(f"{type(error).__name__} in boto3") from error

    def _unusable(self, reason: str) -> TieredKVError:
        return TieredKVError(Kind.CONFIG, f"AWS_PROFILE: the profile {self.name!r} cannot be used: {reason}", setting="AWS_PROFILE")


def _section(environ: Mapping[str, str], variable: str, default: str, names: set[str]) -> dict[str, str]:
    """The settings of a profile in one file; none where there is no such file or it cannot be read."""
    parser = ConfigParser(interpolation=None, default_section="\0", strict=False)
    with suppress(OSError, Error, UnicodeDecodeError):
        parser.read(Path(environ.get(variable) or default).expanduser())
    return {key: value.strip() for name in names if parser.has_section(name) for key, value in parser.items(name) if value.strip()}


def _is_yes(text: str) -> bool:
    return text.lower() in ("1", "true", "yes", "on")


def _endpoint(environ: Mapping[str, str]) -> str | None:
    return next((environ[name] for name in _ENDPOINTS if environ.get(name)), None)


def _server(environ: Mapping[str, str]) -> dict[str, str]:
    """Options for the server and region of these variables, whatever this process's own say. Raises (kind `config`) if that cannot be."""
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    wanted, own = _endpoint(environ), _endpoint(os.environ)
    if wanted != own and os.environ.get(_ENDPOINTS[0]):  # which the library prefers to every option
        message = f"{_ENDPOINTS[0]} is set where a node runs, and names another server than the one that was asked for; use {_ENDPOINTS[1]}"
        raise TieredKVError(Kind.CONFIG, message, setting=_ENDPOINTS[0])
    if wanted or own:
        return {"aws_region": region, "aws_endpoint_url": wanted or f"https://s3.{region}.amazonaws.com"}
    return {"aws_region": region}


def _given(environ: Mapping[str, str]) -> Provider:
    access_key, secret, token = (environ.get(name) for name in _KEYS)
    return lambda: {"access_key_id": access_key, "secret_access_key": secret or "", "token": token, "expires_at": None}


def _service_account(path: str) -> str | None:
    """The content of a Google service account's key file."""
    with suppress(OSError, ValueError, AttributeError):
        content = Path(path).read_text()
        if json.loads(content).get("type") == "service_account":
            return content
    return None
