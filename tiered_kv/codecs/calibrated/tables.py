"""Calibration: the tables that codecs need for one model, in one file that every node loads.

The file, little-endian:

    magic "TKVC" | version u16 | meta bytes u32 | meta (msgpack) | arrays, concatenated | BLAKE2b-256 of all previous bytes

A block that was encoded with tables can be decoded only with the same tables. So a codec's spec names them by a fingerprint, and the
codec looks them up among those registered in this process. The channels (C) of a layer are (2, H, D): K before RoPE, then V.
"""

import math
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np
import torch

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.unpacking import unpacked

MAGIC = b"TKVC"
VERSION = 1
DIGEST_BYTES = 32
FINGERPRINT_BYTES = 16
BOUND_MARGIN = 4.0
"""The bound on a block's error, as a multiple of the error of the worst block of the calibration."""

_HEAD = struct.Struct("<4sHI")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EcuqTables(NamedTuple):
    """The tables of the ecuq codec, float32, with one number for each channel (L, C).

    `width` is the size of the channel's quantization step if the codec's `step` is 1. `spread` is the channel's standard
    deviation in units of `width`.
    """

    mean: torch.Tensor
    width: torch.Tensor
    spread: torch.Tensor


class XlayerTables(NamedTuple):
    """The tables of the xlayer codec.

    `mean` (L, C) and `spread` (L, C) are float32; `spread` is the standard deviation of each coefficient at step 1. `matrix` is
    (L, G, C/G, 3C/G), bf16. A layer's channels form G groups of KV heads, each (2, H/G, D). The columns of `matrix` take, from the
    left: the group's decoded channels two layers earlier, those one layer earlier, and the coefficients, the greatest first.
    `mean` and `spread` list the channels and coefficients group by group too.
    """

    mean: torch.Tensor
    spread: torch.Tensor
    matrix: torch.Tensor

    @property
    def groups(self) -> int:
        """G, the number of groups of KV heads."""
        return self.matrix.shape[1]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The content of one calibration file. Neither the object nor its tensors may be changed. Equal fingerprints mean equal tables.

    `weights`: digests of the model's weights (`Namespace.weights`), one for each dtype in which the model may be loaded. `rope`
    and `rope_halves` are as in `rotation`; b"" means no RoPE. `tokens`: the number of tokens that the tables were fitted on.
    `errors`: for each codec, the quantization steps that were tried, ascending, each with the relative error of the worst block
    (see `Encoded`). `measured`: one record of measurements for each codec.
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
            message = f"calibration of {self.model}: tables for {flat[0]} layers of {channels} channels expected, got other shapes"
            raise TieredKVError(Kind.CONFIG, message)
        if not all(bool(each.isfinite().all()) for each in self._arrays().values()):
            raise TieredKVError(Kind.CONFIG, f"calibration of {self.model}: its tables must be finite, got numbers that are not")

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that identify everything that decoding depends on."""
        facts = [self.layers, self.kv_heads, self.head_dim, self.rope, self.rope_halves]
        whole = blake2b(msgpack.packb(facts), digest_size=FINGERPRINT_BYTES)
        for array in self._arrays().values():
            whole.update(_bytes_of(array))
        return whole.hexdigest()

    def bound(self, codec: str, step: float) -> float:
        """Returns the greatest relative error that a block of the codec with this name may have at `step`. Infinity if unknown."""
        known = self.errors.get(codec, ())
        if not known:
            return math.inf
        steps, errors = np.array(known).T
        at = float(np.exp(np.interp(np.log(step), np.log(steps), np.log(errors))))
        beyond = step / float(np.clip(step, steps[0], steps[-1]))
        return BOUND_MARGIN * at * beyond**2

    def with_measured(self, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Returns a copy whose records of measurements (`measured`) are `rows`. The fingerprint stays the same."""
        return replace(self, measured=tuple(dict(row) for row in rows))

    def with_errors(self, errors: Mapping[str, tuple[tuple[float, float], ...]]) -> Self:
        """Returns a copy with these `errors` (see `Calibration`). The fingerprint stays the same."""
        return replace(self, errors=dict(errors))

    def save(self, path: str | Path) -> None:
        """Writes the file atomically. Raises (kind `storage`) if it cannot be written."""
        path = Path(path)
        data = self._packed()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fchmod(file.fileno(), 0o644)  # the file holds no secret, and nodes may run as another user
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise TieredKVError(Kind.STORAGE, f"{path}: the calibration cannot be written ({error})", path=str(path)) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a calibration file. Every error names the file.

        Raises kind `config` if it cannot be read, is not a calibration or has a newer version, and kind `corrupt` if it is damaged.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TieredKVError(Kind.CONFIG, f"{path}: the calibration cannot be read ({error})", path=str(path)) from error
        if len(data) < _HEAD.size or data[:4] != MAGIC:
            message = f"{path}: not a calibration file: it must begin with {MAGIC!r}, got {data[:4]!r}"
            raise TieredKVError(Kind.CONFIG, message, path=str(path))
        _, version, meta_bytes = _HEAD.unpack_from(data)
        if version > VERSION:
            message = f"{path}: calibration version {version} was written by a newer tiered_kv; this one reads up to version {VERSION}"
            raise TieredKVError(Kind.CONFIG, message, path=str(path))
        body = memoryview(data)[:-DIGEST_BYTES]
        if blake2b(body, digest_size=DIGEST_BYTES).digest() != data[-DIGEST_BYTES:]:
            message = f"{path}: the calibration file is damaged (checksum mismatch); run: tiered-kv calibrate MODEL"
            raise TieredKVError(Kind.CORRUPT, message, path=str(path))
        try:
            return cls._unpacked(body[_HEAD.size : _HEAD.size + meta_bytes], body[_HEAD.size + meta_bytes :])
        except (ValueError, TypeError, KeyError, RuntimeError, TieredKVError) as error:
            message = f"{path}: the content of the calibration file is invalid ({error})"
            raise TieredKVError(Kind.CORRUPT, message, path=str(path)) from error

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
        meta = unpacked(packed)
        tables: dict[str, dict[str, torch.Tensor]] = {"ecuq": {}, "xlayer": {}}
        at = 0
        for name, (dtype, shape) in meta.pop("arrays").items():
            size = math.prod(shape) * _DTYPES[dtype].itemsize
            array = torch.from_numpy(np.frombuffer(data[at : at + size], np.uint8).copy()).view(_DTYPES[dtype]).view(shape)
            codec, _, part = name.partition(".")
            tables[codec][part] = array
            at += size
        if at != data.nbytes:
            raise ValueError(f"arrays of {at} bytes expected, got {data.nbytes} bytes")
        meta["errors"] = {name: tuple(map(tuple, known)) for name, known in meta["errors"].items()}
        meta |= {"weights": tuple(meta["weights"]), "measured": tuple(meta["measured"])}
        return cls(**meta, ecuq=EcuqTables(**tables["ecuq"]), xlayer=XlayerTables(**tables["xlayer"]))


