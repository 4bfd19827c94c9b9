"""Checkpoints on a real S3 server, behind a proxy that spoils requests.

They succeed after retries, or fail with a clear error, and are never incomplete.
"""

from collections.abc import Callable
from threading import Event

import pytest

from tests.unit.checkpoint.test_restore import TREE, assert_all_hit, calls_to, cluster_of, restored, store, take
from tests.unit.tiers.s3 import Fault, Proxy, Request, environment, served
from tiered_kv.blocks import Location, Tier
from tiered_kv.checkpoint.leases import marker_of
from tiered_kv.checkpoint.repository import Repository
from tiered_kv.checkpoint.restore import mount
from tiered_kv.checkpoint.take import CheckpointResult
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.checkpoints import loader as filling
from tiered_kv.node.checkpoints import writer as saving
from tiered_kv.node.checkpoints.steps import MountRequest, SnapshotRequest, StopWritingRequest, WriteRequest, WriteStatusRequest
from tiered_kv.tiers.objects import open_store as stores
from tiered_kv.tiers.objects.mounted import MountedBlock

pytest.importorskip("obstore")
pytest.importorskip("moto")

COUNT = len({path[:end] for path in TREE for end in range(1, len(path) + 1)})
PACK_BYTES = 300_000  # four blocks


@pytest.fixture(scope="module", autouse=True)
def credentials():
    with environment(ACCESS_KEY_ID="key-of-test", SECRET_ACCESS_KEY="secret-of-test", ALLOW_HTTP="true") as patch:
        yield patch


@pytest.fixture(scope="module")
def server(credentials):
    with served(credentials) as server:
        yield server


