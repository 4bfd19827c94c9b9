"""The steps of writing and restoring checkpoints on one node: requests, their answers, and the interfaces that carry them out.

A command sends a request to a node (`Node.checkpoint`). `CheckpointRequest.run` is the one place that maps a request to a method
of `WriteSteps` or `LoadSteps`. Requests and answers are pickled when they go through Ray.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypedDict, TypeVar

from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.reshard import ReshardedBlock
from tiered_kv.tiers.objects.mounted import MountedBlock
from tiered_kv.tiers.objects.packs import PackInfo

PACK_BYTES = 32 << 20

StepAnswer = TypeVar("StepAnswer")
Answer_co = TypeVar("Answer_co", covariant=True)
ModelMessages = Mapping[BlockKey, dict[str, Any]]
"""By root, the description of a model (`ModelInfo.as_message`)."""

# Answers


class SnapshotEntry(NamedTuple):
    """A block in a snapshot: its position in its chain, its best copy, and its uses since it was stored (`hits`)."""

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey
    depth: int | None
    tier: int
    codec: int
    stored_bytes: int
    raw_bytes: int
    hits: int


class Snapshot(NamedTuple):
    """The blocks that match a `SnapshotRequest`, most recently used first, and the descriptions of their models by root."""

    blocks: list[SnapshotEntry]
    models: dict[BlockKey, dict[str, Any]]


class WriteStatus(NamedTuple):
    """The state of writing packs.

    blocks, nbytes: blocks written so far, and the bytes of their frames. packs: the finished packs that the caller does not know
    yet. left: blocks that were evicted before they could be written. error: the reason if writing ended without success.
    """

    blocks: int
    nbytes: int
    packs: list[PackInfo]
    left: list[BlockKey]
    is_done: bool
    error: TieredKVError | None = None


class LoadCapacity(NamedTuple):
    """The part of a checkpoint that a node has room for: bytes in host memory and on disk, and blocks in its index."""

    host_bytes: int
    disk_bytes: int
    blocks: int


class LoadProgress(NamedTuple):
    """The state of loading.

    mounted: blocks to load. host, disk: how many of them have been copied there. nbytes: bytes read. damaged: blocks that could
    not be restored; `problems` describes the first of them. error: the reason if loading ended early. too_lossy: blocks that are
    misses, because their error is larger than the settings allow.
    """

    mounted: int
    host: int
    disk: int
    nbytes: int
    damaged: int
    problems: list[str]
    is_done: bool
    error: TieredKVError | None = None
    too_lossy: int = 0


class WrittenCheckpoint(TypedDict):
    """A complete checkpoint, ready for JSON: its name, its store's URL, the Unix time of its end, and its number of blocks."""

    name: str
    url: str
    at_s: float
    blocks: int


# Requests


class CheckpointRequest(ABC, Generic[Answer_co]):
    """One step for a node to carry out. The type parameter is the type of its answer."""

    @abstractmethod
    def run(self, steps: "CheckpointSteps") -> Answer_co:
        """Carry out the step. Returns its answer."""


@dataclass(frozen=True)
class SnapshotRequest(CheckpointRequest[Snapshot]):
    """List the node's blocks. `WriteRequest` writes blocks of this list.

    tiers: values of `Tier`; None means all but objects. min_hits: the least number of uses since a block was stored. ticket:
    identifies the checkpoint; later requests with another ticket do not affect it.
    """

    tiers: Sequence[int] | None = None
    min_hits: int = 0
    ticket: str = ""

    def run(self, steps: "CheckpointSteps") -> Snapshot:
        return steps.checkpoint_writer.snapshot(self)


@dataclass(frozen=True)
class WriteRequest(CheckpointRequest[None]):
    """Start writing blocks of the last snapshot to packs, in the order of `keys`.

    url: where to write; a folder must exist already. max_rate: bytes per second, None for no limit. credentials: the caller's, as
    environment variables; None for those of the node.
    """

    url: str
    keys: Sequence[BlockKey]
    max_rate: float | None = None
    pack_bytes: int = PACK_BYTES
    credentials: Mapping[str, str] | None = field(default=None, repr=False)
    ticket: str = ""

    def run(self, steps: "CheckpointSteps") -> None:
        steps.checkpoint_writer.write(self)


@dataclass(frozen=True)
class WriteStatusRequest(CheckpointRequest[WriteStatus]):
    """Report the state of writing. `known_packs`: how many finished packs the caller knows already."""

    known_packs: int = 0
    ticket: str = ""

    def run(self, steps: "CheckpointSteps") -> WriteStatus:
        return steps.checkpoint_writer.status(self)


@dataclass(frozen=True)
class StopWritingRequest(CheckpointRequest[None]):
    """Stop writing, or drop the snapshot. Finished packs are kept. `ticket`: stop only the checkpoint with this ticket; None: any."""

    ticket: str | None = None

    def run(self, steps: "CheckpointSteps") -> None:
        steps.checkpoint_writer.stop(self.ticket)


