"""A client of an engine's pages says how much of a chain is worth loading, by its own measurements or those of another process."""

import pytest

from tiered_kv import Config, Namespace, OpaqueLayout
from tiered_kv.client.page_client import Estimates, PageClient
from tiered_kv.client.prefill_cost import PrefillCost
from tiered_kv.clock import ManualClock
from tiered_kv.embedded import InProcessCluster

LAYOUT = OpaqueLayout(8192, 16, "pages of a test")
NAMESPACE = Namespace("made up")
SLOW, FAST = (1.0, 0.0), (1e-6, 0.0)


@pytest.fixture
def client(checked) -> PageClient:
    cluster = checked(InProcessCluster(Config.of(host="1MiB", heartbeat_s=1000.0), 1, ManualClock()))
    return checked(cluster.page_client("n0", LAYOUT, NAMESPACE))


def test_everything_is_worth_loading_while_nothing_is_known(client) -> None:
    assert client.worth_loading(["disk", "peer"], 0) == 2
    client.adopt(Estimates(None, {"disk": SLOW}))
    assert client.worth_loading(["disk", "peer"], 0) == 2


def test_slow_tiers_are_left_to_the_engine(client) -> None:
    client.adopt(Estimates(PrefillCost(1e-3), {"disk": FAST, "peer": SLOW}))
    chain = ["host", "disk", "device", "peer"]
    assert client.worth_loading(chain, 0) == 4  # one block more, which measures the peer
    assert client.worth_loading(chain, 0) == 3
    assert client.worth_loading(chain, 0, tokens_per_s=1.0) == 4
    assert client.worth_loading(["host"] * 4, 0) == 4
    assert client.worth_loading([], 0) == 0


def test_deep_blocks_are_worth_more(client) -> None:
    client.adopt(Estimates(PrefillCost(1e-3, 1e-6), {"disk": (0.03, 0.0)}))
    client._costs.may_probe("disk")
    assert client.worth_loading(["disk"], 0) == 0
    assert client.worth_loading(["disk"], 1000) == 1


def test_declined_blocks_are_counted(client) -> None:
    client.declined(["host", "disk", "peer", "peer"])
    assert client.own_stats()["declined_tokens"] == 3 * LAYOUT.block_tokens
    assert client.stats()["node"]["declined_tokens"] == {"disk": 16, "objects": 0, "checkpoint": 0, "peer": 32}


def test_estimates_travel_between_clients(client, checked) -> None:
    for _ in range(3):
        client.note_prefill(1000, 2.0)
    client._costs.note("disk", 8192, 0.5)
    estimates = client.estimates()
    assert estimates.prefill == pytest.approx(PrefillCost(0.002))
    client.adopt(estimates)
    assert client.estimates() == estimates
