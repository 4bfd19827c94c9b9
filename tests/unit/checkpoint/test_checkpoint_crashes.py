"""Checkpoints and collecting that are killed at any step: listed checkpoints are complete, and the next one continues."""

import pytest

from tests.unit.checkpoint.checkpoints import Clock
from tests.unit.checkpoint.hooked import Crash, Death, Hooked, Shared, Step, repository_of
from tests.unit.checkpoint.test_restore import TREE, calls_to, cluster_of, store
from tiered_kv.checkpoint.leases import SKEW_S, TTL_S
from tiered_kv.checkpoint.repository import Repository
from tiered_kv.checkpoint.take import CheckpointJob, CheckpointResult
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.checkpoints import writer as saving
from tiered_kv.node.checkpoints.steps import StopWritingRequest

PACK_BYTES = 300_000  # four blocks
COUNT = len({path[:end] for path in TREE for end in range(1, len(path) + 1)})


@pytest.fixture(scope="module")
def cluster():
    """Two nodes that have one part of the tree each, and some blocks both."""
    with cluster_of(2) as cluster:
        store(cluster, "n0", TREE[:6])
        store(cluster, "n1", TREE[4:])
        with pytest.MonkeyPatch.context() as patch:
            taken(cluster, Hooked(Shared()), patch)  # starts the threads that nodes keep running
        yield cluster


@pytest.fixture(scope="module")
def earlier():
    """A store with a checkpoint of a part of these blocks."""
    shared = Shared()
    with cluster_of(1) as cluster, pytest.MonkeyPatch.context() as patch:
        store(cluster, "n0", TREE[:3])
        taken(cluster, Hooked(shared), patch)
    return shared


def taken(cluster: InProcessCluster, hooked: Hooked, patch: pytest.MonkeyPatch, clock: Clock | None = None) -> CheckpointResult:
    """Write a checkpoint with a driver and nodes that use `hooked` as their store, until its hook kills them."""
    patch.setattr(saving, "open_store", lambda *_, **__: hooked)
    ask = calls_to(cluster)

    def ask_while_alive(*arguments):
        if getattr(hooked.hook, "dead", False):
            raise Crash
        return ask(*arguments)

    nodes = list(cluster.nodes)
    repository = repository_of(hooked, clock or Clock())
    return CheckpointJob(ask_while_alive, nodes, repository, origin="test", pack_bytes=PACK_BYTES, poll_s=0.001).take()


def settled(cluster: InProcessCluster) -> None:
    """Stop the writing of all nodes, as they do by themselves if their driver has died."""
    for node in cluster.nodes.values():
        node.checkpoint(StopWritingRequest())


def assert_whole(shared: Shared) -> None:
    assert Repository(shared).verify() == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_checkpoint_killed_at_any_step_is_complete_or_absent_and_the_next_writes_no_pack_again(
    cluster, earlier, monkeypatch, after
) -> None:
    ended = []
    for step in range(1000):
        shared, clock = earlier.copy(), Clock()
        clock.now += 1000
        try:
            taken(cluster, Hooked(shared, Death(step, after)), monkeypatch, clock)
        except (Crash, TieredKVError) as error:  # TieredKVError: from a node whose thread has died
            ended.append(error)
        else:
            break
        settled(cluster)
        assert_whole(shared)
        assert 1 <= len(Repository(shared).names()) <= 2
        clock.now += 1
        second = taken(cluster, Hooked(shared), monkeypatch, clock)
        assert (second.blocks, second.left) == (COUNT, 0)
        assert set(shared.puts.values()) <= {1, 0}, "a pack was written twice"
        assert Repository(shared).latest() == second.name
        assert_whole(shared)
        assert Repository(shared).read().rows
    assert step > 20
    assert {type(error) for error in ended} >= {Crash}


