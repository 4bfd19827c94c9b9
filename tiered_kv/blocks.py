"""What is said about blocks: where one lies, the answers that a client gives, and what a worker may tell it of the future.

Pure data. Sizes are bytes, counts of tokens are tokens; `tokens_by_tier` maps a tier's name to tokens.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    import torch


class Tier(IntEnum):
    """Where a block lies; the number is what the shared index stores. Lower is faster."""

    DEVICE = 1
    HOST = 2
    DISK = 3
    OBJECTS = 4
    CHECKPOINT = 5
    """Packs of a checkpoint that was mounted: read, never written to, and under no cap."""

    __hash__ = int.__hash__  # an Enum's own hash is Python code, and a tier is a key many times a block

    @property
    def label(self) -> str:
        """The name that people and settings use."""
        return self.name.lower()


AWAY = (Tier.OBJECTS, Tier.CHECKPOINT)
"""Tiers that a worker cannot read by itself, and where one request takes some 50 ms whatever its size."""

PEER = "peer"
"""The label, in `tokens_by_tier`, of tokens that another node of the cluster holds or delivered."""


class Location(NamedTuple):
    """Where the bytes of one block lie: in `segment` at `offset` of a tier (the host arena has segment 0)."""

    tier: Tier
    codec: int
    segment: int
    offset: int
    stored_bytes: int
    raw_bytes: int


@dataclass(frozen=True)
class Match:
    """The longest prefix that could be had: `tokens` in whole blocks, and from where."""

    tokens: int
    tokens_by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fetched:
    """The longest prefix that was had in time: `kv` is (L, 2, H, tokens, D), the KV of the first `tokens` tokens."""

    tokens: int
    kv: "torch.Tensor"
    tokens_by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """Blocks of one store call: newly visible, visible before, and not taken (no room in time, or no node)."""

    new: int
    present: int
    refused: int


@dataclass(frozen=True)
class Explained:
    """One block of a prompt: in which tier under which codec, or why it would be a miss."""

    block: int
    key: str
    tier: str | None
    codec: str | None
    stored_bytes: int
    reason: str


@dataclass(frozen=True)
class Hint:
    """What a worker knows of the chain that it stores: all of it may be left out, and none of it is a promise.

    answer_tokens: tokens that the model generated. pinned_s: keep the chain in memory for so many seconds (ignored and
    counted where it would take more than half of the host tier). reuse_within_s: the next use is expected within so
    many seconds. ended: the session is over, nobody will use the chain again.
    """

    answer_tokens: int | None = None
    pinned_s: float | None = None
    reuse_within_s: float | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        if not (self.answer_tokens is None or _is_whole(self.answer_tokens)):
            raise _no_hint("answer_tokens", self.answer_tokens, "a whole number of 0 or more")
        for name in ("pinned_s", "reuse_within_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")):
                raise _no_hint(name, value, "a number of seconds, 0 or more")
        if not isinstance(self.ended, bool):
            raise _no_hint("ended", self.ended, "True or False")

    @property
    def foretells(self) -> bool:
        """Whether it says anything that a history learns from; a pin alone does not."""
        return self.ended or self.answer_tokens is not None or self.reuse_within_s is not None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_hint(name: str, value: object, words: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"hint: {name} must be {words}, got {value!r}", setting=name)
