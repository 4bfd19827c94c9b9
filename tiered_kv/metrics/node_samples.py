"""The samples of a node's metrics.

Each function in SAMPLERS yields the samples of one part of the node. To add metrics, put their figures into `NodeStats` or
`NodeReading`, add rows to `table.METRICS`, and add a function here.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast

from tiered_kv.memory.client_page import TIERS
from tiered_kv.metrics.table import EVICTION_REASONS, MetricSample
from tiered_kv.node.monitoring.client_counts import ClientSums, Names
from tiered_kv.node.monitoring.labels import LABELS_MAX, OTHER, BoundedLabels
from tiered_kv.node.monitoring.meters import Durations, Meters
from tiered_kv.protocol.messages import NO_PEERS, NodeStats

PEER, WORKER, HOST = "peer", "worker", "host"
RESULTS = ("new", "present", "refused")


class MeteredNode(Protocol):
    """A node whose figures are exported."""

    @property
    def node_id(self) -> str: ...
    @property
    def meters(self) -> Meters: ...
    def stats(self) -> NodeStats: ...


class NodeReading(NamedTuple):
    """The figures of a node at one moment. `tenants`: the labels of tenants so far."""

    stats: NodeStats
    clients: dict[Names, ClientSums]
    durations: Durations
    tenants: BoundedLabels[str]


class NodeSamples:
    """Reads a node's figures and returns their samples. Thread-safe. A reading takes about 0.2 ms, and 30 µs for each client."""

    def __init__(self, node: MeteredNode) -> None:
        self._node = node
        self._tenants: BoundedLabels[str] = BoundedLabels(OTHER)

    def __call__(self) -> Iterator[MetricSample]:
        """Yields all samples, with the values of all labels but `node`."""
        meters = self._node.meters
        reading = NodeReading(self._node.stats(), meters.read_clients(), meters.durations(), self._tenants)
        for sampler in SAMPLERS:
            yield from sampler(reading)


def client_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields what clients asked for and got, by namespace and tenant."""
    for who, (counts, fetch, store) in reading.clients.items():
        for unit in ("blocks", "tokens"):
            yield MetricSample(f"requested_{unit}_total", counts[f"asked_{unit}"], who)
            yield MetricSample(f"missed_{unit}_total", counts[f"missed_{unit}"], who)
            for tier in TIERS:
                yield MetricSample(
                    f"hit_{unit}_total", counts[f"hit_blocks_{tier}" if unit == "blocks" else f"hit_{tier}_tokens"], (tier, *who)
                )
        yield MetricSample("prefill_saved_tokens_total", counts["prefill_tokens_saved"], who)
        yield MetricSample("prefill_saved_seconds_total", counts["prefill_us_saved"] / 1e6, who)
        yield MetricSample("fetch_seconds", fetch, who)
        yield MetricSample("store_seconds", store, who)
        for result in RESULTS:
            yield MetricSample("stored_blocks_total", counts[f"{result}_blocks"], (result, *who))
        yield MetricSample("degraded_calls_total", counts["degraded"], who)
        yield MetricSample("read_retries_total", counts["retries"], who)


def route_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields the bytes moved by route. A block from a peer moves from the peer to host, and from there to the worker."""
    stats, moved = reading.stats, dict[tuple[str, str], int]()
    for source, targets in stats.get("moved_bytes", {}).items():
        for target, nbytes in targets.items():
            moved[source, target] = nbytes
    for counts, _, _ in reading.clients.values():
        moved[WORKER, HOST] = moved.get((WORKER, HOST), 0) + counts["new_bytes"]
        for tier in TIERS:
            route = (HOST if tier == PEER else tier), WORKER
            moved[route] = moved.get(route, 0) + counts[f"hit_{tier}_bytes"]
    peers = stats.get("peers", NO_PEERS)
    moved[PEER, HOST] = peers.get("fetched_bytes", 0)
    moved[HOST, PEER] = peers["served_bytes"]
    for route, nbytes in sorted(moved.items()):
        yield MetricSample("moved_bytes_total", nbytes, route)


def duration_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields the histograms of the node's own work."""
    for name, counts in reading.durations._asdict().items():
        yield MetricSample(f"{name}_seconds", counts)


def tier_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields use and caps of the tiers, and what leaves them."""
    for tier, figures in reading.stats["tiers"].items():
        yield MetricSample("tier_used_bytes", figures["used_bytes"], (tier,))
        yield MetricSample("tier_capacity_bytes", figures["capacity_bytes"], (tier,))
        yield MetricSample("tier_blocks", figures["blocks"], (tier,))
        if "write_amplification" in figures:
            yield MetricSample("write_amplification_ratio", figures["write_amplification"], (tier,))
        yield MetricSample("leaving_bytes", reading.stats["leaving_bytes"].get(tier, 0), (tier,))


def tenant_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields the tenants' use of the tiers. Tenants beyond LABELS_MAX are added up."""
    used: dict[tuple[str, str], float] = {}
    quotas: dict[tuple[str, str], float] = {}
    for tenant, tiers in reading.stats.get("tenants", {}).items():
        label = reading.tenants.label(tenant)
        for tier, figures in tiers.items():
            used[tier, label] = used.get((tier, label), 0) + figures["used_bytes"]
            if figures["quota_bytes"] is not None:
                quotas[tier, label] = quotas.get((tier, label), 0) + figures["quota_bytes"]
    yield from (MetricSample("tenant_used_bytes", nbytes, labels) for labels, nbytes in used.items())
    yield from (MetricSample("tenant_quota_bytes", nbytes, labels) for labels, nbytes in quotas.items())


