"""The dicts that processes of a cluster exchange: a node's description, its figures, and the answers built on them.

All of them are plain data, ready for JSON and msgpack. Sizes are bytes.
"""

from typing import Any, NamedTuple, NotRequired, TypedDict

from tiered_kv.keys import BlockKey

PackedBlock = tuple[BlockKey, BlockKey | None, int, int] | tuple[BlockKey, BlockKey | None, int, int, int]
"""A block that a worker has packed: (key, parent, payload offset in the arena, depth) and, if it is sealed at once, its digest."""


class BlockRun(NamedTuple):
    """Consecutive blocks of one chain. A pull sends its fields over a session's socket in this order.

    `root`: the root of the model. `nbytes`: the raw bytes of each block. `parent`: the parent of the first block, or None.
    `depth`: the number of ancestors of the first block.
    """

    root: BlockKey
    nbytes: int
    parent: BlockKey | None
    keys: list[BlockKey]
    depth: int


class NodeInfo(TypedDict):
    """The data that a worker needs to attach to a node: the places of its index, arena, socket and segments, and the cluster's settings."""

    node: str
    directory: str
    """The node's folder in shared memory."""
    disk_folder: str | None
    """The folder of the node's disk segments; None without a disk tier."""
    has_device: bool
    block_tokens: int
    fetch_deadline_ms: float
    store_wait_ms: float
    verify_host: NotRequired[bool]
    """Absent in the info of a node of an older version."""
    peer_address: NotRequired[str]
    """The address at which peers connect to the node ("HOST:PORT"); absent if the node has no streams."""
    metrics_address: NotRequired[str]
    """Where the node serves `/metrics` ("HOST:PORT"). Absent if it does not, and with `embedded`; then `metrics_problem` may say why."""
    metrics_problem: NotRequired[str]
    ray_node_id: NotRequired[str]
    """This and `address` are present only if the node runs as a Ray actor."""
    address: NotRequired[str]
    settings: NotRequired[dict[str, Any]]
    """The cluster's settings. Only in a node's record on its machine, for commands that cannot ask the coordinator."""


class TierStats(TypedDict):
    """One tier of a node: bytes used and allowed, and its blocks. Only the disk has a write amplification."""

    used_bytes: int
    capacity_bytes: int
    blocks: NotRequired[int]
    write_amplification: NotRequired[float]


class EncodedStats(TypedDict):
    """Blocks that one codec encoded for one tier: their number, and their bytes before and after."""

    blocks: int
    raw_bytes: int
    kept_bytes: int
    mean_error: NotRequired[float]
    """The mean of the blocks' errors (relative mean squared error). Absent in the figures of a node of an older version."""


class TierPlan(TypedDict):
    """The codec of one tier for one model, and why it was chosen."""

    codec: str
    why: str


class CodecStats(TypedDict):
    """The plans of a node's models, and the blocks that it encoded.

    `plans`: by the start of a model's root, its `weights` and its `TierPlan` by tier. `coded`: by tier and codec. `fell_back`: by
    reason, how many blocks got a better codec than planned.
    """

    plans: dict[str, dict[str, str | TierPlan]]
    coded: dict[str, dict[str, EncodedStats]]
    fell_back: dict[str, int]
    most_error: NotRequired[float | None]
    """The largest error that a block may have; None if a calibration decides. Absent in the figures of an older version."""


class LearningStats(TypedDict):
    """The number of blocks that an eviction policy remembers, and the seconds since it adopted counts of other nodes.

    The number is None if the policy does not learn. The age is None if no counts were adopted.
    """

    known_blocks: int | None
    adopted_age_s: float | None


class PolicyStats(LearningStats):
    """A node's eviction policy, and what it has learned."""

    name: str


class LoadStats(TypedDict):
    """The progress of loading a checkpoint, in blocks. `nearer`: blocks copied into host memory or to disk so far."""

    blocks: int
    nearer: int
    damaged: int
    too_lossy: int
    is_done: bool
    error: str | None


class SealStats(TypedDict):
    """Counts since the node started: blocks sealed, scrubbed (checked against their seals), and flipped (dropped as damaged).

    `slots_mended`: index slots that were rewritten. `unsealed`: blocks that still wait for a seal.
    """

    sealed: int
    scrubbed: int
    flipped: int
    slots_mended: int
    unsealed: int


class NamespaceStats(TypedDict):
    """A family of namespaces that a node knows: all ranks and epochs of one model under one tenant. `epoch`: its weight epoch."""

    family: str
    weights: str
    tenant: str
    epoch: int


