"""Public access to monitoring a cache: the monitor, its metrics and alerts, and their export."""

from tiered_kv.library.export import MetricsExporter, TensorBoardWriter, WandbWriter
from tiered_kv.library.monitor import Alert, CacheMetrics, CacheMonitor

__all__ = ["Alert", "CacheMetrics", "CacheMonitor", "MetricsExporter", "TensorBoardWriter", "WandbWriter"]
