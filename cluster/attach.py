"""Attaches any process on a machine of the cluster to that machine's node.

A node writes a record beside its socket. A process of the same user that finds the record needs no Ray, and continues if Ray
ends. Ray is used only if there is no record.
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
    from tiered_kv.client.page_client import PageClient
    from tiered_kv.layout import OpaqueLayout

HEARTBEATS_TO_WAIT = 3
ATTACH_WITHIN_S = 8.0
"""How long `attach` waits for a node on this machine that runs but does not answer. The time to map the node's memory is extra."""
RESTART_WITHIN_S = 3.0
"""How long `attach` waits for a node that has ended, which Ray may be restarting, before it uses Ray to find a node."""
LOOK_AGAIN_S = 0.1


def join(name: str, address: str | None = None) -> None:
    """Connect this process to the cluster's Ray, unless it is connected already.

    Ray's address is `address`, else the one in the cluster's state file on this machine, else `RAY_ADDRESS`. Raises (kind `cluster`)
    if none of them is set, or if this process is connected to another Ray than `address`.
    """
    import ray

    if ray.is_initialized():
        if address is not None:
            raylocal.join_ray(address)  # raises if this process is connected to another Ray
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
    """Returns the record of the cache node on this process's Ray node, else of any node whose shared memory is on this machine.

    Raises (kind `cluster`) if there is no such node.
    """
    import ray

    ray_node_id = ray.get_runtime_context().get_node_id()
    here = [node for node in nodes if Path(node["directory"]).is_dir()]
    own = [node for node in here if node.get("ray_node_id") == ray_node_id]
    if not here:
        message = f"none of the cluster's {len(nodes)} cache nodes runs on this machine; use a machine with a Ray node of the cluster"
        raise TieredKVError(Kind.CLUSTER, message)
    return (own or here)[0]


def attach(
    namespace: Namespace, layout_of_block_tokens, *, name: str = state.DEFAULT_NAME, address: str | None = None, **rope: Any
) -> "Client":
    """Returns a client of the node on this machine. Does not use Ray if the node's record is on this machine.

    `layout_of_block_tokens` is a function from the cluster's block size in tokens to the layout. `rope`: as in `client_of`. The
    client reconnects to the node of the cluster `name` by itself, even after the cluster was stopped and started again. Raises
    (kind `cluster`) if there is no node, or if the node does not answer within ATTACH_WITHIN_S.
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


def attach_pages(
    namespace: Namespace, layout: "OpaqueLayout", *, name: str = state.DEFAULT_NAME, node_id: str | None = None
) -> "PageClient":
    """Returns a client of the node on this machine for an engine's pages. Never uses Ray.

    If there is no node now, the client connects as soon as there is one. `node_id`: use only the node with this id.
    """
    from tiered_kv.client.connect import page_client_of

    return page_client_of(LocalNodes(name, node_id=node_id).find, layout, namespace)


def reach(name: str, address: str | None = None) -> None:
    """Check that there is a cluster to attach to, and raise (kind `cluster`) at once if not.

    Joins Ray only if this machine has no node's record.
    """
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
            # A coordinator or node that was just restarted has its full state again after a heartbeat.
            if error.kind not in (Kind.CLUSTER, Kind.MEMORY) or time.monotonic() > deadline_s:
                raise
        time.sleep(about["config"].heartbeat_s / 4)
        about = start.describe(name)
