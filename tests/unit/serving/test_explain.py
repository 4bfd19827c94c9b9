"""`explain`: each reason for a miss, caused and named."""

import json
import threading
from dataclasses import asdict, replace

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tests.unit.serving.test_closing import Hanging, hanging  # noqa: F401
from tests.unit.serving.test_page_client import LAYOUT as page_layout
from tests.unit.serving.test_page_client import Engine, chain_of, stored
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import Reason, Tier
from tiered_kv.client.explaining import miss_notes
from tiered_kv.client.explaining.finding import other_namespaces
from tiered_kv.client.page_client import Chain
from tiered_kv.clock import ManualClock
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import as_token_ids
from tiered_kv.store import events as ev

LARGE = KVLayout(2, 2, 16, "float32", 64)
"""Blocks of 32 KiB: 30 fill the arena of a 1 MiB host tier."""
PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)
SECRET = b"a cluster's secret of 32 bytes.."


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def make_cluster(checked, clock):
    def make(nodes: int = 1, **settings: object) -> InProcessCluster:
        return checked(InProcessCluster(Config.of({"host": "1MiB", "heartbeat_s": 1000.0, **settings}), nodes, clock, secret=SECRET))

    return make


def client_of(checked, cluster, namespace=NAMESPACE, layout=LAYOUT, node: str = "n0"):
    return checked(cluster.client(node, layout, namespace))


def fill(client, count: int = 40, layout=LARGE, first: int = 100) -> None:
    for turn in range(first, first + count):
        client.store(tokens_of((turn,), layout), kv_of((turn,), layout))


def whys(client, path=PATH, layout=LAYOUT, **more) -> list[str]:
    return [record.why for record in client.explain(tokens_of(path, layout), **more)]


def test_every_record_is_ready_for_json(make_cluster, checked) -> None:
    client = client_of(checked, make_cluster())
    client.store(TOKENS[:32], kv_of(PATH[:2]))
    for record in client.explain(TOKENS):
        assert json.loads(json.dumps(asdict(record))) == asdict(record)


def test_never_stored_says_how_far_back_the_node_remembers(make_cluster, checked, clock) -> None:
    client = client_of(checked, make_cluster())
    clock.advance(3 * 3600)
    record = client.explain(TOKENS)[0]
    assert (record.why, record.tier, record.details["recorded_s"]) == ("never_stored", None, 3 * 3600)
    assert record.reason == "never stored, as far as n0 has recorded (3.0 h)"


# Evicted


@pytest.mark.parametrize("policy", ["adaptive", "lru", "s3fifo"])
def test_an_evicted_block_names_its_tier_time_and_loss(make_cluster, checked, clock, policy: str) -> None:
    cluster = make_cluster(policy=policy)
    client = client_of(checked, cluster, layout=LARGE)
    client.store(tokens_of((1,), LARGE), kv_of((1,), LARGE))
    clock.advance(5)
    fill(client, 80)
    clock.advance(600)
    record = client.explain(tokens_of((1,), LARGE))[0]
    assert (record.why, record.node, record.details["tier"], record.details["cause"]) == ("evicted", "n0", "host", "dropped")
    assert record.details["age_s"] == 600 and record.details["uses"] == 1
    assert record.reason.startswith("evicted from host of n0 10 min ago: its room was needed, and no lower tier took it")
    if policy == "adaptive":
        assert 0 < record.details["standing"] <= 1
        assert "of the lowest value that stayed" in record.reason
    else:
        assert record.details["standing"] is None, "this policy computes no values"


def test_a_block_that_is_stored_again_is_a_hit_again(make_cluster, checked) -> None:
    client = client_of(checked, make_cluster(), layout=LARGE)
    tokens = tokens_of((1,), LARGE)
    client.store(tokens, kv_of((1,), LARGE))
    fill(client, 80)
    assert whys(client, (1,), LARGE) == ["evicted"]
    client.store(tokens, kv_of((1,), LARGE))
    assert whys(client, (1,), LARGE) == ["hit"]


def test_an_eviction_from_disk_is_named_as_such(make_cluster, checked, tmp_path) -> None:
    cluster = make_cluster(disk="1MiB", disk_segment="256KiB", disk_path=str(tmp_path), store_wait_ms=10_000)
    client, node = client_of(checked, cluster, layout=LARGE), cluster.nodes["n0"]
    for turn in range(150):
        fill(client, 1, first=turn)
        node.engine.settle()
    causes = {
        (found.details["tier"], found.details["cause"])
        for turn in range(150)
        for found in client.explain(tokens_of((turn,), LARGE))
        if found.why == "evicted"
    }
    assert ("disk", "reclaimed") in causes
    assert causes <= {("disk", "reclaimed"), ("host", "not_admitted"), ("host", "under_pressure"), ("host", "dropped")}


