"""The server of `/metrics`: bounded threads and times, whatever callers do, and a clear answer about ports."""

import json
import socket
import time
from contextlib import ExitStack, suppress

import pytest

from tests.unit.metrics.scraping import get
from tiered_kv.clock import ManualClock
from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.metrics import http_server
from tiered_kv.metrics.coordinator_samples import coordinator_pages
from tiered_kv.metrics.endpoint import MetricsEndpoint
from tiered_kv.metrics.http_server import CONNECTIONS_MAX, THREADS
from tiered_kv.metrics.ports import MetricsPlace, announced


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture
def served(checked, free_port):
    """Call it with pages: an endpoint that serves them."""

    def make(**pages) -> MetricsEndpoint:
        endpoint = checked(MetricsEndpoint(str(free_port), "127.0.0.1"))
        endpoint.serve({f"/{path}": page for path, page in pages.items()})
        return endpoint

    return make


def page(accept: str) -> tuple[str, bytes]:
    return "text/plain", b"here"


def hang(address: str, data: bytes) -> socket.socket:
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(data)
    return connection


def test_known_paths_are_answered(served) -> None:
    address = served(metrics=page).address
    assert get(address) == (200, "here")
    assert get(address, "/metrics?x=1") == (200, "here")
    assert get(address, "/else") == (404, "known paths: /metrics\n")


@pytest.mark.parametrize(("request_", "status"), [(b"POST /metrics HTTP/1.1", b"405"), (b"HEAD /metrics HTTP/1.1", b"200"), (b"", b"405")])
def test_only_reads_are_answered(served, request_: bytes, status: bytes) -> None:
    with hang(served(metrics=page).address, request_ + b"\r\n\r\n") as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.split()[1] == status
    assert not answer.endswith(b"here")


@pytest.mark.parametrize("data", [b"", b"GET /metrics HT", b"\0" * 100], ids=["silent", "incomplete", "binary"])
def test_callers_that_hang_do_not_stop_others(served, data: bytes, monkeypatch) -> None:
    monkeypatch.setattr(http_server, "ANSWER_WITHIN_S", 0.5)
    address = served(metrics=page).address
    with ExitStack() as hung:
        for _ in range(THREADS):
            hung.enter_context(hang(address, data))
        assert get(address) == (200, "here")  # as soon as a hung one has used up its time


def test_a_caller_that_sends_byte_by_byte_gets_no_more_time(served, monkeypatch) -> None:
    monkeypatch.setattr(http_server, "ANSWER_WITHIN_S", 0.3)
    with hang(served(metrics=page).address, b"G") as connection:
        begun_s = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < begun_s + 20:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - begun_s < 15


def test_too_long_a_request_is_refused(served) -> None:
    with hang(served(metrics=page).address, b"GET /" + b"x" * 10_000) as connection, suppress(ConnectionResetError):
        assert connection.recv(100) == b""


def test_further_connections_are_closed_at_once(served, monkeypatch) -> None:
    monkeypatch.setattr(http_server, "ANSWER_WITHIN_S", 5.0)
    address = served(metrics=page).address
    with ExitStack() as hung:
        connections = [hung.enter_context(hang(address, b"GET ")) for _ in range(CONNECTIONS_MAX)]
        extra = hung.enter_context(hang(address, b""))
        extra.settimeout(4.0)
        assert extra.recv(1) == b""
        for connection in connections:
            connection.close()


def test_an_error_of_a_page_is_logged_and_ends_one_request(served, caplog) -> None:
    def broken(accept: str) -> tuple[str, bytes]:
        raise RuntimeError("broken")

    address = served(metrics=broken, healthz=page).address
    assert get(address)[0] == 500
    assert "broken" in caplog.text
    assert get(address, "/healthz") == (200, "here")


def test_a_page_is_not_made_again_for_each_of_many_callers(served) -> None:
    made = []

    def counted(accept: str) -> tuple[str, bytes]:
        made.append(accept)
        return "text/plain", b"x"

    address = served(metrics=counted).address
    begun_s = time.monotonic()
    for _ in range(20):
        get(address)
    assert len(made) <= 1 + (time.monotonic() - begun_s) / http_server.FRESH_S


