"""The two sides of the connector with requests, outputs and clients that the tests made: each rule for itself, without an engine."""

import threading
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.serving.processes import until
from tests.vllm.deciding_fake import DecidingFake
from tiered_kv import Namespace, OpaqueLayout
from tiered_kv.blocks import Stored
from tiered_kv.client.page_client import Loaded, Look
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.vllm.asker import Asker
from tiered_kv.integrations.vllm.events import Events
from tiered_kv.integrations.vllm.messages import Handshake, RequestBlocks, Step, WorkerReport, keys_of
from tiered_kv.integrations.vllm.scheduler import Scheduler
from tiered_kv.integrations.vllm.settings import Settings
from tiered_kv.integrations.vllm.worker import Worker

T = 16
LAYOUT = OpaqueLayout(1024, T, "pages of a test")


class FakeClient(DecidingFake):
    """A client with blocks of chosen tiers. `raw`: how many of the leading ones can be loaded at once (default: all in host)."""

    def __init__(self) -> None:
        self.tiers: dict[bytes, str] = {}
        self.elsewhere: set[bytes] = set()
        self.has_peers = False
        self.held: list[bytes] = []
        self.misses = 0
        self.stores: list[Any] = []
        self.loads: list[Any] = []
        self.broken: set[bytes] = set()
        self.error: Exception | None = None

    def look(self, keys: list[bytes]) -> Look:
        found = []
        for key in keys:
            if key not in self.tiers:
                break
            found.append(self.tiers[key])
        raw = next((count for count, tier in enumerate(found) if tier != "host"), len(found))
        return Look(found, raw)

    def locate(self, keys: list[bytes]) -> int:
        return next((count for count, key in enumerate(keys) if key not in self.elsewhere), len(keys))

    def hold(self, key: bytes, seconds: float) -> None:
        self.held.append(key)

    deadline_s = 5.0
    weight_epoch = 0
    root = property(lambda self: bytes([self.weight_epoch]) * 32)

    def filled(self, namespace: Namespace) -> Namespace:
        return replace(namespace, weight_epoch=self.weight_epoch)

    def missed(self, blocks: int) -> None:
        self.misses += blocks

    def note_prefill(self, tokens: int, seconds: float) -> None:
        pass

    def store(self, chain: Any, pages: Any, blocks: list[int], *, wait_s: float) -> Stored:
        self.stores.append((chain, blocks))
        return Stored(len(blocks), 0, 0)

    def load(self, chain: Any, pages: Any, blocks: list[int], *, deadline_s: float | None, may_call: bool) -> Loaded:
        self.loads.append((chain, blocks, may_call))
        if self.error is not None:
            raise self.error
        good = next((count for count, key in enumerate(chain.keys) if key in self.broken), len(blocks))
        return Loaded(good, {"host": good} if good else {})

    def close(self) -> None:
        pass


def request(name: str = "r", blocks: int = 4, **more: Any) -> Any:
    """A request whose prompt has `blocks` whole blocks and one token more."""
    facts = {"request_id": name, "num_tokens": blocks * T + 1, "block_hashes": [f"{name}{number}".encode() for number in range(blocks)]}
    facts |= {"lora_request": None, "mm_features": [], "all_token_ids": list(range(blocks * T + 1)), "num_computed_tokens": 0}
    return SimpleNamespace(**facts | more)


def output(new: dict[str, int] | None = None, cached: dict[str, tuple[int, list[int]]] | None = None, **tokens: int) -> Any:
    """A step of vLLM. `new`: computed tokens by request; `cached`: computed tokens and new blocks by request; `tokens`: scheduled."""
    listed = cached or {}
    old = SimpleNamespace(
        req_ids=list(listed),
        num_computed_tokens=[each[0] for each in listed.values()],
        new_block_ids=[(each[1],) if each[1] else None for each in listed.values()],
        resumed_req_ids=set(),
    )
    first = [SimpleNamespace(req_id=name, num_computed_tokens=computed) for name, computed in (new or {}).items()]
    return SimpleNamespace(scheduled_new_reqs=first, scheduled_cached_reqs=old, num_scheduled_tokens=tokens)


