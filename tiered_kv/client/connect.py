"""From what a node says of itself to a client of it: the one place where a client is put together."""

from collections.abc import Callable
from dataclasses import asdict

from tiered_kv.client.access import AccessHolder, NodeAccess
from tiered_kv.client.client import Client
from tiered_kv.client.reader import BlockSource
from tiered_kv.client.session_pool import SessionPool
from tiered_kv.client.writer import BlockWriter
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.codecs.calibrated.tables import registered
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.memory.view import NodeView
from tiered_kv.protocol.model_info import ModelFacts
from tiered_kv.protocol.node_record import read_record
from tiered_kv.protocol.session import Session
from tiered_kv.protocol.unix_socket import SocketSession
from tiered_kv.tiers.disk.segments import SegmentReader

GREET_WITHIN_S = 5.0


def client_of(
    info: dict,
    layout: KVLayout,
    namespace: Namespace,
    *,
    rope: bytes | None = None,
    rope_halves: bool = True,
    connect: Callable[[], Session] | None = None,
    find: Callable[[], dict | None] | None = None,
    must_answer: bool = False,
    clock: Clock | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> Client:
    """A client of the node that `info` (`Node.info`) describes, on this machine; through its socket unless `connect` is given.

    `rope`, `rope_halves`: the rotation of the model's keys (`ModelFacts`). `find`: the info of the node that has taken this one's
    place, when it is gone (default: of the one in the same directory); with `connect` it is asked within calls, else by a thread.
    Connects within GREET_WITHIN_S; a node that does not answer by then is an error (kind `transport`) only if it `must_answer`.
    Raises as `Coder.introduce`, where the node's settings ask for what the model does not have, and where a calibration that is
    needed cannot be read.
    """

    def knock(info: dict, wait_s: float) -> Session:
        return connect() if connect else SocketSession(f"{info['directory']}/sock", wait_s)

    def introduce(session: Session, namespace: Namespace) -> None:
        """Tell the node of the model, also after it was restarted."""
        facts = ModelFacts(layout, namespace.weights, rope, rope_halves, asdict(namespace))
        told = session.introduce(namespace.root(layout), facts.as_message())
        if told["calibration"]:  # without it nothing could be read
            registered(told["calibration"])

    def access_of(present: dict | None) -> NodeAccess:
        told = present or info
        view = NodeView.open(told["directory"]) if present else NodeView.vacant(told["directory"])
        seen = {"has_device": bool(present and present["has_device"]), "verifies": told.get("verify_host", False)}
        source = BlockSource(view, _segments(present), layout, **seen)
        pool = SessionPool(
            lambda wait_s: knock(told, wait_s),
            view,
            clock or SystemClock(),
            greet=lambda session: introduce(session, client.namespace),
        )
        return NodeAccess(told, view, source, BlockWriter(layout, source), pool)

    find = find or (lambda: _in_its_place(info))
    holder = AccessHolder(access_of(info), find, knock, access_of, in_background=connect is None)
    client = Client(layout, namespace, holder, introduce, clock=clock, on_close=on_close)
    try:
        client.greet(GREET_WITHIN_S, must_answer)
    except BaseException:
        client.close()
        raise
    return client


def _in_its_place(info: dict) -> dict:
    """What the node in the same directory says of itself now; as before where it has left no record."""
    record = read_record(info["directory"])
    return record.info if record else info


def _segments(info: dict | None) -> SegmentReader | None:
    return SegmentReader(info["disk_folder"]) if info and info["disk_folder"] else None
