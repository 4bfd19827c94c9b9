"""Codecs on a real model: what they cost in quality, and how fast they are beside memcpy.

Quality: the KV of a prompt's first tokens, as the cache would keep it, is encoded and decoded block by block; the model then reads
the prompt's next tokens on both, teacher-forced. KL(exact || decoded) of the next token's distribution in nats, and the same
greedy choice, a token. The model computes in the dtype that it was loaded in: float32, so that arithmetic adds no noise.
Shapes: kv (L, 2, H, T, D) as in `layout`.
"""

import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from tiered_kv.codecs import Calibration, Codec, Encoded, codec_for
from tiered_kv.codecs.frame import frame_bytes
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.rope import rope_of_model
from tiered_kv.integrations.transformers import cache_from_kv, kv_from_cache
from tiered_kv.layout import KVLayout

Say = Callable[[str], None]
CODECS = ("lossless", "int8", "int6", "int4", "fp8")
PREFIX_TOKENS = 1024
CONTINUE_TOKENS = 128
WORKING_SET_BYTES = 256 << 20
REPETITIONS = 12
TURN = 8


@dataclass(frozen=True)
class Quality:
    """One codec on some prompts. `ratio`: raw bytes over those of whole frames; `kl` in nats a token, `kl_p99` of all tokens;
    `top1`: the part of tokens with the same greedy choice; `ppl_ratio`: perplexity over that on exact KV; `error` as in `Encoded`."""

    codec: str
    prompts: int
    ratio: float
    ratio_least: float
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
            kl=mean(means),
            kl_worst=max(means),
            kl_p99=float(np.quantile(np.concatenate(self.kl), 0.99)),
            top1=mean(self.same),
            ppl_ratio=float(np.exp(mean(self.surprise))),
            error=max(self.errors),
            blocks=len(self.errors),
            fell_back=self.fell_back,
        )


def own_texts() -> Iterator[str]:
    """Texts that are on every machine, long ones first of each kind: the demo's documents, then the standard library's modules."""
    folder = files("tiered_kv.demo") / "documents"
    yield from (path.read_text("utf-8") for path in sorted(folder.iterdir(), key=lambda path: path.name) if path.name.endswith(".md"))
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    yield from (path.read_text("utf-8") for path in modules)


def prompts_of(tokenizer: Any, texts: Iterator[str], count: int, tokens: int) -> list[torch.Tensor]:
    """The first `tokens` tokens (1, tokens) of the first `count` texts that have as many; raises (kind `config`) if too few have."""
    prompts: list[torch.Tensor] = []
    while len(prompts) < count:
        text = next(texts, None)
        if text is None:
            raise TieredKVError(
                Kind.CONFIG, f"--prompts: {len(prompts)} texts of {tokens} tokens where {count} are needed", setting="prompts"
            )
        ids = tokenizer(text[: 12 * tokens], return_tensors="pt")["input_ids"][:, :tokens]
        if ids.shape[1] == tokens:
            prompts.append(ids)
    return prompts


def evaluate(
    model: Any,
    prompts: Sequence[torch.Tensor],
    codecs: Sequence[str] = CODECS,
    *,
    prefix_tokens: int = PREFIX_TOKENS,
    block_tokens: int = 64,
    kv_dtype: torch.dtype = torch.bfloat16,
    calibration: Calibration | None = None,
    say: Say = lambda line: None,
) -> list[Quality]:
    """The quality of each codec on prompts (1, n), n above `prefix_tokens`, whose rest is the continuation."""
    rope = rope_of_model(model)
    tallies = {name: _Tally() for name in codecs}
    for number, ids in enumerate(prompts, 1):
        kv, exact = _exact_run(model, ids, prefix_tokens, kv_dtype)
        layout = KVLayout(kv.shape[0], kv.shape[2], kv.shape[4], kv_dtype, block_tokens)
        for name, tally in tallies.items():
            decoded = _through(kv, codec_for(name, layout, rope=rope, calibration=calibration), block_tokens, tally)
            _compare(exact, _continued(model, ids, decoded), ids[0, prefix_tokens + 1 :], tally)
        say(f"prompt {number} of {len(prompts)}")
    return [tally.quality(name) for name, tally in tallies.items()]