def engine_config(role: str = "kv_both") -> Any:
    transfer = SimpleNamespace(is_kv_consumer=role != "kv_producer", is_kv_producer=role != "kv_consumer")
    return SimpleNamespace(kv_transfer_config=transfer)


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def make(client):
    """`make(settings, ranks)` is a scheduler's side that knows its workers."""
    made = []

    def make(ranks: int = 1, in_step: bool = True, role: str = "kv_both", **settings: Any) -> Scheduler:
        side = Scheduler(engine_config(role), Settings.of(settings), lambda layout, namespace: client, T, in_step)
        names = [Namespace("weights", rank=rank, world=ranks) for rank in range(ranks)]
        side.meet({rank: Handshake(ranks, asdict(name), asdict(LAYOUT)) for rank, name in enumerate(names)})
        made.append(side)
        return side

    yield make
    for side in made:
        side.close()


def keys_in(side: Scheduler, asked: Any, rank: int = 0) -> list[bytes]:
    scope = side._scope(asked)
    assert scope is not None
    return keys_of(side._roots[rank], scope, asked.block_hashes)


def has(client: FakeClient, side: Scheduler, asked: Any, tiers: list[str], rank: int = 0) -> None:
    client.tiers |= dict(zip(keys_in(side, asked, rank), tiers, strict=False))


# Look-up


def test_blocks_in_this_machines_memory_are_loaded_in_the_step(make, client):
    side, asked = make(), request()
    assert side.matched(asked, 0) == (0, False)
    has(client, side, asked, ["host"] * 3)
    assert side.matched(asked, 0) == (3 * T, False)
    assert side.matched(asked, 2 * T) == (T, False)  # vLLM has the first two itself
    assert side.matched(asked, 3 * T) == (0, False)
    until(lambda: client.held == [keys_in(side, asked)[2]], "the last promised block is held", 5.0)


@pytest.mark.parametrize(("tiers", "in_step"), [(["host", "disk"], True), (["peer"], True), (["host", "host"], False)])
def test_for_anything_else_the_request_waits(make, client, tiers, in_step):
    side, asked = make(in_step=in_step), request()
    has(client, side, asked, tiers)
    assert side.matched(asked, 0) == (len(tiers) * T, True)


def test_the_last_token_is_always_computed(make, client):
    side = make()
    asked = request(blocks=4, num_tokens=4 * T)  # a block-aligned prompt
    has(client, side, asked, ["host"] * 4)
    assert side.matched(asked, 0) == (3 * T, False)


def test_a_hit_is_what_all_ranks_have(make, client):
    side, asked = make(ranks=2), request()
    has(client, side, asked, ["host"] * 4, rank=0)
    assert side.matched(asked, 0) == (0, False)
    has(client, side, asked, ["host"] * 2, rank=1)
    assert side.matched(asked, 0) == (2 * T, False)


def test_nothing_is_shared_if_a_rank_is_missing(client):
    side = Scheduler(engine_config(), Settings(), lambda layout, namespace: client, T, True)
    side.meet({0: Handshake(2, asdict(Namespace("weights", rank=0, world=2)), asdict(LAYOUT))})
    assert side.matched(request(), 0) == (0, False)


def test_ranks_with_identical_kv_have_one_root(client):
    side = Scheduler(engine_config(), Settings(), lambda layout, namespace: client, T, True)
    side.meet({rank: Handshake(2, asdict(Namespace("weights")), asdict(LAYOUT)) for rank in range(2)})
    assert len(side._roots) == 1


def test_other_nodes_are_asked_while_the_request_waits(make, client):
    side, asked = make(), request()
    client.has_peers = True
    has(client, side, asked, ["host"])
    client.elsewhere = set(keys_in(side, asked)[1:3])
    assert side.matched(asked, 0) == (None, False)
    until(lambda: side.matched(asked, 0) == (3 * T, True), "the answer", 5.0)
    side.allocated(asked, [7, 8, 9, 10], 3 * T)
    assert side.tiers_of(asked) == {"host": 1, "peer": 2}
    assert [each.blocks for each in side.step([]).later] == [[7, 8, 9]]


def test_without_an_answer_in_time_the_request_goes_on(make, client):
    side, asked = make(ask_nodes_ms=0.001), request()
    client.has_peers = True
    side._asker._submit = lambda job: None  # the node hangs
    assert side.matched(asked, 0) == (None, False)
    until(lambda: side.matched(asked, 0) == (0, False), "the deadline", 5.0)
    assert side.counts() == {"unanswered_lookups": 1}


def test_no_node_is_asked_if_the_settings_say_so(make, client):
    side = make(ask_nodes_ms=0)
    client.has_peers = True
    assert side.matched(request(), 0) == (0, False)


