"""Describes a cluster within a few seconds, even if parts of it hang. Adds a text for each part that does not answer.

The expected nodes are the nodes that the coordinator lists or has lost, the fleet's members, the nodes with an actor in Ray, and the
nodes whose shared memory is on this machine, except drained ones. Each node is called directly: over its socket if it is on this
machine, which works without Ray, else through Ray. If neither the coordinator nor Ray answers, the nodes on this machine are found by
their own files.
"""

import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from tiered_kv.cluster import attach, start, state
from tiered_kv.cluster.localnodes import LocalNodes
from tiered_kv.cluster.node_calls import calls_to
from tiered_kv.cluster.state import ClusterState
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.threads import DaemonThreads

WITHIN_S = 6.0
JOIN_WITHIN_S = 3.0
ANSWER_WITHIN_S = 3.0
QUESTIONS_AT_ONCE = 16
DRAINED = ("draining", "drained")
ROUND_AGE_S_MAX = 15.0
"""The keeper is reported as a problem if its last successful round is older. It runs a round every second, but Ray may delay some."""
FAILED_WITHIN_S = 30.0


class Answers(NamedTuple):
    """The answers of the coordinator and of Ray, with a `TieredKVError` in place of each missing answer.

    `coordinator`: the result of `start.describe`. `actors`: the ids of nodes with an actor in Ray.
    """

    coordinator: dict | TieredKVError
    actors: list[str] | TieredKVError


def survey(name: str = state.DEFAULT_NAME, address: str | None = None) -> dict:
    """Returns the result of `start.describe` with four more fields: `expected_nodes`, `drained`, `source` and `degraded`.

    `expected_nodes`, `drained`: ids of nodes. `source`: "coordinator", or "machine" if only the nodes on this machine could be asked.
    `degraded`: a text for each problem. Takes at most WITHIN_S. Raises `TieredKVError` if the coordinator does not answer and this
    machine has no state file and no node of the cluster, or if the Ray at `address` cannot be joined.
    """
    # imports must not count as a part's time to answer: on a busy machine they take seconds
    import ray  # noqa: F401

    from tiered_kv.actors import fleet  # noqa: F401
    from tiered_kv.protocol import node_record, unix_socket  # noqa: F401

    threads = DaemonThreads(QUESTIONS_AT_ONCE, "tkv-survey")
    try:
        return _surveyed(name, address, _Caller(threads, time.monotonic() + WITHIN_S))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


class _Caller:
    """Makes calls on threads, and waits for their results until one common deadline."""

    def __init__(self, threads: DaemonThreads, deadline_s: float) -> None:
        self._threads = threads
        self._deadline_s = deadline_s

    def call(self, functions: dict[str, Callable[[], Any]], within_s: float) -> dict[str, Any]:
        """Call functions at the same time. Returns, by the functions' names, each result or a `TieredKVError` in its place.

        A call without a result after `within_s` seconds, or at the common deadline, counts as failed.
        """
        futures = {name: self._threads.submit(function) for name, function in functions.items()}
        deadline_s = min(time.monotonic() + within_s, self._deadline_s)
        return {name: self._outcome(future, deadline_s) for name, future in futures.items()}

    @staticmethod
    def _outcome(future: Future, deadline_s: float) -> Any:
        left_s = max(deadline_s - time.monotonic(), 0)
        try:
            return future.result(left_s)
        except TimeoutError:
            return TieredKVError(Kind.TRANSPORT, "no answer in time")
        except TieredKVError as error:
            return error


