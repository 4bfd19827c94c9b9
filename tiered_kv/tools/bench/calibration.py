"""The work behind `tiered-kv calibrate`: fits the codecs, measures them, and writes the file where nodes look for it."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from tiered_kv.blocks import Tier
from tiered_kv.codecs import Calibration
from tiered_kv.codecs.calibrated.tables import calibration_file
from tiered_kv.config import MIN_TIER_BYTES, QUALITIES, Config, format_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.codec_plan import plan
from tiered_kv.tools import calibrate
from tiered_kv.tools.bench import report
from tiered_kv.tools.bench.evaluation import OWN_TEXTS, measured
from tiered_kv.tools.bench.quality import CALIBRATED, CODECS, CONTINUE_TOKENS, PREFIX_TOKENS
from tiered_kv.tools.bench.subject import Subject, calibrations, longest_prompt
from tiered_kv.tools.bench.texts import Prompts, content_of, own_texts, prompts_of, texts_from
from tiered_kv.tools.calibrate.engine import TOKENS

MEASURED_ON, MEASURED_ON_QUICK = 12, 3


@dataclass(frozen=True)
class CalibrateOptions:
    """The options of `tiered-kv calibrate`."""

    model: str
    text: Sequence[str] = ()
    tokens: int = TOKENS
    out: str | None = None
    quick: bool = False


def run_calibrate(options: CalibrateOptions, console: Console) -> dict[str, Any]:
    """Fit the codecs to a model, measure all codecs, and write the calibration file.

    Prints the results to `console`, and progress to standard error. Returns the object that `--json` prints.
    """
    texts = [text for path in options.text for text in texts_of(path)] or None
    if options.out and not Path(options.out).absolute().parent.is_dir():
        raise TieredKVError(Kind.CONFIG, f"--out: the folder of {options.out} does not exist", setting="out")
    subject = Subject.load(options.model)
    with report.line_printer(console) as log:
        calibration = calibrate.calibrate(subject.model, subject.tokenizer, texts, tokens=options.tokens, log=log)
    prefix_tokens, prompts = _prompts(subject, MEASURED_ON_QUICK if options.quick else MEASURED_ON)
    records = measured(subject, prompts, [*CODECS, *CALIBRATED], calibration, console, prefix_tokens)
    calibration = calibration.with_measured(records)
    paths = written(calibration, options.out)
    report.show_quality(
        records, f"{subject.name}, {len(prompts.ids)} prompts of {prefix_tokens} tokens that were not used for the fit", console
    )
    qualities = _qualities(calibration)
    report.show_qualities(qualities, console)
    lines = [f"fitted on {calibration.tokens:,} tokens; wrote {paths[0]}, {format_size(paths[0].stat().st_size)}"]
    if not options.out:
        lines.append(
            f"nodes on this machine find the file by the model's weights; on other machines, copy {paths[0].parent} or run calibrate again"
        )
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
    """Returns the texts of a file: its whole content, or the "text" of each line if its name ends in .jsonl.

    Raises (kind `config`) naming --text and the file.
    """
    return texts_from(path, "text") if path.endswith(".jsonl") else [content_of(path, "text")]


def _prompts(subject: Subject, count: int) -> tuple[int, Prompts]:
    """Returns the number of prefix tokens, and prompts that are never used for calibration.

    The prefix is shorter for models with a short context.
    """
    longest = longest_prompt(subject.model) or PREFIX_TOKENS + CONTINUE_TOKENS
    prefix_tokens = min(PREFIX_TOKENS, (longest - CONTINUE_TOKENS) // 64 * 64)
    return prefix_tokens, prompts_of(subject.tokenizer, islice(own_texts(), OWN_TEXTS), prefix_tokens + CONTINUE_TOKENS, count)


def written(calibration: Calibration, out: str | None) -> list[Path]:
    """Save the calibration to `out`, or by default in the folder in which nodes look for it. Returns the paths.

    In that folder the file has one name (a hard link) per dtype: the digest of the weights in that dtype. Raises
    (kind `storage`) if the file cannot be written.
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
    """Make `other` a hard link to the file `first`, or a copy of it if the file system has no hard links.

    Replaces an existing file `other` atomically.
    """
    fresh = other.with_name(f".{other.name}-{os.getpid()}")
    try:
        fresh.unlink(missing_ok=True)
        try:
            os.link(first, fresh)
        except OSError:
            shutil.copyfile(first, fresh)
        os.replace(fresh, other)
    except OSError as error:
        raise TieredKVError(Kind.STORAGE, f"cannot write the calibration to {other}: {error}", path=str(other)) from error


def _qualities(calibration: Calibration) -> list[dict[str, Any]]:
    """Returns, for each quality preset, the codecs of host and disk, and the disk codec's measured compression ratio and KL."""
    measured_of = {row["codec"]: row for row in calibration.measured}
    found = []
    for quality in QUALITIES:
        codecs = plan(Config.of({"quality": quality, "disk": MIN_TIER_BYTES}), calibration).codecs
        row = measured_of[codecs[Tier.DISK]]
        found.append({"quality": quality, "host": codecs[Tier.HOST], "disk": row["codec"], "ratio": row["ratio"], "kl": row["kl"]})
    return found
