"""Tests of adaptive: the contract of all policies, what it learns, what hints do, and that nothing else changes its answers."""

import numpy as np
import pytest
from hypothesis import given

from tests.contracts.policy import STEPS, PolicyContract, key_of
from tiered_kv.policy import History, blockhistory, create_history, create_policy, reuse
from tiered_kv.policy.blockhistory import GHOSTS_MIN, BlockHistory


class World:
    """One tier of `capacity` blocks, with requests as a store makes them. Chains are given as numbers, root first."""

    def __init__(self, capacity: int, seed: int = 0, key=lambda number: number, **options) -> None:
        self.history = BlockHistory()
        self.policy = create_policy("adaptive", self.history, capacity, seed=seed, **options)
        self.capacity, self.key = capacity, key
        self.evicted: list[int] = []
        self._number = {}

    def request(self, chain: list[int], now_s: float, answer_tokens: int | None = None) -> int:
        keys = [self.key(number) for number in chain]
        self._number.update(zip(keys, chain, strict=True))
        hit = self.policy.leading(keys)
        if hit:
            self.history.seen(keys[:hit], None, now_s)
            self.policy.use(keys[:hit])
        missing = keys[hit:]
        lacking = len(missing) - (self.capacity - len(self.policy))
        if lacking > 0:
            for victim in self.policy.victims(lacking, set(keys[:hit]), now_s, missing):
                self.policy.remove(victim)
                self.evicted.append(self._number[victim])
        missing = missing[: self.capacity - len(self.policy)]
        if missing:
            self.history.seen(missing, keys[hit - 1] if hit else None, now_s)
            self.policy.add(missing, keys[hit - 1] if hit else None, 1)
        if answer_tokens is not None:
            self.history.hint(keys[-1], now_s, answer_tokens=answer_tokens)
        return hit

    def check(self) -> None:
        self.policy.check()
        self.history.check()
        assert len(self.policy) <= self.capacity


class TestAdaptive(PolicyContract):
    name = "adaptive"

    def history(self) -> History:
        return create_history()


def traffic(world: World, requests: int, seed: int) -> list[int]:
    """Requests sessions that start with one of a few prompts and grow turn by turn. Returns the hits of each request."""
    random = np.random.default_rng(seed)
    sessions = [[int(random.integers(3))] for _ in range(30)]
    hits, fresh, now_s = [], 100, 0.0
    for _ in range(requests):
        session = sessions[int(random.integers(30))]
        session += range(fresh, fresh + int(random.integers(1, 5)))
        fresh += 10
        now_s += float(random.exponential(2.0))
        hits.append(world.request(list(session), now_s, int(random.integers(400))))
        if len(session) > 40:
            session[:] = [int(random.integers(3))]
    return hits


def test_the_form_of_the_keys_does_not_change_the_hits():
    as_numbers, as_digests, as_text = World(150), World(150, key=key_of), World(150, key=str)
    hits = traffic(as_numbers, 900, seed=1)
    assert traffic(as_digests, 900, seed=1) == hits
    assert traffic(as_text, 900, seed=1) == hits
    assert as_numbers.evicted == as_digests.evicted == as_text.evicted
    assert len(as_numbers.evicted) > 500
    for world in (as_numbers, as_digests, as_text):
        world.check()


def test_without_data_it_is_lru():
    world = World(6)
    for at, chain in enumerate([[1, 11], [2, 12], [3, 13]]):
        world.request(chain, now_s=10.0 * at)
    world.request([1, 11], 35.0)
    world.request([4, 14], 40.0)
    assert world.evicted == [12, 2]


def test_learns_which_blocks_are_used_again_and_keeps_them():
    """Every block of one kind is used again after 100 s, blocks of the other kind never. Memory holds half of the first kind."""
    world = World(40)
    fresh, now_s = 1000, 0.0
    hits = []
    for round_ in range(300):
        now_s += 10.0
        hits.append(world.request([round_ % 20], now_s, answer_tokens=10))
        for _ in range(8):
            fresh += 1
            now_s += 1.0
            world.request([fresh], now_s, answer_tokens=1000)
    world.check()
    assert sum(hits[-100:]) > 90, "160 other blocks are used between two uses: LRU would hit none"


def test_the_number_of_ghosts_is_bounded():
    world = World(500)
    for start in range(0, GHOSTS_MIN + 60_000, 100):
        world.request(list(range(start, start + 100)), start / 100)
    world.check()
    ghosts = world.history.blocks - len(world.policy)
    assert ghosts <= GHOSTS_MIN + 100
    assert world.history.uses(GHOSTS_MIN + 59_000) == 1, "an evicted block must be remembered"
    assert world.history.uses(0) == 0, "forgotten"


def test_takes_less_than_a_hundred_bytes_a_block():
    world = World(20_000)
    for start in range(0, 200_000, 100):
        world.request(list(range(start, start + 100)), start / 100)
    arrays = [value for value in vars(world.policy).values() if isinstance(value, np.ndarray)]
    nbytes = world.history.nbytes + sum(array.nbytes for array in arrays) + 100 * len(world.policy)  # 100 bytes for the dict entry
    assert nbytes / world.history.blocks < 100


def test_a_forgotten_parent_that_returns_is_linked_to_its_child_again(monkeypatch):
    """With fewer ghosts than a cluster has: the test above fills a history of the true size."""
    monkeypatch.setattr(blockhistory, "GHOSTS_MIN", 2_048)
    world = World(20)
    world.request([1, 2, 3], 0.0)
    for number in range(1000, 1000 + 2_048 + 1_000):
        world.request([number], number / 10)
    assert world.history.uses(3) == 0
    world.request([1, 2, 3], 1e6)
    world.request([1, 2, 4], 1e6 + 1)
    world.check()
    for number in range(20):
        world.request([number + 500_000], 1e6 + 2 + number)
    world.check()
    assert [number for number in world.evicted[-5:] if number < 10] == [3, 4, 2, 1] or world.policy.leading([1]) == 1


