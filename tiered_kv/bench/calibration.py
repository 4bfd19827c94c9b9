"""`tiered-kv calibrate` without its command line: fits, measures, and puts the file where nodes look for it."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from tiered_kv import calibrate
from tiered_kv.bench import report
from tiered_kv.bench.evaluation import OWN_TEXTS, measured
from tiered_kv.bench.quality import CALIBRATED, CODECS, CONTINUE_TOKENS, PREFIX_TOKENS
from tiered_kv.bench.subject import Subject, calibrations, longest_prompt
from tiered_kv.bench.texts import Prompts, content_of, own_texts, prompts_of, texts_from
from tiered_kv.blocks import Tier
from tiered_kv.calibrate.engine import TOKENS
from tiered_kv.codecs import Calibration
from tiered_kv.codecs.calibration import calibration_file
from tiered_kv.config import MIN_TIER_BYTES, QUALITIES, Config, format_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.service.quality import plan

MEASURED_ON, MEASURED_ON_QUICK = 12, 3


@dataclass(frozen=True)
class CalibrateOptions:
    """What the command line says."""

    model: str
    text: Sequence[str] = ()
    tokens: int = TOKENS
    out: str | None = None
    quick: bool = False


def run_calibrate(options: CalibrateOptions, console: Console) -> dict[str, Any]:
    """Fit, measure, write; prints what came of it to `console`, returns what `--json` prints. Progress goes to standard error."""
    texts = [text for path in options.text for text in texts_of(path)] or None
    if options.out and not Path(options.out).absolute().parent.is_dir():
        raise TieredKVError(Kind.CONFIG, f"--out: {options.out} is in no folder that exists", setting="out")
    subject = Subject.load(options.model)
    with report.telling(console) as say:
        calibration = calibrate.calibrate(subject.model, subject.tokenizer, texts, tokens=options.tokens, say=say)
    prefix_tokens, prompts = _prompts(subject, MEASURED_ON_QUICK if options.quick else MEASURED_ON)
    records = measured(subject, prompts, [*CODECS, *CALIBRATED], calibration, console, prefix_tokens)
    calibration = calibration.with_measured(records)
    paths = written(calibration, options.out)
    report.show_quality(records, f"{subject.name}, {len(prompts.ids)} prompts of {prefix_tokens} tokens that the fit has not seen", console)
    qualities = _qualities(calibration)
    report.show_qualities(qualities, console)
    lines = [f"fitted on {calibration.tokens:,} tokens; written: {paths[0]}, {format_size(paths[0].stat().st_size)}"]
    if not options.out:
        lines.append(f"nodes of this machine find it by the weights; for other machines copy {paths[0].parent}, or run this there")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return {
        "model": options.model,
        "tokens": calibration.tokens,
        "fingerprint": calibration.fingerprint,
        "files": [str(path) for path in paths],
        "prompts": len(prompts.ids),
        "results": records,
        "qualities": qualities,
    }


def texts_of(path: str) -> list[str]:
    """The texts of a file: the whole of it, or of one that ends in .jsonl each line's "text"; raises naming --text and the file."""
    return texts_from(path, "text") if path.endswith(".jsonl") else [content_of(path, "text")]


def _prompts(subject: Subject, count: int) -> tuple[int, Prompts]:
    """Tokens of a prefix, fewer for a model that reads little, and prompts that are never calibrated on."""
    longest = longest_prompt(subject.model) or PREFIX_TOKENS + CONTINUE_TOKENS
    prefix_tokens = min(PREFIX_TOKENS, (longest - CONTINUE_TOKENS) // 64 * 64)
    return prefix_tokens, prompts_of(subject.tokenizer, islice(own_texts(), OWN_TEXTS), prefix_tokens + CONTINUE_TOKENS, count)


def written(calibration: Calibration, out: str | None) -> list[Path]:
    """Save it to `out`, or else where nodes look: under the digest of the weights in each dtype, as one file with several names.

    Raises (kind `storage`).
    """
    if out:
        calibration.save(out)
        return [Path(out)]
    first, *others = [calibration_file(calibrations(), weights) for weights in calibration.weights]
    calibration.save(first)
    for other in others:
        _link(first, other)
    return [first, *others]


def _link(first: Path, other: Path) -> None:
    """Another name for the file, or a copy where the file system has no links; replaces what is there at once."""
    fresh = other.with_name(f".{other.name}-{os.getpid()}")
    try:
        fresh.unlink(missing_ok=True)
        try:
            os.link(first, fresh)
        except OSError:
            shutil.copyfile(first, fresh)
        os.replace(fresh, other)
    except OSError as error:
        raise TieredKVError(Kind.STORAGE, f"{other}: the calibration cannot be written ({error})", path=str(other)) from error


def _qualities(calibration: Calibration) -> list[dict[str, Any]]:
    """What each quality gives this model, of a node with a disk: the codec of both tiers, and what was measured of the colder one's."""
    measured_of = {row["codec"]: row for row in calibration.measured}
    found = []
    for quality in QUALITIES:
        codecs = plan(Config.of({"quality": quality, "disk": MIN_TIER_BYTES}), calibration).codecs
        row = measured_of[codecs[Tier.DISK]]
        found.append({"quality": quality, "host": codecs[Tier.HOST], "disk": row["codec"], "ratio": row["ratio"], "kl": row["kl"]})
    return found
