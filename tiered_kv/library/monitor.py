"""Monitors a cache: computes metrics from its statistics and from recent operation times, and raises each alert once."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from tiered_kv.clock import Clock, SystemClock
from tiered_kv.errors import Kind, TieredKVError

log = logging.getLogger(__name__)

HYSTERESIS = 0.05
"""An alert ends when its metric is back within the threshold by at least this share of the threshold's value."""


@dataclass(frozen=True)
class CacheMetrics:
    """The metrics at one moment. Rates are from 0 to 1, counts since the cache was created, memory in MiB, times in seconds.

    hit_rate: the share of requested blocks that were hits. recent_hit_rate: the same over the monitor's window. operations: the
    number of operations recorded with `record_operation`. The operation times and operations_per_s are over the window. refused_blocks:
    blocks that found no room in time. damaged_blocks: blocks dropped because their checksum was wrong. dropped_under_pressure: blocks
    dropped because the tier below was too slow.
    """

    hit_rate: float = 0.0
    recent_hit_rate: float = 0.0
    lookups: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_entries: int = 0
    memory_usage_mb: float = 0.0
    memory_share: float = 0.0
    refused_blocks: int = 0
    damaged_blocks: int = 0
    dropped_under_pressure: int = 0
    operations: int = 0
    operation_time_s: float = 0.0
    operation_time_p99_s: float = 0.0
    operations_per_s: float = 0.0


class Advice(NamedTuple):
    """The texts for alerts on one metric.

    words: a readable name of the metric. is_least: whether a threshold given as a plain number is a lower bound (else an upper
    bound). too_low, too_high: what to do if the metric is below its lower or above its upper threshold.
    """

    words: str
    is_least: bool
    too_low: str
    too_high: str


_MORE_MEMORY = "raise max_tokens, quantize (use_quantization), or add a disk tier"
_IDLE = "less memory is enough: lower max_tokens"
_PROFILE = "see the profile (enable_profiling)"
THRESHOLDS: dict[str, Advice] = {
    "hit_rate": Advice("hit rate", True, f"few prompts share a prefix, or memory is too small: {_MORE_MEMORY}", "nothing is wrong"),
    "recent_hit_rate": Advice("recent hit rate", True, f"traffic has changed, or memory is too small: {_MORE_MEMORY}", "nothing is wrong"),
    "memory_usage_mb": Advice("memory in MiB", False, _IDLE, "lower max_tokens, or quantize (use_quantization)"),
    "memory_share": Advice("share of memory used", False, _IDLE, _MORE_MEMORY),
    "evictions": Advice("evictions", False, "nothing is wrong", f"blocks are evicted before they are used again: {_MORE_MEMORY}"),
    "num_entries": Advice(
        "blocks", False, "no blocks are stored: check that prompts are at least one block long (block_tokens)", _MORE_MEMORY
    ),
    "refused_blocks": Advice("refused blocks", False, "nothing is wrong", f"stores find no room in time: {_MORE_MEMORY}"),
    "damaged_blocks": Advice(
        "damaged blocks", False, "nothing is wrong", "no wrong block was returned; test the memory (ECC counters) and the disk"
    ),
    "dropped_under_pressure": Advice(
        "blocks dropped because the tier below was too slow", False, "nothing is wrong", "use a faster disk, or quantize (use_quantization)"
    ),
    "operation_time_s": Advice("mean operation time in s", False, "nothing is wrong", _PROFILE),
    "operation_time_p99_s": Advice("99th percentile of operation times in s", False, "nothing is wrong", _PROFILE),
    "operations_per_s": Advice("operations per second", True, "the cache is hardly used, or slow: see the profile", "traffic is high"),
}
"""The metrics for which thresholds may be set."""
_RATES = ("hit_rate", "recent_hit_rate", "memory_share")
_OF_LOOKUPS = ("hit_rate", "recent_hit_rate")
_OF_OPERATIONS = ("operation_time_s", "operation_time_p99_s", "operations_per_s")


