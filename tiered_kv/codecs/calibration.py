"""Calibration: what codecs have learned of one model, in one file that every node loads.

The file, little-endian:

    magic "TKVC" | version u16 | meta bytes u32 | meta (msgpack) | arrays, one behind the other | BLAKE2b-256 of all before

A block that was coded with tables is read with those tables only: codecs name them in their spec by a fingerprint, and
find them among those that were registered in this process. Channels (C) of a layer are (2, H, D), K before RoPE and V.
"""

import math
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np
import torch

from tiered_kv.errors import Kind, TieredKVError

MAGIC = b"TKVC"
VERSION = 1
DIGEST_BYTES = 32
FINGERPRINT_BYTES = 16
BOUND_MARGIN = 4.0
"""A block may be this many times as far from what it was as the worst one of the calibration."""

_HEAD = struct.Struct("<4sHI")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EcuqTables(NamedTuple):
    """Of each channel (L, C), float32: its mean, the width of a step at step 1, and the deviation in such widths."""

    mean: torch.Tensor
    width: torch.Tensor
    spread: torch.Tensor


class XlayerTables(NamedTuple):
    """`mean` (L, C) and `spread`, the deviation of each coefficient at step 1 (L, C), float32, and `matrix`, (L, G, C/G, 3C/G) in bf16.

    A layer's channels come in G groups of KV heads, each (2, H/G, D). From the left, `matrix` takes the same group's decoded channels two
    layers before, one layer before, and the coefficients, the greatest first; `mean` and `spread` are in the order of the groups too.
    """

    mean: torch.Tensor
    spread: torch.Tensor
    matrix: torch.Tensor

    @property
    def groups(self) -> int:
        """G."""
        return self.matrix.shape[1]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What one file holds. Not to be changed, nor its tensors; equal fingerprints mean equal tables.

    `weights`: digests of the weights it is valid for (`Namespace.weights`), one for each dtype that the model may be loaded in. `rope`
    and `rope_halves` as in `rotation`, b"" without RoPE. `tokens`: how many it was fitted on. `errors`: for each codec
    the steps that were tried, ascending, each with the relative error of the worst block (see `Encoded`). `measured`: one record a codec.
    """

    model: str
    weights: tuple[str, ...]
    layers: int
    kv_heads: int
    head_dim: int
    rope: bytes
    rope_halves: bool
    tokens: int
    ecuq: EcuqTables
    xlayer: XlayerTables
    errors: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    measured: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        channels = 2 * self.kv_heads * self.head_dim
        flat, groups = (self.layers, channels), self.xlayer.groups
        cube = (self.layers, groups, channels // groups, 3 * (channels // groups))
        needed = [flat, flat, flat, flat, flat, cube]
        if self.kv_heads % groups or [tuple(each.shape) for each in self._arrays().values()] != needed:
            raise TieredKVError(Kind.CONFIG, f"calibration of {self.model}: its tables are not those of {flat[0]} layers of {channels}")
        if not all(bool(each.isfinite().all()) for each in self._arrays().values()):
            raise TieredKVError(Kind.CONFIG, f"calibration of {self.model}: its tables have numbers that are not finite")

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that stand for all that decoding depends on."""
        facts = [self.layers, self.kv_heads, self.head_dim, self.rope, self.rope_halves]
        whole = blake2b(msgpack.packb(facts), digest_size=FINGERPRINT_BYTES)
        for array in self._arrays().values():
            whole.update(_bytes_of(array))
        return whole.hexdigest()

    def bound(self, codec: str, step: float) -> float:
        """The relative error above which a block is not what the codec of that name was calibrated for, at a step; infinity if unknown."""
        known = self.errors.get(codec, ())
        if not known:
            return math.inf
        steps, errors = np.array(known).T
        at = float(np.exp(np.interp(np.log(step), np.log(steps), np.log(errors))))
        beyond = step / float(np.clip(step, steps[0], steps[-1]))
        return BOUND_MARGIN * at * beyond**2

    def with_measured(self, rows: Iterable[Mapping[str, Any]]) -> Self:
        """The same with other records of what was measured; the fingerprint stays."""
        return replace(self, measured=tuple(dict(row) for row in rows))

    def with_errors(self, errors: Mapping[str, tuple[tuple[float, float], ...]]) -> Self:
        """The same with other errors of blocks; the fingerprint stays."""
        return replace(self, errors=dict(errors))

    def save(self, path: str | Path) -> None:
        """Write the file, all or nothing. Raises (kind `storage`) if it cannot."""
        path = Path(path)
        data = self._packed()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fchmod(file.fileno(), 0o644)  # it holds no secret, and nodes may run as somebody else
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise TieredKVError(Kind.STORAGE, f"{path}: the calibration cannot be written ({error})", path=str(path)) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The calibration in a file. Raises, naming the file: kind `config` for what is none or cannot be read, `corrupt` if damaged."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TieredKVError(Kind.CONFIG, f"{path}: the calibration cannot be read ({error})", path=str(path)) from error
        if len(data) < _HEAD.size or data[:4] != MAGIC:
            raise TieredKVError(Kind.CONFIG, f"{path}: not a calibration file", path=str(path))
        _, version, meta_bytes = _HEAD.unpack_from(data)
        if version > VERSION:
            message = f"{path}: a calibration of version {version}, written by a newer tiered_kv; this one reads up to version {VERSION}"
            raise TieredKVError(Kind.CONFIG, message, path=str(path))
        body = memoryview(data)[:-DIGEST_BYTES]
        if blake2b(body, digest_size=DIGEST_BYTES).digest() != data[-DIGEST_BYTES:]:
            raise TieredKVError(Kind.CORRUPT, f"{path}: the calibration file is damaged; run: tiered-kv calibrate MODEL", path=str(path))
        try:
            return cls._unpacked(body[_HEAD.size : _HEAD.size + meta_bytes], body[_HEAD.size + meta_bytes :])
        except (ValueError, TypeError, KeyError, RuntimeError, TieredKVError) as error:
            raise TieredKVError(Kind.CORRUPT, f"{path}: the calibration file is not complete ({error})", path=str(path)) from error

    def _arrays(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{part}": array for name in ("ecuq", "xlayer") for part, array in getattr(self, name)._asdict().items()}

    def _packed(self) -> bytes:
        names = ("model", "weights", "layers", "kv_heads", "head_dim", "rope", "rope_halves", "tokens", "errors", "measured")
        meta = {name: getattr(self, name) for name in names} | {"errors": dict(self.errors)}
        arrays = self._arrays()
        meta["arrays"] = {name: [str(array.dtype).removeprefix("torch."), list(array.shape)] for name, array in arrays.items()}
        packed = msgpack.packb(meta)
        body = b"".join([_HEAD.pack(MAGIC, VERSION, len(packed)), packed, *map(_bytes_of, arrays.values())])
        return body + blake2b(body, digest_size=DIGEST_BYTES).digest()

    @classmethod
    def _unpacked(cls, packed: memoryview, data: memoryview) -> Self:
        meta = msgpack.unpackb(packed)
        tables: dict[str, dict[str, torch.Tensor]] = {"ecuq": {}, "xlayer": {}}
        at = 0
        for name, (dtype, shape) in meta.pop("arrays").items():
            size = math.prod(shape) * _DTYPES[dtype].itemsize
            array = torch.from_numpy(np.frombuffer(data[at : at + size], np.uint8).copy()).view(_DTYPES[dtype]).view(shape)
            codec, _, part = name.partition(".")
            tables[codec][part] = array
            at += size
        if at != data.nbytes:
            raise ValueError(f"{data.nbytes - at} bytes too many")
        meta["errors"] = {name: tuple(map(tuple, known)) for name, known in meta["errors"].items()}
        meta |= {"weights": tuple(meta["weights"]), "measured": tuple(meta["measured"])}
        return cls(**meta, ecuq=EcuqTables(**tables["ecuq"]), xlayer=XlayerTables(**tables["xlayer"]))


def calibration_file(folder: Path, weights: str) -> Path:
    """Where the calibration of a model lies below `folder`, by the digest of its weights (`Namespace.weights`)."""
    return folder / f"{weights[:16]}.tkvcal"


_registered: dict[str, Calibration] = {}


def register(calibration: Calibration) -> str:
    """Make a calibration known to the codecs of this process, for as long as it lives; returns its fingerprint."""
    return _registered.setdefault(calibration.fingerprint, calibration).fingerprint


def calibration_of(fingerprint: str) -> Calibration:
    """The registered calibration of a fingerprint; raises (kind `corrupt`) if there is none: what was coded with it cannot be read."""
    if fingerprint not in _registered:
        raise TieredKVError(
            Kind.CORRUPT, f"a calibration of fingerprint {fingerprint or '(none)'} is not loaded here", calibration=fingerprint
        )
    return _registered[fingerprint]


def _bytes_of(array: torch.Tensor) -> bytes:
    return array.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
