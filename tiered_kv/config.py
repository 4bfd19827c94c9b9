"""The settings: one frozen record, checked when it is created, the same for a cluster and for one process."""

import difflib
import hmac
import json
import logging
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tiered_kv.blocks import Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.file_sums import user_cache
from tiered_kv.keys import DEFAULT_TENANT, check_tenant

log = logging.getLogger(__name__)

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {f"{_prefix}IB": 1024**_power, f"{_prefix}B": 1000**_power, _prefix: 1024**_power}

MIN_HOST_BYTES = 1 << 20
MIN_TIER_BYTES = 1 << 20


def parse_size(value: int | str, setting: str) -> int:
    """Returns the bytes of a size such as "4GiB", "512MiB", "1.5G" (binary) or "10GB" (decimal). Errors name `setting`."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if not found or found[2].upper() not in _UNITS:
            raise TieredKVError(Kind.CONFIG, f"{setting}: must be a size such as 4GiB or 512MiB, got {value!r}", setting=setting)
        size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < 0:
        raise TieredKVError(Kind.CONFIG, f"{setting}: must be a size of 0 bytes or more, got {value!r}", setting=setting)
    return size


def format_size(size: float) -> str:
    """Returns a number of bytes as text for people, for example "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 1 << 20
QUOTA_TIERS = {tier.label: tier for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.OBJECTS)}


def salt_of(tenant: str, secret: bytes) -> str:
    """Returns the salt of a tenant's namespaces in a cluster with this secret: HMAC-SHA256 in hexadecimal.

    Returns "" for the default tenant, and if the cluster has no secret.
    """
    return "" if tenant == DEFAULT_TENANT or not secret else hmac.new(secret, b"tiered_kv tenant\0" + tenant.encode(), sha256).hexdigest()


