"""Which codec each tier keeps a model's blocks in: by a named quality, by tier, or by what fits an error budget.

A plan is a pure function of the settings, the tiers, and what `tiered-kv calibrate` measured on this very model. Every node comes to
the same one by itself, also while the coordinator is away; the coordinator tells them to whoever asks (docs/design/016).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiered_kv.blocks import Tier
from tiered_kv.codecs import Calibration, Codec, parse_codec
from tiered_kv.config import CODED_TIERS, Config
from tiered_kv.errors import Kind, TieredKVError

MEMORY_DECODE_MIN = 0.05
"""Of memcpy: what decodes more slowly is not chosen for host memory as long as there is a colder tier to save bytes in."""
FALLBACK_DECODE = 0.0  # of a codec whose speed was not measured

FIXED = {
    "exact": {Tier.HOST: "raw", Tier.DISK: "lossless", Tier.OBJECTS: "lossless"},
    "near_exact": dict.fromkeys(CODED_TIERS, "int8"),
}
"""The qualities that need to know nothing of the model."""
CALIBRATED = {"compact": "xlayer:1e-4", "archive": "xlayer:2e-4"}
RUN = "run: tiered-kv calibrate MODEL"


@dataclass(frozen=True)
class Plan:
    """The codec of each tier but the device's, which holds blocks as they are, and in a few words why. Codecs as people write them."""

    codecs: Mapping[Tier, str]
    why: Mapping[Tier, str]

    def needs_calibration(self) -> bool:
        """Whether one of the codecs has tables of the model."""
        return any(parse_codec(text)[0].needs_calibration for text in self.codecs.values())

    def as_record(self) -> dict[str, dict[str, str]]:
        """By tier `codec` and `why`, ready for JSON."""
        return {tier.label: {"codec": text, "why": self.why[tier]} for tier, text in self.codecs.items()}


def check_settings(config: Config) -> None:
    """Raise (kind `config`), naming the setting, for codecs that do not exist or tiers that are not there; needs no model."""
    tiers = tiers_of(config)
    for tier, text in config.codec_by_tier.items():
        if tier not in tiers:
            raise TieredKVError(Kind.CONFIG, f"codec: {tier.label}={text}, but there is no {tier.label} tier", setting="codec")
        try:
            parse_codec(text)
        except TieredKVError as error:
            raise TieredKVError(error.kind, f"codec: {tier.label}={text}: {error}", setting="codec") from error


def tiers_of(config: Config) -> list[Tier]:
    """The tiers of a node that may have a codec, the fastest first."""
    there = {Tier.HOST: True, Tier.DISK: bool(config.disk), Tier.OBJECTS: config.objects is not None}
    return [tier for tier in CODED_TIERS if there[tier]]


def is_exact(config: Config) -> bool:
    """Whether no block is coded in host memory, whatever the model: then blocks lie there as they were stored."""
    named = config.codec_by_tier.get(Tier.HOST)
    return named == "raw" or (named is None and config.quality == "exact" and config.kl_budget is None)


def most_error(config: Config) -> float:
    """The greatest error that blocks may carry by any plan of these settings; infinity where that depends on a calibration."""
    named = config.codec_by_tier
    others = [tier for tier in tiers_of(config) if tier not in named]
    if others and (config.kl_budget is not None or config.quality not in FIXED):
        return math.inf
    texts = [*named.values(), *(FIXED[config.quality][tier] for tier in others)]
    return max((_codec(text).most_error() for text in texts), default=0.0)


def _codec(text: str) -> Codec:
    """A codec as people write it, for blocks of no layout."""
    cls, written = parse_codec(text)
    return cls(**written)


def plan(config: Config, calibration: Calibration | None) -> Plan:
    """The plan for a model of which `calibration` is known, if any.

    Raises (kind `config`) where that is needed and missing: the error names the command to run.
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
        if calibration is None and parse_codec(codecs[tier])[0].needs_calibration:
            setting = "codec" if tier in config.codec_by_tier else "quality"
            message = f"{setting}: {codecs[tier]} ({why[tier]}, {tier.label} tier) needs a calibration of this very model; {RUN}"
            raise TieredKVError(Kind.CONFIG, message, setting=setting)
    return Plan(codecs, why)


def _preset(quality: str, tiers: Sequence[Tier], calibration: Calibration | None) -> dict[Tier, str]:
    if quality in FIXED:
        return {tier: FIXED[quality][tier] for tier in tiers}
    if quality == "balanced":
        return dict.fromkeys(tiers, "ecuq:1e-4" if calibration else "int4")
    codecs = dict.fromkeys(tiers, CALIBRATED[quality])
    if len(tiers) > 1:
        codecs[Tier.HOST] = "int8"  # fast, and nothing is lost by coding it anew further down
    return codecs


def _within(kl: float, tiers: Sequence[Tier], calibration: Calibration | None) -> tuple[dict[Tier, str], dict[Tier, str]]:
    """The smallest codec of each tier whose measured error fits, alone or on top of that of the tier above."""
    if calibration is None or not calibration.measured:
        raise TieredKVError(
            Kind.CONFIG, f"error_budget: what fits is told by a calibration of this very model; {RUN}", setting="error_budget"
        )
    rows = [row for row in calibration.measured if row["kl"] <= kl]
    colder = [tier for tier in tiers if tier is not Tier.HOST]
    lowest = _smallest(rows)
    codecs, why = {}, {}
    for tier in colder:
        codecs[tier], why[tier] = lowest["codec"], f"smallest within KL {kl:g}: {_measured(lowest)}"
    fast = [row for row in rows if row.get("decode_vs_memcpy", FALLBACK_DECODE) >= MEMORY_DECODE_MIN] if colder else rows
    fast = [row for row in fast if not colder or row["codec"] == lowest["codec"] or row["kl"] + lowest["kl"] <= kl]
    chosen = _smallest([row for row in fast if row["codec"] != "lossless"])
    codecs[Tier.HOST] = chosen["codec"]
    with_below = f" with {lowest['codec']} below it" if colder and chosen["codec"] not in ("raw", lowest["codec"]) else ""
    speed = f", of those that decode at {MEMORY_DECODE_MIN:g} of memcpy and more" if colder else ""
    why[Tier.HOST] = f"smallest within KL {kl:g}{with_below}{speed}: {_measured(chosen)}"
    return {tier: codecs[tier] for tier in tiers}, why


def _smallest(rows: Collection[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the greatest ratio; raw where there is none."""
    return max(rows, key=lambda row: row["ratio"], default={"codec": "raw", "kl": 0.0, "ratio": 1.0})


def _measured(row: Mapping[str, Any]) -> str:
    return f"KL {row['kl']:.1e}, {row['ratio']:.2f} times smaller"
