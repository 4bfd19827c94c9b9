"""`make fuzz`: what it runs, when it stops, and what it says; and that `make test` draws the same examples every time."""

import sys

import pytest
from hypothesis import settings

from tests import fuzz

PASSES, FAILS, FINDS_NOTHING = "pass", "raise SystemExit(1)", "raise SystemExit(5)"
GOES_ON = "import signal, time; signal.signal(signal.SIGINT, lambda *_: exit(2)); print('begun', flush=True); time.sleep(60)"


def rounds_of(programs: list[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[int]]:
    """Runs fuzz with Python programs in the place of pytest; returns its exit status and the seeds of its rounds."""
    seeds: list[int] = []

    def command(seed: int, _: list[str]) -> list[str]:
        seeds.append(seed)
        return [sys.executable, "-c", programs[min(len(seeds), len(programs)) - 1]]

    monkeypatch.setattr(fuzz, "pytest_command", command)
    monkeypatch.setattr(sys, "argv", ["fuzz", *arguments])
    return fuzz.main(), seeds


def test_the_first_round_that_fails_ends_the_run_and_names_its_seed(monkeypatch, capsys) -> None:
    status, seeds = rounds_of([PASSES, FAILS], monkeypatch, "--minutes", "1")
    assert status == 1
    assert len(set(seeds)) == 2, "each round has a seed of its own"
    assert f"make fuzz SEED={seeds[1]}" in capsys.readouterr().out


def test_a_seed_is_replayed_once(monkeypatch) -> None:
    assert rounds_of([PASSES], monkeypatch, "--seed", "7") == (0, [7])
    assert rounds_of([FAILS], monkeypatch, "--seed", "7") == (1, [7])


def test_a_round_that_outlasts_the_time_is_ended_and_is_no_failure(monkeypatch) -> None:
    status, seeds = rounds_of([GOES_ON], monkeypatch, "--minutes", "0.01")
    assert (status, len(seeds)) == (0, 1)


def test_arguments_that_choose_no_property_are_an_error(monkeypatch) -> None:
    assert rounds_of([FINDS_NOTHING], monkeypatch)[0] == 2


def test_a_round_runs_all_property_tests_with_its_seed() -> None:
    command = fuzz.pytest_command(7, ["tests/unit/store"])
    assert {"--hypothesis-seed=7", "--hypothesis-profile=fuzz", "hypothesis and not ray", "tests/unit/store"} <= set(command)


def test_the_profile_of_make_test_draws_the_same_examples_on_every_machine() -> None:
    steady, fresh = settings.get_profile("steady"), settings.get_profile("fuzz")
    assert (steady.derandomize, steady.database, steady.deadline) == (True, None, None)
    assert (fresh.derandomize, fresh.database) == (False, None)
