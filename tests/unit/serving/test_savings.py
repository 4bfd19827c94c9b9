"""The prefill tokens and seconds that fetches save."""

import math

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv.client.connect import client_of
from tiered_kv.client.prefill_savings import PREFILL_TOKENS_MIN, RATE_WINDOW_TOKENS, Savings

T = LAYOUT.block_tokens
PATH = (1, 2, 0, 1)


def test_saved_seconds_are_tokens_at_the_prefill_rate_minus_the_fetch_time() -> None:
    savings = Savings()
    assert savings.prefill_tokens_per_s is None
    assert savings.fetched(1000, 0.1) == 0.0, "no rate is known"
    savings.note_prefill(2000, 4.0)
    assert savings.prefill_tokens_per_s == 500.0
    assert savings.fetched(1000, 0.5) == 1.5
    assert savings.fetched(100, 3.0) == 0.0, "never below"
    assert savings.stats() == {"prefill_tokens_saved": 2100, "prefill_seconds_saved": 1.5, "prefill_tokens_per_s": 500.0}
    savings.check()


def test_the_rate_follows_the_latest_measurements() -> None:
    savings = Savings()
    savings.note_prefill(1000, 1.0)
    savings.note_prefill(1000, 3.0)
    between = savings.prefill_tokens_per_s
    assert 333 < between < 1000
    savings.note_prefill(RATE_WINDOW_TOKENS, RATE_WINDOW_TOKENS / 100)
    assert savings.prefill_tokens_per_s == 100.0
    savings.check()


@pytest.mark.parametrize(("tokens", "seconds"), [(PREFILL_TOKENS_MIN - 1, 1.0), (0, 1.0), (-5, 1.0), (1000, 0.0), (1000, -1.0)])
def test_measurements_without_a_usable_rate_are_ignored(tokens: int, seconds: float) -> None:
    savings = Savings()
    savings.note_prefill(tokens, seconds)
    savings.note_prefill(1000, math.inf)
    savings.note_prefill(1000, math.nan)
    assert savings.prefill_tokens_per_s is None
    savings.check()


def test_a_client_and_its_node_report_what_was_saved(node_factory, checked) -> None:
    node = node_factory()
    first, second = (checked(client_of(node.info(), LAYOUT, NAMESPACE, connect=node.open_session)) for _ in range(2))
    first.store(tokens_of(PATH), kv_of(PATH))
    first.fetch(tokens_of((7, 7)))
    assert first.stats()["client"]["prefill_tokens_saved"] == 0
    first.fetch(tokens_of(PATH))
    own = first.stats()["client"]
    assert (own["prefill_tokens_saved"], own["prefill_seconds_saved"], own["prefill_tokens_per_s"]) == (4 * T, 0.0, None)
    second.note_prefill(640, 6400.0)
    calls = second.node_calls
    second.fetch(tokens_of((*PATH, 9)))
    assert second.node_calls == calls, "the node is told without a call"
    own = second.stats()["client"]
    assert own["prefill_tokens_saved"] == 4 * T
    assert own["prefill_tokens_per_s"] == 0.1
    assert 0 < own["prefill_seconds_saved"] <= 40 * T
    stats = node.stats()
    assert stats["prefill_tokens_saved"] == 8 * T
    assert stats["prefill_seconds_saved"] == pytest.approx(own["prefill_seconds_saved"], abs=1e-5)
