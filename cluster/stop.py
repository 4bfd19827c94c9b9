"""Stops a cluster: the nodes flush and close, then everything that `tiered-kv up` started is stopped and removed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiered_kv.actors.names import coordinator_name, node_name
from tiered_kv.cluster import raylocal, state
from tiered_kv.cluster.state import ClusterState
from tiered_kv.config import Config, format_size
from tiered_kv.errors import TieredKVError

if TYPE_CHECKING:
    from tiered_kv.protocol.handover import EndReport

FLUSH_S = 30.0
"""How long `down` lets nodes write blocks to disk, unless the caller says otherwise."""
CLOSE_WITHIN_S = 10.0

LogLine = Callable[[str], None]


def down(name: str = state.DEFAULT_NAME, *, log: LogLine = lambda _: None, flush_s: float | None = None) -> list[int]:
    """Stop a cluster and delete its files, even if parts of it are damaged or gone. Returns the pids that had to be killed.

    If the settings name a folder for the disk, nodes first write the blocks that only memory has, for at most `flush_s` (None: FLUSH_S).
    `log` is called with a line for each node that says what stays and what is lost.
    """
    state.load(name)  # raises for a mistyped name before anything is created for it
    with state.starting(name):
        cluster = state.load(name)
        try:
            raylocal.join_ray(cluster.address, cluster.node_ip, cluster.token_path)
            log("closing the nodes")
            close_nodes(name, flush_seconds(Config.of(cluster.config), flush_s), log)
        except TieredKVError as error:
            log(f"the cluster does not answer ({error}); stopping what is left of it. Blocks that only memory had are lost")
        raylocal.leave_ray()
        killed: list[int] = []
        if cluster.owns_ray:
            log("stopping Ray")
            killed = raylocal.stop_ray(cluster.processes, cluster.temp_dir)
        remove_files(cluster)
        state.remove(name)
        return killed


def flush_seconds(config: Config, flush_s: float | None) -> float:
    """Returns how long nodes may flush: `flush_s`, or FLUSH_S if it is None. 0 if there is no disk folder that outlives the cluster."""
    has_folder = bool(config.disk and config.disk_path)
    return (FLUSH_S if flush_s is None else flush_s) if has_folder else 0.0


def close_nodes(name: str, flush_s: float, log: LogLine) -> None:
    """Close all nodes side by side, and end all actors. Takes at most `flush_s` and CLOSE_WITHIN_S.

    The coordinator ends first, for its keeper would start the nodes again.
    """
    from tiered_kv.actors.fleet import end_actor, nodes_of
    from tiered_kv.cluster.node_calls import calls_to

    end_actor(coordinator_name(name))
    nodes = nodes_of(name)
    for node, answer in calls_to(name, flush_s + CLOSE_WITHIN_S)(nodes, "close", flush_s).items():
        log(f"{node}: {outcome(answer)}")
    end_actors(name)


def end_actors(name: str) -> None:
    """End the coordinator and all nodes of a cluster for good, and forget the fleet."""
    from tiered_kv.actors.fleet import RayRecordStore, end_actor, nodes_of

    end_actor(coordinator_name(name))
    for node in nodes_of(name):
        end_actor(node_name(name, node))
    RayRecordStore(name).delete()


def outcome(answer: "EndReport | TieredKVError | Any") -> str:
    """Returns the words for what became of a node's blocks."""
    if isinstance(answer, TieredKVError):
        return f"did not close in order ({answer}); blocks that only its memory had are lost"
    texts = []
    if answer.kept:
        written = f", {_blocks(answer.flushed, answer.flushed_bytes)} of them written now" if answer.flushed else ""
        texts.append(f"{_blocks(answer.kept, answer.kept_bytes)} stay on disk{written}")
    if answer.lost:
        texts.append(f"{_blocks(answer.lost, answer.lost_bytes)} that nothing outlasting the cluster had are lost")
    return "; ".join(texts) or "it had no blocks"


def _blocks(number: int, nbytes: int) -> str:
    return f"{number:,} block{'' if number == 1 else 's'} ({format_size(nbytes)})"


def remove_files(cluster: ClusterState) -> None:
    """Delete the files of this cluster's nodes that did not close: shared memory, disk segments, and objects in a folder.

    Disk content in a folder from the settings stays, because it has other names. Remote objects of a killed node stay as well,
    below `tkv-<cluster id>-<node>` of the URL.
    """
    config = Config.of(cluster.config)
    for place in (config.shm_path, config.disk_root, config.objects_folder):
        for directory in Path(place).glob(f"tkv-{cluster.cluster_id}-*") if place else ():
            shutil.rmtree(directory, ignore_errors=True)
