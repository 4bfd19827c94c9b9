"""The connector's figures in vLLM's own log and metrics."""

from collections import Counter
from typing import Any

import prometheus_client
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "asked_blocks": "Blocks that the scheduler looked up.",
    "promised_blocks": "Blocks that a look-up found.",
    "loaded_blocks": "Blocks copied to the engine's pages.",
    "declined_blocks": "Blocks that a look-up found, and that the engine computes because loading them would take longer.",
    "failed_blocks": "Promised blocks that could not be loaded in time. The engine computes them.",
    "stored_blocks": "Blocks stored for the first time.",
    "refused_blocks": "Blocks not stored: no room in time, or no node.",
    "unanswered_lookups": "Requests that went on before the nodes of other machines had answered.",
    "bypassed_requests": "Requests that are not cached, such as those with images.",
    "load_seconds": "Time spent on loads.",
    "store_seconds": "Time spent on stores.",
}
"""The counters and their descriptions. In addition, `loaded_blocks_TIER` counts the loaded blocks of each tier."""


class Stats(KVConnectorStats):
    """The counts of one interval, by the names in COUNTERS."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "Stats":
        self.data = dict(Counter(self.data) + Counter(other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class Metrics(KVConnectorPromMetrics):
    """The counters on vLLM's `/metrics`, as `vllm:tiered_kv_<name>_total`."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        made = {
            name: self._counter_cls(name=f"vllm:tiered_kv_{name}", documentation=f"{text} (tiered_kv)", labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        by_tier = self._counter_cls(
            name="vllm:tiered_kv_loaded_blocks_by_tier",
            documentation="Blocks copied to the engine's pages, by the tier that had them (tiered_kv)",
            labelnames=[*labelnames, "tier"],
        )
        self._counters: dict[int, dict[str, prometheus_client.Counter]] = {}
        self._by_tier = by_tier
        for engine, values in per_engine_labelvalues.items():
            self._counters[engine] = {name: counter.labels(*values) for name, counter in made.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            counter = self._counters[engine_idx].get(name)
            if counter is not None:
                counter.inc(value)
            elif name.startswith("loaded_blocks_"):
                labels = [*self.per_engine_labelvalues[engine_idx], name.removeprefix("loaded_blocks_")]
                self._by_tier.labels(*labels).inc(value)