@torch.inference_mode()
def _exact_run(model: Any, ids: torch.Tensor, prefix_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The KV of the prefix as the cache would keep it, and the continuation's log-probabilities on it (tokens, vocabulary)."""
    cache = model(ids[:, :prefix_tokens], use_cache=True, logits_to_keep=1).past_key_values
    kv = kv_from_cache(cache, 0, prefix_tokens).to(dtype)
    return kv, _continued(model, ids, kv)


@torch.inference_mode()
def _continued(model: Any, ids: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (tokens, vocabulary) for what follows each token behind the prefix whose KV is given."""
    cache = cache_from_kv(kv.to(model.dtype), model.config)
    return model(ids[:, kv.shape[3] :], past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)


def _through(kv: torch.Tensor, codec: Codec, block_tokens: int, tally: _Tally) -> torch.Tensor:
    """`kv` after every whole block of it was encoded and decoded, the rest as it is."""
    out = kv.clone()
    raw_bytes = kept_bytes = 0
    for start in range(0, kv.shape[3] - block_tokens + 1, block_tokens):
        raw, encoded = encoded_block(kv, codec, start, block_tokens)
        encoded.codec.decode_kv(encoded.payload, out[..., start : start + block_tokens, :])
        raw_bytes += raw.numel()
        kept_bytes += frame_bytes(encoded.codec, encoded.payload.nbytes, encoded.error)
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


def speeds(
    kv: torch.Tensor,
    codecs: Sequence[str] = CODECS,
    rope: bytes | None = None,
    block_tokens: Sequence[int] = (16, 64, 256),
    *,
    working_set_bytes: int = WORKING_SET_BYTES,
    calibration: Calibration | None = None,
) -> list[dict]:
    """Encode and decode of blocks of `kv` on one thread, as ratios to a memcpy of the raw bytes in the same run: medians.

    All three go round a working set larger than the processor's caches, so that they read and write what lies in memory, and
    take turns, a few blocks at a time, as a fetch has a few blocks.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_speed(kv, name, rope, tokens, working_set_bytes, calibration) for tokens in block_tokens for name in codecs]
    finally:
        torch.set_num_threads(threads)


def _speed(kv: torch.Tensor, name: str, rope: bytes | None, tokens: int, working_set_bytes: int, calibration: Calibration | None) -> dict:
    layout = KVLayout(kv.shape[0], kv.shape[2], kv.shape[4], kv.dtype, tokens)
    codec = codec_for(name, layout, rope=rope, calibration=calibration)
    starts = range(0, kv.shape[3] - tokens + 1, tokens)
    blocks = [encoded_block(kv, codec, start, tokens) for start in starts]
    rounds = max(working_set_bytes // (layout.block_bytes * len(blocks)), 1)
    count = rounds * len(blocks)
    raws = [raw.clone() for _ in range(rounds) for raw, _ in blocks]
    outs = [torch.zeros_like(raw) for raw in raws]
    payloads = [(each.codec, memoryview(bytes(each.payload))) for _ in range(rounds) for _, each in blocks]
    took_s: dict[str, list[float]] = {"copy": [], "decode": [], "encode": []}
    runs: dict[str, Callable[[int], Any]] = {
        "copy": lambda at: outs[at].copy_(raws[at]),
        "decode": lambda at: payloads[at][0].decode(payloads[at][1], outs[at]),
        "encode": lambda at: codec.at(starts[at % len(starts)]).encode(raws[at]),
    }
    for turn in range(REPETITIONS):
        for place, (name_of_run, run) in enumerate(runs.items()):
            first = turn * TURN + place * count // 3
            took_s[name_of_run] += [_seconds(run, at % count) for at in range(first, first + TURN)]
    memcpy_s = median(took_s["copy"])
    return {
        "codec": name,
        "block_tokens": tokens,
        "block_bytes": layout.block_bytes,
        "ratio": sum(raw.numel() for raw, _ in blocks) / sum(each.payload.nbytes for _, each in blocks),
        "memcpy_bytes_s": layout.block_bytes / memcpy_s,
        "encode_vs_memcpy": memcpy_s / median(took_s["encode"]),
        "decode_vs_memcpy": memcpy_s / median(took_s["decode"]),
    }


def _seconds(run: Callable[[int], Any], at: int) -> float:
    begun = time.perf_counter()
    run(at)
    return time.perf_counter() - begun


def as_records(results: Sequence[Quality]) -> list[dict]:
    """The table for JSON."""
    return [asdict(result) for result in results]
