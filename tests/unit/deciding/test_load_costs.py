"""The estimates behind the choice between loading and computing: prefill times, load times, and the choice itself."""

import math
import time
from random import Random

import pytest

from tiered_kv.client.load_costs import PROBE_EVERY_S, LoadCost, LoadCosts, LoadPart, label_of, peer_source
from tiered_kv.client.load_plan import IN_MEMORY, MEASURING, MUST_SAVE, SLOWER, Patience, choose
from tiered_kv.client.prefill_cost import PREFILLS_KEPT, PREFILLS_MIN, PrefillCost, PrefillTimes
from tiered_kv.clock import ManualClock

MIB = 1 << 20
T = 64


def noted(cost: PrefillCost, *prefills: tuple[int, int], slow: float = 1.0) -> PrefillTimes:
    times = PrefillTimes()
    for position, tokens in prefills:
        times.note(tokens, slow * cost.seconds(position, position + tokens), position)
    return times


# Prefill


def test_nothing_is_known_before_three_prefills() -> None:
    times = PrefillTimes()
    for number in range(PREFILLS_MIN):
        assert times.cost is None
        times.note(1000, 1.0 + number)
    assert times.cost is not None


def test_the_growth_with_the_position_is_found() -> None:
    true = PrefillCost(1e-3, 2e-7)
    fitted = noted(true, (0, 512), (0, 2048), (512, 1024), (0, 8192), (4096, 1024)).cost
    assert fitted is not None
    assert fitted.seconds(0, 4096) == pytest.approx(true.seconds(0, 4096), rel=1e-6)
    assert fitted.seconds(16_000, 16_064) == pytest.approx(true.seconds(16_000, 16_064), rel=1e-6)
    assert fitted.seconds(16_000, 16_064) > 2 * fitted.seconds(0, 64)


def test_disturbed_prefills_do_not_change_the_fit_much() -> None:
    true, random = PrefillCost(1e-3, 2e-7), Random(1)
    times = PrefillTimes()
    for number in range(PREFILLS_KEPT):
        tokens = random.choice([512, 1024, 4096])
        times.note(tokens, true.seconds(0, tokens) * (20.0 if number % 5 == 0 else random.uniform(0.95, 1.05)))
    assert times.cost is not None
    assert times.cost.seconds(0, 2048) == pytest.approx(true.seconds(0, 2048), rel=0.2)


def test_the_fit_follows_a_machine_that_has_become_slow() -> None:
    times = noted(PrefillCost(1e-3), *[(0, 1024)] * PREFILLS_KEPT)
    for _ in range(PREFILLS_KEPT):
        times.note(1024, 3.072)
    assert times.cost is not None
    assert times.cost.seconds(0, 1000) == pytest.approx(3.0, rel=0.01)


def test_the_cost_of_a_step_in_short_prefills_is_not_taken_for_growth() -> None:
    times = noted(PrefillCost(1e-3), *[(0, 4096)] * 4)
    for _ in range(4):
        times.note(64, 0.064 + 0.1, 4032)  # a step costs 0.1 s besides
    assert times.cost is not None
    assert times.cost.seconds(4000, 4064) == pytest.approx(0.064, rel=0.01)


@pytest.mark.parametrize(("tokens", "seconds"), [(63, 1.0), (1000, 0.0), (1000, -1.0), (1000, math.inf), (1000, math.nan)])
def test_what_is_no_measurement_is_left_out(tokens: int, seconds: float) -> None:
    times = PrefillTimes()
    for _ in range(5):
        times.note(tokens, seconds)
    assert times.cost is None


# Loads


def test_latency_and_rate_are_told_apart() -> None:
    cost, random = LoadCost(), Random(2)
    for _ in range(30):
        nbytes = random.randrange(1, 64) * MIB
        cost.note(nbytes, 0.04 + nbytes / 12.5e6)
    assert cost.latency_s == pytest.approx(0.04, rel=0.01)
    assert 1 / cost.byte_s == pytest.approx(12.5e6, rel=0.01)


def test_loads_of_one_size_keep_the_share_of_the_latency() -> None:
    cost = LoadCost()
    for nbytes in (MIB, 8 * MIB) * 4:
        cost.note(nbytes, 0.1 + nbytes / 1e8)
    for _ in range(50):
        cost.note(8 * MIB, 0.1 + 8 * MIB / 1e8)
    assert cost.seconds(MIB) == pytest.approx(0.1 + MIB / 1e8, rel=0.3)
    assert cost.seconds(8 * MIB) == pytest.approx(0.1 + 8 * MIB / 1e8, rel=0.01)


