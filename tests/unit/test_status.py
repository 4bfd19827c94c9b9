"""The output of `tiered-kv status`, with real nodes."""

import json
import time
from io import StringIO

import pytest
from rich.console import Console

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv.blocks import Location, Tier
from tiered_kv.cluster.status import saved, show, summarize
from tiered_kv.node.checkpoints.steps import (
    LoadProgressRequest,
    LoadRequest,
    MountRequest,
    NoteRequest,
    SnapshotRequest,
    WriteRequest,
    WriteStatusRequest,
)
from tiered_kv.tiers.objects.mounted import MountedBlock

PATH = (1, 2, 0, 1)


def shown(summary: dict) -> str:
    out = StringIO()
    show(summary, Console(file=out, width=160))
    return out.getvalue()


def test_a_status_says_where_metrics_are_and_why_not(node_factory) -> None:
    nodes = [node_factory(node_id=name) for name in ("n0", "n1")]
    found = about(*nodes)
    found["nodes"][0]["metrics_address"] = "127.0.0.1:9940"
    found["nodes"][1]["metrics_problem"] = "metrics_port: all ports are in use"
    found["metrics_address"] = "127.0.0.1:9939"
    summary = summarize(found)
    assert [node["metrics_address"] for node in summary["nodes"]] == ["127.0.0.1:9940", None]
    text = shown(summary)
    assert "metrics: n0 http://127.0.0.1:9940/metrics, coordinator http://127.0.0.1:9939/metrics\n" in text
    assert "n1 serves no metrics: metrics_port: all ports are in use\n" in text


def about(*nodes) -> dict:
    records = [{**node.info(), "address": "10.0.0.1", "silent_s": 0.1, "stats": node.stats()} for node in nodes]
    return {"cluster_id": "abc", "config": nodes[0].config, "nodes": records}


def test_a_status_has_the_statistics_of_each_node_and_their_sums(node_factory, client_factory, tmp_path) -> None:
    nodes = [node_factory(node_id=name, disk="8MiB", disk_path=str(tmp_path / name), policy="adaptive") for name in ("n0", "n1")]
    for number, node in enumerate(nodes):
        client = client_factory(node, LAYOUT, NAMESPACE)
        client.note_prefill(6400, 6400.0 * 3600)
        client.store(tokens_of(PATH), kv_of(PATH))
        for _ in range(number + 1):
            client.fetch(tokens_of(PATH))
    nodes[0].record(True, b"salt")
    summary = summarize(about(*nodes))
    assert summary == json.loads(json.dumps(summary))
    first, second = summary["nodes"]
    assert (first["prefill_tokens_saved"], second["prefill_tokens_saved"], summary["prefill_tokens_saved"]) == (64, 128, 192)
    assert summary["prefill_seconds_saved"] == pytest.approx(192 * 3600, rel=1e-3)
    assert first["counts"] | {"dropped_under_pressure": 0, "not_admitted": 0} == first["counts"]
    assert first["tiers"]["host"]["blocks"] == 4
    assert first["tiers"]["disk"]["write_amplification"] == 1.0
    assert first["policy"] == {"name": "adaptive", "known_blocks": 4, "adopted_age_s": None}
    first["tiers"]["disk"] |= {"blocks": 1, "write_amplification": 1.2345}
    text = shown(summary)
    assert "n0: prefill saved: 64 tokens, 64 h; disk writes 1.23 bytes for each byte of blocks; is being recorded\n" in text
    assert "n1: prefill saved: 128 tokens, 128 h\n" in text, "its disk has no blocks"
    assert "\nprefill saved: 192 tokens, 192 h\n" in text


def test_block_movements_are_shown_in_words(node_factory) -> None:
    record = about(node_factory())
    record["nodes"][0]["stats"] |= {"counts": {"not_admitted": 7, "dropped_under_pressure": 3}, "policy": {"adopted_age_s": 4.2}}
    text = shown(summarize(record))
    words = "n0: 7 not admitted to the tier below, 3 dropped because the tier below was too slow; "
    assert f"{words}last got the other nodes' policy statistics 4.2 s" in text
    assert "prefill" not in text, "no prefill was saved yet"


def test_a_restore_and_the_last_checkpoint_are_shown(node_factory, client_factory, tmp_path) -> None:
    first, second = (node_factory(node_id=name) for name in ("n0", "n1"))
    assert "checkpoint" not in shown(summarize(about(first, second)))
    client_factory(first, LAYOUT, NAMESPACE).store(tokens_of(PATH), kv_of(PATH))
    keys = [seen.key for seen in first.checkpoint(SnapshotRequest()).blocks]
    first.checkpoint(WriteRequest(str(tmp_path), keys))
    while not first.checkpoint(WriteStatusRequest()).is_done:
        pass
    [info] = first.checkpoint(WriteStatusRequest()).packs
    place = {"name": "ckpt-1", "url": f"file://{tmp_path}", "blocks": 4}
    first.checkpoint(NoteRequest(place | {"at_s": time.time() - 7200}))
    second.checkpoint(NoteRequest(place | {"at_s": time.time() - 86400, "name": "ckpt-0"}))
    depths = {entry.key: depth for depth, entry in enumerate(info.entries)}
    blocks = [
        MountedBlock(
            entry.info._replace(depth=depths[entry.key]),
            Location(Tier.CHECKPOINT, entry.codec, 0, entry.offset, entry.stored_bytes, entry.raw_bytes),
            1,
        )
        for entry in info.entries
    ]
    second.checkpoint(MountRequest(str(tmp_path), [info.name], blocks))
    second.checkpoint(LoadRequest(1.0))
    text = shown(summarize(about(first, second)))
    assert "n1: from a checkpoint: " in text
    assert " of 4 blocks brought to memory or disk" in text
    assert f"last checkpoint: 2.0 h ago, 4 blocks, ckpt-1 at file://{tmp_path}\n" in text
    while not second.checkpoint(LoadProgressRequest()).is_done:
        pass
    summary = summarize(about(first, second))
    assert summary == json.loads(json.dumps(summary))
    assert summary["nodes"][1]["filling"] == {"blocks": 4, "nearer": 4, "damaged": 0, "too_lossy": 0, "is_done": True, "error": None}
    assert summary["last_checkpoint"]["name"] == "ckpt-1"
    assert "n1: from a checkpoint: 4 of 4 blocks brought to memory or disk, done" in shown(summary)
    summary["nodes"][1]["filling"] |= {"damaged": 1, "error": "the store is gone"}
    text = shown(summary)
    assert "1 block of the checkpoint damaged and left out; loading from the checkpoint ended early: the store is gone" in text


@pytest.mark.parametrize(
    ("tokens", "seconds", "words"),
    [
        (0, 0.0, ""),
        (950, 0.0, "prefill saved: 950 tokens"),
        (1_200_000, 2040.0, "prefill saved: 1.2 M tokens, 34 min"),
        (12_345, 9.87, "prefill saved: 12 k tokens, 9.9 s"),
        (5_000_000_000, 119.0, "prefill saved: 5.0 G tokens, 119 s"),
        (2_000_000_000_000, 3e6, "prefill saved: 2000 G tokens, 833 h"),
    ],
)
def test_saved_prefill_in_readable_units(tokens: int, seconds: float, words: str) -> None:
    assert saved({"prefill_tokens_saved": tokens, "prefill_seconds_saved": seconds}) == words
