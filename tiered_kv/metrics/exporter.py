"""Exports samples by the rows of the table, as a collector of `prometheus_client`."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tiered_kv.memory.histogram import BOUNDS_S, HistogramCounts
from tiered_kv.metrics.table import Metric, MetricKind, MetricSample, Scope, of_scope

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class TableCollector(Collector):
    """Collects the metrics of one scope. `read` returns their samples. `node`: the value of the label `node`, for a node's metrics.

    Each metric of the scope is exported, with its help text, even while it has no sample.
    """

    def __init__(self, scope: Scope, read: Callable[[], Iterable[MetricSample]], node: str | None = None) -> None:
        self._metrics = of_scope(scope)
        self._read = read
        self._first = () if node is None else (node,)

    def describe(self) -> Iterable[Family]:
        """Returns the families without samples. A registry calls this to compare names."""
        return [_family(metric) for metric in self._metrics]

    def collect(self) -> Iterator[Family]:
        """Yields all families with their present samples."""
        families = {metric.name: _family(metric) for metric in self._metrics}
        for sample in self._read():
            _add(families[sample.name], [*self._first, *sample.labels], sample.value)
        yield from families.values()


def _family(metric: Metric) -> Family:
    if metric.kind is MetricKind.COUNTER:
        return CounterMetricFamily(metric.full_name, metric.meaning, labels=metric.all_labels)
    if metric.kind is MetricKind.GAUGE:
        return GaugeMetricFamily(metric.full_name, metric.meaning, labels=metric.all_labels)
    return HistogramMetricFamily(metric.full_name, metric.meaning, labels=metric.all_labels)


def _add(family: Family, labels: list[str], value: float | HistogramCounts) -> None:
    if isinstance(value, HistogramCounts):
        assert isinstance(family, HistogramMetricFamily)
        total, buckets = 0, list[tuple[str, float]]()
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), value.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, value.sum_s)
    else:
        assert not isinstance(family, HistogramMetricFamily)
        family.add_metric(labels, value)


def exposition(collector: Collector) -> Callable[[str], tuple[str, bytes]]:
    """Returns a function that collects now. It takes the request's Accept header, and returns the content type and the text."""
    registry = CollectorRegistry()
    registry.register(collector)

    def page(accept: str) -> tuple[str, bytes]:
        encode, content_type = choose_encoder(accept)
        return content_type, encode(registry)

    return page
