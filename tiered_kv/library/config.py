"""Settings of a cache within one process: one frozen record, checked once. Does not import torch."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Self

from tiered_kv.config import POLICIES, Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

BITS = (8, 4)
METHODS = {"svd": "lowrank", "lowrank": "lowrank", "sparse": "sparse"}
_OWN = ("host", "policy", "codec", "quality", "error_budget", "block_tokens")  # settings of the node that KVCacheConfig determines


class CacheStrategy(Enum):
    """The eviction policy: which block is evicted first when memory is full. The value is the policy's name in `tiered_kv.policy`."""

    LRU = "lru"
    LFU = "lfu"
    FIFO = "fifo"
    S3FIFO = "s3fifo"
    SIEVE = "sieve"
    ARC = "arc"
    GDSF = "gdsf"
    ADAPTIVE = "adaptive"


class CacheMode(Enum):
    """The use of a model with a cache attached.

    INFERENCE: prompts and generated tokens are stored. BULK: only prompts are stored, for many independent requests.
    TRAINING: calls in training mode run without the cache; the other modes reject them. In every mode, a change of the weights
    starts a new namespace.
    """

    INFERENCE = "inference"
    BULK = "bulk"
    TRAINING = "training"


assert {strategy.value for strategy in CacheStrategy} == set(POLICIES), "a policy without a strategy"


@dataclass(frozen=True)
class KVCacheConfig:
    """All settings of a cache within one process.

    Raises `TieredKVError` (kind `config`), with the field and the allowed values, if a field is invalid.

    max_tokens: a hard cap on memory: the bytes that the KV of this many uncompressed tokens takes (at least one block). With
    compression, more tokens fit in these bytes. A cache with a codec takes at least 1 MiB.
    cache_strategy, cache_mode: a member of the enumeration, or its value ("lru").
    use_quantization: quantize blocks to `quantization_bits` (8 or 4) once memory is three quarters full. For the error (KL
    divergence) see docs/codecs.md.
    use_compression: replace blocks by low-rank factors or by their largest numbers, in at most `compression_ratio` of their bytes.
    compression_method: "svd" or "lowrank" for factors, "sparse" for the largest numbers. use_compression takes precedence over
    use_quantization, because the factors are quantized as well.
    num_layers, num_heads (KV heads), head_dim, dtype: the shape of the KV, if no model or tensor defines it.
    block_tokens: the number of tokens in a block, the unit of look-up.
    enable_profiling: measure the time of each stage, for `profile_table`. enable_warmup: False makes `warmup` do nothing.
    seed: of the random samples in which ADAPTIVE looks for blocks to evict.
    tiers: more settings of the node (`tiered_kv.Config`), such as {"disk": "2GiB"}.
    """

    max_tokens: int = 4096
    cache_strategy: CacheStrategy = CacheStrategy.ADAPTIVE
    cache_mode: CacheMode = CacheMode.INFERENCE
    use_quantization: bool = False
    quantization_bits: int = 8
    use_compression: bool = False
    compression_ratio: float = 0.3
    compression_method: str = "svd"
    enable_profiling: bool = False
    enable_warmup: bool = True
    num_layers: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    block_tokens: int = 16
    seed: int = 0
    tiers: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._at_least("block_tokens", 1)
        self._at_least("max_tokens", self.block_tokens)
        self._member("cache_strategy", CacheStrategy)
        self._member("cache_mode", CacheMode)
        for name in ("use_quantization", "use_compression", "enable_profiling", "enable_warmup"):
            if not isinstance(getattr(self, name), bool):
                raise self._wrong(name, "True or False")
        if not isinstance(self.quantization_bits, int) or self.quantization_bits not in BITS:
            raise self._wrong("quantization_bits", " or ".join(map(str, BITS)))
        ratio = self.compression_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise self._wrong("compression_ratio", "a number above 0 and at most 1")
        if not isinstance(self.compression_method, str) or self.compression_method not in METHODS:
            raise self._wrong("compression_method", f"one of {', '.join(METHODS)}")
        for name in ("num_layers", "num_heads", "head_dim"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", KVLayout(1, 1, 1, self.dtype).dtype)
        self._at_least("seed", 0)
        self.engine_config(1 << 20)

    @property
    def codec(self) -> str | None:
        """The codec of blocks in memory, in the form of `tiered_kv.Config.codec`, or None if blocks stay uncompressed."""
        if self.use_compression:
            return f"{METHODS[self.compression_method]}:{self.compression_ratio:g}"
        return f"int{self.quantization_bits}" if self.use_quantization else None

    @property
    def layout(self) -> KVLayout | None:
        """The layout that the shape fields define, or None if one of these fields is None."""
        shape = (self.num_layers, self.num_heads, self.head_dim, self.dtype)
        return None if None in shape else KVLayout(*shape, self.block_tokens)

    def engine_config(self, host_bytes: int) -> Config:
        """Returns the node's settings for a cache with `host_bytes` of memory, including the index."""
        tiers = {} if self.tiers is None else self.tiers
        if not isinstance(tiers, Mapping) or any(name in _OWN for name in tiers):
            raise self._wrong("tiers", f"a mapping of settings of tiered_kv.Config, without {', '.join(_OWN)}")
        codec = self.codec
        coding = {} if codec is None else {"codec": f"host={codec}"}
        own = {"host": host_bytes, "policy": self.cache_strategy.value, "block_tokens": self.block_tokens, "seed": self.seed}
        return Config.of({**tiers, **own, **coding})

    def with_(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed. Raises (kind `config`) for unknown fields and invalid values."""
        for name in changes:
            if name not in (known := [field.name for field in fields(self)]):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(known)}"
                raise TieredKVError(Kind.CONFIG, f"unknown field {name!r}{hint}", setting=name)
        return replace(self, **changes)

    def _member(self, name: str, cls: type[Enum]) -> None:
        try:
            object.__setattr__(self, name, cls(getattr(self, name)))
        except ValueError as error:
            raise self._wrong(name, f"one of {', '.join(each.value for each in cls)}") from error

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            of_block = " (block_tokens)" if name == "max_tokens" else ""
            raise self._wrong(name, f"a whole number of at least {least}{of_block}")

    def _wrong(self, name: str, allowed: str) -> TieredKVError:
        return TieredKVError(Kind.CONFIG, f"{name} must be {allowed}, got {getattr(self, name)!r}", setting=name)
