"""Adds one command to `tiered-kv`: its help text, its example, and the function that runs it."""

import argparse
from typing import Any


def add_command(commands: Any, name: str, text: str, example: str, run: Any, summary: str | None = None) -> argparse.ArgumentParser:
    """Add a command. Returns its parser, to which the caller adds the options.

    `run` gets the parsed options and the console, and returns the exit status.
    `summary` is shown in the list of commands instead of `text`.
    """
    command = commands.add_parser(
        name,
        help=summary or text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command
