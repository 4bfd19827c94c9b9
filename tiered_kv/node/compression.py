"""How a node codes blocks: for each model and tier the codec of the plan, and for each block the frame that it makes.

A block that is coded already is passed on as it is, unless the codec of the next tier makes it smaller within its bound; what
it carries of error counts. So nothing is coded twice by the same codec, and a lossy frame never becomes a larger exact one.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from tiered_kv.blocks import Tier
from tiered_kv.codecs import Calibration, Codec, LosslessCodec, RawCodec, codec_for
from tiered_kv.codecs.base import byte_view
from tiered_kv.codecs.calibrated.tables import calibration_file, registered
from tiered_kv.codecs.frame import Frame, encode_frame, frame_encoded
from tiered_kv.config import Config, user_cache
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.node.codec_plan import RUN, Plan, check_settings, is_exact, most_error, plan
from tiered_kv.protocol.model_info import ModelFacts
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.store import events as ev

log = logging.getLogger(__name__)

UNKNOWN_ROOT = bytes(KEY_BYTES)
MODELS_MAX = 256
RAW = RawCodec()


def _nothing_to_verify() -> None:
    """Bytes that are this process's own."""


class BlockData(NamedTuple):
    """A block as it is kept somewhere, raw or as its frame, and the error that it carries.

    `verify` raises (kind `corrupt`) if the bytes are not those that were stored. Whoever gives them a new checksum, or copies
    them raw, calls it afterwards: a bit that flips before that is found then, and one that flips later does no harm.
    """

    raw: torch.Tensor | None
    frame: Frame | None = None
    error: float = 0.0
    verify: Callable[[], object] = _nothing_to_verify

    @classmethod
    def of(cls, frame: Frame) -> "BlockData":
        """What a frame holds."""
        return cls(None, frame, frame.error)

    def decoded(self) -> torch.Tensor:
        """Its raw bytes, 1-D; raises (kind `corrupt`) if the frame does not give them."""
        if self.raw is not None:
            return self.raw
        raw = torch.empty(self.frame.raw_bytes, dtype=torch.uint8)
        self.frame.decode(raw)
        return raw


