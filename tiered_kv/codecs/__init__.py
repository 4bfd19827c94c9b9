"""Codecs that make a block's bytes smaller and restore them, and the frame that carries them in storage and on the wire.

Owns: the encoding of a tensor as a payload and a frame, the decoding, and the list of codecs.
May import: layout, keys, errors, torch, compression libraries.
Must never know: tiers, policy, where a frame is stored, or who reads it.

Importing this package does not import torch, which takes two seconds. The names that need it import it on first use.
"""

from typing import TYPE_CHECKING, Any

from tiered_kv.codecs.base import Codec, Encoded

if TYPE_CHECKING:
    from tiered_kv.codecs.calibrated.ecuq import EcuqCodec
    from tiered_kv.codecs.calibrated.tables import Calibration
    from tiered_kv.codecs.calibrated.xlayer import XlayerCodec
    from tiered_kv.codecs.fp8 import Fp8Codec
    from tiered_kv.codecs.integer import Int4Codec, Int6Codec, Int8Codec
    from tiered_kv.codecs.lossless import LosslessCodec
    from tiered_kv.codecs.lowrank import LowRankCodec
    from tiered_kv.codecs.raw import RawCodec
    from tiered_kv.codecs.registry import CODECS, codec_by_id, codec_by_name, codec_for, codec_from_spec, is_lossy, parse_codec
    from tiered_kv.codecs.sparse import SparseCodec

__all__ = [
    "CODECS",
    "Calibration",
    "Codec",
    "EcuqCodec",
    "Encoded",
    "Fp8Codec",
    "Int4Codec",
    "Int6Codec",
    "Int8Codec",
    "LosslessCodec",
    "LowRankCodec",
    "RawCodec",
    "SparseCodec",
    "XlayerCodec",
    "codec_by_id",
    "codec_by_name",
    "codec_for",
    "codec_from_spec",
    "is_lossy",
    "parse_codec",
]


def __getattr__(name: str) -> Any:
    """Returns a name of `__all__` from the registry, and keeps it, so that later uses cost nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'tiered_kv.codecs' has no attribute {name!r}")
    from tiered_kv.codecs import registry

    found = globals()[name] = getattr(registry, name)
    return found
