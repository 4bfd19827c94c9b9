"""The counts of clients in shared memory: each requested block is a hit of one tier or a miss, whatever becomes of the client."""

import os
import signal
import subprocess
import sys

import pytest

from tests.unit.metrics.scraping import scrape_node
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv import Namespace
from tiered_kv.clock import ManualClock
from tiered_kv.memory import client_page
from tiered_kv.memory.client_page import TIERS, ClientPage, pages_in, read_page
from tiered_kv.memory.histogram import BOUNDS_S, Histogram
from tiered_kv.metrics.node_samples import NodeReading, tenant_samples
from tiered_kv.node.monitoring.client_counts import TIDY_EVERY_S
from tiered_kv.node.monitoring.labels import LABELS_MAX, OTHER, BoundedLabels

T = LAYOUT.block_tokens
PATH = (1, 2, 3, 4)


@pytest.fixture
def node(node_factory):
    return node_factory(host="1MiB")


@pytest.fixture
def client(node, client_factory):
    return client_factory(node, LAYOUT, NAMESPACE)


def assert_adds_up(node) -> None:
    """Assert that requested blocks and tokens are the sum of hits by tier and misses."""
    found = scrape_node(node)
    for unit in ("blocks", "tokens"):
        hits = sum(found.sum(f"hit_{unit}_total", tier=tier) for tier in TIERS)
        assert found.sum(f"requested_{unit}_total") == hits + found.sum(f"missed_{unit}_total")
    node.meters.clients.check()


def test_each_requested_block_is_a_hit_of_one_tier_or_a_miss(node, client) -> None:
    client.fetch(tokens_of(PATH))
    client.store(tokens_of(PATH[:3]), kv_of(PATH[:3]))
    client.fetch(tokens_of(PATH))
    client.fetch(tokens_of((9, 9)))
    found = scrape_node(node)
    assert found.sum("requested_blocks_total") == 10
    assert found.sum("hit_blocks_total", tier="host") == found.sum("hit_blocks_total") == 3
    assert found.sum("missed_blocks_total") == 7
    assert found.sum("missed_tokens_total") == 7 * T
    assert found.sum("hit_tokens_total") == found.sum("prefill_saved_tokens_total") == 3 * T
    assert found.sum("stored_blocks_total", result="new") == 3
    assert found.sum("moved_bytes_total", source="host", target="worker") == 3 * LAYOUT.block_bytes
    assert found.sum("moved_bytes_total", source="worker", target="host") == 3 * LAYOUT.block_bytes
    assert (found.sum("fetch_seconds_count"), found.sum("store_seconds_count")) == (3, 1)
    assert 0 < found.sum("fetch_seconds_sum") < 30
    assert_adds_up(node)
    own = client.own_stats()
    assert (own["asked_blocks"], own["missed_blocks"], own["hit_blocks_host"]) == (10, 7, 3)


def test_partial_blocks_are_not_requested(node, client) -> None:
    client.fetch(tokens_of(PATH)[: 2 * T + 5])
    assert scrape_node(node).sum("requested_tokens_total") == 2 * T


def test_counts_have_namespace_and_tenant(node, client, client_factory) -> None:
    other = Namespace(weights="other", tenant="acme")
    client_factory(node, LAYOUT, other).fetch(tokens_of(PATH))
    client.fetch(tokens_of(PATH[:1]))
    found = scrape_node(node)
    assert found.sum("requested_blocks_total", tenant="acme", namespace=other.family.hex()[:12]) == 4
    assert found.sum("requested_blocks_total", tenant="default") == 1


def test_a_client_that_changes_its_namespace_counts_for_both(node, client) -> None:
    client.fetch(tokens_of(PATH))
    for number in range(20):
        client.use(Namespace(weights=f"weights {number}"))
        client.fetch(tokens_of(PATH))
    found = scrape_node(node)
    assert found.sum("requested_blocks_total") == 4 * 21
    assert found.values("requested_blocks_total", "namespace") > {OTHER}
    assert len(list(pages_in(node.directory))) <= 9  # one client has few pages


def test_counts_of_ended_clients_stay_and_their_pages_do_not(node, client_factory) -> None:
    for _ in range(3):
        client = client_factory(node, LAYOUT, NAMESPACE)
        client.fetch(tokens_of(PATH))
        assert len(list(pages_in(node.directory))) == 1
        client.close()
        assert scrape_node(node).sum("requested_blocks_total") % 4 == 0
        assert not list(pages_in(node.directory))
    assert scrape_node(node).sum("requested_blocks_total") == 12
    assert scrape_node(node).sum("fetch_seconds_count") == 3


def test_pages_of_ended_clients_are_deleted_without_a_scraper(node_factory, client_factory) -> None:
    clock = ManualClock()
    node = node_factory(host="1MiB", clock=clock)
    client = client_factory(node, LAYOUT, NAMESPACE)
    client.fetch(tokens_of(PATH))
    client.close()
    clock.advance(TIDY_EVERY_S + 1)
    node.meters.clients.beat()
    assert not list(pages_in(node.directory))


