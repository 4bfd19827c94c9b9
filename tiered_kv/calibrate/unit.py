"""What a step means: it is measured on the model, not believed.

The Fisher information says how errors compare, axis by axis, and much less well what they come to: gradients have heavy tails, and a few
dozen prompts leave the sum uncertain by a third. So each codec is run once, and its steps are scaled until it costs
what is promised of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tiered_kv.codecs import codec_for
from tiered_kv.codecs.calibration import Calibration, EcuqTables, XlayerTables
from tiered_kv.integrations.prefix import continued, prefix_kv
from tiered_kv.layout import KVLayout

Say = Callable[[str], None]
PROMISED = {"ecuq:1e-4": 2.05e-3, "xlayer:2e-4": 3.4e-3}
"""KL in nats a token behind a prefix that these leave, the median of prompts: means hang on a few odd ones. The mean over ordinary texts
is a third higher. It grows as the square of the step."""
UNIT_PROMPTS = 24
FACTOR_MAX = 8.0


def with_units(made: Calibration, model: Any, prompts: Sequence[torch.Tensor], continue_tokens: int, say: Say) -> Calibration:
    """The calibration with its steps scaled to what is promised, by at most 8 either way; measured on some of the prompts.

    Cost: for each of those a prefill, and the tokens that follow it three times.
    """
    kl = measured(made, model, prompts[:: max(len(prompts) // UNIT_PROMPTS, 1)], continue_tokens, say)
    factors = {name.partition(":")[0]: (PROMISED[name] / each) ** 0.5 if each > 0 else 1.0 for name, each in kl.items()}
    ecuq, xlayer = (min(max(factors.get(name, 1.0), 1 / FACTOR_MAX), FACTOR_MAX) for name in ("ecuq", "xlayer"))
    return replace(made, ecuq=ecuq_times(made.ecuq, ecuq), xlayer=xlayer_times(made.xlayer, xlayer))


def measured(made: Calibration, model: Any, prompts: Sequence[torch.Tensor], continue_tokens: int, say: Say) -> dict[str, float]:
    """The KL of each promised codec, on exact KV against decoded, over the last `continue_tokens` of prompts (1, n); their median.

    Left out is what a codec did not keep itself; it is not there if nothing is left.
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
        say(f"the cost of a step: prompt {number} of {len(prompts)}")
    return {name: float(np.median(values)) for name, values in found.items() if values}


def ecuq_times(tables: EcuqTables, factor: float) -> EcuqTables:
    """The tables with every step so many times as wide."""
    return tables._replace(width=tables.width * factor, spread=tables.spread / factor)


def xlayer_times(tables: XlayerTables, factor: float) -> XlayerTables:
    """The tables with every step so many times as wide."""
    matrix = tables.matrix.float()
    matrix[..., 2 * matrix.shape[2] :] *= factor
    return tables._replace(matrix=matrix.bfloat16(), spread=tables.spread / factor)