def test_loads_of_one_size_are_no_reason_to_decline_a_larger_one() -> None:
    costs, cost = LoadCosts(ManualClock()), PrefillCost(1e-3)
    for _ in range(3):
        costs.note("peer a", MIB, 0.3)  # 0.3 s of latency, or 3 MiB/s
    assert choose([part("peer a", 1)], cost, T, costs).blocks == 0
    choice = choose([part("peer a", 16)], cost, T, costs)
    assert (choice.blocks, choice.unknown, choice.expected_s) == (16, {"peer a"}, {"peer": 0.0})
    costs.note("peer a", 16 * MIB, 0.4)
    assert choose([part("peer a", 32)], cost, T, costs).expected_s["peer"] == pytest.approx(0.5, rel=0.1)


def test_one_very_slow_load_counts_little_and_two_replace_the_estimate() -> None:
    cost = LoadCost()
    for _ in range(10):
        cost.note(MIB, 0.01)
    cost.note(MIB, 5.0)
    assert cost.seconds(MIB) < 0.02
    cost.note(MIB, 5.0)
    assert cost.seconds(MIB) == pytest.approx(5.0)


def test_one_fast_load_replaces_a_slow_estimate() -> None:
    cost = LoadCost()
    for nbytes in (MIB, 32 * MIB) * 5:
        cost.note(nbytes, nbytes / 1e6)
    cost.note(MIB, 0.001)
    assert cost.seconds(32 * MIB) < 0.1


@pytest.mark.parametrize(("nbytes", "seconds"), [(0, 1.0), (-1, 1.0), (MIB, 0.0), (MIB, math.inf), (MIB, math.nan)])
def test_loads_without_bytes_or_time_are_left_out(nbytes: int, seconds: float) -> None:
    costs = LoadCosts(ManualClock())
    costs.note("disk", nbytes, seconds)
    assert costs.seconds("disk", MIB) is None
    assert costs.stats() == {}


def test_a_pull_counts_for_each_of_its_peers_and_for_all_of_them() -> None:
    costs = LoadCosts(ManualClock())
    costs.note_pull([LoadPart("peer a", 2, 2 * MIB), LoadPart("peer b", 2, 2 * MIB)], 3, MIB, 0.3)
    assert {source: round(costs.seconds(source, MIB), 3) for source in costs.stats()} == {"peer": 0.3, "peer a": 0.2, "peer b": 0.1}
    assert costs.peers_seconds(MIB) == pytest.approx(0.3)
    assert costs.peers_seconds(2 * MIB) is None  # b has sent one block only
    assert label_of(peer_source("a")) == "peer"


def test_silence_makes_a_source_slower_but_never_faster() -> None:
    costs = LoadCosts(ManualClock())
    costs.note_silence("disk", MIB, 0.001)
    assert costs.seconds("disk", MIB) is None  # the block was gone
    costs.note_silence("disk", MIB, 5.0)
    assert costs.seconds("disk", MIB) == pytest.approx(5.0)
    costs.note_silence("disk", MIB, 1.0)
    assert costs.seconds("disk", MIB) == pytest.approx(5.0)


def test_a_declined_source_is_probed_now_and_then() -> None:
    clock = ManualClock()
    costs = LoadCosts(clock)
    assert costs.may_probe("disk")
    assert not costs.may_probe("disk")
    assert costs.may_probe("peer a")
    clock.advance(PROBE_EVERY_S)
    costs.begin_measuring("disk")
    assert costs.is_busy
    assert not costs.may_probe("disk")
    costs.end_measuring("disk")
    assert costs.may_probe("disk")


def test_a_forked_child_does_not_wait_for_loads_of_its_parent() -> None:
    costs = LoadCosts(ManualClock())
    costs.begin_measuring("disk")
    costs.after_fork()
    assert not costs.is_busy
    assert costs.may_probe("disk")


def test_the_number_of_sources_is_bounded() -> None:
    costs = LoadCosts(ManualClock())
    for number in range(1000):
        costs.note(f"peer {number}", MIB, 1.0)
        costs.may_probe(f"peer {number}")
    assert len(costs.stats()) <= 128
    assert costs.seconds("peer 999", MIB) is not None


# The choice


def costs_of(**known: float) -> LoadCosts:
    """`known`: for each source the seconds for a MiB, latency and rate in halves."""
    costs = LoadCosts(ManualClock())
    for source, seconds in known.items():
        costs.note(source.replace("_", " "), MIB, seconds)
        costs.note(source.replace("_", " "), 2 * MIB, 1.5 * seconds)
    return costs


def part(source: str, blocks: int) -> LoadPart:
    return LoadPart(source, blocks, blocks * MIB)


def test_a_slow_part_ends_the_load_and_a_fast_one_does_not() -> None:
    costs, cost = costs_of(disk=0.01, peer_a=10.0), PrefillCost(1e-3)
    choice = choose([part(IN_MEMORY, 3), part("disk", 4), part("peer a", 5)], cost, T, costs)
    assert choice.blocks == 7
    assert choice.declined == [(part("peer a", 5), SLOWER)]
    assert choice.expected_s == {"disk": pytest.approx(0.025)}
    assert not choice.unknown


