"""The layout of a KV block: its shape and dtype, or only its size in bytes for blocks that an engine packs in its own way.

Axes, in this order everywhere: L layers, 2 (key, value), H KV heads, T tokens, D head dim.
Importing this module does not import torch; dtypes are kept by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}

DESCRIPTION_CHARS_MAX = 2000


class _TensorChecks:
    """The base of the layouts: checks tensors against a layout's `kv_shape` and `torch_dtype`."""

    dtype: str
    spec: str
    torch_dtype: "torch.dtype"

    def kv_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Returns the shape of the KV of `tokens` tokens."""
        raise NotImplementedError

    def check_kv(self, kv: "torch.Tensor", tokens: int, name: str = "kv") -> None:
        """Raise (kind `layout`) unless `kv` is a tensor of the shape `kv_shape(tokens)` and this layout's dtype."""
        self.check_part(kv, self.kv_shape(tokens), name)

    def check_part(self, part: "torch.Tensor", shape: tuple[int, ...], name: str) -> None:
        """Raise (kind `layout`) unless `part` is a dense tensor of this shape and the layout's dtype. The error names `name`."""
        import torch

        if not isinstance(part, torch.Tensor):  # a numpy array has shape, dtype and device as well
            raise TieredKVError(Kind.LAYOUT, f"{name} must be a torch tensor, got {type(part).__name__}")
        if tuple(part.shape) != shape:
            raise TieredKVError(
                Kind.LAYOUT, f"{name} must have the shape {shape} ({self.spec}), got {tuple(part.shape)}", shape=tuple(part.shape)
            )
        if part.dtype != self.torch_dtype:
            raise TieredKVError(Kind.LAYOUT, f"{name} must be {self.dtype}, the layout's dtype, got {part.dtype}", dtype=str(part.dtype))
        if part.device.type == "meta" or part.layout is not torch.strided:
            raise TieredKVError(Kind.LAYOUT, f"{name} must be dense and hold data, got {part.layout} on the device {part.device}")


def _check_sizes(**sizes: int) -> None:
    for field, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TieredKVError(Kind.LAYOUT, f"layout: {field} must be a whole number of at least 1, got {value!r}", field=field)


@dataclass(frozen=True)
class KVLayout(_TensorChecks):
    """The canonical KV block of a model: a contiguous buffer `(layers, 2, kv_heads, block_tokens, head_dim)`.

    `dtype` is a torch dtype or its name ("bfloat16"), and is kept by name. Raises `TieredKVError` (kind `layout`) that names an
    invalid field.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        _check_sizes(layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim, block_tokens=self.block_tokens)
        if self.dtype not in ITEM_BYTES:
            raise TieredKVError(Kind.LAYOUT, f"layout: dtype must be one of {', '.join(ITEM_BYTES)}, got {self.dtype!r}", field="dtype")

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return ITEM_BYTES[self.dtype]

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of KV per token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.item_bytes

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one whole block."""
        return self.token_bytes * self.block_tokens

    @cached_property
    def spec(self) -> str:
        """The layout as one short line. Two layouts with equal lines are equal. The line is part of every chain's root."""
        return f"L{self.layers} H{self.kv_heads} D{self.head_dim} {self.dtype} T{self.block_tokens}"

    @cached_property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """The shape (L, 2, H, T, D) of one block."""
        return self.kv_shape(self.block_tokens)

    def kv_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Returns (L, 2, H, tokens, D), the shape of the KV of `tokens` tokens."""
        return (self.layers, 2, self.kv_heads, tokens, self.head_dim)

    @cached_property
    def torch_dtype(self) -> "torch.dtype":
        """The torch dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class OpaqueLayout(_TensorChecks):
    """A block of `block_bytes` bytes with the KV of `block_tokens` tokens. Only the engine that made it knows the order of its bytes.

    `description`: one line about what determines that order, such as backend, page shapes and dtype. Blocks with different descriptions
    never match each other. `item_bytes`: the width of the numbers in a block (1, 2, 4 or 8), which helps the lossless codec. Other
    codecs cannot be used. As a tensor, the KV of N tokens is (1, 1, 1, N, block_bytes / block_tokens) of uint8, block after block.
    Raises `TieredKVError` (kind `layout`) that names an invalid field.
    """

    block_bytes: int
    block_tokens: int
    description: str
    item_bytes: int = 1

    dtype = "uint8"

    def __post_init__(self) -> None:
        _check_sizes(block_bytes=self.block_bytes, block_tokens=self.block_tokens, item_bytes=self.item_bytes)
        if self.block_bytes % self.block_tokens:
            raise TieredKVError(
                Kind.LAYOUT,
                f"layout: block_bytes must be a multiple of block_tokens {self.block_tokens}, got {self.block_bytes}",
                field="block_bytes",
            )
        if self.item_bytes not in (1, 2, 4, 8):
            raise TieredKVError(Kind.LAYOUT, f"layout: item_bytes must be 1, 2, 4 or 8, got {self.item_bytes!r}", field="item_bytes")
        text = self.description
        if not isinstance(text, str) or not text or not text.isprintable() or len(text) > DESCRIPTION_CHARS_MAX:
            raise TieredKVError(
                Kind.LAYOUT,
                f"layout: description must be one printable line of 1 to {DESCRIPTION_CHARS_MAX} characters, got {text!r:.100}",
                field="description",
            )

    @cached_property
    def token_bytes(self) -> int:
        """Bytes per token."""
        return self.block_bytes // self.block_tokens

    @cached_property
    def spec(self) -> str:
        """The layout as one line, as in `KVLayout.spec`. It begins with "opaque", so that it never equals the line of a `KVLayout`."""
        return f"opaque {self.block_bytes} bytes of {self.item_bytes} T{self.block_tokens} {self.description}"

    @cached_property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """The shape of one block as a tensor."""
        return self.kv_shape(self.block_tokens)

    def kv_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Returns the shape of the bytes of `tokens` tokens."""
        return (1, 1, 1, tokens, self.token_bytes)

    @cached_property
    def torch_dtype(self) -> "torch.dtype":
        """The torch dtype."""
        import torch

        return torch.uint8


Layout: TypeAlias = KVLayout | OpaqueLayout
"""The layout of a client's blocks."""


def layout_of(plain: Mapping[str, Any]) -> Layout:
    """Returns the layout whose `dataclasses.asdict` is `plain`. Raises (kind `layout`) if `plain` describes no layout."""
    for kind in (KVLayout, OpaqueLayout):
        if isinstance(plain, Mapping) and plain.keys() == {each.name for each in fields(kind)}:
            return kind(**plain)
    raise TieredKVError(Kind.LAYOUT, f"layout: must have exactly the fields of a KVLayout or of an OpaqueLayout, got {plain!r:.200}")
