"""What commands say while they move bytes: a bar on a terminal, elsewhere a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tiered_kv.config import format_size

SAY_EVERY_S = 5.0

Advance = Callable[[float, float, str], None]
"""Bytes done, bytes in all, and what else there is to say, for example how many blocks."""


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def count(number: int, what: str) -> str:
    """A number of things: 1 pack, 1,200 packs, no packs."""
    return f"{format(number, ',') if number else 'no'} {what}{'' if number == 1 else 's'}"


def age(seconds: float) -> str:
    """How long ago, with one digit that matters after the point."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def words(done: float, total: float, what: str, seconds: float) -> str:
    """How far it is after so many seconds: `what`, bytes, rate and time left."""
    done = min(done, total)
    said = [what] if what else []
    said.append(f"{format_size(done)} of {format_size(total)}")
    if done and seconds > 0:
        said.append(f"{format_size(done / seconds)}/s")
        said.append(f"{timedelta(seconds=round((total - done) * seconds / done))} left")
    return ", ".join(said)


@contextmanager
def bar(console: Console, doing: str, now_s: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """Progress of bytes, from now on until the end of the with block."""
    begun_s = now_s()
    if not console.is_terminal:
        said_s = begun_s

        def tell(done: float, total: float, what: str) -> None:
            nonlocal said_s
            if now_s() - said_s >= SAY_EVERY_S:
                said_s = now_s()
                say(console, f"{doing}: {words(done, total, what, said_s - begun_s)}")

        yield tell
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[words]}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(doing, total=None, words="")
        yield lambda done, total, what: progress.update(
            task, completed=min(done, total), total=total, words=words(done, total, what, now_s() - begun_s)
        )
