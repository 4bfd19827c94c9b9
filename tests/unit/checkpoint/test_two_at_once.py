"""Two checkpoints of one cluster at once: the second is refused, and does not disturb the first."""

import pytest

from tests.unit.checkpoint.test_restore import COUNT, TREE, calls_to, cluster_of, store, take
from tiered_kv.checkpoint.repository import open_repository
from tiered_kv.checkpoint.take import CheckpointFilter
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.checkpoints.steps import SnapshotRequest, StopWritingRequest, WriteRequest, WriteStatusRequest


def test_a_second_checkpoint_is_refused_and_does_not_disturb_the_first(tmp_path) -> None:
    """Once before anything is written, and once during the writing. Both repositories are the same folder."""
    refused = []

    with cluster_of(2) as cluster, open_repository(str(tmp_path)) as repository:
        store(cluster, "n0", TREE[:6])
        store(cluster, "n1", TREE[6:])

        def again(*_: object) -> bool:
            with pytest.raises(TieredKVError, match=r"n0: another checkpoint is being written by this node") as caught:
                take(cluster, repository)
            refused.append(caught.value.context["busy"])
            return True

        taken = take(cluster, repository, CheckpointFilter(models=again), progress=again)
        assert taken.blocks == COUNT
        assert taken.left == 0
        assert len(refused) >= 2
        assert all(refused)
        after = take(cluster, repository)
        assert (after.blocks, after.new_packs) == (COUNT, 0)
        assert repository.verify() == []


def test_a_node_that_has_written_its_share_still_belongs_to_the_first(tmp_path) -> None:
    with cluster_of(1) as cluster:
        store(cluster, "n0", TREE[:2])
        ask, node = calls_to(cluster), cluster.nodes["n0"]
        keys = [seen.key for seen in node.checkpoint(SnapshotRequest(None, 0, "first")).blocks]
        node.checkpoint(WriteRequest(str(tmp_path), keys, None, 1 << 20, None, "first"))
        while not node.checkpoint(WriteStatusRequest(0, "first")).is_done:
            pass
        busy = ask(["n0"], SnapshotRequest(None, 0, "second"))["n0"]
        assert (busy.kind, busy.context["busy"]) == (Kind.STORAGE, True)
        node.checkpoint(StopWritingRequest("second"))
        assert len(node.checkpoint(WriteStatusRequest(0, "first")).packs) == 1, "what somebody else has is not his to end"
        node.checkpoint(StopWritingRequest("first"))
        assert node.checkpoint(SnapshotRequest(None, 0, "second")).blocks


def test_without_matching_blocks_no_checkpoint_is_written_unless_it_may_be_empty(tmp_path) -> None:
    with cluster_of(1) as cluster, open_repository(str(tmp_path)) as repository:
        with pytest.raises(TieredKVError, match="there is nothing to write"):
            take(cluster, repository, CheckpointFilter(may_be_empty=False))
        assert repository.names() == []
        assert list(tmp_path.iterdir()) == [], "its lease is gone"
        store(cluster, "n0", TREE[:1])
        assert take(cluster, repository, CheckpointFilter(may_be_empty=False)).blocks == 3
