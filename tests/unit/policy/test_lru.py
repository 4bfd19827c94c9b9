"""Tests of LRU: the contract of all policies, its order, and equality with a model simple enough to check by eye."""

from hypothesis import example, given
from hypothesis import strategies as st

from tests.contracts.policy import NUMBERS, STEPS, Grown, PureAnswerContract, children_of


def naive_victims(grown: Grown, nbytes: int, protected: frozenset[int]) -> list[int]:
    """Repeatedly chooses the least recently used unprotected block that is a leaf of the remaining blocks."""
    left, chosen = list(grown.resident), []
    while sum(map(grown.nbytes, chosen)) < nbytes:
        leaves = [number for number in left if number not in protected and not children_of(number, left)]
        if not leaves:
            break
        chosen.append(leaves[0])
        left.remove(leaves[0])
    return chosen


class TestLRU(PureAnswerContract):
    name = "lru"

    def test_evicts_the_least_recently_used_block_first(self) -> None:
        assert self.grown([("add", 5), ("add", 6), ("add", 7), ("use", 5)]).victims(1000) == [6, 7, 5]

    def test_of_a_chain_used_at_once_the_deepest_block_is_evicted_first(self) -> None:
        assert self.grown([("chain", 4), ("add", 7), ("chain", 4)]).victims(1000) == [7, 4, 2, 1]

    @given(STEPS, NUMBERS, st.integers(0, 800))
    @example([("add", 1), ("add", 2), ("shrink", 2)], frozenset(), 7)
    def test_evicts_the_blocks_of_the_model_in_its_order(self, steps, protected, nbytes) -> None:
        grown = self.grown(steps)
        assert grown.victims(nbytes, protected) == naive_victims(grown, nbytes, protected)
