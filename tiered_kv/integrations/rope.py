"""Reads the rotary position embedding (rope) of a transformers model, in the form that codecs need."""

from typing import Any

from tiered_kv.codecs.rotation import rope_of


def rope_of_model(model: Any) -> bytes | None:
    """Returns the rope of a transformers model, as the parameter `rope` of codecs.

    Returns b"" if the model has learned positions instead, and None if its rotation is unknown or depends on the text's length.
    """
    body = getattr(model, "base_model", model)
    frequencies = getattr(getattr(body, "rotary_emb", None), "inv_freq", None)
    if frequencies is None:
        return b"" if hasattr(body, "wpe") else None
    if body.rotary_emb.rope_type in ("dynamic", "longrope"):
        return None
    return rope_of(frequencies.detach().float().cpu().numpy())
