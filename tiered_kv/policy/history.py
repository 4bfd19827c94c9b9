"""The history of a node's blocks: past uses of blocks in any tier, and of evicted blocks.

Each node has one `History`. The store machine reports every use to it once. Policies that learn (adaptive) rank blocks by it,
and the machine asks it for evidence of reuse before it spends a write.
"""

from collections.abc import Sequence

from tiered_kv.policy.base import Key


class History:
    """The base class of histories. It remembers nothing itself, which is enough for policies that store what they need themselves."""

    def seen(self, keys: Sequence[Key], parent: Key | None, now_s: float) -> None:
        """Records that a request used consecutive blocks of a chain, ancestors first. `parent` is the parent of the first of them.

        A use is a fetch, or the first store. Call this once for each block and request, before `EvictionPolicy.use` or `add`.
        """

    def uses(self, key: Key) -> int:
        """Returns how many uses of the block are remembered, 0 for none."""
        return 0

    def chance(self, key: Key, ahead: float) -> float:
        """Returns the estimated probability that the block is used again soon.

        Soon means within `ahead` times the time since its last use.
        """
        return 0.0

    def hint(
        self,
        last_block: Key,
        now_s: float,
        *,
        answer_tokens: int | None = None,
        reuse_within_s: float | None = None,
        ended: bool = False,
    ) -> None:
        """Records what the worker knows of the request whose deepest block is `last_block`.

        `answer_tokens`: number of tokens in the answer. `reuse_within_s`: the worker expects the next use of the chain within
        this time. `ended`: the chain will not be used again.
        """

    def check(self) -> None:
        """Asserts that redundant state is consistent. Slow; for tests."""
