"""The table of all metrics. The exporters, the table in docs/monitoring.md and Grafana's dashboard are made from it.

To add a metric: add its row here, and yield its samples in a function of `node_samples.SAMPLERS`, `coordinator_samples` or
`client_samples`. Then run `python -m tiered_kv.metrics.document`, which writes the documents again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tiered_kv.memory.histogram import HistogramCounts

PREFIX = "tiered_kv_"


class Scope(StrEnum):
    """The process that exports a metric. The value is the heading of its part in the documents."""

    NODE = "Each node"
    COORDINATOR = "The coordinator"
    CLIENT = "A client, in its engine's own registry"


class MetricKind(StrEnum):
    """The type of a metric, as Prometheus names it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """A row of the table. `name`: without PREFIX. `labels`: besides `node`, which all metrics of a node have.

    `panel`: the title of its panel in Grafana; None for no panel of its own.
    """

    scope: Scope
    kind: MetricKind
    name: str
    unit: str
    labels: tuple[str, ...]
    meaning: str
    source: str
    panel: str | None = None

    @property
    def full_name(self) -> str:
        """The name as Prometheus stores it."""
        return PREFIX + self.name

    @property
    def all_labels(self) -> tuple[str, ...]:
        """All labels, in the order of a sample's values."""
        return ("node", *self.labels) if self.scope is Scope.NODE else self.labels


@dataclass(frozen=True)
class MetricSample:
    """A value of a metric. `labels`: the values of `Metric.labels`, in their order."""

    name: str
    value: float | HistogramCounts
    labels: tuple[str, ...] = ()


WHO = ("namespace", "tenant")
COUNTER, GAUGE, HISTOGRAM = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM
_CLIENTS = "clients' pages in shared memory"


def _rows(scope: Scope, *rows: tuple[MetricKind, str, str, tuple[str, ...], str, str, str | None]) -> Iterator[Metric]:
    for row in rows:
        yield Metric(scope, *row)


