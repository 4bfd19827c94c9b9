"""Attaches a cache in this process to a transformers model. `model.generate` and `model(...)` are called as before."""

import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch

from tiered_kv.clock import Clock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.identity import tokenizer_digest
from tiered_kv.integrations.attached import Attachment
from tiered_kv.integrations.modelstate import ModelState
from tiered_kv.integrations.rope import rope_of_model
from tiered_kv.integrations.transformers import CachedModel, GenerateReport
from tiered_kv.keys import Namespace
from tiered_kv.library.cache import BaseKVCache
from tiered_kv.library.config import CacheMode, KVCacheConfig
from tiered_kv.protocol.probes import Probe, ProbeBook


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, read from its config. `max_length` is None if the config has none."""

    num_layers: int
    num_attention_heads: int
    num_heads: int
    head_dim: int
    max_length: int | None
    dtype: str


class TransformersKVCache:
    """A cache for one transformers model, attached to it at once. A context manager, which detaches the model at its end.

    Prefixes are fetched and stored automatically. Results differ from those of the model without a cache only by the rounding of a
    prefill in two parts and, with quantization or compression, by the codec's error. Heads, KV heads, head dim, layers, length and
    dtype are read from the model. If the model changes, another namespace is used (see `integrations.watch`). A write through
    `tensor.data` is not detected: call `refresh` after it.

    Raises `TieredKVError` (kind `model`) with the reason, before anything is attached, if the cache cannot serve the model.
    """

    def __init__(
        self, config: KVCacheConfig | None = None, model: Any = None, tokenizer: Any = None, *, clock: Clock | None = None
    ) -> None:
        self.cache = BaseKVCache(config, clock=clock)
        self.config = self.cache.config
        self.model: Any = None
        self.facts: ModelShape | None = None
        self.attachment: Attachment | None = None
        self._tokenizer = tokenizer
        self._clock = clock
        self._lock = threading.Lock()
        self._probes = ProbeBook()
        self._state: ModelState | None = None
        self._cached: CachedModel | None = None
        if model is not None:
            self.bind(model)
            try:
                self.attach()
            except TieredKVError:
                self.cache.close()
                raise

    def bind(self, model: Any) -> None:
        """Make this the cache of `model`, without attaching it yet.

        Raises (kind `model`) if the cache cannot serve the model. Cost: a run of a few tokens, and one pass over the weights.
        """
        self.model = model
        self.attachment = Attachment(model, self._serving, passes_training=self.config.cache_mode is CacheMode.TRAINING)
        try:
            with _evaluating(model, self.config.cache_mode is CacheMode.TRAINING):
                self._detect()
        except TieredKVError:
            self.model = self.attachment = None
            raise

    def _detect(self) -> None:
        model, config = self.model, getattr(self.model, "config", None)
        if self._state is None or self._state.model is not model:
            self._state = ModelState(model, generates=False)
        namespace = self._state.as_namespace(tokenizer=tokenizer_digest(self._tokenizer))
        shape = self._state.now().shape
        self.cache.layout, self.cache.namespace = shape.layout(self.config.block_tokens), namespace
        self.cache.rope = rope_of_model(model)
        self.facts = ModelShape(
            num_layers=shape.layers,
            num_attention_heads=config.num_attention_heads,
            num_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_length=getattr(config, "max_position_embeddings", None),
            dtype=self.cache.layout.dtype,
        )
        stores_generated = self.config.cache_mode is not CacheMode.BULK
        client = _CurrentClient(self.cache, self._state, self._probes)
        self._state.adopt(client)
        self._cached = CachedModel(model, client, store_generated=stores_generated, shape=shape, clock=self._clock)

    def _serving(self) -> CachedModel:
        """Returns the `CachedModel` for the model's current layout."""
        with self._lock:
            if self._cached.reshaped:
                self.attachment.bypass(self._detect)
            return self._cached

    def refresh(self) -> None:
        """Read the model's weights again at the next request. Call it after a change of weights that cannot be detected."""
        with self._lock:
            self._state.forget()

    # Attaching

    def attach(self) -> None:
        """Make `model.generate` and `model(...)` use this cache. A second call does nothing.

        Allocates the memory. Raises (kind `memory`) if there is too little of it, and (kind `model`) if there is no model.
        """
        if self.attachment is None:
            raise TieredKVError(Kind.MODEL, "attach: there is no model; give model= or call bind(model)")
        self.cache.client()
        if not self.attachment.is_attached:
            self.attachment.attach()

    def detach(self) -> None:
        """Restore the model's own methods. The stored blocks stay for the next `attach`. A second call does nothing."""
        if self.attachment is not None:
            self.attachment.detach()

    @property
    def is_attached(self) -> bool:
        """Whether the model's calls use this cache."""
        return self.attachment is not None and self.attachment.is_attached

    @property
    def last_report(self) -> GenerateReport | None:
        """The report of the last `generate` that used the cache. With several threads, the call that ended last counts."""
        return self.attachment.last_report if self.attachment is not None else None

    def warmup(self, num_samples: int = 100, seq_len: int = 128) -> int:
        """Allocate the memory, and store, fetch and drop zeros as KV of `seq_len` tokens, `num_samples` times.

        Afterwards the first request does not wait for any setup. The model does not run. Call it before the first request, because
        the samples may evict stored blocks. Returns the number of samples, which is 0 if `enable_warmup` is off.
        """
        for name, value in (("num_samples", num_samples), ("seq_len", seq_len)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TieredKVError(Kind.CONFIG, f"{name} must be a whole number of at least 1, got {value!r}", setting=name)
        if not self.config.enable_warmup:
            return 0
        layout = self.cache.layout
        if layout is None:
            raise TieredKVError(Kind.MODEL, "warmup: there is no model; give model= or call bind(model)")
        kv = torch.zeros(layout.kv_shape(seq_len), dtype=layout.torch_dtype)
        with self.cache.rehearsing() as client:
            for sample in range(num_samples):
                ids = range(sample * seq_len, (sample + 1) * seq_len)
                client.store(ids, kv)
                client.fetch(ids, kv)
        return num_samples

    # Figures

    def get_cache_stats(self) -> dict[str, Any]:
        """Returns the statistics of `BaseKVCache.get_stats`, and `passed`: the number of calls that ran without the cache, by reason."""
        return self.cache.get_stats() | {"passed": dict(self.attachment.skipped) if self.attachment is not None else {}}

    get_stats = get_cache_stats

    def clear_cache(self) -> None:
        """Drop all blocks and statistics; see `BaseKVCache.clear`."""
        self.cache.clear()

    def profile_table(self) -> str:
        """Returns a text table of the time spent in each stage; see `BaseKVCache.profile_table`."""
        return self.cache.profile_table()

    def close(self) -> None:
        """Detach the model and free the memory. A second call does nothing."""
        self.detach()
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ModelCacheWrapper:
    """A cache that can be switched on and off for a model. It starts switched off. A context manager."""

    def __init__(self, model: Any, config: KVCacheConfig | None = None, tokenizer: Any = None) -> None:
        self.model = model
        self.cache = TransformersKVCache(config, tokenizer=tokenizer)
        self.cache.bind(model)

    def enable_cache(self) -> None:
        """Make `model.generate` and `model(...)` use the cache; see `TransformersKVCache.attach`."""
        self.cache.attach()

    def disable_cache(self) -> None:
        """Restore the model's own methods. The stored blocks stay for the next `enable_cache`."""
        self.cache.detach()

    def get_cache_stats(self) -> dict[str, Any]:
        """Returns the statistics; see `TransformersKVCache.get_cache_stats`."""
        return self.cache.get_cache_stats()

    def clear_cache(self) -> None:
        """Drop all blocks and statistics; see `BaseKVCache.clear`."""
        self.cache.clear_cache()

    def close(self) -> None:
        """Switch the cache off, and free its memory. A second call does nothing."""
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _CurrentClient:
    """A client that passes each call on to the cache's current client, which is created at the first call and again after `clear`."""

    def __init__(self, cache: BaseKVCache, followed: ModelState, probes: ProbeBook) -> None:
        self._cache = cache
        self._probes = probes
        self.followed = followed
        self.layout = cache.layout

    @property
    def namespace(self) -> Namespace:
        """The cache's namespace."""
        return self._cache.namespace

    def use(self, namespace: Namespace) -> None:
        """Make later calls fetch and store blocks of this namespace."""
        self._cache.namespace = namespace

    def variant_of(self, namespace: Namespace, probe: Probe) -> str:
        """Returns the variant for a probe (see `Client.variant_of`), after comparing it only with probes of this model's earlier states."""
        return self._probes.match(namespace.root(self.layout), probe)

    def note_prefill(self, tokens: int, seconds: float, position: int = 0) -> None:
        """Record the time of a prefill; see `Client.note_prefill`. Does nothing if the cache was closed during the request."""
        with suppress(TieredKVError):
            self._cache.client().note_prefill(tokens, seconds, position)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache.client(), name)


@contextmanager
def _evaluating(model: Any, wanted: bool):
    """A context in which the model is in evaluation mode, if `wanted`. At the end each module returns to its former mode."""
    was = {module: module.training for module in model.modules()} if wanted and getattr(model, "training", False) else {}
    try:
        if was:
            model.eval()
        yield
    finally:
        for module, training in was.items():
            module.training = training
