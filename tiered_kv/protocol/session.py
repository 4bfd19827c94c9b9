"""The session: a worker's calls to its node. Within one process they are direct calls, else they go through `unix_socket`.

Reservations belong to their session and end with it, at the latest when its worker dies.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.explanation import Explanation, KnownNamespace
from tiered_kv.protocol.messages import BlockRun, Introduction, NodeStats, PackedBlock

PROTOCOL = 3
"""Version of the messages on a session's socket. A node and its workers must use the same version."""


class Life(NamedTuple):
    """One life of a node: the `identity` of its files, and the `generation` of their writer, which grows with each restart."""

    identity: int
    generation: int


class Session(Protocol):
    """A worker's calls to its node, for what shared memory cannot do. A lack of room shows in the returned value, not as an exception."""

    @property
    def life(self) -> Life:
        """The node's life when the session started. A worker that maps files of another identity must not use the session."""

    def allow(self, wait_s: float) -> None:
        """Bound all later calls together: they end within `wait_s`. Within one process, only waiting inside a call is bounded."""

    def reserve(self, nbytes: int, keys: list[BlockKey], parent: BlockKey | None, wait_s: float | None = None) -> list[int]:
        """Reserve extents for the new blocks `keys`. Returns their payload offsets in the arena, for the leading blocks.

        Fewer offsets than keys mean that room is short, and [] means that there is none. `parent`: the parent of the first block, or
        None. Blocks of the parent's chain should not be evicted for the new blocks. `wait_s` bounds the wait for room (None: the
        node's setting `store_wait_ms`).
        """

    def introduce(self, root: BlockKey, info: dict[str, Any]) -> Introduction:
        """Describe the model of the blocks below `root` (`ModelInfo.as_message`). From now on, these blocks are encoded for the model.

        Returns the plan by tier, and the path of the calibration that decoding the blocks needs (None: no calibration). Raises
        (kind `config`) if the node's settings require a calibration that the model lacks.
        """

    def commit(self, root: BlockKey, nbytes: int, blocks: list[PackedBlock]) -> list[bool]:
        """Make packed blocks visible. Each is (key, parent, offset, depth[, digest]), and parents must be before their children.

        `nbytes`: the bytes of each block. The depth of a block is the number of its ancestors. A digest
        (`ExtentHeaders.digest`) seals the block at once. Returns for each block whether it is new: False if it was stored already.
        If the list is shorter than `blocks`, the rest was not stored and its extents are freed: the index has no room, or the weights
        have ended.
        """

    def release(self, offsets: list[int]) -> None:
        """Free reserved extents that will not be used."""

    def pull(self, run: BlockRun, wait_s: float) -> int:
        """Fetch the leading blocks of `run` from other nodes. Returns how many of them this node has afterwards."""

    def doubt(self, keys: list[BlockKey]) -> None:
        """Report blocks in host memory that the worker could not read."""

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        """Have the node load blocks into host memory from tiers that the worker cannot read itself. Waits at most `wait_s`."""

    def hint(
        self, last_block: BlockKey, answer_tokens: int | None, pinned_s: float | None, reuse_within_s: float | None, ended: bool
    ) -> None:
        """Pass on the fields of a `Hint` about the chain whose deepest block is `last_block`."""

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        """Returns the nodes that hold each key, for the leading keys that other nodes hold.

        `wait_s` bounds the wait for the coordinator.
        """

    def explain(self, keys: list[BlockKey], wait_s: float, ask_peers: bool) -> Explanation:
        """Returns where blocks are, or why they are gone. Waits at most `wait_s` for the coordinator and the peers.

        `ask_peers`: whether other nodes are asked too for blocks that they had.
        """

    def namespaces(self, tenant: str) -> list[KnownNamespace]:
        """Returns the namespaces of a tenant that workers of the node have introduced, the newest first. Ask for your own tenant only."""

    def probe(self, root: BlockKey, probe: Sequence[Any]) -> str:
        """Register the `Probe` of a model whose namespace has this root. Returns the model's variant. The first variant is ""."""

    def salt(self, tenant: str) -> str:
        """Returns the salt of a tenant's namespaces in this cluster, or "" if they have none."""

    def new_epoch(self, families: list[bytes], keep: bool) -> tuple[int, list[str]]:
        """Raise the weight epochs of families of namespaces on all nodes.

        Returns the new number, and the names of the nodes that did not confirm it in time.

        Raises (kind `transport`), with nothing changed, if the coordinator does not answer.
        """

    def stats(self) -> NodeStats:
        """Returns the node's figures."""

    def close(self) -> None:
        """End the session. Its reserved extents are freed."""
