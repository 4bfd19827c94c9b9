"""Computes the calibration of a model from its weights and some texts."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiered_kv.codecs import codec_for
from tiered_kv.codecs.calibrated.tables import Calibration
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.identity import tensors_digest
from tiered_kv.integrations.rope import rope_of_model
from tiered_kv.integrations.support import check_supported
from tiered_kv.layout import KVLayout
from tiered_kv.tools.calibrate.capture import CapturedKV, Geometry, capture
from tiered_kv.tools.calibrate.corpus import TOKENS_MIN, own_texts, prompts_of
from tiered_kv.tools.calibrate.fit import fit_ecuq, fit_xlayer
from tiered_kv.tools.calibrate.unit import with_units

LogLine = Callable[[str], None]
TOKENS = 80_000
PROMPT_TOKENS = 1280
CONTINUE_PART = 5
"""The last 1/`CONTINUE_PART` of a prompt's tokens is used to measure the sensitivity of the KV of the other tokens."""
SENSITIVITY_PROMPTS = 40
COST_PART = 0.05
NARROW_CHANNELS = 512
"""Up to this number of channels per layer all heads are one group.

Decoding then takes little time, even if it is a large part of a small model's prefill.
"""
STEPS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
BOUND_BLOCKS = 12
BOUND_BLOCK_TOKENS = 64


def calibrate(
    model: Any, tokenizer: Any, texts: Sequence[str] | None = None, *, tokens: int = TOKENS, log: LogLine = lambda line: None
) -> Calibration:
    """Calibrate a transformers model on `tokens` tokens of `texts`, by default of texts found on this machine.

    Returns the calibration. Raises (kind `config`) if there are fewer than 10,000 tokens, because tables fitted on less make
    codecs worse than int4 without any warning. Raises (kind `model`) if the model's KV cannot be shared, or if its RoPE changes
    with the length of the text.

    Cost: one run over the texts, about as much again for the sensitivity and for measuring the step, and the fit. That is some
    11 minutes on two idle cores for 135 million parameters. Memory: the model, a cast copy of its weights, and the KV of four
    layers and all tokens in float32. The whole KV is written to a file in the temporary folder.
    """
    if tokens < TOKENS_MIN:
        raise TieredKVError(Kind.CONFIG, f"--tokens: must be at least {TOKENS_MIN}, got {tokens}", setting="tokens")
    longest = getattr(model.config, "max_position_embeddings", PROMPT_TOKENS)
    prompt_tokens = min(PROMPT_TOKENS, longest)
    wanted = -(-tokens * CONTINUE_PART // (CONTINUE_PART - 1))
    prompts = prompts_of(tokenizer, own_texts() if texts is None else texts, wanted, prompt_tokens)
    return fitted(model, prompts, prompt_tokens // CONTINUE_PART, log)


def fitted(model: Any, prompts: Sequence[torch.Tensor], continue_tokens: int, log: LogLine = lambda line: None) -> Calibration:
    """Calibrate a model on any number of prompts (1, n), as `calibrate` does. Returns the calibration.

    The tables are fitted to the KV of each prompt without its last `continue_tokens` tokens.
    """
    shape = check_supported(model)
    rope = rope_of_model(model)
    if rope is None:
        message = f"{type(model).__name__} cannot be calibrated: its rotary embedding (RoPE) is not supported"
        raise TieredKVError(Kind.MODEL, message, model=type(model).__name__)
    parameters = sum(each.numel() for each in model.parameters())
    groups = groups_of(parameters, shape.layers, shape.kv_heads, shape.head_dim)
    geometry = Geometry(shape.layers, shape.kv_heads, shape.head_dim, groups, rope)
    with tempfile.TemporaryDirectory(prefix="tiered-kv-calibrate-") as folder:
        every = max(len(prompts) // SENSITIVITY_PROMPTS, 1)
        captured = capture(model, prompts, geometry, Path(folder), continue_tokens, every, log)
        ecuq = fit_ecuq(captured, geometry)
        xlayer = fit_xlayer(captured, geometry, log)
        log("computing the digests of the weights")
        facts = {"model": _name_of(model), "weights": weights_digests(model), "tokens": captured.kv.shape[1]}
        sizes = {"layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "rope": rope, "rope_halves": True}
        made = Calibration(**facts, **sizes, ecuq=ecuq, xlayer=xlayer)
        made = with_units(made, model, prompts, continue_tokens, log)
        log("measuring the error bounds of the codecs")
        return with_errors(made, captured, geometry)


def groups_of(parameters: int, layers: int, kv_heads: int, head_dim: int) -> int:
    """Returns the number of groups of KV heads for a model: the fewest with which decoding costs at most 1/20 of a prefill.

    The prefill of a token takes one multiplication per parameter. Decoding it takes 3 C² / G for each layer of C channels.
    """
    channels = 2 * kv_heads * head_dim
    if channels <= NARROW_CHANNELS:
        return 1
    counts = [count for count in range(1, kv_heads + 1) if not kv_heads % count]
    fitting = [count for count in counts if 3 * channels**2 * layers / count <= COST_PART * parameters]
    return fitting[0] if fitting else kv_heads


def weights_digests(model: Any) -> tuple[str, ...]:
    """Returns `Namespace.weights` of the model in float32, bfloat16 and float16."""
    state = model.state_dict()
    return tuple(
        tensors_digest({name: each.to(dtype) if each.is_floating_point() else each for name, each in state.items()})
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def with_errors(made: Calibration, captured: CapturedKV, geometry: Geometry) -> Calibration:
    """Returns the calibration with error bounds: for each codec and step, the highest relative error among some of the fitted blocks."""
    tokens = min(BOUND_BLOCK_TOKENS, captured.kv.shape[1])
    layout = KVLayout(geometry.layers, geometry.kv_heads, geometry.head_dim, "bfloat16", tokens)
    last = captured.kv.shape[1] - tokens
    starts = sorted({last * number // BOUND_BLOCKS for number in range(BOUND_BLOCKS + 1)})
    blocks = [geometry.kv_of(captured.kv[:, start : start + tokens], tokens).bfloat16() for start in starts]
    flat = [block.contiguous().view(-1).view(torch.uint8) for block in blocks]
    errors = {}
    for name in ("ecuq", "xlayer"):
        codecs = [codec_for(f"{name}:{step}", layout, calibration=made).at(tokens, is_last_block=False) for step in STEPS]
        found = [max(codec.distance(each) for each in flat) for codec in codecs]
        least = np.minimum.accumulate(found[::-1])[::-1]  # at very fine steps codes exceed their range, and errors grow again
        errors[name] = tuple((step, max(float(error), 1e-9)) for step, error in zip(STEPS, least, strict=True))
    return made.with_errors(errors)


def _name_of(model: Any) -> str:
    """Returns the last part of the name or path from which the model was loaded."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Path(name).name or name
