"""The commands `tiered-kv codec-eval` and `tiered-kv calibrate`."""

import argparse
import json
from typing import Any

from rich.console import Console

from tiered_kv.cluster.commands.command import add_command

MODEL = "Hugging Face id or folder of the model, or `default` (SmolLM2-135M-Instruct, the model of the demo)"


def add_codec_eval(commands: Any) -> None:
    """Add `codec-eval` to the parser's `commands`."""
    text = (
        "Measure the error, size and speed of codecs with a model on prompts. Figures: mean KL divergence from the run on exact KV and its "
        "99th percentile, the share of tokens with the same greedy choice, the perplexity ratio, the size with all side information, "
        "and the speed relative to memcpy. Computes in float32."
    )
    example = (
        "tiered-kv codec-eval default --codec int8,int4,xlayer:1e-4 --limit 8 --plot curve.png\n"
        "  tiered-kv codec-eval Qwen/Qwen3-0.6B --prompts prompts.jsonl --json > result.json"
    )
    command = add_command(
        commands, "codec-eval", text, example, _codec_eval, "Measure the error, size and speed of codecs with a model on prompts."
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("--prompts", metavar="FILE", help='JSON lines {"text": …} (default: 30 texts that ship with tiered-kv and Python)')
    command.add_argument(
        "--codec",
        default="all",
        metavar="A,B,…",
        help="codecs such as int8, ecuq:STEP, xlayer:STEP, or xlayer:STEP:STEP with its own step for the last block (default: all codecs)",
    )
    numbers = {
        "prefix-tokens": (1024, "tokens at the start of each prompt whose KV is encoded; shorter prompts are skipped"),
        "continue-tokens": (128, "tokens after these that the model then reads; the error is measured on them"),
        "block-tokens": (64, "tokens in a block"),
    }
    for name, (default, what) in numbers.items():
        command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    dtypes = ["bfloat16", "float16", "float32"]
    command.add_argument("--dtype", choices=dtypes, default="bfloat16", help="dtype of the KV to encode (default: bfloat16)")
    command.add_argument(
        "--calibration",
        metavar="FILE",
        help="calibration file for ecuq and xlayer (default: the file that `tiered-kv calibrate` wrote for this model)",
    )
    command.add_argument("--limit", type=int, metavar="N", help="use at most N prompts (default: all)")
    command.add_argument("--plot", metavar="FILE", help="plot KL against bytes per token to FILE; needs matplotlib (tiered-kv[plot])")
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def add_calibrate(commands: Any) -> None:
    """Add `calibrate` to the parser's `commands`."""
    text = (
        "Fit the codecs ecuq and xlayer to a model, measure every codec with it on texts that were not used for the fit, and write one "
        "small file, which the nodes on this machine find by themselves. Needed once per model; takes minutes on a CPU for a small model."
    )
    example = "tiered-kv calibrate default\n  tiered-kv calibrate Qwen/Qwen3-0.6B --text manual.txt traffic.jsonl --tokens 100000"
    command = add_command(
        commands, "calibrate", text, example, _calibrate, "Fit the codecs ecuq and xlayer to a model, and measure all codecs."
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help='files to fit on: plain text, or JSON lines {"text": …} if the name ends in .jsonl (default: texts found on this machine)',
    )
    command.add_argument("--tokens", type=int, metavar="N", help="number of tokens to fit on, at least 10000 (default: 80000)")
    command.add_argument(
        "--out", metavar="FILE", help="file to write, to be passed with --calibration (default: in the user's cache folder)"
    )
    command.add_argument("--quick", action="store_true", help="measure on only a few prompts")
    command.add_argument("--json", action="store_true", help="print the measured figures as JSON")


def _codec_eval(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.tools.bench.evaluation import EvalOptions, run_codec_eval

    return _run(options, console, EvalOptions, run_codec_eval)


def _calibrate(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.tools.bench.calibration import CalibrateOptions, run_calibrate

    return _run(options, console, CalibrateOptions, run_calibrate)


def _run(options: argparse.Namespace, console: Console, kind: Any, run: Any) -> int:
    names = kind.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    found = run(kind(**given), console)
    if options.json:
        print(json.dumps(found))
    return 0