def test_a_block_over_its_tenants_quota_says_so(make_cluster, checked) -> None:
    cluster = make_cluster(tenants={"quotas": {"acme": {"host": "256KiB"}}})
    client = client_of(checked, cluster, replace(NAMESPACE, tenant="acme"), LARGE)
    fill(client, 20)
    record = client.explain(tokens_of((100,), LARGE))[0]
    assert (record.why, record.details["cause"]) == ("evicted", "over_quota")


def test_a_block_for_which_the_index_had_no_slot_says_so(make_cluster, checked, clock) -> None:
    cluster = make_cluster()
    client, node = client_of(checked, cluster), cluster.nodes["n0"]
    client.store(TOKENS, KV)
    node.engine.handle([ev.Crowded(2, None, clock.now_s())])
    assert [(each.why, each.details.get("cause")) for each in client.explain(TOKENS)][2:] == [("evicted", "index_full")] * 2


def test_a_block_evicted_on_another_node_is_named_with_that_node(make_cluster, checked) -> None:
    cluster = make_cluster(2)
    there, here = client_of(checked, cluster, layout=LARGE), client_of(checked, cluster, layout=LARGE, node="n1")
    there.store(tokens_of((1,), LARGE), kv_of((1,), LARGE))
    fill(there, 80)
    cluster.report_all()
    record = here.explain(tokens_of((1,), LARGE))[0]
    assert (record.why, record.node, record.details["tier"]) == ("evicted", "n0", "host")


def test_the_record_of_gone_blocks_is_bounded(make_cluster, checked) -> None:
    cluster = make_cluster()
    gone = cluster.nodes["n0"].gone
    before = len(gone._data)
    client = client_of(checked, cluster, layout=LARGE)
    fill(client, 200)
    gone.check()
    assert len(gone._data) == before <= 24 << 16


# Refused, damaged, removed


def test_a_refused_block_says_that_there_was_no_room(make_cluster, checked) -> None:
    cluster = make_cluster(store_wait_ms=0)
    client, node = client_of(checked, cluster, layout=LARGE), cluster.nodes["n0"]
    fill(client, 40)
    keys = list(node.engine.machine.blocks)
    with node.pinned(keys) as pinned:  # every block is being read, so none can be evicted
        assert len(pinned) == len(keys)
        assert client.store(tokens_of((1,), LARGE), kv_of((1,), LARGE)).refused == 1
    record = client.explain(tokens_of((1,), LARGE))[0]
    assert (record.why, record.node) == ("refused", "n0")
    assert record.reason.startswith("not stored: n0 had no room for it in time")


def test_a_damaged_block_is_named_as_quarantined(make_cluster, checked) -> None:
    cluster = make_cluster()
    client, node = client_of(checked, cluster), cluster.nodes["n0"]
    client.store(TOKENS, KV)
    key = bytes.fromhex(client.explain(TOKENS)[1].key)
    node.seals.scrub()
    node.storage.host._bytes[node.engine.machine.blocks[key].copies[Tier.HOST].offset + 7] ^= 16
    node.seals.scrub()
    record = client.explain(TOKENS)[1]
    assert (record.why, record.details["tier"]) == ("damaged", "host")
    assert "damaged in host of n0, and quarantined" in record.reason


def test_a_block_removed_with_its_namespace_says_so(make_cluster, checked) -> None:
    cluster = make_cluster()
    client, node = client_of(checked, cluster), cluster.nodes["n0"]
    client.store(TOKENS, KV)
    node.forget(client.namespace.root(LAYOUT))
    assert {(each.why, each.details["cause"]) for each in client.explain(TOKENS)} == {("removed", "forgotten")}


def test_a_purged_block_says_so(make_cluster, checked) -> None:
    cluster = make_cluster()
    client, node = client_of(checked, cluster), cluster.nodes["n0"]
    client.store(TOKENS, KV)
    node.epochs.purge([client.namespace.family])
    node.epochs.end_purge([client.namespace.family])
    assert {(each.why, each.details["cause"]) for each in client.explain(TOKENS)} == {("removed", "ended")}


# An engine's pages


def test_a_page_client_explains_the_blocks_of_an_engines_keys(make_cluster, checked) -> None:
    client = checked(make_cluster().page_client("n0", page_layout, NAMESPACE))
    engine, chain = Engine(), chain_of("a", 3)
    assert stored(client, engine, Chain(chain.keys[:2]), [0, 1]).new == 2
    assert [each.why for each in client.explain(chain.keys)] == ["hit", "hit", "never_stored"]
    for number in range(60):
        stored(client, engine, chain_of(f"other {number}", 1), [0])
    assert {each.why for each in client.explain(chain.keys[:2])} == {"evicted"}


