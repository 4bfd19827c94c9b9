"""The judgement of a soak finds figures that grow, and ignores those that only vary."""

from collections import Counter

import pytest

from tests.faults.soak import faults_of, growth_of

MIB = 1 << 20
GOOD: Counter[str] = Counter(fetch=100, wrong=0, errors=0)


def samples(values: list[float], thing: str = "node actor 0", figure: str = "rss_bytes") -> list[dict]:
    return [{thing: {figure: value}} for value in values]


def test_memory_that_grows_only_in_the_first_half_is_flat() -> None:
    assert faults_of(samples([at * 10 * MIB for at in range(1, 11)] + [100 * MIB] * 10), GOOD) == []


def test_memory_that_varies_without_growing_is_flat() -> None:
    assert faults_of(samples([(100 + at % 3 * 10) * MIB for at in range(60)]), GOOD) == []


def test_memory_that_grows_to_the_end_is_found() -> None:
    grown = samples([(100 + at) * MIB for at in range(60)])
    assert growth_of(grown)["node actor 0"]["rss_bytes"] == pytest.approx(20 / 134, rel=0.1)
    [fault] = faults_of(grown, GOOD)
    assert "rss_bytes of node actor 0 grew by" in fault


def test_a_few_more_open_files_are_not_a_leak_but_many_are() -> None:
    assert faults_of(samples([10] * 20 + [12] * 10, figure="fds"), GOOD) == []
    assert faults_of(samples(list(range(10, 70)), figure="fds"), GOOD) != []


def test_the_logs_of_ray_may_grow() -> None:
    assert faults_of(samples([at * MIB for at in range(60)], "Ray's logs", "bytes"), GOOD) == []


@pytest.mark.parametrize("name", ["wrong", "errors"])
def test_a_wrong_answer_is_a_fault(name: str) -> None:
    assert faults_of(samples([MIB] * 10), GOOD + Counter({name: 1})) == [f"{name} is 1, must be 0"]


def test_a_process_that_ended_is_a_fault() -> None:
    assert faults_of([*samples([MIB] * 10), {}], GOOD) == ["node actor 0 has ended"]
