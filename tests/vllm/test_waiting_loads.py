"""Loads during which a request waits, chunked prefills, preemptions and aborts: right answers, and no request waits for ever."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.serving.processes import NodeProcess
from tests.vllm.engine import BLOCK, Engine
from tiered_kv.client.page_client import Loaded

GPU_BLOCKS, STEP_TOKENS = 20, 80


@pytest.fixture(scope="module")
def node(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node whose host tier holds ten blocks, and whose disk tier holds hundreds."""
    folder = str(tmp_path_factory.mktemp("disk"))
    with NodeProcess(cluster, host="8MiB", disk="512MiB", disk_path=folder) as node:
        yield node


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine], node: NodeProcess) -> Engine:
    """An engine that prefills STEP_TOKENS tokens a step, with few blocks of its own."""
    return make_engine(
        extra={"store_wait_ms": 2000.0},
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=4,
        max_model_len=512,
        num_gpu_blocks_override=GPU_BLOCKS,
    )


@pytest.fixture(autouse=True)
def fresh(engine: Engine) -> Iterator[None]:
    """Each test begins with nothing in vLLM's own cache. At its end all of vLLM's blocks are free again."""
    engine.forget()
    yield
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == GPU_BLOCKS - 1  # one is the null block


@pytest.fixture
def waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests wait for their loads, as on a GPU."""
    monkeypatch.setattr(engine.planner, "_loads_in_step", False)


class Gate:
    """The workers' client, whose loads wait while it is shut, and then fail after `good` blocks."""

    def __init__(self, client: Any, good: int = 99) -> None:
        self._client, self._good = client, good
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()

    def shut(self) -> None:
        self.open.clear()
        self.reached.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def load(self, chain: Any, pages: Any, blocks: list[int], **options: Any) -> Loaded:
        self.reached.set()
        assert self.open.wait(60)
        for number in blocks[self._good :]:
            for array in pages._arrays:
                array[number].fill_(0x3F)
        good = min(self._good, len(blocks))
        return self._client.load(chain.part(0, good), pages, blocks[:good], **options) if good else Loaded(0, {})


@pytest.fixture
def gate(engine: Engine, waits: None) -> Iterator[Gate]:
    worker, client = engine.worker, engine.worker._client
    gate = worker._client = Gate(client)
    yield gate
    gate.open.set()
    worker._client = client


def prepared(engine: Engine, seed: int, blocks: int = 4) -> tuple[list[int], Any]:
    """Returns a prompt that is stored, and its answer computed cold."""
    prompt = engine.prompt(seed, blocks * BLOCK + 5)
    cold = engine.ask(prompt)
    engine.forget()
    return prompt, cold


@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_chunked_prefill(engine: Engine, blocks: int) -> None:
    prompt = engine.prompt(40 + blocks, blocks * BLOCK + 7)
    cold = engine.ask({"prompt_token_ids": prompt, "cache_salt": "cold"})
    engine.ask(prompt).assert_same(cold)
    again = engine.reload(prompt)
    assert again.cached == engine.counts["loaded_blocks"] * BLOCK == blocks * BLOCK
    again.assert_same(cold)


def test_a_request_waits_for_its_load(engine: Engine, waits: None) -> None:
    prompt, cold = prepared(engine, 51)
    for _ in range(3):
        again = engine.reload(prompt)
        assert again.cached == engine.counts["loaded_blocks"] * BLOCK == 4 * BLOCK
        again.assert_same(cold)
    engine.forget()
    engine.ask(prompt[: 2 * BLOCK + 1])
    mixed = engine.ask(prompt)
    assert mixed.cached == 4 * BLOCK
    mixed.assert_same(cold)


def test_blocks_on_disk(engine: Engine) -> None:
    """More prompts than fit in the host tier. Blocks on disk are encoded without loss."""
    prompts = [engine.prompt(60 + number, 4 * BLOCK + 5) for number in range(6)]
    colds = [engine.reload(prompt) for prompt in prompts]
    loaded = 0
    for prompt, cold in zip(prompts, colds, strict=True):
        again = engine.reload(prompt)
        again.assert_same(cold)
        loaded += engine.counts["loaded_blocks_disk"]
    assert loaded >= 4


