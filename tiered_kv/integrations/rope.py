"""How a transformers model turns its keys, as codecs want to know it."""

from typing import Any

from tiered_kv.codecs.rotation import rope_of


def rope_of_model(model: Any) -> bytes | None:
    """The `rope` parameter of a transformers model's codecs: b"" if it has learned positions instead, None where its rotation is
    unknown or changes with the length of the text.
    """
    body = getattr(model, "base_model", model)
    frequencies = getattr(getattr(body, "rotary_emb", None), "inv_freq", None)
    if frequencies is None:
        return b"" if hasattr(body, "wpe") else None
    if body.rotary_emb.rope_type in ("dynamic", "longrope"):
        return None
    return rope_of(frequencies.detach().float().cpu().numpy())
