"""tiered_kv: a distributed cache for the key/value (KV) blocks of LLM inference.

`attach` connects a process to a cluster's cache. `open` creates a cache within one process. Both return a `Client`.
Importing this package imports neither torch nor ray. Names that need them import them on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tiered_kv.blocks import Hint
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout, Layout, OpaqueLayout

if TYPE_CHECKING:
    from tiered_kv.client.client import Client
    from tiered_kv.clock import Clock
    from tiered_kv.compression import CompressedTensor, Compressor
    from tiered_kv.library.cache import AdaptiveKVCache, BaseKVCache
    from tiered_kv.library.config import CacheMode, CacheStrategy, KVCacheConfig
    from tiered_kv.library.model import ModelCacheWrapper, TransformersKVCache
    from tiered_kv.library.paged import PagedKVCache
    from tiered_kv.memory_manager import MemoryManager
    from tiered_kv.monitoring import Alert, CacheMetrics, CacheMonitor, MetricsExporter, TensorBoardWriter, WandbWriter
    from tiered_kv.persistence import CachePersistence, load_cache_checkpoint, save_cache_checkpoint
    from tiered_kv.quantization import QuantizedTensor, Quantizer
    from tiered_kv.strategies import (
        AdaptiveEvictionStrategy,
        BaseEvictionStrategy,
        LFUEvictionStrategy,
        LRUEvictionStrategy,
        create_eviction_strategy,
    )

__version__ = "0.1.0"
__all__ = [
    "AdaptiveEvictionStrategy",
    "AdaptiveKVCache",
    "Alert",
    "BaseEvictionStrategy",
    "BaseKVCache",
    "CacheMetrics",
    "CacheMode",
    "CacheMonitor",
    "CachePersistence",
    "CacheStrategy",
    "Client",
    "CompressedTensor",
    "Compressor",
    "Config",
    "Hint",
    "KVCacheConfig",
    "KVLayout",
    "Kind",
    "LFUEvictionStrategy",
    "LRUEvictionStrategy",
    "MemoryManager",
    "MetricsExporter",
    "ModelCacheWrapper",
    "Namespace",
    "OpaqueLayout",
    "PagedKVCache",
    "QuantizedTensor",
    "Quantizer",
    "TensorBoardWriter",
    "TieredKVError",
    "TransformersKVCache",
    "WandbWriter",
    "attach",
    "create_eviction_strategy",
    "load_cache_checkpoint",
    "open",
    "save_cache_checkpoint",
]

_LATER = {
    "AdaptiveEvictionStrategy": "tiered_kv.strategies",
    "AdaptiveKVCache": "tiered_kv.library.cache",
    "Alert": "tiered_kv.monitoring",
    "BaseEvictionStrategy": "tiered_kv.strategies",
    "BaseKVCache": "tiered_kv.library.cache",
    "CacheMetrics": "tiered_kv.monitoring",
    "CacheMode": "tiered_kv.library.config",
    "CacheMonitor": "tiered_kv.monitoring",
    "CachePersistence": "tiered_kv.persistence",
    "CacheStrategy": "tiered_kv.library.config",
    "Client": "tiered_kv.client.client",
    "CompressedTensor": "tiered_kv.compression",
    "Compressor": "tiered_kv.compression",
    "KVCacheConfig": "tiered_kv.library.config",
    "LFUEvictionStrategy": "tiered_kv.strategies",
    "LRUEvictionStrategy": "tiered_kv.strategies",
    "MemoryManager": "tiered_kv.memory_manager",
    "MetricsExporter": "tiered_kv.monitoring",
    "ModelCacheWrapper": "tiered_kv.library.model",
    "PagedKVCache": "tiered_kv.library.paged",
    "QuantizedTensor": "tiered_kv.quantization",
    "Quantizer": "tiered_kv.quantization",
    "TensorBoardWriter": "tiered_kv.monitoring",
    "TransformersKVCache": "tiered_kv.library.model",
    "WandbWriter": "tiered_kv.monitoring",
    "create_eviction_strategy": "tiered_kv.strategies",
    "load_cache_checkpoint": "tiered_kv.persistence",
    "save_cache_checkpoint": "tiered_kv.persistence",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'tiered_kv' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names and Python's own. Imported modules of the package are attributes too, but are not listed."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def attach(
    model: Any = None,
    tokenizer: Any = None,
    *,
    tenant: str = "default",
    block_tokens: int | None = None,
    namespace: Namespace | None = None,
    layout: Layout | None = None,
    rope: bytes | None = None,
    rope_halves: bool = True,
    cluster: str = "default",
    address: str | None = None,
) -> "Client":
    """Connect to the cache node on this machine. Returns a client.

    Works in any process of the user who started the node, and does not join Ray (docs/design/020). Pass either a transformers `model`,
    which determines namespace and layout, or the `namespace` and `layout` of your own engine. `layout`: a `KVLayout`, or an
    `OpaqueLayout` for blocks whose inner order only the engine knows. `block_tokens`: None for the cluster's setting; workers share
    only blocks of the same size. `rope`, `rope_halves`: how your own engine rotates its keys (`tiered_kv.codecs.rotation`), for a
    cluster that stores blocks with a small error. With a `model`, the rope is read from the model. A `model` costs one pass over its
    weights (several GB/s) and three runs of eight tokens. The KV of these tokens is compared with that of the namespace's first worker
    (docs/design/021).

    Raises `TieredKVError`: kind `model` for a model whose KV cannot be shared; `cluster` if there is no such cluster, or it has no node
    on this machine; `config` if the cluster's quality needs a calibration of the model, and there is none.
    """
    from tiered_kv.cluster import attach as attaching

    if model is not None:
        from tiered_kv.identity import tokenizer_digest
        from tiered_kv.integrations.modelstate import ModelState
        from tiered_kv.integrations.rope import rope_of_model

        if namespace is not None or layout is not None:
            raise TieredKVError(Kind.CONFIG, "attach: must be given either a model, or namespace and layout, not both", setting="model")
        attaching.reach(cluster, address)  # this check is fast, so it runs first
        followed = ModelState(model)
        namespace = followed.as_namespace(tokenizer=tokenizer_digest(tokenizer), tenant=tenant)
        shape = followed.now().shape
        assert shape is not None, "the examined model has a shape"
        turned = {"rope": rope_of_model(model), "rope_halves": rope_halves}
        client = attaching.attach(namespace, lambda tokens: shape.layout(block_tokens or tokens), name=cluster, address=address, **turned)
        client.followed = followed
        followed.adopt(client)
        return client
    if namespace is None or layout is None:
        raise TieredKVError(Kind.CONFIG, "attach: must be given a model, or both namespace and layout", setting="model")
    if block_tokens not in (None, layout.block_tokens):
        raise TieredKVError(
            Kind.CONFIG, f"block_tokens: must be None or the layout's {layout.block_tokens}, got {block_tokens}", setting="block_tokens"
        )
    return attaching.attach(namespace, lambda _: layout, name=cluster, address=address, rope=rope, rope_halves=rope_halves)


def open(
    config: Any = None,
    *,
    layout: Layout,
    namespace: Namespace,
    clock: "Clock | None" = None,
    rope: bytes | None = None,
    rope_halves: bool = True,
) -> "Client":
    """Create a cache in this process, without Ray or other processes. Returns its client. Closing the client ends the cache.

    `config`: a `Config`, a mapping of its settings, or None for the defaults. If it has a `disk_path`, the disk tier's content stays
    in that folder, and the next cache with the same `disk_path` finds it. `clock`: the cache's source of time, for tests and replays.
    `layout`, `rope`, `rope_halves`: as for `attach`.
    """
    from tiered_kv.embedded import open_client

    return open_client(Config.of(config), layout, namespace, clock, rope=rope, rope_halves=rope_halves)
