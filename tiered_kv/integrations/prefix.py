"""Runs a prompt in two parts: computes the KV of a prefix; from a given KV of it, computes the log-probabilities of the rest.

Used to measure how a change of the prefix's KV, such as a codec's error, affects the rest. Shapes: ids (1, n), kv (L, 2, H, T,
D).
"""

from typing import Any

import torch

from tiered_kv.integrations.transformers import cache_from_kv, kv_from_cache


@torch.inference_mode()
def prefix_kv(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the KV of a prompt (1, n), computed in one run, in `dtype` and host memory."""
    cache = model(ids.to(model.device), use_cache=True, logits_to_keep=1).past_key_values
    return kv_from_cache(cache, 0, ids.shape[1]).to(dtype).cpu()


@torch.inference_mode()
def continued(model: Any, ids: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Run the tokens of `ids` that follow the prefix in `kv`.

    Returns for each of these tokens the log-probabilities of the token after it, (tokens, vocabulary).
    """
    cache = cache_from_kv(kv.to(model.device, model.dtype), model.config)
    return model(ids[:, kv.shape[3] :].to(model.device), past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
