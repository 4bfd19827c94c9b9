"""A client's own metrics, for the registry of the engine that it works in."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry

from tiered_kv.memory.client_page import TIERS
from tiered_kv.metrics.exporter import TableCollector
from tiered_kv.metrics.table import MetricSample, Scope

_COUNTS = {
    "asked_blocks": "client_requested_blocks_total",
    "missed_blocks": "client_missed_blocks_total",
    "fetches": "client_fetches_total",
    "stores": "client_stores_total",
    "degraded": "client_degraded_calls_total",
    "node_calls": "client_node_calls_total",
    "retries": "client_read_retries_total",
    "prefill_tokens_saved": "client_prefill_saved_tokens_total",
    "prefill_seconds_saved": "client_prefill_saved_seconds_total",
}


class MeteredClient(Protocol):
    """A client of any kind."""

    def own_stats(self) -> dict[str, float | None]: ...


def client_samples(own: Mapping[str, float | None]) -> Iterator[MetricSample]:
    """Yields the samples of a client with these counts (`NodeClient.own_stats`)."""
    yield from (MetricSample(name, own.get(count) or 0) for count, name in _COUNTS.items())
    yield from (MetricSample("client_hit_blocks_total", own.get(f"hit_blocks_{tier}") or 0, (tier,)) for tier in TIERS)
    yield from (
        MetricSample("client_stored_blocks_total", own.get(f"{result}_blocks") or 0, (result,)) for result in ("new", "present", "refused")
    )
    if (rate := own.get("prefill_tokens_per_s")) is not None:
        yield MetricSample("client_prefill_tokens_per_second", rate)


def register(client: MeteredClient, registry: CollectorRegistry = REGISTRY) -> TableCollector:
    """Add the metrics of a client to a registry. Returns the collector, for `registry.unregister`.

    A scrape of the registry then reads the client's counts, and calls no other process. A registry can have one client: a second one
    raises `ValueError`, because its metrics would have the same names.
    """
    collector = TableCollector(Scope.CLIENT, lambda: client_samples(client.own_stats()))
    registry.register(collector)
    return collector
