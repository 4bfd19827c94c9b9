"""The library's cache: stores and finds KV by prefix and by position, in a node of this process.

Shapes: by prefix, kv is (L, 2, H, N, D) as in `layout`. By position, key and value are (B, H, T, D): batch, heads, tokens, head dim.
"""

import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch

from tiered_kv.blocks import Fetched, Hint, Match, Stored
from tiered_kv.client.client import Client, TokenIds
from tiered_kv.client.profile import Profile
from tiered_kv.clock import Clock
from tiered_kv.codecs.pairs import check_pair
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import MAX_TOKEN_ID, Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.library.config import CacheStrategy, KVCacheConfig
from tiered_kv.library.opening import EmbeddedCache

Pair = tuple[torch.Tensor, torch.Tensor]
_EVICTED = ("dropped", "not_admitted", "dropped_under_pressure")
_COUNTS = {
    "lookups": "asked_blocks",
    "hits": "hit_blocks",
    "tokens_saved": "prefill_tokens_saved",
    "prefill_seconds_saved": "prefill_seconds_saved",
    "evictions": "",
    "stores": "",
    "refused_blocks": "",
}
"""The counts of `get_stats`, each with the name of the node's count that it is taken from, or "" if it is computed here."""
_MIB = 1 << 20


class PositionEntry(NamedTuple):
    """A key and a value that `put` has stored at a position. The pair is stored as one block.

    `layout`: the block's layout. `serial`: a number that only this pair has. It is used as every token id of the block, so that
    the block's key is unique. `device`: the device on which the tensors were; `get` returns them there.
    """

    layout: KVLayout
    serial: int
    device: torch.device


