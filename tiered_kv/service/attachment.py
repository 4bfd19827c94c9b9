"""From what a node says of itself to a client of it: the one place where a client is put together."""

from collections.abc import Callable
from dataclasses import asdict

from tiered_kv.clock import Clock
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.memory.view import NodeView
from tiered_kv.service.client import Client
from tiered_kv.service.coding import registered
from tiered_kv.service.facts import ModelFacts
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
    rope: bytes | None = None,
    rope_halves: bool = True,
    connect: Callable[[], Session] | None = None,
    clock: Clock | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> Client:
    """A client of the node that `info` (`Node.info`) describes, on this machine; through its socket unless `connect` is given.

    `rope`, `rope_halves`: the rotation of the model's keys (`ModelFacts`). Raises as `Coder.introduce`, where the node's settings ask for
    what the model does not have, and where a calibration that is needed cannot be read.
    """
    timeout_s = ANSWER_WITHIN_S + info["store_wait_ms"] / 1000
    opened = connect or (lambda: SocketSession(f"{info['directory']}/sock", timeout_s))

    def introduce(session: Session, namespace: Namespace) -> None:
        facts = ModelFacts(layout, namespace.weights, rope, rope_halves, asdict(namespace))
        told = session.introduce(namespace.root(layout), facts.as_message())
        if told["calibration"]:  # without it nothing could be read
            registered(told["calibration"])

    def introduced() -> Session:
        """A session of a node that knows the model, also after it was restarted."""
        session = opened()
        try:
            introduce(session, client.namespace)
        except BaseException:
            session.close()
            raise
        return session

    source = BlockSource(NodeView.open(info["directory"]), _segments(info), layout, has_device=info["has_device"])
    client = Client(layout, namespace, source, introduced, introduce, deadline_ms=info["fetch_deadline_ms"], clock=clock, on_close=on_close)
    try:
        client.greet()
    except BaseException:
        client.close()
        raise
    return client


def _segments(info: dict) -> SegmentReader | None:
    return SegmentReader(info["disk_folder"]) if info["disk_folder"] else None
