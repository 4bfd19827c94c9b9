"""The recorder assembles requests from the calls that a node gets."""

from tiered_kv.node import trace_recorder as module
from tiered_kv.node.trace_recorder import PENDING_S, Recorder

PARENTS = {b"b": b"a", b"c": b"b", b"d": b"b"}


def chain_to(key: bytes) -> list[bytes]:
    return [*(chain_to(PARENTS[key]) if key in PARENTS else []), key]


def recorder() -> Recorder:
    return Recorder(b"salt", 64, chain_to)


def shapes(lines: list[dict]) -> list[tuple]:
    """Returns times, lengths, and ids renumbered in order of appearance."""
    numbers: dict[int, int] = {}
    return [
        (line["timestamp"], line["input_length"], line["output_length"], [numbers.setdefault(id, len(numbers)) for id in line["hash_ids"]])
        for line in lines
    ]


def test_a_fetch_and_the_store_after_it_are_one_request():
    record = recorder()
    record.seen([b"a", b"b"], None, 1.0)
    record.seen([b"c"], b"b", 2.0)
    record.answered(b"c", 77)
    record.check()
    assert record.take(2.0) == [], "it may go on"
    assert shapes(record.take(2.0 + PENDING_S)) == [(1000, 192, 77, [0, 1, 2])]
    assert record.take(100.0) == []


def test_the_same_chain_again_is_another_request():
    record = recorder()
    record.seen([b"a", b"b"], None, 1.0)
    record.seen([b"a", b"b"], None, 1.5)
    assert shapes(record.take(2.0, everything=True)) == [(1000, 128, 0, [0, 1]), (1500, 128, 0, [0, 1])]


def test_stores_of_two_workers_after_one_prefix_have_whole_chains():
    record = recorder()
    record.seen([b"a", b"b"], None, 1.0)
    record.seen([b"a", b"b"], None, 1.1)
    record.seen([b"c"], b"b", 2.0)
    record.seen([b"d"], b"b", 2.1)
    lines = shapes(record.take(3.0, everything=True))
    assert [ids for *_, ids in lines] == [[0, 1], [0, 1, 2], [0, 1, 3]]


def test_ids_are_opaque_and_equal_only_with_the_same_salt():
    ids = []
    for salt in (b"one", b"one", b"two"):
        record = Recorder(salt, 64, chain_to)
        record.seen([b"a" * 32], None, 1.0)
        ids.append(record.take(9.0)[0]["hash_ids"])
    assert ids[0] == ids[1] != ids[2]
    assert 0 <= ids[0][0] < 1 << 53, "JSON readers keep 53 bits"


def test_an_answer_without_a_request_is_left_out():
    record = recorder()
    record.answered(b"x", 5)
    assert record.take(9.0, everything=True) == []


def test_unread_requests_are_bounded_and_losses_counted(monkeypatch):
    monkeypatch.setattr(module, "REQUESTS_MAX", 3)
    record = recorder()
    for number in range(5):
        record.seen([bytes([number])], None, float(number))
    assert [line["timestamp"] for line in record.take(99.0)] == [2000, 3000, 4000]
    assert record.lost == 2


def test_an_incomplete_chain_is_left_out_and_earlier_requests_are_kept():
    record = Recorder(b"salt", 64, lambda key: [] if key == b"c" else chain_to(key), start_s=0.5)
    record.seen([b"a", b"b"], None, 1.0)
    record.seen([b"c"], b"b", 2.0)
    record.check()
    assert shapes(record.take(99.0)) == [(500, 128, 0, [0, 1])]
    assert record.lost == 1
