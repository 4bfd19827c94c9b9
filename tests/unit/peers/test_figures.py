"""A failure of a pair is over as soon as a request succeeds: `status` names only pairs that fail now."""

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.peers.figures import COORDINATOR, PeerFigures

CUT = TieredKVError(Kind.TRANSPORT, "timed out", reason="timeout")


def test_a_failed_look_up_is_over_with_the_next_that_succeeds() -> None:
    figures = PeerFigures(lambda: 0.0)
    figures.located()
    figures.failed(COORDINATOR, CUT)
    assert figures.stats(None, {})["peers"][COORDINATOR]["last_failure"] == "timed out"
    figures.located()
    pair = figures.stats(None, {})["peers"][COORDINATOR]
    assert "last_failure" not in pair
    assert "last_failure_age_s" not in pair
    assert pair["failures"] == {"timeout": 1}


def test_a_failed_transfer_is_over_with_the_next_that_ends_well() -> None:
    figures = PeerFigures(lambda: 0.0)
    figures.failed("n1", CUT)
    figures.fetched("n1", 3, 300, 0.1, is_whole=False)
    assert "last_failure" in figures.stats(None, {})["peers"]["n1"]
    figures.fetched("n1", 1, 100, 0.1, is_whole=True)
    assert "last_failure" not in figures.stats(None, {})["peers"]["n1"]
