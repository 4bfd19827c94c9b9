"""The coordinator's directory: the nodes that hold each block. Eventually consistent; a wrong entry costs a miss."""

from collections.abc import Iterable

from tiered_kv.keys import BlockKey


class Directory:
    """Maps block keys to the nodes that hold them. Takes about 200 bytes for each pair of key and node. Not thread-safe."""

    def __init__(self) -> None:
        self._holders: dict[BlockKey, tuple[str, ...]] = {}
        self._keys: dict[str, set[BlockKey]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def add_node(self, node: str) -> None:
        """Add `node` with no blocks. Drops all earlier entries of the node."""
        self.drop_node(node)
        self._keys[node] = set()

    def drop_node(self, node: str) -> None:
        """Remove `node` and all its entries."""
        self.update(node, (), list(self._keys.get(node, ())))
        self._keys.pop(node, None)

    def update(self, node: str, added: Iterable[BlockKey], removed: Iterable[BlockKey]) -> None:
        """Record that `node` now holds the blocks `added`, and no longer holds `removed`."""
        for key in removed:
            if key in self._keys[node]:
                self._keys[node].remove(key)
                rest = tuple(holder for holder in self._holders[key] if holder != node)
                if rest:
                    self._holders[key] = rest
                else:
                    del self._holders[key]
        for key in added:
            if key not in self._keys[node]:
                self._keys[node].add(key)
                self._holders[key] = (*self._holders.get(key, ()), node)

    def locate(self, keys: Iterable[BlockKey], asker: str) -> list[list[str]]:
        """Returns the nodes that hold each key, for the leading `keys` that nodes other than `asker` hold."""
        found: list[list[str]] = []
        for key in keys:
            holders = [node for node in self._holders.get(key, ()) if node != asker]
            if not holders:
                break
            found.append(holders)
        return found

    def count(self, node: str) -> int:
        """Returns the number of blocks that `node` holds."""
        return len(self._keys.get(node, ()))

    def check(self) -> None:
        """Assert that both mappings contain the same pairs of key and node."""
        both = {(key, node) for key, nodes in self._holders.items() for node in nodes}
        assert both == {(key, node) for node, keys in self._keys.items() for key in keys}
        assert all(self._holders.values())
