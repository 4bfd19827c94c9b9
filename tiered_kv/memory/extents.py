"""Which bytes of an arena are taken: extents of variable size, as pure bookkeeping without any memory.

Best fit with coalescing at once. Among the simple strategies it wastes least here (measured against first fit, worst
fit and segregated fits: `tests/unit/memory/test_extents_churn.py` holds the result); Wilson et al., "Dynamic Storage
Allocation: A Survey and Critical Review" (1995), explain why.
"""

from bisect import bisect_left, insort

from tiered_kv.errors import Kind, TieredKVError

ALIGNMENT = 512
SNUG_SHARE = 1 / 8
_SHIFT = 48
_OFFSET_MASK = (1 << _SHIFT) - 1


class ExtentAllocator:
    """Extents of `capacity_bytes` bytes, at multiples of `alignment` bytes. Not thread-safe.

    Sizes are rounded up to the alignment. Cost: about 2 µs a call, plus a memmove of the list of free extents.
    Contract violations (a size below 1, an offset that is not taken) raise `TieredKVError` (kind `memory`).
    """

    def __init__(self, capacity_bytes: int, alignment: int = ALIGNMENT) -> None:
        if alignment < 1 or capacity_bytes < alignment or capacity_bytes > _OFFSET_MASK:
            raise TieredKVError(Kind.MEMORY, f"an arena of {capacity_bytes} bytes cannot hold extents aligned to {alignment}")
        self.alignment = alignment
        self.capacity_bytes = capacity_bytes // alignment * alignment
        self.used_bytes = 0
        self._taken: dict[int, int] = {}
        self._free: list[int] = []  # size << 48 | offset, ascending: one comparison of ints instead of tuples
        self._size_by_start: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}
        self._add_free(0, self.capacity_bytes)

    def __len__(self) -> int:
        """Number of extents that are taken."""
        return len(self._taken)

    @property
    def free_bytes(self) -> int:
        """Bytes that no extent covers; they may lie in pieces."""
        return self.capacity_bytes - self.used_bytes

    @property
    def largest_free(self) -> int:
        """Bytes of the largest extent that could be allocated now."""
        return self._free[-1] >> _SHIFT if self._free else 0

    def size_of(self, offset: int) -> int:
        """Bytes, rounded up to the alignment, of the extent at `offset`."""
        size = self._taken.get(offset)
        if size is None:
            raise TieredKVError(Kind.MEMORY, f"no extent starts at byte {offset}", offset=offset)
        return size

    def offsets(self) -> list[int]:
        """Where every extent that is taken begins, by address."""
        return sorted(self._taken)

    def free_ranges(self) -> list[tuple[int, int]]:
        """(offset, bytes) of every free range, by address."""
        return sorted(self._size_by_start.items())

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a new extent of `nbytes`, or None if no free range is large enough."""
        size = self._aligned(nbytes)
        offset = self._take(size)
        if offset is not None:
            self._taken[offset] = size
        return offset

    def allocate_apart(self, nbytes: int, floor: int) -> int | None:
        """As `allocate`, for extents that are smaller than others and stay longer; none of them begins before byte `floor`.

        They lie in a free range of about their size, else at the end of the last one that is large enough: so they gather at the
        arena's end, and what comes and goes at its beginning. Cost: O(free ranges).
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
        """Offsets of up to `count` new extents that end before byte `ceiling`, the first ones that fit. Cost: O(free ranges)."""
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
        """Offsets of up to `count` new extents of `nbytes` each, every one to be freed by itself.

        One run of neighbours, aligned(nbytes) apart, where a free range is large enough; else as few runs as possible,
        the longest first. Fewer than `count`, or none, when the arena is full.
        """
        stride = self._aligned(nbytes)
        offsets: list[int] = []
        while (missing := count - len(offsets)) > 0:
            fitting = min(missing, self.largest_free // stride)
            if not fitting:
                break
            start = self._take(fitting * stride)
            run = range(start, start + fitting * stride, stride)
            self._taken.update((offset, stride) for offset in run)
            offsets += run
        return offsets

    def free(self, offset: int) -> None:
        """Give the extent at `offset` back; it merges with free neighbours."""
        size = self._taken.pop(offset, None)
        if size is None:
            raise TieredKVError(Kind.MEMORY, f"no extent starts at byte {offset}; freed twice?", offset=offset)
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
        """Take exactly the extent of `nbytes` at `offset`: a block that was there before a restart, or a quarantine.

        Raises (kind `memory`) when any of it is taken already, or it is not aligned, or out of bounds. Cost: O(1) when
        claims come in ascending order of offsets, else up to O(free ranges).
        """
        size = self._aligned(nbytes)
        for start, length in reversed(self._size_by_start.items()):  # the newest range is the rest behind the last claim
            if start <= offset and offset + size <= start + length and offset % self.alignment == 0:
                self._take_at(start, length, offset, size)
                return
        raise TieredKVError(Kind.MEMORY, f"bytes {offset} to {offset + size} cannot be claimed: taken or out of bounds", offset=offset)

    def check(self) -> None:
        """Recompute everything from the extents that are taken, and compare. Cost: O(n log n)."""
        position, gaps = 0, {}
        for offset, size in sorted(self._taken.items()):
            assert size > 0 and size % self.alignment == 0 and offset % self.alignment == 0, (offset, size)
            assert offset >= position, f"extents overlap at {offset}"
            if offset > position:
                gaps[position] = offset - position
            position = offset + size
        assert position <= self.capacity_bytes, f"an extent ends at {position}, behind the arena"
        if position < self.capacity_bytes:
            gaps[position] = self.capacity_bytes - position
        assert self._size_by_start == gaps
        assert self._start_by_end == {start + size: start for start, size in gaps.items()}
        assert self._free == sorted(size << _SHIFT | start for start, size in gaps.items())
        assert self.used_bytes == sum(self._taken.values()) == self.capacity_bytes - sum(gaps.values())

    def _aligned(self, nbytes: int) -> int:
        if nbytes < 1:
            raise TieredKVError(Kind.MEMORY, f"an extent needs at least 1 byte, not {nbytes}")
        return -(-nbytes // self.alignment) * self.alignment

    def _take_at(self, start: int, length: int, offset: int, size: int) -> int:
        """Take the extent at `offset` out of a free range."""
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
