"""Encodes a node's blocks as frames, each with the codec that the plan of its model names for the target tier.

An encoded block is copied to another tier unchanged, unless that tier's codec makes it smaller within the codec's error bound. The
error that the block has already counts against the bound. So no block is encoded twice by the same codec, and a lossy frame never
becomes a larger exact one.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from tiered_kv.blocks import Tier
from tiered_kv.codecs import Calibration, Codec, LosslessCodec, RawCodec, codec_for
from tiered_kv.codecs.base import byte_view
from tiered_kv.codecs.calibrated.tables import calibration_file, registered
from tiered_kv.codecs.frame import Frame, encode_frame, frame_encoded
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.file_sums import user_cache
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.layout import OpaqueLayout
from tiered_kv.node.codec_plan import ONLY_LOSSLESS, RUN, CodecPlan, check_settings, is_exact, most_error, opaque_plan, plan
from tiered_kv.protocol.messages import CodecStats, EncodedStats, Introduction, TierPlan
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.store import events as ev

log = logging.getLogger(__name__)

UNKNOWN_ROOT = bytes(KEY_BYTES)
MODELS_MAX = 256
RAW = RawCodec()


def _nothing_to_verify() -> None:
    """Do nothing: these bytes are private to this process, so no checksum is needed."""


class BlockData(NamedTuple):
    """One block's bytes as read from a tier, raw or as its frame, and its lossy error.

    `verify` raises (kind `corrupt`) if the bytes differ from those that were stored. Code that copies the bytes raw, or makes a new
    checksum of them, must call it afterwards. So a bit that flipped earlier is found. A bit that flips later does not affect the copy.
    """

    raw: torch.Tensor | None
    frame: Frame | None = None
    error: float = 0.0
    verify: Callable[[], object] = _nothing_to_verify

    @classmethod
    def of(cls, frame: Frame) -> "BlockData":
        """Returns the block of a frame."""
        return cls(None, frame, frame.error)

    def decoded(self) -> torch.Tensor:
        """Returns the raw bytes, 1-D uint8. Raises (kind `corrupt`) if the frame does not decode."""
        if self.raw is not None:
            return self.raw
        assert self.frame is not None
        raw = torch.empty(self.frame.raw_bytes, dtype=torch.uint8)
        self.frame.decode(raw)
        return raw


class EncodedFrame(NamedTuple):
    """A block encoded as a frame, in pieces. `codec`: the id of its codec."""

    pieces: FramePieces
    codec: int
    raw_bytes: int

    @property
    def nbytes(self) -> int:
        """The size of the frame in bytes."""
        return sum(byte_view(piece).nbytes for piece in self.pieces)


@dataclass(frozen=True)
class _IntroducedModel:
    info: ModelInfo
    plan: CodecPlan
    codecs: dict[Tier, Codec]
    most_error: float


class BlockEncoder:
    """The codecs of one node. Thread-safe. Encoding a block takes milliseconds for each MB, on the caller's thread.

    Blocks of a model that no worker has introduced since the node started are encoded losslessly, as bytes of an unknown layout.
    """

    def __init__(self, config: Config) -> None:
        check_settings(config)
        self._config = config
        self.shrinks = not is_exact(config)
        """Whether blocks may be encoded in host memory."""
        self._most_error = most_error(config)
        self._models: dict[BlockKey, _IntroducedModel] = {}
        self._lock = threading.Lock()
        self._blocks: Counter[tuple[str, str]] = Counter()  # encoded so far, by tier and codec
        self._bytes: Counter[tuple[str, str]] = Counter()  # their raw bytes
        self._kept_bytes: Counter[tuple[str, str]] = Counter()  # bytes of their frames
        self._error_sums: dict[tuple[str, str], float] = {}  # sums of their errors
        self._fell_back: Counter[str] = Counter()  # by reason

    def knows(self, root: BlockKey, info: ModelInfo) -> bool:
        """Returns whether the model was introduced with this description. If `info` has no namespace, namespaces are not compared."""
        known = self._models.get(root)
        return known is not None and known.info == _filled(info, known)

    def models(self) -> dict[BlockKey, ModelInfo]:
        """Returns the descriptions of all introduced models, by root."""
        with self._lock:
            return {root: known.info for root, known in self._models.items()}

    def introduce(self, root: BlockKey, info: ModelInfo) -> Introduction:
        """Register a worker's model: from now on blocks below `root` are encoded for it.

        Returns the plan, and the path of the calibration that the worker needs to decode its blocks (None if it needs none). Raises
        (kind `config`) if the settings need a calibration of the model and there is none. Raises (kinds `storage`, `corrupt`) if the
        calibration cannot be read. A model with an opaque layout needs no calibration.
        """
        if not self.knows(root, info):
            made = self._planned(_filled(info, self._models.get(root)))
            if root not in self._models and any(ONLY_LOSSLESS in why for why in made.plan.why.values()):
                log.warning("model %s: %s, so its blocks are encoded losslessly", info.weights[:12], ONLY_LOSSLESS)
            with self._lock:
                self._models[root] = made
                while len(self._models) > MODELS_MAX:
                    del self._models[next(iter(self._models))]
        known = self._models[root]
        path = self._calibration_path(info) if known.plan.needs_calibration() else None
        return {"plan": known.plan.as_record(), "calibration": str(path) if path else None}

    def _planned(self, info: ModelInfo) -> _IntroducedModel:
        is_opaque = isinstance(info.layout, OpaqueLayout)
        calibration = None if is_opaque else self._calibration(info)
        chosen = opaque_plan(self._config) if is_opaque else plan(self._config, calibration)
        codecs = {
            tier: codec_for(text, info.layout, rope=info.rope, rope_halves=info.rope_halves, calibration=calibration)
            for tier, text in chosen.codecs.items()
        }
        if info.rope is None and any(codec.is_lossy and not codec.needs_calibration for codec in codecs.values()):
            log.warning("this model's rotary embedding is not known: its keys are encoded as rotated, with a slightly larger error")
        for tier, text in chosen.codecs.items():
            log.info("model %s: %s keeps blocks as %s (%s)", info.weights[:12], tier.label, text, chosen.why[tier])
        return _IntroducedModel(info, chosen, codecs, max(codec.most_error() for codec in codecs.values()))

    def _calibration(self, info: ModelInfo) -> Calibration | None:
        """Returns the model's calibration, or None if there is none or the settings do not use one."""
        if self._config.quality == "exact" and self._config.codec is None and self._config.kl_budget is None:
            return None
        path = self._calibration_path(info)
        if not path.is_file():
            if self._config.calibration is not None and not Path(self._config.calibration).is_dir():
                raise TieredKVError(
                    Kind.CONFIG, f"calibration: there is no file {path} for the model that attaches; {RUN}", setting="calibration"
                )
            return None
        calibration = registered(path)
        if info.weights not in calibration.weights:
            message = f"calibration: {path} is of another model ({calibration.model}), not of this one; {RUN}"
            raise TieredKVError(Kind.CONFIG, message, setting="calibration")
        return calibration

    def _calibration_path(self, info: ModelInfo) -> Path:
        given = self._config.calibration
        path = Path(given).expanduser() if given is not None else user_cache() / "calibration"
        return calibration_file(path, info.weights) if given is None or path.is_dir() else path

    def most_error(self, root: BlockKey | None) -> float:
        """Returns the largest error that a model's blocks may have in any tier, because blocks move between tiers.

        Until a worker introduces the model, this is the largest error that the settings allow.
        """
        model = self._models.get(root) if root else None
        return self._most_error if model is None else model.most_error

    def has_plan(self, root: BlockKey) -> bool:
        """Returns whether the model's allowed error is final: a worker has introduced the model, or the settings alone fix the error."""
        return root in self._models or self._most_error < math.inf

    # Blocks

    def keeps_frames(self, root: BlockKey | None) -> bool:
        """Returns whether host memory keeps encoded blocks of this model as frames instead of decoding them."""
        model = self._models.get(root) if root else None
        return self.shrinks and (model is None or not isinstance(model.codecs[Tier.HOST], RawCodec))

    def coded(self, copy: ev.Copy, block: BlockData) -> EncodedFrame:
        """Encode a block for the tier that it is copied to. Returns its frame.

        Raises (kind `corrupt`) if its frame does not decode, or if its bytes differ from those that were stored.
        """
        codec = self._codec(copy)
        frame = block.frame
        if frame is not None and not _may_improve(codec, frame.codec):
            return _unchanged(frame)
        raw = block.decoded()
        encoded = codec.encode(raw, block.error)
        made = EncodedFrame(frame_encoded(copy.key, copy.info.root or UNKNOWN_ROOT, encoded, raw.numel()), encoded.codec.id, raw.numel())
        block.verify()
        if frame is not None and made.nbytes >= frame.nbytes:
            return _unchanged(frame)
        with self._lock:
            name = copy.target.label, encoded.codec.name
            self._blocks[name] += 1
            self._bytes[name] += raw.numel()
            self._kept_bytes[name] += made.nbytes
            self._error_sums[name] = self._error_sums.get(name, 0.0) + encoded.error
            self._fell_back[encoded.fell_back] += bool(encoded.fell_back)
        return made

    def _codec(self, copy: ev.Copy) -> Codec:
        model = self._models.get(copy.info.root) if copy.info.root else None
        if model is None:
            named = self._config.codec_by_tier.get(copy.target)
            return RAW if named == "raw" or (named is None and copy.target is Tier.HOST) else LosslessCodec()
        codec = model.codecs[copy.target]
        if not codec.is_lossy:
            return codec
        if copy.info.depth is None:
            return LosslessCodec.for_layout(model.info.layout)  # without the depth, the rotation of its keys is not known
        return codec.at(copy.info.depth * model.info.layout.block_tokens, copy.is_last_block)

    # Figures

    def stats(self) -> CodecStats:
        """Returns figures, ready for JSON: plans, encoded blocks by tier and codec, and by reason how many got a better codec instead."""
        with self._lock:
            coded: dict[str, dict[str, EncodedStats]] = {}
            for (tier, name), blocks in sorted(self._blocks.items()):
                raw_bytes, kept_bytes = self._bytes[tier, name], self._kept_bytes[tier, name]
                mean_error = self._error_sums[tier, name] / blocks
                figures: EncodedStats = {"blocks": blocks, "raw_bytes": raw_bytes, "kept_bytes": kept_bytes, "mean_error": mean_error}
                coded.setdefault(tier, {})[name] = figures
            plans: dict[str, dict[str, str | TierPlan]] = {
                root.hex()[:12]: {"weights": each.info.weights[:12], **each.plan.as_record()} for root, each in self._models.items()
            }
            fell_back = {why: count for why, count in self._fell_back.items() if count}
            errors = [each.most_error for each in self._models.values()] or [self._most_error]
            finite = [error for error in errors if error < math.inf]
            return {"plans": plans, "coded": coded, "fell_back": fell_back, "most_error": max(finite, default=None)}


