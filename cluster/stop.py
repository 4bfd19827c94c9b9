"""Stops a cluster: the nodes write blocks that only memory has to disk and close.

Then all that `tiered-kv up` started is stopped and removed.
"""

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
"""How long `down` lets nodes write blocks to disk if the caller gives no time."""
CLOSE_WITHIN_S = 10.0

LogLine = Callable[[str], None]


def down(name: str = state.DEFAULT_NAME, *, log: LogLine = lambda _: None, flush_s: float | None = None) -> list[int]:
    """Stop a cluster and delete its files, even if parts of it are damaged or gone. Returns the pids that had to be killed.

    If the settings name a folder for the disk, nodes first write to it the blocks that only memory has, for at most `flush_s`
    (None: FLUSH_S). `log` is called with a line for each node on which blocks stay on disk and which are lost.
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
    """Returns for how many seconds nodes may write blocks to disk before they close: `flush_s`, or FLUSH_S if it is None.

    Returns 0 if the settings name no disk folder, because then no block outlives the cluster.
    """
    has_folder = bool(config.disk and config.disk_path)
    return (FLUSH_S if flush_s is None else flush_s) if has_folder else 0.0


def close_nodes(name: str, flush_s: float, log: LogLine) -> None:
    """Close all nodes at the same time, then end all actors. Takes at most the sum of `flush_s` and CLOSE_WITHIN_S.

    The coordinator is ended first, because its keeper would start the closed nodes again.
    """
    from tiered_kv.actors.fleet import end_actor, nodes_of
    from tiered_kv.cluster.node_calls import calls_to

    end_actor(coordinator_name(name))
    nodes = nodes_of(name)
    for node, answer in calls_to(name, flush_s + CLOSE_WITHIN_S)(nodes, "close", flush_s).items():
        log(f"{node}: {outcome(answer)}")
    end_actors(name)


def end_actors(name: str) -> None:
    """End the actors of the coordinator and all nodes, so that Ray does not restart them, and delete the fleet's record."""
    from tiered_kv.actors.fleet import RayRecordStore, end_actor, nodes_of

    end_actor(coordinator_name(name))
    for node in nodes_of(name):
        end_actor(node_name(name, node))
    RayRecordStore(name).delete()


def outcome(answer: "EndReport | TieredKVError | Any") -> str:
    """Returns a text that says what became of a node's blocks. `answer`: the node's report, or an error if it did not close as
    it should.
    """
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
    """Delete what nodes that did not close have left: folders named `tkv-<cluster id>-<node>` on this machine.

    They are in shared memory, in the folder for objects, and, if the settings name no disk folder, in the default folder for disk
    segments. Disk segments in a folder that the settings name are kept, because they outlive the cluster: their folders have
    other names. Remote objects of a killed node are kept too, below `tkv-<cluster id>-<node>` of the URL.
    """
    config = Config.of(cluster.config)
    for place in (config.shm_path, config.disk_root, config.objects_folder):
        for directory in Path(place).glob(f"tkv-{cluster.cluster_id}-*") if place else ():
            shutil.rmtree(directory, ignore_errors=True)
