"""Tenants: the salts that separate their blocks, and their quotas of each tier."""

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Self

from tiered_kv.blocks import Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import DEFAULT_TENANT, check_tenant

SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 1 << 20
TIERS = {tier.label: tier for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.OBJECTS)}


def salt_of(tenant: str, secret: bytes) -> str:
    """Returns the salt of a tenant's namespaces in a cluster with this secret: HMAC-SHA256 in hexadecimal.

    "" for the default tenant, and in a cluster without a secret.
    """
    return "" if tenant == DEFAULT_TENANT or not secret else hmac.new(secret, b"tiered_kv tenant\0" + tenant.encode(), sha256).hexdigest()


@dataclass(frozen=True)
class TenantSettings:
    """The setting `tenants`. `secret_file`: a file on each machine with the secret of the salts; None for the cluster's own secret.

    `quotas`: by tenant and tier, the most bytes of blocks.
    """

    secret_file: str | None = None
    quotas: Mapping[str, Mapping[Tier, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any, parse_size: Any) -> Self:
        """Returns the settings in a mapping, in its JSON text, or None. Raises (kind `config`) for anything else, and names it.

        The mapping is {"secret_file": path, "quotas": {tenant: {tier: size}}}; both may be missing. `parse_size`: `config.parse_size`.
        """
        try:
            found = json.loads(given) if isinstance(given, str) else {} if given is None else given
        except ValueError as error:
            raise _invalid(f"a mapping or its JSON, got {given!r:.100} ({error})") from error
        if not isinstance(found, Mapping) or not found.keys() <= {"secret_file", "quotas"}:
            raise _invalid(f"a mapping with the keys secret_file and quotas, got {found!r:.100}")
        path, quotas = found.get("secret_file"), found.get("quotas", {})
        if not isinstance(path, str | None) or path == "" or not isinstance(quotas, Mapping):
            raise _invalid(f"the path of a file, and a mapping of quotas, got {found!r:.100}")
        try:
            return cls(path, {tenant: _quota_of(tenant, limits, parse_size) for tenant, limits in quotas.items()})
        except TieredKVError as error:
            raise TieredKVError(error.kind, f"tenants: {error}", setting="tenants") from error

    def check_block(self, tenant: str, nbytes: int) -> None:
        """Raise (kind `config`) if a quota of a tenant is too small for a block of `nbytes`."""
        for tier, limit in self.quotas.get(tenant, {}).items():
            if limit < nbytes:
                message = f"quota of {tenant!r} in {tier.label}: must be at least one block of this model, {nbytes} bytes, got {limit}"
                raise TieredKVError(Kind.CONFIG, message, setting="quota")

    def as_text(self) -> str | None:
        """Returns the settings as JSON text; None for the defaults."""
        quotas = {tenant: {tier.label: nbytes for tier, nbytes in limits.items()} for tenant, limits in sorted(self.quotas.items())}
        given = ({"secret_file": self.secret_file} if self.secret_file else {}) | ({"quotas": quotas} if quotas else {})
        return json.dumps(given, sort_keys=True) if given else None

    def secret(self, cluster_secret: bytes) -> bytes:
        """Returns the secret of the salts. Raises (kind `config`) if its file cannot be read, or is too short or too long."""
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


def _quota_of(tenant: str, limits: Any, parse_size: Any) -> dict[Tier, int]:
    check_tenant(tenant)
    unknown = [*limits.keys() - TIERS.keys()] if isinstance(limits, Mapping) else []
    if unknown or not limits or not isinstance(limits, Mapping):
        message = f"quota of {tenant!r}: must have sizes for some of {', '.join(TIERS)}, got {unknown[0] if unknown else limits!r}"
        raise TieredKVError(Kind.CONFIG, message, setting="quota")
    sizes = {TIERS[label]: parse_size(size, f"quota of {tenant!r} in {label}") for label, size in limits.items()}
    if not all(sizes.values()):
        raise TieredKVError(Kind.CONFIG, f"quota of {tenant!r}: each size must be more than 0 bytes, got {limits}", setting="quota")
    return sizes


def _invalid(expected: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"tenants: must be {expected}", setting="tenants")
