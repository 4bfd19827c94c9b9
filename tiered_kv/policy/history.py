"""What a node knows of the past of its blocks, whichever tier they are in, and of those it gave up.

One `History` a node. The store machine tells it every use once; policies that learn (adaptive) rank by it, and the
machine asks it for evidence of reuse before it spends a write.
"""

from collections.abc import Sequence

from tiered_kv.policy.base import Key


class History:
    """Uses of blocks, resident or not. This one remembers nothing: for policies that keep what they need themselves."""

    def seen(self, keys: Sequence[Key], parent: Key | None, now_s: float) -> None:
        """A request used this run of one chain, root first, behind `parent`: fetched it, or stored it for the first time.

        Tell it before `EvictionPolicy.use` and `add` of the same blocks, and once a request for each block.
        """

    def uses(self, key: Key) -> int:
        """How often the block was seen, as far as is remembered; 0: never."""
        return 0

    def chance(self, key: Key, ahead: float) -> float:
        """How likely the block is used again within `ahead` times as long as it has not been used, as far as was learned."""
        return 0.0

    def hint(
        self,
        tail: Key,
        now_s: float,
        *,
        answer_tokens: int | None = None,
        reuse_within_s: float | None = None,
        ended: bool = False,
    ) -> None:
        """What the worker knows of the request whose deepest block is `tail`: how long the answer was, when it
        expects the chain to be used again, or that nobody will."""

    def check(self) -> None:
        """Assert that what is kept in two places agrees. Slow; for tests."""
