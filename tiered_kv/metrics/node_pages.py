"""The pages of a node's server for metrics."""

from tiered_kv.metrics.exporter import TableCollector, exposition
from tiered_kv.metrics.http_server import Page, healthz
from tiered_kv.metrics.node_samples import MeteredNode, NodeSamples
from tiered_kv.metrics.table import Scope


def node_pages(node: MeteredNode) -> dict[str, Page]:
    """Returns the pages by path: `/metrics` and `/healthz`."""
    collector = TableCollector(Scope.NODE, NodeSamples(node), node.node_id)
    return {"/metrics": exposition(collector), "/healthz": healthz}
