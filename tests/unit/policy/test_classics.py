"""The classic policies: the contract of all, and for each what it alone does."""

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
    def test_gives_up_the_oldest_leaf_that_may_go(self, steps, protected, nbytes) -> None:
        unused = [(step, number) for step, number in steps if step not in ("use", "chain")]
        grown = self.grown(unused)
        assert grown.victims(nbytes, protected) == naive_victims(grown, nbytes, protected)


class TestLFU(PureAnswerContract):
    name = "lfu"

    def test_gives_up_what_was_used_least(self) -> None:
        assert self.grown([("add", 5), ("use", 5), ("add", 6), ("add", 7), ("use", 7), ("use", 7)]).victims(1000) == [6, 5, 7]

    def test_of_equals_the_one_that_reached_its_count_first(self) -> None:
        assert self.grown([("add", 5), ("add", 6), ("use", 6), ("use", 5)]).victims(1000) == [6, 5]


class TestGDSF(PureAnswerContract):
    name = "gdsf"

    def test_gives_up_the_larger_of_equals(self) -> None:
        assert self.grown([("add", 5), ("add", 35), ("add", 20)]).victims(1000) == [35, 20, 5]

    def test_what_was_hot_is_overtaken_by_newcomers(self) -> None:
        grown = self.grown([("add", 5), ("use", 5), ("use", 5)])
        for _ in range(6):
            grown.step("add", 6)
            if grown.victims(1) == [5]:
                return
            grown.step("evict", 1)
        raise AssertionError("hot for ever")

    def test_what_is_cheap_to_get_back_goes_first(self) -> None:
        grown = self.grown([("add", 6), ("add", 5)])
        assert grown.victims(1) == [6]
        grown.policy.weigh(key_of(5), 0.5)
        assert grown.victims(1) == [5]


class TestSIEVE(PolicyContract):
    name = "sieve"

    def test_the_hand_spares_what_was_used_and_goes_on_from_there(self) -> None:
        grown = self.grown([("add", 32), ("add", 33), ("add", 34), ("add", 35), ("use", 32)])
        assert grown.victims(1) == [33]
        grown.remove(33)
        grown.step("use", 34)
        assert grown.victims(1) == [35], "32 was passed, and 34 used"


class TestS3FIFO(PolicyContract):
    name = "s3fifo"

    def test_what_was_not_used_leaves_the_small_queue_for_good(self) -> None:
        grown = self.grown([("add", 40), ("add", 39), ("use", 40), ("use", 40)])
        assert grown.victims(1) == [39]

    def test_what_returns_stays_longer(self) -> None:
        grown = self.grown([("add", 40), ("evict", 1)])
        grown.victims(1, incoming=[40])
        for number in (40, 39):
            grown.step("add", number)
        assert grown.victims(1) == [39]


class TestARC(PolicyContract):
    name = "arc"

    def test_what_was_used_once_goes_before_what_was_used_twice(self) -> None:
        assert self.grown([("add", 5), ("use", 5), ("add", 6)]).victims(1000) == [6, 5]

    def test_a_return_moves_the_share_of_what_was_used_once(self) -> None:
        grown = self.grown([("add", 5), ("use", 5), ("add", 7), ("add", 6), ("evict", 1)])
        assert 7 not in grown.resident
        assert grown.victims(1, incoming=[7]) == [5], "T1 may be larger now"


def test_each_name_gives_a_policy():
    policies = [create_policy(name, History(), CAPACITY_BYTES) for name in POLICY_NAMES if name != "adaptive"]
    assert len({type(policy) for policy in policies}) == len(policies) == 7