def test_a_slow_part_is_loaded_for_the_sake_of_what_follows() -> None:
    costs, cost = costs_of(disk=0.1), PrefillCost(1e-3)  # a block takes 0.064 s to compute
    assert choose([part("disk", 1)], cost, T, costs).blocks == 0
    assert choose([part("disk", 1), part(IN_MEMORY, 3)], cost, T, costs).blocks == 4
    assert choose([part("disk", 1), part(IN_MEMORY, 3), part("disk", 1)], cost, T, costs).blocks == 4


def test_late_tokens_are_worth_more() -> None:
    costs, cost = costs_of(peer_a=0.064 * 1.2 / 1), PrefillCost(1e-3, 1e-3 / 4096)
    assert choose([part("peer a", 1)], cost, T, costs).blocks == 0
    assert choose([part(IN_MEMORY, 64), part("peer a", 1)], cost, T, costs).blocks == 65


def test_a_load_must_save_something() -> None:
    cost = PrefillCost(1e-3)
    just_too_slow = costs_of(disk=T * 1e-3 / MUST_SAVE * 1.01)
    just_fast_enough = costs_of(disk=T * 1e-3 / MUST_SAVE * 0.99)
    assert choose([part("disk", 1)], cost, T, just_too_slow).blocks == 0
    assert choose([part("disk", 1)], cost, T, just_fast_enough).blocks == 1


def test_an_unknown_source_is_tried_once_at_a_time() -> None:
    costs, cost = costs_of(), PrefillCost(1e-3)
    choice = choose([part("peer a", 4)], cost, T, costs)
    assert (choice.blocks, choice.unknown, choice.expected_s) == (4, {"peer a"}, {"peer": 0.0})
    costs.begin_measuring("peer a")
    choice = choose([part("peer a", 4), part(IN_MEMORY, 100)], cost, T, costs)
    assert (choice.blocks, choice.declined[0]) == (0, (part("peer a", 4), MEASURING))


def test_nothing_found_is_nothing_chosen() -> None:
    assert choose([], PrefillCost(1e-3), T, costs_of()).blocks == 0


def test_the_choice_is_the_best_of_all_numbers_of_parts() -> None:
    random = Random(3)
    for _ in range(300):
        costs = costs_of(disk=random.uniform(0.001, 0.2), objects=random.uniform(0.001, 0.2), peer_a=random.uniform(0.001, 0.2))
        cost = PrefillCost(1e-3, random.choice([0.0, 1e-6]))
        parts = [part(random.choice([IN_MEMORY, "disk", "objects", "peer a"]), random.randint(1, 8)) for _ in range(random.randint(1, 6))]
        ends = [sum(each.blocks for each in parts[:count]) for count in range(len(parts) + 1)]
        loads = [costs.seconds(each.source, each.nbytes) or 0.0 for each in parts]
        totals = [MUST_SAVE * sum(loads[:count]) + cost.seconds(end * T, ends[-1] * T) for count, end in enumerate(ends)]
        chosen = choose(parts, cost, T, costs)
        assert totals[ends.index(chosen.blocks)] == pytest.approx(min(totals))
        assert sum(each.blocks for each, _ in chosen.declined) == ends[-1] - chosen.blocks


def test_a_choice_takes_microseconds() -> None:
    costs, cost, parts = costs_of(disk=0.01, peer_a=10.0), PrefillCost(1e-3), [part(IN_MEMORY, 30), part("disk", 2)]
    begun_s = time.perf_counter()
    for _ in range(1000):
        choose(parts, cost, T, costs)
    assert time.perf_counter() - begun_s < 1.0  # 1 ms each, where it takes 3 µs


# Patience


def patience(expected_s: float = 0.0, deadline_s: float = 100.0) -> Patience:
    made = Patience(PrefillCost(1e-3), T, 2, deadline_s, slack_s=0.1)
    made.allowed_s = expected_s
    assert not made.is_over(10.0)
    return made


def test_an_unknown_load_may_lose_the_slack_only() -> None:
    made = patience()
    assert not made.is_over(10.1)
    assert made.is_over(10.11)
    assert made.was_late


def test_what_arrives_earns_more_time() -> None:
    made = patience()
    assert not made.is_over(10.16, arrived=3)  # one block, worth 0.064 s
    assert made.is_over(10.17, arrived=3)
    assert not made.is_over(10.17, arrived=4)
    assert not made.was_late


def test_a_load_gets_the_time_that_it_is_expected_to_take() -> None:
    made = patience(expected_s=1.0)
    assert not made.is_over(11.05)
    assert made.is_over(11.11)


def test_the_deadline_is_no_lateness() -> None:
    made = patience(expected_s=1.0, deadline_s=10.5)
    assert made.is_over(10.5)
    assert not made.was_late
