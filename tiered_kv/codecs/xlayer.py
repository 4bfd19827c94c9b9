"""The xlayer codec: a layer's KV is predicted from the two layers before it, and the rest is transformed and rounded.

Layers are where KV repeats itself (AQUA-KV, Shutova et al. 2025); the transform is Karhunen-Loève's in the metric of the Fisher information
of the next tokens' distribution (compare KVTC, Staniszewski and Łańcucki 2025). All matrices come from the calibration. Prediction starts
from what decoding makes of the layers before, so that errors do not add up. A block decodes alone, layers in their order, and
a layer is one product of matrices: its own channels from [channels two layers before, one layer before, codes].

Shapes: channels of a layer C = 2 H D, in G groups of KV heads, c = C / G. Tokens come last, so that the three parts lie
behind one another, and coefficients fall, so that codes that are all zero come last and cost nothing.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from tiered_kv.codecs.calibrated import CalibratedCodec, alphabet, as_codes, falling, kept
from tiered_kv.codecs.calibration import calibration_of
from tiered_kv.codecs.modepack import unpack
from tiered_kv.layout import KVLayout

BEFORE = 2
"""How many layers a layer is predicted from."""
CODES_STEP = 64
"""Products take the codes up to a multiple of this: they are prepared once for each size."""


class Prepared(NamedTuple):
    """Tables in the shapes that they are used in: mean (L, 2, H, 1, D); matrix (G, L, c, 3c) for one step; `rows`: where the codes, in the
    order of the payload, lie in (G, 2 + L, c); `codes`: where they lie in (G, L, c).
    """

    mean: torch.Tensor
    matrix: torch.Tensor
    rows: np.ndarray
    codes: np.ndarray


@lru_cache(maxsize=4)
def _prepared(fingerprint: str, step: float, product: str) -> Prepared:
    calibration = calibration_of(fingerprint)
    layers, groups, size, _ = calibration.xlayer.matrix.shape
    matrix = calibration.xlayer.matrix.transpose(0, 1).float()
    matrix[..., BEFORE * size :] *= step
    codes = falling(calibration.xlayer.spread.view(layers, groups, size).transpose(0, 1).contiguous())
    group, rest = np.divmod(codes, layers * size)
    rows = group * (layers + BEFORE) * size + BEFORE * size + rest
    mean = calibration.xlayer.mean.view(layers, groups, 2, calibration.kv_heads // groups, calibration.head_dim)
    mean = mean.transpose(1, 2).reshape(layers, 2, calibration.kv_heads, 1, calibration.head_dim)
    return Prepared(mean, matrix.to(getattr(torch, product)).contiguous(), rows, codes)


@lru_cache(maxsize=3)
def _analysis(fingerprint: str, step: float, product: str) -> torch.Tensor:
    """What encoding needs beside: the inverse of the codes' matrix (G, L, c, c), float32."""
    matrix = _prepared(fingerprint, step, product).matrix
    basis = matrix[..., BEFORE * matrix.shape[2] :].double().numpy()
    return torch.from_numpy(np.linalg.inv(basis).astype(np.float32))  # torch's LU factorization of batches fails in some builds on CPUs


@dataclass(frozen=True)
class XlayerCodec(CalibratedCodec):
    """Nine times less than bf16 at the default step, `compact`, for about what computing in bf16 costs; `archive` is 2e-4.

    `product`: the dtype of the products, "bfloat16" or "float32", which encoding and decoding share; sums are float32 and rounded at
    the end. Another machine's rounding may differ in the last bit, which costs a little quality, nothing else.
    """

    id: ClassVar[int] = 7
    name: ClassVar[str] = "xlayer"
    step_default: ClassVar[float] = 1e-4

    product: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product not in ("bfloat16", "float32"):
            raise self._refused("product", "'bfloat16' or 'float32'")

    @classmethod
    def for_layout(cls, layout: KVLayout | None, **parameters: Any) -> Self:
        """As of every calibrated codec; products are in bf16 where the processor has them."""
        is_fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        return super().for_layout(layout, **{"product": "bfloat16" if is_fast else "float32"} | parameters)

    def _coded(self, kv: torch.Tensor) -> np.ndarray:
        tables = self._tables()
        inverse = _analysis(self._fingerprint(), self.step, self.product)
        groups, layers, size, _ = tables.matrix.shape
        x = self._channels(kv).cpu().sub_(tables.mean.transpose(-1, -2))
        tokens = x.shape[-1]
        x = x.view(layers, 2, groups, -1, tokens).permute(2, 0, 1, 3, 4).reshape(groups, layers, size, tokens)
        space, _ = self._space(tokens)
        codes = torch.empty(x.shape, dtype=torch.int16)
        for group in range(groups):
            for layer in range(layers):
                known = space[group, layer : layer + BEFORE].reshape(-1, tokens).float()
                predictor = tables.matrix[group, layer, :, : BEFORE * size].float()
                found = as_codes(inverse[group, layer] @ (x[group, layer] - predictor @ known))
                codes[group, layer] = found
                space[group, layer + BEFORE] = found
                self._advance(tables, space, group, layer, _end(found))
        rows: np.ndarray = codes.view(-1, tokens).numpy()[tables.codes]
        return rows

    def _restored(self, data: memoryview, tokens: int, kv: torch.Tensor) -> None:
        tables = self._tables()
        groups, layers, size, _ = tables.matrix.shape
        space, words = self._space(tokens)
        filled = self._unpacked(lambda: unpack(data, tables.rows, words, alphabet(space.dtype)))
        some = np.zeros(len(words), bool)
        some[filled] = True
        some = some.reshape(groups, layers + BEFORE, size)[:, BEFORE:]
        ends = np.where(some.any(-1), size - some[..., ::-1].argmax(-1), 0).tolist()
        for group in range(groups):
            for layer in range(layers):
                self._advance(tables, space, group, layer, ends[group][layer])
        heads = self._dims[1] // groups
        x = space[:, BEFORE:].view(groups, layers, 2, heads, kv.shape[4], tokens).permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
        self._finish(x, tables.mean, None, kv)

    def _tables(self) -> Prepared:
        return _prepared(self._fingerprint(), self.step, self.product)

    def _space(self, tokens: int) -> tuple[torch.Tensor, np.ndarray]:
        """Zeros (G, 2 + L, c, T), two layers of nothing first, where a layer's codes become its channels; and the same as words in rows."""
        groups, layers, size, _ = self._tables().matrix.shape
        shape = (groups, layers + BEFORE, size, tokens)
        words = kept("space", shape, np.uint16 if self.product == "bfloat16" else np.float32)
        words.fill(0)
        return torch.from_numpy(words).view(getattr(torch, self.product)), words.reshape(-1, tokens)

    def _advance(self, tables: Prepared, space: torch.Tensor, group: int, layer: int, end: int) -> None:
        """Turn a layer's codes into its channels; from the code `end` on they are all zero."""
        _, _, size, tokens = space.shape
        upto = BEFORE * size + min(-(-end // CODES_STEP) * CODES_STEP, size)
        decoded = torch.empty(size, tokens, dtype=space.dtype)
        inputs = space[group, layer : layer + BEFORE + 1].view(-1, tokens)[:upto]
        torch.mm(tables.matrix[group, layer, :, :upto], inputs, out=decoded)
        space[group, layer + BEFORE] = decoded


def _end(codes: torch.Tensor) -> int:
    """How many rows (c, T) there are up to the last one that is not all zero."""
    some = codes.any(1).nonzero()
    return int(some[-1]) + 1 if len(some) else 0