@dataclass(frozen=True)
class Alert:
    """An alert on a metric beyond its threshold.

    `bound` is "lower" or "upper". `message` has value, threshold and advice.
    """

    metric: str
    bound: str
    threshold: float
    value: float
    since_s: float
    message: str


class CacheMonitor:
    """Metrics and alerts of one cache. Thread-safe.

    window_size: the number of recent operations and updates in the window. alert_thresholds: for each metric a number, or a
    pair (least, most) of which one may be None. A single number is the least value for hit rates and operations per second, and
    the most for all other metrics. When a metric crosses a threshold, the alert is logged once and passed to `on_alert`.
    `get_alerts` returns the alert until the metric is back within the threshold, with a margin of 5 % of the threshold. Hit
    rates are judged only after a first look-up, operation metrics only after a first operation. Raises (kind `config`) for
    unknown metrics and invalid thresholds.
    """

    def __init__(
        self,
        window_size: int = 1000,
        alert_thresholds: Mapping[str, Any] | None = None,
        *,
        on_alert: Callable[[Alert], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise TieredKVError(
                Kind.CONFIG, f"window_size: must be a whole number of at least 1, got {window_size!r}", setting="window_size"
            )
        alert_thresholds = {} if alert_thresholds is None else alert_thresholds
        if not isinstance(alert_thresholds, Mapping):
            message = f"alert_thresholds: must be a mapping from metrics to thresholds, got {type(alert_thresholds).__name__}"
            raise TieredKVError(Kind.CONFIG, message, setting="alert_thresholds")
        self.thresholds = {name: _bounds(name, given) for name, given in alert_thresholds.items()}
        self._clock = clock or SystemClock()
        self._on_alert = on_alert
        self._lock = threading.Lock()
        self._times: deque[tuple[float, float]] = deque(maxlen=window_size)  # end time and duration of each operation
        self._lookups: deque[tuple[int, int]] = deque(maxlen=window_size + 1)  # requested blocks and hits so far, at each update
        self._operations = 0
        self._alerts: dict[tuple[str, str], Alert] = {}
        self._fired = 0
        self.metrics = CacheMetrics()

    def record_operation(self, operation_time: float) -> None:
        """Record the duration of one operation in seconds.

        Raises (kind `config`) for anything but a finite number of at least 0.
        """
        if isinstance(operation_time, bool) or not isinstance(operation_time, int | float) or not 0 <= operation_time < float("inf"):
            raise TieredKVError(Kind.CONFIG, f"operation_time: must be a number of seconds, 0 or more, got {operation_time!r}")
        with self._lock:
            self._operations += 1
            self._times.append((self._clock.now_s(), float(operation_time)))

    def update_metrics(self, stats: Mapping[str, Any]) -> CacheMetrics:
        """Compute the metrics from a cache's `get_stats()`. Returns them. Also raises new alerts and ends old ones."""
        with self._lock:
            self.metrics = metrics = self._metrics(stats)
            fired = [alert for name, bounds in self.thresholds.items() for alert in self._judge(name, bounds, metrics)]
            self._fired += len(fired)
        for alert in fired:
            log.warning("%s", alert.message)
            if self._on_alert is not None:
                self._on_alert(alert)
        return metrics

    def _metrics(self, stats: Mapping[str, Any]) -> CacheMetrics:
        lookups, hits = stats.get("lookups", 0), stats.get("hits", 0)
        if self._lookups and lookups < self._lookups[-1][0]:
            self._lookups.clear()  # the cache was replaced by a new one
        self._lookups = self._lookups or deque([(0, 0)], maxlen=self._lookups.maxlen)
        self._lookups.append((lookups, hits))
        recent_lookups, recent_hits = lookups - self._lookups[0][0], hits - self._lookups[0][1]
        times = sorted(took for _, took in self._times)
        span_s = self._clock.now_s() - self._times[0][0] if self._times else 0.0
        capacity = stats.get("capacity_bytes", 0)
        return CacheMetrics(
            hit_rate=stats.get("hit_rate", hits / lookups if lookups else 0.0),
            recent_hit_rate=recent_hits / recent_lookups if recent_lookups else 0.0,
            lookups=lookups,
            hits=hits,
            misses=lookups - hits,
            evictions=stats.get("evictions", 0),
            num_entries=stats.get("num_entries", 0),
            memory_usage_mb=stats.get("memory_usage_mb", 0.0),
            memory_share=stats.get("memory_usage_bytes", 0) / capacity if capacity else 0.0,
            refused_blocks=stats.get("refused_blocks", 0),
            damaged_blocks=stats.get("damaged_blocks", 0),
            dropped_under_pressure=stats.get("dropped_under_pressure", 0),
            operations=self._operations,
            operation_time_s=sum(times) / len(times) if times else 0.0,
            operation_time_p99_s=times[min(int(len(times) * 0.99), len(times) - 1)] if times else 0.0,
            operations_per_s=len(times) / span_s if span_s > 0 else 0.0,
        )

    def _judge(self, name: str, bounds: dict[str, float], metrics: CacheMetrics) -> list[Alert]:
        """Compare one metric with its thresholds `bounds`.

        Returns the alerts that start now. Ends active alerts if the metric is within their threshold again.
        """
        begun: list[Alert] = []
        known = (name not in _OF_LOOKUPS or metrics.lookups) and (name not in _OF_OPERATIONS or metrics.operations)
        value = getattr(metrics, name)
        for bound, threshold in bounds.items() if known else ():
            beyond = value < threshold if bound == "lower" else value > threshold
            margin = abs(threshold) * HYSTERESIS
            if name in _RATES and bound == "lower":
                margin = min(margin, max(1.0 - threshold, 0.0))  # a rate of 1 is within every threshold
            inside = value >= threshold + margin if bound == "lower" else value <= threshold - margin
            if beyond and (name, bound) not in self._alerts:
                alert = Alert(name, bound, threshold, value, self._clock.now_s(), _message(name, bound, threshold, value))
                self._alerts[name, bound] = alert
                begun.append(alert)
            elif inside and not beyond:
                self._alerts.pop((name, bound), None)
        return begun

    def get_alerts(self) -> list[Alert]:
        """Returns the active alerts, oldest first."""
        with self._lock:
            return list(self._alerts.values())

    def get_summary(self) -> dict[str, Any]:
        """Returns the last metrics, the active alerts as texts, and the number of alerts so far, as JSON-ready data."""
        with self._lock:
            metrics = {field.name: getattr(self.metrics, field.name) for field in fields(CacheMetrics)}
            return {"metrics": metrics, "alerts": [alert.message for alert in self._alerts.values()], "alerts_fired": self._fired}


def _message(name: str, bound: str, threshold: float, value: float) -> str:
    advice = THRESHOLDS[name]
    if bound == "lower":
        return f"{advice.words} is {value:.4g}, below {threshold:.4g}: {advice.too_low}"
    return f"{advice.words} is {value:.4g}, above {threshold:.4g}: {advice.too_high}"


def _bounds(name: str, given: Any) -> dict[str, float]:
    """Returns the thresholds of a metric by "lower" and "upper".

    Raises (kind `config`) if the metric or threshold is invalid.
    """
    if name not in THRESHOLDS:
        raise TieredKVError(Kind.CONFIG, f"alert_thresholds: the metric must be one of {', '.join(THRESHOLDS)}, got {name!r}", setting=name)
    pair = given if isinstance(given, tuple | list) else (given, None) if THRESHOLDS[name].is_least else (None, given)
    numbers = [value for value in pair if value is not None]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf") for value in numbers)
    if len(pair) != 2 or not numbers or not are_numbers or numbers != sorted(numbers):
        message = f"alert_thresholds: {name} must be a number or a pair (least, most), of which one may be None, got {given!r}"
        raise TieredKVError(Kind.CONFIG, message, setting=name)
    return {bound: float(value) for bound, value in zip(("lower", "upper"), pair, strict=True) if value is not None}
