"""The layout of a KV block: its shape and dtype, hence its bytes.

Axes, in this order everywhere: L layers, 2 (key, value), H KV heads, T tokens, D head dim.
Importing this module does not import torch; dtypes are kept by name.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

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


@dataclass(frozen=True)
class KVLayout:
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
        for field in ("layers", "kv_heads", "head_dim", "block_tokens"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TieredKVError(Kind.LAYOUT, f"layout: {field} must be a whole number of at least 1, got {value!r}", field=field)
        if self.dtype not in ITEM_BYTES:
            raise TieredKVError(Kind.LAYOUT, f"layout: dtype must be one of {', '.join(ITEM_BYTES)}, got {self.dtype!r}", field="dtype")

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of KV per token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one whole block."""
        return self.token_bytes * self.block_tokens

    @cached_property
    def spec(self) -> str:
        """The layout as one short line. Two layouts are equal if their lines are. The line is part of every chain's root."""
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

    def check_kv(self, kv: "torch.Tensor", tokens: int, name: str = "kv") -> None:
        """Raise (kind `layout`) unless `kv` is a tensor (L, 2, H, tokens, D) of this layout's dtype."""
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
            raise TieredKVError(Kind.LAYOUT, f"{name} must be a dense tensor with content, got {part.layout} on the device {part.device}")
