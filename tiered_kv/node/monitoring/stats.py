"""The figures of a node for `status`, for the coordinator and for metrics."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

from tiered_kv.blocks import PEER, Tier
from tiered_kv.node.admission.epochs import tenant_stats
from tiered_kv.protocol.messages import NodeStats, PeerStats, TierStats

if TYPE_CHECKING:
    from tiered_kv.node.learning import Learning
    from tiered_kv.node.node import Node
    from tiered_kv.node.reporter import Reporter
    from tiered_kv.node.trace_recording import Recording
    from tiered_kv.node.worker_session import NodeSession


def node_stats(
    node: "Node", sessions: Collection["NodeSession"], learning: "Learning", recording: "Recording", reporter: "Reporter | None"
) -> NodeStats:
    """Returns a node's figures, as `Node.stats`. The other arguments are parts of the node."""
    machine, storage = node.engine.machine, node.storage
    with node.running():
        node.engine.drain_touches()
        (asked, hit), (saved_tokens, saved_s) = storage.index.tallies(), storage.index.savings()
        peers = node.peer_stats()
        return {
            "node": node.node_id,
            "tiers": _tiers(node),
            "blocks": len(machine.blocks),
            "asked_blocks": asked,
            "hit_blocks": hit,
            "prefill_tokens_saved": saved_tokens,
            "prefill_seconds_saved": saved_s,
            "declined_tokens": storage.index.declined(),
            **node.service.stats(hit, machine.used_bytes),
            "sessions": len(sessions),
            "reserved_bytes": sum(sum(session.reserved.values()) for session in sessions),
            "leaving_bytes": node.engine.leaving_bytes,
            "counts": dict(machine.counts),
            "codecs": storage.encoder.stats(),
            "too_lossy": storage.allowance.stats(),
            "policy": {"name": node.config.policy, **learning.stats()},
            "recording": recording.is_on,
            "filling": node.checkpoint_loader.stats(),
            "saved": cast("dict[str, Any] | None", node.checkpoint_writer.last),
            "seals": node.seals.stats(),
            "namespaces": node.epochs.namespaces(),
            "tenants": tenant_stats(machine.quotas),
            "ceiling": node.ceiling.stats(),
            "coordinator": reporter.reachable if reporter else None,
            "peers": peers,
            "moved_bytes": _moved_bytes(node),
            "refusals": _refusals(node),
            "checksum_failures": _checksum_failures(node, peers),
            "quarantined_extents": len(storage.quarantine.starts()),
        }


def _tiers(node: "Node") -> dict[str, TierStats]:
    tiers = node.storage.usage()
    for label, figures in tiers.items():
        figures["blocks"] = node.engine.machine.blocks_by_tier[Tier[label.upper()]]
    if node.storage.disk:
        tiers[Tier.DISK.label]["write_amplification"] = node.storage.disk.write_amplification
    return tiers


def _moved_bytes(node: "Node") -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (source, target), nbytes in sorted(node.engine.machine.moved_bytes.items()):
        found.setdefault(source.label, {})[target.label] = nbytes
    return found


def _refusals(node: "Node") -> dict[str, dict[str, int]]:
    """Returns by reason and codec how many blocks were not stored (no room), not written to a lower tier, or not shown (too lossy)."""
    found = {"no room": {"raw": node.service.refused_blocks}}
    for (reason, codec), blocks in sorted(node.storage.write_refusals.items()):
        found.setdefault(reason, {})[codec] = blocks
    for (_, codec), blocks in node.storage.allowance.refusals().items():
        lossy = found.setdefault("too lossy", {})
        lossy[codec] = lossy.get(codec, 0) + blocks
    return found


def _checksum_failures(node: "Node", peers: PeerStats) -> dict[str, int]:
    found = {Tier.HOST.label: node.seals.stats()["flipped"]}
    found |= {tier.label: blocks for tier, blocks in sorted(node.storage.checksum_failures.items())}
    return found | {PEER: peers.get("checksum_failures", 0)}