def _filled(info: ModelInfo, known: _IntroducedModel | None) -> ModelInfo:
    """Returns `info`. If it has no namespace, it gets that of `known`, because a root has only one namespace."""
    return info if info.namespace is not None or known is None else replace(info, namespace=known.info.namespace)


def raw_frame(key: BlockKey, root: BlockKey | None, block: BlockData) -> FramePieces:
    """Returns a block as a frame for another node, without a copy: its own frame, or its raw bytes in a frame.

    Raises (kind `corrupt`) for damaged raw bytes.
    """
    if block.frame is not None:
        return block.frame.pieces
    pieces = encode_frame(key, root or UNKNOWN_ROOT, RAW, block.decoded(), block.error)
    block.verify()
    return pieces


def _may_improve(codec: Codec, present: Codec) -> bool:
    """Returns whether `codec` can make a smaller frame of a block that `present` has encoded.

    An exact codec can only if `present` is raw. A lossy codec can unless it equals `present`.
    """
    return (isinstance(present, RawCodec) and not isinstance(codec, RawCodec)) or (codec.is_lossy and codec != present)


def _unchanged(frame: Frame) -> EncodedFrame:
    return EncodedFrame(frame.pieces, frame.codec.id, frame.raw_bytes)


def put(pieces: FramePieces, out: torch.Tensor) -> None:
    """Write a frame's pieces one after the other into `out`, a 1-D uint8 tensor in host memory of exactly the frame's size."""
    target, at = byte_view(out), 0
    for piece in pieces:
        view = byte_view(piece)
        target[at : at + view.nbytes] = view
        at += view.nbytes
