"""Progress reports of commands that move bytes: a bar on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tiered_kv.config import format_size

SAY_EVERY_S = 5.0

Advance = Callable[[float, float, str], None]
"""Reports progress: bytes done, bytes in total, and a further text, for example the number of blocks."""


def print_line(console: Console, line: str) -> None:
    """Print a line without wrapping, highlighting or markup."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def count(number: int, what: str) -> str:
    """Returns a number with its noun: 1 pack, 1,200 packs, no packs."""
    return f"{format(number, ',') if number else 'no'} {what}{'' if number == 1 else 's'}"


def age(seconds: float) -> str:
    """Returns a time span as text in its largest fitting unit: 59 s, 1.5 min, 5.0 h."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def words(done: float, total: float, what: str, seconds: float) -> str:
    """Returns one line about progress after `seconds`: `what`, bytes done and total, rate, and time left."""
    done = min(done, total)
    parts = [what] if what else []
    parts.append(f"{format_size(done)} of {format_size(total)}")
    if done and seconds > 0:
        parts.append(f"{format_size(done / seconds)}/s")
        parts.append(f"{timedelta(seconds=round((total - done) * seconds / done))} left")
    return ", ".join(parts)


@contextmanager
def bar(console: Console, doing: str, now_s: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """Show progress until the end of the with block.

    Yields the function to call with the progress. On a terminal a bar is drawn. Elsewhere a line is printed at most every
    `SAY_EVERY_S` seconds.
    """
    begun_s = now_s()
    if not console.is_terminal:
        printed_s = begun_s

        def report(done: float, total: float, what: str) -> None:
            nonlocal printed_s
            if now_s() - printed_s >= SAY_EVERY_S:
                printed_s = now_s()
                print_line(console, f"{doing}: {words(done, total, what, printed_s - begun_s)}")

        yield report
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[words]}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(doing, total=None, words="")
        yield lambda done, total, what: progress.update(
            task, completed=min(done, total), total=total, words=words(done, total, what, now_s() - begun_s)
        )
