"""Fixtures for tests of the engine: benches that are checked at the end."""

from collections.abc import Iterator

import pytest

from tests.unit.store.bench import Bench
from tiered_kv.blocks import Tier

HOST = Tier.HOST


@pytest.fixture
def make() -> Iterator:
    benches = []

    def maker(*lower: Tier, **options) -> Bench:
        benches.append(Bench(HOST, *lower, **options))
        return benches[-1]

    yield maker
    for bench in benches:
        bench.let_go()
        bench.engine.settle()
        bench.check()
        bench.engine.close()
