"""Tests of the classic policies: the contract of all policies, and the behaviour of each."""

from hypothesis import given
from hypothesis import strategies as st

from tests.contracts.policy import CAPACITY_BYTES, NUMBERS, STEPS, PolicyContract, PureAnswerContract, key_of
from tests.unit.policy.test_lru import naive_victims
from tiered_kv.policy import POLICY_NAMES, History, create_policy


class TestFIFO(PureAnswerContract):
    name = "fifo"

    def test_uses_change_nothing(self) -> None:
        assert self.grown([("add", 5), ("add", 6), ("add", 7), ("use", 5)]).victims(1000) == [5, 6, 7]

    @given(STEPS, NUMBERS, st.integers(0, 800))
    def test_evicts_the_oldest_leaf_that_is_not_protected(self, steps, protected, nbytes) -> None:
        unused = [(step, number) for step, number in steps if step not in ("use", "chain")]
        grown = self.grown(unused)
        assert grown.victims(nbytes, protected) == naive_victims(grown, nbytes, protected)


class TestLFU(PureAnswerContract):
    name = "lfu"

    def test_evicts_the_least_used_block_first(self) -> None:
        assert self.grown([("add", 5), ("use", 5), ("add", 6), ("add", 7), ("use", 7), ("use", 7)]).victims(1000) == [6, 5, 7]

    def test_of_equal_counts_the_block_that_reached_it_first_is_evicted_first(self) -> None:
        assert self.grown([("add", 5), ("add", 6), ("use", 6), ("use", 5)]).victims(1000) == [6, 5]


class TestGDSF(PureAnswerContract):
    name = "gdsf"

    def test_of_equally_used_blocks_the_larger_is_evicted_first(self) -> None:
        assert self.grown([("add", 5), ("add", 35), ("add", 20)]).victims(1000) == [35, 20, 5]

    def test_a_block_that_was_hot_is_evicted_in_the_end(self) -> None:
        grown = self.grown([("add", 5), ("use", 5), ("use", 5)])
        for _ in range(6):
            grown.step("add", 6)
            if grown.victims(1) == [5]:
                return
            grown.step("evict", 1)
        raise AssertionError("a block that was hot is never evicted")

    def test_a_block_that_is_cheap_to_get_back_is_evicted_first(self) -> None:
        grown = self.grown([("add", 6), ("add", 5)])
        assert grown.victims(1) == [6]
        grown.policy.weigh(key_of(5), 0.5)
        assert grown.victims(1) == [5]


class TestSIEVE(PolicyContract):
    name = "sieve"

    def test_the_hand_skips_used_blocks_and_continues_from_there(self) -> None:
        grown = self.grown([("add", 32), ("add", 33), ("add", 34), ("add", 35), ("use", 32)])
        assert grown.victims(1) == [33]
        grown.remove(33)
        grown.step("use", 34)
        assert grown.victims(1) == [35], "the hand has passed 32, and 34 was used"


class TestS3FIFO(PolicyContract):
    name = "s3fifo"

    def test_a_block_not_used_again_is_evicted_from_the_small_queue(self) -> None:
        grown = self.grown([("add", 40), ("add", 39), ("use", 40), ("use", 40)])
        assert grown.victims(1) == [39]

    def test_a_block_that_returns_stays_longer(self) -> None:
        grown = self.grown([("add", 40), ("evict", 1)])
        grown.victims(1, incoming=[40])
        for number in (40, 39):
            grown.step("add", number)
        assert grown.victims(1) == [39]


class TestARC(PolicyContract):
    name = "arc"

    def test_a_block_used_once_is_evicted_before_one_used_twice(self) -> None:
        assert self.grown([("add", 5), ("use", 5), ("add", 6)]).victims(1000) == [6, 5]

    def test_a_returning_ghost_of_b1_grows_t1(self) -> None:
        grown = self.grown([("add", 5), ("use", 5), ("add", 7), ("add", 6), ("evict", 1)])
        assert 7 not in grown.resident
        assert grown.victims(1, incoming=[7]) == [5], "the target of T1 has grown"


def test_each_name_creates_another_policy():
    policies = [create_policy(name, History(), CAPACITY_BYTES) for name in POLICY_NAMES if name != "adaptive"]
    assert len({type(policy) for policy in policies}) == len(policies) == 7
