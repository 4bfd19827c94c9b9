"""The ecuq codec: entropy-coded uniform quantization, with a step of its own for each channel.

A channel is one of K before RoPE, or one of V. The calibration has the mean and the step of each channel. The step is derived from the
Fisher information of the next tokens' distribution, so that channels that matter more are rounded more finely. The codec needs no
matrix products.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from tiered_kv.codecs.calibrated.base import CalibratedCodec, alphabet, as_codes, descending_order, thread_buffer
from tiered_kv.codecs.calibrated.row_packing import unpack
from tiered_kv.codecs.calibrated.tables import calibration_of


class EcuqStepTables(NamedTuple):
    """The calibration's tables for one step, in the shapes used here.

    `mean` and `width` (the size of a step) are (L, 2, H, 1, D). `order` lists the channels in the order of the payload, as indices
    into the flattened axes (L, 2, H, D).
    """

    mean: torch.Tensor
    width: torch.Tensor
    order: np.ndarray


@lru_cache(maxsize=16)
def _prepared(fingerprint: str, step: float) -> EcuqStepTables:
    calibration = calibration_of(fingerprint)
    tables = calibration.ecuq
    shape = (calibration.layers, 2, calibration.kv_heads, 1, calibration.head_dim)
    return EcuqStepTables(tables.mean.view(shape), (tables.width * step).view(shape), descending_order(tables.spread))


@dataclass(frozen=True)
class EcuqCodec(CalibratedCodec):
    """The codec of quality `balanced` for calibrated models, at the default step: about 4 times smaller than bf16.

    A number decodes with an error of at most half a step of its channel, plus two roundings to bf16: of codes above
    256, and of the number itself.
    """

    id: ClassVar[int] = 6
    name: ClassVar[str] = "ecuq"
    step_default: ClassVar[float] = 6e-5

    def _quantized(self, kv: torch.Tensor) -> np.ndarray:
        tables = _prepared(self._fingerprint(), self.step)
        x = self._channels(kv).cpu()
        codes = as_codes((x - tables.mean.transpose(-1, -2)) / tables.width.transpose(-1, -2)).to(torch.int16)
        rows: np.ndarray = codes.view(-1, x.shape[-1]).numpy()[tables.order]
        return rows

    def _restored(self, data: memoryview, tokens: int, kv: torch.Tensor) -> None:
        tables = _prepared(self._fingerprint(), self.step)
        numbers = thread_buffer("codes", (len(tables.order), tokens), np.uint16)
        numbers.fill(0)
        self._unpacked(lambda: unpack(data, tables.order, numbers, alphabet(torch.bfloat16)))
        x = torch.from_numpy(numbers).view(torch.bfloat16).view(*kv.shape[:3], kv.shape[4], tokens)
        self._finish(x, tables.mean, tables.width, kv)
