"""How every command of `tiered-kv` is added: its text, its examples, and what runs it."""

import argparse
from typing import Any


def add_command(commands: Any, name: str, text: str, example: str, run: Any, summary: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command, to be given its options. `summary`: what the list of commands says, if not all of `text`."""
    command = commands.add_parser(
        name,
        help=summary or text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command
