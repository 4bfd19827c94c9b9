"""Tests of reading traces: what is read, how ids and block sizes are understood, and errors that name file and line."""

import gzip
import json

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.simulate.traces import BLOCK_TOKENS, DATA, line, write
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.simulate.trace import read_trace


def read(tmp_path, lines, name="some-b10.jsonl", **settings):
    trace = read_trace(write(tmp_path / name, lines), **settings)
    trace.check()
    return trace


def refused(tmp_path, lines, **settings):
    with pytest.raises(TieredKVError) as caught:
        read(tmp_path, lines, **settings)
    assert caught.value.kind is Kind.CONFIG
    return str(caught.value)


def test_only_full_blocks_are_read(tmp_path):
    trace = read(tmp_path, [line(0, [7, 8, 9], 25), line(1500, [7, 8], 20, 80), line(2000, [7, 8, 9], 20)])
    assert [(each.time_s, each.keys, each.input_tokens, each.output_tokens) for each in trace] == [
        (0.0, [0, 1], 25, 5),
        (1.5, [0, 1], 20, 80),
        (2.0, [0, 1], 20, 5),
    ]
    assert (trace.name, len(trace), trace.unique_blocks, trace.block_tokens) == ("some-b10.jsonl", 3, 2, 10)


def test_requests_without_a_full_block_are_read(tmp_path):
    trace = read(tmp_path, [line(0, [], 0), line(1, [5], 7), line(2, [6], 10), line(3, [], 9)])
    assert [each.keys for each in trace] == [[], [], [0], []]


def test_a_trace_may_have_no_full_block_at_all(tmp_path):
    trace = read(tmp_path, [line(0, [5], 7)])
    assert trace.unique_blocks == 0


def test_ids_may_be_strings(tmp_path):
    trace = read(tmp_path, [line(0, ["a", "b", "c"]), line(1, ["a", "d", "e"])])
    assert [each.keys for each in trace] == [[0, 1], [0, 2]]


def test_blank_lines_and_other_fields_are_ignored(tmp_path):
    assert len(read(tmp_path, ["", {**line(0, [1]), "model": "x"}, "  "])) == 1


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress, bytes])
@pytest.mark.parametrize("name", ["a-b10.jsonl", "a-b10.jsonl.gz", "a-b10.zst"])
def test_compression_is_detected_whatever_the_name(tmp_path, pack, name):
    (tmp_path / name).write_bytes(pack(json.dumps(line(0, [1, 2, 3])).encode()))
    assert next(iter(read_trace(tmp_path / name))).keys == [0, 1]


def test_requests_out_of_order_are_sorted_with_a_note(tmp_path):
    trace = read(tmp_path, [line(2000, [1, 2]), line(1000, [1, 3], 20), line(1000, [4, 5])])
    assert [each.keys for each in trace] == [[0, 1], [2], [0]]
    assert trace.notes == ("some-b10.jsonl: 1 requests have an earlier time than the previous line; sorted by time",)


