"""What `up` does for a cluster that runs already: checks its settings, and starts its missing parts."""

from collections.abc import Collection
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.cluster import raylocal, start, state
from tiered_kv.cluster.state import ClusterState
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    from tiered_kv.protocol.fleet import FleetRecord


class Asked(NamedTuple):
    """The arguments of `start.up`."""

    config: Config
    nodes: int | None = None
    address: str | None = None
    nodes_with: str | None = None
    given: Collection[str] | None = None


def differences(asked: Asked, running: Config, selector: str | None) -> list[str]:
    """Returns a text for each setting of `asked` that differs in the running cluster. `selector`: the running cluster's `nodes_with`."""
    wanted, has = asdict(asked.config), asdict(running)
    names = has if asked.given is None else [setting for setting in has if setting in asked.given]
    found = [
        f"{setting}: the cluster has {has[setting]!r}, got {wanted[setting]!r}" for setting in names if has[setting] != wanted[setting]
    ]
    if asked.nodes_with is not None and asked.nodes_with != selector:
        found.append(f"nodes-with: the cluster has {selector or 'none'}, got {asked.nodes_with}")
    return found


def resume(cluster: ClusterState, asked: Asked, log: start.LogLine, mounted_bytes: int = 0) -> ClusterState:
    """Start the missing parts of a cluster whose state file is on this machine. Returns its state.

    Raises (kind `config`), with nothing changed, if settings differ. Raises (kind `cluster`) if the cluster's Ray does not answer.
    """
    _check_address(cluster, asked)
    before = len(cluster.gone()), len(cluster.processes)
    if cluster.owns_ray:
        _refuse(cluster.name, differences(asked, Config.of(cluster.config), asked.nodes_with))  # the selector is known only to Ray
        cluster = _with_ray_nodes(cluster, asked.nodes, log)
    try:
        raylocal.join_ray(cluster.address, cluster.node_ip, cluster.token_path)
    except TieredKVError as error:
        message = f"cluster {cluster.name!r} cannot be checked: {error}; remove what is left of it with `tiered-kv down`"
        raise TieredKVError(Kind.CLUSTER, message, name=cluster.name) from error
    found = existing(cluster.name)
    running = Config.of(found.settings) if found else Config.of(cluster.config)
    _refuse(cluster.name, differences(asked, running, found.selector if found else asked.nodes_with))
    if found is not None and found.cluster_id != cluster.cluster_id:
        # another machine has stopped and started it
        cluster = replace(cluster, cluster_id=found.cluster_id, config=found.settings, secret=found.secret)
        cluster.save()
    changed = before != (0, len(cluster.processes))
    selector = found.selector if found else asked.nodes_with
    _complete(cluster, running, log, found.mounted_bytes if found else mounted_bytes, selector, changed)
    return cluster


def existing(name: str) -> "FleetRecord | None":
    """Returns the fleet's record of the cluster `name` in the Ray that this process has joined, or None if Ray has no such record.

    Reads Ray's key-value store, so the cluster's coordinator need not answer.
    """
    from tiered_kv.actors.fleet import RayRecordStore
    from tiered_kv.protocol.fleet import FleetRecord

    data = RayRecordStore(name).load()
    return FleetRecord.of_bytes(data) if data is not None else None


def adopt(cluster: ClusterState, found: "FleetRecord", asked: Asked, log: start.LogLine) -> ClusterState:
    """Write the state file of a cluster that another machine has started, and start the cluster's missing parts. Returns its state.

    `cluster`: a state with the cluster's name and address. `found`: the fleet's record. Raises (kind `config`) if settings differ.
    """
    running = Config.of(found.settings)
    _refuse(cluster.name, differences(asked, running, found.selector))
    cluster = replace(cluster, cluster_id=found.cluster_id, config=found.settings, secret=found.secret)
    cluster.save()
    log(f"cluster {cluster.name!r} was started from another machine; this machine joins it")
    _complete(cluster, running, log, found.mounted_bytes, found.selector, changed=False)
    return cluster


