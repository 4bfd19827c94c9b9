"""A local Ray cluster of two nodes for all tests of a session.

It starts at first use and is stopped by pid at the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tiered_kv.cluster.raylocal import OBJECT_STORE_BYTES_MIN, RayProcesses, join_ray, leave_ray, start_ray, stop_ray


@dataclass(frozen=True)
class RayCluster:
    """Ray's processes, and the directory that `TIERED_KV_STATE` names."""

    ray: RayProcesses
    state_dir: Path


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Two Ray nodes of one CPU each. `TIERED_KV_STATE` names their own directory while they run."""
    state_dir = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERED_KV_STATE", str(state_dir))
        ray = start_ray(2, OBJECT_STORE_BYTES_MIN, cpus_per_node=1, directory=state_dir)
        try:
            yield RayCluster(ray, state_dir)
        finally:
            leave_ray()
            stop_ray(ray.processes, ray.temp_dir)


@pytest.fixture
def joined(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """The cluster, joined by this process as a driver for one test. Ray's environment is restored afterwards."""
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(key, raising=False)
    join_ray(ray_cluster.ray.address, ray_cluster.ray.node_ips[0], ray_cluster.ray.token_path)
    try:
        yield ray_cluster
    finally:
        leave_ray()