def test_an_ended_session_is_evicted_first_except_its_shared_prefix():
    world = World(6)
    world.request([1, 11, 12], 0.0)
    world.request([1, 21], 1.0)
    world.request([1, 11, 12], 2.0)
    world.history.hint(12, 2.0, ended=True)
    world.request([3, 4, 5], 3.0)
    assert world.evicted == [12]
    world.request([6], 4.0)
    assert world.evicted == [12, 11], "although 21 is older"
    world.request([1, 11], 5.0)
    assert world.policy.leading([1]) == 1


def test_a_session_with_an_expected_use_stays():
    world = World(4)
    world.request([1, 11], 0.0)
    world.history.hint(11, 0.0, reuse_within_s=120.0)
    world.request([2, 12], 10.0)
    world.request([3, 13], 60.0)
    assert world.evicted == [12, 2]
    world.request([4, 14], 900.0)
    assert world.evicted[2:] == [11, 1], "the expected use did not happen"


def test_a_hint_for_an_unknown_block_does_nothing():
    world = World(4)
    world.history.hint(99, 0.0, ended=True, answer_tokens=3, reuse_within_s=5.0)
    world.request([1, 2], 0.0)
    world.check()


def test_a_block_with_a_nearby_copy_is_evicted_before_one_that_must_be_computed_again():
    world = World(4)
    for at, number in enumerate([1, 2, 3, 4]):
        world.request([number], float(at))
    world.policy.weigh(4, 0.1)
    assert world.policy.victims(1, (), 5.0) == [4]
    world.policy.weigh(4, 1.0)
    assert world.policy.victims(1, (), 5.0) == [1]


def test_with_a_cost_weight_late_positions_are_worth_more():
    plain, weighted = World(100), World(100, cost_weight=1.0, block_tokens=30_500)
    for world in (plain, weighted):
        world.request([1, 2, 3, 4], 0.0)
        world.request([9], 1.0)
    assert plain.policy.victims(1, (), 50.0) == [4]
    assert weighted.policy.victims(1, (), 50.0) == [9], "4 costs four times as much"


def test_larger_blocks_are_evicted_first():
    world = World(100)
    world.history.seen([1], None, 0.0)
    world.policy.add([1], None, 10)
    world.history.seen([2], None, 0.0)
    world.policy.add([2], None, 30)
    assert world.policy.victims(5, (), 5.0) == [2]


def test_several_tiers_share_one_history():
    history = BlockHistory()
    device, host = (create_policy("adaptive", history, 10) for _ in range(2))
    history.seen([1, 2], None, 0.0)
    host.add([1, 2], None, 1)
    history.seen([1, 2], None, 1.0)
    host.use([1, 2])
    device.add([1, 2], None, 1)
    host.remove(2)
    assert (len(device), len(host), history.uses(2)) == (2, 1, 2)
    assert device.victims(1, (), 5.0) == [2]
    for structure in (device, host, history):
        structure.check()


def test_a_widely_shared_prefix_gets_its_own_bucket():
    world, now_s = World(3000), 0.0
    for number in range(400):
        now_s += 1.0
        world.request([1 + number % 2, 100 + number], now_s)
    kinds = {reuse.inherited(int(world.history.kind[world.history.slots([100 + number])[0]])) for number in (398, 399)}
    assert len({hot for _, hot in kinds}) == 2
    assert all(hot > 0 for _, hot in kinds)


def test_statistics_of_one_node_teach_another():
    teacher, pupil = World(40), World(40)
    traffic(teacher, 600, seed=3)
    before = pupil.history.table.copy()
    pupil.history.adopt(teacher.history.statistics())
    teacher.history.learn(teacher.history.last_s.max())
    assert abs(pupil.history.table - before).max() > 0
    assert np.corrcoef(pupil.history.table, teacher.history.table)[0, 1] > 0.99


def test_blocks_that_were_never_used_can_be_added():
    world = World(10)
    world.policy.add([1, 2], None, 1)
    world.policy.add([3], 2, 1)
    world.check()
    assert world.policy.victims(3, (), 1.0) == [3, 2, 1]


@given(STEPS)
def test_a_child_may_be_resident_without_its_parent(steps):
    """Creates orphans, as after a restart or the loss of a disk. All counts must stay consistent."""
    world = World(1000)
    for at, (step, number) in enumerate(steps):
        if step in ("add", "chain") and number not in world.policy:
            world.history.seen([number], number // 2 or None, float(at))
            world.policy.add([number], number // 2 or None, 1)
        elif step == "remove" and number in world.policy:
            world.policy.remove(number)
        elif step == "ask":
            assert len(world.policy.victims(1000, (), float(at))) == len(world.policy)
        world.check()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_which_leaves_are_sampled(seed):
    assert traffic(World(150, seed=seed), 600, seed=2) == traffic(World(150, seed=seed), 600, seed=2)


def test_the_chance_of_an_unknown_block_is_zero():
    world = World(10)
    assert world.history.chance(5, 3.0) == 0.0
    world.request([5], 10.0)
    world.request([6], 40.0)
    assert 0.0 < world.history.chance(5, 1.0) < world.history.chance(5, 10.0) < 1.0
    assert History().chance(5, 3.0) == 0.0
