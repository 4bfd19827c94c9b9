"""Builds a client from a node's info: the only place where a client is put together."""

import logging
import weakref
from collections.abc import Callable
from typing import TypeVar

from tiered_kv.client.access import AccessHolder, NodeAccess
from tiered_kv.client.base import NodeClient
from tiered_kv.client.client import Client
from tiered_kv.client.page_client import PageClient
from tiered_kv.client.reader import BlockSource
from tiered_kv.client.session_pool import SessionPool
from tiered_kv.client.writer import BlockWriter
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.codecs.calibrated.tables import registered
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.layout import Layout, OpaqueLayout
from tiered_kv.memory.view import NodeView
from tiered_kv.protocol.messages import NodeInfo
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.protocol.node_record import read_record
from tiered_kv.protocol.session import Session
from tiered_kv.protocol.unix_socket import SocketSession
from tiered_kv.tiers.disk.segments import SegmentReader

log = logging.getLogger(__name__)

GREET_WITHIN_S = 5.0


ClientT = TypeVar("ClientT", bound=NodeClient)


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

    `connect`: opens a session of direct calls, for a node in this process. `rope`, `rope_halves`: the rotation of the model's keys
    (`ModelInfo`). `find`: returns the info of the node that has replaced this one. It is called within the client's calls if
    `connect` is given, else by a thread. The default reads the node record in the same directory. Connects within GREET_WITHIN_S. If
    the node does not answer by then, raises (kind `transport`) only with `must_answer`. Raises as `Session.introduce` does if the
    node's settings require a calibration that the model lacks. Raises (kinds `storage`, `corrupt`) if a calibration that decoding
    needs cannot be read.
    """
    find = find or (lambda: _present_info(info))
    client = _client(Client, info, layout, namespace, rope, rope_halves, connect, find, clock, on_close)
    try:
        client.greet(GREET_WITHIN_S, must_answer)
    except BaseException:
        client.close()
        raise
    return client


def page_client_of(
    find: Callable[[], NodeInfo | None],
    layout: OpaqueLayout,
    namespace: Namespace,
    *,
    connect: Callable[[], Session] | None = None,
    clock: Clock | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> PageClient:
    """Returns a client for an engine's pages. It does not need a node: it uses the node that `find()` returns now or later.

    `connect`: as in `client_of`. While there is no node, every look-up is a miss, and every store is refused.
    """
    try:
        info = find()
    except TieredKVError as error:  # such as a node of another version, which may be replaced
        log.warning("the node of this machine cannot be used now: %s", error)
        info = None
    client = _client(PageClient, info, layout, namespace, None, True, connect, find, clock, on_close)
    if info is not None:
        try:
            client.greet(GREET_WITHIN_S)
        except BaseException:
            client.close()
            raise
    return client


def _client(
    kind: type[ClientT],
    info: NodeInfo | None,
    layout: Layout,
    namespace: Namespace,
    rope: bytes | None,
    rope_halves: bool,
    connect: Callable[[], Session] | None,
    find: Callable[[], NodeInfo | None],
    clock: Clock | None,
    on_close: Callable[[], None],
) -> ClientT:
    first = info or _no_node()

    def open_session(info: NodeInfo, wait_s: float) -> Session:
        if not info["directory"]:
            raise TieredKVError(Kind.TRANSPORT, "there is no node of the cluster on this machine")
        return connect() if connect else SocketSession(f"{info['directory']}/sock", wait_s)

    def introduce(session: Session, namespace: Namespace) -> None:
        """Describe the model to the node. Done once in each session, because the node may have been restarted."""
        model = ModelInfo(layout, namespace.weights, rope, rope_halves, namespace.as_fields())
        answer = session.introduce(namespace.root(layout), model.as_message())
        if answer["calibration"]:  # without it no block could be decoded
            registered(answer["calibration"])

    def access_of(present: NodeInfo | None) -> NodeAccess:
        described = present or first
        view = NodeView.open(described["directory"]) if present else NodeView.vacant(described["directory"])
        options = {"has_device": bool(present and present["has_device"]), "verifies": described.get("verify_host", False)}
        source = BlockSource(view, _segments(present), layout, **options)

        def greet(session: Session) -> None:
            if (access := made()) is not None:
                client.introduce_in(access, session)

        pool = SessionPool(lambda wait_s: open_session(described, wait_s), view, clock or SystemClock(), greet)
        access = NodeAccess(described, view, source, BlockWriter(layout, source), pool)
        made = weakref.ref(access)  # an access is closed once nothing refers to it any more, so its own pool must not
        return access

    holder = AccessHolder(access_of(info), find, open_session, access_of, in_background=connect is None)
    client = kind(layout, namespace, holder, introduce, clock=clock, on_close=on_close)
    return client


def _no_node() -> NodeInfo:
    """Returns the info of a node that does not exist, with default settings."""
    settings = Config()
    return {
        "node": "",
        "directory": "",
        "disk_folder": None,
        "has_device": False,
        "block_tokens": settings.block_tokens,
        "fetch_deadline_ms": settings.fetch_deadline_ms,
        "store_wait_ms": settings.store_wait_ms,
    }


def _present_info(info: NodeInfo) -> NodeInfo:
    """Returns the node info that the node record in `info`'s directory contains, or `info` itself if there is no record."""
    record = read_record(info["directory"])
    return record.info if record else info


def _segments(info: NodeInfo | None) -> SegmentReader | None:
    return SegmentReader(info["disk_folder"]) if info and info["disk_folder"] else None