def test_a_checkpoint_killed_between_manifest_and_latest_is_valid(cluster, earlier, monkeypatch) -> None:
    shared = earlier.copy()
    (old,) = Repository(shared).names()

    class AtLatest(Death):
        def __call__(self, step: Step) -> None:
            if self.dead or (step.name == "LATEST" and step.call == "put"):
                self.dead = True
                raise Crash

    clock = Clock()
    clock.now += 1000
    with pytest.raises(Crash):
        taken(cluster, Hooked(shared, AtLatest(0, False)), monkeypatch, clock)
    settled(cluster)
    assert Repository(shared).pointed() == old
    assert Repository(shared).latest() != old
    assert len(Repository(shared).read().rows) == COUNT
    again = taken(cluster, Hooked(shared), monkeypatch, clock)
    assert (again.new_packs, again.blocks) == (0, COUNT)


def test_a_failed_put_of_a_node_ends_the_checkpoint_and_the_next_continues(cluster, earlier, monkeypatch) -> None:
    for failing in range(100):
        shared = earlier.copy()
        puts = []

        def hook(step: Step, failing=failing, puts=puts, shared=shared) -> None:
            if step.call == "put" and step.name.endswith(".pack") and not step.done:
                puts.append(step.name)
                if len(puts) > failing:
                    raise shared.failed(f"put {step.name}", "no space left")

        try:
            done = taken(cluster, Hooked(shared, hook), monkeypatch)
        except TieredKVError as error:
            reason = error
        else:
            break
        assert reason.kind is Kind.STORAGE
        assert str(reason).startswith(("n0: objects: memory:// put", "n1: objects: memory:// put"))
        assert len(Repository(shared).names()) == 1
        assert_whole(shared)
        second = taken(cluster, Hooked(shared), monkeypatch)
        assert second.blocks == COUNT
        assert set(shared.puts.values()) <= {1, 0}
        assert_whole(shared)
    assert done.new_packs == failing > 2


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_collector_killed_at_any_step_deletes_nothing_that_is_needed(cluster, earlier, monkeypatch, after) -> None:
    full, clock = earlier.copy(), Clock()
    clock.now += 1000
    newest = taken(cluster, Hooked(full), monkeypatch, clock).name
    for step in range(1000):
        shared, later = full.copy(), Clock()
        later.now = clock.now + 1
        try:
            repository_of(Hooked(shared, Death(step, after)), later).collect(1)
        except Crash:
            pass
        else:
            break
        assert_whole(shared)
        assert Repository(shared).latest() == newest
        begun = later.now
        third = taken(cluster, Hooked(shared), monkeypatch, later)
        assert later.now - begun <= TTL_S + SKEW_S + 1, "who comes waits until the dead one's mark has run out, at most"
        assert (third.blocks, third.new_packs) == (COUNT, 0)
        repository_of(shared, later).collect(1)
        assert_whole(shared)
        assert Repository(shared).names() == [third.name]
    assert step > 5
    assert Repository(shared).names() == [newest]
    assert_whole(shared)


def test_the_store_is_read_before_nodes_take_snapshots(cluster, earlier, monkeypatch) -> None:
    """Nodes drop a snapshot that is not written for a minute, and reading a store with many checkpoints takes long."""
    setting_aside = []

    def hook(step: Step) -> None:
        if step.call == "get" and step.name.endswith(".tkv"):
            setting_aside.append(any(node.engine.on_gone for node in cluster.nodes.values()))

    assert taken(cluster, Hooked(earlier.copy(), hook), monkeypatch).blocks == COUNT
    assert setting_aside == [False, False]


def test_a_second_checkpoint_with_few_new_blocks_writes_little(monkeypatch) -> None:
    paths = [(turn, 1) for turn in range(100)]
    shared = Shared()
    with cluster_of(1, host="32MiB") as cluster:
        store(cluster, "n0", paths)
        first = taken(cluster, Hooked(shared), monkeypatch)
        before = dict(shared.sizes())
        store(cluster, "n0", [(turn, 1) for turn in range(100, 105)])
        second = taken(cluster, Hooked(shared), monkeypatch)
    new_bytes = sum(nbytes for name, nbytes in shared.sizes().items() if name not in before)
    assert (first.blocks, second.blocks, second.new_blocks) == (200, 210, 10)
    assert second.written_bytes <= new_bytes <= 0.08 * sum(before.values()), "the manifest is of that, too"