class BaseKVCache:
    """A cache of KV within this process, of at most `config.max_tokens` tokens. Thread-safe; a context manager.

    By prefix: `store`, `match` and `fetch` are those of `tiered_kv.Client`, in blocks of `config.block_tokens`. By position:
    `put` and `get` keep a key and a value under a number. Both ways share the memory, the policy and the codecs.

    Memory for `max_tokens` tokens of one layout is allocated at the first use. This is the layout of the argument `layout`, else that
    of the config's shape fields, else that of the first `store` or `put`. `namespace` identifies the model whose KV is cached.
    `rope`: see `tiered_kv.open`.
    """

    def __init__(
        self,
        config: KVCacheConfig | None = None,
        *,
        layout: KVLayout | None = None,
        namespace: Namespace | None = None,
        rope: bytes | None = None,
        clock: Clock | None = None,
    ) -> None:
        config = KVCacheConfig() if config is None else config
        if not isinstance(config, KVCacheConfig):
            raise TieredKVError(Kind.CONFIG, f"config must be a KVCacheConfig, got {type(config).__name__}", setting="config")
        self.config = config
        self.layout = layout or config.layout
        self.namespace = namespace or Namespace(weights="kv_cache")
        self.profile = Profile(clock) if config.enable_profiling else None
        self.rope = rope
        self._clock = clock
        self._lock = threading.RLock()
        self._engine: EmbeddedCache | None = None
        self._placed: dict[int, PositionEntry] = {}
        self._serial = secrets.randbelow(MAX_TOKEN_ID + 1)  # random, because all caches counting from 0 would use the same serials
        self.origin = secrets.token_hex(8)
        self.origins = {self.origin}
        """The ids of the caches that chose the serials of pairs stored here: this cache, and those whose checkpoints were loaded."""
        self._rehearsed: Counter[str] = Counter()
        self._closed = False

    # By prefix

    def store(self, token_ids: TokenIds, kv: torch.Tensor, *, start: int = 0, hint: Hint | None = None) -> Stored:
        """Store the whole blocks of `kv`, which is the KV of `token_ids[start:]`; see `Client.store`."""
        if self.layout is None:
            self.layout = self._layout_of(kv)
        return self.client().store(token_ids, kv, start=start, hint=hint)

    def fetch(self, token_ids: TokenIds, out: torch.Tensor | None = None) -> Fetched:
        """Returns the KV of the longest cached prefix, in whole blocks; see `Client.fetch`.

        Raises (kind `layout`) if no layout is known yet.
        """
        return self.client().fetch(token_ids, out)

    def match(self, token_ids: TokenIds) -> Match:
        """Returns the length of the longest cached prefix, and its tiers. Moves nothing. The length is 0 if no layout is known yet."""
        return Match(0) if self.layout is None else self.client().match(token_ids)

    def client(self) -> Client:
        """Returns the client for this cache's layout and namespace. Raises (kind `layout`) if no layout is known yet."""
        if self.layout is None:
            raise TieredKVError(
                Kind.LAYOUT,
                "layout: must be known before this call, got None; give layout=, or num_layers, num_heads, head_dim and dtype in the"
                " config, or store KV first",
            )
        return self.engine(self.layout).client(self.layout, self.namespace, rope=self.rope)

    def _layout_of(self, kv: Any) -> KVLayout:
        if not isinstance(kv, torch.Tensor) or kv.ndim != 5 or kv.shape[1] != 2:
            what = f"of shape {tuple(kv.shape)}" if isinstance(kv, torch.Tensor) else type(kv).__name__
            raise TieredKVError(Kind.LAYOUT, f"kv must be a tensor (layers, 2, KV heads, tokens, head_dim), got {what}")
        return KVLayout(kv.shape[0], kv.shape[2], kv.shape[4], str(kv.dtype), self.config.block_tokens)

    # By position

    def put(self, position: int, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Store a key and a value (B, H, T, D) at `position`, in place of the pair stored there before.

        Both must have the same shape, floating-point dtype and device. Returns whether they were stored: False if there was no room.
        Raises (kind `layout`, with the name of the argument) if the key or the value is invalid.
        """
        self._check_position(position)
        check_pair(key, value)
        batch, heads, tokens, dim = key.shape
        layout = KVLayout(batch, heads, dim, str(key.dtype), tokens)
        with torch.autocast(key.device.type, enabled=False):
            kv = torch.stack([key.detach(), value.detach()], 1)
        with self._lock:
            self._forget(position)
            serial = self._next_serial()
            stored = self._positions(layout).store([serial] * tokens, kv)
            if len(self._placed) > 2 * self.config.max_tokens:  # most of these are already evicted
                there = self.positions()
                self._placed = {at: self._placed[at] for at in there}
            if not stored.refused:
                self._placed[position] = PositionEntry(layout, serial, key.device)
            return not stored.refused

    def _next_serial(self) -> int:
        taken = {placed.serial for placed in self._placed.values()} if len(self.origins) > 1 else ()
        while True:
            serial, self._serial = self._serial, (self._serial + 1) & MAX_TOKEN_ID
            if serial not in taken:
                return serial

    def get(self, position: int) -> Pair | None:
        """Returns the key and value stored at `position`, on their device, or None if nothing was stored or the pair was evicted."""
        self._check_position(position)
        with self._lock:
            placed = self._placed.get(position)
            if placed is None:
                return None
            fetched = self._positions(placed.layout).fetch([placed.serial] * placed.layout.block_tokens)
            if not fetched.tokens:
                del self._placed[position]
                return None
        kv = fetched.kv.to(placed.device)
        return kv[:, 0], kv[:, 1]

    def positions(self) -> list[int]:
        """Returns the positions whose pairs are still cached."""
        with self._lock:
            return [at for at, placed in self._placed.items() if self._is_there(placed)]

    def placed(self) -> dict[int, PositionEntry]:
        """Returns the `PositionEntry` of every pair that is still cached, by position."""
        with self._lock:
            return {at: self._placed[at] for at in self.positions()}

    def place(self, placed: dict[int, PositionEntry]) -> None:
        """Add entries loaded from a checkpoint: for each position that of its (key, value) pair. Replaces those at the same positions."""
        with self._lock:
            self._placed |= placed

    def _is_there(self, placed: PositionEntry) -> bool:
        ids = [placed.serial] * placed.layout.block_tokens
        return self._positions(placed.layout).match(ids).tokens > 0

    def _forget(self, position: int) -> None:
        placed = self._placed.pop(position, None)
        if placed is not None:  # no look-up can find this block again, so mark it as the first to evict
            ids = [placed.serial] * placed.layout.block_tokens
            empty = torch.empty(placed.layout.kv_shape(0), dtype=placed.layout.torch_dtype)
            self._positions(placed.layout).store(ids, empty, start=len(ids), hint=Hint(ended=True))

    def _positions(self, layout: KVLayout) -> Client:
        return self.engine(layout).client(layout, self.namespace_of_positions)

    @property
    def namespace_of_positions(self) -> Namespace:
        """The namespace of the pairs stored by position. Each layout has a separate hash root."""
        return Namespace(weights=f"positions of {self.namespace.digest.hex()}", tenant=self.namespace.tenant)

    @staticmethod
    def _check_position(position: object) -> None:
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise TieredKVError(Kind.TOKENS, f"position must be a whole number of at least 0, got {position!r}")

    # The whole cache

    def engine(self, layout: KVLayout) -> EmbeddedCache:
        """Returns this cache's node. The first call creates it, with memory for `max_tokens` tokens of `layout`.

        Raises (kind `closed`) after `close`.
        """
        with self._lock:
            if self._closed:
                raise TieredKVError(Kind.CLOSED, "the cache is closed; create a new one")
            if self._engine is None:
                self._engine = EmbeddedCache(self.config, layout, self._clock, self.profile)
            return self._engine

    def get_stats(self) -> dict[str, Any]:
        """Returns the statistics of this cache: rates from 0 to 1, counts of blocks and tokens, and bytes.

        All are 0 before the first KV is stored. hit_rate: the share of requested blocks that were hits; 0.0 if `lookups` is 0.
        """
        with self._lock:
            engine = self._engine
        node = engine.node.stats() if engine is not None else {"tiers": {}, "codecs": {"coded": {}}, "blocks": 0, "counts": {}}
        host = node["tiers"].get("host", {"used_bytes": 0, "capacity_bytes": 0})
        withheld = engine.withheld_bytes if engine is not None else 0
        counts = self._counted(engine)
        lookups, used_bytes = counts["lookups"], host["used_bytes"] - withheld
        return {
            "strategy": self.config.cache_strategy.value,
            "mode": self.config.cache_mode.value,
            "max_tokens": self.config.max_tokens,
            **counts,
            "misses": lookups - counts["hits"],
            "hit_rate": counts["hits"] / lookups if lookups else 0.0,
            "num_entries": node["blocks"],
            "refused_blocks": node.get("refused_blocks", 0),
            "damaged_blocks": sum(node.get("checksum_failures", {}).values()),
            "dropped_under_pressure": node["counts"].get("dropped_under_pressure", 0),
            "memory_usage_bytes": used_bytes,
            "memory_usage_mb": used_bytes / _MIB,
            "capacity_bytes": host["capacity_bytes"] - withheld,
            "tiers": node["tiers"],
            "codecs": node["codecs"]["coded"],
        }

    @contextmanager
    def rehearsing(self) -> Iterator[Client]:
        """A context with a client for trial requests, in a separate namespace.

        At its end, the blocks of this namespace are dropped, the statistics are set back to what they were, and the profile is
        reset.
        """
        engine, namespace = self.engine(self.layout), Namespace(weights="rehearsal")
        before = self._counted(engine)
        try:
            yield engine.client(self.layout, namespace)
        finally:
            engine.forget(namespace)
            for name, count in self._counted(engine).items():
                self._rehearsed[name] += count - before[name]
            if self.profile is not None:
                self.profile.reset()

    def _counted(self, engine: EmbeddedCache | None) -> Counter[str]:
        """Returns the counts that `get_stats` reports, less those of trial requests (`rehearsing`)."""
        if engine is None:
            return Counter(dict.fromkeys(_COUNTS, 0))
        node = engine.node.stats()
        counts = {name: node[of] for name, of in _COUNTS.items() if of}
        counts["evictions"] = sum(node["counts"].get(name, 0) for name in _EVICTED)
        counts |= {name: engine.client_stats(name) for name in ("stores", "refused_blocks")}
        return Counter({name: count - self._rehearsed[name] for name, count in counts.items()})

    def profile_table(self) -> str:
        """Returns a text table of the time spent in each stage of the cache. Raises (kind `config`) unless `enable_profiling` is set."""
        if self.profile is None:
            raise TieredKVError(Kind.CONFIG, "enable_profiling is off; set it to True in the config", setting="enable_profiling")
        return self.profile.table()

    def clear(self) -> None:
        """Drop all blocks, entries and statistics, and free the memory. The next store allocates it again."""
        with self._lock:
            self._placed.clear()
            self._rehearsed.clear()
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()

    def check(self) -> None:
        """Assert that the node's data structures are consistent. Slow; for tests."""
        with self._lock:
            if self._engine is not None:
                self._engine.check()

    def close(self) -> None:
        """Free the memory for good. A second call does nothing."""
        with self._lock:
            self.clear()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AdaptiveKVCache(BaseKVCache):
    """A cache that learns from its look-ups which blocks are used again, and keeps these blocks.

    Its strategy is always `CacheStrategy.ADAPTIVE`; the config's `cache_strategy` is ignored.
    """

    def __init__(self, config: KVCacheConfig | None = None, **options: Any) -> None:
        if isinstance(config, KVCacheConfig):
            config = config.with_(cache_strategy=CacheStrategy.ADAPTIVE)
        super().__init__(config, **options)

    def learned(self) -> dict[str, Any]:
        """Returns what the eviction policy has learned so far, as statistics. {} before the first KV is stored."""
        with self._lock:
            return self._engine.node.stats()["policy"] if self._engine is not None else {}