class TenantStats(TypedDict):
    """A tenant's share of a tier. `quota_bytes`: None without a quota."""

    used_bytes: int
    blocks: int
    quota_bytes: int | None


class PairStats(TypedDict):
    """A node's fetches from one peer: blocks, their bytes, the seconds that the transfers took, and failed requests by reason."""

    blocks: int
    bytes: int
    seconds: float
    failures: dict[str, int]
    last_failure: NotRequired[str]
    """The text of the last failure, until a request succeeds again; `last_failure_age_s`: the seconds since then."""
    last_failure_age_s: NotRequired[float]


class PeerStats(TypedDict):
    """A node's transfers with its peers over streams since it started.

    `address`: the address at which its peers reach it; None without streams. `served_blocks`, `served_bytes`: how much it has sent.
    `located`: how many look-ups of the directory it made without Ray. `refused`: how many callers it refused, by reason.
    """

    address: str | None
    peers: dict[str, PairStats]
    fetched_bytes: NotRequired[int]
    """The bytes fetched from all peers, also from those that `peers` no longer lists; `checksum_failures`: damaged blocks among them.

    Both are absent in the figures of an older version.
    """
    checksum_failures: NotRequired[int]
    served_blocks: int
    served_bytes: int
    located: int
    refused: dict[str, int]


NO_PEERS: PeerStats = {"address": None, "peers": {}, "served_blocks": 0, "served_bytes": 0, "located": 0, "refused": {}}
"""The figures of a node without streams."""


class Rates(TypedDict):
    """A node's hits per second, and the bytes in them, over the last `over_s` seconds."""

    over_s: float
    hit_blocks_per_s: float
    hit_bytes_per_s: float


class ServiceStats(TypedDict):
    """How a node has served. `uptime_s`: the seconds since it started. `restarts`: how often it was restarted with the same files.

    `refused_blocks`: how many blocks workers could not store, because no room appeared in time.
    """

    uptime_s: float
    restarts: int
    refused_blocks: int
    rates: Rates


class CeilingStats(TypedDict):
    """What more room would have brought, in blocks since the node started: requested, hit, and hits that other caches would have had.

    `hit_blocks_infinite`: with an infinite cache. `hit_blocks_twice_room`: with twice the room in each tier. Both are estimates.
    """

    asked_blocks: int
    hit_blocks: int
    hit_blocks_infinite: int
    hit_blocks_twice_room: int


class NodeStats(ServiceStats):
    """A node's figures, including all uses by workers so far."""

    node: str
    tiers: dict[str, TierStats]
    blocks: int
    asked_blocks: int
    hit_blocks: int
    prefill_tokens_saved: int
    prefill_seconds_saved: float
    declined_tokens: NotRequired[dict[str, int]]
    """Tokens that workers computed because loading them would have taken longer, by the tier that had them (`peer`: another node).

    Absent in the figures of a node of an older version.
    """
    sessions: int
    reserved_bytes: int
    leaving_bytes: dict[str, int]
    counts: dict[str, int]
    codecs: CodecStats
    too_lossy: dict[str, int]
    policy: PolicyStats
    recording: bool
    filling: LoadStats | None
    saved: dict[str, Any] | None
    """The last complete checkpoint (JSON-ready, as `tiered_kv.checkpoint` describes it); None before the first."""
    seals: SealStats
    namespaces: list[NamespaceStats]
    tenants: dict[str, dict[str, TenantStats]]
    """Each tenant's share of each tier, by tenant and tier."""
    peers: NotRequired[PeerStats]
    """Absent in the figures of a node of an older version, as are the next five."""
    moved_bytes: NotRequired[dict[str, dict[str, int]]]
    """By source and target tier: the bytes that copies between tiers have written."""
    refusals: NotRequired[dict[str, dict[str, int]]]
    """By reason and codec: blocks that were not stored, written or shown."""
    checksum_failures: NotRequired[dict[str, int]]
    """By tier or `peer`: blocks that did not match their checksum."""
    quarantined_extents: NotRequired[int]
    """Extents of ended workers that are not freed yet, because a process may still write to them."""
    ceiling: NotRequired[CeilingStats]
    coordinator: bool | None
    """Whether the coordinator answers; None for a node without one."""


class LiveNode(NodeInfo):
    """A node that the coordinator considers alive: its info and figures, and the age of its last report in seconds."""

    silent_s: float
    directory_blocks: int
    """The number of blocks of this node in the coordinator's directory."""
    stats: NodeStats


class Introduction(TypedDict):
    """A node's answer to a model's introduction: the plan by tier, and the path of the calibration that decoding its blocks needs."""

    plan: dict[str, TierPlan]
    calibration: str | None