def _check_address(cluster: ClusterState, asked: Asked) -> None:
    if asked.address is None:
        return
    if raylocal.parse_address(asked.address) != raylocal.parse_address(cluster.address):
        message = f"--address: cluster {cluster.name!r} is on the Ray at {cluster.address}, got {asked.address}; give another --name"
        raise TieredKVError(Kind.CONFIG, message, setting="address")


def _refuse(name: str, found: list[str]) -> None:
    if found:
        ways = "leave these settings out to keep the cluster's, or stop it first with `tiered-kv down`"
        raise TieredKVError(Kind.CONFIG, f"cluster {name!r} is up with other settings: {'; '.join(found)}; {ways}", name=name)


def _with_ray_nodes(cluster: ClusterState, nodes: int | None, log: start.LogLine) -> ClusterState:
    """Restart the cluster's Ray nodes on this machine that have ended, and add nodes up to `nodes`. Returns the cluster's new state."""
    have = len(cluster.processes)
    if nodes is not None and nodes < have:
        message = f"--nodes: cluster {cluster.name!r} already has {have} Ray nodes here, got {nodes}; use `tiered-kv drain` to remove nodes"
        raise TieredKVError(Kind.CONFIG, message, setting="nodes")
    missing = [index for index, process in enumerate(cluster.processes) if not process.alive()] + [*range(have, nodes or have)]
    if not missing:
        return cluster
    assert cluster.token_path is not None and cluster.temp_dir is not None, "a cluster that owns its Ray has both"
    addresses = [raylocal.local_ip(index) for index in missing]
    log(f"starting Ray nodes at {', '.join(addresses)}")
    ray = raylocal.RayProcesses(cluster.address, cluster.node_ips, cluster.token_path, cluster.temp_dir, cluster.processes)
    started = raylocal.add_nodes(missing, ray, start.OBJECT_STORE_BYTES, directory=state.cluster_dir(cluster.name))
    processes = dict(enumerate(cluster.processes)) | dict(zip(missing, started, strict=True))
    node_ips = tuple(raylocal.local_ip(index) for index in range(len(processes)))
    cluster = replace(cluster, processes=tuple(processes[index] for index in sorted(processes)), node_ips=node_ips)
    cluster.save()
    return cluster


def _complete(cluster: ClusterState, config: Config, log: start.LogLine, mounted_bytes: int, nodes_with: str | None, changed: bool) -> None:
    """Start the coordinator if there is none, let its keeper start the missing nodes, and log what was done."""
    if not _has_coordinator(cluster.name):
        log("starting the coordinator")
        start.start_coordinator(cluster, config, mounted_bytes, nodes_with)
        changed = True
    before = start.describe_fleet(cluster.name)["fleet"]
    serving = {member["node"] for member in before["members"] if member["state"] == "serving"}
    start.call_coordinator(cluster.name, "retry")
    fleet = start.await_nodes(cluster.name, log, rounds=before["rounds"] + 2)  # one of them may have begun before `retry`
    for member in fleet["members"]:
        if member["state"] == "drained":
            log(f"{member['node']} is drained; start it again with: tiered-kv drain {member['node']} --undo")
        elif member["state"] != "serving":
            log(f"{member['node']} at {member['address']} is {member['state']}: {member.get('error', 'see `tiered-kv status`')}")
    now = {member["node"] for member in fleet["members"] if member["state"] == "serving"}
    if now - serving:
        log(f"started {', '.join(sorted(now - serving))}")
    elif not changed:
        log("nothing was missing")


def _has_coordinator(name: str) -> bool:
    import ray

    from tiered_kv.actors.names import NAMESPACE, coordinator_name

    try:
        ray.get_actor(coordinator_name(name), NAMESPACE)
        return True
    except ValueError:
        return False
