"""Allocation of extents of variable size in an arena. Pure bookkeeping: it touches no memory.

The strategy is best fit. A freed extent merges with free neighbours at once. Of the simple strategies, best fit wastes least here
(measured against first fit, worst fit and segregated fits: see `tests/unit/memory/test_extents_churn.py`). Wilson et al., "Dynamic Storage
Allocation: A Survey and Critical Review" (1995), explain why.
"""

from bisect import bisect_left, insort

from tiered_kv.errors import Kind, TieredKVError

ALIGNMENT = 512
SNUG_SHARE = 1 / 8
_SHIFT = 48
_OFFSET_MASK = (1 << _SHIFT) - 1


class ExtentAllocator:
    """Allocates extents in an arena of `capacity_bytes`, at multiples of `alignment` bytes. Not thread-safe.

    Sizes are rounded up to the alignment. Cost: about 2 µs a call, plus a memmove of the list of free ranges.
    Misuse (a size below 1, an offset that is not allocated) raises `TieredKVError` (kind `memory`).
    """

    def __init__(self, capacity_bytes: int, alignment: int = ALIGNMENT) -> None:
        if alignment < 1 or capacity_bytes < alignment or capacity_bytes > _OFFSET_MASK:
            raise TieredKVError(
                Kind.MEMORY,
                f"arena: capacity_bytes must be from alignment ({alignment}, at least 1) to {_OFFSET_MASK}, got {capacity_bytes}",
            )
        self.alignment = alignment
        self.capacity_bytes = capacity_bytes // alignment * alignment
        self.used_bytes = 0
        self._taken: dict[int, int] = {}
        self._free: list[int] = []  # size << 48 | offset, ascending: one comparison of ints instead of tuples
        self._size_by_start: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}
        self._add_free(0, self.capacity_bytes)

    def __len__(self) -> int:
        """Number of allocated extents."""
        return len(self._taken)

    @property
    def free_bytes(self) -> int:
        """Bytes that are free; they may be in several ranges."""
        return self.capacity_bytes - self.used_bytes

    @property
    def largest_free(self) -> int:
        """Bytes of the largest extent that could be allocated now."""
        return self._free[-1] >> _SHIFT if self._free else 0

    def size_of(self, offset: int) -> int:
        """Returns the bytes of the extent at `offset`, rounded up to the alignment."""
        size = self._taken.get(offset)
        if size is None:
            raise TieredKVError(Kind.MEMORY, f"size_of: offset must be that of an allocated extent, got {offset}", offset=offset)
        return size

    def offsets(self) -> list[int]:
        """Returns the offsets of all allocated extents, in ascending order."""
        return sorted(self._taken)

    def free_ranges(self) -> list[tuple[int, int]]:
        """Returns (offset, bytes) of every free range, in ascending order of offsets."""
        return sorted(self._size_by_start.items())

    def allocate(self, nbytes: int) -> int | None:
        """Allocate an extent of `nbytes`. Returns its offset, or None if no free range is large enough."""
        size = self._aligned(nbytes)
        offset = self._take(size)
        if offset is not None:
            self._taken[offset] = size
        return offset

    def allocate_apart(self, nbytes: int, floor: int) -> int | None:
        """Allocate a small, long-lived extent at byte `floor` or above. Returns its offset, or None if no free range is large enough.

        Takes a free range of about this size, else the end of the last range that is large enough. So these extents gather at
        the arena's end, and short-lived extents at its beginning. Cost: O(free ranges).
        """
        size = self._aligned(nbytes)
        snug_bytes = size + int(size * SNUG_SHARE)
        fitting = [(start, length) for start, length in self._size_by_start.items() if length >= size and start + length - size >= floor]
        if not fitting:
            return None
        snug = [each for each in fitting if each[1] <= snug_bytes and each[0] >= floor]
        start, length = min(snug, key=lambda each: each[1]) if snug else max(fitting)
        return self._take_at(start, length, start if snug else start + length - size, size)

    def allocate_below(self, nbytes: int, count: int, ceiling: int) -> list[int]:
        """Allocate up to `count` extents that end at byte `ceiling` or below, first fit. Returns their offsets. Cost: O(free ranges)."""
        stride = self._aligned(nbytes)
        offsets: list[int] = []
        for start in sorted(start for start in self._size_by_start if start < ceiling):
            while len(offsets) < count and start in self._size_by_start and start + stride <= ceiling:
                length = self._size_by_start[start]
                if length < stride:
                    break
                offsets.append(self._take_at(start, length, start, stride))
                start += stride
        return offsets

    def allocate_run(self, nbytes: int, count: int) -> list[int]:
        """Allocate up to `count` extents of `nbytes` each; each is freed separately. Returns their offsets.

        The extents are neighbours, aligned(nbytes) apart, if one free range is large enough; else in as few runs as possible, the
        longest first. Returns fewer than `count`, or [], when the arena is full.
        """
        stride = self._aligned(nbytes)
        offsets: list[int] = []
        while (missing := count - len(offsets)) > 0:
            fitting = min(missing, self.largest_free // stride)
            if not fitting:
                break
            start = self._take(fitting * stride)
            assert start is not None, "the largest free range is large enough"
            run = range(start, start + fitting * stride, stride)
            self._taken.update((offset, stride) for offset in run)
            offsets += run
        return offsets

    def free(self, offset: int) -> None:
        """Free the extent at `offset`. It merges with free neighbours."""
        size = self._taken.pop(offset, None)
        if size is None:
            raise TieredKVError(
                Kind.MEMORY, f"free: offset must be that of an allocated extent, got {offset}; was it freed twice?", offset=offset
            )
        self.used_bytes -= size
        after = self._size_by_start.get(offset + size)
        if after is not None:
            self._remove_free(offset + size, after)
            size += after
        before = self._start_by_end.get(offset)
        if before is not None:
            self._remove_free(before, offset - before)
            size += offset - before
            offset = before
        self._add_free(offset, size)

    def claim(self, offset: int, nbytes: int) -> None:
        """Allocate exactly `nbytes` at `offset`: for a block found after a restart, or a range in quarantine.

        Raises (kind `memory`) if the range overlaps an extent, is not aligned, or is out of bounds. Cost: O(1) if claims
        are made in ascending order of offsets, else up to O(free ranges).
        """
        size = self._aligned(nbytes)
        for start, length in reversed(self._size_by_start.items()):  # the newest range is the rest after the last claim
            if start <= offset and offset + size <= start + length and offset % self.alignment == 0:
                self._take_at(start, length, offset, size)
                return
        raise TieredKVError(Kind.MEMORY, f"claim: bytes {offset} to {offset + size} must be free, aligned and in the arena", offset=offset)

    def check(self) -> None:
        """Recompute everything from the allocated extents, and compare. Cost: O(n log n)."""
        position, gaps = 0, {}
        for offset, size in sorted(self._taken.items()):
            assert size > 0 and size % self.alignment == 0 and offset % self.alignment == 0, (offset, size)
            assert offset >= position, f"extents overlap at {offset}"
            if offset > position:
                gaps[position] = offset - position
            position = offset + size
        assert position <= self.capacity_bytes, f"an extent ends at {position}, after the arena's end"
        if position < self.capacity_bytes:
            gaps[position] = self.capacity_bytes - position
        assert self._size_by_start == gaps
        assert self._start_by_end == {start + size: start for start, size in gaps.items()}
        assert self._free == sorted(size << _SHIFT | start for start, size in gaps.items())
        assert self.used_bytes == sum(self._taken.values()) == self.capacity_bytes - sum(gaps.values())

    def _aligned(self, nbytes: int) -> int:
        if nbytes < 1:
            raise TieredKVError(Kind.MEMORY, f"extent: nbytes must be at least 1, got {nbytes}")
        return -(-nbytes // self.alignment) * self.alignment

    def _take_at(self, start: int, length: int, offset: int, size: int) -> int:
        """Allocate the extent at `offset` from a free range."""
        self._remove_free(start, length)
        self._split(start, length, offset, size)
        self._taken[offset] = size
        return offset

    def _take(self, size: int) -> int | None:
        at = bisect_left(self._free, size << _SHIFT)
        if at == len(self._free):
            return None
        found = self._free[at]
        start, length = found & _OFFSET_MASK, found >> _SHIFT
        self._remove_free(start, length, at)
        self._split(start, length, start, size)
        return start

    def _split(self, start: int, length: int, offset: int, size: int) -> None:
        if offset > start:
            self._add_free(start, offset - start)
        if offset + size < start + length:
            self._add_free(offset + size, start + length - offset - size)
        self.used_bytes += size

    def _add_free(self, start: int, length: int) -> None:
        self._size_by_start[start] = length
        self._start_by_end[start + length] = start
        insort(self._free, length << _SHIFT | start)

    def _remove_free(self, start: int, length: int, at: int | None = None) -> None:
        del self._size_by_start[start]
        del self._start_by_end[start + length]
        del self._free[bisect_left(self._free, length << _SHIFT | start) if at is None else at]
