"""A real Prometheus finds a cluster's nodes at the coordinator, scrapes them, and has data for each panel of Grafana's dashboard."""

import itertools
import json
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.unit.metrics.scraping import get
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv import Config
from tiered_kv.embedded import InProcessCluster
from tiered_kv.metrics.coordinator_samples import coordinator_pages
from tiered_kv.metrics.dashboard import dashboard
from tiered_kv.metrics.endpoint import MetricsEndpoint
from tiered_kv.metrics.node_pages import node_pages

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus, of Debian's package of this name")

FLEET = {"members": [{"state": "serving"}], "restarts": 0, "uptime_s": 5.0, "round_age_s": 0.5}
WITHIN_S = 180.0


def configuration(coordinator: str) -> str:
    discovery = {"http_sd_configs": [{"url": f"http://{coordinator}/sd", "refresh_interval": "1s"}]}
    scraping = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    return json.dumps({"global": scraping, "scrape_configs": [{"job_name": "tiered_kv", **discovery}]})


@pytest.fixture
def cluster(checked, tmp_path) -> InProcessCluster:
    """Two nodes whose endpoints the coordinator knows, as actors start them."""
    config = Config.of({"host": "1MiB", "disk": f"2MiB:{tmp_path / 'disk'}", "heartbeat_s": 0.2})
    cluster = checked(InProcessCluster(config, 2, streams=True))
    for node in cluster.nodes.values():
        endpoint = checked(MetricsEndpoint("21940", "127.0.0.1"))
        endpoint.serve(node_pages(node))
        node._labels |= endpoint.labels
    own = checked(MetricsEndpoint("21940", "127.0.0.1", is_coordinator=True))
    own.serve(coordinator_pages(cluster.coordinator, lambda: FLEET, own, "test"))
    cluster.metrics = own.address
    cluster.report_all()
    return cluster


@pytest.fixture
def prometheus(cluster, tmp_path) -> Iterator[str]:
    """The address of a Prometheus that scrapes the cluster."""
    path = tmp_path / "prometheus.yml"
    path.write_text(configuration(cluster.metrics))
    address = "127.0.0.1:21990"
    command = [PROMETHEUS, f"--config.file={path}", f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={address}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(lambda: get(address, "/-/ready")[0] == 200)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def until(condition, missing: list[str] | None = None) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while True:
        with suppress(OSError):
            if condition():
                return
        assert time.monotonic() < deadline_s, missing
        time.sleep(0.1)  # polls another process


def query(address: str, expression: str) -> list[dict]:
    status, body = get(address, f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
    assert status == 200, f"{expression}: {body}"
    return json.loads(body)["data"]["result"]


def is_number(value: str) -> bool:
    return value not in ("NaN", "+Inf", "-Inf")


def test_every_panel_has_data(cluster, prometheus, checked) -> None:
    clients = [checked(cluster.client(name, LAYOUT, NAMESPACE)) for name in cluster.nodes]
    targets = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    asked = [each.replace("$__rate_interval", "1m").replace("$node", ".*") for each in targets]
    known = itertools.cycle(range(8))  # more than host memory holds, so that blocks come back from disk; a policy keeps only such on disk
    paths, missing = (next(known) if turn % 2 else 1000 + turn for turn in itertools.count()), list[str]()

    def traffic_until_all_have_data() -> bool:
        path = (next(paths), *range(30))
        clients[0].store(tokens_of(path), kv_of(path))
        for client in clients:
            client.fetch(tokens_of(path))
        missing[:] = [each for each in asked if not any(is_number(found["value"][1]) for found in query(prometheus, each))]
        return not missing

    until(traffic_until_all_have_data, missing)
    assert len(query(prometheus, 'up{job="tiered_kv"} == 1')) == 3
    assert {found["metric"]["node"] for found in query(prometheus, "tiered_kv_uptime_seconds")} == {"n0", "n1"}
