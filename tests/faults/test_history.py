"""The checker of histories finds wrong bytes and exceptions."""

from pathlib import Path

import pytest

from tests.faults.history import Operation, faults_of, hits, longest_overrun_ms, read

STORING = Operation("a", "storing", 100, 100, keys=("k",), asked=1, digests=("d",))
FETCH = Operation("b", "fetch", 110, 300_000_110, keys=("k",), asked=2, digests=("d",), tiers={"host": 16}, deadline_ms=200)


def test_a_fetch_of_what_was_stored_is_right() -> None:
    assert faults_of([STORING, FETCH]) == []
    assert hits([STORING, FETCH]) == {"host": 16}
    assert longest_overrun_ms([STORING, FETCH]) == pytest.approx(100)


@pytest.mark.parametrize(
    "history",
    [
        [FETCH],
        [Operation("a", "storing", 400_000_000, 400_000_001, keys=("k",), digests=("d",)), FETCH],
        [Operation("a", "storing", 100, 100, keys=("other",), digests=("d",)), FETCH],
        [Operation("a", "storing", 100, 100, keys=("k",), digests=("other",)), FETCH],
        [STORING, Operation("a", "store", 100, 120, error="ValueError()")],
    ],
    ids=["never stored", "stored later", "another key", "other bytes", "an exception"],
)
def test_what_no_cache_may_show_is_found(history: list[Operation]) -> None:
    assert len(faults_of(history)) == 1


def test_a_killed_worker_leaves_all_but_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(STORING.line())
    (tmp_path / "b").write_text(FETCH.line() + FETCH.line()[:-5])
    assert read(sorted(tmp_path.iterdir())) == [STORING, FETCH]
