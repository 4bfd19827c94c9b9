"""What codecs cost in quality on a real model.

The KV of a prompt's first tokens, as the cache would keep it, is encoded and decoded block by block; the model then reads
the prompt's next tokens on both, teacher-forced. KL(exact || decoded) of the next token's distribution in nats, and the same
greedy choice, a token. The model computes in the dtype that it was loaded in: float32, so that arithmetic adds no noise.
Shapes: kv (L, 2, H, T, D) as in `layout`.
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
"""Those that need no calibration."""
CALIBRATED = ("ecuq:6e-5", "ecuq:1e-4", "xlayer:3e-5", "xlayer:1e-4", "xlayer:2e-4", "xlayer:2e-4:3e-5")
PREFIX_TOKENS = 1024
CONTINUE_TOKENS = 128


@dataclass(frozen=True)
class Quality:
    """One codec on some prompts. `ratio`: raw bytes over those of whole frames, `ratio_least` of a prompt; `bytes_per_token` of frames;
    `kl` in nats a token, `kl_worst` of a prompt, `kl_p99` of all tokens; `top1`: the part of tokens with the same greedy choice;
    `ppl_ratio`: perplexity over that on exact KV; `error` as in `Encoded`, the greatest; `fell_back`: blocks that another codec keeps."""

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
    """What was seen of one codec; a list has one entry a prompt."""

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
    """The quality of each codec, as `codec_for` reads them, on prompts (1, n), n above `prefix_tokens`, whose rest is the continuation.

    `prefix_tokens` have at least one block. `advance` is told, in parts of a prompt, what has been done since.
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
    """`kv` after every whole block of it was encoded and decoded, the rest as it is."""
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
    """The bytes of the block of `kv` that begins at token `start`, and what the codec makes of them."""
    raw = kv[..., start : start + block_tokens, :].contiguous().view(-1).view(torch.uint8)
    is_tail = start + 2 * block_tokens > kv.shape[3]
    return raw, codec.at(start, is_tail).encode(raw)


def _compare(exact: torch.Tensor, other: torch.Tensor, labels: torch.Tensor, tally: _Tally) -> None:
    tally.kl.append((exact.exp() * (exact - other)).sum(-1).clamp_min(0).double().numpy())
    tally.same.append(float((exact.argmax(-1) == other.argmax(-1)).float().mean()))
    chosen = labels[:, None]
    tally.surprise.append(float((exact[:-1].gather(1, chosen) - other[:-1].gather(1, chosen)).mean()))


def as_records(results: Sequence[Quality]) -> list[dict]:
    """The table for JSON."""
    return [asdict(result) for result in results]
