"""The command lines of `tiered-kv codec-eval` and `tiered-kv calibrate`."""

import argparse
import json
from typing import Any

from rich.console import Console

from tiered_kv.cluster.command import add_command

MODEL = "a Hugging Face id or a folder, or `default` (SmolLM2-135M-Instruct, the demo's)"


def add_codec_eval(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    text = (
        "Measure what codecs cost a model on prompts: mean KL against the run on exact KV, its 99th percentile, the part of tokens with "
        "the same greedy choice, the perplexity ratio, the size with all side information, and speed beside memcpy. Computes in float32."
    )
    example = (
        "tiered-kv codec-eval default --codec int8,int4,xlayer:1e-4 --limit 8 --plot curve.png\n"
        "  tiered-kv codec-eval Qwen/Qwen3-0.6B --prompts prompts.jsonl --json > result.json"
    )
    command = add_command(commands, "codec-eval", text, example, _codec_eval, "Measure what codecs cost a model on prompts.")
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("--prompts", metavar="FILE", help='JSON lines {"text": …} (default: 30 texts that every machine has)')
    command.add_argument(
        "--codec",
        default="all",
        metavar="A,B,…",
        help="as int8, ecuq:STEP, xlayer:STEP, or xlayer:STEP:STEP, whose second step is for the last block (default: all there are)",
    )
    numbers = {
        "prefix-tokens": (1024, "tokens of a prompt whose KV is encoded; shorter prompts are skipped"),
        "continue-tokens": (128, "tokens behind them that the model then reads"),
        "block-tokens": (64, "tokens of a block"),
    }
    for name, (default, what) in numbers.items():
        command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    dtypes = ["bfloat16", "float16", "float32"]
    command.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of the KV that is kept (default: bfloat16)")
    command.add_argument("--calibration", metavar="FILE", help="for ecuq and xlayer (default: where `tiered-kv calibrate` puts it)")
    command.add_argument("--limit", type=int, metavar="N", help="at most so many prompts")
    command.add_argument("--plot", metavar="FILE", help="draw KL over bytes a token; needs matplotlib (tiered-kv[plot])")
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def add_calibrate(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    text = (
        "Fit the codecs ecuq and xlayer to a model, measure every codec on it with texts that the fit has not seen, and write one small "
        "file that the nodes of this machine find by themselves. Once for each model; minutes on a CPU for a small one."
    )
    example = "tiered-kv calibrate default\n  tiered-kv calibrate Qwen/Qwen3-0.6B --text manual.txt traffic.jsonl --tokens 100000"
    command = add_command(commands, "calibrate", text, example, _calibrate, "Fit the codecs ecuq and xlayer to a model, and measure all.")
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help='plain text, or JSON lines {"text": …} where the name ends in .jsonl',
    )
    command.add_argument("--tokens", type=int, metavar="N", help="to fit on, at least 10000 (default: 80000)")
    command.add_argument("--out", metavar="FILE", help="write it there instead, for --calibration")
    command.add_argument("--quick", action="store_true", help="measure on a few prompts only")
    command.add_argument("--json", action="store_true", help="print what was measured as JSON")


def _codec_eval(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.bench.evaluation import EvalOptions, run_codec_eval

    return _run(options, console, EvalOptions, run_codec_eval)


def _calibrate(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.bench.calibration import CalibrateOptions, run_calibrate

    return _run(options, console, CalibrateOptions, run_calibrate)


def _run(options: argparse.Namespace, console: Console, kind: Any, run: Any) -> int:
    names = kind.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    found = run(kind(**given), console)
    if options.json:
        print(json.dumps(found))
    return 0
