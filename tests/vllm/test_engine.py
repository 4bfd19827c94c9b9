"""Answers from the cache equal answers computed cold, to the last bit."""

from collections.abc import Callable

import pytest

from tests.unit.serving.processes import NodeProcess
from tests.vllm.engine import BLOCK, Engine

pytestmark = pytest.mark.usefixtures("node")


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine], node: NodeProcess) -> Engine:
    return make_engine()


def test_repeat_and_reload(engine: Engine) -> None:
    prompt = engine.prompt(1, 4 * BLOCK + 10)
    cold = engine.ask(prompt)
    repeat = engine.ask(prompt)
    again = engine.reload(prompt)
    assert (cold.cached, repeat.cached, again.cached) == (0, 4 * BLOCK, 4 * BLOCK)
    assert engine.counts["loaded_blocks_host"] == 4
    repeat.assert_same(cold)
    again.assert_same(cold)
