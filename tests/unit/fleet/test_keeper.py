"""The keeper of a fleet, without Ray: nodes that join, leave, return, refuse and are drained, and keepers that die at any point."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fleet.ground import Clock, Ground
from tiered_kv.coordinator.keeper import RETRY_S, SILENT_AFTER_S, Keeper
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.fleet import FleetMember, FleetRecord, Selector

SMALL = TieredKVError(Kind.MEMORY, "host: 1 GiB are needed in /dev/shm, 64 MiB are free")


@pytest.fixture
def ground() -> Ground:
    return Ground()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def states(keeper: Keeper) -> dict[str, str]:
    return {member["node"]: member["state"] for member in keeper.status()["members"]}


def rounds(keeper: Keeper, count: int = 2) -> dict[str, str]:
    """Run rounds. Returns the members' states."""
    for _ in range(count):
        keeper.step()
    return states(keeper)


def test_each_ray_node_gets_one_node_numbered_from_the_head_on(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1")
    ground.join("10.0.0.2", is_head=True)
    keeper = ground.keeper(clock)
    assert rounds(keeper) == {"node-0": "serving", "node-1": "serving"}
    assert ground.calls == ["start node-0 at 10.0.0.2", "start node-1 at 10.0.0.1"]
    ground.join("10.0.0.0")
    assert rounds(keeper)["node-2"] == "serving"
    assert rounds(keeper, 5) == dict.fromkeys(("node-0", "node-1", "node-2"), "serving")
    assert len(ground.calls) == 3


def test_two_ray_nodes_at_one_address_get_one_node(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1")
    keeper = ground.keeper(clock)
    rounds(keeper)
    ground.join("10.0.0.1")
    assert rounds(keeper, 3) == {"node-0": "serving"}
    assert ground.calls == ["start node-0 at 10.0.0.1"]


def test_a_node_that_leaves_is_lost_and_has_its_id_again_when_it_returns(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1", is_head=True)
    second = ground.join("10.0.0.2")
    keeper = ground.keeper(clock)
    rounds(keeper)
    ground.leave(second)
    clock.now += 3
    assert rounds(keeper)["node-1"] == "lost"
    assert "node-1" not in ground.actors
    clock.now += 7
    [lost] = [member for member in keeper.status()["members"] if member["state"] == "lost"]
    assert (lost["address"], lost["since_s"]) == ("10.0.0.2", 7)
    ground.join("10.0.0.3")
    ground.join("10.0.0.2")
    assert rounds(keeper) == dict.fromkeys(("node-0", "node-1", "node-2"), "serving")
    assert ground.alive[ground.actors["node-1"]].address == "10.0.0.2"


def test_a_ray_node_that_restarts_between_two_rounds_gets_a_new_actor(ground: Ground, clock: Clock) -> None:
    """Its former actor is still in Ray's list, bound to a Ray node that does not exist any more."""
    former = ground.join("10.0.0.1")
    keeper = ground.keeper(clock)
    rounds(keeper)
    ground.leave(former)
    ground.join("10.0.0.1")
    assert rounds(keeper) == {"node-0": "serving"}
    assert ground.calls[1:] == ["remove node-0", "start node-0 at 10.0.0.1"]


def test_an_actor_that_somebody_ended_is_started_again(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1")
    keeper = ground.keeper(clock)
    rounds(keeper)
    del ground.actors["node-0"]
    assert rounds(keeper) == {"node-0": "serving"}


def test_a_node_that_cannot_start_is_named_and_tried_again_while_others_serve(ground: Ground, clock: Clock) -> None:
    """For example a machine that joins with a smaller /dev/shm."""
    ground.join("10.0.0.1", is_head=True)
    ground.join("10.0.0.2")
    ground.refusals["10.0.0.2"] = SMALL
    keeper = ground.keeper(clock)
    assert rounds(keeper) == {"node-0": "serving", "node-1": "refused"}
    [refused] = [member for member in keeper.status()["members"] if member["state"] == "refused"]
    assert (refused["error"], refused["kind"]) == (str(SMALL), "memory")
    assert "node-1" not in ground.actors, "no idle process is left there"
    tried = ground.calls.count("start node-1 at 10.0.0.2")
    assert rounds(keeper, 5)["node-1"] == "refused"
    assert ground.calls.count("start node-1 at 10.0.0.2") == tried, "not in every round"
    del ground.refusals["10.0.0.2"]
    clock.now += RETRY_S
    assert rounds(keeper)["node-1"] == "serving"


def test_up_tries_a_refused_node_at_once(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1")
    ground.refusals["10.0.0.1"] = SMALL
    keeper = ground.keeper(clock)
    rounds(keeper)
    del ground.refusals["10.0.0.1"]
    keeper.retry()
    assert rounds(keeper) == {"node-0": "serving"}


def test_a_node_that_does_not_report_is_starting_and_later_silent(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1")
    ground.silent.add("node-0")
    keeper = ground.keeper(clock)
    assert rounds(keeper) == {"node-0": "starting"}
    clock.now += SILENT_AFTER_S
    assert rounds(keeper) == {"node-0": "silent"}
    ground.silent.clear()
    assert rounds(keeper) == {"node-0": "serving"}
    ground.silent.add("node-0")
    assert rounds(keeper) == {"node-0": "silent"}, "it has served before"
    assert len(ground.calls) == 1, "Ray restarts it, not the keeper"


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        (None, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
        ("cache=yes", ["10.0.0.2"]),
        ("cache = yes", ["10.0.0.2"]),
        ("cache=no", []),
        ("GPU", ["10.0.0.3"]),
        ("TPU", []),
    ],
)
def test_only_matching_ray_nodes_get_a_node(ground: Ground, clock: Clock, selector: str | None, chosen: list[str]) -> None:
    ground.join("10.0.0.1", resources={"CPU": 4.0, "GPU": 0.0})
    ground.join("10.0.0.2", labels={"cache": "yes"})
    ground.join("10.0.0.3", resources={"GPU": 1.0})
    keeper = ground.keeper(clock, selector=selector)
    rounds(keeper)
    assert [member["address"] for member in keeper.status()["members"]] == chosen
    assert keeper.status()["ray_nodes"] == 3


@pytest.mark.parametrize("text", ["", "=", "=yes", "cache=", " "])
def test_a_malformed_selector_names_the_option(text: str) -> None:
    with pytest.raises(TieredKVError, match=r"--nodes-with: must be LABEL=VALUE, or the name of a resource") as caught:
        Selector(text)
    assert caught.value.kind is Kind.CONFIG


def test_a_drained_node_stays_away_until_it_is_undone_also_for_the_next_keeper(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1", is_head=True)
    ground.join("10.0.0.2")
    keeper = ground.keeper(clock)
    rounds(keeper)
    with pytest.raises(TieredKVError, match="must be marked as drained"):
        keeper.finish_drain("node-1")
    keeper.drain("node-1", True)
    assert rounds(keeper)["node-1"] == "draining"
    assert "node-1" in ground.actors, "it hands its blocks over"
    keeper.finish_drain("node-1")
    assert ground.forgotten == ["node-1"], "the coordinator does not call it lost"
    assert rounds(keeper, 5)["node-1"] == "drained"
    assert rounds(ground.keeper(clock))["node-1"] == "drained", "also after a restart of the coordinator"
    keeper = ground.keeper(clock)
    keeper.drain("node-1", False)
    assert rounds(keeper)["node-1"] == "serving"
    with pytest.raises(TieredKVError, match=r"no cache node 'node-7' in this cluster; there are: node-0, node-1"):
        keeper.drain("node-7", True)


@pytest.mark.parametrize("is_quick", [True, False], ids=["between two rounds", "later"])
def test_a_drained_mark_ends_with_its_ray_node(ground: Ground, clock: Clock, is_quick: bool) -> None:
    """So a pod that gets the address of a drained one is not left out."""
    ground.join("10.0.0.1", is_head=True)
    second = ground.join("10.0.0.2")
    keeper = ground.keeper(clock)
    rounds(keeper)
    keeper.drain("node-1", True)
    keeper.finish_drain("node-1")
    rounds(keeper)
    ground.leave(second)
    if not is_quick:
        assert rounds(keeper) == {"node-0": "serving"}, "it is not lost: it was drained"
    ground.join("10.0.0.2")
    assert rounds(keeper) == {"node-0": "serving", "node-1" if is_quick else "node-2": "serving"}
    assert keeper.record.drained == ()


def test_draining_a_lost_node_stops_expecting_it(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1", is_head=True)
    gone = ground.join("10.0.0.2")
    keeper = ground.keeper(clock)
    rounds(keeper)
    ground.leave(gone)
    rounds(keeper)
    keeper.drain("node-1", True)
    assert rounds(keeper) == {"node-0": "serving"}
    ground.join("10.0.0.3")
    assert "node-2" in rounds(keeper), "an id is not used twice"


def test_the_next_keeper_has_the_same_members_and_starts_none_of_them_again(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1", is_head=True)
    ground.join("10.0.0.2")
    rounds(ground.keeper(clock, selector=None))
    calls = list(ground.calls)
    following = ground.keeper(clock, selector="other=thing")
    assert following.status()["restarts"] == 1
    assert rounds(following) == {"node-0": "serving", "node-1": "serving"}
    assert ground.calls == calls
    assert following.record.selector is None, "the record counts, not the arguments of the actor"


def test_a_record_of_another_cluster_is_replaced(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1")
    rounds(ground.keeper(clock, cluster_id="old"))
    ground.actors.clear()
    keeper = ground.keeper(clock, cluster_id="new")
    assert (keeper.record.members, keeper.status()["restarts"]) == ({}, 0)
    assert rounds(keeper) == {"node-0": "serving"}


def test_a_round_that_fails_is_reported_and_the_next_one_does_its_work(ground: Ground, clock: Clock) -> None:
    ground.join("10.0.0.1")
    ground.fails = TieredKVError(Kind.CLUSTER, "Ray does not answer")
    keeper, stopped = ground.keeper(clock), threading.Event()
    thread = threading.Thread(target=keeper.run, args=(stopped,))
    thread.start()
    try:
        _until(lambda: keeper.status()["problem"] == "TieredKVError: Ray does not answer")
        assert keeper.status()["rounds"] == 0
        ground.fails = None
        keeper.retry()
        _until(lambda: states(keeper) == {"node-0": "serving"} and not keeper.status()["problem"])
    finally:
        stopped.set()
        keeper.retry()
        thread.join()


def _until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("not in time")


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"version": 2}', b"\xff", b'{"version": 1, "members": {"node-0": {"address": 1, "x": 2}}}']
)
def test_a_damaged_record_is_an_error_in_words(data: bytes) -> None:
    with pytest.raises(TieredKVError, match="the fleet's record in Ray cannot be used"):
        FleetRecord.of_bytes(data)


def test_a_record_survives_its_bytes() -> None:
    record = FleetRecord("c1", {"host": 5, "disk_path": None}, 7, "GPU", {"node-3": FleetMember("10.0.0.1", "r")}, ("node-3",), 4, 2)
    assert FleetRecord.of_bytes(record.as_bytes()) == record


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(["join", "leave", "refuse", "allow", "kill", "restart", "drain", "undo", "step"]), st.integers(0, 3))
    )
)
def test_whatever_happens_each_address_ends_with_its_one_node(story: list[tuple[str, int]]) -> None:
    """`Ground.start` asserts meanwhile that no machine gets two nodes, and that the record was saved first."""
    ground, clock = Ground(), Clock()
    keeper = ground.keeper(clock)
    ids: dict[str, str] = {}
    for what, number in story:
        address = f"10.0.0.{number}"
        here = [node.ray_node_id for node in ground.alive.values() if node.address == address]
        if what == "join" and not here:
            ground.join(address)
        elif what == "leave" and here:
            ground.leave(here[0])
        elif what == "refuse":
            ground.refusals[address] = SMALL
        elif what == "allow":
            ground.refusals.pop(address, None)
        elif what == "kill":
            ground.actors.pop(f"node-{number}", None)
        elif what == "restart":
            keeper = ground.keeper(clock)
        elif what in ("drain", "undo") and f"node-{number}" in keeper.record.members:
            keeper.drain(f"node-{number}", what == "drain")
        clock.now += 1
        keeper.step()
        for node, member in keeper.record.members.items():
            assert ids.setdefault(node, member.address) == member.address, "an id never changes its machine"
    ground.refusals.clear()
    for node in keeper.record.drained:
        keeper.drain(node, False)
    clock.now += RETRY_S
    final = rounds(keeper, 4)
    alive = {node.address for node in ground.alive.values()}
    serving = [keeper.record.members[node].address for node, state in final.items() if state == "serving"]
    assert sorted(serving) == sorted(alive)
    assert {node for node, state in final.items() if state != "serving"} == {node for node, state in final.items() if state == "lost"}
