"""The model that codecs are measured on, and the calibration that belongs to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiered_kv.codecs import Calibration, parse_codec
from tiered_kv.codecs.calibration import calibration_file
from tiered_kv.config import user_cache
from tiered_kv.demo.model import load_model
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.identity import tensors_digest
from tiered_kv.integrations.transformers import check_supported


class Subject(NamedTuple):
    """A model that computes in float32, its tokenizer, and what people call it."""

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str) -> "Subject":
        """A Hugging Face id, a folder, or `default`; raises (kind `model`) if it cannot be loaded, or not be served, saying why."""
        model, tokenizer = load_model(None if name == "default" else name, torch.float32)
        check_supported(model)
        return cls(name, model, tokenizer)

    def check_length(self, tokens: int) -> None:
        """Raise (kind `config`) for prompts that are longer than the model reads."""
        longest = longest_prompt(self.model)
        if longest and tokens > longest:
            said = f"--prefix-tokens: with --continue-tokens that is {tokens}; {self.name} reads at most {longest}"
            raise TieredKVError(Kind.CONFIG, said, setting="prefix_tokens")

    def calibration(self, path: str | None = None) -> Calibration | None:
        """What was learned of this very model: in the file `path`, or else where `tiered-kv calibrate` puts it; None if there is nothing.

        Raises (kind `config`) naming --calibration and the file if that is none, damaged, or of other weights.
        """
        weights = tensors_digest(self.model.state_dict())
        place = Path(path) if path else calibration_file(calibrations(), weights)
        if path is None and not place.is_file():
            return None
        try:
            calibration = Calibration.load(place)
        except TieredKVError as error:
            raise TieredKVError(Kind.CONFIG, f"--calibration: {error}", setting="calibration") from error
        if weights not in calibration.weights:
            said = f"--calibration: {place} is of other weights ({calibration.model}); run: tiered-kv calibrate {self.name}"
            raise TieredKVError(Kind.CONFIG, said, setting="calibration")
        return calibration


def calibrations() -> Path:
    """The folder in which nodes look for calibrations."""
    return user_cache() / "calibration"


def longest_prompt(model: Any) -> int | None:
    """Tokens that a model reads at most, if its config says so."""
    return getattr(model.config, "max_position_embeddings", None)


def codecs_of(text: str, default: Sequence[str] = ()) -> list[str]:
    """The codecs of a list with commas, "all" for `default`; raises (kind `config`) naming --codec for what is none."""
    if text == "all":
        return list(default)
    codecs = [part.strip() for part in text.split(",")]
    for codec in codecs:
        if codecs.count(codec) > 1:
            raise TieredKVError(Kind.CONFIG, f"--codec: {codec} is there twice", setting="codec")
        needs_calibration(codec)
    return codecs


def needs_calibration(codec: str) -> bool:
    """Whether a codec as people write it needs a calibrated model; raises (kind `config`) naming --codec if it is none."""
    try:
        return parse_codec(codec)[0].needs_calibration
    except TieredKVError as error:
        raise TieredKVError(Kind.CONFIG, f"--codec: {error}", setting="codec") from error
