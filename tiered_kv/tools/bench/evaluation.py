"""The work behind `tiered-kv codec-eval`: takes its options, prints a table, draws a plot, and returns the results."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from rich.console import Console

from tiered_kv import picture
from tiered_kv.codecs import Calibration
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.prefix import prefix_kv
from tiered_kv.integrations.rope import rope_of_model
from tiered_kv.tools.bench import curve, report
from tiered_kv.tools.bench.fetch import machine
from tiered_kv.tools.bench.quality import CALIBRATED, CODECS, CONTINUE_TOKENS, PREFIX_TOKENS, as_records, evaluate
from tiered_kv.tools.bench.speeds import prefill_us_per_token, speeds
from tiered_kv.tools.bench.subject import Subject, codecs_of, needs_calibration
from tiered_kv.tools.bench.texts import Prompts, own_texts, prompts_of, texts_from

OWN_PROMPTS = 30
OWN_TEXTS = 49
"""The number of texts that are never used for calibration: the demo's documents and standard library modules."""


@dataclass(frozen=True)
class EvalOptions:
    """The options of `tiered-kv codec-eval`. Raises (kind `config`) naming the option if a value is invalid."""

    model: str
    prompts: str | None = None
    codec: str = "all"
    prefix_tokens: int = PREFIX_TOKENS
    continue_tokens: int = CONTINUE_TOKENS
    block_tokens: int = 64
    dtype: str = "bfloat16"
    calibration: str | None = None
    limit: int | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        for name, least, why in (
            ("block_tokens", 1, ""),
            ("prefix_tokens", self.block_tokens, " (one block)"),
            ("continue_tokens", 2, ""),
            ("limit", 1, ""),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                message = f"--{name.replace('_', '-')}: must be at least {least}{why}, got {value}"
                raise TieredKVError(Kind.CONFIG, message, setting=name)


def run_codec_eval(options: EvalOptions, console: Console) -> dict[str, Any]:
    """Measure codecs, print the table to `console`, and draw the plot if asked to.

    Prints progress to standard error. Returns the object that `--json` prints.
    """
    asked = None if options.codec == "all" else codecs_of(options.codec)
    texts = texts_from(options.prompts) if options.prompts else None
    if options.plot:
        picture.check_target(options.plot)
    subject = Subject.load(options.model)
    subject.check_length(options.prefix_tokens + options.continue_tokens)
    calibration = _calibration(subject, asked, options.calibration)
    codecs = asked or [*CODECS, *(CALIBRATED if calibration else ())]
    prompts = _prompts(subject, texts, options)
    _print_lines(console, _about(prompts, asked is None and calibration is None, subject))
    kv_dtype = getattr(torch, options.dtype)
    records = measured(subject, prompts, codecs, calibration, console, options.prefix_tokens, options.block_tokens, kv_dtype)
    title = f"{subject.name}: {len(prompts.ids)} prompts, {options.prefix_tokens} + {options.continue_tokens} tokens, {options.dtype} KV"
    report.show_quality(records, title, console)
    if options.plot:
        curve.draw(records, title, options.plot)
        _print_lines(console, [f"wrote the plot to {options.plot}"])
    return {
        "model": options.model,
        "prompts": len(prompts.ids),
        "skipped_prompts": prompts.skipped,
        "prefix_tokens": options.prefix_tokens,
        "continue_tokens": options.continue_tokens,
        "block_tokens": options.block_tokens,
        "dtype": options.dtype,
        "calibration": {"fingerprint": calibration.fingerprint, "tokens": calibration.tokens} if calibration else None,
        "machine": machine(),
        "results": records,
    }


def measured(
    subject: Subject,
    prompts: Prompts,
    codecs: Sequence[str],
    calibration: Calibration | None,
    console: Console,
    prefix_tokens: int = PREFIX_TOKENS,
    block_tokens: int = 64,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:
    """Measure the quality of codecs on all prompts, and their speed on the KV of the first one.

    Shows progress. Returns one record per codec.
    """
    facts = {"prefix_tokens": prefix_tokens, "block_tokens": block_tokens, "kv_dtype": kv_dtype, "calibration": calibration}
    with report.counting("prompt", len(prompts.ids), console) as advance:
        qualities = as_records(evaluate(subject.model, prompts.ids, codecs, advance=advance, **facts))
    prefix = prompts.ids[0][:, :prefix_tokens]
    kv, rope = prefix_kv(subject.model, prefix, kv_dtype), rope_of_model(subject.model)
    prefill_us = prefill_us_per_token(subject.model, prefix)
    with report.counting("speed of codec", len(codecs), console) as advance:
        for codec, record in zip(codecs, qualities, strict=True):
            record |= _speed(speeds([kv], [codec], rope, (block_tokens,), calibration=calibration)[0], prefill_us)
            advance(1)
    return qualities


def _speed(speed: dict[str, Any], prefill_us: float) -> dict[str, Any]:
    return {
        "encode_vs_memcpy": speed["encode_vs_memcpy"],
        "decode_vs_memcpy": speed["decode_vs_memcpy"],
        "decode_us_per_token": speed["decode_us_per_token"],
        "prefill_us_per_token": prefill_us,
        "decode_vs_prefill": prefill_us / speed["decode_us_per_token"],
    }


def _calibration(subject: Subject, asked: Sequence[str] | None, path: str | None) -> Calibration | None:
    needing = next((codec for codec in asked or () if needs_calibration(codec)), None)
    if asked is not None and needing is None and path is None:
        return None
    calibration = subject.calibration(path)
    if needing and calibration is None:
        message = f"--codec: {needing} needs a calibration file for the model; run: tiered-kv calibrate {subject.name}"
        raise TieredKVError(Kind.CONFIG, message, setting="codec")
    return calibration


def _prompts(subject: Subject, texts: list[str] | None, options: EvalOptions) -> Prompts:
    tokens = options.prefix_tokens + options.continue_tokens
    if texts is not None:
        return prompts_of(subject.tokenizer, texts, tokens, options.limit)
    return prompts_of(subject.tokenizer, islice(own_texts(), OWN_TEXTS), tokens, options.limit or OWN_PROMPTS)


def _about(prompts: Prompts, is_uncalibrated: bool, subject: Subject) -> list[str]:
    lines = []
    if prompts.skipped:
        lines.append(f"[yellow]note[/]: {prompts.skipped} texts are too short and were skipped")
    if is_uncalibrated:
        lines.append(
            f"[yellow]note[/]: ecuq and xlayer are not measured: they need a calibration; run `tiered-kv calibrate {subject.name}`"
        )
    return lines


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