@pytest.fixture(autouse=True)
def no_leaked_files():
    """Replaces the check by an empty one, because connections of a closed store end a moment later.

    The fixture of all tests waits.
    """


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy between the store and its server. Requests that take longer than two seconds fail."""
    running = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)

    def impatient(*arguments, **settings):
        return stores.open_store(*arguments, **settings, read_deadline_s=2, write_deadline_s=2)

    for module in (saving, filling):
        monkeypatch.setattr(module, "open_store", impatient)
    yield running
    running.stop()


class Prefixes:
    number = 0


@pytest.fixture
def repository(proxy):
    Prefixes.number += 1
    with stores.open_store(f"s3://bucket/c{Prefixes.number}", setting="url", read_deadline_s=2, write_deadline_s=2) as store:
        yield Repository(store)


@pytest.fixture
def cluster():
    with cluster_of(2) as cluster:
        store(cluster, "n0", TREE[:6])
        store(cluster, "n1", TREE[4:])
        yield cluster


def taken(cluster, repository: Repository) -> CheckpointResult:
    return take(cluster, repository, pack_bytes=PACK_BYTES)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_blocks_of_two_nodes_are_hits_on_any_number_of_nodes(cluster, repository, nodes: int) -> None:
    first = taken(cluster, repository)
    assert (first.blocks, first.left) == (COUNT, 0)
    assert repository.verify() == []
    with cluster_of(nodes) as other:
        filled = restored(other, repository, repository.read())
        assert (filled.damaged, filled.host) == (0, COUNT)
        for node in other.nodes:
            assert_all_hit(other, node)


def test_blocks_are_hits_before_they_are_filled(cluster, repository) -> None:
    taken(cluster, repository)
    with cluster_of(2) as other:
        manifest = repository.read()
        assert sum(mount(calls_to(other), list(other.nodes), repository.store.url, manifest, manifest.rows).by_node.values()) == COUNT
        other.report_all()
        assert_all_hit(other, "n0")


def times(count: int, fault: Fault, wanted: Callable[[Request], bool]) -> Callable[[Request], Fault | None]:
    """Returns a function that gives the fault for the first `count` wanted requests."""
    left = [count]

    def spoil(request: Request) -> Fault | None:
        if not wanted(request) or not left[0]:
            return None
        left[0] -= 1
        return fault

    return spoil


def is_pack_put(request: Request) -> bool:
    return request.method == "PUT" and request.name.endswith(".pack")


PASSING = {
    "500": Fault(500, "InternalError"),
    "503": Fault(503, "SlowDown"),
    "500 for what was done": Fault(500, "InternalError", passed_on=True),
    "an ETag that is wrong": Fault(etag='"0"'),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_temporary_faults_are_retried(cluster, proxy, repository, fault: Fault) -> None:
    seen = []

    def spoil(request: Request) -> Fault | None:
        key = request.method, request.name
        if key in seen:
            return None
        seen.append(key)
        return fault

    proxy.spoil = spoil
    first = taken(cluster, repository)
    proxy.spoil = lambda _: None
    assert first.blocks == COUNT
    assert repository.names() == [first.name] == [repository.latest()]
    assert repository.verify() == []
    assert taken(cluster, repository).new_packs == 0


LASTING = {
    "500": (Fault(500, "InternalError"), "500"),
    "503": (Fault(503, "SlowDown"), "SlowDown"),
    "403": (Fault(403, "ExpiredToken"), "ExpiredToken"),
    "404": (Fault(404, "NoSuchBucket"), "no such bucket"),
    "no answer": (Fault(hangs=True), "no answer in time"),
}


@pytest.mark.parametrize("at", ["pack", "manifest", "listing"])
@pytest.mark.parametrize(("fault", "said"), LASTING.values(), ids=LASTING)
def test_permanent_faults_fail_with_a_clear_error_and_the_next_checkpoint_continues(cluster, proxy, repository, fault, said, at) -> None:
    done = []

    def spoil(request: Request) -> Fault | None:
        if at == "listing":
            return fault if request.method == "GET" and not request.name else None
        if at == "manifest":
            return fault if request.method == "PUT" and request.name.endswith(".tkv") else None
        done.append(is_pack_put(request))
        return fault if sum(done) > 2 and is_pack_put(request) else None

    proxy.spoil = spoil
    with pytest.raises(TieredKVError) as caught:
        taken(cluster, repository)
    assert caught.value.kind is Kind.STORAGE
    assert caught.value.context["setting"] == "url"
    assert repository.store.url in str(caught.value)
    assert said in str(caught.value)
    assert "secret-of-test" not in str(caught.value)
    assert at != "pack" or str(caught.value).startswith(("n0: checkpoint: ", "n1: checkpoint: "))
    proxy.spoil = lambda _: None
    assert repository.names() == []
    there = {name for name in repository.store.sizes() if name.endswith(".pack")}
    before = len(proxy.seen)
    after = taken(cluster, repository)
    assert after.blocks == COUNT
    again = [each.name for each in proxy.seen[before:] if is_pack_put(each)]
    assert not there & set(again), "a pack that is there is not written again"
    assert len(again) == len(set(again)) == after.new_packs
    assert repository.verify() == []
    assert not [name for name in repository.store.sizes() if marker_of(name)], "leases are given back"


def test_credentials_that_expire_at_any_request_end_the_checkpoint(cluster, proxy, repository) -> None:
    failed = 0
    while True:
        end = len(proxy.seen) + 3 * failed
        proxy.spoil = lambda request, end=end: Fault(403, "ExpiredToken") if request.number >= end else None
        try:
            done = taken(cluster, repository)
        except TieredKVError as error:
            reason = str(error)
        else:
            break
        finally:
            proxy.spoil = lambda _: None
        failed += 1
        assert "ExpiredToken" in reason
        assert repository.verify() == []
    assert failed > 3
    assert done.blocks == COUNT
    assert sorted(name for name in proxy.written if name.endswith(".pack")) == sorted(pack for pack, _ in repository.read().packs)


def test_a_missing_bucket_is_reported_at_once(cluster, proxy) -> None:
    with stores.open_store("s3://nowhere/prefix", setting="url", write_deadline_s=2) as missing, pytest.raises(TieredKVError) as caught:
        taken(cluster, Repository(missing))
    assert str(caught.value).startswith("checkpoint: s3://nowhere/prefix ")
    assert "there is no such bucket" in str(caught.value)
    assert cluster.nodes["n0"].engine.on_gone is None, "nothing is set aside any more"


@pytest.mark.parametrize("fault", [Fault(cut=1), Fault(cut=20_000), Fault(500, "InternalError")], ids=["a byte", "many bytes", "500"])
def test_failed_reads_cost_time_or_blocks_but_give_no_wrong_data(cluster, proxy, repository, fault) -> None:
    taken(cluster, repository)
    manifest = repository.read()
    proxy.spoil = times(1, fault, lambda request: request.method == "GET" and request.name.endswith(".pack"))
    with cluster_of(1) as other:
        filled = restored(other, repository, manifest)
        assert (filled.damaged, filled.host) == (0, COUNT)
        assert_all_hit(other, "n0")


def test_filling_without_answers_ends_with_an_error_and_mounted_blocks_stay(cluster, proxy, repository) -> None:
    taken(cluster, repository)
    manifest = repository.read()
    proxy.spoil = times(1000, Fault(hangs=True), lambda request: request.method == "GET" and request.name.endswith(".pack"))
    with cluster_of(1) as other:
        with pytest.raises(TieredKVError, match="no answer in time"):
            restored(other, repository, manifest)
        proxy.spoil = times(0, Fault(), lambda _: False)
        assert_all_hit(other, "n0")


def test_bytes_flipped_in_transit_cost_only_their_blocks(cluster, proxy, repository) -> None:
    taken(cluster, repository)
    manifest = repository.read()
    proxy.spoil = times(1, Fault(flip=True), lambda request: request.method == "GET" and request.name.endswith(".pack"))
    with cluster_of(1) as other:
        filled = restored(other, repository, manifest)
        assert (filled.damaged, filled.host) == (1, COUNT - 1)
        with pytest.raises(AssertionError):
            assert_all_hit(other, "n0")


def test_an_outdated_listing_is_waited_for(cluster, proxy, repository, monkeypatch) -> None:
    class Lagging:
        """A store whose listings show the state of the previous listing."""

        def __init__(self, store) -> None:
            self._store, self.url, self.setting, self.last = store, store.url, store.setting, store.sizes()

        def __getattr__(self, name: str):
            return getattr(self._store, name)

        def sizes(self) -> dict[str, int]:
            self.last, shown = self._store.sizes(), self.last
            return shown

    said = []
    lagging = Repository(Lagging(repository.store), sleep=said.append)
    first = taken(cluster, lagging)
    assert said
    assert repository.names() == [first.name]
    assert repository.verify() == []
    second = taken(cluster, lagging)
    assert second.blocks == first.blocks
    assert lagging.latest() == second.name
    assert repository.verify() == []


def test_nodes_write_and_read_with_the_credentials_of_the_caller(cluster, proxy, repository, monkeypatch) -> None:
    cluster.nodes["n0"].checkpoint(SnapshotRequest())
    key = cluster.nodes["n0"].engine.machine.blocks
    proxy.keys.clear()
    mine = {"AWS_ACCESS_KEY_ID": "asking", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": proxy.url, "AWS_ALLOW_HTTP": "true"}
    cluster.nodes["n0"].checkpoint(WriteRequest(repository.store.url, list(key)[:3], None, PACK_BYTES, mine))
    done = Event()
    while not cluster.nodes["n0"].checkpoint(WriteStatusRequest()).is_done:
        done.wait(0.01)
    cluster.nodes["n0"].checkpoint(StopWritingRequest())
    assert proxy.keys == {"asking"}
    taken(cluster, repository)
    proxy.keys.clear()
    manifest = repository.read()
    with cluster_of(1) as other:
        names = [name for name, _ in manifest.packs]
        blocks = [
            MountedBlock(
                row.info,
                Location(Tier.CHECKPOINT, row.codec, row.pack, row.offset, row.stored_bytes, row.raw_bytes),
            )
            for row in manifest.rows
        ]
        other.nodes["n0"].checkpoint(MountRequest(repository.store.url, names, blocks, {}, mine))
        proxy.keys.clear()
        assert_all_hit(other, "n0")
        assert proxy.keys == {"asking"}
