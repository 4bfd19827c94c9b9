"""Holds: blocks that workers asked to keep in memory until some time (`Hint.pinned_s`), up to a fixed share of host memory."""

from collections.abc import Mapping

from tiered_kv.keys import BlockKey

HOLD_SHARE = 1 / 2
"""Share of the host tier's bytes that may be held. A request beyond it is ignored and counted."""


class Holds:
    """Held blocks, each with the time when its hold ends. Their sizes add up to at most `max_bytes`."""

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes = max_bytes
        self._held: dict[BlockKey, tuple[float, int]] = {}
        self._bytes = 0
        self._soonest_s = float("inf")

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def hold(self, bytes_by_key: Mapping[BlockKey, int], until_s: float) -> bool:
        """Hold all of these blocks until `until_s`, or none if they would exceed `max_bytes`. Returns whether they are held.

        A block that is already held keeps the later of the two times.
        """
        new_bytes = sum(nbytes for key, nbytes in bytes_by_key.items() if key not in self._held)
        if self._bytes + new_bytes > self._max_bytes:
            return False
        self._bytes += new_bytes
        self._soonest_s = min(self._soonest_s, until_s)
        for key, nbytes in bytes_by_key.items():
            before_s, nbytes = self._held.get(key, (until_s, nbytes))
            self._held[key] = max(before_s, until_s), nbytes
        return True

    def release(self, key: BlockKey) -> None:
        """End the hold of a block, if it has one."""
        if key in self._held:
            self._bytes -= self._held.pop(key)[1]

    def expire(self, now_s: float) -> None:
        """End all holds whose time is over."""
        if now_s < self._soonest_s:
            return
        for key in [key for key, (until_s, _) in self._held.items() if until_s <= now_s]:
            self.release(key)
        self._soonest_s = min((until_s for until_s, _ in self._held.values()), default=float("inf"))

    def check(self) -> None:
        """Assert that the sum of bytes is right and at most `max_bytes`."""
        assert self._bytes == sum(nbytes for _, nbytes in self._held.values()) <= self._max_bytes
