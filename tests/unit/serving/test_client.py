"""The client of one node: valid arguments, results, and statistics."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiered_kv
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import KVLayout, Namespace
from tiered_kv.blocks import Stored
from tiered_kv.client.connect import client_of
from tiered_kv.client.writer import BlockWriter
from tiered_kv.clock import ManualClock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import as_token_ids

T = LAYOUT.block_tokens
PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)
PATIENCE_S = 30.0


@pytest.fixture
def node(node_factory):
    return node_factory(host="1MiB")


@pytest.fixture
def client(node, client_factory):
    return client_factory(node, LAYOUT, NAMESPACE)


@pytest.fixture
def filled(client):
    assert client.store(TOKENS, KV) == Stored(4, 0, 0)
    return client


def refusal(kind: Kind):
    return pytest.raises(TieredKVError, check=lambda error: error.kind is kind)


# What is stored comes back


@pytest.mark.parametrize("as_ids", [list, tuple, np.array, torch.tensor, lambda ids: torch.tensor([ids]), lambda ids: np.array(ids, "i2")])
def test_the_same_tokens_in_any_form_are_the_same_prompt(filled, as_ids) -> None:
    assert assert_is_prefix(filled.fetch(as_ids(TOKENS)), PATH) == 4
    assert filled.match(as_ids(TOKENS)).tokens_by_tier == {"host": 4 * T}
    assert filled.store(as_ids(TOKENS), KV) == Stored(0, 4, 0)


def test_only_whole_blocks_are_stored_and_hit(client) -> None:
    ids, kv = [*TOKENS, 7, 8, 9], torch.cat([KV, KV[..., :3, :]], dim=-2)
    assert client.store(ids, kv) == Stored(4, 0, 0)
    assert client.fetch(ids).tokens == client.fetch(TOKENS).tokens == 4 * T
    assert client.fetch(TOKENS[:-1]).tokens == 3 * T


@pytest.mark.parametrize("ids", [[], [1], list(range(T - 1)), np.array([], int), torch.empty(0)])
def test_prompts_shorter_than_a_block_are_never_hit(filled, ids) -> None:
    fetched = filled.fetch(ids)
    assert (fetched.tokens, fetched.kv.shape, fetched.tokens_by_tier) == (0, LAYOUT.kv_shape(0), {})
    assert filled.match(ids).tokens == 0
    assert filled.explain(ids) == []
    assert filled.store(ids, torch.zeros(LAYOUT.kv_shape(len(ids)))) == Stored(0, 0, 0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_every_layout_is_fetched_bit_for_bit(node, client_factory, dtype: str, block_tokens: int) -> None:
    layout = KVLayout(3, 1, 5, dtype, block_tokens)
    client = client_factory(node, layout, NAMESPACE)
    assert client.store(tokens_of(PATH, layout), kv_of(PATH, layout)).new == 4
    fetched = client.fetch(tokens_of(PATH, layout)).kv
    assert torch.equal(fetched.view(torch.uint8), kv_of(PATH, layout).view(torch.uint8))


def test_a_list_of_pairs_is_the_same_as_one_tensor(node, client, client_factory) -> None:
    pairs = [(KV[layer, 0], KV[layer, 1]) for layer in range(LAYOUT.layers)]
    assert client.store(TOKENS, pairs).new == 4
    other = client_factory(node, LAYOUT, Namespace(weights="another model"))
    assert other.store(TOKENS, KV).new == 4
    assert torch.equal(client.fetch(TOKENS).kv, other.fetch(TOKENS).kv)


@pytest.mark.parametrize(
    "strange",
    [
        lambda kv: kv.transpose(0, 1).contiguous().transpose(0, 1),
        lambda kv: torch.stack([kv, kv], dim=-1)[..., 0],
        lambda kv: kv.flip(-2).flip(-2),
        lambda kv: kv.clone().requires_grad_(),
        lambda kv: kv[:1].expand(2, -1, -1, -1, -1),
    ],
    ids=["other order", "strided", "flipped", "grad", "expanded"],
)
def test_kv_in_any_memory_order_is_stored_correctly(client, strange) -> None:
    kv = strange(KV)
    client.store(TOKENS, kv)
    fetched = client.fetch(TOKENS).kv
    assert torch.equal(fetched, kv)
    assert not fetched.requires_grad


def test_tensors_from_inference_mode_can_be_stored_and_fetched(node, client_factory) -> None:
    with torch.inference_mode():
        client = client_factory(node, LAYOUT, NAMESPACE)
        kv = KV.clone()
    assert client.store(TOKENS, kv).new == 4
    with torch.inference_mode():
        assert_is_prefix(client.fetch(TOKENS), PATH)
    assert assert_is_prefix(client.fetch(TOKENS), PATH) == 4


# Storing from the middle


def test_a_suffix_can_be_stored_after_its_prefix(client) -> None:
    client.store(TOKENS[: 2 * T], kv_of(PATH[:2]))
    assert client.store(TOKENS, kv_of(PATH, first=2), start=2 * T) == Stored(2, 0, 0)
    assert assert_is_prefix(client.fetch(TOKENS), PATH) == 4


def test_a_suffix_without_its_prefix_is_stored_but_not_hit(client) -> None:
    assert client.store(TOKENS, kv_of(PATH, first=2), start=2 * T) == Stored(2, 0, 0)
    assert client.fetch(TOKENS).tokens == 0
    assert [record.why for record in client.explain(TOKENS)] == [*["never_stored"] * 2, *["ancestor"] * 2]
    assert client.store(TOKENS, KV) == Stored(2, 2, 0)
    assert assert_is_prefix(client.fetch(TOKENS), PATH) == 4


def test_a_block_that_starts_before_start_is_left_out(client) -> None:
    client.store(TOKENS[:T], kv_of(PATH[:1]))
    start = T + 3
    assert client.store(TOKENS, KV[..., start:, :], start=start) == Stored(2, 0, 0)
    assert client.store(TOKENS[: 2 * T], kv_of(PATH[:2])) == Stored(1, 1, 0)
    assert assert_is_prefix(client.fetch(TOKENS), PATH) == 4


def test_start_at_the_end_stores_nothing(client) -> None:
    assert client.store(TOKENS, torch.empty(LAYOUT.kv_shape(0)), start=len(TOKENS)) == Stored(0, 0, 0)


@pytest.mark.parametrize("start", [-1, len(TOKENS) + 1, 1.0, "0", None])
def test_a_start_outside_the_prompt_is_rejected(client, start) -> None:
    with refusal(Kind.TOKENS):
        client.store(TOKENS, KV, start=start)


# What callers may not hand in


@pytest.mark.parametrize(
    "ids",
    [
        [1.5] * T,
        [-1] * T,
        [1 << 32] * T,
        [[1] * T] * 2,
        ["a"] * T,
        [None] * T,
        [1, [2]],
        "text",
        torch.ones(T),
        torch.ones(T, device="meta", dtype=torch.int64),
        7,
    ],
    ids=str,
)
def test_invalid_prompts_are_rejected(client, ids) -> None:
    for call in (client.match, client.fetch, client.explain, lambda ids: client.store(ids, KV)):
        with refusal(Kind.TOKENS):
            call(ids)


@pytest.mark.parametrize(
    "kv",
    [
        KV[..., :-1, :],
        KV[0],
        KV.double(),
        KV.to("meta"),
        KV.numpy(),
        None,
        "kv",
        5,
        [],
        [1, 2],
        [(KV[0, 0], KV[0, 1])],
        [(KV[0, 0], KV[0, 1], KV[0, 1])] * 2,
        [(KV[0, 0], KV[0, 1, :, 1:])] * 2,
        [(KV[0, 0], None)] * 2,
        [(KV[0, 0], KV[0, 1].half())] * 2,
        KV.to_sparse(),
        [torch.tensor(1.0), torch.tensor(2.0)],
    ],
    ids=lambda kv: type(kv).__name__,
)
def test_invalid_kv_is_rejected_and_nothing_is_stored(client, kv) -> None:
    with refusal(Kind.LAYOUT):
        client.store(TOKENS, kv)
    assert client.match(TOKENS).tokens == 0


@pytest.mark.parametrize(
    "out",
    [KV[0], KV.double(), KV.to("meta"), KV.numpy(), [1], KV[:, :1], KV[..., :-1], KV.to_sparse()],
    ids=["one layer", "dtype", "meta", "numpy", "list", "keys only", "head dim", "sparse"],
)
def test_an_invalid_out_is_rejected(filled, out) -> None:
    with refusal(Kind.LAYOUT):
        filled.fetch(TOKENS, out)


@pytest.mark.parametrize(("room", "blocks"), [(0, 0), (T - 1, 0), (T, 1), (3 * T + 5, 3), (9 * T, 4)])
def test_fetch_fills_out_with_as_many_blocks_as_fit(filled, room: int, blocks: int) -> None:
    out = torch.full(LAYOUT.kv_shape(room), 7.0)
    fetched = filled.fetch(TOKENS, out)
    assert assert_is_prefix(fetched, PATH) == blocks
    assert fetched.kv.data_ptr() == out.data_ptr() or not blocks
    assert (out[..., blocks * T :, :] == 7).all()


def test_out_may_be_a_view_or_require_a_gradient(filled) -> None:
    whole = torch.zeros(3, *LAYOUT.kv_shape(100))
    fetched = filled.fetch(TOKENS, whole[1])
    assert assert_is_prefix(fetched, PATH) == 4
    assert not whole[0].any()
    assert not whole[2].any()
    assert assert_is_prefix(filled.fetch(TOKENS, torch.zeros_like(KV).requires_grad_()), PATH) == 4
    strided = torch.zeros(*LAYOUT.kv_shape(4 * T), 2)[..., 1]
    assert assert_is_prefix(filled.fetch(TOKENS, strided), PATH) == 4


# Who shares with whom


def test_another_layout_or_namespace_shares_nothing(node, filled, client_factory) -> None:
    other_layout = KVLayout(2, 2, 16, "float32", 8)
    other = client_factory(node, other_layout, NAMESPACE)
    assert other.match(TOKENS).tokens == other.fetch(TOKENS).tokens == 0
    assert other.store(TOKENS, KV) == Stored(8, 0, 0)
    for namespace in (Namespace(weights="another"), Namespace(weights=NAMESPACE.weights, tenant="somebody else")):
        assert client_factory(node, LAYOUT, namespace).match(TOKENS).tokens == 0
    assert assert_is_prefix(filled.fetch(TOKENS), PATH) == 4


def test_each_rank_of_a_model_gets_its_own_heads(node, filled, client_factory) -> None:
    part = replace(LAYOUT, kv_heads=1)
    ranks = [client_factory(node, part, replace(NAMESPACE, rank=rank, world=2)) for rank in range(2)]
    halves = KV.chunk(2, dim=2)
    assert ranks[0].store(TOKENS, halves[0]) == Stored(4, 0, 0)
    assert ranks[1].match(TOKENS).tokens == 0
    assert ranks[1].store(TOKENS, halves[1]) == Stored(4, 0, 0)
    for client, half in zip(ranks, halves, strict=True):
        assert torch.equal(client.fetch(TOKENS).kv, half)
        assert client.store(TOKENS, half) == Stored(0, 4, 0)
        keys = client.namespace.chain(part).keys(as_token_ids(TOKENS))
        assert [record.key for record in client.explain(TOKENS)] == [key.hex() for key in keys]
    assert assert_is_prefix(filled.fetch(TOKENS), PATH) == 4
    node.check()


def test_a_node_records_the_namespace_of_every_root(node, client, client_factory) -> None:
    part, second = replace(LAYOUT, kv_heads=1), replace(NAMESPACE, rank=1, world=2, tenant="t", epoch=3)
    client_factory(node, part, second)
    facts = node.storage.encoder.models()
    assert {root: known.known_namespace() for root, known in facts.items()} == {
        NAMESPACE.root(LAYOUT): NAMESPACE,
        second.root(part): second,
    }
    facts.clear()
    assert len(node.storage.encoder.models()) == 2


def test_two_clients_of_a_node_share_blocks(node, filled, client_factory) -> None:
    other = client_factory(node, LAYOUT, NAMESPACE)
    assert assert_is_prefix(other.fetch(TOKENS), PATH) == 4
    assert other.node_calls == 0, "a local hit asks nobody"


# Room


def test_a_store_larger_than_the_host_tier_keeps_the_leading_blocks(client) -> None:
    path = (0,) * 200
    done = client.store(tokens_of(path), kv_of(path))
    assert done.new > 100
    assert done.refused == 200 - done.new
    assert not done.present
    assert assert_is_prefix(client.fetch(tokens_of(path)), path) == done.new


def test_a_block_larger_than_the_host_tier_is_refused_and_evicts_nothing(node, filled, client_factory) -> None:
    huge = client_factory(node, KVLayout(64, 2, 64, "float64", 32), NAMESPACE)
    assert huge.store(TOKENS, torch.zeros(huge.layout.kv_shape(4 * T), dtype=torch.float64)) == Stored(0, 0, 2)
    assert filled.match(TOKENS).tokens == 4 * T


def test_a_full_index_refuses_further_blocks_of_the_same_chain(node, client_factory) -> None:
    tiny = client_factory(node, KVLayout(1, 1, 4, "float16", 4), NAMESPACE)
    path = tuple(range(200))
    done = tiny.store(tokens_of(path, tiny.layout), kv_of(path, tiny.layout))
    assert (done.new, done.refused) == (128, 72)
    assert assert_is_prefix(tiny.fetch(tokens_of(path, tiny.layout)), path, tiny.layout) == 128
    assert tiny.store(tokens_of((7, 7), tiny.layout), kv_of((7, 7), tiny.layout)) == Stored(2, 0, 0)
    assert tiny.match(tokens_of(path, tiny.layout)).tokens == 126 * 4, "the deepest blocks made room"


def test_blocks_in_memory_are_fetched_even_without_time_left(filled) -> None:
    assert assert_is_prefix(filled.fetch(TOKENS, deadline_ms=0), PATH) == 4


# Saying so


def test_explain_has_a_record_for_every_block(filled) -> None:
    records = filled.explain([*TOKENS, *tokens_of((9, 9)), 1])
    assert [record.block for record in records] == list(range(6))
    assert [(record.tier, record.codec, record.reason) for record in records[:4]] == [("host", "raw", "hit")] * 4
    assert [(record.tier, record.codec, record.why) for record in records[4:]] == [(None, None, "never_stored")] * 2
    assert all(record.stored_bytes == LAYOUT.block_bytes for record in records[:4])
    assert len({record.key for record in records}) == 6


def test_stats_count_operations(filled) -> None:
    filled.fetch(TOKENS)
    filled.fetch(tokens_of((9,)))
    stats = filled.stats()
    expected = {"stores": 1, "new_blocks": 4, "present_blocks": 0, "refused_blocks": 0, "fetches": 2, "asked_blocks": 5, "hit_blocks": 4}
    assert expected.items() <= stats["client"].items()
    assert stats["node"]["blocks"] == 4
    assert stats["node"]["hit_blocks"] == 4
    assert stats["node"]["asked_blocks"] == 5


def test_a_closed_client_raises(client) -> None:
    client.close()
    client.close()
    calls = [
        lambda: client.match(TOKENS),
        lambda: client.fetch(TOKENS),
        lambda: client.store(TOKENS, KV),
        lambda: client.explain(TOKENS),
        client.stats,
    ]
    for call in calls:
        with refusal(Kind.CLOSED):
            call()


@pytest.mark.parametrize("step", ["find", "read", "touch", "tally"])
def test_a_client_closed_by_another_thread_during_a_fetch_raises(filled, monkeypatch, step: str) -> None:
    real = getattr(filled._source, step)

    def after_close(*arguments):
        filled.close()
        return real(*arguments)

    monkeypatch.setattr(filled._source, step, after_close)
    with refusal(Kind.CLOSED):
        filled.fetch(TOKENS)


def test_a_client_of_a_closed_node_misses_and_is_refused(node, filled) -> None:
    node.close()
    assert filled.match(TOKENS).tokens == filled.fetch(TOKENS).tokens == 0
    assert filled.store(TOKENS, KV) == Stored(0, 0, 4)
    assert {record.reason for record in filled.explain(TOKENS)} == {"the node is closed"}
    assert filled.stats()["node"] is None


def test_a_store_that_fails_midway_releases_its_extents(node, client, monkeypatch) -> None:
    def break_off(*_: object) -> None:
        raise RuntimeError("out of memory on a device")

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "_pack", break_off)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                client.store(TOKENS, KV)
    assert node.stats()["tiers"]["host"]["used_bytes"] == 0
    assert client.store(TOKENS, KV).new == 4


def test_an_embedded_cache_ends_with_its_client(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with tiered_kv.open({"host": "1MiB", "disk": "1MiB"}, layout=LAYOUT, namespace=NAMESPACE) as client:
        client.store(TOKENS, KV)
        assert assert_is_prefix(client.fetch(TOKENS), PATH) == 4
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_threads_share_a_client(node, client) -> None:
    gate = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(turn: int) -> None:
        try:
            gate.wait(PATIENCE_S)
            for step in range(15):
                path = (turn, step % 4, 1, step % 3)
                client.store(tokens_of(path), kv_of(path))
                other = ((turn + step) % 4, step % 4, 1, step % 3)
                assert_is_prefix(client.fetch(tokens_of(other)), other)
                node.check()
                client.stats()
        except BaseException as error:  # noqa: BLE001 - asserted on below, in the thread that may
            failures.append(error)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures


def test_a_store_has_one_deadline_for_all_its_reservations(node_factory, checked) -> None:
    """The node has room for one block at a time. No round starts after the deadline, and each waits at most the remaining time."""
    clock, node = ManualClock(), node_factory(store_wait_ms=200)
    waits = []

    class Slow:
        """A session whose node has room for one block after 90 ms, at each call."""

        def __init__(self) -> None:
            self._real = node.open_session()

        def reserve(self, nbytes, keys, parent, wait_s):
            waits.append(round(wait_s, 3))
            clock.advance(0.09)
            return self._real.reserve(nbytes, keys[:1], parent, wait_s)

        def __getattr__(self, name: str):
            return getattr(self._real, name)

    with checked(client_of(node.info(), LAYOUT, NAMESPACE, connect=Slow, clock=clock)) as client:
        assert client.store(tokens_of((1, 2, 3, 4, 5)), kv_of((1, 2, 3, 4, 5))) == Stored(3, 0, 2)
    assert waits == [0.2, 0.11, 0.02]
