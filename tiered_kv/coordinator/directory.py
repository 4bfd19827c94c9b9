"""The coordinator's directory: the nodes that hold each block. Eventually consistent; a wrong entry costs a miss.

It keeps pairs of block and node in hash tables. A table has two arrays: 8 bytes a pair for the hash of the block's key, and 4
bytes for the node's number. A table is at most 2/3 full, so a pair takes 18 to 36 bytes (a dict of sets takes 200). Two keys
with equal hashes would share their nodes, which costs a useless request. With 10 million blocks, that happens in at most one of
a million look-ups.

A node gets a new number whenever it joins, and its former number becomes invalid. So dropping a node costs nothing, however many blocks
it held. Its entries are overwritten later, or left out when a table grows. Until then they tell which blocks a lost node had. The keys
are spread over many small tables, so that no report waits long for a table to grow.
"""

from array import array
from collections.abc import Iterable

from tiered_kv.keys import BlockKey

TABLES = 256
LOST_MAX = 1024
SLOTS_MIN = 16
FULL_PART = 2 / 3
REBUILT_PART = 1 / 2
"""A table that was rebuilt is at most half full."""
_HASH_MASK = (1 << 64) - 1
_VOID = 0
"""The node number in a slot without a pair. The slot is free if its hash is 0 too; otherwise its pair was removed."""


class _Table:
    """A hash table of pairs (hash of a key, number of a node), with open addressing and linear probing."""

    __slots__ = ("hashes", "numbers", "used")

    def __init__(self, slots: int = SLOTS_MIN) -> None:
        self.hashes = array("Q", bytes(8 * slots))
        self.numbers = array("I", bytes(4 * slots))
        self.used = 0  # slots that are not free, removed pairs included

    def find(self, hash_: int) -> list[int]:
        """Returns the numbers of all pairs with this hash."""
        hashes = self.hashes
        mask = len(hashes) - 1
        at = hash_ & mask
        found: list[int] = []
        while present := hashes[at]:
            if present == hash_:
                found.append(self.numbers[at])
            at = (at + 1) & mask
        return found

    def add(self, hash_: int, number: int, valid: Iterable[int]) -> bool:
        """Add a pair. Returns whether it is new. It may overwrite a pair whose number is not in `valid`."""
        hashes, numbers = self.hashes, self.numbers
        mask = len(hashes) - 1
        at, reusable = hash_ & mask, -1
        while present := hashes[at]:
            if present == hash_ and numbers[at] == number:
                return False
            if reusable < 0 and numbers[at] not in valid:
                reusable = at
            at = (at + 1) & mask
        if reusable < 0:
            reusable = at
            self.used += 1
        hashes[reusable], numbers[reusable] = hash_, number
        if self.used > FULL_PART * len(hashes):
            self.rebuild(valid)
        return True

    def remove(self, hash_: int, number: int) -> bool:
        """Remove a pair. Returns whether the table had it."""
        hashes = self.hashes
        mask = len(hashes) - 1
        at = hash_ & mask
        while present := hashes[at]:
            if present == hash_ and self.numbers[at] == number:
                self.numbers[at] = _VOID
                return True
            at = (at + 1) & mask
        return False

    def rebuild(self, valid: Iterable[int]) -> None:
        """Rebuild the table without the pairs whose number is not in `valid`, in a size for the remaining pairs."""
        pairs = [pair for pair in zip(self.hashes, self.numbers, strict=True) if pair[1] in valid]
        slots = SLOTS_MIN
        while slots * REBUILT_PART < len(pairs):
            slots *= 2
        self.__init__(slots)  # type: ignore[misc]
        mask, hashes, numbers = slots - 1, self.hashes, self.numbers
        for hash_, number in pairs:
            at = hash_ & mask
            while hashes[at]:
                at = (at + 1) & mask
            hashes[at], numbers[at] = hash_, number
        self.used = len(pairs)

    @property
    def nbytes(self) -> int:
        """The bytes of both arrays."""
        return len(self.hashes) * (self.hashes.itemsize + self.numbers.itemsize)