@pytest.mark.parametrize(
    ("inputs", "ids", "tokens"),
    [
        ([95, 1000, 33], lambda tokens: -(-tokens // 10), 10),
        ([95, 1000, 1009, 33], lambda tokens: tokens // 10, 10),
        ([512 * 40 - 7, 512 * 3], lambda tokens: -(-tokens // 512), 512),
        ([64 * 9, 64 * 7, 1], lambda tokens: tokens // 64 + 1, 64),
    ],
)
def test_the_block_size_is_derived_from_the_lengths(tmp_path, inputs, ids, tokens):
    lines = [line(at, [f"{at}.{each}" for each in range(ids(length))], length) for at, length in enumerate(inputs)]
    assert read(tmp_path, lines, "plain.jsonl").block_tokens == tokens


def test_a_given_block_size_overrides_the_name(tmp_path):
    assert read(tmp_path, [line(0, [1, 2], 40)], block_tokens=20).block_tokens == 20


@pytest.mark.parametrize("lines", [[line(0, [1], 30)], [line(0, [1, 2, 3], 30), line(1, [4, 5, 6], 90)]])
def test_a_block_size_that_cannot_be_derived_must_be_given(tmp_path, lines):
    with pytest.raises(TieredKVError, match="--block-tokens"):
        read(tmp_path, lines, "plain.jsonl")


def test_content_ids_become_prefix_ids(tmp_path):
    lines = [line(0, ["x", "y", "x"], 30), line(1, ["y", "x"], 20), line(2, ["x", "y", "z"], 30)]
    trace = read(tmp_path, lines, rekey=True)
    assert [each.keys for each in trace] == [[0, 1, 2], [3, 4], [0, 1, 5]]


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=20))
def test_rekeyed_ids_are_equal_exactly_where_prefixes_are(tmp_path_factory, chains):
    lines = [line(at, chain, len(chain) * BLOCK_TOKENS) for at, chain in enumerate(chains)]
    trace = read(tmp_path_factory.mktemp("trace"), lines, rekey=True)
    prefixes = [tuple(chain[: at + 1]) for chain in chains for at in range(len(chain))]
    assert len(set(zip(prefixes, trace.ids.tolist(), strict=True))) == len(set(prefixes)) == trace.unique_blocks


def test_rekeying_prefix_ids_changes_nothing():
    path = DATA / "chat-b64.jsonl.zst"
    assert np.array_equal(read_trace(path).ids, read_trace(path, rekey=True).ids)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "must be a JSON object, got invalid JSON"),
        ("[1]", "must be a JSON object, got list"),
        ("[" * 100_000, "must be a JSON object, got invalid JSON"),
        ({"timestamp": 0, "input_length": 5, "output_length": 1}, "must have the field hash_ids"),
        ({"input_length": 5, "output_length": 1, "hash_ids": []}, "must have the field timestamp"),
        (line("now", [1]), "timestamp must be a time in ms of at least 0, got 'now'"),
        (line(-1, [1]), "timestamp must be a time in ms of at least 0, got -1"),
        (line(float("nan"), [1]), "timestamp must be a time in ms of at least 0, got nan"),
        (line(True, [1]), "timestamp must be a time in ms of at least 0, got True"),
        (line(0, [1], -5), "input_length must be a number of tokens from 0 to 2^40 - 1, got -5"),
        (line(0, [1], 5.5), "input_length must be a number of tokens from 0 to 2^40 - 1, got 5.5"),
        (line(0, [1], 1 << 50), "input_length must be a number of tokens from 0 to 2^40 - 1, got 1125899906842624"),
        (line(0, [1], 5, None), "output_length must be a number of tokens from 0 to 2^40 - 1, got None"),
        ({**line(0, [1]), "hash_ids": "abc"}, "hash_ids must be a list of numbers or strings, got 'abc'"),
        ({**line(0, [1]), "hash_ids": [[1]]}, "hash_ids must be a list of numbers or strings, got the element [1]"),
        (line(0, [8, 9], 30), "hash_ids must have 3 or 4 ids for 30 tokens in blocks of 10, got 2"),
        (line(0, [6, 7, 8, 9], 20), "hash_ids must have 2 or 3 ids for 20 tokens in blocks of 10, got 4"),
        (line(0, [8, 8], 20), "--rekey"),
        (line(0, [4, 2], 20), "--rekey"),
    ],
)
def test_an_invalid_line_is_named_in_the_error(tmp_path, bad, said):
    message = refused(tmp_path, [line(0, [1, 2], 20), bad])
    assert message.startswith("trace some-b10.jsonl, line 2: ")
    assert said in message


def test_the_error_says_how_many_ids_hash_only_content(tmp_path):
    assert "2 of 6 blocks" in refused(tmp_path, [line(0, [1, 2], 20), line(1, [2, 1], 20), line(2, [1, 2], 20)])


def test_a_file_without_requests_is_refused(tmp_path):
    assert refused(tmp_path, []) == "trace some-b10.jsonl: has no requests"


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TieredKVError, match=r"none-b1\.jsonl: cannot be read"):
        read_trace(tmp_path / "none-b1.jsonl")


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("missing", [1, 40, 20_000])
def test_a_truncated_file_is_refused(tmp_path, pack, missing):
    text = "".join(json.dumps(line(at, [at, hash(float(at)) % 99_991 + 10_000])) + "\n" for at in range(5_000))
    (tmp_path / "a-b10.jsonl").write_bytes(pack(text.encode())[:-missing])
    with pytest.raises(TieredKVError, match=r"a-b10\.jsonl(: is damaged|, line \d+: must be a JSON object, got invalid JSON)"):
        read_trace(tmp_path / "a-b10.jsonl")


def test_concatenated_compressed_parts_are_read_as_one_file(tmp_path):
    parts = [zstandard.ZstdCompressor().compress(json.dumps(line(at, [at, -1])).encode() + b"\n") for at in (1, 2)]
    (tmp_path / "a-b10.zst").write_bytes(b"".join(parts))
    assert [each.keys for each in read_trace(tmp_path / "a-b10.zst")] == [[0], [1]]


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a-b10.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TieredKVError, match="line 1: must be a JSON object, got invalid JSON"):
        read_trace(tmp_path / "a-b10.jsonl")


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_block_size_below_one_is_refused(tmp_path, tokens):
    with pytest.raises(TieredKVError, match="--block-tokens"):
        read(tmp_path, [line(0, [1])], block_tokens=tokens)


def test_requests_with_equal_times_are_replayed_as_one_a_second(tmp_path):
    trace = read(tmp_path, [line(5, [number]) for number in range(3)])
    assert trace.times_s.tolist() == [0.0, 1.0, 2.0]
    assert trace.notes == ("some-b10.jsonl: all requests have the same time; replayed as one request a second",)
