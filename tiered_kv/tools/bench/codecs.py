"""`bench codec`: the encode and decode speed of each codec relative to memcpy in the same run, with one and two threads.

It measures on the KV of real texts in a real model, because the speed and size of codecs depend on the content. Without a model
it uses random values of the same shape, which say little about codecs that pack by content.
"""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tiered_kv.codecs import Calibration
from tiered_kv.codecs.rotation import rope_of_theta
from tiered_kv.config import format_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.prefix import prefix_kv
from tiered_kv.integrations.rope import rope_of_model
from tiered_kv.tools.bench.fetch import machine
from tiered_kv.tools.bench.quality import CALIBRATED, CODECS
from tiered_kv.tools.bench.speeds import prefill_us_per_token, speeds
from tiered_kv.tools.bench.subject import Subject, codecs_of, needs_calibration
from tiered_kv.tools.bench.texts import own_texts, prompts_of

LogLine = Callable[[str], None]
BLOCK_TOKENS = (16, 64, 256)
TEXTS = 2
TOKENS = 1024
SYNTHETIC = "synthetic"


def run_codec_bench(codec: str = "all", model: str | None = "default", quick: bool = False, log: LogLine = print) -> dict:
    """Measure codecs on a model's KV, or on synthetic KV if `model` is None. Returns the report.

    Takes five minutes. With `quick` it takes one: one thread, blocks of 64 tokens, fewer turns. `codec`: names separated by
    commas, or "all". Raises (kind `config`) naming --codec for an unknown codec. Raises what `Subject.load` raises if the model
    cannot be loaded.
    """
    asked = None if codec == "all" else codecs_of(codec)
    about, kvs, rope, calibration = _synthetic() if model is None else _real(model)
    needing = next((name for name in asked or () if needs_calibration(name)), None)
    if needing and calibration is None:
        message = f"--codec: {needing} needs a calibration file for the model; run: tiered-kv calibrate {model or 'default'}"
        raise TieredKVError(Kind.CONFIG, message, setting="codec")
    codecs = asked or [
        *CODECS,
        *(CALIBRATED[:-1] if calibration else ()),
    ]  # left out: the last codec, which differs from the one before only in a chain's last block
    results = []
    for threads in (1,) if quick else (1, 2):
        for tokens in (64,) if quick else BLOCK_TOKENS:
            for name in codecs:
                results += speeds(kvs, [name], rope, (tokens,), threads=threads, calibration=calibration, turns=4 if quick else 12)
                log(_line(results[-1]))
    return {"machine": machine(), **about, "results": results}


def _real(model: str) -> tuple[dict[str, Any], list[torch.Tensor], bytes | None, Calibration | None]:
    """Load a model and compute the KV of the first tokens of two texts.

    Returns facts for the report, the KV tensors (L, 2, H, T, D), the rotary embedding (RoPE), and the calibration.
    """
    subject = Subject.load(model)
    prompts = prompts_of(subject.tokenizer, own_texts(), TOKENS, TEXTS)
    dtype = torch.bfloat16
    kvs = [prefix_kv(subject.model, ids, dtype) for ids in prompts.ids]
    about = {"model": model, "dtype": "bfloat16", "prefill_us_per_token": prefill_us_per_token(subject.model, prompts.ids[0])}
    return about, kvs, rope_of_model(subject.model), subject.calibration()


def _synthetic() -> tuple[dict[str, Any], list[torch.Tensor], bytes | None, None]:
    """Create random KV in the default model's shape: normal values, with a log-normal scale per channel.

    Returns the same four values as `_real`. There is no calibration.
    """
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randn(30, 2, 3, 1, 64, generator=generator).exp()
    kv = torch.randn(30, 2, 3, TOKENS, 64, generator=generator) * sizes
    return {"model": SYNTHETIC, "dtype": "bfloat16", "prefill_us_per_token": None}, [kv.bfloat16()], rope_of_theta(1e5, 64), None


def _line(record: dict) -> str:
    what = f"{record['codec']}, {record['threads']} thread{'s' * (record['threads'] > 1)}, {record['block_tokens']} tokens"
    return f"{what}: encode {record['encode_vs_memcpy']:.2g}, decode {record['decode_vs_memcpy']:.2g} of memcpy"


def show(report: dict, console: Console) -> None:
    """Print the report as a table."""
    prefill_us = report["prefill_us_per_token"]
    table = Table(title=f"tiered-kv bench codec: speed as a fraction of memcpy, KV of {report['model']} in {report['dtype']}")
    for column in (
        "codec",
        "threads",
        "tokens",
        "block",
        "ratio",
        "encode",
        "decode",
        "decode µs per token",
        "decode vs prefill",
        "fell back",
    ):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for each in report["results"]:
        us = each["decode_us_per_token"]
        table.add_row(
            each["codec"],
            str(each["threads"]),
            str(each["block_tokens"]),
            format_size(each["block_bytes"]),
            f"{each['ratio']:.2f}",
            f"{each['encode_vs_memcpy']:.2g}",
            f"{each['decode_vs_memcpy']:.2g}",
            f"{us:.1f}",
            f"{prefill_us / us:.0f} ×" if prefill_us and each["threads"] == 1 else "",
            f"{each['fell_back']} of {each['blocks']}" if each["fell_back"] else "–",
        )
    console.print(table)
    about = report["machine"]
    prefill = f"prefill {prefill_us:.0f} µs per token, one thread; " if prefill_us else ""
    console.print(f"{prefill}{about['cpu']}, {about['cores']} cores, load {about['load_1min']}", highlight=False)
