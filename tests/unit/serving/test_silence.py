"""A coordinator or peer that does not answer: one fetch waits for its deadline, and no other calls it until it answers again."""

# ruff: noqa: F401, F811 - fixtures are imported by name

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix
from tests.unit.serving.test_cluster import (
    KV,
    PATH,
    TOKENS,
    Watch,
    clients,
    clock,
    cluster,
    make_cluster,
    watched,
)
from tiered_kv.coordinator.coordinator import Answer, Report
from tiered_kv.embedded import InProcessLink
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.puller import AVOID_S


class Silent(Watch):
    """A link over which the coordinator, or a peer, does not answer within the given time."""

    def __init__(self, link: InProcessLink) -> None:
        super().__init__(link)
        self.waits_s: list[float] = []
        self.is_coordinator_silent = True

    def locate(self, keys: list[bytes], wait_s: float) -> list[list[str]]:
        self.waits_s.append(wait_s)
        if self.is_coordinator_silent:
            raise TieredKVError(Kind.TRANSPORT, f"no answer within {wait_s} s")
        return self._link.locate(keys, wait_s)

    def report(self, report: Report) -> Answer:
        if self.is_coordinator_silent:
            raise TieredKVError(Kind.TRANSPORT, "no answer to a report")
        return self._link.report(report)


@pytest.fixture
def silent(cluster, clients, monkeypatch) -> Silent:
    """The link of "n1" to a coordinator that hangs. "n0" has stored the blocks of TOKENS."""
    clients[0].store(TOKENS, KV)
    cluster.report_all()
    node = cluster.nodes["n1"]
    node._reporter._link = Silent(node._reporter._link)
    monkeypatch.setattr(node._reporter, "wake", lambda: None)  # reports are made by the test
    return node._reporter._link


def test_a_hanging_coordinator_is_called_once_within_the_deadline(cluster, clients, silent) -> None:
    there, node = clients[1], cluster.nodes["n1"]
    assert there.fetch(TOKENS, deadline_ms=50).tokens == 0
    assert len(silent.waits_s) == 1 and 0 < silent.waits_s[0] <= 0.05, "the time left after connecting"
    calls = there.node_calls
    for ask in (there.fetch, there.match, there.fetch):
        ask(TOKENS)
    assert len(silent.waits_s) == 1
    assert there.node_calls == calls, "workers are told that there are no peers, and do not even ask their node"
    assert "other nodes could not be asked" in there.explain(TOKENS)[0].reason
    node.report()
    assert there.fetch(TOKENS).tokens == 0
    with pytest.raises(TieredKVError, match="the coordinator is unreachable"):
        node.locate([b"k" * 32])
    assert len(silent.waits_s) == 1
    silent.is_coordinator_silent = False
    node.report()
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8, "the first report that is answered ends it"


def test_a_slow_call_makes_the_node_report_at_once(cluster, clients, silent, monkeypatch) -> None:
    node, woken = cluster.nodes["n1"], []
    monkeypatch.setattr(node._reporter, "wake", lambda: woken.append(True))
    clients[1].stats()  # connects
    clients[1].fetch(TOKENS, deadline_ms=50)
    assert woken
    assert node.stats()["coordinator"] is False


@pytest.mark.parametrize(("hung", "avoided_s"), [(False, AVOID_S), (True, 6.0)])
def test_a_hanging_peer_delays_one_fetch_and_is_then_avoided(make_cluster, checked, clock, hung: bool, avoided_s: float) -> None:
    """This also holds if the wait for the peer has used up the whole deadline."""
    cluster = make_cluster(heartbeat_s=1.0, node_timeout_s=5.0)
    here, there = (checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes)
    here.store(TOKENS, KV)
    cluster.report_all()
    cluster.report_all()
    watch = watched(cluster, "n1")

    def hang(number: int) -> None:
        if number == 0:
            clock.advance(9.0)
            cluster.report_all()
            raise TieredKVError(Kind.TRANSPORT, "no answer", hung=hung)

    watch.before_request = hang
    assert there.fetch(TOKENS).tokens == 0
    watch.requests.append(("n0", 0))  # the one that hung is not counted by itself
    assert there.fetch(TOKENS).tokens == 0
    assert len(watch.requests) == 1, "it is avoided"
    clock.advance(avoided_s - 0.1)
    cluster.report_all()
    assert there.fetch(TOKENS).tokens == 0
    clock.advance(0.2)
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8


def test_a_silent_node_is_listed_as_lost_until_it_reports_or_signs_off(make_cluster, clock) -> None:
    cluster = make_cluster(node_timeout_s=5.0)
    cluster.report_all()
    assert cluster.coordinator.lost() == {}
    clock.advance(12.0)
    cluster.nodes["n0"].report()
    assert cluster.coordinator.lost() == {"n1": 12.0}
    cluster.report_all()
    assert cluster.coordinator.lost() == {}
    clock.advance(12.0)
    cluster.coordinator.forget("n1")
    assert list(cluster.coordinator.lost()) == ["n0"]
