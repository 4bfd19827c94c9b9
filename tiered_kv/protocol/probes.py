"""Probes: a model's KV of a few fixed tokens. Comparing probes shows whether two models with one namespace compute the same KV.

The first worker of a namespace registers its probe with its node and the coordinator. Its variant of the namespace is "". A later
worker whose probe agrees with the first one, up to rounding, gets the same variant. A worker whose probe does not agree gets another
variant, which it shares with all workers whose probes agree with its own.
"""

import logging
import os
import reprlib
import threading
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import numpy as np

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey

log = logging.getLogger(__name__)

VECTOR_BYTES_MAX = 16 << 10
ROOTS_MAX = 1024
VARIANTS_MAX = 8
FILE_NAME = "probes"


class Probe(NamedTuple):
    """A model's KV of a few tokens: for each layer one row for the keys and one for the values.

    `vector`: little-endian float32, rows of `row_floats`. A row is a norm, followed by a sketch of the vector with that norm. Rows of
    two probes of the same model may differ by `tolerance` × (1 + layer) relative to the norm, and by at most `tolerance_max`:
    rounding grows with the depth.
    """

    vector: bytes
    row_floats: int
    tolerance: float
    tolerance_max: float

    @classmethod
    def of_message(cls, message: Any) -> Self:
        """Returns the probe in a message. Raises (kind `transport`) if the message is not a probe."""
        try:
            vector, row_floats, tolerance, tolerance_max = message
            is_valid = type(vector) is bytes and type(row_floats) is int and type(tolerance) is float and type(tolerance_max) is float
            is_valid = is_valid and 0 < len(vector) <= VECTOR_BYTES_MAX and row_floats > 1 and len(vector) % (8 * row_floats) == 0
        except (TypeError, ValueError) as error:
            raise TieredKVError(Kind.TRANSPORT, f"expected a probe of four fields, got {type(message).__name__}") from error
        if not is_valid:
            raise TieredKVError(
                Kind.TRANSPORT,
                f"expected a probe: pairs of rows of at most {VECTOR_BYTES_MAX} bytes and two tolerances, got {reprlib.repr(message)}",
            )
        return cls(vector, row_floats, tolerance, tolerance_max)

    def distance(self, other: "Probe") -> float:
        """Returns the largest difference of two rows, as a share of the rows' tolerance. It is at most 1 for equal models."""
        if self.row_floats != other.row_floats or len(self.vector) != len(other.vector):
            return float("inf")
        ours, theirs = self._rows(), other._rows()
        norms = np.maximum(np.maximum(ours[:, 0], theirs[:, 0]), np.finfo("f4").tiny)
        apart = np.maximum(np.linalg.norm(ours[:, 1:] - theirs[:, 1:], axis=1), np.abs(ours[:, 0] - theirs[:, 0])) / norms
        allowed = np.minimum(self.tolerance * (1 + np.arange(len(ours)) // 2), self.tolerance_max)
        largest = float(np.max(apart / allowed))
        return largest if largest == largest else float("inf")

    def _rows(self) -> np.ndarray:
        return np.frombuffer(self.vector, "<f4").astype(float).reshape(-1, self.row_floats)


Variants = list[tuple[str, Probe]]
"""The variants of one root: each with its name and the probe of its first worker."""


class ProbeBook:
    """The variants of the ROOTS_MAX most recently requested roots. Thread-safe."""

    def __init__(self) -> None:
        self._variants: dict[BlockKey, Variants] = {}
        self._lock = threading.Lock()

    def match(self, root: BlockKey, probe: Probe) -> str:
        """Returns the variant of `root` that a model with this probe belongs to: the nearest within the tolerance, else a new one.

        The first variant of a root is "". A root keeps at most VARIANTS_MAX variants. If all exist and none matches, each call returns
        a variant of its own, which is not kept.
        """
        with self._lock:
            known = self._touched(root)
            near = sorted((probe.distance(other), name) for name, other in known)
            if near and near[0][0] <= 1:
                return near[0][1]
            if len(known) >= VARIANTS_MAX:
                return f"beyond {os.urandom(16).hex()}"
            name = blake2b(probe.vector, digest_size=16).hexdigest() if known else ""
            known.append((name, probe))
            return name

    def adopt(self, root: BlockKey, variants: Iterable[tuple[str, Probe]]) -> None:
        """Add variants that another process knows. Variants that are known here already stay unchanged."""
        with self._lock:
            known = self._touched(root)
            for name, probe in variants:
                ours = dict(known).get(name)
                if ours is None and len(known) < VARIANTS_MAX:
                    known.append((name, probe))
                elif ours is not None and not name and ours.distance(probe) > 1:
                    log.warning(
                        "two nodes hold different first probes of %s: they met different models while the coordinator was unreachable",
                        root.hex()[:12],
                    )

    def replace(self, root: BlockKey, variants: Variants) -> None:
        """Replace the known variants of a root with those that the cluster knows."""
        with self._lock:
            self._touched(root)[:] = variants[:VARIANTS_MAX]

    def variants(self, root: BlockKey) -> Variants:
        """Returns the known variants of a root."""
        with self._lock:
            return list(self._variants.get(root, []))

    def everything(self) -> list[tuple[BlockKey, Variants]]:
        """Returns the known variants of all roots, the least recently requested root first."""
        with self._lock:
            return [(root, list(known)) for root, known in self._variants.items()]

    def _touched(self, root: BlockKey) -> Variants:
        known = self._variants.pop(root, [])
        self._variants[root] = known
        if len(self._variants) > ROOTS_MAX:
            del self._variants[next(iter(self._variants))]
        return known