_MACHINE = {
    "committed": "committed_blocks_total",
    "demoted": "demoted_blocks_total",
    "promoted": "promoted_blocks_total",
    "demote_failed": "failed_demotions_total",
    "reinserted": "reinserted_blocks_total",
    "shrunk": "shrunk_blocks_total",
    "over_quota": "over_quota_blocks_total",
    "pins_refused": "refused_pins_total",
}


def machine_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields the counts of the store machine."""
    counts = reading.stats["counts"]
    yield from (MetricSample(name, counts.get(count, 0)) for count, name in _MACHINE.items())
    yield from (MetricSample("evicted_blocks_total", counts.get(reason, 0), (reason,)) for reason in EVICTION_REASONS)
    yield from (MetricSample("freed_copies_total", counts.get(f"{tier}_freed", 0), (tier,)) for tier in ("device", HOST))


def codec_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields encoded blocks, their errors, and refusals."""
    stats, codecs = reading.stats, reading.stats["codecs"]
    most = codecs.get("most_error")
    for tier, by_codec in codecs["coded"].items():
        for codec, figures in by_codec.items():
            labels, error = (tier, codec), figures.get("mean_error", 0.0)
            yield MetricSample("encoded_blocks_total", figures["blocks"], labels)
            yield MetricSample("encoded_raw_bytes_total", figures["raw_bytes"], labels)
            yield MetricSample("encoded_kept_bytes_total", figures["kept_bytes"], labels)
            yield MetricSample("block_error_ratio", error, labels)
            yield MetricSample("error_budget_spent_ratio", error / most if most else 0.0, labels)
    yield from (MetricSample("fallback_blocks_total", blocks, (reason,)) for reason, blocks in codecs["fell_back"].items())
    for reason, by_codec_refused in stats.get("refusals", {}).items():
        yield from (MetricSample("refused_blocks_total", blocks, (reason, codec)) for codec, blocks in by_codec_refused.items())


def integrity_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields what checksums found."""
    stats, seals = reading.stats, reading.stats["seals"]
    yield from (MetricSample("checksum_failures_total", blocks, (tier,)) for tier, blocks in stats.get("checksum_failures", {}).items())
    yield MetricSample("quarantined_extents", stats.get("quarantined_extents", 0))
    yield MetricSample("mended_slots_total", seals["slots_mended"])
    yield MetricSample("scrubbed_blocks_total", seals["scrubbed"])
    yield MetricSample("unsealed_blocks", seals["unsealed"])


def peer_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields failures between nodes."""
    peers = reading.stats.get("peers", NO_PEERS)
    for peer, pair in peers["peers"].items():
        yield from (MetricSample("peer_failures_total", count, (peer, reason)) for reason, count in pair["failures"].items())
    yield from (MetricSample("refused_callers_total", count, (reason,)) for reason, count in peers["refused"].items())
    yield MetricSample("directory_lookups_total", peers["located"])


def service_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields the node's life, its policy and its weights."""
    stats = reading.stats
    yield MetricSample("restarts_total", stats["restarts"])
    yield MetricSample("uptime_seconds", stats["uptime_s"])
    yield MetricSample("sessions", stats["sessions"])
    yield MetricSample("reserved_bytes", stats["reserved_bytes"])
    for name, value in (("policy_age_seconds", stats["policy"]["adopted_age_s"]), ("policy_known_blocks", stats["policy"]["known_blocks"])):
        if value is not None:
            yield MetricSample(name, value)
    if stats["coordinator"] is not None:
        yield MetricSample("coordinator_up", float(stats["coordinator"]))
    for each in stats["namespaces"][:LABELS_MAX]:
        yield MetricSample("weight_epoch", each["epoch"], (each["family"][:12], each["tenant"], each["weights"]))


def insight_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields what was not worth loading, and what more room would have brought."""
    stats = cast("Mapping[str, Any]", reading.stats)
    for tier, tokens in stats.get("declined_tokens", {}).items():
        yield MetricSample("declined_tokens_total", tokens, (tier,))
    ceiling = stats.get("ceiling")
    if ceiling and ceiling["asked_blocks"]:
        yield MetricSample("ceiling_hit_ratio", ceiling["hit_blocks_infinite"] / ceiling["asked_blocks"])
        yield MetricSample("twice_room_hit_ratio", ceiling["hit_blocks_twice_room"] / ceiling["asked_blocks"])


def checkpoint_samples(reading: NodeReading) -> Iterator[MetricSample]:
    """Yields the last checkpoint and the last restore."""
    saved, filling = reading.stats["saved"], reading.stats["filling"]
    if saved:
        yield MetricSample("checkpoint_timestamp_seconds", saved["at_s"])
    if filling:
        states = {
            "mounted": filling["blocks"],
            "loaded": filling["nearer"],
            "damaged": filling["damaged"],
            "too lossy": filling["too_lossy"],
        }
        yield from (MetricSample("restored_blocks", blocks, (state,)) for state, blocks in states.items())


SAMPLERS: tuple[Callable[[NodeReading], Iterator[MetricSample]], ...] = (
    client_samples,
    route_samples,
    duration_samples,
    tier_samples,
    tenant_samples,
    machine_samples,
    codec_samples,
    integrity_samples,
    peer_samples,
    service_samples,
    insight_samples,
    checkpoint_samples,
)
