"""Starts a cluster, on a Ray that it starts or on an existing one. The coordinator's keeper starts a cache node on each matching
Ray node."""

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiered_kv.actors.names import NAMESPACE, coordinator_name
from tiered_kv.cluster import raylocal, state
from tiered_kv.cluster.state import ClusterState
from tiered_kv.cluster.stop import end_actors, remove_files
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    from tiered_kv.protocol.fleet import FleetStatus

OBJECT_STORE_BYTES = 512 << 20
START_WITHIN_S = 120.0
ANSWER_WITHIN_S = 10.0
RETRY_S = 0.1

LogLine = Callable[[str], None]


def up(
    config: Config,
    *,
    name: str = state.DEFAULT_NAME,
    nodes: int | None = None,
    address: str | None = None,
    log: LogLine = lambda _: None,
    mounted_bytes: int = 0,
    nodes_with: str | None = None,
    given: Collection[str] | None = None,
) -> ClusterState:
    """Start a cluster called `name`, on new Ray nodes on this machine, or on the Ray at `address`. Returns its state.

    If a cluster of this name runs already, its settings are checked instead, and its missing parts are started (`resume`).

    nodes: how many Ray nodes to start on this machine (None: 1). nodes_with: which Ray nodes get a cache node, as the text of a
    `Selector`; None for all. `log` is called with a line for each step. mounted_bytes: the size of a checkpoint to mount, for
    which each node's index gets slots. given: the names of the settings to compare with those of a cluster that runs already;
    None for all settings.

    If anything fails, everything that was started is stopped again. Raises `TieredKVError` naming the setting that is wrong.
    """
    from tiered_kv.cluster import resume
    from tiered_kv.metrics.ports import MetricsPlace
    from tiered_kv.node.codec_plan import check_settings
    from tiered_kv.protocol.fleet import Selector
    from tiered_kv.protocol.peer_address import PeerPlace

    check_settings(config)
    Selector(nodes_with)
    PeerPlace.of(config.peer_address)  # raises if it cannot be read
    MetricsPlace.of(config.metrics_port)
    if config.calibration is not None:  # nodes have a working directory of their own
        config = config.with_(calibration=str(Path(config.calibration).expanduser().absolute()))
    asked = resume.Asked(config, nodes, address, nodes_with, given)
    with state.starting(name):
        running = _running(name)
        if running is not None:
            return resume.resume(running, asked, log, mounted_bytes)
        return _start(name, asked, log, mounted_bytes)


def _start(name: str, asked: Any, log: LogLine, mounted_bytes: int) -> ClusterState:
    from tiered_kv.cluster import resume

    config, nodes, cluster_id = asked.config, 1 if asked.nodes is None else asked.nodes, state.new_cluster_id()
    with ExitStack() as undo:
        if asked.address is None:
            log(f"starting Ray with {nodes} node{'s' if nodes > 1 else ''} on this machine")
            ray_local = raylocal.start_ray(nodes, OBJECT_STORE_BYTES, directory=state.cluster_dir(name))
            undo.callback(raylocal.stop_ray, ray_local.processes, ray_local.temp_dir)
            own: dict[str, Any] = {
                "address": ray_local.address,
                "node_ips": ray_local.node_ips,
                "token_path": ray_local.token_path,
                "processes": ray_local.processes,
                "temp_dir": ray_local.temp_dir,
                "owns_ray": True,
            }
        else:
            own = {"address": asked.address}
        own |= {"secret": state.new_secret()}
        cluster = ClusterState(cluster_id=cluster_id, created_s=time.time(), name=name, config=asdict(config), **own)
        cluster.save()  # before anything else can fail, so that `down` can clean up after an `up` that was killed
        undo.callback(state.remove, name)
        log(f"joining Ray at {cluster.address}")
        if not raylocal.is_joined():
            undo.callback(raylocal.leave_ray)
        raylocal.join_ray(cluster.address, cluster.node_ip, cluster.token_path)
        existing = resume.existing(name)
        if existing is not None:  # started from another machine: nothing of it may be undone
            cluster = resume.adopt(cluster, existing, asked, log)
            undo.pop_all()
            return cluster
        undo.callback(remove_files, cluster)
        undo.callback(end_actors, name)
        start_coordinator(cluster, config, mounted_bytes, asked.nodes_with)
        fleet = await_nodes(name, log)
        _raise_refusal(fleet)
        if not fleet["members"]:
            log(f"none of the {fleet['ray_nodes']} Ray nodes matches --nodes-with {asked.nodes_with}; nodes that join and match get one")
        undo.pop_all()
        return cluster


