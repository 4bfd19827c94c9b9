"""What is said about blocks: where one lies, and the answers that a client gives.

Pure data. Sizes are bytes, counts of tokens are tokens; `tokens_by_tier` maps a tier's name to tokens.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Tier(IntEnum):
    """Where a block lies; the number is what the shared index stores. Lower is faster."""

    DEVICE = 1
    HOST = 2
    DISK = 3
    OBJECTS = 4

    __hash__ = int.__hash__  # an Enum's own hash is Python code, and a tier is a key many times a block

    @property
    def label(self) -> str:
        """The name that people and settings use."""
        return self.name.lower()


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
