"""Starts and stops a cluster: one node actor for each Ray node, and one coordinator, on our own Ray or an existing one."""

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiered_kv.actors.names import NAMESPACE, coordinator_name, node_name
from tiered_kv.cluster import raylocal, state
from tiered_kv.cluster.state import ClusterState
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError

OBJECT_STORE_BYTES = 512 << 20
START_WITHIN_S = 120.0
ANSWER_WITHIN_S = 10.0
RETRY_S = 0.1

LogLine = Callable[[str], None]


def up(
    config: Config,
    *,
    name: str = state.DEFAULT_NAME,
    nodes: int = 1,
    address: str | None = None,
    log: LogLine = lambda _: None,
    mounted_bytes: int = 0,
) -> ClusterState:
    """Start a cluster called `name`, on new Ray nodes on this machine, or on every node of the Ray at `address`.

    `log` is called with a line for each step. `mounted_bytes`: the size of a checkpoint to mount, for which each node's index gets
    slots. If anything fails, everything that was started is stopped again. Raises `TieredKVError` with the name of a wrong setting,
    or of kind `cluster` if `name` is already running. Returns the cluster's state.
    """
    from tiered_kv.node.codec_plan import check_settings
    from tiered_kv.protocol.peer_address import PeerPlace

    check_settings(config)
    PeerPlace.of(config.peer_address)  # raises if it cannot be read
    if config.calibration is not None:  # nodes have a working directory of their own
        config = config.with_(calibration=str(Path(config.calibration).expanduser().absolute()))
    with state.starting(name), ExitStack() as undo:
        _refuse_second(name)
        cluster_id = state.new_cluster_id()
        if address is None:
            log(f"starting Ray with {nodes} node{'s' if nodes > 1 else ''} on this machine")
            ray_local = raylocal.start_ray(nodes, OBJECT_STORE_BYTES, directory=state.cluster_dir(name))
            undo.callback(raylocal.stop_ray, ray_local.processes, ray_local.temp_dir)
            own = {
                "address": ray_local.address,
                "node_ips": ray_local.node_ips,
                "token_path": ray_local.token_path,
                "processes": ray_local.processes,
                "temp_dir": ray_local.temp_dir,
                "owns_ray": True,
            }
        else:
            own = {"address": address}
        cluster = ClusterState(
            cluster_id=cluster_id, created_s=time.time(), name=name, config=asdict(config), secret=state.new_secret(), **own
        )
        cluster.save()  # before anything else can fail, so that `down` can clean up after an `up` that was killed
        undo.callback(state.remove, name)
        log(f"joining Ray at {cluster.address}")
        if not raylocal.is_joined():
            undo.callback(raylocal.leave_ray)
        raylocal.join_ray(cluster.address, cluster.node_ip, cluster.token_path)
        _refuse_foreign(name)  # before the undo below could kill the actors of another cluster
        undo.callback(remove_files, cluster)
        undo.callback(_kill_actors, name)
        _start_actors(cluster, config, log, mounted_bytes)
        undo.pop_all()
        return cluster


def down(name: str = state.DEFAULT_NAME, *, log: LogLine = lambda _: None) -> list[int]:
    """Stop a cluster and delete its files, even if parts of it are damaged or gone. Returns the pids that had to be killed."""
    with state.starting(name):
        cluster = state.load(name)
        try:
            raylocal.join_ray(cluster.address, cluster.node_ip, cluster.token_path)
            log("closing the nodes")
            _close_nodes(name)
        except TieredKVError as error:
            log(f"the cluster does not answer ({error}); stopping what is left of it")
        raylocal.leave_ray()
        killed: list[int] = []
        if cluster.owns_ray:
            log("stopping Ray")
            killed = raylocal.stop_ray(cluster.processes, cluster.temp_dir)
        remove_files(cluster)
        state.remove(name)
        return killed


def ray_environment(cluster: ClusterState) -> dict[str, str]:
    """Returns the environment variables with which a plain `ray.init()` joins the cluster's Ray."""
    return raylocal.driver_environment(cluster.address, cluster.token_path)


def describe(name: str = state.DEFAULT_NAME, within_s: float = ANSWER_WITHIN_S) -> dict:
    """Returns the coordinator's description of the cluster that this process has joined: cluster id, settings, nodes and statistics.

    Waits at most `within_s` for a coordinator that is restarting, and as long again for its answer. Raises (kind `cluster`) if
    there is none, or if it does not answer.
    """
    import ray

    deadline_s = time.monotonic() + within_s
    while True:
        try:
            coordinator = ray.get_actor(coordinator_name(name), NAMESPACE)
            return ray.get(coordinator.describe.remote(), timeout=within_s)
        except (ValueError, ray.exceptions.RayError) as error:
            restarting = isinstance(error, ray.exceptions.ActorUnavailableError) and time.monotonic() < deadline_s
            if not restarting:
                message = f"this Ray has no tiered_kv cluster {name!r} that answers ({type(error).__name__}); start one with: tiered-kv up"
                raise TieredKVError(Kind.CLUSTER, message, name=name) from error
        time.sleep(RETRY_S)