def test_salted_adapters_and_images_of_users(make, client, tmp_path):
    side = make()
    plain = request()
    assert side._scope(plain) is not None
    image = [SimpleNamespace(identifier="a" * 64)]  # a hash of the content, or of an id that the user gave
    assert side._scope(request(mm_features=image)) is None
    assert make(allow_mm_uuids=True)._scope(request(mm_features=image)) == make(allow_mm_uuids=True)._scope(plain)
    missing = SimpleNamespace(lora_int_id=1, lora_name="l", lora_path=str(tmp_path / "none"), load_inplace=False)
    assert side._scope(request(lora_request=missing)) is None
    assert side._scope(plain) != make(epoch=7)._scope(plain)


@pytest.mark.parametrize(("role", "loads", "stores"), [("kv_producer", 0, 1), ("kv_consumer", T, 0)])
def test_roles(make, client, role, loads, stores):
    side, asked = make(role=role), request(blocks=1)
    has(client, side, asked, ["host"])
    assert side.matched(asked, 0)[0] == loads
    side.allocated(asked, [3, 4], 0)
    assert len(side.stores_of(output({"r": 0}, r=T + 1))) == stores


# Plans


def test_a_load_has_the_blocks_that_vllm_gave_and_the_chain_before_them(make, client):
    side, asked = make(), request()
    has(client, side, asked, ["host"] * 4)
    assert side.matched(asked, T)[0] == 3 * T
    side.allocated(asked, [5, 6, 7, 8, 9], 2 * T)  # vLLM may accept less than was found
    (load,) = side.step([]).now
    assert (load.blocks, load.depth, load.before, load.hashes) == ([6, 7], 1, b"r0", [b"r1", b"r2"])
    chain = load.chain(side._roots[0])
    assert (chain.keys, chain.parent, chain.depth) == (keys_in(side, asked)[1:3], keys_in(side, asked)[0], 1)
    assert side.counts() == {"asked_blocks": 3, "promised_blocks": 2}
    assert client.misses == 1
    assert side.step([]).now == []


def test_a_second_allocation_plans_no_second_load(make, client):
    side, asked = make(in_step=False), request()
    has(client, side, asked, ["host"] * 4)
    side.matched(asked, 0)
    side.allocated(asked, [5, 6, 7, 8], 4 * T)
    assert len(side.step([]).later) == 1
    side.allocated(asked, [5, 6, 7, 8, 9], 0)
    step = side.step([])
    assert (step.now, step.later) == ([], [])


def test_blocks_are_stored_once_they_are_complete(make):
    side, asked = make(), request(blocks=4)
    side.allocated(asked, [5, 6, 7], 0)
    (store,) = side.stores_of(output({"r": 0}, r=2 * T + 3))  # chunked prefill
    assert (store.blocks, store.hashes) == ([5, 6], [b"r0", b"r1"])
    (store,) = side.stores_of(output(cached={"r": (2 * T + 3, [8, 9])}, r=2 * T - 2))
    assert (store.blocks, store.before, store.depth) == ([7, 8], b"r1", 2)
    assert side.stores_of(output(cached={"r": (4 * T + 1, [])}, r=1)) == []
    asked.block_hashes.append(b"r4")  # the answer completes a block
    (store,) = side.stores_of(output(cached={"r": (5 * T - 1, [])}, r=1))
    assert store.blocks == [9]


def test_a_preempted_request_gets_other_blocks(make):
    side, asked = make(), request(blocks=2)
    side.allocated(asked, [5, 6], 0)
    side.stores_of(output({"r": 0}, r=2 * T))
    side.allocated(asked, [1, 2], 0)
    resumed = output(cached={"r": (0, [1, 2])}, r=2 * T)
    resumed.scheduled_cached_reqs.resumed_req_ids = {"r"}
    (store,) = side.stores_of(resumed)
    assert store.blocks == [1, 2]


def test_after_a_failed_load_all_who_share_the_block_compute_it_and_blocks_are_offered_again(make):
    side = make()
    first, second, other = request("a"), request("b"), request("c")
    for each, blocks in ((first, [1, 2, 3]), (second, [1, 2, 4]), (other, [7, 8, 9])):
        each.num_computed_tokens = 3 * T
        side.allocated(each, blocks, 0)
    assert side.learned({2}, WorkerReport(failed_step=5)) == {2, 3, 4}
    assert [each.num_computed_tokens for each in (first, second, other)] == [T, T, 3 * T]
    assert side.step([]).acknowledged == 5
    assert side.matched(first, 0) == (0, False)  # no promise any more


