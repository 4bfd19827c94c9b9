"""A door to the memory figures: whether a cache should give something up, and what giving up garbage frees."""

import gc
from typing import Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.library.config import KVCacheConfig
from tiered_kv.library.memory import MemoryFigures, device_memory, host_memory

FULL_SHARE = 0.95
"""Of the memory of host or device: above it something should go, whatever the cache's own size."""


class MemoryManager:
    """Decides by the config's `max_tokens` and by real figures of the host and, on CUDA, of the device.

    The engine keeps its own caps by itself and needs none of this; it is for those who keep KV of their own.
    """

    def __init__(self, config: KVCacheConfig, device: Any = "cpu") -> None:
        if not isinstance(config, KVCacheConfig):
            raise TieredKVError(Kind.CONFIG, f"config must be a KVCacheConfig, not {type(config).__name__}", setting="config")
        import torch

        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise TieredKVError(
                Kind.CONFIG, f"device must be one of torch, such as cpu or cuda:0, not {device!r}", setting="device"
            ) from error
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise TieredKVError(Kind.CONFIG, f"device {device!r} is not there: torch finds no CUDA", setting="device")
        self.config = config

    def should_evict(self, cache_size: int) -> bool:
        """Whether something should leave a cache of `cache_size` tokens: it is at its cap, or the memory it lies in is nearly full."""
        if isinstance(cache_size, bool) or not isinstance(cache_size, int) or cache_size < 0:
            raise TieredKVError(Kind.CONFIG, f"cache_size must be a number of tokens, 0 or more, not {cache_size!r}", setting="cache_size")
        return cache_size >= self.config.max_tokens or self.figures().used_share >= FULL_SHARE

    def figures(self) -> MemoryFigures:
        """The memory that KV on this manager's device lies in."""
        return device_memory(self.device) or host_memory()

    def get_memory_stats(self) -> dict[str, float]:
        """Host figures and, on CUDA, the device's, in MiB and as shares from 0 to 1."""
        stats: dict[str, float] = {}
        for name, found in (("host", host_memory()), ("device", device_memory(self.device))):
            if found is not None:
                stats |= {f"{name}_{part.removesuffix('_bytes')}_mb": size / (1 << 20) for part, size in found._asdict().items()}
                stats[f"{name}_used_share"] = found.used_share
        return stats

    def collect_garbage(self) -> int:
        """Collect Python's garbage, and give CUDA's cached memory back; by how many bytes this process is smaller, 0 or more."""
        import torch

        before = self.figures().process_bytes
        gc.collect()
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return max(before - self.figures().process_bytes, 0)
