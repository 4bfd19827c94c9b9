"""Public access to memory figures: decides whether a cache should evict, and frees garbage."""

import gc
from typing import Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.library.config import KVCacheConfig
from tiered_kv.library.memory import MemoryFigures, device_memory, host_memory

FULL_SHARE = 0.95
"""A cache should evict, whatever its own size, if this share of the host or device memory is in use."""


class MemoryManager:
    """Decides about eviction by the config's `max_tokens` and by the memory use of the host or, on CUDA, of the device.

    The engine enforces its own caps and does not use this class. It is for code that keeps KV itself.
    """

    def __init__(self, config: KVCacheConfig, device: Any = "cpu") -> None:
        if not isinstance(config, KVCacheConfig):
            raise TieredKVError(Kind.CONFIG, f"config must be a KVCacheConfig, got {type(config).__name__}", setting="config")
        import torch

        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise TieredKVError(
                Kind.CONFIG, f"device must be a torch device such as cpu or cuda:0, got {device!r}", setting="device"
            ) from error
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise TieredKVError(
                Kind.CONFIG, f"device must exist, but device {device!r} is not there: torch finds no CUDA", setting="device"
            )
        self.config = config

    def should_evict(self, cache_size: int) -> bool:
        """Returns whether a cache of `cache_size` tokens should evict: it has reached `max_tokens`, or the memory is nearly full."""
        if isinstance(cache_size, bool) or not isinstance(cache_size, int) or cache_size < 0:
            raise TieredKVError(Kind.CONFIG, f"cache_size must be a number of tokens, 0 or more, got {cache_size!r}", setting="cache_size")
        return cache_size >= self.config.max_tokens or self.figures().used_share >= FULL_SHARE

    def figures(self) -> MemoryFigures:
        """Returns the figures of the CUDA device's memory, or those of the host's memory if this manager's device is not CUDA."""
        return device_memory(self.device) or host_memory()

    def get_memory_stats(self) -> dict[str, float]:
        """Returns the memory figures of the host and, on CUDA, of the device: sizes in MiB, shares from 0 to 1."""
        stats: dict[str, float] = {}
        for name, found in (("host", host_memory()), ("device", device_memory(self.device))):
            if found is not None:
                stats |= {f"{name}_{part.removesuffix('_bytes')}_mb": size / (1 << 20) for part, size in found._asdict().items()}
                stats[f"{name}_used_share"] = found.used_share
        return stats

    def collect_garbage(self) -> int:
        """Collect Python's garbage and free CUDA's cached memory. Returns by how many bytes this process shrank, 0 or more."""
        import torch

        before = self.figures().process_bytes
        gc.collect()
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return max(before - self.figures().process_bytes, 0)
