"""Computes the probe of a model: a small vector computed from its KV of a few fixed tokens, by which workers compare their models.

A probe reveals changes that no digest of weights and settings can detect: a class whose code was changed, a function replaced by
another of the same name, a kernel that computes something else. The tolerances come from measurements in
docs/design/021-probes-and-model-checks.md.
"""

import numpy as np
import torch
from transformers import DynamicCache

from tiered_kv.protocol.probes import Probe

VECTOR_FLOATS = 1024
SKETCH_FLOATS_MAX = 32
# The largest difference between two computations of the same KV, relative to its norm: (in the first layer, in any layer). Each
# further layer adds the first value, up to the second.
_TOLERANCES = {torch.float64: (1e-6, 1e-5), torch.float32: (2e-4, 2e-3), torch.float16: (4e-3, 0.1)}
_TOLERANCE_ELSE = (1.2e-2, 0.12)


def probe_of(cache: DynamicCache) -> Probe:
    """Returns the probe of a model, from the KV that `support.examine` returns. Cost: less than a millisecond per layer.

    The keys and the values of each layer are reduced to their norm and a sketch. The sketch has sums of the numbers with fixed
    signs. The expected distance of two sketches is the distance of the original numbers (Charikar, Chen, Farach-Colton, 2002).
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
    """Returns `count` pseudo-random signs, +1 or -1, which are the same on every machine."""
    mixed = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(2654435761)
    return (((mixed ^ (mixed >> np.uint32(15))) >> np.uint32(7)) & np.uint32(1)).astype(float) * 2 - 1
