"""Scales the steps of a calibration, so that each codec has the promised KL on this model. The KL is measured, not estimated.

The Fisher information compares errors well between axes, but says little about their total effect: gradients have heavy tails,
and a few dozen prompts leave the sum uncertain by a third. So each codec's KL is measured once, and its steps are scaled to the
promised KL.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tiered_kv.codecs import codec_for
from tiered_kv.codecs.calibrated.tables import Calibration, EcuqTables, XlayerTables
from tiered_kv.integrations.prefix import continued, prefix_kv
from tiered_kv.layout import KVLayout

LogLine = Callable[[str], None]
PROMISED = {"ecuq:1e-4": 2.05e-3, "xlayer:2e-4": 3.4e-3}
"""The promised KL of these codecs, in nats per token after an encoded prefix: the median over prompts.

The median is used because a few odd prompts dominate the mean. Over ordinary texts the mean is a third higher than the median.
The KL grows with the square of the step."""
UNIT_PROMPTS = 24
FACTOR_MAX = 8.0


def with_units(made: Calibration, model: Any, prompts: Sequence[torch.Tensor], continue_tokens: int, log: LogLine) -> Calibration:
    """Returns the calibration with its steps scaled to the promised KL, by at most a factor of 8 in either direction.

    The KL is measured on some of the prompts. Cost for each of them: one prefill, and three runs of the tokens after it.
    """
    kl = measured(made, model, prompts[:: max(len(prompts) // UNIT_PROMPTS, 1)], continue_tokens, log)
    factors = {name.partition(":")[0]: (PROMISED[name] / each) ** 0.5 if each > 0 else 1.0 for name, each in kl.items()}
    ecuq, xlayer = (min(max(factors.get(name, 1.0), 1 / FACTOR_MAX), FACTOR_MAX) for name in ("ecuq", "xlayer"))
    return replace(made, ecuq=ecuq_times(made.ecuq, ecuq), xlayer=xlayer_times(made.xlayer, xlayer))


def measured(made: Calibration, model: Any, prompts: Sequence[torch.Tensor], continue_tokens: int, log: LogLine) -> dict[str, float]:
    """Measure the KL, between exact and decoded KV, that each codec causes in the last `continue_tokens` tokens of prompts (1, n).

    Returns the median over prompts for each codec. Prompts for which a codec fell back to another one are not counted. A codec
    without any counted prompt is not in the result.
    """
    found: dict[str, list[float]] = {name: [] for name in PROMISED}
    for number, ids in enumerate(prompts, 1):
        prefix = ids.shape[1] - continue_tokens
        if prefix <= 0:
            continue
        kv = prefix_kv(model, ids[:, :prefix], torch.bfloat16)
        exact = continued(model, ids, kv)
        layout = KVLayout(kv.shape[0], kv.shape[2], kv.shape[4], "bfloat16", prefix)
        for name, values in found.items():
            codec = codec_for(name, layout, calibration=made)
            encoded = codec.encode(kv.view(-1).view(torch.uint8))
            if encoded.codec == codec:
                codec.decode_kv(encoded.payload, decoded := torch.empty_like(kv))
                other = continued(model, ids, decoded)
                values.append(float((exact.exp() * (exact - other)).sum(-1).mean()))
        log(f"measuring the KL of a step: prompt {number} of {len(prompts)}")
    return {name: float(np.median(values)) for name, values in found.items() if values}


def ecuq_times(tables: EcuqTables, factor: float) -> EcuqTables:
    """Returns the tables with every step multiplied by `factor`."""
    return tables._replace(width=tables.width * factor, spread=tables.spread / factor)


def xlayer_times(tables: XlayerTables, factor: float) -> XlayerTables:
    """Returns the tables with every step multiplied by `factor`."""
    matrix = tables.matrix.float()
    matrix[..., 2 * matrix.shape[2] :] *= factor
    return tables._replace(matrix=matrix.bfloat16(), spread=tables.spread / factor)