def test_a_port_in_use_is_replaced_by_the_next_free_one(served, checked, free_port, caplog) -> None:
    first = served(metrics=page)
    second = checked(MetricsEndpoint(str(free_port), "127.0.0.1"))
    assert first.address == f"127.0.0.1:{free_port}"
    assert second.address not in (None, first.address)
    assert f"metrics_port {free_port} is in use, so metrics are at http://{second.address}/metrics" in caplog.text
    assert second.labels == {"metrics_address": second.address}


def test_the_coordinator_uses_the_port_before_those_of_nodes(checked, free_port) -> None:
    endpoint = checked(MetricsEndpoint(str(free_port), "127.0.0.1", is_coordinator=True))
    assert int(endpoint.address.split(":")[1]) < free_port


def test_without_a_free_port_a_process_works_and_says_why(served, checked, free_port, caplog) -> None:
    served(metrics=page)
    endpoint = checked(MetricsEndpoint(f":{free_port}-{free_port + 1}", "127.0.0.1"))
    third = checked(MetricsEndpoint(f":{free_port}-{free_port + 1}", "127.0.0.1"))
    assert endpoint.address == f"127.0.0.1:{free_port + 1}"
    assert third.address is None
    assert third.labels == {"metrics_problem": third.problem}
    assert third.problem.startswith(f"metrics_port: ports {free_port} to {free_port + 1} are all in use")
    assert "this process serves no metrics" in caplog.text


@pytest.mark.parametrize("setting", ["off", "0"])
def test_metrics_can_be_turned_off(checked, setting: str) -> None:
    endpoint = checked(MetricsEndpoint(setting, "127.0.0.1"))
    assert (endpoint.address, endpoint.problem, endpoint.labels) == (None, "", {})


@pytest.mark.parametrize("setting", ["", "eth0", "no port", "127.0.0.1", "1.2.3.4:0", "70000", "9950-9940", "-1"])
def test_an_invalid_setting_names_itself(setting: str) -> None:
    with pytest.raises(TieredKVError, match=r"^metrics_port: ") as caught:
        MetricsPlace.of(setting)
    assert (caught.value.kind, caught.value.context["setting"]) == (Kind.CONFIG, "metrics_port")


def test_a_place_without_an_interface_is_loopback() -> None:
    with MetricsPlace.of("0.0.0.0:9940-9949").listen() as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
    with MetricsPlace.of("9940-9949").listen() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_others_are_told_the_address_of_the_machine() -> None:
    assert announced("0.0.0.0:9940", "10.0.0.7") == "10.0.0.7:9940"
    assert announced("127.0.0.1:9940", "10.0.0.7") == "127.0.0.1:9940"


def test_prometheus_finds_all_nodes_at_the_coordinator(checked, free_port) -> None:
    class Fleet(Coordinator):
        def nodes(self):
            info = {"silent_s": 0.1, "directory_blocks": 2}
            return [{"node": "n0", "metrics_address": "10.0.0.7:9940", **info}, {"node": "n1", **info}]

    fleet = {"members": [{"state": "serving"}], "restarts": 2, "uptime_s": 5.0, "round_age_s": 0.5}
    endpoint = checked(MetricsEndpoint(str(free_port), "127.0.0.1"))
    endpoint.serve(coordinator_pages(Fleet(ManualClock(), 5.0), lambda: fleet, endpoint, "prod"))
    labels = {"cluster": "prod"}
    assert json.loads(get(endpoint.address, "/sd")[1]) == [
        {"targets": ["10.0.0.7:9940"], "labels": labels},
        {"targets": [endpoint.address], "labels": labels},
    ]
    assert get(endpoint.address, "/healthz") == (200, "ok\n")
    text = get(endpoint.address)[1]
    assert 'tiered_kv_nodes{state="live"} 2.0' in text
    assert "tiered_kv_coordinator_restarts_total 2.0" in text
