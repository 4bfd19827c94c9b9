"""A worker whose node changes: other files under the same path, a node that hangs, and one that restarts."""

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.unit.serving.processes import NodeProcess, until
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv.blocks import Stored
from tiered_kv.client.connect import client_of
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.node_record import FILE_NAME, read_record
from tiered_kv.protocol.unix_socket import SocketSession

pytestmark = pytest.mark.usefixtures("nursery")

PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)
OTHER = (5, 6, 7)
LATE_S = 0.5
"""How long after its deadline a call may end, on a busy machine. Without a deadline it would take several seconds."""


@pytest.fixture
def node():
    with NodeProcess() as node:
        yield node


@pytest.fixture
def client(node, checked):
    return checked(client_of(node.info, LAYOUT, NAMESPACE))


def stored_again(client, path) -> None:
    until(lambda: client.store(tokens_of(path), kv_of(path)).refused == 0, "stores work again", 10.0)
    assert assert_is_prefix(client.fetch(tokens_of(path)), path) == len(path)


# Other files under the same path (W1)


@pytest.mark.parametrize("removed", ["while it was dead", "while it ran", "for another size"])
def test_a_worker_never_stores_through_files_that_the_node_does_not_have(node, client, checked, removed: str) -> None:
    """The directory is removed or replaced while a worker runs. Others read only stored blocks, and the worker gets hits again."""
    client.store(TOKENS, KV)
    if removed == "while it ran":
        shutil.rmtree(node.info["directory"])
    node.kill()
    if removed == "while it was dead":
        shutil.rmtree(node.info["directory"])
    node.start(**({"host": "8MiB"} if removed == "for another size" else {}))
    other = checked(client_of(node.info, LAYOUT, NAMESPACE))
    assert other.match(TOKENS).tokens == 0
    for path in [(number, 1, 2) for number in range(50, 60)]:
        client.store(tokens_of(path), kv_of(path))
        assert_is_prefix(other.fetch(tokens_of(path)), path)
    stored_again(client, OTHER)
    assert assert_is_prefix(other.fetch(tokens_of(OTHER)), OTHER) == len(OTHER)
    other.store(TOKENS, KV)
    assert assert_is_prefix(client.fetch(TOKENS), PATH) == len(PATH)


@pytest.mark.parametrize("how", ["a copy", "an older copy", "another arena", "no arena", "no index"])
def test_a_worker_never_stores_beside_a_copy_of_its_files(node, client, checked, how: str) -> None:
    """A backup of the directory, or of a file, takes its place while the node is dead: who maps the former ones finds the new ones."""
    directory = Path(node.info["directory"])
    backup = directory.with_name(f"{directory.name}.backup")
    client.store(TOKENS, KV)
    if how == "an older copy":
        shutil.copytree(directory, backup, ignore=shutil.ignore_patterns("sock"))
        node.kill()
        node.start()
    node.kill()
    if how == "a copy":
        shutil.copytree(directory, backup, ignore=shutil.ignore_patterns("sock"))
    if backup.exists():
        shutil.rmtree(directory)
        backup.rename(directory)
    elif how == "another arena":
        shutil.copy(directory / "arena", directory / "new")
        (directory / "new").rename(directory / "arena")
    else:
        (directory / how.removeprefix("no ")).unlink()
    node.start()
    other = checked(client_of(node.info, LAYOUT, NAMESPACE))
    for path in [(number, 1, 2) for number in range(50, 60)]:
        client.store(tokens_of(path), kv_of(path))
        assert_is_prefix(other.fetch(tokens_of(path)), path)
    stored_again(client, OTHER)
    assert assert_is_prefix(other.fetch(tokens_of(OTHER)), OTHER) == len(OTHER)


def test_files_are_in_place_only_with_all_their_names(node_factory) -> None:
    node = node_factory()
    arena = Path(node.directory) / "arena"
    assert node.storage._files.is_in_place()
    arena.rename(arena.with_name("aside"))
    assert not node.storage._files.is_in_place()
    arena.with_name("aside").rename(arena)
    assert node.storage._files.is_in_place()


