"""A door to watching a cache: the monitor, its metrics and alerts, and their export."""

from tiered_kv.ops.export import MetricsExporter, TensorBoardWriter, WandbWriter
from tiered_kv.ops.monitor import Alert, CacheMetrics, CacheMonitor

__all__ = ["Alert", "CacheMetrics", "CacheMonitor", "MetricsExporter", "TensorBoardWriter", "WandbWriter"]
