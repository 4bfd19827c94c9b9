"""What a worker asks of its node: the session. In one process it is called directly, else through `local`.

Reservations belong to their session and end with it, at the latest when its worker dies.
"""

from typing import Protocol

from tiered_kv.keys import BlockKey


class Session(Protocol):
    """The few calls that cannot be answered from shared memory. Every one returns a value; none raises for a full tier."""

    def reserve(self, nbytes: int, keys: list[BlockKey], tail: BlockKey | None) -> list[int]:
        """Payload offsets in the arena for the first of the new blocks `keys`; fewer is back-pressure, none is a refusal.

        `tail` is the parent of the first of these blocks: its chain should not make room for them.
        """

    def commit(self, root: BlockKey, nbytes: int, blocks: list[tuple[BlockKey, BlockKey | None, int]]) -> list[bool]:
        """Make packed blocks (key, parent, offset), root first, visible; False for one that was there already.

        Fewer answers than blocks: there is no room for the others, whose extents are given back.
        """

    def release(self, offsets: list[int]) -> None:
        """Give reserved extents back unused."""

    def pull(self, root: BlockKey, nbytes: int, tail: BlockKey | None, keys: list[BlockKey], wait_s: float) -> int:
        """Fetch the leading blocks of `keys` (`tail`: the parent of the first) from other nodes; how many are here afterwards."""

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        """Have blocks that are on this node, but where the worker cannot read them, in host memory."""

    def hint(self, tail: BlockKey, answer_tokens: int | None, pinned_s: float | None, reuse_within_s: float | None, ended: bool) -> None:
        """The parts of a `Hint` for the chain whose deepest block is `tail`."""

    def locate(self, keys: list[BlockKey]) -> list[list[str]]:
        """For the leading keys that some other node holds: the nodes that do."""

    def stats(self) -> dict:
        """The node's figures."""

    def close(self) -> None:
        """End the session; what it had reserved is given back."""
