"""Where a node listens: the setting, interfaces and ports that are not there, and addresses on the wire."""

import socket
from collections.abc import Iterator

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol import peer_address
from tiered_kv.protocol.peer_address import PeerPlace, address_text, parse_address

HERE = {"lo": ["127.0.0.1", "::1"], "eth1": ["10.1.0.7", "fd00::7"]}
PATH = (1, 2, 0)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("text", "place", "ports"),
    [
        (None, "", range(1)),
        ("eth1", "eth1", range(1)),
        ("eth1:7400", "eth1", range(7400, 7401)),
        (":7400-7402", "", range(7400, 7403)),
        ("10.1.0.0/16:7400-7499", "10.1.0.0/16", range(7400, 7500)),
        ("[fd00::/8]:7400", "fd00::/8", range(7400, 7401)),
        ("[fd00::7]", "fd00::7", range(1)),
        ("host.name", "host.name", range(1)),
    ],
)
def test_the_setting_is_read(text, place, ports) -> None:
    assert PeerPlace.of(text) == (place, ports)


def test_the_coordinator_leaves_the_first_ports_to_the_nodes() -> None:
    assert list(PeerPlace.of("eth1:7400-7402").beside_nodes().ports) == [7402, 7401, 7400]
    assert PeerPlace.of("eth1:7400").beside_nodes() == PeerPlace.of("eth1").beside_nodes() == ("eth1", range(1))


def test_off_is_no_place() -> None:
    assert PeerPlace.of("off") is None


@pytest.mark.parametrize(
    "text", ["", "eth1:", "eth1:0", "eth1:70000", "eth1:9-8", "eth1:x", "fd00::7:7400", "a:1:2", "[fd00::7", "eth1:-1"]
)
def test_a_setting_that_cannot_be_read_is_refused_and_named(text) -> None:
    with pytest.raises(TieredKVError, match="peer_address: must be an interface") as caught:
        PeerPlace.of(text)
    assert (caught.value.kind, caught.value.context["setting"]) == (Kind.CONFIG, "peer_address")


@pytest.mark.parametrize(
    ("text", "host"),
    [
        (None, "10.9.9.9"),
        (":7400", "10.9.9.9"),
        ("eth1", "10.1.0.7"),
        ("10.1.0.0/16", "10.1.0.7"),
        ("[fd00::/8]", "fd00::7"),
        ("10.2.3.4", "10.2.3.4"),
    ],
)
def test_interface_network_and_address_are_found(monkeypatch, text, host) -> None:
    monkeypatch.setattr(peer_address, "_addresses", lambda: HERE)
    assert PeerPlace.of(text)._host("10.9.9.9") == host


@pytest.mark.parametrize(
    ("text", "said"), [("eth7", "no interface 'eth7'; it has eth1, lo"), ("192.168.0.0/16", "no address in 192.168.0.0/16; it has")]
)
def test_an_interface_or_network_that_is_not_here_is_an_error_that_names_those_that_are(monkeypatch, text, said) -> None:
    monkeypatch.setattr(peer_address, "_addresses", lambda: HERE)
    with pytest.raises(TieredKVError, match=said) as caught:
        PeerPlace.of(text).listen("127.0.0.1")
    assert caught.value.kind is Kind.CONFIG


def test_this_machines_addresses_include_loopback() -> None:
    assert "127.0.0.1" in [address for addresses in peer_address._addresses().values() for address in addresses]


def test_a_port_in_use_is_an_error_and_a_free_one_of_a_range_is_taken(busy_port) -> None:
    with pytest.raises(TieredKVError, match=f"peer_address: port {busy_port} is in use at 127.0.0.1"):
        PeerPlace.of(f":{busy_port}").listen("127.0.0.1")
    with PeerPlace.of(f":{busy_port}-{busy_port + 20}").listen("127.0.0.1") as taken:
        assert busy_port < taken.getsockname()[1] <= busy_port + 20


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(TieredKVError, match=r"cannot listen at 192\.0\.2\.1") as caught:
        PeerPlace.of("192.0.2.1:7400").listen("127.0.0.1")
    assert caught.value.context["setting"] == "peer_address"


def test_a_node_whose_port_is_in_use_says_so(busy_port) -> None:
    with pytest.raises(TieredKVError, match="is in use"):
        InProcessCluster(Config.of({"host": "1MiB", "peer_address": f":{busy_port}"}), 1, streams=True)


@pytest.mark.parametrize(("host", "port", "text"), [("10.1.0.7", 7400, "10.1.0.7:7400"), ("fd00::7", 7400, "[fd00::7]:7400")])
def test_addresses_on_the_wire_are_read_back(host, port, text) -> None:
    assert address_text(host, port) == text
    assert parse_address(text) == (host, port)


@pytest.mark.parametrize("text", [None, 7, "", "7400", ":7400", "host:", "host:0", "host:70000", "host:x", b"host:7400"])
def test_what_is_no_address_is_refused(text) -> None:
    with pytest.raises(TieredKVError) as caught:
        parse_address(text)
    assert caught.value.kind is Kind.TRANSPORT


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_blocks_travel_over_ipv6(checked) -> None:
    cluster = checked(InProcessCluster(Config.of({"host": "1MiB", "heartbeat_s": 1000.0, "peer_address": "[::1]"}), 2, streams=True))
    here, there = (checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes)
    here.store(tokens_of(PATH), kv_of(PATH))
    cluster.report_all()
    cluster.unreachable |= {"n0", "coordinator"}
    assert cluster.links["n0"].address.startswith("[::1]:")
    assert assert_is_prefix(there.fetch(tokens_of(PATH)), PATH) == 3
