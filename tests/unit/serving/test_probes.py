"""Probes of models: nodes and the coordinator store them, compare them up to rounding, and keep them across restarts."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.serving.prompts import LAYOUT, NAMESPACE
from tiered_kv import Config
from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.probes import ROOTS_MAX, VARIANTS_MAX, VECTOR_BYTES_MAX, Probe, ProbeBook

ROWS, FLOATS = 4, 5
ROOT = NAMESPACE.root(LAYOUT)


def probe_of(value, rounding=0.0):
    """Returns the probe of a model with the KV `value`, with a relative `rounding` error."""
    rows = np.arange(1, ROWS * FLOATS + 1, dtype="<f4").reshape(ROWS, FLOATS) + value
    rows[:, 0] = np.linalg.norm(rows[:, 1:], axis=1)
    return Probe((rows * np.float32(1 + rounding)).tobytes(), FLOATS, 1e-3, 2e-3)


@pytest.fixture
def cluster(checked):
    return checked(InProcessCluster(Config.of({"host": "1MiB", "heartbeat_s": 1000.0}), 2))


def variant(cluster, node, probe):
    session = cluster.nodes[node].open_session()
    try:
        return session.probe(ROOT, list(probe))
    finally:
        session.close()


def test_probes_equal_up_to_rounding_share_a_variant_and_others_do_not():
    book = ProbeBook()
    assert book.match(ROOT, probe_of(1)) == ""
    assert book.match(ROOT, probe_of(1, rounding=5e-4)) == ""
    second = book.match(ROOT, probe_of(2))
    assert second
    assert book.match(ROOT, probe_of(2, rounding=-5e-4)) == second
    assert book.match(ROOT, probe_of(3)) not in ("", second)
    assert book.match(ROOT, probe_of(1)) == ""
    assert book.match(bytes(32), probe_of(3)) == "", "another root has variants of its own"


@given(st.lists(st.integers(0, 6), max_size=20))
def test_equal_probes_share_a_variant_in_any_order(values):
    book, names = ProbeBook(), {}
    for value in values:
        names.setdefault(value, set()).add(book.match(ROOT, probe_of(float(value))))
    assert all(len(each) == 1 for each in names.values())
    assert len(set.union(set(), *names.values())) == len(names)


def test_the_tolerance_grows_with_depth_and_other_shapes_never_match():
    probe = probe_of(1)
    rows = np.frombuffer(probe.vector, "<f4").reshape(ROWS, FLOATS).copy()
    for row, agrees in ((0, False), (3, True)):
        changed = rows.copy()
        changed[row] *= 1.0015
        assert (probe.distance(probe._replace(vector=changed.tobytes())) <= 1) == agrees
    assert probe.distance(probe._replace(vector=probe.vector[: len(probe.vector) // 2])) == np.inf
    assert probe.distance(probe._replace(vector=np.full_like(rows, np.nan).tobytes())) == np.inf


def test_probe_books_are_bounded():
    book = ProbeBook()
    names = {book.match(ROOT, probe_of(float(number))) for number in range(VARIANTS_MAX + 4)}
    assert len(names) == VARIANTS_MAX + 4
    assert len(book.variants(ROOT)) == VARIANTS_MAX
    for number in range(ROOTS_MAX):
        book.match(number.to_bytes(32), probe_of(1))
    assert len(book.everything()) == ROOTS_MAX
    assert not book.variants(ROOT)


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        [b"x", 5, 1.0, 1.0],
        [bytes(40), 1, 1.0, 1.0],
        ["text", 5, 1.0, 1.0],
        [bytes(VECTOR_BYTES_MAX + 40), 5, 1.0, 1.0],
        [bytes(40), 5, 1, 1],
    ],
)
def test_invalid_probes_are_rejected(message):
    with pytest.raises(TieredKVError, match="expected a probe") as caught:
        Probe.of_message(message)
    assert caught.value.kind is Kind.TRANSPORT


def test_all_nodes_know_the_first_probe(cluster):
    assert variant(cluster, "n0", probe_of(1)) == ""
    assert variant(cluster, "n1", probe_of(1, 5e-4)) == ""
    other = variant(cluster, "n1", probe_of(2))
    assert other
    assert variant(cluster, "n0", probe_of(2)) == other


def test_a_restarted_node_still_knows_its_probes(cluster):
    assert variant(cluster, "n0", probe_of(1)) == ""
    cluster.unreachable.add("coordinator")
    cluster.nodes["n0"].close(remove=False)
    cluster.start_node("n0")
    assert variant(cluster, "n0", probe_of(2)) != ""
    assert variant(cluster, "n0", probe_of(1)) == ""


def test_a_restarted_coordinator_gets_the_probes_again(cluster):
    assert variant(cluster, "n0", probe_of(1)) == ""
    cluster.coordinator = Coordinator(cluster._clock, cluster.config.node_timeout_s)
    cluster.nodes["n0"].report()
    assert variant(cluster, "n1", probe_of(2)) != ""
    assert variant(cluster, "n1", probe_of(1)) == ""


def test_without_a_coordinator_the_node_decides(cluster):
    cluster.unreachable.add("coordinator")
    assert variant(cluster, "n0", probe_of(1)) == ""
    assert variant(cluster, "n0", probe_of(2)) != ""
    cluster.unreachable.clear()
    assert variant(cluster, "n0", probe_of(1)) == ""
    assert variant(cluster, "n1", probe_of(2)) != "", "what the node decided is the cluster's now"


def test_a_disk_folder_from_the_settings_keeps_the_probes(node_factory, tmp_path):
    for first, wanted in ((True, ""), (False, None)):
        node = node_factory(host="1MiB", disk="8MiB", disk_path=str(tmp_path))
        with closing(node.open_session()) as session:
            name = session.probe(ROOT, list(probe_of(1.0 if first else 2.0)))
        assert (name == "") is (wanted == "")
        node.close()


def test_a_damaged_file_of_probes_is_no_error(cluster):
    assert variant(cluster, "n0", probe_of(1)) == ""
    node = cluster.nodes["n0"]
    (node.directory / "probes").write_bytes(b"\xc1 nonsense")
    node.close(remove=False)
    cluster.start_node("n0")
    assert variant(cluster, "n0", probe_of(1)) == ""
