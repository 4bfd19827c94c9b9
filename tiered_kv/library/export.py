"""Exports a monitor's metrics: as a dictionary, in Prometheus' text format, to TensorBoard, and to Weights & Biases."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.library.monitor import CacheMetrics, CacheMonitor

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = "tiered_kv_cache"
_HELP = {
    "hit_rate": "Share of the requested blocks that were hits, since the cache was created.",
    "recent_hit_rate": "Share of the requested blocks that were hits, over the monitor's window.",
    "lookups": "Blocks requested.",
    "hits": "Requested blocks that were in the cache.",
    "misses": "Requested blocks that were not in the cache.",
    "evictions": "Blocks evicted to make room.",
    "num_entries": "Blocks in the cache.",
    "memory_usage_mb": "Memory used by blocks, in MiB.",
    "memory_share": "Share of the memory for blocks that is in use.",
    "refused_blocks": "Blocks that found no room in time.",
    "damaged_blocks": "Blocks dropped because their checksum was wrong.",
    "dropped_under_pressure": "Blocks dropped because the tier below was too slow.",
    "operations": "Operations recorded.",
    "operation_time_s": "Mean time of an operation in the window, in seconds.",
    "operation_time_p99_s": "99th percentile of operation times in the window, in seconds.",
    "operations_per_s": "Operations per second in the window.",
}
_COUNTERS = ("lookups", "hits", "misses", "evictions", "refused_blocks", "damaged_blocks", "dropped_under_pressure", "operations")
assert list(_HELP) == [field.name for field in fields(CacheMetrics)], "every metric needs a help text"


class MetricsExporter:
    """Exports the last metrics of a monitor in several formats."""

    @staticmethod
    def export_to_dict(monitor: CacheMonitor) -> dict[str, Any]:
        """Returns the result of `CacheMonitor.get_summary`, which is JSON-ready."""
        return monitor.get_summary()

    @staticmethod
    def export_to_prometheus_format(monitor: CacheMonitor) -> str:
        """Returns the metrics in Prometheus' text format, version 0.0.4.

        Counters end in `_total`. Each active alert is a gauge of 1, labelled with its metric and bound.
        """
        lines = []
        for name, value in monitor.get_summary()["metrics"].items():
            kind = "counter" if name in _COUNTERS else "gauge"
            full = f"{PREFIX}_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {full} {_HELP[name]}", f"# TYPE {full} {kind}", f"{full} {float(value)!r}"]
        lines += [f"# HELP {PREFIX}_alert Active alerts.", f"# TYPE {PREFIX}_alert gauge"]
        lines += [f'{PREFIX}_alert{{metric="{alert.metric}",bound="{alert.bound}"}} 1.0' for alert in monitor.get_alerts()]
        return "\n".join(lines) + "\n"


class TensorBoardWriter:
    """Writes metrics as TensorBoard scalars to `folder`. A context manager. Needs the extra `tensorboard`."""

    def __init__(self, folder: "str | Path") -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = SummaryWriter(str(folder))

    def write(self, monitor: CacheMonitor, step: int) -> None:
        """Write the metrics of the monitor's last update, under this step number."""
        for name, value in monitor.get_summary()["metrics"].items():
            self._writer.add_scalar(f"cache/{name}", value, step)

    def close(self) -> None:
        """Write all pending values, and close the writer."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WandbWriter:
    """Logs metrics to a Weights & Biases run: the caller's `run` (from `wandb.init`), or a new run with `settings`."""

    def __init__(self, run: Any = None, **settings: Any) -> None:
        self._own = run is None
        if run is None:
            try:
                import wandb
            except ImportError as error:
                raise _missing("wandb") from error
            run = wandb.init(**settings)
        self._run = run

    def write(self, monitor: CacheMonitor, step: int) -> None:
        """Log the metrics of the monitor's last update, under this step number."""
        self._run.log({f"cache/{name}": value for name, value in monitor.get_summary()["metrics"].items()}, step=step)

    def close(self) -> None:
        """Finish the run if this object started it."""
        if self._own:
            self._run.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _missing(extra: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"{extra} is not installed; to install it: pip install 'tiered-kv[{extra}]'", setting=extra)
