"""Settings of a cache within one process: one frozen record, checked once. Importing this brings no torch."""

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
_OWN = ("host", "policy", "codec", "quality", "error_budget", "block_tokens")  # of the engine's settings: said by fields here


class CacheStrategy(Enum):
    """Which block leaves first when memory is full; the value is the policy's name in the engine (`tiered_kv.policy`)."""

    LRU = "lru"
    LFU = "lfu"
    FIFO = "fifo"
    S3FIFO = "s3fifo"
    SIEVE = "sieve"
    ARC = "arc"
    GDSF = "gdsf"
    ADAPTIVE = "adaptive"


class CacheMode(Enum):
    """What a model with a cache attached is used for.

    INFERENCE: prompts and what was generated behind them are kept. BULK: prompts only, for many independent requests.
    TRAINING: calls in training mode run past the cache; in the other modes they are refused. Whenever weights have changed, in any
    mode, a new namespace is begun.
    """

    INFERENCE = "inference"
    BULK = "bulk"
    TRAINING = "training"


assert {strategy.value for strategy in CacheStrategy} == set(POLICIES), "a policy without a strategy"


@dataclass(frozen=True)
class KVCacheConfig:
    """All settings of a cache within one process. Raises `TieredKVError` (kind `config`) that names the field and what is allowed.

    max_tokens: memory for the KV of so many tokens as it was stored, a hard cap (of at least one block). Where blocks are
    coded, more tokens fit in as many bytes, and a cache takes 1 MiB at least.
    cache_strategy, cache_mode: a member, or its value ("lru").
    use_quantization: blocks in memory become codes of `quantization_bits` (8 or 4) once three quarters of it are full; KL as in
    docs/codecs.md. use_compression: they become factors of low rank ("svd", "lowrank") or their largest numbers ("sparse"), of
    at most `compression_ratio` of their bytes; with both, this is what they become, for its factors are quantized as well.
    num_layers, num_heads (KV heads), head_dim, dtype: the shape of KV, where no model or tensor says it. block_tokens: how many
    tokens are looked up together. enable_profiling: time by stage, see `profile`. enable_warmup: whether `warmup` does anything.
    seed: of the samples of ADAPTIVE. tiers: further settings of the engine (`tiered_kv.Config`), such as {"disk": "2GiB"}.
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
        """The codec of blocks in memory as the engine writes it; None: they stay as they are stored."""
        if self.use_compression:
            return f"{METHODS[self.compression_method]}:{self.compression_ratio:g}"
        return f"int{self.quantization_bits}" if self.use_quantization else None

    @property
    def layout(self) -> KVLayout | None:
        """The layout that the shape fields say; None unless all of them are given."""
        shape = (self.num_layers, self.num_heads, self.head_dim, self.dtype)
        return None if None in shape else KVLayout(*shape, self.block_tokens)

    def engine_config(self, host_bytes: int) -> Config:
        """The engine's settings for a cache whose memory, index included, takes `host_bytes`."""
        tiers = {} if self.tiers is None else self.tiers
        if not isinstance(tiers, Mapping) or any(name in _OWN for name in tiers):
            raise self._wrong("tiers", f"a mapping of settings of tiered_kv.Config without {', '.join(_OWN)}")
        codec = self.codec
        said = {} if codec is None else {"codec": f"host={codec}"}
        own = {"host": host_bytes, "policy": self.cache_strategy.value, "block_tokens": self.block_tokens, "seed": self.seed}
        return Config.of({**tiers, **own, **said})

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        for name in changes:
            if name not in (known := [field.name for field in fields(self)]):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
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
        return TieredKVError(Kind.CONFIG, f"{name} must be {allowed}, not {getattr(self, name)!r}", setting=name)
