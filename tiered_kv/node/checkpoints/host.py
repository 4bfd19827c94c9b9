"""The interface of a node that its checkpoint writer and loader use."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from tiered_kv.blocks import Location
from tiered_kv.config import Config
from tiered_kv.keys import BlockKey
from tiered_kv.node.admission.epochs import NodeEpochs
from tiered_kv.node.storage import NodeStorage
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.store.engine import Engine


class CheckpointHost(Protocol):
    """The part of a node that `CheckpointWriter` and `CheckpointLoader` use. `Node` describes the methods."""

    config: Config
    engine: Engine
    storage: NodeStorage
    epochs: NodeEpochs

    def running(self) -> AbstractContextManager[None]:
        """Hold the engine's lock while the node is running. Raises (kind `transport`) if it is closed."""

    def pinned(self, keys: Sequence[BlockKey]) -> AbstractContextManager[list[tuple[BlockKey, BlockKey | None, Location]]]:
        """Pin the leading `keys` that the node has. Yields each with its root and location."""

    def open_session(self) -> NodeSession:
        """Returns a new session, which the caller must close."""

    def report(self) -> None:
        """Report changes to the coordinator now."""