@dataclass(frozen=True)
class TenantSettings:
    """The setting `tenants`. `secret_file`: a file on each machine with the secret from which salts are derived.

    None derives that secret from the cluster's own. `quotas`: the largest number of bytes of blocks, by tenant and tier.
    """

    secret_file: str | None = None
    quotas: Mapping[str, Mapping[Tier, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> Self:
        """Returns the settings given as a mapping or as its JSON text; None gives the defaults. Raises (kind `config`) if invalid.

        The mapping is {"secret_file": path, "quotas": {tenant: {tier: size}}}. Both keys may be missing.
        """
        try:
            found = json.loads(given) if isinstance(given, str) else {} if given is None else given
        except ValueError as error:
            raise _invalid_tenants(f"a mapping or its JSON, got {given!r:.100} ({error})") from error
        if not isinstance(found, Mapping) or not found.keys() <= {"secret_file", "quotas"}:
            raise _invalid_tenants(f"a mapping with the keys secret_file and quotas, got {found!r:.100}")
        path, quotas = found.get("secret_file"), found.get("quotas", {})
        if not isinstance(path, str | None) or path == "" or not isinstance(quotas, Mapping):
            raise _invalid_tenants(f"the path of a file, and a mapping of quotas, got {found!r:.100}")
        try:
            return cls(path, {tenant: _quota_of(tenant, limits) for tenant, limits in quotas.items()})
        except TieredKVError as error:
            raise TieredKVError(error.kind, f"tenants: {error}", setting="tenants") from error

    def check_block(self, tenant: str, nbytes: int) -> None:
        """Raise (kind `config`) if a quota of a tenant is too small for a block of `nbytes`."""
        for tier, limit in self.quotas.get(tenant, {}).items():
            if limit < nbytes:
                message = f"quota of {tenant!r} in {tier.label}: must be at least one block of this model, {nbytes} bytes, got {limit}"
                raise TieredKVError(Kind.CONFIG, message, setting="quota")

    def as_text(self) -> str | None:
        """Returns the settings as JSON text, or None if they are the defaults."""
        quotas = {tenant: {tier.label: nbytes for tier, nbytes in limits.items()} for tenant, limits in sorted(self.quotas.items())}
        given = ({"secret_file": self.secret_file} if self.secret_file else {}) | ({"quotas": quotas} if quotas else {})
        return json.dumps(given, sort_keys=True) if given else None

    def secret(self, cluster_secret: bytes) -> bytes:
        """Returns the secret from which salts are derived, or b"" if there is none.

        Raises (kind `config`) if `secret_file` cannot be read, or is too short or too long.
        """
        if self.secret_file is None:
            return hmac.new(cluster_secret, b"tiered_kv tenants", sha256).digest() if cluster_secret else b""
        try:
            with open(self.secret_file, "rb") as file:
                secret = file.read(SECRET_BYTES_MAX + 1).strip()
        except OSError as error:
            message = f"tenant-secret: cannot read {self.secret_file} ({error.strerror}); every machine needs the file"
            raise TieredKVError(Kind.CONFIG, message, setting="tenant-secret") from error
        if not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
            raise TieredKVError(
                Kind.CONFIG,
                f"tenant-secret: {self.secret_file} must have {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, got {len(secret)}",
                setting="tenant-secret",
            )
        return secret


def _quota_of(tenant: str, limits: Any) -> dict[Tier, int]:
    check_tenant(tenant)
    unknown = [*limits.keys() - QUOTA_TIERS.keys()] if isinstance(limits, Mapping) else []
    if unknown or not limits or not isinstance(limits, Mapping):
        message = f"quota of {tenant!r}: must have sizes for some of {', '.join(QUOTA_TIERS)}, got {unknown[0] if unknown else limits!r}"
        raise TieredKVError(Kind.CONFIG, message, setting="quota")
    sizes = {QUOTA_TIERS[label]: parse_size(size, f"quota of {tenant!r} in {label}") for label, size in limits.items()}
    if not all(sizes.values()):
        raise TieredKVError(Kind.CONFIG, f"quota of {tenant!r}: each size must be more than 0 bytes, got {limits}", setting="quota")
    return sizes


def _invalid_tenants(expected: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"tenants: must be {expected}", setting="tenants")


@dataclass(frozen=True)
class Config:
    """All settings of a cache. Sizes are bytes and may be given as "4GiB". Each size is a hard cap and applies to each node.

    Tiers. device: memory of `device_name` (None: cuda if the machine has it, else cpu), "2GiB" or "2GiB:cuda:1"; 0 for no device tier.
    host: shared memory, index included. disk: "200GiB" or "200GiB:/folder"; 0 for no disk tier. disk_path: the folder that keeps a
    node's disk content; None for a folder in the user's cache that is deleted with the cluster. objects: URL of the objects tier, None
    for no objects tier; objects_cap: its size.
    Eviction. policy, cost_weight (0: most hits, 1: most computing saved), seed.
    Codecs. quality: the largest error of a read block compared with the stored one (docs/codecs.md): exact, near_exact, balanced,
    compact, archive. codec: the names of codecs for single tiers, instead of a choice by quality, such as "host=int8,disk=xlayer:1e-4".
    error_budget: a budget such as "kl=1e-3"; each tier's codec is then chosen by errors measured on the model. calibration: the file
    with these measurements, or a folder of such files; None for the user's cache.
    Limits. store_wait_ms: how long a store waits for room before its blocks are refused. fetch_deadline_ms: how long a fetch waits for
    other nodes and disks.
    Tenants. tenants: quotas, and the file of the tenants' secret (`TenantSettings.of`), as a mapping or its JSON text.
    Network. peer_address: where a node listens for its peers: an interface, a network or an address, and ports, such as
    "eth1:7400-7499" or "10.1.0.0/16"; None for the machine's address in Ray and any free port, "off" for Ray's transfers only.
    metrics_port: where each node serves `/metrics`: a port of loopback, or a place and ports such as "0.0.0.0:9940"; or "off"
    (docs/monitoring.md).
    verify_host: whether each fetch compares the checksums of blocks in host memory with their seals (docs/design/022).
    """

    device: int = 0
    device_name: str | None = None
    host: int = 1 << 30
    disk: int = 0
    disk_path: str | None = None
    disk_segment: int = 64 << 20
    objects: str | None = None
    objects_cap: int = 1 << 40
    block_tokens: int = 64
    policy: str = "adaptive"
    cost_weight: float = 0.0
    seed: int = 0
    quality: str = "exact"
    codec: str | None = None
    error_budget: str | None = None
    calibration: str | None = None
    shm_path: str = "/dev/shm"
    store_wait_ms: int = 1000
    fetch_deadline_ms: int = 5000
    peer_address: str | None = None
    verify_host: bool = False
    io_threads: int = 2
    heartbeat_s: float = 1.0
    node_timeout_s: float = 5.0
    tenants: str | None = None
    metrics_port: str = "9940"

    def __post_init__(self) -> None:
        for setting, other in _PARTS.items():
            self._part(setting, other)
        for setting in ("device", "host", "disk", "disk_segment", "objects_cap"):
            object.__setattr__(self, setting, parse_size(getattr(self, setting), setting))
        self._at_least("host", MIN_HOST_BYTES, "1MiB; the host tier cannot be left out")
        for setting in ("device", "disk"):
            if getattr(self, setting):
                self._at_least(setting, MIN_TIER_BYTES, f"1MiB, or 0 for no {setting} tier")
        self._at_least("objects_cap", MIN_TIER_BYTES, "1MiB")
        self._at_least("disk_segment", 64 << 10, "64KiB")
        for setting in ("block_tokens", "io_threads"):
            self._at_least(setting, 1, "1, a whole number", whole=True)
        for setting in ("store_wait_ms", "fetch_deadline_ms"):
            self._at_least(setting, 0, "0")
        self._at_least("seed", 0, "0, a whole number", whole=True)
        self._at_least("cost_weight", 0, "0")
        if self.cost_weight > 1:
            raise TieredKVError(Kind.CONFIG, f"cost_weight: must be at most 1, got {self.cost_weight}", setting="cost_weight")
        for setting in ("heartbeat_s", "node_timeout_s"):
            self._at_least(setting, 0.01, "0.01 seconds")
        if type(self.metrics_port) is int and 0 <= self.metrics_port < 1 << 16:
            object.__setattr__(self, "metrics_port", str(self.metrics_port))
        self._text("metrics_port", "a port, a place with ports, or off")
        if not isinstance(self.verify_host, bool):
            raise TieredKVError(Kind.CONFIG, f"verify_host: must be true or false, got {self.verify_host!r}", setting="verify_host")
        self._text("shm_path", "the path of a folder")
        for setting, words in _TEXTS.items():
            if getattr(self, setting) is not None:
                self._text(setting, words)
        if self.policy not in POLICIES:
            raise TieredKVError(Kind.CONFIG, f"policy: must be one of {', '.join(POLICIES)}, got {self.policy!r}", setting="policy")
        self._check_quality()
        object.__setattr__(self, "tenants", TenantSettings.of(self.tenants).as_text())

    def _check_quality(self) -> None:
        if self.quality not in QUALITIES:
            raise TieredKVError(Kind.CONFIG, f"quality: must be one of {', '.join(QUALITIES)}, got {self.quality!r}", setting="quality")
        if self.kl_budget is not None and self.quality != "exact":
            message = f"error_budget: must be None unless quality is exact, for both choose codecs; got {self.error_budget}, {self.quality}"
            raise TieredKVError(Kind.CONFIG, message, setting="error_budget")
        _ = self.codec_by_tier

    @property
    def tenant_settings(self) -> TenantSettings:
        """The setting `tenants`, parsed."""
        return TenantSettings.of(self.tenants)

    @property
    def codec_by_tier(self) -> dict[Tier, str]:
        """The codec specs in `codec`, by tier. Raises (kind `config`) if `codec` is not a list of TIER=CODEC."""
        found: dict[Tier, str] = {}
        for part in self.codec.split(",") if self.codec is not None else ():
            name, equals, text = (word.strip() for word in part.partition("="))
            tier = next((tier for tier in CODED_TIERS if tier.label == name), None)
            if tier is None or not equals or not text or tier in found:
                message = (
                    f"codec: must be a list of TIER=CODEC, each tier once and one of {', '.join(each.label for each in CODED_TIERS)}, "
                    f"got {part.strip()!r}"
                )
                raise TieredKVError(Kind.CONFIG, f"{message}; write for example host=int8,disk=lossless", setting="codec")
            found[tier] = text
        return found

    @property
    def kl_budget(self) -> float | None:
        """The largest KL divergence that `error_budget` allows, in nats per token, or None if there is no budget.

        Raises (kind `config`) if `error_budget` is invalid.
        """
        if self.error_budget is None:
            return None
        name, _, number = self.error_budget.partition("=")
        try:
            kl = float(number) if name.strip() == "kl" else -1.0
        except ValueError:
            kl = -1.0
        if not 0 < kl < float("inf"):
            message = f"error_budget: must be kl=NUMBER, more than 0 nats a token, such as kl=1e-3, got {self.error_budget!r}"
            raise TieredKVError(Kind.CONFIG, message, setting="error_budget")
        return kl

    def _part(self, setting: str, other: str) -> None:
        """Split a size like "2GiB:cuda:1" into the size and the setting `other`."""
        value = getattr(self, setting)
        if not isinstance(value, str) or ":" not in value:
            return
        size, _, rest = value.partition(":")
        if getattr(self, other) not in (None, rest):
            raise TieredKVError(
                Kind.CONFIG,
                f"{setting}: names {other} {rest!r}, but the setting {other} is {getattr(self, other)!r}; give only one of them",
                setting=setting,
            )
        object.__setattr__(self, setting, size)
        object.__setattr__(self, other, rest or None)

    def _text(self, setting: str, words: str) -> None:
        value = getattr(self, setting)
        if not (isinstance(value, str) and value):
            raise TieredKVError(Kind.CONFIG, f"{setting}: must be {words}, got {value!r}", setting=setting)

    def _at_least(self, setting: str, least: float, words: str, whole: bool = False) -> None:
        value = getattr(self, setting)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise TieredKVError(Kind.CONFIG, f"{setting}: must be a {'whole ' if whole else ''}number, got {value!r}", setting=setting)
        if not value >= least:  # so that NaN is refused as well
            raise TieredKVError(Kind.CONFIG, f"{setting}: must be at least {words}, got {value}", setting=setting)

    @classmethod
    def of(cls, settings: "Config | Mapping[str, object] | None" = None, **changes: object) -> "Config":
        """Returns a config from a mapping, from another config or (None) from the defaults, with `changes` applied.

        The error for an unknown setting names the most similar known setting.
        """
        if settings is not None and not isinstance(settings, Config | Mapping):
            raise TieredKVError(Kind.CONFIG, f"config: must be a Config or a mapping of settings, got {type(settings).__name__}")
        given = asdict(settings) if isinstance(settings, Config) else dict(settings or {})
        for setting, other in _PARTS.items() if changes else ():
            size, colon, rest = str(given.get(setting)).partition(":")
            if colon and other not in given:
                given |= {setting: size, other: rest}
            if ":" in str(changes.get(setting)):
                given.pop(other, None)  # the new size includes the other setting
        given |= changes
        for setting in FORMER_SETTINGS & given.keys():
            log.warning("the setting %s has no effect any more: it is ignored", setting)
            del given[setting]
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                raise TieredKVError(Kind.CONFIG, f"unknown setting {key!r}{hint}", setting=key)
        return cls(**given)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **changes: object) -> "Config":
        """Returns a config from a TOML file with settings at its top level, with `changes` applied. Errors name the file."""
        try:
            with open(path, "rb") as file:
                settings = tomllib.load(file)
        except OSError as error:
            raise TieredKVError(Kind.CONFIG, f"config: cannot read {path}: {error.strerror}", setting="config") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise TieredKVError(Kind.CONFIG, f"config: must be a TOML file, but {path} is not TOML: {error}", setting="config") from error
        try:
            return cls.of(settings, **changes)
        except TieredKVError as error:
            raise TieredKVError(error.kind, f"{error} (settings of {path})", **error.context) from error

    @property
    def disk_root(self) -> str:
        """The folder in which each node creates its own folder for disk segments."""
        return self.disk_path or str(user_cache() / "disk")

    @property
    def objects_folder(self) -> str | None:
        """The folder in which each node creates its own folder for objects; None if `objects` is not a folder on this machine."""
        if self.objects is None:
            return None
        url = urlsplit(self.objects)
        if url.scheme == "file" and not url.netloc:
            return unquote(url.path)
        return None if "://" in self.objects else self.objects

    def with_(self, **changes: Any) -> "Config":
        """Returns a copy with some settings changed."""
        return replace(self, **changes)


POLICIES = ("lru", "lfu", "fifo", "s3fifo", "sieve", "arc", "gdsf", "adaptive")
FORMER_SETTINGS = frozenset({"pull_chunk"})
"""Settings of older versions. Settings files and the records of running clusters may still contain them; they are ignored."""
QUALITIES = ("exact", "near_exact", "balanced", "compact", "archive")
CODED_TIERS = (Tier.HOST, Tier.DISK, Tier.OBJECTS)
_TEXTS = {
    "disk_path": "the path of a folder",
    "device_name": "a device such as cpu or cuda:0",
    "objects": "a URL",
    "codec": "a list such as host=int8,disk=lossless",
    "error_budget": "a budget such as kl=1e-3",
    "calibration": "the path of a file or a folder",
    "peer_address": "an interface, a network or an address, with ports",
}
_PARTS = {"device": "device_name", "disk": "disk_path"}
