"""What a block is known by: the namespace of its model, and the hash chain of its tokens.

A key is BLAKE2b-256 of (parent key ‖ the block's token ids as little-endian u32), RFC 7693; the first block's parent
is the root, a digest of namespace and layout. Equal keys therefore mean equal token prefixes under equal models.

The key of a tensor-parallel rank's block is the key of the whole model's block XOR a mask of the rank, so that blocks of ranks can
be put together to those of other ranks without their tokens (docs/design/018-keys-of-ranks.md).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

if TYPE_CHECKING:
    import torch

KEY_BYTES = 32
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
    say the same in all fields but `rank`: `weights` is then of the whole model, not of a rank's part.
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

    def __post_init__(self) -> None:
        if not self.weights or not isinstance(self.weights, str):
            raise TieredKVError(Kind.MODEL, "namespace: weights must be a text that identifies the weights' content")
        if not isinstance(self.tenant, str) or not self.tenant:
            raise TieredKVError(Kind.CONFIG, "namespace: tenant must be a text of at least one character", setting="tenant")
        for name in ("tokenizer", "adapter", "architecture", "rope", "dtype", "kv_scales"):
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
        return _digest(json.dumps(asdict(self), sort_keys=True).encode())

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
        speed of the bus), so that another checkpoint under the same name never matches.
        """
        facts = {"tenant": tenant, "tokenizer": tokenizer_digest(tokenizer), "rank": rank, "world": world, "epoch": epoch}
        if isinstance(model, str):
            return cls(weights=model, **facts)
        if not hasattr(model, "state_dict") or not hasattr(model, "config"):
            raise TieredKVError(Kind.MODEL, f"namespace: a transformers model or a text is needed, got {type(model).__name__}")
        config = _plain(model.config, leave_out=_NOT_IDENTITY)
        return cls(
            weights=tensors_digest(model.state_dict()),
            adapter=_adapter_digest(model),
            architecture=_text_digest([type(model).__name__, config]),
            rope=_rope_digest(model, config),
            dtype=str(model.dtype).removeprefix("torch."),
            **facts,
        )


def tensors_digest(state: "Mapping[str, torch.Tensor]") -> str:
    """A digest of names, shapes, dtypes and every byte of the tensors, in the order of the names; hex.

    Tensors that share their storage (tied weights) are read once. Raises (kind `model`) for weights without content
    and for anything whose content cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    texts: dict[str, str] = {}
    for name, value in state.items():
        _flatten(str(name), value, tensors, texts)
    identities = {
        name: (str(value.device), value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype)) for name, value in tensors.items()
    }
    unique = {identity: tensors[name] for name, identity in identities.items()}
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(unique, pool.map(_tensor_sum, unique.values()), strict=True))
    whole = blake2b(digest_size=KEY_BYTES)
    for name in sorted(identities):
        shape, dtype = identities[name][2], identities[name][4]
        whole.update(f"{name} {shape} {dtype}\n".encode())
        whole.update(sums[identities[name]])
    if texts:
        whole.update(_text_digest(texts).encode())
    return whole.hexdigest()


def _flatten(name: str, value: Any, tensors: "dict[str, torch.Tensor]", texts: dict[str, str]) -> None:
    """Sort one entry of a state dict into plain tensors and texts; raises (kind `model`) for what is neither."""
    if hasattr(value, "__tensor_flatten__"):  # tensor subclasses, such as quantized weights, have no storage of their own
        parts, settings = value.__tensor_flatten__()
        texts[name] = f"{type(value).__name__} {_text_digest(settings)}"
        for part in parts:
            _flatten(f"{name}.{part}", getattr(value, part), tensors, texts)
    elif hasattr(value, "data_ptr"):
        if value.device.type == "meta":
            raise TieredKVError(Kind.MODEL, f"namespace: {name} is on the device 'meta'; load the model's weights first")
        if getattr(value, "is_quantized", False) or str(value.layout) != "torch.strided":
            raise TieredKVError(Kind.MODEL, f"namespace: {name} is a tensor of {value.layout}, {value.dtype}, whose bytes cannot be read")
        tensors[name] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, tensors, texts)
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            _flatten(f"{name}.{number}", item, tensors, texts)
    elif value is None or isinstance(value, str | bytes | int | float) or type(value).__name__ == "dtype":
        texts[name] = f"{type(value).__name__} {value!r}"
    else:
        raise TieredKVError(Kind.MODEL, f"namespace: the model's state {name} is a {type(value).__name__}, whose content cannot be read")


def _tensor_sum(tensor: "torch.Tensor") -> bytes:
    hasher = xxhash.xxh3_128()
    for piece in _byte_pieces(tensor):
        hasher.update(piece)
    return hasher.digest()


def _byte_pieces(tensor: "torch.Tensor", piece_bytes: int = 64 << 20) -> Iterator[memoryview]:
    import torch

    flat = tensor.detach().reshape(-1).contiguous()
    if not flat.numel():
        return
    for piece in flat.view(torch.uint8).split(piece_bytes):
        yield memoryview(piece.cpu().numpy())


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary, or "" for none; hex."""
    if tokenizer is None:
        return ""
    if not hasattr(tokenizer, "get_vocab"):
        raise TieredKVError(Kind.CONFIG, f"tokenizer: has no get_vocab(), got {type(tokenizer).__name__}", setting="tokenizer")
    return _text_digest(sorted(tokenizer.get_vocab().items()))


def _text_digest(facts: Any) -> str:
    return _digest(json.dumps(_plain(facts), sort_keys=True).encode()).hex()


def _plain(value: Any, leave_out: tuple[str, ...] = ()) -> Any:
    """Settings as JSON knows them, the same in every process: sets sorted, keys as text, `leave_out` left out at every level."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, leave_out) for key, item in value.items() if key not in leave_out}
    if isinstance(value, set | frozenset):  # a set's order changes from process to process
        return sorted(str(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item, leave_out) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


# What says where a model came from, how it is run or what becomes of its output, not what its KV is. The class's name
# stands for `architectures`, which a model has only once it was saved.
_NOT_IDENTITY = (
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id"),
    *("id2label", "label2id", "problem_type"),
)
_NOT_ADAPTER_IDENTITY = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
_ADAPTER_STATE = ("active_adapter", "active_adapters", "merged_adapters", "merged", "disable_adapters", "scaling")


def _adapter_digest(model: Any) -> str:
    """Which adapters are active, how strongly, with their settings; their weights are part of the state dict."""
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return ""
    state = {name: facts for name, module in model.named_modules() if (facts := _adapter_state(module))}
    return _text_digest([_plain(adapters, leave_out=_NOT_ADAPTER_IDENTITY), state])


def _adapter_state(module: Any) -> dict:
    """What a module says of its adapters; a method or a number of that name is something else."""
    found = {fact: getattr(module, fact, None) for fact in _ADAPTER_STATE}
    return {fact: value for fact, value in found.items() if isinstance(value, str | bool | list | tuple | dict)}


def _rope_digest(model: Any, config: dict) -> str:
    """Rotary settings and the frequencies that the model really holds (buffers that no state dict contains)."""
    settings = {name: value for name, value in config.items() if "rope" in name or "rotary" in name}
    buffers = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    return _text_digest([settings, tensors_digest(buffers)])
