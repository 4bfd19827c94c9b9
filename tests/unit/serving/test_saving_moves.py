"""Blocks that move while a checkpoint is written: a frame's record describes the frame, wherever its block is by then."""

from tests.unit.checkpoint.test_restore import TREE, WHOLE, assert_all_hit, client_of, cluster_of, restored, store, take
from tests.unit.serving.prompts import tokens_of
from tiered_kv.blocks import Tier
from tiered_kv.checkpoint.repository import open_repository


def test_a_block_promoted_during_its_read_is_recorded_as_it_was_read(tmp_path, monkeypatch) -> None:
    """The block's frame on disk is lossless. Its copy in host memory, promoted meanwhile, is raw."""
    (tmp_path / "disk").mkdir()
    small = {"host": "1MiB", "disk": "16MiB", "disk_path": str(tmp_path / "disk")}
    with cluster_of(1, **small) as cluster, open_repository(str(tmp_path / "place")) as repository:
        node = cluster.nodes["n0"]
        store(cluster, "n0", TREE)
        node.engine.settle()
        frames, promoted = node.storage.frames, []

        def moving(here):
            pieces, far = list(frames(here)), {key for key, _, at in here if at.tier is Tier.DISK}
            with client_of(cluster, "n0") as client:
                for path in TREE if far else ():
                    client.fetch(tokens_of(path, WHOLE))
            node.beat()
            node.engine.settle()
            promoted.extend(key for key in far if Tier.HOST in node.engine.machine.blocks[key].copies)
            return iter(pieces)

        monkeypatch.setattr(node.storage, "frames", moving)
        taken = take(cluster, repository)
        monkeypatch.undo()
        assert promoted, "some block was in host memory before its frame was written"
        assert taken.left == 0
        assert repository.verify() == []
        manifest = repository.read()
        assert {row.codec for row in manifest.rows} > {0}
    with cluster_of(1, host="8MiB") as cluster, open_repository(str(tmp_path / "place")) as repository:
        filled = restored(cluster, repository, manifest)
        assert (filled.damaged, filled.problems) == (0, [])
        assert_all_hit(cluster, "n0", TREE, WHOLE)
