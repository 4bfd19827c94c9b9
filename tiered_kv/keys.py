"""Block keys: a hash chain over a prompt's tokens, with the namespace of the model at its root.

A key is BLAKE2b-256 of (parent key ‖ the block's token ids as little-endian u32), RFC 7693; the first block's parent
is the root, a digest of namespace and layout. So equal keys mean equal token prefixes under equal models.

The key of a tensor-parallel rank's block is the key of the whole model's block XOR a mask of the rank. So the keys
of one rank's blocks follow from another rank's keys, without the tokens (docs/design/018-keys-of-ranks.md).
"""

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiered_kv import checkpoint_files
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.identity import (
    NOT_IDENTITY,
    ModelWalk,
    Sums,
    adapter_digest,
    plain,
    rope_digest,
    tensors_digest,
    text_digest,
    tokenizer_digest,
    walk_model,
)
from tiered_kv.layout import Layout, OpaqueLayout

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

KEY_BYTES = 32
FOREIGN_NAMED_MAX = 3
TENANT_BYTES_MAX = 1024
DEFAULT_TENANT = "default"
"""The tenant of workers that name no tenant. It has no salt, so that clusters can share its blocks through checkpoints and folders."""
MAX_TOKEN_ID = (1 << 32) - 1
BlockKey = bytes


def check_tenant(name: object) -> None:
    """Raise (kind `config`) unless `name` is a text of 1 to TENANT_BYTES_MAX bytes in UTF-8. Any characters may be in it."""
    try:
        nbytes = len(name.encode()) if isinstance(name, str) else 0
    except UnicodeEncodeError as error:
        raise TieredKVError(
            Kind.CONFIG, f"tenant: must be a text of valid Unicode, got {name!r:.100} ({error.reason})", setting="tenant"
        ) from error
    if not 0 < nbytes <= TENANT_BYTES_MAX:
        got = f"{nbytes:,} bytes" if isinstance(name, str) else f"{name!r:.100}"
        raise TieredKVError(Kind.CONFIG, f"tenant: must be a text of 1 to {TENANT_BYTES_MAX} bytes, got {got}", setting="tenant")


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"".join(parts), digest_size=KEY_BYTES).digest()


def _as_array(tensor: "torch.Tensor") -> np.ndarray:
    array: np.ndarray = tensor.numpy(force=not tensor.is_cpu or tensor.requires_grad)  # `force` costs four more torch calls
    return array


def as_token_ids(token_ids: "Sequence[int] | np.ndarray | torch.Tensor") -> np.ndarray:
    """Returns the ids as a 1-D array of little-endian u32. A batch of one prompt, (1, n), is treated as that prompt.

    Raises `TieredKVError` (kind `tokens`) unless the ids are whole numbers from 0 to 2**32 - 1 in one dimension.
    """
    try:
        given: Any = token_ids
        ids = np.asarray(_as_array(given) if hasattr(given, "detach") else given)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # RuntimeError: a torch tensor without content
        raise TieredKVError(Kind.TOKENS, f"token_ids: must be a list of whole numbers ({error})") from error
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise TieredKVError(Kind.TOKENS, f"token_ids: must be one prompt, got an array of shape {ids.shape}")
    if ids.size == 0:
        return np.empty(0, "<u4")
    if ids.dtype.kind not in "iu":
        raise TieredKVError(Kind.TOKENS, f"token_ids: must be whole numbers, got {ids.dtype}")
    if ids.dtype != np.int64:
        ids = np.minimum(ids, 1 << 62).astype(np.int64) if ids.dtype == np.uint64 else ids.astype(np.int64)
    halves = np.ascontiguousarray(ids, dtype="<i8").view("<u4")
    if np.logical_or.reduce(halves[1::2]):  # the upper half of a number from 0 to 2**32 - 1 is zero
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise TieredKVError(Kind.TOKENS, f"token_ids: must be from 0 to {MAX_TOKEN_ID}, got {bad}", token=bad)
    return halves[::2].copy()


