"""Measures the quality loss of codecs on a real model.

The KV of a prompt's first tokens is encoded and decoded block by block, as in the cache. Then the model reads the prompt's next
tokens, teacher-forced, on the exact and on the decoded KV. Two figures are computed per token: KL(exact || decoded) of the next
token's distribution in nats, and whether the greedy choice is the same. The model computes in the dtype in which it was loaded:
float32, so that arithmetic adds no noise. Shapes: kv (L, 2, H, T, D) as in `layout`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

import numpy as np
import torch

from tiered_kv.codecs import Calibration, Codec, Encoded, codec_for
from tiered_kv.codecs.frame import frame_bytes
from tiered_kv.integrations.prefix import continued, prefix_kv
from tiered_kv.integrations.rope import rope_of_model
from tiered_kv.layout import KVLayout

CODECS = ("lossless", "int8", "int6", "int4", "fp8")
"""The codecs that need no calibration."""
CALIBRATED = ("ecuq:6e-5", "ecuq:1e-4", "xlayer:3e-5", "xlayer:1e-4", "xlayer:2e-4", "xlayer:2e-4:3e-5")
PREFIX_TOKENS = 1024
CONTINUE_TOKENS = 128


@dataclass(frozen=True)
class Quality:
    """The figures of one codec on some prompts.

    ratio: raw bytes divided by the bytes of whole frames; ratio_least is the lowest of any prompt. bytes_per_token: bytes of frames.
    kl: mean in nats per token; kl_worst is the highest mean of any prompt, kl_p99 the 99th percentile over all tokens.
    top1: share of tokens with the same greedy choice. ppl_ratio: perplexity divided by that on exact KV. error: the highest
    `Encoded.error`. fell_back: number of blocks that were encoded by the fallback codec instead.
    """

    codec: str
    prompts: int
    ratio: float
    ratio_least: float
    bytes_per_token: float
    kl: float
    kl_worst: float
    kl_p99: float
    top1: float
    ppl_ratio: float
    error: float
    blocks: int
    fell_back: int


@dataclass
class _Tally:
    """The raw counts of one codec. The list `errors` has one entry per block, all other lists have one entry per prompt."""

    tokens: int = 0
    raw_bytes: list[int] = field(default_factory=list)
    kept_bytes: list[int] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    fell_back: int = 0

    def quality(self, codec: str) -> Quality:
        ratios = [raw / kept for raw, kept in zip(self.raw_bytes, self.kept_bytes, strict=True)]
        means = [float(kl.mean()) for kl in self.kl]
        return Quality(
            codec=codec,
            prompts=len(means),
            ratio=sum(self.raw_bytes) / sum(self.kept_bytes),
            ratio_least=min(ratios),
            bytes_per_token=sum(self.kept_bytes) / self.tokens,
            kl=mean(means),
            kl_worst=max(means),
            kl_p99=float(np.quantile(np.concatenate(self.kl), 0.99)),
            top1=mean(self.same),
            ppl_ratio=float(np.exp(mean(self.surprise))),
            error=max(self.errors),
            blocks=len(self.errors),
            fell_back=self.fell_back,
        )


def evaluate(
    model: Any,
    prompts: Sequence[torch.Tensor],
    codecs: Sequence[str] = CODECS,
    *,
    prefix_tokens: int = PREFIX_TOKENS,
    block_tokens: int = 64,
    kv_dtype: torch.dtype = torch.bfloat16,
    calibration: Calibration | None = None,
    advance: Callable[[float], None] = lambda part: None,
) -> list[Quality]:
    """Measure the quality of codecs on prompts. Returns one `Quality` per codec.

    prompts: token ids (1, n), n above `prefix_tokens`; the tokens after the prefix are the continuation. codecs: names as
    `codec_for` parses them. prefix_tokens: at least one block. advance: called with the fraction of a prompt that was done
    since the last call.
    """
    rope = rope_of_model(model)
    tallies = {name: _Tally() for name in codecs}
    for ids in prompts:
        kv = prefix_kv(model, ids[:, :prefix_tokens], kv_dtype)
        exact = continued(model, ids, kv)
        advance(1 / (1 + len(codecs)))
        layout = KVLayout(kv.shape[0], kv.shape[2], kv.shape[4], kv_dtype, block_tokens)
        for name, tally in tallies.items():
            decoded = _through(kv, codec_for(name, layout, rope=rope, calibration=calibration), block_tokens, tally)
            _compare(exact, continued(model, ids, decoded), ids[0, prefix_tokens + 1 :], tally)
            advance(1 / (1 + len(codecs)))
    return [tally.quality(name) for name, tally in tallies.items()]


def _through(kv: torch.Tensor, codec: Codec, block_tokens: int, tally: _Tally) -> torch.Tensor:
    """Returns a copy of `kv` in which every whole block was encoded and decoded. Adds sizes and errors to `tally`."""
    out = kv.clone()
    raw_bytes = kept_bytes = 0
    for start in range(0, kv.shape[3] - block_tokens + 1, block_tokens):
        raw, encoded = encoded_block(kv, codec, start, block_tokens)
        encoded.codec.decode_kv(encoded.payload, out[..., start : start + block_tokens, :])
        raw_bytes += raw.numel()
        kept_bytes += frame_bytes(encoded.codec, encoded.payload.nbytes, encoded.error)
        tally.tokens += block_tokens
        tally.errors.append(encoded.error)
        tally.fell_back += bool(encoded.fell_back)
    tally.raw_bytes.append(raw_bytes)
    tally.kept_bytes.append(kept_bytes)
    return out


def encoded_block(kv: torch.Tensor, codec: Codec, start: int, block_tokens: int) -> tuple[torch.Tensor, Encoded]:
    """Returns the raw bytes of the block of `kv` that starts at token `start`, and their encoded form."""
    raw = kv[..., start : start + block_tokens, :].contiguous().view(-1).view(torch.uint8)
    is_last_block = start + 2 * block_tokens > kv.shape[3]
    return raw, codec.at(start, is_last_block).encode(raw)


def _compare(exact: torch.Tensor, other: torch.Tensor, labels: torch.Tensor, tally: _Tally) -> None:
    tally.kl.append((exact.exp() * (exact - other)).sum(-1).clamp_min(0).double().numpy())
    tally.same.append(float((exact.argmax(-1) == other.argmax(-1)).float().mean()))
    chosen = labels[:, None]
    tally.surprise.append(float((exact[:-1].gather(1, chosen) - other[:-1].gather(1, chosen)).mean()))


def as_records(results: Sequence[Quality]) -> list[dict]:
    """Returns the results as dicts for JSON."""
    return [asdict(result) for result in results]