def test_a_request_that_is_aborted_during_a_step_with_a_failed_load_leaves_nothing_behind(make):
    """vLLM handles aborts before the outcome of the step, and keeps the blocks under their hashes."""
    side, asked = make(), request()
    side.allocated(asked, [1, 2, 3, 4], 0)
    side.step([])
    side.finished(asked)
    assert side.learned({2}, WorkerReport(1)) == {2, 3, 4}
    side.step([])
    assert side.learned({2}, WorkerReport(2)) == {2}  # the numbers may be of other blocks by now


def test_a_reset_forgets_what_was_stored(make, client):
    side, asked, running = make(), request(), request("running", 2)
    has(client, side, asked, ["host"] * 4)
    side.allocated(running, [1, 2], 0)
    assert side.matched(asked, 0)[0] == 4 * T
    side.reset()
    assert side.matched(asked, 0) == (0, False)
    assert side.stores_of(output({"running": 0}, running=2 * T)) == []
    assert side.step([]).resets == 1


def test_a_reset_that_keeps(make, client):
    side, asked = make(on_reset="keep"), request()
    has(client, side, asked, ["host"] * 4)
    side.reset()
    assert side.matched(asked, 0)[0] == 4 * T
    assert side.step([]).resets == 0


def test_a_raised_weight_epoch_is_a_reset_whatever_the_settings(make, client):
    side, running = make(on_reset="keep"), request()
    has(client, side, running, ["host"] * 4)
    assert side.matched(running, 0)[0] == 4 * T
    side.allocated(running, [1, 2, 3, 4, 5], 4 * T)
    client.weight_epoch = 7
    assert side.stores_of(output({"r": 0}, r=4 * T + 1)) == [], "its KV may be of the former weights"
    assert side.step([]).resets == 1
    assert side.matched(running, 0) == (0, False)


def test_nothing_is_kept_of_requests_that_ended(make, client):
    side = make()
    client.has_peers = True
    for number in range(50):
        asked = request(f"r{number}")
        side.matched(asked, 0)
        side.allocated(asked, [1, 2, 3, 4], 0)
        side.learned({1}, None)
        side.finished(asked)
    side.step([])
    kept = (side._leaving, side._requests, side._offers, side._known_keys, side._failed, side._old, side._asker._questions)
    assert [len(each) for each in kept] == [0] * 7


# Workers


@pytest.fixture
def worker(client, monkeypatch):
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1), model_config=SimpleNamespace(use_mla=False))
    side = Worker(config, SimpleNamespace(kv_tp_replicas=1), Settings(), lambda *_: client, 0, 1)
    side._client, side._pages, side._root = client, object(), bytes(32)
    yield side
    side.close()


def blocks_of(name: str, numbers: list[int]) -> RequestBlocks:
    return RequestBlocks(name, b"scope", [f"{name}{number}".encode() for number in numbers], None, 0, numbers)


def test_a_step_that_computed_with_a_failed_block_stores_nothing(worker, client):
    load, store = blocks_of("r", [1, 2, 3]), blocks_of("s", [7])
    client.broken = {load.chain(worker._root).keys[1]}
    worker.load(Step(4, [load], [], [store]))
    worker.store(Step(4, [load], [], [store]))
    assert (worker.failed(), worker.failed()) == ({2, 3}, set())
    assert worker.report().failed_step == 4
    worker.store(Step(5, [], [], [store], acknowledged=0))  # scheduled before the scheduler knew
    assert client.stores == []
    worker.store(Step(6, [], [], [store], acknowledged=4))
    assert [blocks for _, blocks in client.stores] == [[7]]
    assert worker.counts()["failed_blocks"] == 2


@pytest.mark.parametrize("error", [TieredKVError(Kind.MEMORY, "gone"), ValueError("wrong"), MemoryError()])
def test_a_load_that_raises_is_a_failed_load(worker, client, error):
    client.error = error
    worker.load(Step(1, [blocks_of("now", [1])], [blocks_of("later", [2])]))
    assert worker.failed() == {1}
    ended: set[str] = set()
    until(lambda: ended.update(worker.finished()) or ended == {"later"}, "the waiting load has ended", 5.0)
    assert worker.failed() == {2}


