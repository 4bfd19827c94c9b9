"""Two clusters write checkpoints to one store at the same time, and one of them deletes old ones."""

from threading import Event, Thread

import pytest

from tests.unit.checkpoint.checkpoints import Clock
from tests.unit.checkpoint.hooked import Hooked, Shared, Step
from tests.unit.checkpoint.test_restore import TREE, assert_all_hit, calls_to, cluster_of, restored, store
from tiered_kv.checkpoint.garbage_collection import CollectionResult
from tiered_kv.checkpoint.repository import Repository
from tiered_kv.checkpoint.take import CheckpointJob, CheckpointResult
from tiered_kv.errors import TieredKVError
from tiered_kv.node.checkpoints import loader as filling
from tiered_kv.node.checkpoints import writer as saving
from tiered_kv.node.checkpoints.steps import SnapshotRequest, StopWritingRequest, WriteRequest, WriteStatusRequest

PACK_BYTES = 300_000  # four blocks
OWN = {"one": TREE[:8], "other": [*TREE[3:], *((turn, 7) for turn in range(20, 24))]}
COUNTS = {name: len({path[:end] for path in paths for end in range(1, len(path) + 1)}) for name, paths in OWN.items()}


@pytest.fixture(scope="module")
def clusters():
    """Two clusters with their own blocks, and some blocks that both have."""
    with cluster_of(1) as one, cluster_of(2) as other, pytest.MonkeyPatch.context() as patch:
        store(one, "n0", OWN["one"])
        for number, path in enumerate(OWN["other"]):
            store(other, f"n{number % 2}", [path])
        ways = {}
        patch.setattr(saving, "open_store", lambda url, **_: ways[url])
        patch.setattr(filling, "open_store", lambda url, **_: ways[url])
        both = {"one": Cluster(one, ways), "other": Cluster(other, ways)}
        for each in both.values():
            each.at(Shared(), Clock())
            each.take()  # starts the threads that nodes keep running
        yield both


class Cluster:
    """A cluster and its access to a shared store."""

    def __init__(self, cluster, ways: dict[str, Hooked]) -> None:
        self.cluster = cluster
        self._ways = ways

    def at(self, shared: Shared, clock: Clock, hook=lambda _: None, sleep=None) -> "Cluster":
        self.hooked = Hooked(shared, hook)
        self.hooked.url = f"memory://{id(self)}"
        self._ways[self.hooked.url] = self.hooked
        self.repository = Repository(self.hooked, clock, sleep or clock.sleep)
        return self

    def take(self) -> CheckpointResult:
        nodes = list(self.cluster.nodes)
        job = CheckpointJob(calls_to(self.cluster), nodes, self.repository, origin="test", pack_bytes=PACK_BYTES, poll_s=0.001)
        return job.take()


class Beside:
    """Work in a second thread, while the first one is paused.

    `begin` returns when the work has ended or waits. `end` lets it continue, and returns when it has ended.
    """

    def __init__(self, work) -> None:
        self._work = work
        self._paused = Event()
        self._may_go_on = Event()
        self.failure: BaseException | None = None
        self._thread = Thread(target=self._run)

    def begin(self) -> None:
        self._thread.start()
        assert self._paused.wait(60)

    def sleep(self, _: float) -> None:
        self._paused.set()
        assert self._may_go_on.wait(60)

    def end(self) -> None:
        self._may_go_on.set()
        if self._thread.ident is not None:
            self._thread.join(60)
            assert not self._thread.is_alive()
        if self.failure:
            raise self.failure

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 (raised by `end`)
            self.failure = error
        finally:
            self._paused.set()


def at_step(number: int, act):
    """Returns a hook that calls `act` once, at step `number`."""
    done = []

    def hook(step: Step) -> None:
        if step.number >= number and not done:
            done.append(step)
            act()

    hook.done = done
    return hook


def assert_whole(shared: Shared, **taken: CheckpointResult) -> None:
    """Assert that the store verifies, and that each checkpoint has all blocks of its cluster."""
    repository = Repository(shared)
    assert repository.verify() == []
    for name, each in taken.items():
        assert (each.blocks, each.left, each.orphans) == (COUNTS[name], 0, 0)
        assert len(repository.read(each.name).rows) == COUNTS[name]


def test_a_whole_checkpoint_of_another_between_any_two_steps(clusters) -> None:
    one, other = clusters["one"], clusters["other"]
    for number in range(1000):
        shared, clock, second = Shared(), Clock(), []
        other.at(shared, clock)

        def act(second=second) -> None:
            second.append(other.take())
            second.append(other.repository.collect(1))

        hook = at_step(number, act)
        first = one.at(shared, clock, hook).take()
        if not hook.done:
            break
        assert_whole(shared, one=first, other=second[0])
        assert second[1] == CollectionResult(skipped=second[1].skipped)
    assert number > 15