@dataclass(frozen=True)
class NoteRequest(CheckpointRequest[None]):
    """Remember a complete checkpoint, to show it in the node's figures."""

    checkpoint: WrittenCheckpoint

    def run(self, steps: "CheckpointSteps") -> None:
        steps.checkpoint_writer.note(self.checkpoint)


@dataclass(frozen=True)
class LoadCapacityRequest(CheckpointRequest[LoadCapacity]):
    """Report how much of a checkpoint the node has room for."""

    def run(self, steps: "CheckpointSteps") -> LoadCapacity:
        return steps.checkpoint_loader.capacity()


@dataclass(frozen=True)
class MountRequest(CheckpointRequest[int]):
    """Mount blocks: they are hits at once, and are read from their packs on demand. The answer is the number of mounted blocks.

    packs: names of packs at `url`. blocks: hottest first, every parent before its children; `location.segment` is an index into
    `packs`. models: descriptions of the blocks' models. credentials: as in `WriteRequest`.
    """

    url: str
    packs: Sequence[str]
    blocks: Sequence[MountedBlock]
    models: ModelMessages = field(default_factory=dict)
    credentials: Mapping[str, str] | None = field(default=None, repr=False)

    def run(self, steps: "CheckpointSteps") -> int:
        return steps.checkpoint_loader.mount(self)


@dataclass(frozen=True)
class LoadRequest(CheckpointRequest[None]):
    """Start copying the blocks of the last mount to host memory and disk. `max_rate`: bytes per second, None for no limit."""

    max_rate: float | None = None

    def run(self, steps: "CheckpointSteps") -> None:
        steps.checkpoint_loader.load(self.max_rate)


@dataclass(frozen=True)
class ReshardRequest(CheckpointRequest[None]):
    """Start building blocks from blocks of other tensor-parallel ranks, and storing them in host memory and on disk.

    The fields are those of `MountRequest` and `LoadRequest`; the segments of the blocks' sources are indexes into `packs`.
    """

    url: str
    packs: Sequence[str]
    blocks: Sequence[ReshardedBlock]
    max_rate: float | None = None
    models: ModelMessages = field(default_factory=dict)
    credentials: Mapping[str, str] | None = field(default=None, repr=False)

    def run(self, steps: "CheckpointSteps") -> None:
        steps.checkpoint_loader.reshard(self)


@dataclass(frozen=True)
class LoadProgressRequest(CheckpointRequest[LoadProgress]):
    """Report the state of loading."""

    def run(self, steps: "CheckpointSteps") -> LoadProgress:
        return steps.checkpoint_loader.progress()


@dataclass(frozen=True)
class StopLoadingRequest(CheckpointRequest[None]):
    """Stop loading. Mounted blocks are still hits."""

    def run(self, steps: "CheckpointSteps") -> None:
        steps.checkpoint_loader.stop()


# Interfaces of the parts that carry them out


class WriteSteps(Protocol):
    """Writes packs of a node's blocks, for one checkpoint at a time."""

    def snapshot(self, request: SnapshotRequest) -> Snapshot:
        """Returns the matching blocks that are committed now.

        Raises (kind `storage`, `busy`) while another checkpoint is being written, until its writer stops or stops polling.
        Cost: holds the engine's lock for about 0.3 µs per block. Meanwhile no store is answered; fetches continue.
        """

    def write(self, request: WriteRequest) -> None:
        """Start writing; returns at once. Poll `status`. Raises (kinds `config`, `storage`) if it cannot start."""

    def status(self, request: WriteStatusRequest) -> WriteStatus:
        """Returns the state of writing. Raises (kind `storage`) if no writing was started."""

    def stop(self, ticket: str | None = None) -> None:
        """Stop writing. Returns when no thread writes any more."""

    def note(self, checkpoint: WrittenCheckpoint) -> None:
        """Store the record of a complete checkpoint for the node's figures."""


class LoadSteps(Protocol):
    """Mounts blocks of checkpoints on a node, and loads them into its tiers, one mount at a time."""

    def capacity(self) -> LoadCapacity:
        """Returns the room for blocks of a checkpoint now."""

    def mount(self, request: MountRequest) -> int:
        """Mount blocks, so that they are hits. Returns how many were mounted.

        The others are too lossy (`progress` counts them), belong to ended weights, or found no room in the index.
        Opening the store makes no request. Raises (kinds `config`, `storage`) for a store that cannot be opened, and (kind
        `storage`) while the node is loading.
        """

    def load(self, max_rate: float | None = None) -> None:
        """Start loading; returns at once. Poll `progress`. Raises (kind `storage`) if nothing is mounted."""

    def reshard(self, request: ReshardRequest) -> None:
        """Start building blocks; returns at once. Poll `progress`. Blocks that find no room are left out. Raises as `mount`."""

    def progress(self) -> LoadProgress:
        """Returns the state of loading; zeros if nothing was mounted."""

    def stop(self) -> None:
        """Stop loading. Returns when no thread reads any more."""


class CheckpointSteps(Protocol):
    """The part of a node that checkpoint requests use."""

    @property
    def checkpoint_writer(self) -> WriteSteps:
        """The part of the node that writes checkpoints."""

    @property
    def checkpoint_loader(self) -> LoadSteps:
        """The part of the node that restores checkpoints."""
