"""Tenants: salts from the cluster's secret, quotas of each tier, and names of all kinds."""

import random
from dataclasses import replace

import pytest
import torch

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config, KVLayout, Namespace, OpaqueLayout
from tiered_kv.blocks import Stored, Tier
from tiered_kv.client.connect import page_client_of
from tiered_kv.client.page_client import Chain
from tiered_kv.client.page_copy import pages_of
from tiered_kv.cluster.commands.cli import tenants_of
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError

LARGE = KVLayout(2, 2, 16, "float32", 64)
"""Blocks of 32 KiB."""
PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)
SECRET = b"a cluster's secret of 32 bytes.."
ACME, OTHER = (replace(NAMESPACE, tenant=tenant) for tenant in ("acme", "other"))


@pytest.fixture
def make_cluster(checked):
    def make(nodes: int = 1, secret: bytes = SECRET, **settings: object) -> InProcessCluster:
        config = Config.of({"host": "1MiB", "heartbeat_s": 1000.0, **settings})
        return checked(InProcessCluster(config, nodes, secret=secret))

    return make


def store(client, *paths, layout=LARGE) -> int:
    return sum(client.store(tokens_of(path, layout), kv_of(path, layout)).new for path in paths)


def hits(client, *paths, layout=LARGE) -> list[int]:
    return [assert_is_prefix(client.fetch(tokens_of(path, layout)), path, layout) for path in paths]


# Salts


def test_tenants_share_nothing_and_only_named_ones_have_salts(make_cluster, checked) -> None:
    cluster = make_cluster(2)
    clients = [checked(cluster.client("n0", LAYOUT, namespace)) for namespace in (NAMESPACE, ACME, OTHER)]
    there = checked(cluster.client("n1", LAYOUT, ACME))
    for client in clients:
        assert client.store(TOKENS, KV) == Stored(4, 0, 0)
    cluster.report_all()
    assert [bool(client.namespace.salt) for client in clients] == [False, True, True]
    assert len({client.namespace.salt for client in clients}) == 3
    assert there.fetch(TOKENS).tokens == len(TOKENS), "one tenant has one salt on all nodes"
    known = {each["tenant"]: each["family"] for each in cluster.nodes["n0"].stats()["namespaces"]}
    assert known == {each.tenant: each.family.hex() for each in (NAMESPACE, ACME, OTHER)}


def test_nobody_without_the_secret_can_compute_a_tenants_keys(make_cluster, checked) -> None:
    clusters = [make_cluster(secret=secret) for secret in (SECRET, b"another secret of another clus..", b"")]
    clients = [checked(cluster.client("n0", LAYOUT, ACME)) for cluster in clusters]
    roots = [client.namespace.root(LAYOUT) for client in clients]
    assert len({*roots}) == 3
    assert roots[2] == ACME.root(LAYOUT), "without a secret a tenant's root is that of earlier versions"
    clients[0].store(TOKENS, KV)
    guess = clients[0].explain(TOKENS)
    assert [each.reason for each in guess] == ["hit"] * 4
    assert not clients[0].fetch(TOKENS, namespace=ACME).tokens, "the plain name is not enough"


def test_clusters_with_one_secret_file_have_the_same_salts(make_cluster, checked, tmp_path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"\n a secret that several clusters have \n")
    settings = {"tenants": {"secret_file": str(file)}}
    clients = [checked(make_cluster(secret=secret, **settings).client("n0", LAYOUT, ACME)) for secret in (SECRET, b"")]
    assert clients[0].namespace == clients[1].namespace
    assert clients[0].namespace.salt
    file.write_bytes(b"short")
    for text in ("must have 16 to", "cannot read"):
        with pytest.raises(TieredKVError, match=text) as caught:
            make_cluster(**settings)
        assert caught.value.kind is Kind.CONFIG
        file.unlink(missing_ok=True)


def test_a_client_that_is_older_than_its_node_gets_its_salt_later(make_cluster, checked) -> None:
    cluster = make_cluster(0)
    layout, arrays = OpaqueLayout(1024, 16, "pages"), [torch.zeros(8, 1024, dtype=torch.uint8)]
    pages = pages_of(arrays)

    def find():
        return cluster.nodes["n0"].info() if cluster.nodes else None

    client = checked(page_client_of(find, layout, ACME, connect=lambda: cluster.nodes["n0"].open_session()))
    before, chain = client.root, Chain([bytes([number]) * 32 for number in (1, 2)])
    assert client.store(chain._replace(root=before), pages, [0, 1]).refused == 2
    cluster.start_node("n0")
    assert client.load(chain, pages, [0, 1]).blocks == 0
    assert client.namespace.salt
    assert client.root not in (before, ACME.root(layout))
    assert client.store(chain._replace(root=before), pages, [0, 1]).refused == 2, "keys made without the salt are refused"
    assert client.store(chain._replace(root=client.root), pages, [0, 1]) == Stored(2, 0, 0)
    assert client.load(chain._replace(root=client.root), pages, [3, 4]).blocks == 2


