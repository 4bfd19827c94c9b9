"""Codec plans: the codec that each tier uses for a model's blocks.

The settings ask for a named quality, for codecs by tier, or for an error budget. A plan is a pure function of the settings, the tiers,
and the measurements of `tiered-kv calibrate` for this model. Every node computes the same plan by itself, without the coordinator. The
coordinator reports the plans on request (docs/design/016).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiered_kv.blocks import Tier
from tiered_kv.codecs.base import Codec
from tiered_kv.config import CODED_TIERS, Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.messages import TierPlan

if TYPE_CHECKING:
    from tiered_kv.codecs.calibrated.tables import Calibration

MEMORY_DECODE_MIN = 0.05
"""Lowest decoding speed, relative to memcpy, of a codec that is chosen for host memory while a colder tier exists."""
FALLBACK_DECODE = 0.0  # the speed assumed for a codec whose speed was not measured

FIXED = {
    "exact": {Tier.HOST: "raw", Tier.DISK: "lossless", Tier.OBJECTS: "lossless"},
    "near_exact": dict.fromkeys(CODED_TIERS, "int8"),
}
"""The qualities that need no calibration: their codecs by tier."""
CALIBRATED = {"compact": "xlayer:1e-4", "archive": "xlayer:2e-4"}
RUN = "run: tiered-kv calibrate MODEL"
ONLY_LOSSLESS = "only lossless codecs apply to an opaque layout"


@dataclass(frozen=True)
class CodecPlan:
    """The codec of each tier, written as in the settings, and the reason for it. The device is left out: it keeps blocks raw."""

    codecs: Mapping[Tier, str]
    why: Mapping[Tier, str]

    def needs_calibration(self) -> bool:
        """Returns whether one of the codecs uses tables that were fitted to the model."""
        return any(_parsed(text)[0].needs_calibration for text in self.codecs.values())

    def as_record(self) -> dict[str, TierPlan]:
        """Returns `codec` and `why` by tier, ready for JSON."""
        return {tier.label: {"codec": text, "why": self.why[tier]} for tier, text in self.codecs.items()}


def check_settings(config: Config) -> None:
    """Raise (kind `config`) if the setting `codec` names a tier or a codec that does not exist. Needs no model."""
    tiers = tiers_of(config)
    for tier, text in config.codec_by_tier.items():
        if tier not in tiers:
            raise TieredKVError(Kind.CONFIG, f"codec: {tier.label}={text}, but there is no {tier.label} tier", setting="codec")
        try:
            _parsed(text)
        except TieredKVError as error:
            raise TieredKVError(error.kind, f"codec: {tier.label}={text}: {error}", setting="codec") from error


def tiers_of(config: Config) -> list[Tier]:
    """Returns the tiers of a node that can have a codec, the fastest first."""
    exists = {Tier.HOST: True, Tier.DISK: bool(config.disk), Tier.OBJECTS: config.objects is not None}
    return [tier for tier in CODED_TIERS if exists[tier]]


def is_exact(config: Config) -> bool:
    """Returns whether host memory keeps every block of every model raw."""
    named = config.codec_by_tier.get(Tier.HOST)
    return named == "raw" or (named is None and config.quality == "exact" and config.kl_budget is None)


def most_error(config: Config) -> float:
    """Returns the largest error that any plan of these settings allows; infinity if that depends on a calibration."""
    named = config.codec_by_tier
    others = [tier for tier in tiers_of(config) if tier not in named]
    if others and (config.kl_budget is not None or config.quality not in FIXED):
        return math.inf
    texts = [*named.values(), *(FIXED[config.quality][tier] for tier in others)]
    return max((_codec(text).most_error() for text in texts), default=0.0)


def _parsed(text: str) -> tuple[type[Codec], dict[str, Any]]:
    """Returns what `parse_codec` returns. Imports the codecs only then, because they import torch, which `tiered-kv up` does not need."""
    from tiered_kv.codecs import parse_codec

    return parse_codec(text)


def _codec(text: str) -> Codec:
    """Returns the codec that `text` names, for blocks without a layout."""
    cls, written = _parsed(text)
    return cls(**written)


def plan(config: Config, calibration: "Calibration | None") -> CodecPlan:
    """Returns the plan for a model. `calibration`: its calibration, or None.

    Raises (kind `config`) if a calibration is needed and missing. The error names the command to run.
    """
    tiers = tiers_of(config)
    if config.kl_budget is not None:
        codecs, why = _within(config.kl_budget, tiers, calibration)
    else:
        codecs = _preset(config.quality, tiers, calibration)
        why = dict.fromkeys(codecs, f"quality {config.quality}")
    for tier, text in config.codec_by_tier.items():
        codecs[tier], why[tier] = text, "set by codec"
    for tier in tiers:
        if calibration is None and _parsed(codecs[tier])[0].needs_calibration:
            setting = "codec" if tier in config.codec_by_tier else "quality"
            message = f"{setting}: {codecs[tier]} ({why[tier]}, {tier.label} tier) needs a calibration of this model; {RUN}"
            raise TieredKVError(Kind.CONFIG, message, setting=setting)
    return CodecPlan(codecs, why)


def opaque_plan(config: Config) -> CodecPlan:
    """Returns the plan for a model with an `OpaqueLayout`. Needs no calibration.

    A tier for which the settings ask for a lossy codec gets the lossless codec instead. Its `why` names the codec that is replaced.
    """
    tiers = tiers_of(config)
    if config.kl_budget is None:
        codecs = _preset(config.quality, tiers, None)
        why = dict.fromkeys(codecs, f"quality {config.quality}")
    else:
        codecs = dict.fromkeys(tiers, "lossless")
        why = dict.fromkeys(codecs, f"error_budget: {ONLY_LOSSLESS}")
    for tier, text in config.codec_by_tier.items():
        codecs[tier], why[tier] = text, "set by codec"
    for tier, text in codecs.items():
        if _parsed(text)[0].is_lossy:
            codecs[tier], why[tier] = "lossless", f"{why[tier]}, but {ONLY_LOSSLESS}, so not {text}"
    return CodecPlan(codecs, why)


def _preset(quality: str, tiers: Sequence[Tier], calibration: "Calibration | None") -> dict[Tier, str]:
    if quality in FIXED:
        return {tier: FIXED[quality][tier] for tier in tiers}
    if quality == "balanced":
        return dict.fromkeys(tiers, "ecuq:1e-4" if calibration else "int4")
    codecs = dict.fromkeys(tiers, CALIBRATED[quality])
    if len(tiers) > 1:
        codecs[Tier.HOST] = "int8"  # fast, and encoding it again for a colder tier adds no error
    return codecs


def _within(kl: float, tiers: Sequence[Tier], calibration: "Calibration | None") -> tuple[dict[Tier, str], dict[Tier, str]]:
    """Returns by tier the codec with the largest compression ratio within the KL budget, and the reason.

    The errors of host memory and of a colder tier add up. So their sum must be within the budget, unless both use the same codec.
    """
    if calibration is None or not calibration.measured:
        raise TieredKVError(Kind.CONFIG, f"error_budget: choosing codecs needs a calibration of this model; {RUN}", setting="error_budget")
    rows = [row for row in calibration.measured if row["kl"] <= kl]
    colder = [tier for tier in tiers if tier is not Tier.HOST]
    lowest = _smallest(rows)
    codecs: dict[Tier, str] = {}
    why: dict[Tier, str] = {}
    for tier in colder:
        codecs[tier], why[tier] = lowest["codec"], f"smallest within KL {kl:g}: {_measured(lowest)}"
    fast = [row for row in rows if row.get("decode_vs_memcpy", FALLBACK_DECODE) >= MEMORY_DECODE_MIN] if colder else rows
    fast = [row for row in fast if not colder or row["codec"] == lowest["codec"] or row["kl"] + lowest["kl"] <= kl]
    chosen = _smallest([row for row in fast if row["codec"] != "lossless"])
    codecs[Tier.HOST] = chosen["codec"]
    with_below = f" with {lowest['codec']} below it" if colder and chosen["codec"] not in ("raw", lowest["codec"]) else ""
    speed = f", among codecs that decode at {MEMORY_DECODE_MIN:g} of memcpy or faster" if colder else ""
    why[Tier.HOST] = f"smallest within KL {kl:g}{with_below}{speed}: {_measured(chosen)}"
    return {tier: codecs[tier] for tier in tiers}, why


def _smallest(rows: Collection[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the measurement with the largest compression ratio, or that of the codec `raw` if there are none."""
    return max(rows, key=lambda row: row["ratio"], default={"codec": "raw", "kl": 0.0, "ratio": 1.0})


def _measured(row: Mapping[str, Any]) -> str:
    return f"KL {row['kl']:.1e}, {row['ratio']:.2f} times smaller"
