"""The blocks and nodes that `bench checkpoint` uses. The nodes run in this process."""

import uuid
from collections.abc import Sequence
from threading import Event
from typing import NamedTuple

import numpy as np
import torch

from tiered_kv.checkpoint import restore
from tiered_kv.checkpoint.call_nodes import calls_to
from tiered_kv.checkpoint.repository import open_repository
from tiered_kv.checkpoint.take import CheckpointJob, CheckpointResult
from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, Namespace, as_token_ids
from tiered_kv.layout import KVLayout
from tiered_kv.node.checkpoints.steps import LoadProgress
from tiered_kv.node.node import Node
from tiered_kv.protocol.unix_socket import SessionServer
from tiered_kv.tiers.host import HEADER_BYTES

NODE = "bench"
CHAIN = 8
POLL_S = 0.005
"""Seconds between two polls of a checkpoint or restore.

The cache's default of 0.1 s would add waiting to the measured time.
"""
CONTENT_BYTES = 64 << 20


class BenchChains:
    """Chains of `CHAIN` blocks of one layout. Each chain has its own prompt and keys. Some chains have equal KV."""

    def __init__(self, layout: KVLayout, weights: str = "tiered-kv bench checkpoint") -> None:
        self.layout = layout
        self.namespace = Namespace(weights=weights)
        self._chain_bytes = layout.block_bytes * CHAIN
        items = max(2 * self._chain_bytes, CONTENT_BYTES) // 8
        self._content = torch.randint(-(1 << 62), 1 << 62, (items,), dtype=torch.int64, generator=torch.Generator().manual_seed(1))

    @property
    def tokens(self) -> int:
        """The number of tokens in one chain."""
        return self.layout.block_tokens * CHAIN

    def chains(self, nbytes: int) -> int:
        """Returns the number of chains in `nbytes`, at least one."""
        return max(1, nbytes // self._chain_bytes)

    def prompt(self, number: int) -> torch.Tensor:
        """Returns the token ids of a chain."""
        return torch.from_numpy(np.random.default_rng([self.layout.block_bytes, number]).integers(0, 100_000, self.tokens))

    def kv(self, number: int) -> torch.Tensor:
        """Returns the KV of a chain."""
        items = self._chain_bytes // 8
        start = number % (len(self._content) // items) * items
        flat = self._content[start : start + items].view(self.layout.torch_dtype)
        return flat.view(self.layout.kv_shape(self.tokens))

    def keys(self, number: int) -> list[BlockKey]:
        """Returns the keys of a chain's blocks."""
        return self.namespace.chain(self.layout).keys(as_token_ids(self.prompt(number)))

    def raw(self, number: int, depth: int) -> torch.Tensor:
        """Returns the raw bytes of one block, as they are stored."""
        t = self.layout.block_tokens
        part = self.kv(number)[..., depth * t : (depth + 1) * t, :]
        return part.contiguous().view(-1).view(torch.uint8)

    def bodies(self, sizes: Sequence[int]) -> list[bytes]:
        """Returns one bytes object of each size. Large ones repeat a pattern inside, because their content does not matter."""
        content = self._content.view(torch.uint8).numpy()
        return [
            np.resize(np.roll(content, -(number << 20)) if size > 1 << 20 else content[:size], size).tobytes()
            for number, size in enumerate(sizes)
        ]

    def store(self, client: Client, numbers: Sequence[int]) -> None:
        """Store the chains with these numbers. Raises (kind `storage`) if a chain was not stored whole."""
        for number in numbers:
            if client.store(self.prompt(number), self.kv(number)).new != CHAIN:
                raise TieredKVError(Kind.STORAGE, f"chain {number} was not stored whole")

    def check(self, client: Client, number: int) -> None:
        """Fetch a chain. Raises (kind `corrupt`) unless all of its tokens hit and their KV equals the stored KV."""
        out = torch.empty(self.layout.kv_shape(self.tokens), dtype=self.layout.torch_dtype)
        fetched = client.fetch(self.prompt(number), out, deadline_ms=60_000)
        if fetched.tokens != self.tokens or not torch.equal(out.view(torch.int16), self.kv(number).view(torch.int16)):
            raise TieredKVError(
                Kind.CORRUPT,
                f"chain {number}: expected {self.tokens} tokens equal to the stored ones, got {fetched.tokens} tokens or other values",
            )


class BenchNode:
    """A node in this process that also serves workers in other processes. The caller must close it."""

    def __init__(self, host_bytes: int) -> None:
        self.node = Node(Config(host=host_bytes, store_wait_ms=10_000), f"bench-{uuid.uuid4().hex[:8]}", NODE)
        self._server = SessionServer(f"{self.node.directory}/sock", self.node.open_session, self.node.report_commits)
        self._call = calls_to(self.node)

    def client(self, blocks: BenchChains) -> Client:
        """Returns a client of the node in this process."""
        return client_of(self.node.info(), blocks.layout, blocks.namespace, connect=self.node.open_session)

    def touch(self) -> None:
        """Write to all host memory, so that the system has allocated it, as in a node that has been used."""
        host = self.node.storage.host
        host.payload(HEADER_BYTES, host.capacity_bytes - HEADER_BYTES).zero_()

    def take(self, url: str, stopped: Event | None = None) -> CheckpointResult:
        """Write a checkpoint of all blocks. Returns the checkpoint's counts."""
        with open_repository(url) as repository:
            return CheckpointJob(self._call, [NODE], repository, origin=NODE, poll_s=POLL_S, stopped=stopped).take()

    def mount(self, url: str) -> int:
        """Read the manifest of the latest checkpoint and mount its blocks. Returns the number of mounted blocks."""
        with open_repository(url) as repository:
            manifest = repository.read()
        return sum(restore.mount(self._call, [NODE], url, manifest, manifest.rows).by_node.values())

    def fill(self, stopped: Event | None = None) -> LoadProgress:
        """Copy the mounted blocks to host memory, and wait until that is done. Returns the counts."""
        return restore.load(self._call, [NODE], poll_s=POLL_S, stopped=stopped)

    def close(self) -> None:
        """Stop the node."""
        self._server.close()
        self.node.close()


class MemoryUse(NamedTuple):
    """Resident memory of this process in bytes: private memory, and memory of shared mappings such as the arenas."""

    own_bytes: int
    shared_bytes: int


def used_memory() -> MemoryUse:
    """Returns the resident memory of this process now."""
    with open("/proc/self/status") as file:
        found = {name: value for name, _, value in (line.partition(":") for line in file)}
    return MemoryUse(*(int(found[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem")))
