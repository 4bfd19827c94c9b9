"""Builds a client from a node's info: the only place where a client is put together."""

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
from tiered_kv.layout import Layout
from tiered_kv.memory.view import NodeView
from tiered_kv.protocol.messages import NodeInfo
from tiered_kv.protocol.model_info import ModelFacts
from tiered_kv.protocol.node_record import read_record
from tiered_kv.protocol.session import Session
from tiered_kv.protocol.unix_socket import SocketSession
from tiered_kv.tiers.disk.segments import SegmentReader

GREET_WITHIN_S = 5.0


def client_of(
    info: NodeInfo,
    layout: Layout,
    namespace: Namespace,
    *,
    rope: bytes | None = None,
    rope_halves: bool = True,
    connect: Callable[[], Session] | None = None,
    find: Callable[[], NodeInfo | None] | None = None,
    must_answer: bool = False,
    clock: Clock | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> Client:
    """Returns a client of the node that `info` describes, on this machine. It uses the node's socket unless `connect` is given.

    `connect`: opens a session by direct calls. `rope`, `rope_halves`: the rotation of the model's keys (`ModelFacts`). `find`:
    returns the info of the node that has replaced this one (default: that of the record in the same directory). With `connect` it
    is called within the client's calls, else by a thread. Connects within GREET_WITHIN_S. If the node does not answer by then, raises
    (kind `transport`) only with `must_answer`. Raises as `Session.introduce` does if the node's settings require a calibration that
    the model lacks, and (kinds `storage`, `corrupt`) if a calibration that decoding needs cannot be read.
    """

    def open_session(info: NodeInfo, wait_s: float) -> Session:
        return connect() if connect else SocketSession(f"{info['directory']}/sock", wait_s)

    def introduce(session: Session, namespace: Namespace) -> None:
        """Describe the model to the node; once in each session, because the node may have been restarted."""
        facts = ModelFacts(layout, namespace.weights, rope, rope_halves, asdict(namespace))
        answer = session.introduce(namespace.root(layout), facts.as_message())
        if answer["calibration"]:  # without it no block could be decoded
            registered(answer["calibration"])

    def access_of(present: NodeInfo | None) -> NodeAccess:
        described = present or info
        view = NodeView.open(described["directory"]) if present else NodeView.vacant(described["directory"])
        options = {"has_device": bool(present and present["has_device"]), "verifies": described.get("verify_host", False)}
        source = BlockSource(view, _segments(present), layout, **options)
        pool = SessionPool(
            lambda wait_s: open_session(described, wait_s),
            view,
            clock or SystemClock(),
            greet=lambda session: introduce(session, client.namespace),
        )
        return NodeAccess(described, view, source, BlockWriter(layout, source), pool)

    find = find or (lambda: _present_info(info))
    holder = AccessHolder(access_of(info), find, open_session, access_of, in_background=connect is None)
    client = Client(layout, namespace, holder, introduce, clock=clock, on_close=on_close)
    try:
        client.greet(GREET_WITHIN_S, must_answer)
    except BaseException:
        client.close()
        raise
    return client


def _present_info(info: NodeInfo) -> NodeInfo:
    """Returns the info in the record of the same directory; `info` itself if there is no record."""
    record = read_record(info["directory"])
    return record.info if record else info


def _segments(info: NodeInfo | None) -> SegmentReader | None:
    return SegmentReader(info["disk_folder"]) if info and info["disk_folder"] else None