def _refuse_second(name: str) -> None:
    running = state.find(name)
    if running is not None and running.alive():
        ways = "see `tiered-kv status`, stop it with `tiered-kv down`, or give another --name"
        raise TieredKVError(Kind.CLUSTER, f"cluster {name!r} is already up at {running.address}; {ways}", name=name)
    if running is not None:  # its Ray has ended, so remove its processes and files
        raylocal.stop_ray(running.processes, running.temp_dir)
        remove_files(running)


def _start_actors(cluster: ClusterState, config: Config, log: LogLine, mounted_bytes: int) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tiered_kv.actors.coordinator import CoordinatorActor
    from tiered_kv.actors.node import NodeActor

    detached: dict[str, Any] = {"namespace": NAMESPACE, "lifetime": "detached"}
    coordinator = CoordinatorActor.options(name=coordinator_name(cluster.name), **detached).remote(
        cluster.cluster_id, config, cluster.secret
    )
    _result(coordinator.describe.remote(), "the coordinator")
    started = {}
    for number, ray_node in enumerate(sorted((node for node in ray.nodes() if node["Alive"]), key=_age)):
        node_id = f"node-{number}"
        log(f"starting cache node {node_id} at {ray_node['NodeManagerAddress']}")
        here = NodeAffinitySchedulingStrategy(ray_node["NodeID"], soft=False)
        actor = NodeActor.options(name=node_name(cluster.name, node_id), scheduling_strategy=here, **detached)
        started[node_id] = actor.remote(cluster.name, cluster.cluster_id, node_id, config, mounted_bytes, cluster.secret)
    for node_id, actor in started.items():
        _result(actor.info.remote(), f"cache {node_id}")


def _age(node: dict) -> tuple:
    return (not node["Resources"].get("node:__internal_head__"), node["NodeManagerAddress"])


def _refuse_foreign(name: str) -> None:
    """Raise (kind `cluster`) if the Ray already runs a cluster of this name, of which this machine has no state file."""
    import ray

    with suppress(ValueError):
        ray.get_actor(coordinator_name(name), NAMESPACE)
        raise TieredKVError(Kind.CLUSTER, f"this Ray already runs a cluster {name!r}; give another --name", name=name)


def _result(reference: Any, who: str) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=START_WITHIN_S)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, TieredKVError) else error
        raise cause from error
    except ray.exceptions.RayError as error:
        raise TieredKVError(Kind.CLUSTER, f"{who} did not start: {error}") from error


def nodes_of(name: str) -> list[str]:
    """Returns the ids of all nodes that have an actor in Ray, in any state."""
    prefix = node_name(name, "")
    return sorted(actor.removeprefix(prefix) for actor in _actors_of(name) if actor.startswith(prefix))


def _actors_of(name: str) -> list[str]:
    from ray.util import list_named_actors

    found = [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    nodes = [actor for actor in found if actor.startswith(node_name(name, ""))]
    return nodes + [actor for actor in found if actor == coordinator_name(name)]


def _close_nodes(name: str) -> None:
    import ray

    for actor in _actors_of(name):
        if actor.startswith(node_name(name, "")):
            # A node that cannot close itself is killed below, and `down` removes its files.
            with suppress(ray.exceptions.RayError, TieredKVError, ValueError):
                ray.get(ray.get_actor(actor, NAMESPACE).close.remote(), timeout=ANSWER_WITHIN_S)
    _kill_actors(name)


def _kill_actors(name: str) -> None:
    import ray

    for actor in _actors_of(name):
        with suppress(ValueError):
            ray.kill(ray.get_actor(actor, NAMESPACE), no_restart=True)


def remove_files(cluster: ClusterState) -> None:
    """Delete the files of this cluster's nodes that did not close: shared memory, disk segments, and objects in a folder.

    Disk content in a folder from the settings stays, because it has other names. Remote objects of a killed node stay as well,
    below `tkv-<cluster id>-<node>` of the URL.
    """
    config = Config.of(cluster.config)
    for place in (config.shm_path, config.disk_root, config.objects_folder):
        for directory in Path(place).glob(f"tkv-{cluster.cluster_id}-*") if place else ():
            shutil.rmtree(directory, ignore_errors=True)
