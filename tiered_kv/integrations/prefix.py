"""A prompt in two parts: the KV of a prefix as the cache would keep it, and what a model says behind a prefix whose KV is given.

For whoever measures what a change of that KV costs. Shapes: ids (1, n), kv (L, 2, H, T, D).
"""

from typing import Any

import torch

from tiered_kv.integrations.transformers import cache_from_kv, kv_from_cache


@torch.inference_mode()
def prefix_kv(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The KV of a prompt (1, n): computed at once, in the dtype given, in host memory."""
    cache = model(ids.to(model.device), use_cache=True, logits_to_keep=1).past_key_values
    return kv_from_cache(cache, 0, ids.shape[1]).to(dtype).cpu()


@torch.inference_mode()
def continued(model: Any, ids: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (tokens, vocabulary) for what follows each token of `ids` behind the prefix whose KV is given."""
    cache = cache_from_kv(kv.to(model.device, model.dtype), model.config)
    return model(ids[:, kv.shape[3] :].to(model.device), past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
