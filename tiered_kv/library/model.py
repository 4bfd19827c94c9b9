"""A transformers model with a cache of this process attached: `model.generate` and `model(...)` are called as before."""

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
class ModelFacts:
    """What was detected of a model; `max_length` is None where its config names none."""

    num_layers: int
    num_attention_heads: int
    num_heads: int
    head_dim: int
    max_length: int | None
    dtype: str


class TransformersKVCache:
    """A cache for one transformers model, attached to it from the beginning. A context manager; leaving it detaches the model.

    Prefixes are found and kept by themselves; results are those of the model without a cache (up to the rounding of a prefill in
    two parts; with quantization or compression within the codec's error). Heads, KV heads, head dim, layers, length and dtype
    are read off the model. A model that changes gets another namespace (`integrations.watch`); a write through `tensor.data`
    is not seen: say `refresh`.

    Raises `TieredKVError` (kind `model`) with the reason for a model that cannot be served, before anything is attached.
    """

    def __init__(
        self, config: KVCacheConfig | None = None, model: Any = None, tokenizer: Any = None, *, clock: Clock | None = None
    ) -> None:
        self.cache = BaseKVCache(config, clock=clock)
        self.config = self.cache.config
        self.model: Any = None
        self.facts: ModelFacts | None = None
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
        """Make this the cache of `model`, without attaching it yet. Cost: a few tokens through the model, one pass over its weights."""
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
        self.facts = ModelFacts(
            num_layers=shape.layers,
            num_attention_heads=config.num_attention_heads,
            num_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_length=getattr(config, "max_position_embeddings", None),
            dtype=self.cache.layout.dtype,
        )
        stores_generated = self.config.cache_mode is not CacheMode.BULK
        client = _Fresh(self.cache, self._state, self._probes)
        self._state.adopt(client)
        self._cached = CachedModel(model, client, store_generated=stores_generated, shape=shape, clock=self._clock)

    def _serving(self) -> CachedModel:
        """The model with a client of its present layout."""
        with self._lock:
            if self._cached.reshaped:
                self.attachment.straight(self._detect)
            return self._cached

    def refresh(self) -> None:
        """Look at the model's weights again, after a change that cannot be seen."""
        with self._lock:
            self._state.forget()

    # Attaching

    def attach(self) -> None:
        """From now on `model.generate` and `model(...)` use this cache; a second time does nothing. Takes the memory: raises where there
        is too little of it.
        """
        if self.attachment is None:
            raise TieredKVError(Kind.MODEL, "there is no model; give model= or call bind(model)")
        self.cache.client()
        if not self.attachment.is_attached:
            self.attachment.attach()

    def detach(self) -> None:
        """The model is as it was before; what was kept stays for the next `attach`. A second time does nothing."""
        if self.attachment is not None:
            self.attachment.detach()

    @property
    def is_attached(self) -> bool:
        """Whether the model's calls use this cache."""
        return self.attachment is not None and self.attachment.is_attached

    @property
    def last_report(self) -> GenerateReport | None:
        """What the last `generate` that was served reused and computed; of several threads, the one that ended last."""
        return self.attachment.last_report if self.attachment is not None else None

    def warmup(self, num_samples: int = 100, seq_len: int = 128) -> int:
        """Take the memory, and store and fetch zeros as KV of `seq_len` tokens `num_samples` times, so that the first request waits for
        nothing; then forget them. How many samples were made: none where `enable_warmup` is off. The model does not run. For before
        the first request: what is kept already may have to leave for the samples.
        """
        for name, value in (("num_samples", num_samples), ("seq_len", seq_len)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TieredKVError(Kind.CONFIG, f"{name} must be a whole number of at least 1, not {value!r}", setting=name)
        if not self.config.enable_warmup:
            return 0
        layout = self.cache.layout
        if layout is None:
            raise TieredKVError(Kind.MODEL, "there is no model; give model= or call bind(model)")
        kv = torch.zeros(layout.kv_shape(seq_len), dtype=layout.torch_dtype)
        with self.cache.rehearsing() as client:
            for sample in range(num_samples):
                ids = range(sample * seq_len, (sample + 1) * seq_len)
                client.store(ids, kv)
                client.fetch(ids, kv)
        return num_samples

    # Figures

    def get_cache_stats(self) -> dict[str, Any]:
        """The cache's figures (`BaseKVCache.get_stats`), and `passed`: calls that ran past it, by reason."""
        return self.cache.get_stats() | {"passed": dict(self.attachment.passed) if self.attachment is not None else {}}

    get_stats = get_cache_stats

    def clear_cache(self) -> None:
        """Forget everything."""
        self.cache.clear()

    def profile_table(self) -> str:
        """Time by stage as text; see `BaseKVCache.profile_table`."""
        return self.cache.profile_table()

    def close(self) -> None:
        """Detach the model and give the memory back; a second time does nothing."""
        self.detach()
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ModelCacheWrapper:
    """A cache that can be switched on and off for a model; off, the model is as it was. A context manager."""

    def __init__(self, model: Any, config: KVCacheConfig | None = None, tokenizer: Any = None) -> None:
        self.model = model
        self.cache = TransformersKVCache(config, tokenizer=tokenizer)
        self.cache.bind(model)

    def enable_cache(self) -> None:
        """From now on `model.generate` and `model(...)` use the cache."""
        self.cache.attach()

    def disable_cache(self) -> None:
        """The model is as it was; what was kept stays for the next `enable_cache`."""
        self.cache.detach()

    def get_cache_stats(self) -> dict[str, Any]:
        """As `TransformersKVCache.get_cache_stats`."""
        return self.cache.get_cache_stats()

    def clear_cache(self) -> None:
        """Forget everything."""
        self.cache.clear_cache()

    def close(self) -> None:
        """Switch off, and give the memory back."""
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Fresh:
    """A client that is looked for at each call: memory is taken at the first one, and again after `clear`."""

    def __init__(self, cache: BaseKVCache, followed: ModelState, probes: ProbeBook) -> None:
        self._cache = cache
        self._probes = probes
        self.followed = followed
        self.layout = cache.layout

    @property
    def namespace(self) -> Namespace:
        """The cache's."""
        return self._cache.namespace

    def use(self, namespace: Namespace) -> None:
        """Later calls find and keep what is of this namespace."""
        self._cache.namespace = namespace

    def variant_of(self, namespace: Namespace, probe: Probe) -> str:
        """As the client's, among the states that this model has had."""
        return self._probes.match(namespace.root(self.layout), probe)

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """As the client's; a cache that was closed meanwhile is no error of the request."""
        with suppress(TieredKVError):
            self._cache.client().note_prefill(tokens, seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache.client(), name)


@contextmanager
def _evaluating(model: Any, wanted: bool):
    """With the model in evaluation mode, if so `wanted`; each module's own mode afterwards."""
    was = {module: module.training for module in model.modules()} if wanted and getattr(model, "training", False) else {}
    try:
        if was:
            model.eval()
        yield
    finally:
        for module, training in was.items():
            module.training = training
