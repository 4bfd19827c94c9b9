"""Runs a model on texts. Captures their KV and its sensitivity: how much errors in the KV change the next tokens' distribution.

The channels (C) of a layer are ordered in G groups of KV heads: (G, 2, H/G, D). The model's RoPE rotation is undone for K. The
first `SINKS` tokens of each prompt are left out, because codecs store them exactly.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiered_kv.codecs.rotation import turning
from tiered_kv.integrations.prefix import prefix_kv
from tiered_kv.integrations.transformers import cache_from_kv

LogLine = Callable[[str], None]
SINKS = 4


@dataclass(frozen=True)
class Geometry:
    """The shape of a model's KV, the number of groups of its heads, and its RoPE."""

    layers: int
    kv_heads: int
    head_dim: int
    groups: int
    rope: bytes
    rope_halves: bool = True

    @property
    def channels(self) -> int:
        """C: the number of channels of a layer, in all groups."""
        return 2 * self.kv_heads * self.head_dim

    def channels_of(self, kv: torch.Tensor, start: int) -> torch.Tensor:
        """Returns kv (L, 2, H, T, D) as float32 (L, T, C), K's rotation undone. `start`: the position of its first token."""
        layers, _, heads, tokens, dim = kv.shape
        x = kv.float()
        if self.rope:
            turn = turning(self.rope, self.rope_halves, start, tokens, dim)
            x = torch.stack([turn.turn(x[:, 0], torch.empty_like(x[:, 0]), back=True), x[:, 1]], 1)
        x = x.view(layers, 2, self.groups, heads // self.groups, tokens, dim)
        return x.permute(0, 4, 2, 1, 3, 5).reshape(layers, tokens, self.channels)

    def kv_of(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Returns the channels `x` (L, T, C) as kv (L, 2, H, T, D) in float32: the inverse of `channels_of`."""
        layers, tokens, _ = x.shape
        x = x.float().view(layers, tokens, self.groups, 2, self.kv_heads // self.groups, self.head_dim)
        kv = x.permute(0, 3, 2, 4, 1, 5).reshape(layers, 2, self.kv_heads, tokens, self.head_dim)
        if self.rope:
            turn = turning(self.rope, self.rope_halves, start, tokens, self.head_dim)
            kv[:, 0] = turn.turn(kv[:, 0].clone(), torch.empty_like(kv[:, 0]))
        return kv


@dataclass(frozen=True)
class CapturedKV:
    """The captured KV of all prompts, and its sensitivity.

    kv: (L, N, C) in bf16, a memory-mapped file. fisher: (L, 2, G, C/2G, C/2G), the mean of g gᵀ over the tokens, divided by the
    number of tokens that follow. g is the gradient of the log-probability of tokens that are drawn from the model. starts: the index
    in N of each prompt's first token.
    """

    kv: torch.Tensor
    fisher: torch.Tensor
    starts: tuple[int, ...]


def capture(
    model: Any, prompts: Sequence[torch.Tensor], geometry: Geometry, folder: Path, continue_tokens: int, every: int, log: LogLine
) -> CapturedKV:
    """Run the model on prompts (1, n), and capture their KV without the last `continue_tokens` tokens of each.

    For one prompt in `every`, these last tokens are used to measure the sensitivity. The KV is written to a file in `folder`:
    2 bytes per channel and token, 1.2 GB for 50,000 tokens of a model with 30 layers of 3 heads.
    """
    lengths = [max(ids.shape[1] - continue_tokens - SINKS, 0) for ids in prompts]
    starts = np.cumsum([0, *lengths]).tolist()
    shape = (geometry.layers, starts[-1], geometry.channels)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        kv = torch.from_numpy(np.memmap(file.name, np.uint16, "w+", shape=shape)).view(torch.bfloat16)
    half = geometry.channels // geometry.groups // 2
    fisher = torch.zeros(geometry.layers, 2, geometry.groups, half, half)
    seen = 0
    generator = torch.Generator().manual_seed(0)
    for number, ids in enumerate(prompts):
        prefix = ids[:, : ids.shape[1] - continue_tokens]
        if prefix.shape[1] <= SINKS:
            continue
        whole = prefix_kv(model, prefix, torch.bfloat16)
        kept = whole[..., SINKS:, :]
        kv[:, starts[number] : starts[number + 1]] = geometry.channels_of(kept, SINKS).bfloat16()
        if not number % every:
            gradient = _gradient(model, ids, whole, generator)[..., SINKS:, :]
            _add_outer(fisher, geometry, gradient)
            seen += gradient.shape[3] * continue_tokens
        log(f"prompt {number + 1} of {len(prompts)}: {starts[number + 1]} tokens of KV")
    return CapturedKV(kv, fisher / max(seen, 1), tuple(starts[:-1]))


def _gradient(model: Any, ids: torch.Tensor, kv: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns the gradient, with respect to the prefix's KV (L, 2, H, T, D), of a sum of log-probabilities.

    After each token that follows the prefix, one token is drawn from the model's own distribution. The sum is over the
    log-probabilities of the drawn tokens.
    """
    leaf = kv.clone().to(model.device, model.dtype).requires_grad_()
    required = [each.requires_grad for each in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            cache = cache_from_kv(leaf, model.config)
            logits = model(ids[:, kv.shape[3] :].to(model.device), past_key_values=cache, use_cache=True).logits[0].float()
            log_p = logits.log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            log_p.gather(1, drawn).sum().backward()
    finally:
        for each, needs in zip(model.parameters(), required, strict=True):
            each.requires_grad_(needs)
    return leaf.grad.float().cpu()


def _add_outer(fisher: torch.Tensor, geometry: Geometry, gradient: torch.Tensor) -> None:
    """Add g gᵀ, summed over tokens, to `fisher`.

    RoPE is orthogonal. So undoing the rotation of the gradient for K gives the gradient for K before its rotation.
    """
    g = geometry.channels_of(gradient, SINKS)
    layers, tokens, _ = g.shape
    g = g.view(layers, tokens, geometry.groups, 2, -1).permute(0, 3, 2, 4, 1)
    fisher += g @ g.transpose(-1, -2)
