"""Codecs: a block's bytes made smaller and back, and the frame that carries them at rest and on the wire.

Owns: tensor to payload to frame, and the list of codecs. May import: layout, keys, errors, torch, compression libraries.
Must never know: tiers, policy, where a frame lies or who asked for it.
"""

from collections.abc import Mapping
from typing import Any

from tiered_kv.codecs.base import Codec, Encoded
from tiered_kv.codecs.fp8 import Fp8Codec
from tiered_kv.codecs.integer import Int4Codec, Int6Codec, Int8Codec
from tiered_kv.codecs.lossless import LosslessCodec
from tiered_kv.codecs.lowrank import LowRankCodec
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.codecs.sparse import SparseCodec
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

__all__ = [
    "CODECS",
    "Codec",
    "Encoded",
    "Fp8Codec",
    "Int4Codec",
    "Int6Codec",
    "Int8Codec",
    "LosslessCodec",
    "LowRankCodec",
    "RawCodec",
    "SparseCodec",
    "codec_by_id",
    "codec_by_name",
    "codec_for",
    "codec_from_spec",
]

CODECS: tuple[type[Codec], ...] = (RawCodec, LosslessCodec, Int8Codec, Int6Codec, Int4Codec, Fp8Codec, LowRankCodec, SparseCodec)
"""Every codec of this version. Ids and names are for ever: they are in shared indexes and in frames."""

_BY_ID: dict[int, type[Codec]] = {codec.id: codec for codec in CODECS}
_BY_NAME: dict[str, type[Codec]] = {codec.name: codec for codec in CODECS}
assert len(_BY_ID) == len(_BY_NAME) == len(CODECS), "two codecs share an id or a name"


def codec_by_id(codec_id: int) -> Codec:
    """The codec of an id as the shared index keeps it, with its default parameters; raises (kind `config`) if unknown."""
    if codec_id not in _BY_ID:
        known = ", ".join(f"{codec.id} ({codec.name})" for codec in CODECS)
        raise TieredKVError(Kind.CONFIG, f"codec id {codec_id!r} is unknown; known are {known}", codec=codec_id)
    return _BY_ID[codec_id]()


def codec_by_name(name: str, **parameters: Any) -> Codec:
    """The codec called `name`, with default parameters unless given; raises (kind `config`) naming what is unknown."""
    return _known(name)(**parameters)


def codec_for(name: str, layout: KVLayout | None, *, rope: bytes | None = None, rope_halves: bool = True, **parameters: Any) -> Codec:
    """The codec called `name` for blocks of a layout, None if nothing is known of it; `.at(start)` then says which block.

    `rope` is as in `rotation`: the model's inverse frequencies, b"" if it has no RoPE, None if unknown. Raises (kind `config`).
    """
    return _known(name).for_layout(layout, rope=rope, rope_halves=rope_halves, **parameters)


def codec_from_spec(spec: Mapping[str, Any]) -> Codec:
    """The codec that wrote `spec`, with the parameters it had then; raises (kind `config`) naming what is unknown."""
    if not isinstance(spec, Mapping) or "codec" not in spec:
        raise TieredKVError(Kind.CONFIG, f"a codec's spec is a mapping with the field 'codec', not {spec!r}")
    return _known(spec["codec"]).from_spec(spec)


def _known(name: object) -> type[Codec]:
    if not isinstance(name, str) or name not in _BY_NAME:
        raise TieredKVError(Kind.CONFIG, f"codec {name!r} is unknown; known are {', '.join(_BY_NAME)}", codec=name)
    return _BY_NAME[name]
