"""Scrapes nodes, servers and pages as Prometheus does, and parses what it gets."""

import urllib.error
import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from tiered_kv.metrics.exporter import TableCollector, exposition
from tiered_kv.metrics.node_samples import NodeSamples
from tiered_kv.metrics.table import PREFIX, Scope


class Scrape:
    """The samples of one scrape. `families` has the names of the metrics; `sum` adds up samples with these labels."""

    def __init__(self, text: str) -> None:
        self.families: set[str] = set()
        self.kinds: dict[str, str] = {}
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            name = family.name + ("_total" if family.type == "counter" else "")
            self.families.add(name)
            self.kinds[name] = family.type
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def sum(self, name: str, **labels: str) -> float:
        found = self._samples[PREFIX + name]
        return sum(value for given, value in found if labels.items() <= given.items())

    def values(self, name: str, label: str) -> set[str]:
        return {given[label] for given, _ in self._samples[PREFIX + name]}

    def series(self, name: str) -> int:
        return len(self._samples[PREFIX + name])


def scrape_node(node) -> Scrape:
    _, body = exposition(TableCollector(Scope.NODE, NodeSamples(node), node.node_id))("")
    return Scrape(body.decode())


def get(address: str, path: str = "/metrics", timeout_s: float = 30.0) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
