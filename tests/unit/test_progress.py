"""Progress reports of commands that move bytes."""

from io import StringIO

import pytest
from rich.console import Console

from tiered_kv.cluster.commands.progress import SAY_EVERY_S, age, bar, count, words

MIB = 1 << 20


@pytest.mark.parametrize(
    ("done", "what", "seconds", "text"),
    [
        (0, "0 of 9 blocks", 3.0, "0 of 9 blocks, 0 B of 80.0 MiB"),
        (0, "", 0.0, "0 B of 80.0 MiB"),
        (20 * MIB, "2 of 9 blocks", 4.0, "2 of 9 blocks, 20.0 MiB of 80.0 MiB, 5.0 MiB/s, 0:00:12 left"),
        (80 * MIB, "", 4.0, "80.0 MiB of 80.0 MiB, 20.0 MiB/s, 0:00:00 left"),
        (81 * MIB, "", 4.0, "80.0 MiB of 80.0 MiB, 20.0 MiB/s, 0:00:00 left"),
        (20 * MIB, "", 0.0, "20.0 MiB of 80.0 MiB"),
        (1 * MIB, "", 3600.0, "1.0 MiB of 80.0 MiB, 291 B/s, 3 days, 7:00:00 left"),
    ],
)
def test_a_progress_line_has_bytes_rate_and_time_left(done: int, what: str, seconds: float, text: str) -> None:
    assert words(done, 80 * MIB, what, seconds) == text


def test_progress_of_zero_bytes_does_not_divide_by_zero() -> None:
    assert words(0, 0, "no blocks", 1.0) == "no blocks, 0 B of 0 B"


def test_a_log_gets_a_line_every_few_seconds_and_a_terminal_a_bar() -> None:
    now_s, out = [0.0], StringIO()
    with bar(Console(file=out, width=120), "writing", lambda: now_s[0]) as advance:
        advance(MIB, 4 * MIB, "1 of 4 blocks")
        now_s[0] = SAY_EVERY_S
        advance(2 * MIB, 4 * MIB, "2 of 4 blocks")
        advance(3 * MIB, 4 * MIB, "3 of 4 blocks")
    assert out.getvalue() == "writing: 2 of 4 blocks, 2.0 MiB of 4.0 MiB, 409.6 KiB/s, 0:00:05 left\n"
    screen = StringIO()
    with bar(Console(file=screen, width=120, force_terminal=True, color_system=None), "writing", lambda: now_s[0]) as advance:
        now_s[0] += 2
        advance(2 * MIB, 4 * MIB, "2 of 4 blocks")
    assert "2 of 4 blocks, 2.0 MiB of 4.0 MiB, 1.0 MiB/s, 0:00:02 left" in screen.getvalue()


def test_counts_and_ages_as_text() -> None:
    assert [count(number, "block") for number in (0, 1, 2, 1200)] == ["no blocks", "1 block", "2 blocks", "1,200 blocks"]
    assert [age(seconds) for seconds in (-3, 59, 90, 3600 * 5, 86400 * 2.5)] == ["0 s", "59 s", "1.5 min", "5.0 h", "2.5 d"]
