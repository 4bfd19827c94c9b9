"""Opens a node in this process for a library cache: computes the bytes of memory for `max_tokens`, and creates the clients."""

import os
import threading
from typing import Any

from tiered_kv.client.client import Client
from tiered_kv.client.profile import Profile
from tiered_kv.clock import Clock
from tiered_kv.embedded import Embedded
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.library.config import KVCacheConfig
from tiered_kv.node.node import Node
from tiered_kv.node.sizing import extent_bytes, host_bytes_for


class EmbeddedCache:
    """A node with memory for `max_tokens` tokens of the first layout, and a client for each layout and namespace. Thread-safe."""

    def __init__(self, config: KVCacheConfig, layout: KVLayout, clock: Clock | None = None, profile: Profile | None = None) -> None:
        blocks = config.max_tokens // layout.block_tokens
        if not blocks:
            message = f"max_tokens {config.max_tokens} has no room for {layout.block_tokens} tokens, the size of one block"
            raise TieredKVError(Kind.CONFIG, message, setting="max_tokens")
        wanted_bytes = blocks * extent_bytes(layout.block_bytes)
        self._embedded = Embedded(config.engine_config(host_bytes_for(wanted_bytes)), clock)
        self._profile = profile
        self._lock = threading.Lock()
        self._clients: dict[tuple[KVLayout, Namespace], Client] = {}
        self._ballast = self.node.open_session()
        if config.codec is None:
            self._withhold(wanted_bytes)

    @property
    def node(self) -> Node:
        """The node of this process."""
        return self._embedded.node

    def _withhold(self, wanted_bytes: int) -> None:
        """Reserve the arena's memory beyond `wanted_bytes`, so that no block can use it. So `max_tokens` is a hard cap."""
        spare_bytes = self.node.storage.host.capacity_bytes - wanted_bytes
        if spare_bytes >= extent_bytes(1):
            self._ballast.reserve(spare_bytes - extent_bytes(0), [os.urandom(KEY_BYTES)], None)

    @property
    def withheld_bytes(self) -> int:
        """The bytes of memory that `_withhold` has reserved, so that no block uses them."""
        return sum(map(extent_bytes, self._ballast.reserved.values()))

    def client(self, layout: KVLayout, namespace: Namespace, **rope: Any) -> Client:
        """Returns the client of a layout and namespace. The first call creates the client, with `rope` as for `Embedded.client`."""
        with self._lock:
            client = self._clients.get((layout, namespace))
            if client is None:
                client = self._clients[layout, namespace] = self._embedded.client(layout, namespace, **rope)
                if self._profile is not None:
                    client.measure(self._profile.timed)
            return client

    def client_stats(self, name: str) -> float:
        """Returns the sum of one statistic over all clients. A client without this statistic counts as 0."""
        with self._lock:
            return sum(client.own_stats().get(name) or 0 for client in self._clients.values())

    def forget(self, namespace: Namespace) -> None:
        """Drop all blocks of a namespace."""
        with self._lock:
            ours = [key for key in self._clients if key[1] == namespace]
        for layout, _ in ours:
            self.node.forget(namespace.root(layout))

    def settle(self) -> None:
        """Wait until the node has counted all uses of blocks and finished all moves between tiers."""
        self.node.engine.drain_touches()
        self.node.engine.settle()

    def check(self) -> None:
        """Assert that the node's data structures are consistent."""
        self.settle()
        self.node.check()

    def close(self) -> None:
        """Close all clients and the node, and free its memory. A second call does nothing."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()
        self._embedded.close()