class CodedBlock(NamedTuple):
    """A block as a frame to be kept: in pieces, with the id of its codec."""

    pieces: FramePieces
    codec: int
    raw_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the frame."""
        return sum(byte_view(piece).nbytes for piece in self.pieces)


@dataclass(frozen=True)
class _Model:
    facts: ModelFacts
    plan: Plan
    codecs: dict[Tier, Codec]
    most_error: float


class Coder:
    """The codecs of one node. Thread-safe; a block takes milliseconds for each MB, on the caller's thread.

    Blocks of a model that no worker has introduced since the node began are coded as bytes of which nothing is known: exactly.
    """

    def __init__(self, config: Config) -> None:
        check_settings(config)
        self._config = config
        self.shrinks = not is_exact(config)
        """Whether blocks may be coded in host memory."""
        self._most_error = most_error(config)
        self._models: dict[BlockKey, _Model] = {}
        self._lock = threading.Lock()
        self._blocks: Counter[tuple[str, str]] = Counter()  # by tier and codec: coded so far
        self._bytes: Counter[tuple[str, str]] = Counter()  # raw bytes of these
        self._kept_bytes: Counter[tuple[str, str]] = Counter()
        self._fell_back: Counter[str] = Counter()

    def knows(self, root: BlockKey, facts: ModelFacts) -> bool:
        """Whether the model was introduced, in the same words; a namespace that is known stays known."""
        known = self._models.get(root)
        return known is not None and known.facts == _filled(facts, known)

    def facts(self) -> dict[BlockKey, ModelFacts]:
        """What workers have said of their models, by root."""
        with self._lock:
            return {root: known.facts for root, known in self._models.items()}

    def introduce(self, root: BlockKey, facts: ModelFacts) -> dict:
        """A worker's model: from now on blocks below `root` are coded for it. What the worker must know to read them.

        Raises (kind `config`) where the settings need a calibration of the model that is not there; kinds `storage` and `corrupt`
        for one that cannot be read.
        """
        if not self.knows(root, facts):
            made = self._planned(_filled(facts, self._models.get(root)))
            with self._lock:
                self._models[root] = made
                while len(self._models) > MODELS_MAX:
                    del self._models[next(iter(self._models))]
        known = self._models[root]
        path = self._calibration_path(facts) if known.plan.needs_calibration() else None
        return {"plan": known.plan.as_record(), "calibration": path and str(path)}

    def _planned(self, facts: ModelFacts) -> _Model:
        calibration = self._calibration(facts)
        made = plan(self._config, calibration)
        codecs = {
            tier: codec_for(text, facts.layout, rope=facts.rope, rope_halves=facts.rope_halves, calibration=calibration)
            for tier, text in made.codecs.items()
        }
        if facts.rope is None and any(codec.is_lossy and not codec.needs_calibration for codec in codecs.values()):
            log.warning("the rotation of this model's keys is not known: they are coded as they are, with a little more error")
        for tier, text in made.codecs.items():
            log.info("model %s: %s keeps blocks as %s (%s)", facts.weights[:12], tier.label, text, made.why[tier])
        return _Model(facts, made, codecs, max(codec.most_error() for codec in codecs.values()))

    def _calibration(self, facts: ModelFacts) -> Calibration | None:
        """The model's calibration, where there is one and the settings can have any use for it."""
        if self._config.quality == "exact" and self._config.codec is None and self._config.kl_budget is None:
            return None
        path = self._calibration_path(facts)
        if not path.is_file():
            if self._config.calibration is not None and not Path(self._config.calibration).is_dir():
                raise TieredKVError(Kind.CONFIG, f"calibration: there is no file {path}; {RUN}", setting="calibration")
            return None
        calibration = registered(path)
        if facts.weights not in calibration.weights:
            message = f"calibration: {path} is of another model ({calibration.model}) than the one that attaches; {RUN}"
            raise TieredKVError(Kind.CONFIG, message, setting="calibration")
        return calibration

    def _calibration_path(self, facts: ModelFacts) -> Path:
        given = self._config.calibration
        path = Path(given).expanduser() if given is not None else user_cache() / "calibration"
        return calibration_file(path, facts.weights) if given is None or path.is_dir() else path

    def most_error(self, root: BlockKey | None) -> float:
        """The greatest error that blocks of a model may carry in any tier, for they move; by the settings, until a worker introduces it."""
        model = self._models.get(root) if root else None
        return self._most_error if model is None else model.most_error

    def has_plan(self, root: BlockKey) -> bool:
        """Whether a worker has introduced the model; or nothing that one could say would change what its blocks may carry."""
        return root in self._models or self._most_error < math.inf

    # Blocks

    def keeps_frames(self, root: BlockKey | None) -> bool:
        """Whether host memory keeps blocks of this model as they come, coded, rather than decoded."""
        model = self._models.get(root) if root else None
        return self.shrinks and (model is None or not isinstance(model.codecs[Tier.HOST], RawCodec))

    def coded(self, copy: ev.Copy, held: BlockData) -> CodedBlock:
        """A block as the tier that it is copied to should keep it. Raises (kind `corrupt`) for a frame that does not decode, and for
        bytes that are not those that were stored."""
        codec = self._codec(copy)
        frame = held.frame
        if frame is not None and not _may_improve(codec, frame.codec):
            return _as_it_is(frame)
        raw = held.decoded()
        encoded = codec.encode(raw, held.error)
        made = CodedBlock(frame_encoded(copy.key, copy.root or UNKNOWN_ROOT, encoded, raw.numel()), encoded.codec.id, raw.numel())
        held.verify()
        if frame is not None and made.nbytes >= frame.nbytes:
            return _as_it_is(frame)
        with self._lock:
            name = copy.target.label, encoded.codec.name
            self._blocks[name] += 1
            self._bytes[name] += raw.numel()
            self._kept_bytes[name] += made.nbytes
            self._fell_back[encoded.fell_back] += bool(encoded.fell_back)
        return made

    def _codec(self, copy: ev.Copy) -> Codec:
        model = self._models.get(copy.root) if copy.root else None
        if model is None:
            named = self._config.codec_by_tier.get(copy.target)
            return RAW if named == "raw" or (named is None and copy.target is Tier.HOST) else LosslessCodec()
        codec = model.codecs[copy.target]
        if not codec.is_lossy:
            return codec
        if copy.depth is None:
            return LosslessCodec.for_layout(model.facts.layout)  # nobody knows by how much its keys are turned
        return codec.at(copy.depth * model.facts.layout.block_tokens, copy.is_tail)

    # Figures

    def stats(self) -> dict:
        """The plans, what was coded by tier and codec, and how many blocks fell back to a better codec, and why; ready for JSON."""
        with self._lock:
            coded: dict[str, dict[str, dict]] = {}
            for (tier, name), blocks in sorted(self._blocks.items()):
                raw_bytes, kept_bytes = self._bytes[tier, name], self._kept_bytes[tier, name]
                coded.setdefault(tier, {})[name] = {"blocks": blocks, "raw_bytes": raw_bytes, "kept_bytes": kept_bytes}
            plans = {root.hex()[:12]: {"weights": each.facts.weights[:12]} | each.plan.as_record() for root, each in self._models.items()}
            return {"plans": plans, "coded": coded, "fell_back": {why: count for why, count in self._fell_back.items() if count}}


def _filled(facts: ModelFacts, known: _Model | None) -> ModelFacts:
    """The facts, with the namespace that an earlier worker has named where this one names none: a root has only one."""
    return facts if facts.namespace is not None or known is None else replace(facts, namespace=known.facts.namespace)


def raw_frame(key: BlockKey, root: BlockKey | None, held: BlockData) -> FramePieces:
    """A block as a frame for another node: as it is coded, else raw, without a copy. Raises (kind `corrupt`) for damaged bytes."""
    if held.frame is not None:
        return held.frame.pieces
    pieces = encode_frame(key, root or UNKNOWN_ROOT, RAW, held.raw, held.error)
    held.verify()
    return pieces


def _may_improve(codec: Codec, present: Codec) -> bool:
    """Whether coding anew can give a smaller frame: an exact codec only of what is raw, a lossy one unless it made this one."""
    return (isinstance(present, RawCodec) and not isinstance(codec, RawCodec)) or (codec.is_lossy and codec != present)


def _as_it_is(frame: Frame) -> CodedBlock:
    return CodedBlock(frame.pieces, frame.codec.id, frame.raw_bytes)


def put(pieces: Sequence, out: torch.Tensor) -> None:
    """Write a frame's pieces one behind the other into `out`, 1-D uint8 host memory of exactly as many bytes."""
    target, at = byte_view(out), 0
    for piece in pieces:
        view = byte_view(piece)
        target[at : at + view.nbytes] = view
        at += view.nbytes
