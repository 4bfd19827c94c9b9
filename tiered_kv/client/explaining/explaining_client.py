"""A client that can say where blocks are, and why they are misses: the part that clients of prompts and of pages have in common."""

from collections.abc import Sequence
from functools import cached_property

from tiered_kv.blocks import Reason
from tiered_kv.client.access import NodeAccess
from tiered_kv.client.base import NodeClient
from tiered_kv.client.calls import Names
from tiered_kv.client.explaining.finding import Finding
from tiered_kv.client.explaining.miss_notes import MissNotes
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.explanation import Explanation
from tiered_kv.protocol.session import Session

DEADLINE_MARGIN_S = 0.005
"""A fetch that ends so shortly before its deadline was ended by it: each step stops a little earlier than its caller's deadline."""


class ExplainingClient(NodeClient):
    """Asks its node about blocks, and notes which blocks its fetches left out."""

    @cached_property
    def misses(self) -> MissNotes:
        """The blocks that the last fetches did not read although a node may have had them, and why."""
        return MissNotes()

    def _explanation(
        self, access: NodeAccess, names: Names, keys: list[BlockKey], until_s: float, ask_peers: bool = True
    ) -> Explanation | None:
        wait_s = max(until_s - self._clock.now_s(), 0.0)

        def question(session: Session) -> Explanation | None:
            self._tell(access, session, names)
            return session.explain(keys, wait_s, ask_peers)

        return self._ask(access, question, None, wait_s)

    def _finding(self, access: NodeAccess, names: Names, keys: Sequence[BlockKey], until_s: float) -> Finding:
        """Returns what is known of blocks: from the index, from the node, which is asked until `until_s`, and from this client's notes."""
        source = access.source
        slots = source.lookup_all(keys)
        missing = [key for key, slot in zip(keys, slots, strict=True) if slot is None]
        may_ask = missing and source.live and names.mark is not None  # without a mark, the keys may be those of a former epoch
        answer = self._explanation(access, names, missing, until_s) if may_ask else None
        return Finding(keys, slots, answer, self.layout.block_tokens, not source.live, self.misses, self._clock.now_s())

    def _note_misses(self, keys: list[BlockKey], read: int, deadline_s: float, is_declined: bool = False) -> None:
        """Note for `explain` why the blocks after the first `read` ones were not read. Forget the notes of the others.

        `keys`: all blocks that the fetch asked for. The reason is the deadline if it has passed, else that the rest `is_declined`.
        Other blocks get no note: the node knows better why they are misses.
        """
        if self.misses:
            self.misses.settle(keys[:read])
        if read == len(keys):
            return
        now_s = self._clock.now_s()
        if now_s >= deadline_s - DEADLINE_MARGIN_S:
            self.misses.note(keys[read:], Reason.DEADLINE, now_s)
        elif is_declined:
            self.misses.note(keys[read:], Reason.DECLINED, now_s)
