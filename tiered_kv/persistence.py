"""Public access to checkpoints: saves and loads a cache's content in a folder, by name or by step."""

from tiered_kv.checkpoint.load_local import LoadResult
from tiered_kv.checkpoint.take import CheckpointResult
from tiered_kv.library.persistence import CachePersistence, load_cache_checkpoint, save_cache_checkpoint

__all__ = ["CachePersistence", "LoadResult", "CheckpointResult", "load_cache_checkpoint", "save_cache_checkpoint"]
