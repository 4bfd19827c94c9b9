"""From what a node says of itself to a client of it: the one place where a client is put together."""

from collections.abc import Callable

from tiered_kv.clock import Clock
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.memory.view import NodeView
from tiered_kv.service.client import Client
from tiered_kv.service.local import SocketSession
from tiered_kv.service.reading import BlockSource
from tiered_kv.service.session import Session
from tiered_kv.tiers.segments import SegmentReader

ANSWER_WITHIN_S = 5.0


def client_of(
    info: dict,
    layout: KVLayout,
    namespace: Namespace,
    *,
    connect: Callable[[], Session] | None = None,
    clock: Clock | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> Client:
    """A client of the node that `info` (`Node.info`) describes, on this machine; through its socket unless `connect` is given."""
    view = NodeView.open(info["directory"])
    segments = SegmentReader(info["disk_folder"]) if info["disk_folder"] else None
    timeout_s = ANSWER_WITHIN_S + info["store_wait_ms"] / 1000
    return Client(
        layout,
        namespace,
        BlockSource(view, segments, layout, has_device=info["has_device"]),
        connect or (lambda: SocketSession(f"{info['directory']}/sock", timeout_s)),
        deadline_ms=info["fetch_deadline_ms"],
        clock=clock,
        on_close=on_close,
    )