def test_a_view_that_is_not_live_never_stores(node_factory, client_factory) -> None:
    node = node_factory()
    client = client_factory(node, LAYOUT, NAMESPACE)
    session = node.open_session()
    client._source._view._header[7] = 2  # the state: closed
    with pytest.raises(TieredKVError, match="closed the files") as refusal:
        client._holder.present.writer.write(session, bytes(32), [bytes(32)], [0], KV, 0, 1.0)
    assert refusal.value.kind is Kind.TRANSPORT
    session.close()
    client._source._view._header[7] = 1


def test_a_worker_that_only_reads_finds_the_successor_of_a_dead_node(node, client, checked) -> None:
    """The worker makes no call to the node. It notices that the heartbeat has stopped."""
    client.store(TOKENS, KV)
    node.kill()
    assert assert_is_prefix(client.fetch(TOKENS), PATH) == len(PATH), "memory is read on"
    shutil.rmtree(node.info["directory"])
    node.start()
    other = checked(client_of(node.info, LAYOUT, NAMESPACE))
    other.store(tokens_of(OTHER), kv_of(OTHER))
    until(lambda: client.fetch(tokens_of(OTHER)).tokens > 0, "it hits in the new files", 10.0)
    assert assert_is_prefix(client.fetch(tokens_of(OTHER)), OTHER) == len(OTHER)
    assert client.fetch(TOKENS).tokens == 0


def test_a_running_call_finishes_with_the_files_it_started_with(node_factory, cluster_of_one) -> None:
    """The next access replaces the old one during the call. The old one is closed when the call has ended, not before."""
    cluster, client = cluster_of_one
    client.store(TOKENS, KV)
    before, entered, gate = client._holder.present, threading.Event(), threading.Event()
    source, read = before.source, before.source.read
    del before

    def slow(*arguments):
        entered.set()
        assert gate.wait(30)
        return read(*arguments)

    source.read = slow
    fetched = []
    thread = threading.Thread(target=lambda: fetched.append(client.fetch(TOKENS)))
    thread.start()
    assert entered.wait(30)
    cluster.nodes["n0"].close(remove=True)
    cluster.start_node("n0")
    assert client.fetch(TOKENS).tokens == 0
    assert client._source is not source
    assert client.store(tokens_of(OTHER), kv_of(OTHER)) == Stored(3, 0, 0)
    assert source._view.arena is not None, "in use"
    gate.set()
    thread.join(30)
    assert assert_is_prefix(fetched[0], PATH) == len(PATH)
    assert client.fetch(tokens_of(OTHER)).tokens == 3 * LAYOUT.block_tokens
    with pytest.raises(TieredKVError, match="closed"):
        _ = source._view.arena
    assert client.own_stats()["node_calls"] == client.node_calls == 2


@pytest.fixture
def cluster_of_one(checked):
    from tiered_kv.config import Config
    from tiered_kv.embedded import InProcessCluster

    cluster = checked(InProcessCluster(Config(host=1 << 20)))
    return cluster, checked(cluster.client("n0", LAYOUT, NAMESPACE))


def test_a_clients_profile_includes_the_next_node(cluster_of_one) -> None:
    cluster, client = cluster_of_one
    stages = []

    def timed(stage: str, call):
        def counted(*arguments):
            stages.append(stage)
            return call(*arguments)

        return counted

    client.measure(timed)
    cluster.nodes["n0"].close(remove=True)
    cluster.start_node("n0")
    assert client.store(TOKENS, KV) == Stored(4, 0, 0)
    assert client.fetch(TOKENS).tokens == 4 * LAYOUT.block_tokens
    assert set(stages) == {"hash", "look-up", "store", "copy"}


def test_memory_of_an_ended_node_is_released(node, client) -> None:
    """The next node may need it, because `host` is most of a machine's memory."""
    client.store(TOKENS, KV)
    arena = f"{node.info['directory']}/arena"
    assert arena in Path("/proc/self/maps").read_text()
    node.close()
    assert client.fetch(TOKENS).tokens == 0
    until(lambda: arena not in Path("/proc/self/maps").read_text(), "the arena is unmapped")
    assert client.fetch(TOKENS).tokens == client.match(TOKENS).tokens == 0
    assert client.store(TOKENS, KV) == Stored(0, 0, 4)
    assert client.explain(TOKENS)[0].reason == "the node is closed"
    assert client.stats()["node"] is None
    with pytest.raises(TieredKVError, match="kv"):
        client.store(TOKENS, KV[:1])
    node.start()
    stored_again(client, OTHER)
    assert client.store(TOKENS, KV) == Stored(4, 0, 0)


