"""What a block is known by: the namespace of its model, and the hash chain of its tokens.

A key is BLAKE2b-256 of (parent key ‖ the block's token ids as little-endian u32), RFC 7693; the first block's parent
is the root, a digest of namespace and layout. Equal keys therefore mean equal token prefixes under equal models.

The key of a tensor-parallel rank's block is the key of the whole model's block XOR a mask of the rank, so that blocks of ranks can
be put together to those of other ranks without their tokens (docs/design/018-keys-of-ranks.md).
"""

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.identity import (
    NOT_IDENTITY,
    Facts,
    Sums,
    adapter_digest,
    facts_of,
    plain,
    rope_digest,
    tensors_digest,
    text_digest,
    tokenizer_digest,
)
from tiered_kv.layout import KVLayout

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

KEY_BYTES = 32
FOREIGN_NAMED_MAX = 3
MAX_TOKEN_ID = (1 << 32) - 1
BlockKey = bytes


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"".join(parts), digest_size=KEY_BYTES).digest()


def as_token_ids(token_ids: "Sequence[int] | np.ndarray | torch.Tensor") -> np.ndarray:
    """The ids as a 1-D array of little-endian u32; a batch of one prompt, (1, n), is taken as that prompt.

    Raises `TieredKVError` (kind `tokens`) for anything that is not a list of whole numbers from 0 to 2**32 - 1.
    """
    try:
        ids = np.asarray(token_ids.numpy(force=True) if hasattr(token_ids, "detach") else token_ids)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # RuntimeError: a torch tensor without content
        raise TieredKVError(Kind.TOKENS, f"token_ids: not a list of numbers ({error})") from error
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise TieredKVError(Kind.TOKENS, f"token_ids: one prompt is needed, got an array of shape {ids.shape}")
    if ids.size == 0:
        return np.empty(0, "<u4")
    if ids.dtype.kind not in "iu":
        raise TieredKVError(Kind.TOKENS, f"token_ids: whole numbers are needed, got {ids.dtype}")
    if ids.dtype != np.int64:
        ids = np.minimum(ids, 1 << 62).astype(np.int64) if ids.dtype == np.uint64 else ids.astype(np.int64)
    halves = np.ascontiguousarray(ids, dtype="<i8").view("<u4")
    if halves[1::2].any():  # of a number from 0 to 2**32 - 1 the upper half is zero
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise TieredKVError(Kind.TOKENS, f"token_ids: {bad} is out of range; ids are 0 to {MAX_TOKEN_ID}", token=bad)
    return halves[::2].copy()


