"""Loads that fail leave garbage in the engine's pages. The answers must be those computed cold, and so must all later ones."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.unit.serving.processes import NodeProcess
from tests.vllm.engine import BLOCK, Engine
from tiered_kv.client.page_client import Loaded

GARBAGE = 0x3F
STORED, BLOCKS = 3, 6
"""Blocks of a prompt that the cache has, and all of its blocks: a failed load spoils what is computed after it in the same step."""


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine], node: NodeProcess) -> Engine:
    return make_engine()


@pytest.fixture(autouse=True)
def fresh(engine: Engine) -> None:
    engine.forget()


class Failing:
    """The workers' client, whose loads fail after `good` blocks. The pages of the other blocks are overwritten with garbage."""

    def __init__(self, client: Any, good: int, error: Exception | None = None) -> None:
        self._client, self._good, self._error = client, good, error
        self.loads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def load(self, chain: Any, pages: Any, blocks: list[int], **options: Any) -> Loaded:
        self.loads += 1
        good = min(self._good, len(blocks))
        for number in blocks[good:]:
            for array in pages._arrays:
                array[number].fill_(GARBAGE)
        if self._error is not None:
            raise self._error
        return self._client.load(chain.part(0, good), pages, blocks[:good], **options) if good else Loaded(0, {})


@pytest.fixture
def fail(engine: Engine) -> Iterator[Callable[..., Failing]]:
    """`fail(good)` makes loads fail after `good` blocks until the end of the test, or until `fail.stop()`."""
    worker, client = engine.worker, engine.worker._client

    def start(good: int, error: Exception | None = None) -> Failing:
        worker._client = Failing(client, good, error)
        return worker._client

    def stop() -> None:
        worker._client = client

    start.stop = stop  # type: ignore[attr-defined]
    yield start
    stop()


def prepared(engine: Engine, seed: int) -> tuple[list[int], Any]:
    """Returns a prompt of BLOCKS blocks and its answer computed cold. The cache has its first STORED blocks, vLLM none."""
    prompt = engine.prompt(seed, BLOCKS * BLOCK + 5)
    cold = engine.ask({"prompt_token_ids": prompt, "cache_salt": "cold"})
    engine.ask(prompt[: STORED * BLOCK + 1])
    engine.forget()
    return prompt, cold


def assert_unharmed(engine: Engine, prompt: list[int], cold: Any) -> None:
    """Whoever asks later gets the right answer: from vLLM's own cache, twice, and then from ours."""
    for _ in range(3):
        engine.ask(prompt).assert_same(cold)
    again = engine.reload(prompt)
    assert again.cached == BLOCKS * BLOCK
    again.assert_same(cold)


@pytest.mark.parametrize("good", [0, 1, 2])
def test_the_request_computes_what_was_not_loaded(engine: Engine, fail: Callable, good: int) -> None:
    prompt, cold = prepared(engine, 100 + good)
    fail(good)
    engine.ask(prompt).assert_same(cold)
    assert engine.counts["failed_blocks"] == STORED - good
    assert engine.counts["loaded_blocks"] == good
    fail.stop()
    assert_unharmed(engine, prompt, cold)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), ValueError("out of bounds"), OSError("gone"), MemoryError()], ids=repr)
def test_an_unexpected_error_of_a_load_is_a_failed_load(engine: Engine, fail: Callable, error: Exception) -> None:
    prompt, cold = prepared(engine, 110)
    fail(0, error)
    engine.ask(prompt).assert_same(cold)
    assert engine.counts["failed_blocks"] == STORED
    fail.stop()
    assert_unharmed(engine, prompt, cold)
    assert engine.llm.reset_prefix_cache(reset_connector=True)


def test_abort_after_a_failed_load(engine: Engine, fail: Callable) -> None:
    prompt, cold = prepared(engine, 120)
    failing = fail(1)
    name = engine.add(prompt)
    while not failing.loads:
        engine.step()
    engine.abort(name)
    fail.stop()
    engine.finish()
    assert_unharmed(engine, prompt, cold)


def test_preemption_after_a_failed_load(engine: Engine, fail: Callable) -> None:
    prompt, cold = prepared(engine, 121)
    failing = fail(1)
    name = engine.add(prompt)
    while not failing.loads:
        engine.step()
    fail.stop()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.finish()[name].assert_same(cold)
    assert_unharmed(engine, prompt, cold)


def test_two_requests_of_one_step_share_a_failed_load(engine: Engine, fail: Callable) -> None:
    prompt, cold = prepared(engine, 122)
    fail(1)
    for answer in engine.run(prompt, prompt):
        assert answer.tokens == cold.tokens
        assert answer.distance(cold) < 1e-4
    fail.stop()
    for _ in range(2):
        assert engine.ask(prompt).distance(cold) < 1e-4
    assert engine.reload(prompt).distance(cold) < 1e-4


@pytest.mark.parametrize("aborted", [0, 1])
def test_two_requests_share_a_failed_load_and_one_is_aborted(engine: Engine, fail: Callable, aborted: int) -> None:
    prompt, cold = prepared(engine, 123 + aborted)
    failing = fail(1)
    names = [engine.add(prompt), engine.add(prompt)]
    while not failing.loads:
        engine.step()
    engine.abort(names.pop(aborted))
    fail.stop()
    answer = engine.finish()[names[0]]
    assert answer.tokens == cold.tokens
    assert answer.distance(cold) < 1e-4
    for _ in range(2):
        assert engine.ask(prompt).distance(cold) < 1e-4
    assert engine.reload(prompt).distance(cold) < 1e-4


@pytest.mark.parametrize("hook", ["matched", "allocated", "stores_of", "learned", "finished", "counts", "tiers_of"])
def test_an_error_of_the_scheduler_side(engine: Engine, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    prompt, cold = prepared(engine, 130)
    monkeypatch.setattr(engine.planner, hook, raising)
    engine.ask(prompt).assert_same(cold)
    engine.ask(prompt).assert_same(cold)
    monkeypatch.undo()
    assert_unharmed(engine, prompt, cold)


@pytest.mark.parametrize("hook", ["load", "store", "report", "counts"])
def test_an_error_of_the_workers_side(engine: Engine, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    prompt, cold = prepared(engine, 140)
    monkeypatch.setattr(engine.worker, hook, raising)
    engine.ask(prompt).assert_same(cold)
    engine.ask(prompt).assert_same(cold)
    monkeypatch.undo()
    assert_unharmed(engine, prompt, cold)


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("made by the test")
