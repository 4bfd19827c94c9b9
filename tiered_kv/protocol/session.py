"""What a worker asks of its node: the session. In one process it is called directly, else through `local`.

Reservations belong to their session and end with it, at the latest when its worker dies.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from tiered_kv.keys import BlockKey

PROTOCOL = 2
"""Version of what is said over a session's socket; a node and its workers must have the same."""


class Life(NamedTuple):
    """Whose session this is: the identity of the node's files, and which of their writers the node is."""

    identity: int
    generation: int


class Session(Protocol):
    """The few calls that cannot be answered from shared memory. Every one returns a value; none raises for a full tier."""

    @property
    def life(self) -> Life:
        """What the node said of itself when the session began. A worker that maps files of another identity must not use it."""

    def allow(self, wait_s: float) -> None:
        """Have the calls from now on end within `wait_s`, all together. Direct calls bound only what they wait for."""

    def reserve(self, nbytes: int, keys: list[BlockKey], tail: BlockKey | None, wait_s: float | None = None) -> list[int]:
        """Payload offsets in the arena for the first of the new blocks `keys`; fewer is back-pressure, none is a refusal.

        `tail` is the parent of the first of these blocks: its chain should not make room for them. `wait_s` bounds the wait for
        room (None: the node's setting `store_wait_ms`).
        """

    def introduce(self, root: BlockKey, facts: dict[str, Any]) -> dict[str, Any]:
        """Say of which model the blocks below `root` are (`ModelFacts`): they are coded for it from now on.

        Gives the plan by tier, and the path of the calibration that is needed to read them, None for none. Raises (kind `config`)
        where the node's settings ask for what the model does not have.
        """

    def commit(self, root: BlockKey, nbytes: int, blocks: list[tuple]) -> list[bool]:
        """Make packed blocks (key, parent, offset, depth[, digest]), root first, visible; False for one that was there already.

        The depth of a block says how many stand before it in its chain. A digest (`ExtentHeaders.digest`) seals it at once.

        Fewer answers than blocks: there is no room for the others, whose extents are given back.
        """

    def release(self, offsets: list[int]) -> None:
        """Give reserved extents back unused."""

    def pull(self, root: BlockKey, nbytes: int, tail: BlockKey | None, keys: list[BlockKey], depth: int, wait_s: float) -> int:
        """Fetch the leading blocks of `keys` from other nodes; how many are here afterwards.

        `tail`: the parent of the first, before which there are `depth` blocks.
        """

    def doubt(self, keys: list[BlockKey]) -> None:
        """Say that blocks in host memory cannot be read."""

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        """Have blocks that are on this node, but where the worker cannot read them, in host memory."""

    def hint(self, tail: BlockKey, answer_tokens: int | None, pinned_s: float | None, reuse_within_s: float | None, ended: bool) -> None:
        """The parts of a `Hint` for the chain whose deepest block is `tail`."""

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        """For the leading keys that some other node holds: the nodes that do. `wait_s` bounds the wait for the coordinator."""

    def probe(self, root: BlockKey, probe: Sequence[Any]) -> str:
        """Leave the `Probe` of a model whose namespace has this root; the variant of the namespace that it belongs to, "" the first."""

    def stats(self) -> dict:
        """The node's figures."""

    def close(self) -> None:
        """End the session; what it had reserved is given back."""