# Bad questions


@pytest.mark.parametrize(
    "arguments",
    [
        (b"k" * 32, 1.0, True),
        ([b"short"], 1.0, True),
        ([7], 1.0, True),
        ([], -1.0, True),
        ([], None, True),
        ([bytes(32)] * 65_537, 1.0, True),
    ],
)
def test_a_node_refuses_a_malformed_question(node_factory, arguments: tuple) -> None:
    with pytest.raises(TieredKVError) as caught:
        node_factory(host="1MiB").open_session().explain(*arguments)
    assert caught.value.kind is Kind.TRANSPORT


# Another namespace


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "other weights"),
        ("dtype", "bfloat16"),
        ("adapter", "an adapter"),
        ("tokenizer", "another"),
        ("epoch", 7),
        ("rope", "yarn"),
    ],
)
def test_another_namespace_is_named_with_the_field_that_differs(make_cluster, checked, field: str, value: object) -> None:
    cluster = make_cluster()
    client_of(checked, cluster, replace(NAMESPACE, **{field: value})).store(TOKENS[:48], kv_of(PATH[:3]))
    records = client_of(checked, cluster).explain(TOKENS)
    assert [each.why for each in records] == ["other_namespace"] * 3 + ["never_stored"]
    assert records[0].details["fields"] == {field: [getattr(NAMESPACE, field), value]}
    assert f"another namespace, which differs in {field} (here" in records[0].reason


def test_another_layout_is_named_with_the_field_that_differs(make_cluster, checked) -> None:
    cluster = make_cluster()
    other = replace(LAYOUT, block_tokens=24)
    client_of(checked, cluster, layout=other).store(TOKENS[:48], KV[..., :48, :])
    records = client_of(checked, cluster).explain(TOKENS)
    assert [each.why for each in records] == ["other_namespace"] * 3 + ["never_stored"], "48 tokens are 3 blocks of 16"
    assert records[0].details["fields"] == {"layout.block_tokens": [16, 24]}


def test_a_former_weight_epoch_is_named(make_cluster, checked) -> None:
    client = client_of(checked, make_cluster())
    client.store(TOKENS, KV)
    number = client.new_epoch()
    record = client.explain(TOKENS)[0]
    assert (record.why, record.details["fields"]) == ("other_namespace", {"weight_epoch": [number, 0]})
    assert "these tokens were stored" in record.reason, "they were dropped with their epoch"


def test_of_several_namespaces_the_nearest_is_named(make_cluster, checked) -> None:
    cluster = make_cluster()
    for namespace in (
        replace(NAMESPACE, dtype="bfloat16", adapter="one"),
        replace(NAMESPACE, dtype="bfloat16"),
        replace(NAMESPACE, weights="w"),
    ):
        client_of(checked, cluster, namespace).store(TOKENS, KV)
    assert len(client_of(checked, cluster).explain(TOKENS)[0].details["fields"]) == 1


def test_a_namespace_of_a_node_of_another_version_is_left_out() -> None:
    fields, layout = NAMESPACE.as_fields(), asdict(LAYOUT)
    strange = [{"namespace": {**fields, "planet": "Mars"}, "layout": layout}, {"namespace": fields, "layout": {"shape": 3}}]
    assert other_namespaces(strange, NAMESPACE, LAYOUT, as_token_ids(TOKENS), lambda keys: None) == []


@pytest.mark.parametrize(("own", "others"), [("default", "acme"), ("acme", "default"), ("acme", "beta")])
def test_nobody_learns_what_other_tenants_have_stored(make_cluster, checked, own: str, others: str) -> None:
    cluster = make_cluster()
    client_of(checked, cluster, replace(NAMESPACE, tenant=others)).store(TOKENS, KV)
    client_of(checked, cluster, replace(NAMESPACE, tenant=others, dtype="bfloat16")).store(TOKENS, KV)
    client = client_of(checked, cluster, replace(NAMESPACE, tenant=own))
    assert whys(client) == ["never_stored"] * 4
    with client._pool.session(1.0) as session:
        assert {each["namespace"]["tenant"] for each in session.namespaces(own)} == {own}


def test_a_tenant_that_is_named_is_looked_at(make_cluster, checked) -> None:
    cluster = make_cluster()
    client_of(checked, cluster, replace(NAMESPACE, tenant="acme")).store(TOKENS, KV)
    client = client_of(checked, cluster)
    assert client.explain(TOKENS, also_tenants=["acme"])[0].details["fields"] == {"tenant": ["default", "acme"]}
    with pytest.raises(TieredKVError, match="tenant: must be a text"):
        client.explain(TOKENS, also_tenants=[""])


# The client's last fetch