def chain_keys(root: BlockKey, token_ids: np.ndarray, block_tokens: int, first: int = 0) -> list[BlockKey]:
    """Keys of all whole blocks of a prompt, root first. Cost: about 1.5 µs a block of 64 tokens.

    `root` is the parent of block `first`; `token_ids` are those of the whole prompt, as `as_token_ids` gives them.
    """
    keys, parent = [], root
    data = memoryview(token_ids).cast("B")
    step = 4 * block_tokens
    for start in range(first * step, len(data) - step + 1, step):
        parent = blake2b(parent + data[start : start + step], digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return keys


@dataclass(frozen=True, slots=True)
class Chain:
    """Makes the keys of the blocks below one root.

    `whole_root` is the root of the same model in one piece, the same one for all ranks of all worlds; `mask` is what a rank's keys
    differ by from the keys below it, 0 where there are no ranks. Cost: that of `chain_keys`, and 0.2 µs a key for ranks.
    """

    root: BlockKey
    whole_root: BlockKey
    block_tokens: int
    mask: int = 0

    def keys(self, token_ids: np.ndarray, first: int = 0, parent: BlockKey | None = None) -> list[BlockKey]:
        """Keys of the whole blocks of a prompt from block `first` on; `token_ids` as `as_token_ids` gives them.

        `parent`, the key of the block before `first` where it is known, saves making the keys before.
        """
        if parent is not None:
            keys = chain_keys(self.whole_key(parent), token_ids, self.block_tokens, first)
        else:
            keys = chain_keys(self.whole_root, token_ids, self.block_tokens)
            if first:
                del keys[:first]
        if not self.mask:
            return keys
        mask = self.mask
        return [(int.from_bytes(key) ^ mask).to_bytes(KEY_BYTES) for key in keys]

    def whole_key(self, key: BlockKey) -> BlockKey:
        """The key that the block behind `key` has in the model in one piece."""
        return (int.from_bytes(key) ^ self.mask).to_bytes(KEY_BYTES)

    def rank_key(self, whole_key: BlockKey) -> BlockKey:
        """The inverse of `whole_key`."""
        return (int.from_bytes(whole_key) ^ self.mask).to_bytes(KEY_BYTES)


@dataclass(frozen=True)
class Namespace:
    """All that must be equal for KV to be reusable. Two namespaces that differ anywhere never share a block.

    `Namespace.of(model)` fills it from a model's content. For an engine of your own, `weights` is any text that
    identifies the weights' content, such as a checkpoint's digest; the other fields likewise. Ranks of one tensor-parallel model
    say the same in all fields but `rank`: `weights` is then of the whole model, not of a rank's part. `variant`: what tells models
    apart whose other fields are equal (docs/design/021); "" for the first of them, and then not part of the digest.
    """

    weights: str
    tenant: str = "default"
    tokenizer: str = ""
    adapter: str = ""
    architecture: str = ""
    rope: str = ""
    dtype: str = ""
    kv_scales: str = ""
    rank: int = 0
    world: int = 1
    epoch: int = 0
    variant: str = ""

    def __post_init__(self) -> None:
        if not self.weights or not isinstance(self.weights, str):
            raise TieredKVError(Kind.MODEL, "namespace: weights must be a text that identifies the weights' content")
        if not isinstance(self.tenant, str) or not self.tenant:
            raise TieredKVError(Kind.CONFIG, "namespace: tenant must be a text of at least one character", setting="tenant")
        for name in ("tokenizer", "adapter", "architecture", "rope", "dtype", "kv_scales", "variant"):
            if not isinstance(getattr(self, name), str):
                raise TieredKVError(Kind.CONFIG, f"namespace: {name} must be a text, not {getattr(self, name)!r}", setting=name)
        for name in ("rank", "world", "epoch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TieredKVError(Kind.CONFIG, f"namespace: {name} must be a whole number, not {value!r}", setting=name)
        if not 0 <= self.rank < self.world:
            raise TieredKVError(Kind.CONFIG, f"namespace: rank {self.rank} is not below world {self.world}", setting="rank")

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for this namespace."""
        fields = asdict(self)
        if not self.variant:  # a field of later versions: keys from before it are still the same
            del fields["variant"]
        return _digest(json.dumps(fields, sort_keys=True).encode())

    def root(self, layout: KVLayout) -> BlockKey:
        """What the blocks of one layout under this namespace are known by together: another layout is another chain."""
        return _digest(self.digest, layout.spec.encode())

    def chain(self, layout: KVLayout) -> "Chain":
        """What makes the keys of these blocks; `layout` is this rank's own."""
        root = self.root(layout)
        if self.world == 1:
            return Chain(root, root, layout.block_tokens)
        whole = replace(self, rank=0, world=1).root(replace(layout, kv_heads=layout.kv_heads * self.world))
        return Chain(root, whole, layout.block_tokens, int.from_bytes(_digest(b"tiered_kv rank\0", root)))

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any = None, *, tenant: str = "default", rank: int = 0, world: int = 1, epoch: int = 0
    ) -> "Namespace":
        """The namespace of a transformers model, from the content of its weights; or of a text that names them.

        Reads every byte of the weights once (xxh3-128 on all cores, several GB/s from host memory; from a GPU at the
        speed of the bus), so that another checkpoint under the same name never matches. A model with forward hooks or replaced
        methods gets a namespace that nobody else has: what they do to KV cannot be read.
        """
        facts = {"tenant": tenant, "tokenizer": tokenizer_digest(tokenizer), "rank": rank, "world": world, "epoch": epoch}
        if isinstance(model, str):
            return cls(weights=model, **facts)
        if not hasattr(model, "state_dict") or not hasattr(model, "config"):
            raise TieredKVError(Kind.MODEL, f"namespace: a transformers model or a text is needed, got {type(model).__name__}")
        walked = facts_of(model)
        return cls(**facts, **content_of(model, walked), variant=private_variant(walked))


def content_of(model: Any, walked: Facts, sums: Sums | None = None) -> dict[str, str]:
    """The fields of a namespace that a transformers model fills, by name; `walked`: `facts_of(model)`. Cost: as `Namespace.of`, less
    what `sums` knows.
    """
    config = plain(model.config, leave_out=NOT_IDENTITY)
    return {
        "weights": tensors_digest(model.state_dict(keep_vars=True), sums),
        "adapter": adapter_digest(model),
        "architecture": text_digest([type(model).__name__, config, walked.modules]),
        "rope": rope_digest(config, walked.tensors, sums),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def private_variant(walked: Facts) -> str:
    """A name that nobody else has, for a model with foreign code; "" for one without. Says so in the log."""
    if not walked.foreign:
        return ""
    where = "; ".join(words for words, _ in walked.foreign[:FOREIGN_NAMED_MAX])
    log.warning(
        "the KV of this model is shared with no other worker and outlives no process, because what changes it cannot be read: %s%s",
        where,
        " …" if len(walked.foreign) > FOREIGN_NAMED_MAX else "",
    )
    return f"private {secrets.token_hex(16)}"