def test_without_an_answer_about_its_salt_a_tenant_has_misses_only(make_cluster, checked, monkeypatch) -> None:
    cluster = make_cluster()
    client = checked(cluster.client("n0", LAYOUT, ACME))
    client.store(TOKENS, KV)
    client._holder.present.salts.clear()
    monkeypatch.setattr("tiered_kv.node.node.Node.salt", lambda *_: (_ for _ in ()).throw(TieredKVError(Kind.TRANSPORT, "hangs")))
    client.new_epoch(1)
    assert client.fetch(TOKENS).tokens == 0
    assert client.store(TOKENS, KV) == Stored(0, 0, 4)
    monkeypatch.undo()
    client._holder.present.pool.revive()
    client.new_epoch(0)
    assert client.fetch(TOKENS).tokens == len(TOKENS)


ODD = ["a" * 1024, "é" * 512, "../../etc/passwd", "a\0b", "\n", "🦊", "default ", " ", "a:b;c,d=e", "'); DROP"]


def test_odd_names_work_and_are_kept_apart(make_cluster, checked) -> None:
    quotas = {name: {"host": "256KiB"} for name in ODD}
    cluster = make_cluster(tenants={"quotas": quotas}, host="4MiB")
    clients = [checked(cluster.client("n0", LAYOUT, replace(NAMESPACE, tenant=name))) for name in ODD]
    for number, client in enumerate(clients):
        assert [other.match(TOKENS).tokens for other in clients] == [len(TOKENS)] * number + [0] * (len(ODD) - number)
        assert client.store(TOKENS, KV) == Stored(4, 0, 0)
    tenants = cluster.nodes["n0"].stats()["tenants"]
    assert {name: each["host"]["blocks"] for name, each in tenants.items()} == dict.fromkeys(ODD, 4)


@pytest.mark.parametrize("name", ["", "a" * (1 << 20), "é" * 513, "\ud800", None, 5, b"bytes"], ids=lambda name: f"{name!r:.20}")
def test_other_names_are_a_clear_error(name) -> None:
    with pytest.raises(TieredKVError, match=r"^tenant: must be a text of") as caught:
        Namespace("weights", tenant=name)
    assert caught.value.kind is Kind.CONFIG
    assert len(str(caught.value)) < 300


# Quotas


def test_a_tenant_at_its_quota_evicts_its_own_blocks_only(make_cluster, checked) -> None:
    cluster = make_cluster(host="1MiB", tenants={"quotas": {"acme": {"host": "320KiB"}}})
    node = cluster.nodes["n0"]
    acme, other = (checked(cluster.client("n0", LARGE, namespace)) for namespace in (ACME, OTHER))
    others = [(turn, 9) for turn in range(50, 55)]
    assert store(other, *others) == 10
    paths = [(1, turn, turn) for turn in range(40)]
    for path in paths:
        assert acme.store(tokens_of(path, LARGE), kv_of(path, LARGE)).refused == 0
        assert node.stats()["tenants"]["acme"]["host"]["used_bytes"] <= 320 << 10
    assert hits(other, *others) == [2] * 5, "others' blocks stay, however much it stores"
    assert hits(acme, *paths)[-4:] == [3] * 4, "the latest are there, and each has its ancestors"
    figures = node.stats()["tenants"]["acme"]["host"]
    assert figures == {"used_bytes": figures["blocks"] * LARGE.block_bytes, "blocks": 10, "quota_bytes": 320 << 10}
    assert node.stats()["counts"]["over_quota"] > 60
    node.check()


def test_a_full_tier_costs_others_nothing_if_the_tenant_is_at_its_quota(make_cluster, checked) -> None:
    cluster = make_cluster(host="1MiB", tenants={"quotas": {"acme": {"host": "320KiB"}}})
    acme, other = (checked(cluster.client("n0", LARGE, namespace)) for namespace in (ACME, OTHER))
    others = [(9, turn) for turn in range(60)]
    for path in others:
        store(other, path)
    store(acme, *[(1, turn) for turn in range(9)])  # up to its quota, it gets its room from the others
    kept = hits(other, *others)
    cluster.nodes["n0"].engine.drain_touches()
    for turn in range(60):
        store(acme, (2, turn, 7))
    assert hits(other, *others) == kept