def test_a_load_that_misses_its_deadline_is_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [engine.prompt(70 + number, 4 * BLOCK + 5) for number in range(6)]
    colds = [engine.reload(prompt) for prompt in prompts]
    monkeypatch.setattr(engine.worker, "_settings", replace(engine.worker._settings, load_deadline_ms=0.001))
    failed = 0
    for prompt, cold in zip(prompts, colds, strict=True):
        engine.reload(prompt).assert_same(cold)
        failed += engine.counts["failed_blocks"]
    assert failed > 0


@pytest.mark.parametrize("good", [0, 1, 3])
def test_a_waiting_load_that_fails(engine: Engine, gate: Gate, good: int) -> None:
    prompt, cold = prepared(engine, 80 + good)
    gate._good = good
    engine.ask(prompt).assert_same(cold)
    assert engine.counts["failed_blocks"] == 4 - good
    engine.ask(prompt).assert_same(cold)


@pytest.mark.parametrize("good", [2, 99])
def test_abort_while_loading(engine: Engine, gate: Gate, good: int) -> None:
    """The blocks of the aborted request are not given to others before its load has ended."""
    prompt, cold = prepared(engine, 85)
    others = [engine.prompt(good + number, 6 * BLOCK + 3) for number in range(3)]
    right = [engine.reload({"prompt_token_ids": each, "cache_salt": "cold"}) for each in others]
    engine.forget()
    gate._good = good
    gate.shut()
    name = engine.add(prompt)
    while not gate.reached.is_set():
        engine.step()
    engine.abort(name)
    names = [engine.add({"prompt_token_ids": each, "cache_salt": "cold"}) for each in others]
    for _ in range(12):
        engine.step()
    gate.open.set()
    answers = engine.finish()
    for name, cold_other in zip(names, right, strict=True):
        assert answers[name].tokens == cold_other.tokens
        assert answers[name].distance(cold_other) < 1e-4
    engine.ask(prompt).assert_same(cold)


def test_others_run_while_a_request_waits(engine: Engine, gate: Gate) -> None:
    prompt, cold = prepared(engine, 90)
    gate.shut()
    name = engine.add(prompt)
    while not gate.reached.is_set():
        engine.step()
    other = engine.add(engine.prompt(91, BLOCK - 4))
    while other not in {output.request_id for output in engine.step()}:
        pass
    gate.open.set()
    answer = engine.finish()[name]
    assert answer.cached == 4 * BLOCK
    answer.assert_same(cold)


def test_abort_while_computing(engine: Engine) -> None:
    prompt = engine.prompt(92, 6 * BLOCK + 5)
    cold = engine.ask({"prompt_token_ids": prompt, "cache_salt": "cold"})
    engine.forget()
    name = engine.add(prompt)
    for _ in range(2):
        engine.step()
    engine.abort(name)
    engine.finish()
    again = engine.reload(prompt)
    assert 0 < again.cached < 6 * BLOCK
    again.assert_same(cold)


def test_preemption(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four answers need more blocks than vLLM has, so requests are preempted, and continue from what is stored."""
    options = {"max_tokens": 110}
    prompts = [engine.prompt(100 + number, 2 * BLOCK + 9) for number in range(4)]
    alone = [engine.reload({"prompt_token_ids": prompt, "cache_salt": "cold"}, **options) for prompt in prompts]
    preempted, preempt = [], engine.scheduler._preempt_request

    def counted(request: Any, *others: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *others, **options)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", counted)
    for loads_in_step in (True, False):
        monkeypatch.setattr(engine.planner, "_loads_in_step", loads_in_step)
        engine.forget()
        for answer, cold in zip(engine.run(*prompts, **options), alone, strict=True):
            assert answer.tokens == cold.tokens
            assert answer.distance(cold) < 1e-3
    assert preempted
    assert engine.counts["loaded_blocks"] > 0


def test_a_reset_while_a_request_loads(engine: Engine, gate: Gate) -> None:
    """What the request had before the reset may be of old weights: nothing of it is stored for those after."""
    prompt, cold = prepared(engine, 120)
    gate.shut()
    name = engine.add(prompt)
    while not gate.reached.is_set():
        engine.step()
    engine.scheduler.connector.reset_cache()
    gate.open.set()
    engine.finish()[name].assert_same(cold)
    again = engine.reload(prompt)
    assert again.cached == 0
    again.assert_same(cold)
