"""LRU: the contract of all policies, its order, and equality with a model that any reader can check by eye."""

from hypothesis import given
from hypothesis import strategies as st

from tests.contracts.policy import NBYTES, NUMBERS, STEPS, PolicyContract
from tiered_kv.policy import EvictionPolicy, LRUPolicy, create_policy


def naive_victims(resident: list[int], nbytes: int, protected: frozenset[int]) -> list[int]:
    """Again and again the least recently used block that is a leaf of what is left, and may go."""
    left, chosen = list(resident), []
    while sum(NBYTES + number for number in chosen) < nbytes:
        leaves = [number for number in left if number not in protected and not {2 * number, 2 * number + 1} & set(left)]
        if not leaves:
            break
        chosen.append(leaves[0])
        left.remove(leaves[0])
    return chosen


class TestLRU(PolicyContract):
    def make(self) -> EvictionPolicy:
        return LRUPolicy()

    def test_gives_up_what_was_used_longest_ago(self) -> None:
        policy, _ = self.grown([("add", 5), ("add", 6), ("add", 7), ("touch", 5)])
        assert self.victims(policy, 1000) == [6, 7, 5]

    def test_touched_deepest_first_the_deepest_goes_first(self) -> None:
        policy, _ = self.grown([("add", 4), ("add", 2), ("add", 1), ("add", 7), ("touch", 4), ("touch", 2), ("touch", 1)])
        assert self.victims(policy, 1000) == [7, 4, 2, 1]

    @given(STEPS, NUMBERS)
    def test_gives_up_the_same_blocks_as_the_model_when_all_may_go(self, steps, protected) -> None:
        policy, resident = self.grown(steps)
        assert set(self.victims(policy, 10_000, protected)) == set(naive_victims(list(resident), 10_000, protected))

    @given(st.permutations(range(20, 40)), st.integers(0, 600), NUMBERS)
    def test_without_chains_it_is_plain_lru(self, order, nbytes, protected) -> None:
        policy, resident = self.grown([("add", number) for number in order])
        assert self.victims(policy, nbytes, protected) == naive_victims(list(resident), nbytes, protected)

    @given(STEPS, NUMBERS, st.integers(0, 800))
    def test_chains_used_deepest_first_go_in_the_order_of_the_model(self, steps, protected, nbytes) -> None:
        policy, resident = self.make(), []
        for _, number in steps:  # every step uses the whole chain up to `number`, as a fetch does
            for block in chain_to(number):
                if block in resident:
                    policy.touch(block.to_bytes(32, "big"))
                    resident.remove(block)
                else:
                    policy.add(block.to_bytes(32, "big"), (block // 2).to_bytes(32, "big") if block > 1 else None, NBYTES + block)
                resident.append(block)
        assert self.victims(policy, nbytes, protected) == naive_victims(resident, nbytes, protected)


def chain_to(number: int) -> list[int]:
    """The block and its ancestors, the deepest first."""
    chain = []
    while number:
        chain.append(number)
        number //= 2
    return chain


def test_is_created_by_its_name() -> None:
    assert isinstance(create_policy("lru"), LRUPolicy)
