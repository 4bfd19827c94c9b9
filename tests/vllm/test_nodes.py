"""Nodes that come late, hang, die, return, are too small, or hold damaged bytes: no request fails, stalls or gets a wrong token."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.nursery import Program
from tests.unit.serving.processes import NodeProcess, until
from tests.vllm.engine import BLOCK, Engine

FOUND_WITHIN_S = 20.0
"""The engine looks for a new node now and then. Generous, because other tests may use the machine."""
ANSWER_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """An engine that was started before its cluster."""
    return make_engine(extra={"node": "", "ask_nodes_ms": 2000.0})


@pytest.fixture(autouse=True)
def fresh(engine: Engine) -> None:
    engine.forget()


def uses(engine: Engine, directory: str) -> bool:
    """Whether both sides of the connector use this node. Runs a request, because they look for nodes when they need them."""
    engine.forget()
    engine.ask(engine.prompt(999, BLOCK + 1), max_tokens=1)
    clients = engine.planner._client, engine.worker._client
    return all(client._source._view.directory == Path(directory) for client in clients)


@contextmanager
def started(engine: Engine, cluster: str, **settings: Any) -> Iterator[NodeProcess]:
    """A node that the engine has found."""
    with NodeProcess(cluster, **{"host": "64MiB", **settings}) as node:
        until(lambda: uses(engine, node.info["directory"]), "the engine uses the node", FOUND_WITHIN_S)
        engine.forget()
        yield node


def prepared(engine: Engine, seed: int, blocks: int = 4) -> tuple[list[int], Any]:
    prompt = engine.prompt(seed, blocks * BLOCK + 5)
    cold = engine.ask(prompt)
    engine.forget()
    return prompt, cold


def timed(engine: Engine, prompt: list[int]) -> Any:
    begun_s = time.monotonic()
    answer = engine.reload(prompt)
    assert time.monotonic() - begun_s < ANSWER_WITHIN_S
    return answer


def test_without_a_cluster_and_once_it_is_there(engine: Engine, cluster: str) -> None:
    prompt, cold = prepared(engine, 201)
    again = engine.reload(prompt)
    assert again.cached == 0
    again.assert_same(cold)
    with started(engine, cluster):
        engine.ask(prompt).assert_same(cold)
        hit = engine.reload(prompt)
        assert hit.cached == 4 * BLOCK
        hit.assert_same(cold)
    timed(engine, prompt).assert_same(cold)


def test_a_node_that_hangs(engine: Engine, cluster: str) -> None:
    with started(engine, cluster) as node:
        (prompt, cold), (other, other_cold) = prepared(engine, 202), prepared(engine, 203)
        new = engine.prompt(204, 3 * BLOCK + 5)
        node.stop()
        hit = timed(engine, prompt)
        assert hit.cached == 4 * BLOCK, "reading needs no call"
        hit.assert_same(cold)
        first = timed(engine, new)
        assert engine.counts["refused_blocks"] == 3
        timed(engine, other).assert_same(other_cold)
        node.go_on()
        until(lambda: _is_stored(engine, new), "it stores again", FOUND_WITHIN_S)
        engine.reload(new).assert_same(first)


def test_a_node_that_is_killed_and_started_again(engine: Engine, cluster: str) -> None:
    with started(engine, cluster) as node:
        prompt, cold = prepared(engine, 205)
        new = engine.prompt(206, 3 * BLOCK + 5)
        node.kill()
        hit = timed(engine, prompt)
        assert hit.cached == 4 * BLOCK, "the files outlive the node"
        hit.assert_same(cold)
        first = timed(engine, new)
        assert engine.counts["stored_blocks"] == 0
        node.start()
        until(lambda: _is_stored(engine, new), "it stores again", FOUND_WITHIN_S)
        engine.reload(new).assert_same(first)
        engine.reload(prompt).assert_same(cold)


def _is_stored(engine: Engine, prompt: list[int]) -> bool:
    return engine.reload(prompt).cached > 0


def test_a_node_that_is_replaced(engine: Engine, cluster: str) -> None:
    with started(engine, cluster):
        prompt, cold = prepared(engine, 207)
    timed(engine, prompt).assert_same(cold)
    with started(engine, cluster):
        again = engine.reload(prompt)
        assert again.cached == 0
        again.assert_same(cold)
        hit = engine.reload(prompt)
        assert hit.cached == 4 * BLOCK
        hit.assert_same(cold)


def test_a_host_tier_smaller_than_a_prompt(engine: Engine, cluster: str) -> None:
    with started(engine, cluster, host="4MiB"):
        prompt, cold = prepared(engine, 208, blocks=12)
        for _ in range(2):
            again = timed(engine, prompt)
            assert again.cached < 12 * BLOCK
            again.assert_same(cold)
        short = engine.prompt(209, 2 * BLOCK + 5)
        timed(engine, short)
        timed(engine, prompt).assert_same(cold)


def test_a_promised_block_that_leaves_before_the_load(engine: Engine, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other blocks push it out after the look-up. It is not held, as if the node had not heard of it in time."""
    with started(engine, cluster, host="8MiB"):
        prompt, cold = prepared(engine, 210)
        monkeypatch.setattr(engine.planner._asker, "hold", lambda *_: None)
        worker, load = engine.worker, engine.worker.load

        def evicted_before(step: Any) -> None:
            if step.now:
                monkeypatch.setattr(worker, "load", load)
                for number in range(12):
                    _store_garbage(engine, bytes([number]))
            load(step)

        monkeypatch.setattr(worker, "load", evicted_before)
        engine.ask(prompt).assert_same(cold)
        assert engine.counts["failed_blocks"] > 0
        engine.ask(prompt).assert_same(cold)