DYING = """
import os, sys
from tiered_kv.memory.client_page import ClientPage
page = ClientPage.create(sys.argv[1], "n", "t", 16, 1000)
page.add({"asked_blocks": 5, "missed_blocks": 2, "hit_blocks_host": 3}, fetch_s=0.5)
if sys.argv[2] == "amid":
    page._words[1] += 1
    page._words[41] += 100  # asked_blocks, whose misses are not counted yet
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("when", ["between", "amid"])
def test_a_killed_client_loses_no_count(node, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", DYING, str(node.directory), when], check=False)
    assert done.returncode == -signal.SIGKILL
    found = scrape_node(node)
    assert (found.sum("requested_blocks_total"), found.sum("hit_blocks_total"), found.sum("fetch_seconds_count")) == (5, 3, 1)
    assert not list(pages_in(node.directory))
    assert_adds_up(node)


def test_a_page_that_is_being_written_is_not_read(node) -> None:
    page = ClientPage.create(node.directory, "n", "t", 16, 1000)
    page.add({"asked_blocks": 1, "missed_blocks": 1})
    (path,) = pages_in(node.directory)
    page._words[1] += 1
    assert read_page(path) is None
    page._words[1] += 1
    found = read_page(path)
    assert found is not None and found[0].counts["asked_blocks"] == 1 and not found[1]
    page.close()


def test_a_child_process_counts_on_a_page_of_its_own(node, client) -> None:
    client.fetch(tokens_of(PATH))
    pid = os.fork()
    if not pid:
        code = 1
        try:
            client.fetch(tokens_of(PATH))
            code = 0 if len(list(pages_in(node.directory))) == 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    client.fetch(tokens_of(PATH))
    assert scrape_node(node).sum("requested_blocks_total") == 12
    assert len(list(pages_in(node.directory))) == 1


def test_a_restarted_node_counts_from_its_start(node_factory, client_factory) -> None:
    node = node_factory(host="1MiB", cluster_id="metrics-again")
    client = client_factory(node, LAYOUT, NAMESPACE)
    client.fetch(tokens_of(PATH))
    node.close(remove=False)
    again = node_factory(host="1MiB", cluster_id="metrics-again")
    assert scrape_node(again).sum("requested_blocks_total") == 0
    client.fetch(tokens_of(PATH))
    client.close()
    found = scrape_node(again)
    assert (found.sum("requested_blocks_total"), found.sum("fetch_seconds_count"), found.sum("restarts_total")) == (4, 1, 1)


@pytest.mark.parametrize("content", [b"", b"x" * 4096, b"TKVPAGE1" + b"\0" * 4088, b"TKVPAGE1" + b"\xff" * 4088])
def test_damaged_pages_cost_nothing_but_their_counts(node, client, content: bytes) -> None:
    (node.directory / client_page.FOLDER / "1-damaged").write_bytes(content)
    client.fetch(tokens_of(PATH))
    assert scrape_node(node).sum("requested_blocks_total", tenant="default") == 4


def test_a_node_without_the_folder_is_used_without_counts(node, client) -> None:
    (node.directory / client_page.FOLDER).rmdir()
    client.fetch(tokens_of(PATH))
    client.store(tokens_of(PATH), kv_of(PATH))
    assert client.fetch(tokens_of(PATH)).tokens == 4 * T
    assert scrape_node(node).sum("requested_blocks_total") == 0


def test_a_closed_client_keeps_no_page(node, client) -> None:
    client.fetch(tokens_of(PATH))
    counts = client._source.counts
    client.close()
    counts.add(b"r" * 32, NAMESPACE, {"fetches": 1})
    scrape_node(node)
    assert not list(pages_in(node.directory))


def test_ten_thousand_tenants_have_few_labels(node) -> None:
    for number in range(10_000):
        page = ClientPage.create(node.directory, "n", f"tenant {number}", 16, 1000)
        page.add({"asked_blocks": 1, "missed_blocks": 1})
        page.close()
        if number % 1000 == 999:
            node.meters.clients.read()
    found = scrape_node(node)
    assert found.sum("requested_blocks_total") == 10_000
    assert found.series("requested_blocks_total") == LABELS_MAX + 1
    assert found.sum("requested_blocks_total", tenant=OTHER) == 10_000 - LABELS_MAX


def test_tenants_without_their_own_label_are_added_up(node) -> None:
    stats = node.stats()
    stats["tenants"] = {f"t{number}": {"host": {"used_bytes": 2, "blocks": 1, "quota_bytes": 3}} for number in range(10_000)}
    reading = NodeReading(stats, {}, node.meters.durations(), BoundedLabels(OTHER))
    samples = list(tenant_samples(reading))
    assert len(samples) == 2 * (LABELS_MAX + 1)
    assert sum(sample.value for sample in samples if sample.name == "tenant_used_bytes") == 20_000


def test_a_name_keeps_its_label() -> None:
    labels: BoundedLabels[str] = BoundedLabels(OTHER)
    first = [labels.label(f"t{number}") for number in range(LABELS_MAX)]
    assert labels.label("late") == OTHER
    assert [labels.label(f"t{number}") for number in range(LABELS_MAX)] == first


def test_a_duration_is_in_the_bucket_whose_bound_it_does_not_exceed() -> None:
    histogram = Histogram()
    for bound in BOUNDS_S:
        histogram.add(bound)
        histogram.add(bound * 1.0001)
    histogram.add(-1.0)
    counts = histogram.read()
    assert counts.counts == [2, *[2] * (len(BOUNDS_S) - 1), 1]
    assert counts.sum_s == pytest.approx(sum(BOUNDS_S) * 2.0001)
