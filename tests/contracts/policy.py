"""What every eviction policy must do, whatever it ranks by. Subclass in a test module and say how one is made."""

from abc import abstractmethod

from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.policy import EvictionPolicy

NBYTES = 10


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def parent_of(number: int) -> int | None:
    """Blocks 1, 2, … as one binary tree: the parent of 4 and 5 is 2."""
    return number // 2 or None


def parent_key(number: int) -> bytes | None:
    parent = parent_of(number)
    return None if parent is None else key_of(parent)


class _Asked:
    """A set that remembers nothing: only what `victims` may ask of its argument."""

    def __init__(self, numbers: frozenset[int]) -> None:
        self._keys = {key_of(number) for number in numbers}

    def __contains__(self, key: object) -> bool:
        return key in self._keys


STEPS = st.lists(st.tuples(st.sampled_from(["add", "touch", "remove"]), st.integers(1, 40)), max_size=60)
NUMBERS = st.frozensets(st.integers(1, 40), max_size=8)


class PolicyContract:
    """A suite. Blocks are known by number; `grown` has those of a random history."""

    @abstractmethod
    def make(self) -> EvictionPolicy:
        """A policy without blocks."""

    def grown(self, steps: list[tuple[str, int]]) -> tuple[EvictionPolicy, dict[int, None]]:
        """A policy after some history, and its resident blocks, least recently used first."""
        policy, resident = self.make(), {}
        for step, number in steps:
            if step == "add" and number not in resident:
                policy.add(key_of(number), parent_key(number), NBYTES + number)
            elif step != "add" and number in resident:
                policy.touch(key_of(number)) if step == "touch" else policy.remove(key_of(number))
                del resident[number]
            else:
                continue
            if step != "remove":
                resident[number] = None
            policy.check()
        return policy, resident

    def victims(self, policy: EvictionPolicy, nbytes: int, protected: frozenset[int] = frozenset()) -> list[int]:
        return [int.from_bytes(key, "big") for key in policy.victims(nbytes, _Asked(protected))]

    def test_without_blocks_has_no_victims(self) -> None:
        assert self.victims(self.make(), 1) == []

    def test_of_a_chain_the_last_block_goes_first(self) -> None:
        policy, _ = self.grown([("add", 1), ("add", 2), ("add", 4)])
        assert self.victims(policy, 1) == [4]
        assert self.victims(policy, 1000) == [4, 2, 1]

    def test_an_ancestor_waits_for_all_its_children(self) -> None:
        policy, _ = self.grown([("add", 1), ("add", 2), ("add", 3)])
        assert self.victims(policy, 1000, frozenset({3})) == [2]

    def test_blocks_behind_a_missing_one_go_too(self) -> None:
        policy, _ = self.grown([("add", 4), ("add", 2), ("add", 1), ("remove", 2)])
        assert sorted(self.victims(policy, 1000)) == [1, 4]

    @given(STEPS)
    def test_counts_what_is_resident(self, steps: list[tuple[str, int]]) -> None:
        policy, resident = self.grown(steps)
        assert len(policy) == len(resident)
        assert all((key_of(number) in policy) == (number in resident) for number in range(1, 41))

    @given(STEPS, NUMBERS, st.integers(0, 800))
    def test_victims_are_resident_unprotected_and_no_more_than_needed(self, steps, protected, nbytes) -> None:
        policy, resident = self.grown(steps)
        chosen = self.victims(policy, nbytes, protected)
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= resident.keys() - protected
        assert sum(NBYTES + number for number in chosen[:-1]) < max(nbytes, 1), "the last one was not needed"

    @given(STEPS, NUMBERS, st.integers(0, 800))
    def test_a_block_goes_after_all_its_resident_children(self, steps, protected, nbytes) -> None:
        policy, resident = self.grown(steps)
        chosen = self.victims(policy, nbytes, protected)
        for at, number in enumerate(chosen):
            children = {child for child in (2 * number, 2 * number + 1) if child in resident}
            assert children <= set(chosen[:at])

    @given(STEPS, NUMBERS, st.integers(0, 800))
    def test_gives_up_enough_unless_nothing_more_may_go(self, steps, protected, nbytes) -> None:
        policy, resident = self.grown(steps)
        chosen = self.victims(policy, nbytes, protected)
        if sum(NBYTES + number for number in chosen) < nbytes:
            left = resident.keys() - set(chosen)
            stuck = {number for number in left if number in protected or {2 * number, 2 * number + 1} & left}
            assert left == stuck

    @given(STEPS, NUMBERS, st.integers(0, 800))
    def test_asking_changes_nothing(self, steps, protected, nbytes) -> None:
        policy, _ = self.grown(steps)
        first = self.victims(policy, nbytes, protected)
        everything = self.victims(policy, 10_000)
        policy.check()
        assert self.victims(policy, nbytes, protected) == first
        assert self.victims(policy, 10_000) == everything

    @given(STEPS)
    def test_the_same_history_gives_the_same_victims(self, steps) -> None:
        assert self.victims(self.grown(steps)[0], 10_000) == self.victims(self.grown(steps)[0], 10_000)
