"""Answers where blocks are, and why they are gone: from the node's blocks, its record of gone blocks, the directory and the peers."""

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey, check_tenant
from tiered_kv.protocol.explanation import NAMESPACES_MAX, Explanation, GoneRecord, KnownNamespace, Whereabouts
from tiered_kv.protocol.peer_transport import Holders
from tiered_kv.store.gone import GoneBlock

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

log = logging.getLogger(__name__)


def explain(node: "Node", keys: Sequence[BlockKey], wait_s: float, *, ask_peers: bool) -> Explanation:
    """Returns where each block is, or why it is gone. Waits at most `wait_s` for the coordinator and the peers.

    `ask_peers`: whether other nodes are asked for blocks that they had. It costs one call to each.
    """
    with node.running():
        node.engine.drain_touches()
        here = {key: block.best.tier.label for key in keys if (block := node.engine.machine.blocks.get(key)) is not None}
    missing = [key for key in keys if key not in here]
    gone = recall(node, missing)
    holders = _holders(node, missing, wait_s / 2)
    if ask_peers and holders and holders.peers:
        _ask_peers(node, holders, [key for key in missing if key not in gone and not any(holders.of(key))], gone, wait_s / 2)
    return {
        "node": node.node_id,
        "blocks": [_whereabouts(key, here.get(key), holders, gone.get(key)) for key in keys],
        "recorded_s": node.clock.now_s() - node.gone.since_s,
        "directory": node.link is None or holders is not None,
    }


def recall(node: "Node", keys: Sequence[BlockKey]) -> dict[BlockKey, GoneRecord]:
    """Returns the node's own records of those of the blocks that went, or that it refused."""
    now_s = node.clock.now_s()
    return {key: _record(node.node_id, found, now_s) for key, found in node.gone.find(keys).items()} if keys else {}


def known_namespaces(node: "Node", tenant: str) -> list[KnownNamespace]:
    """Returns the namespaces of one tenant that workers of this node have introduced, the newest first, at most NAMESPACES_MAX.

    A client asks for those of its own tenant, and of tenants that its caller names. So nobody learns from this whether a tenant whose
    name he does not know has a block.
    """
    check_tenant(tenant)
    infos = [info for info in node.storage.encoder.models().values() if info.namespace and info.namespace["tenant"] == tenant]
    return [cast("KnownNamespace", info.as_message()) for info in reversed(infos[-NAMESPACES_MAX:])]


def _record(node_id: str, found: GoneBlock, now_s: float) -> GoneRecord:
    return {
        "node": node_id,
        "tier": found.tier.label if found.tier else None,
        "cause": found.cause.label,
        "age_s": max(now_s - found.at_s, 0.0),
        "uses": found.uses,
        "standing": None if math.isnan(found.standing) else found.standing,
    }


def _holders(node: "Node", keys: list[BlockKey], wait_s: float) -> Holders | None:
    """Returns the other nodes that have each block, as the directory knows them; None if no coordinator answers."""
    try:
        return node.holders(keys, wait_s)
    except TieredKVError as error:
        log.info("the coordinator does not say which nodes have blocks: %s", error)
        return None


def _ask_peers(node: "Node", holders: Holders, keys: list[BlockKey], gone: dict[BlockKey, GoneRecord], wait_s: float) -> None:
    """Add to `gone` the newest record that another node has of each of these blocks."""
    if not keys or node.link is None:
        return
    for records in node.link.recall(holders.peers, keys, wait_s).values():
        for key, record in records.items():
            if key not in gone or record["age_s"] < gone[key]["age_s"]:
                gone[key] = record


def _whereabouts(key: BlockKey, tier: str | None, holders: Holders | None, gone: GoneRecord | None) -> Whereabouts:
    live, silent = holders.of(key) if holders and tier is None else ((), ())
    return {"tier": tier, "nodes": list(live), "silent": list(silent), "gone": gone}