def start_coordinator(cluster: ClusterState, config: Config, mounted_bytes: int = 0, nodes_with: str | None = None) -> None:
    """Start the coordinator's actor, with its keeper, on the head node of the Ray that this process has joined.

    Without the head node there is no Ray, because it runs Ray's control store. On another node, the coordinator would end with
    that node.
    """
    import ray

    from tiered_kv.actors.coordinator import CoordinatorActor
    from tiered_kv.actors.fleet import HEAD_RESOURCE

    options: dict[str, Any] = {"name": coordinator_name(cluster.name), "namespace": NAMESPACE, "lifetime": "detached"}
    options["resources"] = {HEAD_RESOURCE: 0.001}  # an amount of this resource, which only the head has, binds the actor to it
    about = cluster.name, cluster.cluster_id, config, mounted_bytes, nodes_with, cluster.secret
    actor = CoordinatorActor.options(**options).remote(*about)
    try:
        ray.get(actor.describe.remote(), timeout=START_WITHIN_S)
    except ray.exceptions.RayError as error:
        raise TieredKVError(Kind.CLUSTER, f"the coordinator did not start: {error}", name=cluster.name) from error


def await_nodes(name: str, log: LogLine = lambda _: None, *, rounds: int = 1, within_s: float = START_WITHIN_S) -> "FleetStatus":
    """Wait until no cache node is starting any more. Returns the fleet. Calls `log` with a line for each node that is starting.

    `rounds`: how many rounds the keeper must have completed, in each of which it starts missing nodes. Raises (kind `cluster`)
    if after `within_s` a node is still starting, or the keeper has completed fewer rounds.
    """
    deadline_s, said = time.monotonic() + within_s, set()
    while True:
        fleet = describe_fleet(name)["fleet"]
        starting = [member for member in fleet["members"] if member["state"] == "starting"]
        for member in starting:
            if member["node"] not in said:
                said.add(member["node"])
                log(f"starting cache node {member['node']} at {member['address']}")
        if fleet["rounds"] >= rounds and not starting:
            return fleet
        if time.monotonic() > deadline_s:
            late = ", ".join(member["node"] for member in starting) or fleet["problem"] or "a round of the keeper"
            raise TieredKVError(Kind.CLUSTER, f"cluster {name!r} is not complete after {within_s:.0f} s; still missing: {late}", name=name)
        time.sleep(RETRY_S)


def _raise_refusal(fleet: "FleetStatus") -> None:
    for member in fleet["members"]:
        if member["state"] == "refused":
            raise TieredKVError(Kind(member["kind"]), f"{member['error']} (cache node {member['node']} at {member['address']})")


def ray_environment(cluster: ClusterState) -> dict[str, str]:
    """Returns the environment variables with which a plain `ray.init()` joins the cluster's Ray."""
    return raylocal.driver_environment(cluster.address, cluster.token_path)


def describe(name: str = state.DEFAULT_NAME, within_s: float = ANSWER_WITHIN_S) -> dict:
    """Returns the coordinator's description of the cluster that this process has joined: id, settings, nodes, lost nodes and fleet.

    Waits at most `within_s` while the coordinator is restarting, and as long again for its answer. Raises (kind `cluster`) if there is
    no coordinator, or if it does not answer.
    """
    return call_coordinator(name, "describe", within_s=within_s)


def describe_fleet(name: str) -> dict:
    """Returns what `describe` returns. Raises (kind `cluster`) also if the coordinator's version of tiered_kv has no fleets yet."""
    about = describe(name)
    if "fleet" not in about:
        message = f"cluster {name!r} was started by an older version of tiered_kv; stop it with that version's `tiered-kv down`"
        raise TieredKVError(Kind.CLUSTER, message, name=name)
    return about


def call_coordinator(name: str, method: str, *arguments: Any, within_s: float = ANSWER_WITHIN_S) -> Any:
    """Call a method of the coordinator. Returns its answer. Waits and raises as `describe` does. Also raises what the method raised."""
    import ray

    deadline_s = time.monotonic() + within_s
    while True:
        try:
            coordinator = ray.get_actor(coordinator_name(name), NAMESPACE)
            return ray.get(getattr(coordinator, method).remote(*arguments), timeout=within_s)
        except (ValueError, ray.exceptions.RayError) as error:
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, TieredKVError):
                raise error.cause from error
            restarting = isinstance(error, ray.exceptions.ActorUnavailableError) and time.monotonic() < deadline_s
            if not restarting:
                message = f"this Ray has no tiered_kv cluster {name!r} that answers ({type(error).__name__}); start one with: tiered-kv up"
                raise TieredKVError(Kind.CLUSTER, message, name=name) from error
        time.sleep(RETRY_S)


def nodes_of(name: str) -> list[str]:
    """Returns the sorted ids of a cluster's nodes whose actors in Ray have not ended."""
    from tiered_kv.actors import fleet

    return fleet.nodes_of(name)


def _running(name: str) -> ClusterState | None:
    """Returns the cluster's state file if its Ray may be running. Else stops its processes, deletes its files, and returns None."""
    known = state.find(name)
    if known is None or known.has_head():
        return known
    raylocal.stop_ray(known.processes, known.temp_dir)
    remove_files(known)
    return None
