"""Codecs: a block's bytes made smaller and back, and the frame that carries them at rest and on the wire.

Owns: tensor to payload to frame, and the list of codecs. May import: layout, keys, errors, torch, compression libraries.
Must never know: tiers, policy, where a frame lies or who asked for it.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from tiered_kv.codecs.base import Codec, Encoded
from tiered_kv.codecs.calibration import Calibration
from tiered_kv.codecs.ecuq import EcuqCodec
from tiered_kv.codecs.fp8 import Fp8Codec
from tiered_kv.codecs.integer import Int4Codec, Int6Codec, Int8Codec
from tiered_kv.codecs.lossless import LosslessCodec
from tiered_kv.codecs.lowrank import LowRankCodec
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.codecs.sparse import SparseCodec
from tiered_kv.codecs.xlayer import XlayerCodec
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

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

CODECS: tuple[type[Codec], ...] = (
    RawCodec,
    LosslessCodec,
    Int8Codec,
    Int6Codec,
    Int4Codec,
    Fp8Codec,
    EcuqCodec,
    XlayerCodec,
    LowRankCodec,
    SparseCodec,
)
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


def is_lossy(codec_id: int) -> bool:
    """Whether what comes back from the codec of an id may differ from what was stored; so it may of one that is unknown."""
    return codec_id not in _BY_ID or _BY_ID[codec_id].is_lossy


def codec_by_name(name: str, **parameters: Any) -> Codec:
    """The codec called `name`, with default parameters unless given; raises (kind `config`) naming what is unknown."""
    return _known(name)(**parameters)


def parse_codec(text: str) -> tuple[type[Codec], dict[str, Any]]:
    """The class and the parameters of a codec as people write it: "int8", "ecuq:6e-5", "xlayer:2e-4:3e-5".

    Raises (kind `config`) for an unknown name, naming the nearest known one, and for what the codec does not take.
    """
    name, colon, rest = text.partition(":") if isinstance(text, str) else (text, "", "")
    cls = _known(name)
    return cls, cls.parameters_of(rest) if colon else {}


def codec_for(
    text: str,
    layout: KVLayout | None,
    *,
    rope: bytes | None = None,
    rope_halves: bool = True,
    calibration: Calibration | None = None,
    **parameters: Any,
) -> Codec:
    """The codec written as `text` (see `parse_codec`) for blocks of a layout, None if nothing is known of it; `.at(start)` then
    says which block.

    `rope` is as in `rotation`: the model's inverse frequencies, b"" if it has no RoPE, None if unknown; calibrated codecs
    take it from `calibration`. Raises (kind `config`), also for a calibrated codec without calibration.
    """
    cls, written = parse_codec(text)
    if cls.needs_calibration:
        if calibration is None:
            message = f"codec {text!r} needs a calibrated model; run: tiered-kv calibrate MODEL"
            raise TieredKVError(Kind.CONFIG, message, codec=cls.name, setting="codec")
        parameters = {"calibration": calibration} | parameters
    return cls.for_layout(layout, rope=rope, rope_halves=rope_halves, **written | parameters)


def codec_from_spec(spec: Mapping[str, Any]) -> Codec:
    """The codec that wrote `spec`, with the parameters it had then; raises (kind `config`) naming what is unknown."""
    if not isinstance(spec, Mapping) or "codec" not in spec:
        raise TieredKVError(Kind.CONFIG, f"a codec's spec is a mapping with the field 'codec', not {spec!r}")
    return _known(spec["codec"]).from_spec(spec)


def _known(name: object) -> type[Codec]:
    if not isinstance(name, str) or name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, 1) if isinstance(name, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TieredKVError(Kind.CONFIG, f"codec {name!r} is unknown; known are {', '.join(_BY_NAME)}{hint}", codec=name)
    return _BY_NAME[name]
