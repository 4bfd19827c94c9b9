"""The model on which codecs are measured, and its calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiered_kv.codecs import Calibration, parse_codec
from tiered_kv.codecs.calibrated.tables import calibration_file
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.file_sums import user_cache
from tiered_kv.identity import tensors_digest
from tiered_kv.integrations.transformers import check_supported
from tiered_kv.tools.demo.model import load_model


class Subject(NamedTuple):
    """A model in float32, its tokenizer, and the name that the user gave."""

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str) -> "Subject":
        """Load a model by Hugging Face id, folder, or `default`. Returns it as a `Subject`.

        Raises (kind `model`) with the reason if it cannot be loaded, or is not supported by the cache.
        """
        model, tokenizer = load_model(None if name == "default" else name, torch.float32)
        check_supported(model)
        return cls(name, model, tokenizer)

    def check_length(self, tokens: int) -> None:
        """Raise (kind `config`) if the model cannot read prompts of `tokens` tokens."""
        longest = longest_prompt(self.model)
        if longest and tokens > longest:
            message = f"--prefix-tokens: the sum with --continue-tokens must be at most {longest} for {self.name}, got {tokens}"
            raise TieredKVError(Kind.CONFIG, message, setting="prefix_tokens")

    def calibration(self, path: str | None = None) -> Calibration | None:
        """Load the calibration of this model from `path`, or by default from where `tiered-kv calibrate` writes it.

        Returns None if `path` is None and there is no such file. Raises (kind `config`) naming --calibration and the file if the
        file at `path` is missing, or if the file is damaged, no calibration file, or fitted to other weights.
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
            message = f"--calibration: {place} was fitted to other weights ({calibration.model}); run: tiered-kv calibrate {self.name}"
            raise TieredKVError(Kind.CONFIG, message, setting="calibration")
        return calibration


def calibrations() -> Path:
    """Returns the folder in which nodes look for calibration files."""
    return user_cache() / "calibration"


def longest_prompt(model: Any) -> int | None:
    """Returns the highest number of tokens that a model can read, or None if the model's config gives no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def codecs_of(text: str, default: Sequence[str] = ()) -> list[str]:
    """Returns the codec names in a comma-separated text, or `default` for "all".

    Raises (kind `config`) naming --codec for an unknown or repeated codec.
    """
    if text == "all":
        return list(default)
    codecs = [part.strip() for part in text.split(",")]
    for codec in codecs:
        if codecs.count(codec) > 1:
            raise TieredKVError(Kind.CONFIG, f"--codec: each codec must be named only once, got {codec} twice", setting="codec")
        needs_calibration(codec)
    return codecs


def needs_calibration(codec: str) -> bool:
    """Returns whether a codec, by its name, needs a calibration.

    Raises (kind `config`) naming --codec if it is unknown.
    """
    try:
        return parse_codec(codec)[0].needs_calibration
    except TieredKVError as error:
        raise TieredKVError(Kind.CONFIG, f"--codec: {error}", setting="codec") from error