def chain_keys(root: BlockKey, token_ids: np.ndarray, block_tokens: int, first: int = 0) -> list[BlockKey]:
    """Returns the keys of a prompt's whole blocks from block `first` on, in order. Takes about 1.5 µs per block of 64 tokens.

    `root`: the parent key of block `first`. `token_ids`: the ids of the whole prompt, as `as_token_ids` returns them.
    """
    keys, parent = [], root
    data = memoryview(token_ids).cast("B")
    step = 4 * block_tokens
    for start in range(first * step, len(data) - step + 1, step):
        parent = blake2b(parent + data[start : start + step], digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return keys


@dataclass(frozen=True, slots=True)
class ChainKeys:
    """Computes the keys of the chains under one root.

    `whole_root`: the root of the whole (not tensor-parallel) model, the same for all ranks of all world sizes. `mask`: the XOR of a
    rank's keys and the whole model's keys, 0 for the whole model. Costs as much as `chain_keys`, plus 0.2 µs per key for ranks.
    """

    root: BlockKey
    whole_root: BlockKey
    block_tokens: int
    mask: int = 0

    def keys(self, token_ids: np.ndarray, first: int = 0, parent: BlockKey | None = None) -> list[BlockKey]:
        """Returns the keys of a prompt's whole blocks from block `first` on. `token_ids`: as `as_token_ids` returns them.

        `parent`: the key of block `first - 1`, if known. It saves computing the keys of the blocks before `first`.
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
        """Returns the key of the whole model's block, given the key of this rank's block."""
        return (int.from_bytes(key) ^ self.mask).to_bytes(KEY_BYTES)

    def rank_key(self, whole_key: BlockKey) -> BlockKey:
        """Returns the key of this rank's block, given the key of the whole model's block. The inverse of `whole_key`."""
        return (int.from_bytes(whole_key) ^ self.mask).to_bytes(KEY_BYTES)


@dataclass(frozen=True)
class Namespace:
    """Everything that must be equal for KV to be reusable. Namespaces that differ in any field never share a block.

    `Namespace.of(model)` fills it from a model's content. For your own engine, `weights` is any text that identifies the weights'
    content, such as a digest of the model's files. The other text fields are chosen in the same way. Ranks of one tensor-parallel
    model differ only in `rank`: `weights` then identifies the whole model, not a rank's part. `variant` distinguishes models whose
    other fields are equal (docs/design/021). It is "" for the first of these models, and then not part of the digest.

    A client fills in `weight_epoch` and `salt` from its node (docs/design/029). They are not part of the digest while they are
    0 and "". `weight_epoch`: the number of the model's present weights in the cluster, which `Client.new_epoch` raises. `salt`:
    the salt of a named tenant.
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
    salt: str = ""
    weight_epoch: int = 0

    def __post_init__(self) -> None:
        if not self.weights or not isinstance(self.weights, str):
            raise TieredKVError(
                Kind.MODEL, f"namespace: weights must be a non-empty text that identifies the weights' content, got {self.weights!r:.100}"
            )
        check_tenant(self.tenant)
        for name in ("tokenizer", "adapter", "architecture", "rope", "dtype", "kv_scales", "variant", "salt"):
            if not isinstance(getattr(self, name), str):
                raise TieredKVError(Kind.CONFIG, f"namespace: {name} must be a text, got {getattr(self, name)!r}", setting=name)
        for name in ("rank", "world", "epoch", "weight_epoch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TieredKVError(Kind.CONFIG, f"namespace: {name} must be a whole number, got {value!r}", setting=name)
        if not 0 <= self.rank < self.world:
            raise TieredKVError(
                Kind.CONFIG, f"namespace: rank must be 0 or more and below world {self.world}, got {self.rank}", setting="rank"
            )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that identify this namespace."""
        fields = asdict(self)
        for name in ("variant", "salt", "weight_epoch"):  # left out if not set, so that keys stay as in versions without these fields
            if not fields[name]:
                del fields[name]
        return _digest(json.dumps(fields, sort_keys=True).encode())

    @cached_property
    def family(self) -> bytes:
        """32 bytes that the ranks, variants and epochs of one model under one tenant have in common. Each family has one weight epoch."""
        return replace(self.plain(), rank=0, world=1, epoch=0, variant="").digest

    def plain(self) -> "Namespace":
        """Returns this namespace without the fields that a client fills in: `salt` and `weight_epoch`."""
        return replace(self, salt="", weight_epoch=0) if self.salt or self.weight_epoch else self

    def as_fields(self) -> dict[str, Any]:
        """Returns the fields as plain data, `salt` and `weight_epoch` only if they are set. `Namespace(**fields)` is the inverse."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("salt", "weight_epoch")}

    def root(self, layout: Layout) -> BlockKey:
        """Returns the common root of the blocks of one layout under this namespace. Each layout has its own root."""
        return _digest(self.digest, layout.spec.encode())

    def chain(self, layout: Layout) -> "ChainKeys":
        """Returns the `ChainKeys` that computes the keys of blocks of `layout`, which is the layout of this rank.

        With an opaque layout, the keys of ranks do not follow from each other, because only the engine could join their blocks.
        """
        root = self.root(layout)
        if self.world == 1 or isinstance(layout, OpaqueLayout):
            return ChainKeys(root, root, layout.block_tokens)
        whole = replace(self, rank=0, world=1).root(replace(layout, kv_heads=layout.kv_heads * self.world))
        return ChainKeys(root, whole, layout.block_tokens, int.from_bytes(_digest(b"tiered_kv rank\0", root)))

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any = None, *, tenant: str = "default", rank: int = 0, world: int = 1, epoch: int = 0
    ) -> "Namespace":
        """Returns the namespace of a transformers model, from the content of its weights. `model` may also be a text that identifies them.

        Reads every byte of the weights once, so that other weights under the same name never match. This takes xxh3-128 on all cores,
        at several GB/s from host memory, or at the speed of the bus from a GPU. A model with forward hooks or replaced methods gets a
        unique namespace, because the effect of such code on KV is unknown.
        """
        facts: dict[str, Any] = {"tenant": tenant, "tokenizer": tokenizer_digest(tokenizer), "rank": rank, "world": world, "epoch": epoch}
        if isinstance(model, str):
            return cls(weights=model, **facts)
        if not hasattr(model, "state_dict") or not hasattr(model, "config"):
            raise TieredKVError(Kind.MODEL, f"namespace: model must be a transformers model or a text, got {type(model).__name__}")
        walked = walk_model(model)
        facts |= content_of(model, walked)
        return cls(**facts, variant=private_variant(walked))

    @classmethod
    def of_checkpoint(
        cls,
        path: str | Path,
        *,
        tenant: str = "default",
        rank: int = 0,
        world: int = 1,
        epoch: int = 0,
        settings: Mapping[str, Any] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> "Namespace":
        """Returns the namespace of a model from its files, for an engine that shows no model object.

        `path`: a local folder, or one file such as a GGUF file. `settings`: all else that changes the engine's KV, such as dtype,
        quantization at load and overrides of the model's config. Two engines must not use one namespace unless they compute the same KV
        from the same files. `checkpoint_files.weights_digest` describes what is read and remembered, and `progress`. The result never
        equals a namespace of `Namespace.of`.
        """
        facts: dict[str, Any] = {"tenant": tenant, "rank": rank, "world": world, "epoch": epoch}
        architecture = checkpoint_files.architecture_digest(path, settings)
        return cls(weights=checkpoint_files.weights_digest(path, progress=progress), architecture=architecture, **facts)


def content_of(model: Any, walked: ModelWalk, sums: Sums | None = None) -> dict[str, str]:
    """Returns the fields of a namespace that a transformers model determines, by name. `walked`: the result of `walk_model(model)`.

    Costs as much as `Namespace.of`, except for tensors whose sums `sums` knows already.
    """
    config = plain(model.config, leave_out=NOT_IDENTITY)
    return {
        "weights": tensors_digest(model.state_dict(keep_vars=True), sums),
        "adapter": adapter_digest(model),
        "architecture": text_digest([type(model).__name__, config, walked.modules]),
        "rope": rope_digest(config, walked.tensors, sums),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def private_variant(walked: ModelWalk) -> str:
    """Returns a unique variant for a model with foreign code, and logs the reason. Returns "" for a model without foreign code."""
    if not walked.foreign:
        return ""
    where = "; ".join(words for words, _ in walked.foreign[:FOREIGN_NAMED_MAX])
    log.warning(
        "the KV of this model is not shared with other workers or later processes, because it has code whose effect on KV is unknown: %s%s",
        where,
        " …" if len(walked.foreign) > FOREIGN_NAMED_MAX else "",
    )
    return f"private {secrets.token_hex(16)}"