def test_a_block_past_the_deadline_of_its_fetch_says_so(make_cluster, checked, tmp_path, hanging: Hanging, clock) -> None:  # noqa: F811
    cluster = make_cluster(disk="4MiB", disk_path=str(tmp_path), store_wait_ms=10_000)
    client, node = client_of(checked, cluster, layout=LARGE), cluster.nodes["n0"]
    fill(client, 60)
    node.engine.settle()
    path = next((turn,) for turn in range(100, 160) if client.explain(tokens_of((turn,), LARGE))[0].tier == "disk")
    segments = client._source._disk._segments
    segments._files = hanging.files("preadv")
    done = threading.Timer(0.0, lambda: (hanging.entered.wait(30), clock.advance(1)))
    done.start()
    assert client.fetch(tokens_of(path, LARGE), deadline_ms=500).tokens == 0
    done.join()
    record = client.explain(tokens_of(path, LARGE))[0]
    assert (record.why, record.tier) == ("deadline", "disk")
    assert record.reason.startswith("hit now, but the last fetch, ")
    hanging.gate.set()
    assert client.fetch(tokens_of(path, LARGE)).tokens == 64
    assert whys(client, path, LARGE) == ["hit"], "a fetch that reads the block ends the note"


def test_a_declined_block_says_so(make_cluster, checked) -> None:
    client = client_of(checked, make_cluster())
    client.store(TOKENS, KV)
    keys = [bytes.fromhex(each.key) for each in client.explain(TOKENS)]
    client._note_misses(keys, 2, client._clock.now_s() + 10, is_declined=True)
    client.misses.note(keys[2:], client.misses.of(keys[2]).why, client._clock.now_s() - 4)
    records = client.explain(TOKENS)
    assert [each.why for each in records] == ["hit", "hit", "declined", "declined"]
    assert records[2].reason == "hit now, but the last fetch, 4.0 s ago, declined it: computing it is faster"


def test_the_notes_of_a_client_are_bounded() -> None:
    notes = miss_notes.MissNotes()
    for number in range(3):
        notes.note([bytes([number]) + at.to_bytes(31) for at in range(miss_notes.NOTES_MAX)], Reason.DEADLINE, 1.0)
    assert len(notes) == miss_notes.NOTES_MAX


# Nodes that do not answer


def test_a_block_on_a_node_that_does_not_answer_names_it(make_cluster, checked, clock) -> None:
    cluster = make_cluster(2, node_timeout_s=10.0)
    client_of(checked, cluster).store(TOKENS, KV)
    here = client_of(checked, cluster, node="n1")
    cluster.report_all()
    assert whys(here) == ["peer"] * 4
    with cluster.nodes["n0"]._reporter._turn:  # it sends no report meanwhile
        clock.advance(11)
        cluster.nodes["n1"].report()
        record = here.explain(TOKENS)[0]
    assert (record.why, record.tier, record.node) == ("node_silent", None, "n0")
    assert record.reason == "on n0, which does not answer"
    cluster.nodes["n0"].report()
    cluster.report_all()
    assert whys(here) == ["peer"] * 4, "the node has reported again"


def test_a_node_whose_last_request_failed_counts_as_silent(make_cluster, checked) -> None:
    cluster = make_cluster(2)
    client_of(checked, cluster).store(TOKENS, KV)
    here = client_of(checked, cluster, node="n1")
    cluster.report_all()
    cluster.unreachable.add("n0")
    assert here.fetch(TOKENS).tokens == 0
    assert {(each.why, each.node) for each in here.explain(TOKENS)} == {("node_silent", "n0")}


def test_a_drained_node_is_not_named(make_cluster, checked, clock) -> None:
    cluster = make_cluster(2, node_timeout_s=10.0)
    client_of(checked, cluster).store(TOKENS, KV)
    here = client_of(checked, cluster, node="n1")
    cluster.report_all()
    with cluster.nodes["n0"]._reporter._turn:  # it sends no report meanwhile
        cluster.coordinator.forget("n0")
        assert whys(here) == ["never_stored"] * 4


def test_without_the_coordinator_the_record_says_that_others_were_not_asked(make_cluster, checked) -> None:
    cluster = make_cluster(2)
    here = client_of(checked, cluster, node="n1")
    cluster.unreachable.add("coordinator")
    cluster.report_all()
    record = here.explain(TOKENS)[0]
    assert (record.why, record.details["asked_others"]) == ("never_stored", False)
    assert record.reason.endswith("other nodes could not be asked")


def test_a_closed_node_is_named(make_cluster, checked) -> None:
    cluster = make_cluster()
    client = client_of(checked, cluster)
    client.store(TOKENS, KV)
    cluster.nodes["n0"].close()
    assert {each.why for each in client.explain(TOKENS)} == {"closed"}