def _store_garbage(engine: Engine, seed: bytes) -> None:
    from hashlib import blake2b

    from tiered_kv.client.page_client import Chain

    keys = [blake2b(seed + bytes([number]), digest_size=32).digest() for number in range(4)]
    engine.worker._client.store(Chain(keys), engine.worker._pages, [1, 2, 3, 4], wait_s=2.0)


def test_a_damaged_header_in_memory(engine: Engine, cluster: str) -> None:
    with started(engine, cluster):
        prompt, cold = prepared(engine, 211)
        source = engine.worker._client._source
        keys = engine.planner._keys(_request(engine, prompt), engine.planner._scope(_request(engine, prompt)), 0, 4)[0]
        source.memory[source.find(keys)[2].slot.offset - 128 + 8] ^= 1  # a byte of the key
        engine.reload(prompt).assert_same(cold)
        assert engine.counts["loaded_blocks"] == 2
        assert engine.counts["failed_blocks"] == 2
        engine.reload(prompt).assert_same(cold)


def test_a_damaged_block_in_memory_with_verify_host(engine: Engine, cluster: str) -> None:
    with started(engine, cluster, verify_host=True) as node:
        prompt, cold = prepared(engine, 212)
        source = engine.worker._client._source
        keys = engine.planner._keys(_request(engine, prompt), engine.planner._scope(_request(engine, prompt)), 0, 4)[0]
        time.sleep(2.0)  # seals are written by the node in the background
        source.memory[source.find(keys)[1].slot.offset + 5000] ^= 64
        engine.reload(prompt).assert_same(cold)
        assert engine.counts["failed_blocks"] == 3
        assert node.process.poll() is None


def _request(engine: Engine, prompt: list[int]) -> Any:
    """A request as the scheduler has it, with block hashes."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    hasher = engine.core.request_block_hasher
    return Request("x", prompt, SamplingParams(max_tokens=1), None, block_hasher=hasher)


def test_flipped_bytes_on_disk(engine: Engine, cluster: str, tmp_path: Path) -> None:
    with started(engine, cluster, host="8MiB", disk="128MiB", disk_path=str(tmp_path)):
        prompts = [engine.prompt(220 + number, 4 * BLOCK + 5) for number in range(5)]
        colds = [engine.reload(prompt) for prompt in prompts]
        until(lambda: any(tmp_path.rglob("segment-*.tkv")), "blocks are on disk", FOUND_WITHIN_S)
        for file in tmp_path.rglob("segment-*.tkv"):
            content = bytearray(file.read_bytes())
            for place in range(10_000, len(content), 50_000):
                content[place] ^= 16
            with file.open("r+b") as opened:
                opened.write(content)
        failed = 0
        for prompt, cold in zip(prompts, colds, strict=True):
            timed(engine, prompt).assert_same(cold)
            failed += engine.counts["failed_blocks"]
        assert failed > 0


def test_a_prefix_that_another_node_has(engine: Engine, cluster: str, nursery: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers store on one node, as an engine on another machine would, and the scheduler looks at the other."""
    from tiered_kv.cluster.attach import attach_pages

    nodes = Program(nursery, "tests.vllm.two_nodes", '{"host": "64MiB", "heartbeat_s": 0.2}', cluster)
    try:
        assert nodes.stdout.readline() == "ready\n"
        worker = engine.worker
        there, here = (attach_pages(worker.namespace, worker.layout, name=cluster, node_id=name) for name in ("n0", "n1"))
        with there, here:
            monkeypatch.setattr(engine.planner, "_client", here)
            monkeypatch.setattr(engine.planner._asker, "client", here)
            monkeypatch.setattr(worker, "_client", there)
            prompt, cold = prepared(engine, 230)
            assert engine.counts["stored_blocks"] == 0  # counted before `forget`
            monkeypatch.setattr(worker, "_client", here)
            until(lambda: here.has_peers, "the nodes know each other", FOUND_WITHIN_S)
            until(lambda: engine.reload(prompt).cached == 4 * BLOCK, "the directory knows the blocks", FOUND_WITHIN_S)
            again = engine.reload(prompt)
            assert again.cached == 4 * BLOCK
            again.assert_same(cold)
            first = engine.prompt(231, 3 * BLOCK + 5)
            monkeypatch.setattr(worker, "_client", there)
            cold = engine.ask(first)
            monkeypatch.setattr(worker, "_client", here)
            until(lambda: here.locate(_keys(engine, first)) == 3, "the directory knows the blocks", FOUND_WITHIN_S)
            pulled = engine.reload(first)
            assert (pulled.cached, engine.counts["loaded_blocks_peer"]) == (3 * BLOCK, 3)
            pulled.assert_same(cold)
    finally:
        nodes.close()


def _keys(engine: Engine, prompt: list[int]) -> list[bytes]:
    request = _request(engine, prompt)
    return engine.planner._keys(request, engine.planner._scope(request), 0, len(prompt) // BLOCK)[0]