def calibration_file(folder: Path, weights: str) -> Path:
    """Returns the path of a model's calibration below `folder`, from the digest of its weights (`Namespace.weights`)."""
    return folder / f"{weights[:16]}.tkvcal"


_registered: dict[str, Calibration] = {}


def register(calibration: Calibration) -> str:
    """Registers a calibration for the codecs of this process, until the process ends. Returns its fingerprint."""
    return _registered.setdefault(calibration.fingerprint, calibration).fingerprint


def calibration_of(fingerprint: str) -> Calibration:
    """Returns the registered calibration with this fingerprint.

    Raises (kind `corrupt`) if none is registered: blocks encoded with it cannot be decoded.
    """
    if fingerprint not in _registered:
        raise TieredKVError(
            Kind.CORRUPT,
            f"the calibration {fingerprint} is not loaded in this process; give its file to --calibration"
            if fingerprint
            else "the codec needs a calibration, but the block names none",
            calibration=fingerprint,
        )
    return _registered[fingerprint]


def _bytes_of(array: torch.Tensor) -> bytes:
    return array.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def registered(path: str | Path) -> Calibration:
    """Returns the calibration in a file, after registering it for codecs. Reads an unchanged file once. Raises as `Calibration.load`."""
    with suppress(OSError):
        found = os.stat(path)
        return _loaded(str(path), found.st_mtime_ns, found.st_size)
    return Calibration.load(path)  # its error says what is wrong


@lru_cache(maxsize=8)
def _loaded(path: str, mtime_ns: int, nbytes: int) -> Calibration:
    calibration = Calibration.load(path)
    register(calibration)
    return calibration