METRICS: tuple[Metric, ...] = (
    *_rows(
        Scope.NODE,
        (COUNTER, "requested_blocks_total", "blocks", WHO, "Blocks that fetches asked for.", _CLIENTS, "Requested blocks"),
        (COUNTER, "requested_tokens_total", "tokens", WHO, "Tokens of these blocks.", _CLIENTS, None),
        (COUNTER, "hit_blocks_total", "blocks", ("tier", *WHO), "Blocks that fetches returned, by the tier that had them.", _CLIENTS, None),
        (COUNTER, "hit_tokens_total", "tokens", ("tier", *WHO), "Tokens of these blocks.", _CLIENTS, "Tokens served by tier"),
        (COUNTER, "missed_blocks_total", "blocks", WHO, "Blocks that fetches did not return: requested minus hits.", _CLIENTS, None),
        (COUNTER, "missed_tokens_total", "tokens", WHO, "Tokens of these blocks.", _CLIENTS, "Missed tokens"),
        (
            *(COUNTER, "declined_tokens_total", "tokens", ("tier",)),
            *("Missed tokens that were there, but slower to load than to compute.", "index header", "Declined tokens"),
        ),
        (
            *(GAUGE, "ceiling_hit_ratio", "ratio", ()),
            *("Estimated hit ratio of an infinite cache, in blocks since the node started.", "ceiling sketch", "Hit ratio with more room"),
        ),
        (
            *(GAUGE, "twice_room_hit_ratio", "ratio", ()),
            *("Estimated hit ratio with twice the room in each tier.", "ceiling sketch", "Hit ratio with twice the room"),
        ),
        (COUNTER, "prefill_saved_tokens_total", "tokens", WHO, "Prompt tokens that models did not compute.", _CLIENTS, None),
        (
            *(COUNTER, "prefill_saved_seconds_total", "seconds", WHO),
            *("Time by which fetching these tokens was faster than computing them.", _CLIENTS, "Prefill seconds saved"),
        ),
        (HISTOGRAM, "fetch_seconds", "seconds", WHO, "Durations of fetches.", _CLIENTS, "Fetch duration"),
        (HISTOGRAM, "store_seconds", "seconds", WHO, "Durations of stores.", _CLIENTS, "Store duration"),
        (
            COUNTER,
            "stored_blocks_total",
            "blocks",
            ("result", *WHO),
            "Blocks of stores: new, present or refused.",
            _CLIENTS,
            "Stored blocks",
        ),
        (COUNTER, "degraded_calls_total", "calls", WHO, "Clients' calls that went on without their node.", _CLIENTS, "Degraded calls"),
        (COUNTER, "read_retries_total", "reads", WHO, "Look-ups and reads during which the block changed.", _CLIENTS, "Read retries"),
        (
            *(COUNTER, "moved_bytes_total", "bytes", ("source", "target")),
            *("Bytes moved, by route. Ends of routes: tiers, worker, peer.", "store machine, clients, peers", "Bytes moved by route"),
        ),
        (HISTOGRAM, "transfer_seconds", "seconds", (), "Durations of transfers from other nodes.", "puller", "Transfer duration"),
        (HISTOGRAM, "demotion_seconds", "seconds", (), "Durations of batches copied to a lower tier.", "engine", "Demotion duration"),
        (HISTOGRAM, "promotion_seconds", "seconds", (), "Durations of batches copied to a faster tier.", "engine", None),
        (GAUGE, "tier_used_bytes", "bytes", ("tier",), "Bytes in use.", "tiers", "Tier use"),
        (GAUGE, "tier_capacity_bytes", "bytes", ("tier",), "Hard cap of the tier.", "settings", None),
        (GAUGE, "tier_blocks", "blocks", ("tier",), "Blocks with a copy in the tier.", "store machine", "Blocks by tier"),
        (GAUGE, "tenant_used_bytes", "bytes", ("tier", "tenant"), "Bytes of a tenant's blocks.", "quotas", "Tenants"),
        (GAUGE, "tenant_quota_bytes", "bytes", ("tier", "tenant"), "Quota of a tenant, if it has one.", "settings", None),
        (
            COUNTER,
            "committed_blocks_total",
            "blocks",
            (),
            "Blocks that became visible: stored by workers, or pulled.",
            "store machine",
            None,
        ),
        (
            *(COUNTER, "evicted_blocks_total", "blocks", ("reason",)),
            *("Blocks that left the node, by reason (see below).", "store machine", "Evicted blocks"),
        ),
        (COUNTER, "freed_copies_total", "blocks", ("tier",), "Copies that were freed while a slower copy stayed.", "store machine", None),
        (COUNTER, "demoted_blocks_total", "blocks", (), "Blocks copied to a lower tier.", "store machine", "Demoted and promoted"),
        (COUNTER, "promoted_blocks_total", "blocks", (), "Blocks copied to a faster tier.", "store machine", None),
        (COUNTER, "failed_demotions_total", "blocks", (), "Blocks that a lower tier could not take.", "store machine", None),
        (COUNTER, "reinserted_blocks_total", "blocks", (), "Used blocks that were written again on disk.", "store machine", None),
        (COUNTER, "shrunk_blocks_total", "blocks", (), "Blocks that were encoded in host memory.", "store machine", None),
        (COUNTER, "over_quota_blocks_total", "blocks", (), "Blocks evicted because their tenant reached a quota.", "store machine", None),
        (COUNTER, "refused_pins_total", "hints", (), "Hints to keep a chain that found no room.", "store machine", None),
        (GAUGE, "leaving_bytes", "bytes", ("tier",), "Bytes that wait for their copy to a lower tier.", "engine", "Waiting to be demoted"),
        (
            *(COUNTER, "refused_blocks_total", "blocks", ("reason", "codec")),
            *("Blocks not stored (no room), not written, or not shown (too lossy).", "sessions, tiers, allowance", "Refused blocks"),
        ),
        (COUNTER, "fallback_blocks_total", "blocks", ("reason",), "Blocks that got a better codec than planned.", "encoder", None),
        (COUNTER, "encoded_blocks_total", "blocks", ("tier", "codec"), "Blocks encoded for a tier.", "encoder", "Encoded blocks"),
        (COUNTER, "encoded_raw_bytes_total", "bytes", ("tier", "codec"), "Bytes of these blocks before.", "encoder", None),
        (COUNTER, "encoded_kept_bytes_total", "bytes", ("tier", "codec"), "Bytes of these blocks after.", "encoder", None),
        (GAUGE, "block_error_ratio", "ratio", ("tier", "codec"), "Mean relative squared error of encoded blocks.", "encoder", None),
        (
            *(GAUGE, "error_budget_spent_ratio", "ratio", ("tier", "codec")),
            *("This error as a share of the largest that the settings allow.", "encoder", "Error budget spent"),
        ),
        (
            *(COUNTER, "checksum_failures_total", "blocks", ("tier",)),
            *("Damaged blocks found and dropped, by the tier or peer they were read from.", "seals, tiers, peers", "Checksum failures"),
        ),
        (
            *(GAUGE, "quarantined_extents", "extents", ()),
            *("Extents of ended workers, kept because a process may still write there.", "quarantine", "Quarantined extents"),
        ),
        (COUNTER, "mended_slots_total", "slots", (), "Damaged index slots that were written again.", "seals", None),
        (COUNTER, "scrubbed_blocks_total", "blocks", (), "Blocks compared with their seals.", "seals", None),
        (GAUGE, "unsealed_blocks", "blocks", (), "Blocks that wait for their seal.", "seals", None),
        (COUNTER, "peer_failures_total", "requests", ("peer", "reason"), "Failed requests to a peer.", "peers", "Failures of peers"),
        (COUNTER, "refused_callers_total", "callers", ("reason",), "Connections from other processes that were refused.", "peers", None),
        (COUNTER, "directory_lookups_total", "look-ups", (), "Look-ups in the directory without Ray.", "peers", None),
        (
            GAUGE,
            "policy_age_seconds",
            "seconds",
            (),
            "Since the policy adopted other nodes' counts; absent before.",
            "policy",
            "Policy staleness",
        ),
        (GAUGE, "policy_known_blocks", "blocks", (), "Blocks that the policy remembers, if it learns.", "policy", None),
        (COUNTER, "restarts_total", "restarts", (), "Restarts of the node with the same files.", "index header", "Restarts"),
        (GAUGE, "uptime_seconds", "seconds", (), "Since the node started.", "node", "Uptime"),
        (GAUGE, "sessions", "sessions", (), "Open sessions of workers.", "node", "Sessions of workers"),
        (GAUGE, "reserved_bytes", "bytes", (), "Room that workers have reserved and not committed.", "node", None),
        (GAUGE, "coordinator_up", "0 or 1", (), "Whether the coordinator answered the last report.", "reporter", "Coordinator answers"),
        (
            *(GAUGE, "weight_epoch", "epoch", ("namespace", "tenant", "weights")),
            *("Present weight epoch of a namespace.", "book of roots", None),
        ),
        (GAUGE, "write_amplification_ratio", "ratio", ("tier",), "Bytes written for each byte of blocks.", "disk tier", None),
        (GAUGE, "checkpoint_timestamp_seconds", "Unix time", (), "When the last checkpoint was complete.", "checkpoint writer", None),
        (GAUGE, "restored_blocks", "blocks", ("state",), "Blocks of the last restore, by state.", "checkpoint loader", None),
    ),
    *_rows(
        Scope.COORDINATOR,
        (GAUGE, "nodes", "nodes", ("state",), "Nodes that report (live) and that stopped to report (lost).", "coordinator", "Nodes"),
        (GAUGE, "node_silent_seconds", "seconds", ("node",), "Since a live node's last report.", "coordinator", "Silence of nodes"),
        (GAUGE, "directory_entries", "entries", (), "Pairs of block and node in the directory.", "directory", "Directory entries"),
        (GAUGE, "directory_bytes", "bytes", (), "Memory of the directory.", "directory", "Directory memory"),
        (GAUGE, "directory_blocks", "blocks", ("node",), "Blocks of a node in the directory.", "directory", None),
        (COUNTER, "coordinator_restarts_total", "restarts", (), "Restarts of the coordinator.", "keeper", "Coordinator restarts"),
        (GAUGE, "coordinator_uptime_seconds", "seconds", (), "Since the coordinator started.", "keeper", None),
        (GAUGE, "members", "nodes", ("state",), "Members of the fleet, by state.", "keeper", "Members"),
        (GAUGE, "keeper_round_age_seconds", "seconds", (), "Since the keeper last looked at the fleet with success.", "keeper", None),
    ),
    *_rows(
        Scope.CLIENT,
        (COUNTER, "client_requested_blocks_total", "blocks", (), "Blocks that fetches asked for.", "client", None),
        (COUNTER, "client_hit_blocks_total", "blocks", ("tier",), "Blocks that fetches returned.", "client", None),
        (COUNTER, "client_missed_blocks_total", "blocks", (), "Blocks that fetches did not return.", "client", None),
        (COUNTER, "client_fetches_total", "calls", (), "Fetches.", "client", None),
        (COUNTER, "client_stores_total", "calls", (), "Stores.", "client", None),
        (COUNTER, "client_stored_blocks_total", "blocks", ("result",), "Blocks of stores: new, present or refused.", "client", None),
        (COUNTER, "client_degraded_calls_total", "calls", (), "Calls that went on without the node.", "client", None),
        (COUNTER, "client_node_calls_total", "calls", (), "Calls to the node.", "client", None),
        (COUNTER, "client_read_retries_total", "reads", (), "Look-ups and reads during which the block changed.", "client", None),
        (COUNTER, "client_prefill_saved_tokens_total", "tokens", (), "Prompt tokens that the model did not compute.", "client", None),
        (COUNTER, "client_prefill_saved_seconds_total", "seconds", (), "Time saved by this.", "client", None),
        (GAUGE, "client_prefill_tokens_per_second", "tokens/s", (), "Measured prefill rate; absent before.", "client", None),
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}


def of_scope(scope: Scope) -> list[Metric]:
    """Returns the metrics that one kind of process exports."""
    return [metric for metric in METRICS if metric.scope is scope]


EVICTION_REASONS = {
    "dropped": "there is no lower tier, or it refused the block",
    "not_admitted": "the lower tier is full, and nothing suggests another use",
    "dropped_under_pressure": "the lower tier is too slow",
    "lost": "damaged, or its segment was removed",
    "ended": "its weights have ended, or it was purged",
    "unmounted": "index slots were short for a checkpoint's blocks",
}
"""The values of the label `reason` of `evicted_blocks_total`, with their meanings. They are counts of the store machine."""