def test_a_reset_fails_loads_of_before(worker, client):
    worker.load(Step(1, resets=1))
    worker._queue.put((blocks_of("old", [3]), 0, 0.0))
    worker.load(Step(2, [], [blocks_of("new", [4])], resets=1))
    ended: set[str] = set()
    until(lambda: ended.update(worker.finished()) or ended == {"old", "new"}, "both have ended", 5.0)
    assert worker.failed() == {3}


def test_a_reset_fails_the_load_that_is_under_way(worker, client):
    begun, go_on, load = threading.Event(), threading.Event(), client.load

    def slow(*arguments: Any, **options: Any) -> Loaded:
        begun.set()
        assert go_on.wait(5.0)
        return load(*arguments, **options)

    client.load = slow
    worker.load(Step(1, [], [blocks_of("old", [3])]))
    assert begun.wait(5.0)
    worker.load(Step(2, resets=1))
    go_on.set()
    ended: set[str] = set()
    until(lambda: ended.update(worker.finished()) or ended == {"old"}, "the load has ended", 5.0)
    assert worker.failed() == {3}


def test_blocks_that_were_planned_for_another_weight_epoch_are_neither_loaded_nor_stored(worker, client):
    client.weight_epoch = 7
    worker.load(Step(1, [blocks_of("r", [1, 2])], [], []))
    worker.store(Step(1, [], [], [blocks_of("s", [7])]))
    assert worker.failed() == {1, 2}
    assert (client.loads, client.stores) == ([], [])
    worker.store(Step(2, [], [], [replace(blocks_of("s", [7]), weight_epoch=7)], acknowledged=1))
    assert len(client.stores) == 1


def test_of_ranks_with_identical_kv_one_stores(client):
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2), model_config=SimpleNamespace(use_mla=True))
    for rank, stores in ((0, 1), (1, 0)):
        side = Worker(config, SimpleNamespace(), Settings(), lambda *_: client, rank, 2)
        side._client, side._pages, side._root = client, object(), bytes(32)
        assert (side._rank, side._world) == (0, 1)
        client.stores.clear()
        side.store(Step(1, stores=[blocks_of("r", [1])]))
        assert len(client.stores) == stores


def test_reports_of_ranks_are_joined():
    assert WorkerReport(3, [b"a"]).aggregate(WorkerReport(5, [b"a", b"b"])) == WorkerReport(5, [b"a", b"b"])


# Events


def test_events_tell_what_is_stored_and_what_has_left():
    here: set[bytes] = set()
    events = Events(T, lambda scope, block: block in here, lambda block: block)
    asked = request(blocks=2)
    events.offered(asked, b"scope", 0, 2)
    assert list(events.take()) == []
    here.update(asked.block_hashes)
    events.stored([b"r0", b"r1", b"unknown"])
    first, second = events.take()
    assert (first.block_hashes, first.parent_block_hash, first.token_ids) == ([b"r0"], None, list(range(T)))
    assert (second.block_hashes, second.parent_block_hash, second.block_size, second.medium) == ([b"r1"], b"r0", T, "CPU")
    assert list(events.take()) == []
    here.discard(b"r0")
    (left,) = events.take()
    assert left.block_hashes == [b"r0"]
    assert list(events.take()) == []


# Asker


def test_a_key_is_held_once_in_half_of_its_time(client):
    asker = Asker()
    asker.client = client
    for _ in range(5):
        asker.hold([b"key"], 60.0)
    asker.hold([b"other"], 0.0)
    asker.close()
    assert client.held == [b"key"]


def test_changing_questions_of_a_request_share_one_wait(client):
    asker = Asker()
    asker._submit = lambda job: None
    assert asker.answer("r", [[b"first"]], 0.05) is None
    until(lambda: asker.answer("r", [[b"second"]], 60.0) == 0, "the first wait is over", 5.0)


def test_an_error_in_a_question_does_not_end_the_thread(client, caplog):
    asker = Asker()
    asker.client = client
    client.locate = lambda keys: 1 / 0
    assert asker.answer("r", [[b"key"]], 10.0) is None
    asker.hold([b"key"], 60.0)
    until(lambda: client.held == [b"key"], "the thread goes on", 5.0)
    asker.close()


def test_keys_differ_by_root_scope_and_hash():
    made = {keys_of(root, scope, [each])[0] for root in (b"1" * 32, b"2" * 32) for scope in (b"a", b"b") for each in (b"x", b"y")}
    assert len(made) == 8
