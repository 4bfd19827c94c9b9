"""Progress and result tables of the codec measurements."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@contextmanager
def counting(what: str, total: int, console: Console) -> Iterator[Callable[[float], None]]:
    """Show on standard error how many of `total` items are done, and the time left.

    Yields a function to call with the fraction of an item that was done since the last call. On a terminal a bar is drawn.
    Elsewhere a line is printed for each completed item.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda part: progress.advance(task, part)
    else:
        yield _Lines(what, total).advance


@contextmanager
def line_printer(console: Console) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows the current step.

    On a terminal only the current step is visible. Elsewhere each step is printed on its own line.
    """
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._done = 0.0
        self._begun_s = time.monotonic()
        self._console = Console(stderr=True, width=120)

    def advance(self, part: float) -> None:
        before, self._done = round(self._done, 6), self._done + part
        done = round(self._done, 6)
        if int(done) > int(before):
            left_s = (time.monotonic() - self._begun_s) / done * (self._total - done)
            self._console.print(f"{self._what} {int(done)} of {self._total}, {duration(left_s)} left", highlight=False)


def duration(seconds: float) -> str:
    """Returns a number of seconds as text: 40 s, 3 min."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def show_quality(records: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """Print the figures of `codec-eval` and `calibrate` as a table with one row per codec."""
    table = Table("codec", title=title, title_justify="left")
    for column in (
        "ratio",
        "bytes\nper token",
        "KL",
        "p99",
        "top-1",
        "perplexity\nratio",
        "encode",
        "decode",
        "decode vs\nprefill",
        "fell\nback",
    ):
        table.add_column(column, justify="right")
    for each in records:
        table.add_row(
            each["codec"],
            f"{each['ratio']:.2f}",
            f"{each['bytes_per_token']:,.0f}",
            *(f"{each[name]:.1e}" if each[name] else "0" for name in ("kl", "kl_p99")),
            f"{each['top1']:.4f}",
            f"{each['ppl_ratio']:.4f}",
            f"{each['encode_vs_memcpy']:.2g}",
            f"{each['decode_vs_memcpy']:.2g}",
            f"{each['decode_vs_prefill']:.0f} ×",
            f"{each['fell_back']} of {each['blocks']}" if each["fell_back"] else "–",
        )
    console.print(table)
    legend = (
        "ratio: raw bytes divided by bytes of whole frames; KL: nats per token, relative to exact KV; encode, decode: speed as a fraction "
        "of memcpy, one thread; decode vs prefill: how many times faster decoding is than computing the tokens again"
    )
    console.print(legend, highlight=False, soft_wrap=True)


def show_qualities(qualities: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the codecs of each quality preset as a table."""
    table = Table("--quality", "host memory", "disk, objects", title="codecs of each --quality for this model", title_justify="left")
    table.add_column("disk ratio", justify="right")
    table.add_column("KL", justify="right")
    for each in qualities:
        kl = f"{each['kl']:.1e}" if each["kl"] else "0"
        table.add_row(each["quality"], each["host"], each["disk"], f"{each['ratio']:.2f}", kl)
    console.print(table)
