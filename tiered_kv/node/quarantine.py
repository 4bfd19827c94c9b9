"""Quarantine for extents of host memory whose session has ended while a worker may still be writing to them."""

from collections.abc import Mapping

from tiered_kv.memory.locks import locked_ranges
from tiered_kv.tiers.host import HostTier


class ExtentQuarantine:
    """Keeps extents of ended sessions allocated until no process holds a lock on them. Not thread-safe: the engine's lock guards it.

    `arena_fd`: the node's file descriptor of the arena, through which it finds the locks of workers.
    """

    def __init__(self, host: HostTier, arena_fd: int) -> None:
        self._host = host
        self._arena_fd = arena_fd
        self._bytes_by_start: dict[int, int] = {}

    def find_writers(self) -> None:
        """After a restart, claim the free ranges that a worker of the former node is still writing to."""
        for start, nbytes in locked_ranges(self._arena_fd, self._host.extents.free_ranges()):
            self._host.extents.claim(start, nbytes)
            self._bytes_by_start[start] = nbytes

    def abandon(self, reserved: Mapping[int, int]) -> None:
        """Put the extents that an ended session had reserved into quarantine. `reserved` maps payload offsets to bytes."""
        for offset, nbytes in reserved.items():
            start, length = self._host.extent_range(offset, nbytes)
            self._bytes_by_start[start] = length
        self.release()

    def release(self) -> None:
        """Free the extents on which no process holds a lock any more."""
        for start, nbytes in list(self._bytes_by_start.items()):
            if not locked_ranges(self._arena_fd, [(start, nbytes)]):
                self._host.extents.free(start)
                del self._bytes_by_start[start]

    def starts(self) -> list[int]:
        """Returns the offsets in the arena at which the extents in quarantine start."""
        return list(self._bytes_by_start)