class Directory:
    """Maps block keys to the nodes that hold them. Not thread-safe. A call takes about 1 µs a key, however many keys are stored."""

    def __init__(self) -> None:
        self._tables = [_Table() for _ in range(TABLES)]
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._counts: dict[str, int] = {}
        self._lost: dict[int, str] = {}  # by former number: the nodes that were lost, whose entries are not overwritten yet
        self._last_number = _VOID

    def __len__(self) -> int:
        """The number of pairs of a block and a node that holds it."""
        return sum(self._counts.values())

    @property
    def nbytes(self) -> int:
        """The memory of all entries, in bytes."""
        return sum(table.nbytes for table in self._tables)

    def add_node(self, node: str) -> None:
        """Add `node` with no blocks. Drops all earlier entries of the node."""
        self.drop_node(node)
        self._last_number += 1
        self._numbers[node] = self._last_number
        self._names[self._last_number] = node
        self._counts[node] = 0

    def drop_node(self, node: str) -> None:
        """Remove `node` and all its entries."""
        self.lose_node(node)
        self._lost = {number: name for number, name in self._lost.items() if name != node}

    def lose_node(self, node: str) -> None:
        """Remove a node that does not answer. `everywhere` still finds its entries until other blocks overwrite them."""
        number = self._numbers.pop(node, None)
        if number is not None:
            self._lost[number] = self._names.pop(number)
            del self._counts[node]
        while len(self._lost) > LOST_MAX:
            del self._lost[next(iter(self._lost))]

    def update(self, node: str, added: Iterable[BlockKey], removed: Iterable[BlockKey]) -> None:
        """Record that `node` now holds the blocks `added`, and no longer holds `removed`."""
        number, tables, names = self._numbers[node], self._tables, self._names
        change = 0
        for key in removed:
            hash_ = hash(key) & _HASH_MASK or 1
            change -= tables[hash_ >> 56].remove(hash_, number)
        for key in added:
            hash_ = hash(key) & _HASH_MASK or 1
            change += tables[hash_ >> 56].add(hash_, number, names)
        self._counts[node] += change

    def locate(self, keys: Iterable[BlockKey], asker: str) -> list[list[str]]:
        """Returns, for each key, the nodes except `asker` that hold its block. Stops before the first key that no such node holds."""
        found: list[list[str]] = []
        tables, names = self._tables, self._names
        for key in keys:
            hash_ = hash(key) & _HASH_MASK or 1
            holders = [names[number] for number in tables[hash_ >> 56].find(hash_) if number in names and names[number] != asker]
            if not holders:
                break
            found.append(holders)
        return found

    def everywhere(self, keys: Iterable[BlockKey], asker: str) -> tuple[dict[BlockKey, list[str]], dict[BlockKey, list[str]]]:
        """Returns two dicts: for each block, the nodes except `asker` that have it, and the lost nodes that had it.

        Lacks blocks without nodes.
        """
        found: tuple[dict[BlockKey, list[str]], dict[BlockKey, list[str]]] = ({}, {})
        for key in keys:
            hash_ = hash(key) & _HASH_MASK or 1
            numbers = self._tables[hash_ >> 56].find(hash_)
            for by_key, names in zip(found, (self._names, self._lost), strict=True):
                holders = [names[number] for number in numbers if number in names and names[number] != asker]
                if holders:
                    by_key[key] = holders
        return found

    def count(self, node: str) -> int:
        """Returns the number of blocks that `node` holds."""
        return self._counts.get(node, 0)

    def check(self) -> None:
        """Assert that counts, names and tables agree, and that every pair can be found."""
        counts = dict.fromkeys(self._numbers, 0)
        for place, table in enumerate(self._tables):
            assert len(table.hashes) == len(table.numbers)
            assert table.used == sum(1 for hash_ in table.hashes if hash_) < len(table.hashes)
            for hash_, number in zip(table.hashes, table.numbers, strict=True):
                if number in self._names:
                    assert hash_ >> 56 == place and table.find(hash_).count(number) == 1
                    counts[self._names[number]] += 1
        assert counts == self._counts
        assert {node: number for number, node in self._names.items()} == self._numbers
