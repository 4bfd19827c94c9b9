"""The list of codecs, and the functions that find one of them. Imports torch."""

import difflib
from collections.abc import Mapping
from typing import Any

from tiered_kv.codecs.base import Codec
from tiered_kv.codecs.calibrated.ecuq import EcuqCodec
from tiered_kv.codecs.calibrated.tables import Calibration
from tiered_kv.codecs.calibrated.xlayer import XlayerCodec
from tiered_kv.codecs.fp8 import Fp8Codec
from tiered_kv.codecs.integer import Int4Codec, Int6Codec, Int8Codec
from tiered_kv.codecs.lossless import LosslessCodec
from tiered_kv.codecs.lowrank import LowRankCodec
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.codecs.sparse import SparseCodec
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import Layout, OpaqueLayout

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
"""Every codec of this version. Ids and names never change, because shared indexes and frames store them."""

_BY_ID: dict[int, type[Codec]] = {codec.id: codec for codec in CODECS}
_BY_NAME: dict[str, type[Codec]] = {codec.name: codec for codec in CODECS}
assert len(_BY_ID) == len(_BY_NAME) == len(CODECS), "two codecs share an id or a name"


def codec_by_id(codec_id: int) -> Codec:
    """Returns the codec with this id (the shared index stores ids), with default parameters. Raises (kind `config`) for an unknown id."""
    if codec_id not in _BY_ID:
        known = ", ".join(f"{codec.id} ({codec.name})" for codec in CODECS)
        raise TieredKVError(Kind.CONFIG, f"unknown codec id {codec_id!r}; known ids are {known}", codec=codec_id)
    return _BY_ID[codec_id]()


def is_lossy(codec_id: int) -> bool:
    """Returns whether a block decoded by the codec with this id may differ from what was stored. True for an unknown id."""
    return codec_id not in _BY_ID or _BY_ID[codec_id].is_lossy


def codec_by_name(name: str, **parameters: Any) -> Codec:
    """Returns the codec with this name. Parameters that are not given keep their defaults. Raises (kind `config`) for an unknown name."""
    return _known(name)(**parameters)


def parse_codec(text: str) -> tuple[type[Codec], dict[str, Any]]:
    """Parses a codec as users write it: "int8", "ecuq:6e-5", "xlayer:2e-4:3e-5". Returns its class and its parameters.

    Raises (kind `config`) for an unknown name, with the nearest known name as a hint, and for parameters that the codec does not take.
    """
    name, colon, rest = text.partition(":") if isinstance(text, str) else (text, "", "")
    cls = _known(name)
    return cls, cls.parameters_of(rest) if colon else {}


def codec_for(
    text: str,
    layout: Layout | None,
    *,
    rope: bytes | None = None,
    rope_halves: bool = True,
    calibration: Calibration | None = None,
    **parameters: Any,
) -> Codec:
    """Returns the codec written as `text` (see `parse_codec`) for blocks of `layout`. None means that the layout is unknown.

    Only lossless codecs apply to an `OpaqueLayout`: if `text` names a lossy one, returns the codec `lossless`, which needs
    no calibration. Call `.at(start)` on the result to get the codec of one block. `rope` holds the model's inverse frequencies
    (see `rotation`): b"" if the model has no RoPE, None if unknown. `rope_halves` says how channels are paired (see `rotation.turning`).
    Calibrated codecs take RoPE from `calibration` instead.
    Raises as `parse_codec`, and (kind `config`) for a calibrated codec without a calibration.
    """
    cls, written = parse_codec(text)
    if cls.is_lossy and isinstance(layout, OpaqueLayout):
        return LosslessCodec.for_layout(layout)
    if cls.needs_calibration:
        if calibration is None:
            message = f"codec {text!r} needs a calibrated model; run: tiered-kv calibrate MODEL"
            raise TieredKVError(Kind.CONFIG, message, codec=cls.name, setting="codec")
        parameters = {"calibration": calibration} | parameters
    return cls.for_layout(layout, rope=rope, rope_halves=rope_halves, **written | parameters)


def codec_from_spec(spec: Mapping[str, Any]) -> Codec:
    """Returns the codec that wrote `spec`, with the parameters in the spec. Raises (kind `config`) for an unknown codec or parameter."""
    if not isinstance(spec, Mapping) or "codec" not in spec:
        raise TieredKVError(Kind.CONFIG, f"spec must be a mapping with the field 'codec', got {spec!r}")
    return _known(spec["codec"]).from_spec(spec)


def _known(name: object) -> type[Codec]:
    if not isinstance(name, str) or name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, 1) if isinstance(name, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TieredKVError(Kind.CONFIG, f"unknown codec {name!r}; known codecs are {', '.join(_BY_NAME)}{hint}", codec=name)
    return _BY_NAME[name]
