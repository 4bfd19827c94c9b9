"""A door to checkpoints: a cache's content in a folder, by name or by step."""

from tiered_kv.library.persistence import CachePersistence, load_cache_checkpoint, save_cache_checkpoint
from tiered_kv.ops.checkpoint import Taken
from tiered_kv.ops.loading import Loaded

__all__ = ["CachePersistence", "Loaded", "Taken", "load_cache_checkpoint", "save_cache_checkpoint"]