def _surveyed(name: str, address: str | None, caller: _Caller) -> dict:
    known = state.find(name) or on_this_machine(name)
    joined = caller.call({"join": lambda: attach.join(name, address)}, JOIN_WITHIN_S)["join"]
    if isinstance(joined, TieredKVError):
        if known is None or address is not None:
            raise joined
        answers = Answers(joined, joined)
    else:
        questions = {"coordinator": lambda: start.describe(name, ANSWER_WITHIN_S / 2), "actors": lambda: start.nodes_of(name)}
        answers = Answers(**caller.call(questions, ANSWER_WITHIN_S))
    if isinstance(answers.coordinator, TieredKVError) and known is None:
        raise answers.coordinator
    here = directories(known, answers.coordinator)
    expected = expected_nodes(answers, here)
    absent = {node for node, member in members_of(answers).items() if member["state"] in ("lost", "refused")}
    elsewhere = [node for node in expected if node not in here and node not in absent] if not isinstance(joined, TieredKVError) else []
    questions = {node: lambda node=node: _stats_by_socket(here[node]) for node in expected if node in here}
    if elsewhere:
        questions[""] = lambda: calls_to(name, ANSWER_WITHIN_S / 2)(elsewhere, "stats")
    stats = caller.call(questions, ANSWER_WITHIN_S)
    through_ray = stats.pop("", {})
    stats |= dict.fromkeys(elsewhere, through_ray) if isinstance(through_ray, TieredKVError) else through_ray
    return merged(answers, known, here, stats)


def on_this_machine(name: str) -> ClusterState | None:
    """Returns the state of the cluster `name` from the record of a node on this machine, or None if there is no such record.

    If clusters of several runs have records, the one with the latest heartbeat is used.
    """
    now_ns = time.monotonic_ns()
    first = min(LocalNodes(name).records(), key=lambda record: record.age_s(now_ns), default=None)
    if first is None:
        return None
    settings = first.info.get("settings", {"block_tokens": first.info["block_tokens"]})
    return ClusterState(first.cluster_id, first.ray_address or "", 0.0, name, config=dict(settings))


def members_of(answers: Answers) -> dict[str, dict]:
    """Returns the members of the fleet by node id, or {} if the coordinator does not answer."""
    return {member["node"]: member for member in _fleet_in(answers).get("members", ())}


def _fleet_in(answers: Answers) -> dict:
    """Returns the coordinator's description of its fleet, or {} if it does not answer or is of a version without fleets."""
    return {} if isinstance(answers.coordinator, TieredKVError) else answers.coordinator.get("fleet", {})


def directories(known: ClusterState | None, coordinator: dict | TieredKVError) -> dict[str, str]:
    """Returns by node id the directory in shared memory of each of the cluster's nodes on this machine."""
    if not isinstance(coordinator, TieredKVError):
        cluster_id, shm_path = coordinator["cluster_id"], coordinator["config"].shm_path
    else:
        assert known is not None
        cluster_id, shm_path = known.cluster_id, Config.of(known.config).shm_path
    prefix = f"tkv-{cluster_id}-"
    return {path.name.removeprefix(prefix): str(path) for path in sorted(Path(shm_path).glob(f"{prefix}*"))}


def expected_nodes(answers: Answers, here: Iterable[str]) -> list[str]:
    """Returns the ids of all nodes that the coordinator, Ray, or a directory on this machine names, except those drained or draining."""
    members = members_of(answers)
    expected = {*here, *members}
    if not isinstance(answers.coordinator, TieredKVError):
        expected |= {node["node"] for node in answers.coordinator["nodes"]} | set(answers.coordinator.get("lost", {}))
    if not isinstance(answers.actors, TieredKVError):
        expected |= set(answers.actors)
    return sorted((node for node in expected if members.get(node, {}).get("state") not in DRAINED), key=by_number)


def by_number(node: str) -> tuple[str, int, str]:
    """Returns a sort key that puts node-10 after node-9."""
    start, _, number = node.rpartition("-")
    return (start, int(number), "") if number.isdigit() else (node, -1, node)