def test_a_whole_checkpoint_between_any_two_steps_of_a_collector(clusters) -> None:
    one, other = clusters["one"], clusters["other"]
    waited = 0
    for number in range(1000):
        shared, clock, taken = Shared(), Clock(), []
        one.at(shared, clock).take()
        clock.now += 1
        second = other.at(shared, clock).take()
        clock.now += 1
        beside = Beside(lambda taken=taken: taken.append(one.take()))
        one.at(shared, clock, sleep=beside.sleep)
        hook = at_step(number, beside.begin)
        collected = other.at(shared, clock, hook).repository.collect(1)
        waited += bool(hook.done) and not taken
        beside.end()
        if not hook.done:
            break
        (third,) = taken
        assert_whole(shared, one=third)
        assert collected.manifests_deleted in (0, 1, 2)
        assert (collected.manifests_deleted == 0) == bool(collected.skipped)
        assert (second.name in Repository(shared).names()) == (collected.manifests_deleted < 2), "the newest of all is kept"
    assert number > 8
    assert waited > 3


def test_of_two_checkpoints_of_one_cluster_at_least_one_succeeds_and_the_other_is_told_to_wait(clusters) -> None:
    same = clusters["other"]
    outcomes = set()
    for number in range(1000):
        shared, clock, ended = Shared(), Clock(), []

        def attempt(hooked: Hooked, shared=shared, clock=clock) -> CheckpointResult | str:
            repository = Repository(hooked, clock, clock.sleep)
            nodes = list(same.cluster.nodes)
            try:
                return CheckpointJob(calls_to(same.cluster), nodes, repository, origin="test", pack_bytes=PACK_BYTES, poll_s=0.001).take()
            except TieredKVError as error:
                return str(error)

        same.at(shared, clock)
        inner = Hooked(shared)
        inner.url = same.hooked.url
        hook = at_step(number, lambda ended=ended, inner=inner, attempt=attempt: ended.append(attempt(inner)))
        same.hooked.hook = hook
        ended.append(attempt(same.hooked))
        if not hook.done:
            break
        good = [each for each in ended if isinstance(each, CheckpointResult)]
        assert good, ended
        assert all("another checkpoint" in each for each in ended if isinstance(each, str)), ended
        assert_whole(shared, other=good[0])
        outcomes.add(tuple(isinstance(each, CheckpointResult) for each in ended))
    assert outcomes >= {(True, True), (False, True)}
    assert not any(node.engine.on_gone for node in same.cluster.nodes.values())


def test_a_snapshot_belongs_to_its_ticket_until_the_caller_stops_polling(clusters, monkeypatch) -> None:
    same = clusters["other"].at(Shared(), Clock())
    ask = calls_to(same.cluster)

    def snapshot(ticket: str):
        return ask(["n0"], SnapshotRequest(None, 0, ticket))["n0"]

    def save(ticket: str):
        return ask(["n0"], WriteRequest(same.hooked.url, [], None, PACK_BYTES, None, ticket))["n0"]

    assert snapshot("first").blocks
    assert "another checkpoint" in str(snapshot("second"))
    ask(["n0"], StopWritingRequest("second"))
    monkeypatch.setattr(saving, "UNASKED_S", -1.0)
    assert snapshot("second").blocks
    assert "another checkpoint was begun" in str(save("first"))
    ask(["n0"], StopWritingRequest("first"))
    monkeypatch.undo()
    monkeypatch.setattr(saving, "open_store", lambda *_, **__: same.hooked)
    assert save("second") is None
    assert "another checkpoint was begun" in str(ask(["n0"], WriteStatusRequest(0, "first"))["n0"])
    assert ask(["n0"], WriteStatusRequest(0, "second"))["n0"].error is None
    ask(["n0"], StopWritingRequest("second"))


def test_repeated_checkpoints_of_two_clusters_while_one_deletes(clusters) -> None:
    shared, clock = Shared(), Clock()
    one, other = clusters["one"].at(shared, clock), clusters["other"].at(shared, clock)
    taken: dict[str, list[CheckpointResult]] = {"one": [], "other": []}
    collected: list[CollectionResult] = []

    def work(name: str, each: Cluster) -> None:
        for _ in range(12):
            clock.now += 0.001
            taken[name].append(each.take())
            if name == "one":
                collected.append(each.repository.collect(1))

    both = [Beside(lambda name=name, each=each: work(name, each)) for name, each in (("one", one), ("other", other))]
    for each in both:
        each._thread.start()
    for each in both:
        each.end()
    clock.now += 1
    last = one.take()
    assert one.repository.collect(1).skipped == ""
    assert_whole(shared, one=last)
    assert Repository(shared).names() == [last.name]
    named = {pack for pack, _ in Repository(shared).read().packs}
    assert {name for name in shared.sizes() if name.endswith(".pack")} == named, "all else is deleted, and the leases too"
    assert len(shared.sizes()) == len(named) + 2
    with cluster_of(1) as fresh:
        restored(fresh, one.repository, one.repository.read())
        assert_all_hit(fresh, "n0", OWN["one"])
    for name, each in taken.items():
        assert {(one.blocks, one.left) for one in each} == {(COUNTS[name], 0)}
