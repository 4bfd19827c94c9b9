"""The probe of a model: its KV of a few fixed tokens, reduced to a small vector that workers with the same namespace compare.

It shows what no digest of weights and settings can see: a class whose code was changed, a function that was replaced by one of the
same name, a kernel that computes something else. Figures behind the tolerances: docs/design/021-probes-and-model-checks.md.
"""

import numpy as np
import torch
from transformers import DynamicCache

from tiered_kv.protocol.probes import Probe

VECTOR_FLOATS = 1024
SKETCH_FLOATS_MAX = 32
# How far two computations of the same KV may be apart, relative to its norm: in the first layer (each further one adds as much), and
# at most.
_TOLERANCES = {torch.float64: (1e-6, 1e-5), torch.float32: (2e-4, 2e-3), torch.float16: (4e-3, 0.1)}
_TOLERANCE_ELSE = (1.2e-2, 0.12)


def probe_of(cache: DynamicCache) -> Probe:
    """The probe of a model from the KV that it computed of the tokens of `support.examine`. Cost: less than a millisecond a layer.

    Every layer's keys and values are each reduced to their norm and to a sketch: sums of their numbers with fixed signs, whose
    differences are in expectation as large as those of the numbers (Charikar, Chen, Farach-Colton, 2002).
    """
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    width = max(1, min(SKETCH_FLOATS_MAX, VECTOR_FLOATS // len(parts) - 1))
    vector = np.stack([_sketch(part, width) for part in parts])
    return Probe(vector.astype("<f4").tobytes(), width + 1, *_TOLERANCES.get(parts[0].dtype, _TOLERANCE_ELSE))


def _sketch(part: torch.Tensor, width: int) -> np.ndarray:
    numbers = part.detach().double().cpu().numpy().reshape(-1)
    signs = _signs(numbers.size)
    padded = np.zeros(-(-numbers.size // width) * width)
    padded[: numbers.size] = numbers * signs
    return np.concatenate([[np.linalg.norm(numbers)], padded.reshape(-1, width).sum(0)])


def _signs(count: int) -> np.ndarray:
    """+1 and -1 that look random and are the same everywhere."""
    mixed = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(2654435761)
    return (((mixed ^ (mixed >> np.uint32(15))) >> np.uint32(7)) & np.uint32(1)).astype(float) * 2 - 1