def test_a_prompt_larger_than_its_quota_keeps_its_leading_blocks(make_cluster, checked) -> None:
    cluster = make_cluster(tenants={"quotas": {"acme": {"host": "128KiB"}}})
    client = checked(cluster.client("n0", LARGE, ACME))
    path = (1, 2, 3, 4, 5, 6, 7)
    assert client.store(tokens_of(path, LARGE), kv_of(path, LARGE)) == Stored(4, 0, 3)
    assert hits(client, path) == [4]


def test_a_quota_of_less_than_a_block_is_an_error_when_the_tenant_attaches(make_cluster, checked) -> None:
    cluster = make_cluster(tenants={"quotas": {"acme": {"host": "31KiB"}, "other": {"host": "32KiB"}}})
    with pytest.raises(
        TieredKVError, match="quota of 'acme' in host: must be at least one block of this model, 32768 bytes, got 31744"
    ) as caught:
        cluster.client("n0", LARGE, ACME)
    assert caught.value.kind is Kind.CONFIG
    client = checked(cluster.client("n0", LARGE, OTHER))
    assert store(client, (1,)) == 1
    assert hits(client, (1,)) == [1]


def test_quotas_hold_on_disk_too_and_after_a_restart(make_cluster, checked, tmp_path) -> None:
    quotas = {"acme": {"host": "320KiB", "disk": "640KiB"}}
    settings = {"disk": "16MiB", "disk_segment": "256KiB", "disk_path": str(tmp_path / "disk"), "store_wait_ms": 10_000}
    cluster = make_cluster(tenants={"quotas": quotas}, **settings)
    acme, other = (checked(cluster.client("n0", LARGE, namespace)) for namespace in (ACME, OTHER))
    others = [(9, turn) for turn in range(60)]
    store(other, *others)
    random.seed(1)
    paths = [(1, random.randrange(9), random.randrange(9), random.randrange(9)) for _ in range(60)]
    for path in paths:
        store(acme, path)
        hits(acme, random.choice(paths))
    node = cluster.nodes["n0"]
    node.engine.settle()
    by_tier = node.stats()["tenants"]["acme"]
    assert by_tier["host"]["used_bytes"] <= 320 << 10
    assert 0 < by_tier["disk"]["used_bytes"] <= 640 << 10
    assert hits(other, *others) == [2] * 60, "all of another tenant's blocks are still there"
    node.engine.settle()  # promotions that the fetches caused
    node.check()
    cluster.nodes["n0"].close(remove=False)
    node = cluster.start_node("n0")
    again = node.stats()["tenants"]
    assert again["acme"]["host"]["used_bytes"] <= 320 << 10
    assert 0 < again["acme"]["disk"]["used_bytes"] <= 640 << 10
    assert set(again) == {"acme", "other"}, "a restarted node knows whose its blocks are"


def test_a_promotion_stays_within_the_quota(make_cluster, checked) -> None:
    cluster = make_cluster(disk="16MiB", tenants={"quotas": {"acme": {"host": "320KiB"}}}, store_wait_ms=10_000)
    client = checked(cluster.client("n0", LARGE, ACME))
    node = cluster.nodes["n0"]
    paths = [(1, turn, turn) for turn in range(30)]
    for path in paths:
        store(client, path)
    node.engine.settle()
    for path in paths * 2:
        hits(client, path)
        node.engine.drain_touches()
        node.engine.settle()
        assert node.engine.machine.quotas.bytes["acme", Tier.HOST] <= 320 << 10
    assert node.engine.machine.counts["promoted"]
    node.check()


@pytest.mark.parametrize("text", ["acme", "acme:", "acme:host", "acme:host=", ":", "acme:host=1,disk"])
def test_a_quota_that_is_not_one_is_bad_usage(text) -> None:
    with pytest.raises(TieredKVError, match="--quota: must be") as caught:
        tenants_of([text], None)
    assert caught.value.kind is Kind.CONFIG


def test_quotas_of_the_command_line_are_settings() -> None:
    given = tenants_of(["acme:host=2GiB,disk=10GiB", "a:b:host=1MiB"], "secret")
    config = Config.of(tenants=given)
    assert config.tenant_settings.quotas == {"acme": {Tier.HOST: 2 << 30, Tier.DISK: 10 << 30}, "a:b": {Tier.HOST: 1 << 20}}
    assert config.tenant_settings.secret_file.endswith("/secret")
    assert Config.of(tenants=config.tenants) == config
    with pytest.raises(TieredKVError, match="--quota: must be"):
        tenants_of(["a:host=1", "a:disk=1"], None)