# A node that hangs (S2)


def timed(call) -> tuple[float, object]:
    begun_s = time.monotonic()
    answer = call()
    return time.monotonic() - begun_s, answer


@pytest.fixture
def hung(checked):
    """A node that hangs, with peers according to its index, and a client that has used it."""
    with NodeProcess(store_wait_ms=100, fetch_deadline_ms=50) as node:
        client = checked(client_of(node.info, LAYOUT, NAMESPACE))
        client.store(TOKENS, KV)
        node.stop()
        client._source._view._header[9] = 1  # the word of peers
        yield node, client
        node.go_on()


def test_no_call_to_a_hanging_node_exceeds_its_deadline(hung) -> None:
    node, client = hung
    new = tokens_of(OTHER)
    heartbeat = client._source._view.heartbeat_ns
    calls = {
        "fetch": (lambda: client.fetch(new, deadline_ms=50), 0.05),
        "store": (lambda: client.store(new, kv_of(OTHER)), 0.1),
        "match": (lambda: client.match(new), 0.05),
        "explain": (lambda: client.explain(new), 0.05),
        "stats": (lambda: client.stats(), 0.05),
        "hint": (lambda: client.store(TOKENS, KV, hint=tiered_hint()), 0.1),
    }
    for name, (call, deadline_s) in calls.items():
        client._pool.revive()  # as if it had never been silent
        took_s, _ = timed(call)
        assert took_s < deadline_s + LATE_S, name
    client._pool.revive()
    record = client.explain(new)[0]
    assert (record.why, record.reason) == ("node_silent", "the node of this machine does not answer")
    for name, (call, _) in calls.items():
        took_s, _ = timed(call)
        assert took_s < LATE_S / 5, f"{name}: answered here, the node having been silent"
    assert client._source._view.heartbeat_ns == heartbeat
    assert assert_is_prefix(client.fetch(TOKENS), PATH) == len(PATH), "memory is read on"
    client._source._view._header[9] = 0
    node.go_on()
    stored_again(client, OTHER)


def tiered_hint():
    from tiered_kv import Hint

    return Hint(answer_tokens=5)


def refusal_of(path: str) -> TieredKVError:
    """Returns the error of a session that is given 0.1 s to connect."""
    with pytest.raises(TieredKVError) as refusal:
        SocketSession(path, 0.1)
    return refusal.value


def test_connecting_and_the_first_exchange_count_toward_the_timeout(hung) -> None:
    node, _ = hung
    took_s, error = timed(lambda: refusal_of(f"{node.info['directory']}/sock"))
    assert took_s < 0.1 + LATE_S
    assert error.kind is Kind.TRANSPORT
    assert error.context["timed_out"]


def test_an_answer_in_pieces_gets_no_more_time_than_a_whole_one(tmp_path) -> None:
    path = str(tmp_path / "s")
    end = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall((1000).to_bytes(4, "little"))
            while not end.wait(0.02):
                connection.sendall(b"x")

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        try:
            took_s, error = timed(lambda: refusal_of(path))
        finally:
            end.set()
            thread.join(30)
    assert took_s < 0.1 + LATE_S
    assert error.context["timed_out"]


# The record beside the socket (S1)


def test_a_record_has_what_a_worker_needs_and_only_its_owner_may_write_it(node) -> None:
    record = read_record(node.info["directory"])
    assert record.info == node.info
    assert record.pid == node.process.pid
    assert (record.cluster, record.cluster_id) == (node.cluster, node.cluster_id)
    assert record.age_s(time.monotonic_ns()) < 2
    path = Path(node.info["directory"]) / FILE_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    whole = path.read_text()
    for bad in ("", "{", "[]", "7", '{"format": 1}', whole.replace('"format": 1', '"format": 9'), whole.replace('"pid": ', '"pod": ')):
        path.write_text(bad)
        assert read_record(node.info["directory"]) is None
    path.write_text(whole)
    path.parent.chmod(0o770)
    assert read_record(node.info["directory"]) is None, "others may write there"
    path.parent.chmod(0o700)
    assert read_record(node.info["directory"]) == record
