"""The xlayer codec: predicts a layer's KV from the two previous layers, then transforms and rounds the remainder.

KV is redundant across layers (AQUA-KV, Shutova et al. 2025). The transform is Karhunen-Loève's in the metric of the Fisher information
of the next tokens' distribution (compare KVTC, Staniszewski and Łańcucki 2025). All matrices come from the calibration.
The prediction uses the decoded previous layers, so that errors do not add up. A block decodes on its own, layer by layer.
Decoding a layer is one matrix product. Its input is [channels two layers earlier, channels one layer earlier, codes].

Shapes: a layer has C = 2 H D channels, in G groups of KV heads, with c = C / G. Tokens are the last axis, so that the three inputs are
contiguous. Coefficients are sorted by falling deviation, so that rows of zero codes come last and cost nothing.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from tiered_kv.codecs.calibrated.base import CalibratedCodec, alphabet, as_codes, descending_order, thread_buffer
from tiered_kv.codecs.calibrated.row_packing import unpack
from tiered_kv.codecs.calibrated.tables import calibration_of
from tiered_kv.layout import Layout

PREVIOUS_LAYERS = 2
"""How many previous layers predict a layer."""
CODES_STEP = 64
"""A matrix product has a number of codes rounded up to a multiple of this, because torch prepares products once for each size."""


class XlayerStepTables(NamedTuple):
    """The calibration's tables in the shapes used here: `mean` (L, 2, H, 1, D), and `matrix` (G, L, c, 3c) scaled for one step.

    `rows` and `codes` list the rows of codes in the order of the payload, as indices into flattened axes: (G, 2 + L, c) for `rows`
    and (G, L, c) for `codes`.
    """

    mean: torch.Tensor
    matrix: torch.Tensor
    rows: np.ndarray
    codes: np.ndarray


@lru_cache(maxsize=4)
def _prepared(fingerprint: str, step: float, product: str) -> XlayerStepTables:
    calibration = calibration_of(fingerprint)
    layers, groups, size, _ = calibration.xlayer.matrix.shape
    matrix = calibration.xlayer.matrix.transpose(0, 1).float()
    matrix[..., PREVIOUS_LAYERS * size :] *= step
    codes = descending_order(calibration.xlayer.spread.view(layers, groups, size).transpose(0, 1).contiguous())
    group, rest = np.divmod(codes, layers * size)
    rows = group * (layers + PREVIOUS_LAYERS) * size + PREVIOUS_LAYERS * size + rest
    mean = calibration.xlayer.mean.view(layers, groups, 2, calibration.kv_heads // groups, calibration.head_dim)
    mean = mean.transpose(1, 2).reshape(layers, 2, calibration.kv_heads, 1, calibration.head_dim)
    return XlayerStepTables(mean, matrix.to(getattr(torch, product)).contiguous(), rows, codes)


@lru_cache(maxsize=3)
def _analysis(fingerprint: str, step: float, product: str) -> torch.Tensor:
    """Returns the inverse of the columns of `matrix` that multiply the codes: (G, L, c, c), float32. Only encoding needs it."""
    matrix = _prepared(fingerprint, step, product).matrix
    basis = matrix[..., PREVIOUS_LAYERS * matrix.shape[2] :].double().numpy()
    return torch.from_numpy(np.linalg.inv(basis).astype(np.float32))  # torch's batched LU factorization fails on CPUs in some builds


@dataclass(frozen=True)
class XlayerCodec(CalibratedCodec):
    """The cross-layer transform codec.

    About 9 times smaller than bf16 at the default step (quality `compact`), with about the error of computing in bf16.
    Quality `archive` has the step 2e-4.

    `product`: the dtype of the matrix products, "bfloat16" or "float32". Encoding and decoding use the same one. Sums are
    float32 and rounded at the end. Rounding on another machine may differ in the last bit. That adds a small error and has no
    other effect.
    """

    id: ClassVar[int] = 7
    name: ClassVar[str] = "xlayer"
    step_default: ClassVar[float] = 1e-4

    product: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product not in ("bfloat16", "float32"):
            raise self._invalid("product", "'bfloat16' or 'float32'")

    @classmethod
    def for_layout(cls, layout: Layout | None, **parameters: Any) -> Self:
        """Returns the codec for a layout (see `CalibratedCodec.for_layout`). Products are in bf16 where the hardware is fast at it."""
        is_fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        return super().for_layout(layout, **{"product": "bfloat16" if is_fast else "float32"} | parameters)

    def _quantized(self, kv: torch.Tensor) -> np.ndarray:
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
                known = space[group, layer : layer + PREVIOUS_LAYERS].reshape(-1, tokens).float()
                predictor = tables.matrix[group, layer, :, : PREVIOUS_LAYERS * size].float()
                found = as_codes(inverse[group, layer] @ (x[group, layer] - predictor @ known))
                codes[group, layer] = found
                space[group, layer + PREVIOUS_LAYERS] = found
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
        some = some.reshape(groups, layers + PREVIOUS_LAYERS, size)[:, PREVIOUS_LAYERS:]
        ends = np.where(some.any(-1), size - some[..., ::-1].argmax(-1), 0).tolist()
        for group in range(groups):
            for layer in range(layers):
                self._advance(tables, space, group, layer, ends[group][layer])
        heads = self._dims[1] // groups
        x = space[:, PREVIOUS_LAYERS:].view(groups, layers, 2, heads, kv.shape[4], tokens).permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
        self._finish(x, tables.mean, None, kv)

    def _tables(self) -> XlayerStepTables:
        return _prepared(self._fingerprint(), self.step, self.product)

    def _space(self, tokens: int) -> tuple[torch.Tensor, np.ndarray]:
        """Returns a tensor of zeros (G, 2 + L, c, T), and the same memory as rows of words.

        Decoding replaces each layer's codes in place. The first two layers stay zero, as the previous layers of the first layer.
        """
        groups, layers, size, _ = self._tables().matrix.shape
        shape = (groups, layers + PREVIOUS_LAYERS, size, tokens)
        words = thread_buffer("space", shape, np.uint16 if self.product == "bfloat16" else np.float32)
        words.fill(0)
        return torch.from_numpy(words).view(getattr(torch, self.product)), words.reshape(-1, tokens)

    def _advance(self, tables: XlayerStepTables, space: torch.Tensor, group: int, layer: int, end: int) -> None:
        """Replaces a layer's codes by its decoded channels. All codes from index `end` on must be zero."""
        _, _, size, tokens = space.shape
        upto = PREVIOUS_LAYERS * size + min(-(-end // CODES_STEP) * CODES_STEP, size)
        decoded = torch.empty(size, tokens, dtype=space.dtype)
        inputs = space[group, layer : layer + PREVIOUS_LAYERS + 1].view(-1, tokens)[:upto]
        torch.mm(tables.matrix[group, layer, :, :upto], inputs, out=decoded)
        space[group, layer + PREVIOUS_LAYERS] = decoded


def _end(codes: torch.Tensor) -> int:
    """Returns the number of rows (c, T) up to the last row that is not all zero."""
    some = codes.any(1).nonzero()
    return int(some[-1]) + 1 if len(some) else 0
