"""The device pool of one life of a node is never read through the index of another."""

import shutil

from tests.unit.serving.prompts import LAYOUT
from tiered_kv.client.reader import DeviceReader
from tiered_kv.memory.view import NodeView

DEVICE = {"host": "4MiB", "device": "1MiB:cpu"}


def test_a_worker_whose_nodes_files_were_removed_does_not_read_the_pool_of_the_next_node(node_factory, checked) -> None:
    """Both nodes are the first writers of their files, so their generations are equal."""
    former = node_factory(cluster_id="lives", **DEVICE)
    view = checked(NodeView.open(former.directory))
    assert DeviceReader(view, LAYOUT).blocks() is not None
    late = DeviceReader(view, LAYOUT)
    shutil.rmtree(former.directory)
    former.close(remove=False)
    node_factory(cluster_id="lives", **DEVICE)
    now = checked(NodeView.open(former.directory))
    assert now.generation == view.generation
    assert late.blocks() is None
    assert DeviceReader(now, LAYOUT).blocks() is not None