def merged(answers: Answers, known: ClusterState | None, here: dict[str, str], stats: dict[str, Any]) -> dict:
    """Returns the result of `survey`, merged from all answers. `stats`: by node id, the node's own statistics, or an error instead."""
    degraded, members = _fleet_problems(answers), members_of(answers)
    if isinstance(answers.coordinator, TieredKVError):
        assert known is not None
        about: dict = {"cluster_id": known.cluster_id, "config": Config.of(known.config), "nodes": []}
        degraded.append(f"the coordinator does not answer: {answers.coordinator}")
    else:
        about = answers.coordinator
        if isinstance(answers.actors, TieredKVError):
            degraded.append(f"Ray does not list its node actors: {answers.actors}")
    expected = expected_nodes(answers, here)
    if not expected:
        degraded.append("no cache node of this cluster is known")
    listed = {node["node"]: node for node in about["nodes"]}
    nodes = []
    for node in expected:
        answer = stats.get(node, TieredKVError(Kind.TRANSPORT, "not called, because Ray does not answer"))
        text = _member_problem(members.get(node)) or _problem(node, answer, listed.get(node), about.get("lost", {}), answers.coordinator)
        if text:
            degraded.append(text)
        if not isinstance(answer, TieredKVError):
            nodes.append({"node": node, "directory": here.get(node), "silent_s": 0.0} | listed.get(node, {}) | {"stats": answer})
        elif node in listed:
            nodes.append(listed[node] | {"answers": False})
    degraded += failing_pairs(nodes, {node for node in expected if members.get(node, {}).get("state") != "lost"})
    drained = [node for node, member in members.items() if member["state"] in DRAINED]
    source = "machine" if isinstance(answers.coordinator, TieredKVError) and isinstance(answers.actors, TieredKVError) else "coordinator"
    return about | {"nodes": nodes, "expected_nodes": expected, "drained": drained, "source": source, "degraded": degraded}


def _fleet_problems(answers: Answers) -> list[str]:
    """Returns a list with one text if the keeper's rounds, in which it starts missing nodes, fail or do not end. Else []."""
    fleet = _fleet_in(answers)
    if fleet.get("problem"):
        return [f"nodes that join or leave are not followed: {fleet['problem']}"]
    if fleet.get("round_age_s", 0.0) > ROUND_AGE_S_MAX:
        return [f"nodes that join or leave have not been followed for {fleet['round_age_s']:.0f} s: Ray does not answer the coordinator"]
    return []


def _member_problem(member: dict | None) -> str:
    """Returns a text that says why a node does not serve, if the keeper knows the reason, else ""."""
    if member is None:
        return ""
    where = f"{member['node']} at {member['address']}"
    if member["state"] == "lost":
        since = f"its Ray node left {member['since_s']:.0f} s ago"
        return f"{where} is lost: {since}; if it will not come back: tiered-kv drain {member['node']}"
    if member["state"] == "refused":
        return f"{where} cannot start: {member.get('error', 'it is tried again now')}"
    if member["state"] == "starting":
        return f"{where} has been starting for {member['since_s']:.0f} s"
    return ""


def failing_pairs(nodes: Iterable[dict], expected: Collection[str] | None = None) -> list[str]:
    """Returns a text for each pair of nodes whose last transfer failed, less than FAILED_WITHIN_S ago.

    `expected`: the nodes that should answer, or None for all nodes. Failed transfers from other nodes, which are drained or lost, are
    no problem and are left out.
    """
    relevant = None if expected is None else {"coordinator", *expected}
    return [
        f"{node['node']} cannot reach {peer} over a stream: {pair['last_failure']}"
        for node in nodes
        for peer, pair in node.get("stats", {}).get("peers", {}).get("peers", {}).items()
        if (relevant is None or peer in relevant) and pair.get("last_failure_age_s", FAILED_WITHIN_S) < FAILED_WITHIN_S
    ]


def _problem(node: str, answer: Any, listed: dict | None, lost: dict[str, float], coordinator: Any) -> str:
    """Returns a text about the problem of a node that does not answer or has not reported yet. "" for a node without a problem."""
    if isinstance(answer, TieredKVError):
        silent_s = listed["silent_s"] if listed else lost.get(node)
        return f"{node} does not answer ({f'last report {silent_s:.0f} s ago' if silent_s is not None else answer})"
    if listed is None and not isinstance(coordinator, TieredKVError):
        return f"{node} runs, but has not reported to the coordinator yet"
    return ""


def _stats_by_socket(directory: str) -> dict:
    from tiered_kv.protocol.unix_socket import SocketSession

    with closing(SocketSession(f"{directory}/sock", ANSWER_WITHIN_S / 2)) as session:
        return session.stats()
