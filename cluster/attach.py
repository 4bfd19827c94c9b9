"""Attaching: from any process on a machine of the cluster to a client of that machine's node.

A node leaves a record beside its socket; a process of the same user that finds it needs no Ray, and does not end with Ray.
Ray is asked only where there is no record.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiered_kv.cluster import raylocal, start, state
from tiered_kv.cluster.localnodes import LocalNodes
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace

if TYPE_CHECKING:
    from tiered_kv.client.client import Client

HEARTBEATS_TO_WAIT = 3
ATTACH_WITHIN_S = 8.0
"""How long `attach` waits for a node of this machine that runs and is silent, mapping its memory not included."""
RESTART_WITHIN_S = 3.0
"""How long it waits for one that has ended, which Ray may be about to restart, before it asks Ray."""
LOOK_AGAIN_S = 0.1


def join(name: str, address: str | None = None) -> None:
    """Make this process part of the cluster's Ray, unless it already is part of one.

    The place comes from `address`, else from the cluster's state file on this machine, else from `RAY_ADDRESS`.
    """
    import ray

    if ray.is_initialized():
        if address is not None:
            raylocal.join_ray(address)  # says so if this process is part of another one
        return
    known = state.find(name)
    if address is None and known is not None:
        raylocal.join_ray(known.address, known.node_ip, known.token_path)
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise TieredKVError(Kind.CLUSTER, f"no cluster {name!r} on this machine; start one with: tiered-kv up", name=name)
    raylocal.join_ray(address)


def node_here(nodes: list[dict]) -> dict:
    """The record of the cache node that runs on this process's Ray node, else of any whose shared memory this machine has."""
    import ray

    ray_node_id = ray.get_runtime_context().get_node_id()
    here = [node for node in nodes if Path(node["directory"]).is_dir()]
    own = [node for node in here if node.get("ray_node_id") == ray_node_id]
    if not here:
        message = f"none of the cluster's {len(nodes)} cache nodes runs on this machine; there is one for each Ray node"
        raise TieredKVError(Kind.CLUSTER, message)
    return (own or here)[0]


def attach(
    namespace: Namespace, layout_of_block_tokens, *, name: str = state.DEFAULT_NAME, address: str | None = None, **rope: Any
) -> "Client":
    """A client of the node on this machine, without Ray where the node has left its record here.

    `layout_of_block_tokens` makes the layout from the cluster's block size. `rope`: as in `client_of`. The client finds the node of
    the cluster `name` again by itself, also after the cluster was stopped and started anew. Raises (kind `cluster`) where there is
    no node, or the one there is does not answer within ATTACH_WITHIN_S.
    """
    from tiered_kv.client.connect import client_of

    nodes = LocalNodes(name, address)
    begun_s = time.monotonic()
    while running := nodes.running():
        info, failed = nodes.find(), None
        try:
            if info is not None:
                layout = layout_of_block_tokens(info["block_tokens"])
                return client_of(info, layout, namespace, find=nodes.find, must_answer=True, **rope)
        except TieredKVError as error:
            if error.kind not in (Kind.MEMORY, Kind.TRANSPORT):
                raise
            failed = error
        waited_s = time.monotonic() - begun_s
        if waited_s >= ATTACH_WITHIN_S and any(running):
            raise nodes.silent(waited_s, failed)
        if waited_s >= RESTART_WITHIN_S and not any(running):
            break
        time.sleep(LOOK_AGAIN_S)
    return _attach_through_ray(nodes, namespace, layout_of_block_tokens, rope)


def reach(name: str, address: str | None = None) -> None:
    """Raise what `attach` would raise where there is no cluster, within moments; joins Ray only where no node has left a record here."""
    if not LocalNodes(name, address).running():
        join(name, address)


def _attach_through_ray(nodes: LocalNodes, namespace: Namespace, layout_of_block_tokens, rope: dict[str, Any]) -> "Client":
    from tiered_kv.client.connect import client_of

    name = nodes.name
    join(name, nodes.address)
    about = start.describe(name)
    deadline_s = time.monotonic() + HEARTBEATS_TO_WAIT * about["config"].heartbeat_s
    while True:
        try:
            node = node_here(about["nodes"])
            return client_of(node, layout_of_block_tokens(about["config"].block_tokens), namespace, find=nodes.find, **rope)
        except TieredKVError as error:
            # A coordinator or a node that was just restarted is whole again after a heartbeat.
            if error.kind not in (Kind.CLUSTER, Kind.MEMORY) or time.monotonic() > deadline_s:
                raise
        time.sleep(about["config"].heartbeat_s / 4)
        about = start.describe(name)
