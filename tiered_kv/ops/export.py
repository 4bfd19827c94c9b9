"""A monitor's metrics for others: as a dictionary, in Prometheus' text format, and to TensorBoard and Weights & Biases."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.ops.monitor import CacheMetrics, CacheMonitor

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = "tiered_kv_cache"
_HELP = {
    "hit_rate": "Share of the blocks looked for that were had, since the cache began.",
    "recent_hit_rate": "The same over the monitor's window.",
    "lookups": "Blocks looked for.",
    "hits": "Blocks had.",
    "misses": "Blocks not had.",
    "evictions": "Blocks given up for room.",
    "num_entries": "Blocks in the cache.",
    "memory_usage_mb": "Memory of blocks in MiB.",
    "memory_share": "Share of the memory for blocks that is used.",
    "operations": "Operations recorded.",
    "operation_time_s": "Mean time of an operation in the window, in seconds.",
    "operation_time_p99_s": "99th percentile of operation times in the window, in seconds.",
    "operations_per_s": "Operations a second in the window.",
}
_COUNTERS = ("lookups", "hits", "misses", "evictions", "operations")
assert list(_HELP) == [field.name for field in fields(CacheMetrics)], "a metric without help"


class MetricsExporter:
    """Forms of a monitor's last metrics."""

    @staticmethod
    def export_to_dict(monitor: CacheMonitor) -> dict[str, Any]:
        """As `CacheMonitor.get_summary`; ready for JSON."""
        return monitor.get_summary()

    @staticmethod
    def export_to_prometheus_format(monitor: CacheMonitor) -> str:
        """Prometheus' text format, version 0.0.4; counts end in `_total`, alerts that go on are a gauge of 1 by metric and bound."""
        lines = []
        for name, value in monitor.get_summary()["metrics"].items():
            kind = "counter" if name in _COUNTERS else "gauge"
            full = f"{PREFIX}_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {full} {_HELP[name]}", f"# TYPE {full} {kind}", f"{full} {float(value)!r}"]
        lines += [f"# HELP {PREFIX}_alert Alerts that go on.", f"# TYPE {PREFIX}_alert gauge"]
        lines += [f'{PREFIX}_alert{{metric="{alert.metric}",bound="{alert.bound}"}} 1.0' for alert in monitor.get_alerts()]
        return "\n".join(lines) + "\n"


class TensorBoardWriter:
    """Writes metrics as TensorBoard scalars below `folder`. Needs the extra `tensorboard`; a context manager."""

    def __init__(self, folder: "str | Path") -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = SummaryWriter(str(folder))

    def write(self, monitor: CacheMonitor, step: int) -> None:
        """The metrics of the last update, at this step."""
        for name, value in monitor.get_summary()["metrics"].items():
            self._writer.add_scalar(f"cache/{name}", value, step)

    def close(self) -> None:
        """Write what is not yet written."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WandbWriter:
    """Logs metrics to a Weights & Biases run that was begun by the caller (`wandb.init`), or begins one with `settings`."""

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
        """The metrics of the last update, at this step."""
        self._run.log({f"cache/{name}": value for name, value in monitor.get_summary()["metrics"].items()}, step=step)

    def close(self) -> None:
        """End the run, if it was begun here."""
        if self._own:
            self._run.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _missing(extra: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"{extra} is not installed: pip install 'tiered-kv[{extra}]'", setting=extra)
