"""Metrics for Prometheus: one table of all metrics, and the exporters and documents that are made from it.

`register(client)` adds a client's own metrics to a registry of its process, for engines that export metrics themselves.
May import: node and coordinator, whose figures it exports, protocol. Must never know: Ray, how a client works.
"""

from tiered_kv.metrics.client_samples import register

__all__ = ["register"]
