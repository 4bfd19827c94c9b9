"""Records about blocks: the location of a block, a client's results, and a worker's hints about future use.

Pure data. Sizes are in bytes. `tokens_by_tier` maps the name of a tier to a number of tokens.
"""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey

if TYPE_CHECKING:
    import torch


class Tier(IntEnum):
    """A tier of storage. The shared index stores the number. Lower numbers are faster tiers."""

    DEVICE = 1
    HOST = 2
    DISK = 3
    OBJECTS = 4
    CHECKPOINT = 5
    """Packs of a mounted checkpoint: read, never written to, and not limited by a cap."""

    __hash__ = int.__hash__  # an Enum's own hash is slow Python code, and tiers are dict keys many times for each block

    @property
    def label(self) -> str:
        """The tier's name in settings and output."""
        return self.name.lower()


AWAY = (Tier.OBJECTS, Tier.CHECKPOINT)
"""Tiers that a worker cannot read itself. One request to them takes about 50 ms, whatever its size."""


class GoneCause(IntEnum):
    """The cause why a node no longer has a block, or never got it. The number is part of the node's record (`store.gone`)."""

    DROPPED = 1  # its room was needed, and there was no lower tier, or the lower tier failed to take it
    NOT_ADMITTED = 2  # its room was needed, and nothing suggested to the lower tier that it would be used again
    UNDER_PRESSURE = 3  # its room was needed, and the lower tier was too slow to take it
    OVER_QUOTA = 4  # its tenant was above its quota
    INDEX_FULL = 5  # the index had no slot left for newer blocks
    RECLAIMED = 6  # the oldest segment of a lower tier was reclaimed
    UNMOUNTED = 7  # only a mounted checkpoint had it, and the index was nearly full
    DAMAGED = 8  # its bytes were damaged or missing
    TOO_LOSSY = 9  # it had more error than its model's settings allow
    FORGOTTEN = 10  # its owner removed all blocks of its namespace
    ENDED = 11  # its weights have ended, or its namespace was purged
    REFUSED = 12  # a worker wanted to store it, and no room appeared in time

    @property
    def label(self) -> str:
        """The cause's name in output."""
        return self.name.lower()


class Reason(StrEnum):
    """The reason, for programs, why a block is a hit or a miss (`Explained.why`)."""

    HIT = "hit"
    PEER = "peer"
    ANCESTOR = "ancestor"
    NEVER_STORED = "never_stored"
    EVICTED = "evicted"
    DAMAGED = "damaged"
    REMOVED = "removed"
    REFUSED = "refused"
    OTHER_NAMESPACE = "other_namespace"
    DEADLINE = "deadline"
    DECLINED = "declined"
    NODE_SILENT = "node_silent"
    CLOSED = "closed"


PEER = "peer"
"""The label in `tokens_by_tier` for tokens that another node has or has sent."""


class BlockInfo(NamedTuple):
    """A block and its place in its chain: its key, its parent's key, the root of its model, and the number of its ancestors.

    `parent`: None for the first block of a chain, or if unknown. `root`, `depth`: None if unknown.
    """

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey | None
    depth: int | None = None


class Location(NamedTuple):
    """The location of one block's bytes: `segment` and `offset` within a tier (the host arena is segment 0).

    `stored_bytes`: the size in that place, encoded by `codec`. `raw_bytes`: the size of the decoded block.
    """

    tier: Tier
    codec: int
    segment: int
    offset: int
    stored_bytes: int
    raw_bytes: int


@dataclass(frozen=True)
class Match:
    """The longest prefix that a fetch could return: the number of tokens, in whole blocks, in total and by tier."""

    tokens: int
    tokens_by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fetched:
    """The longest prefix that was read in time: `kv` is (L, 2, H, tokens, D), the KV of the first `tokens` tokens.

    `declined`: the number of further tokens that could have been loaded, but not faster than the model computes them.
    `declined_by_reason`: the same by tier and reason, such as {"peer: slower": 512}. The reasons are in docs/load-or-compute.md.
    """

    tokens: int
    kv: "torch.Tensor"
    tokens_by_tier: dict[str, int] = field(default_factory=dict)
    declined: int = 0
    declined_by_reason: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """The numbers of blocks in one store call: newly stored, already present, and refused (no room in time, or no node)."""

    new: int
    present: int
    refused: int


@dataclass(frozen=True)
class Explained:
    """One block of a prompt: its tier and codec, or the reason why it would be a miss.

    `reason`: the reason in words. `why`: the same for programs, a value of `Reason`. `node`: the node that has the block, or that had
    it last. `details`: the figures behind the reason, ready for JSON; docs/explain.md lists them.
    """

    block: int
    key: str
    tier: str | None
    codec: str | None
    stored_bytes: int
    reason: str
    why: str = Reason.HIT
    node: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hint:
    """A worker's expectations about the chain that it stores. Every field is optional. A wrong expectation never makes a result wrong.

    answer_tokens: the number of tokens that the model generated. pinned_s: keep the chain in memory for this many seconds. A pin
    that would take more than half of the host tier is ignored and counted. reuse_within_s: the next use is expected within this many
    seconds. ended: the user's session is over, and the chain will not be used again.
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
        """Whether the hint contains anything that the eviction policy learns from. A pin alone does not."""
        return self.ended or self.answer_tokens is not None or self.reuse_within_s is not None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_hint(name: str, value: object, words: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"hint: {name} must be {words}, got {value!r}", setting=name)
