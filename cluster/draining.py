"""Drains a node: other nodes that have room take over its blocks, the hottest first. Then the node closes and is not started again."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiered_kv.cluster import start
from tiered_kv.cluster.node_calls import calls_to
from tiered_kv.cluster.stop import CLOSE_WITHIN_S, flush_seconds
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    from tiered_kv.protocol.handover import EndReport, Inventory, ModelMessages
    from tiered_kv.protocol.messages import BlockRun
    from tiered_kv.protocol.peer_transport import Ask

BATCH_BYTES = 32 << 20
CALL_S = 10.0
"""How long one peer may take to pull one batch."""
PASSES = 3
"""How often at most the node is asked for its blocks: workers store more blocks during the handover."""

Advance = Callable[[float, float, str], None]


@dataclass
class Drained:
    """What became of a drained node's blocks.

    taken: for each other node (peer), how many blocks it has taken over. left, left_bytes: number and bytes of the blocks that
    were not handed over. why: the first reason for `left`. end: the node's own report when it closed, an error if it did not
    close as it should, None if it was not asked to close.
    """

    node: str
    taken: dict[str, int] = field(default_factory=dict)
    left: int = 0
    left_bytes: int = 0
    why: str = ""
    end: "EndReport | TieredKVError | None" = None

    def as_record(self) -> dict[str, Any]:
        """Returns the fields as a dict for JSON."""
        end = {"error": str(self.end)} if isinstance(self.end, TieredKVError) else self.end._asdict() if self.end else None
        return {"node": self.node, "taken": self.taken, "left": self.left, "left_bytes": self.left_bytes, "why": self.why, "end": end}


def drain(
    name: str,
    node: str,
    within_s: float,
    *,
    force: bool = False,
    log: start.LogLine = lambda _: None,
    advance: Advance = lambda *_: None,
) -> Drained:
    """Drain a node of the cluster whose Ray this process has joined. Returns what became of its blocks.

    node: its id, or the address of its Ray node. within_s: for how long blocks are handed over at most. If the handover is interrupted,
    the node continues to serve. Raises (kind `cluster`) if there is no such node. Raises also, unless `force` is set, if it is the
    last node and has no disk folder that keeps its blocks.
    """
    about = start.describe_fleet(name)
    node = node_at(about, node)
    state = {member["node"]: member["state"] for member in about["fleet"]["members"]}.get(node)
    flush_s = flush_seconds(about["config"], None)
    drained = Drained(node)
    peers = peers_with_room(about, node)
    if state not in (None, "lost", "drained") and not peers:
        _check_last(name, node, bool(flush_s), force, log)
    start.call_coordinator(name, "drain", node)
    if state == "lost":
        log(f"{node} is lost already, and no longer expected")
        return drained
    try:
        if peers and state not in ("refused", "drained"):
            hand_over(calls_to(name, CALL_S * 1.5), drained, peers, within_s, advance=advance)
    except BaseException:
        start.call_coordinator(name, "drain", node, False)
        raise
    if state not in ("refused", "drained"):
        log(f"closing {node}")
        drained.end = calls_to(name, flush_s + CLOSE_WITHIN_S)([node], "close", flush_s)[node]
    start.call_coordinator(name, "finish_drain", node)
    return drained


def undo(name: str, node: str, log: start.LogLine) -> None:
    """Start a drained node again, and wait until it serves.

    `node`: as in `drain`. Raises (kind `cluster`) if there is no such node, or if it does not start.
    """
    about = start.describe_fleet(name)
    node, before = node_at(about, node), about["fleet"]["rounds"]
    start.call_coordinator(name, "drain", node, False)
    fleet = start.await_nodes(name, log, rounds=before + 2)
    [member] = [member for member in fleet["members"] if member["node"] == node]
    if member["state"] != "serving":
        raise TieredKVError(
            Kind.CLUSTER, f"{node} did not start; it is {member['state']}: {member.get('error', 'see `tiered-kv status`')}", node=node
        )
    log(f"{node} serves again")


def node_at(about: dict, node: str) -> str:
    """Returns the id of the node whose address is `node`, or `node` itself if no node has this address."""
    return {member["address"]: member["node"] for member in about["fleet"]["members"]}.get(node, node)


def peers_with_room(about: dict, node: str) -> dict[str, int]:
    """Returns the free bytes in host memory and on disk of each live node except `node` and nodes that are draining or drained."""
    leaving = {member["node"] for member in about["fleet"]["members"] if member["state"] in ("draining", "drained")}
    room = {}
    for each in about["nodes"]:
        if each["node"] != node and each["node"] not in leaving:
            tiers = [figures for tier, figures in each["stats"]["tiers"].items() if tier in ("host", "disk")]
            room[each["node"]] = sum(max(figures["capacity_bytes"] - figures["used_bytes"], 0) for figures in tiers)
    return room


def _check_last(name: str, node: str, keeps_blocks: bool, force: bool, log: start.LogLine) -> None:
    if keeps_blocks:
        log(f"{node} is the last node of cluster {name!r}: its blocks stay in its disk folder, for the next node with that folder")
    elif not force:
        ways = "stop the cluster with `tiered-kv down`, take a checkpoint first, or give --force to lose them"
        message = f"drain: {node} is the last node of cluster {name!r}, and no disk folder keeps its blocks; {ways}"
        raise TieredKVError(Kind.CLUSTER, message, node=node)


def hand_over(
    ask: "Ask",
    drained: Drained,
    room: dict[str, int],
    within_s: float,
    *,
    advance: Advance = lambda *_: None,
    now_s: Callable[[], float] = time.monotonic,
) -> None:
    """Let peers pull the blocks of the node `drained.node`, the most valuable first. Adds the outcome to `drained`.

    ask: calls methods of nodes. room: by peer, its free bytes. A peer that fails gets no more blocks, and causes no exception.
    """
    handover = _Handover(ask, drained, dict(room), now_s() + within_s, advance, now_s)
    for _ in range(PASSES):
        answer = ask([drained.node], "inventory")[drained.node]
        if isinstance(answer, TieredKVError):
            drained.why = drained.why or f"{drained.node} does not list its blocks: {answer}"
            return
        if not handover.pass_on(answer):
            return


class _Handover:
    def __init__(
        self, ask: "Ask", drained: Drained, room: dict[str, int], deadline_s: float, advance: Advance, now_s: Callable[[], float]
    ) -> None:
        self._ask, self._drained, self._room, self._deadline_s, self._advance, self._now_s = ask, drained, room, deadline_s, advance, now_s
        self._done_bytes = 0
        self._seen: dict[bytes, str] = {}  # by block: the peer that it was given to, or "" if none
        self._waiting: dict[str, list[BlockRun]] = {peer: [] for peer in room}
        self._models: ModelMessages = {}

    def pass_on(self, inventory: "Inventory") -> bool:
        """Hand over those blocks of an inventory (a list of the node's blocks) that no earlier one had. Returns whether there were any."""
        self._models = inventory.models
        fresh = [run for run in map(self._unseen, inventory.runs) if run.keys]
        total_bytes = self._done_bytes + sum(run.nbytes * len(run.keys) for run in fresh)
        for run in fresh:
            for peer in self._assign(run):
                if sum(each.nbytes * len(each.keys) for each in self._waiting[peer]) >= BATCH_BYTES:
                    self._send(peer, total_bytes)
        while peer := next((peer for peer, runs in self._waiting.items() if runs), None):
            self._send(peer, total_bytes)
        return bool(fresh)

    def _unseen(self, run: "BlockRun") -> "BlockRun":
        """Returns the part of a run of blocks from the first block on that no earlier inventory had.

        No later block was seen either, because chains grow at their end.
        """
        known = next((at for at, key in enumerate(run.keys) if key not in self._seen), len(run.keys))
        return _part(run, known, len(run.keys))

    def _assign(self, run: "BlockRun") -> list[str]:
        """Queue a run of blocks, whole or in parts, for peers with room, preferably for the peer that took the run's parent.

        Returns these peers.
        """
        chosen = []
        home = self._seen.get(run.parent, "") if run.parent is not None else ""
        while run.keys:
            peer = home if self._room.get(home, 0) >= run.nbytes else max(self._room, key=lambda each: self._room[each])
            count = min(len(run.keys), self._room[peer] // run.nbytes)
            if not count or self._now_s() >= self._deadline_s:
                self._leave(run, "time is up" if count else "no other node has room for them")
                break
            self._waiting[peer].append(_part(run, 0, count))
            self._seen |= dict.fromkeys(run.keys[:count], peer)
            self._room[peer] -= count * run.nbytes
            chosen.append(peer)
            run, home = _part(run, count, len(run.keys)), peer
        return chosen

    def _send(self, peer: str, total_bytes: int) -> None:
        runs, self._waiting[peer] = self._waiting[peer], []
        blocks, left_s = sum(len(run.keys) for run in runs), self._deadline_s - self._now_s()
        if left_s <= 0:
            for run in runs:
                self._leave(run, "time is up")
            return
        answer = self._ask([peer], "take_over", runs, self._models, min(CALL_S, left_s))[peer]
        taken = 0 if isinstance(answer, TieredKVError) else answer
        if taken < blocks:
            why = f"{peer}: {answer}" if isinstance(answer, TieredKVError) else f"{peer} took only {taken} of {blocks} blocks"
            self._drained.why = self._drained.why or why
        if not taken:  # the peer gets no more blocks; other peers may have room for these
            self._room[peer] = 0
            for run in runs:
                self._assign(run)
            return
        self._drained.taken[peer] = self._drained.taken.get(peer, 0) + taken
        self._drained.left += blocks - taken
        self._drained.left_bytes += (blocks - taken) * runs[0].nbytes
        self._done_bytes += sum(run.nbytes * len(run.keys) for run in runs)
        self._advance(self._done_bytes, total_bytes, f"{sum(self._drained.taken.values()):,} blocks")

    def _leave(self, run: "BlockRun", why: str) -> None:
        self._seen |= dict.fromkeys(run.keys, "")
        self._drained.left += len(run.keys)
        self._drained.left_bytes += len(run.keys) * run.nbytes
        self._drained.why = self._drained.why or why


def _part(run: "BlockRun", start: int, end: int) -> "BlockRun":
    """Returns the blocks `start` to `end` (exclusive) of a run, as a run."""
    return run._replace(parent=run.keys[start - 1] if start else run.parent, depth=run.depth + start, keys=run.keys[start:end])
