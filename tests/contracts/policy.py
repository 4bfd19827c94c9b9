"""The contract of every eviction policy. Subclass it in a test module and set `name`."""

from collections.abc import Iterable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiered_kv.policy import EvictionPolicy, History, create_policy

NBYTES = 10
CAPACITY_BYTES = 600


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def parent_of(number: int) -> int | None:
    """Returns the parent in one binary tree of the blocks 1, 2, …: the parent of 4 and 5 is 2."""
    return number // 2 or None


def parent_key(number: int) -> bytes | None:
    parent = parent_of(number)
    return None if parent is None else key_of(parent)


def chain_to(number: int) -> list[int]:
    """Returns the chain of a block: its ancestors and itself, root first."""
    return [number >> bits for bits in reversed(range(number.bit_length()))]


def children_of(number: int, among: Iterable[int]) -> set[int]:
    return {2 * number, 2 * number + 1} & set(among)


class _MembershipOnly:
    """A container that supports only `in`, the one operation that `victims` may use on its argument."""

    def __init__(self, numbers: frozenset[int]) -> None:
        self._keys = {key_of(number) for number in numbers}

    def __contains__(self, key: object) -> bool:
        return key in self._keys


STEPS = st.lists(st.tuples(st.sampled_from(["add", "use", "chain", "remove", "shrink", "ask", "evict"]), st.integers(1, 40)), max_size=60)
NUMBERS = st.frozensets(st.integers(1, 40), max_size=8)

shared = settings(suppress_health_check=[*settings().suppress_health_check, HealthCheck.differing_executors])
"""Several policies run the same test from different classes. That is safe: instances of a contract have no state."""


class Grown:
    """A policy with its history and a model of the resident blocks. Blocks are numbers. Step n happens at n seconds."""

    def __init__(self, policy: EvictionPolicy, history: History) -> None:
        self.policy, self.history = policy, history
        self.resident: dict[int, None] = {}  # least recently used first
        self.shrunk: set[int] = set()
        self.now_s = 0.0

    def nbytes(self, number: int) -> int:
        return (NBYTES + number) // (2 if number in self.shrunk else 1)

    def step(self, step: str, number: int) -> None:
        self.now_s += 1.0
        if step == "chain":
            self.chain(number)
        elif step in ("ask", "evict"):
            for victim in self.victims(number)[: None if step == "evict" else 0]:
                self.remove(victim)
        elif step == "add" and number not in self.resident:
            self.add(number)
        elif step == "use" and number in self.resident:
            self.use([number])
        elif step == "remove" and number in self.resident:
            self.remove(number)
        elif step == "shrink" and number in self.resident:
            self.shrunk.add(number)
            self.policy.resize(key_of(number), self.nbytes(number))
        self.policy.check()

    def add(self, number: int) -> None:
        self.history.seen([key_of(number)], parent_key(number), self.now_s)
        self.policy.add([key_of(number)], parent_key(number), self.nbytes(number))
        self.resident[number] = None

    def use(self, numbers: list[int]) -> None:
        keys = [key_of(number) for number in numbers]
        self.history.seen(keys, parent_key(numbers[0]), self.now_s)
        self.policy.use(keys)
        for number in reversed(numbers):
            del self.resident[number]
            self.resident[number] = None

    def remove(self, number: int) -> None:
        self.shrunk.discard(number)
        self.policy.remove(key_of(number))
        del self.resident[number]

    def chain(self, number: int) -> None:
        """Does what a request does: uses the resident leading blocks of a chain and adds the other blocks that are missing."""
        chain = chain_to(number)
        hit = next((at for at, each in enumerate(chain) if each not in self.resident), len(chain))
        if hit:
            self.use(chain[:hit])
        for each in chain[hit:]:
            if each not in self.resident:
                self.add(each)

    def victims(self, nbytes: int, protected: frozenset[int] = frozenset(), incoming: Iterable[int] = ()) -> list[int]:
        keys = self.policy.victims(nbytes, _MembershipOnly(protected), self.now_s, [key_of(number) for number in incoming])
        return [int.from_bytes(key, "big") for key in keys]


class PolicyContract:
    """The test suite. `name` is the policy's name. `history` returns the history that it needs."""

    name: str

    def history(self) -> History:
        return History()

    def grown(self, steps: Iterable[tuple[str, int]] = ()) -> Grown:
        history = self.history()
        grown = Grown(create_policy(self.name, history, CAPACITY_BYTES), history)
        for step in steps:
            grown.step(*step)
        return grown

    def test_without_blocks_has_no_victims(self) -> None:
        assert self.grown().victims(1) == []

    def test_of_a_chain_the_deepest_block_is_evicted_first(self) -> None:
        grown = self.grown([("chain", 4)])
        assert grown.victims(1) == [4]
        assert grown.victims(1000) == [4, 2, 1]

    def test_a_run_added_at_once_is_a_chain(self) -> None:
        grown = self.grown([("add", 1)])
        grown.history.seen([key_of(2), key_of(4)], key_of(1), 2.0)
        grown.policy.add([key_of(2), key_of(4)], key_of(1), NBYTES)
        grown.policy.check()
        assert grown.victims(1000) == [4, 2, 1]

    def test_an_ancestor_waits_for_all_its_children(self) -> None:
        assert self.grown([("chain", 2), ("chain", 3)]).victims(1000, frozenset({3})) == [2]

    def test_descendants_of_a_missing_block_can_be_evicted(self) -> None:
        grown = self.grown([("add", 4), ("add", 2), ("add", 1), ("remove", 2)])
        assert sorted(grown.victims(1000)) == [1, 4]

    def test_a_block_added_before_its_parent_is_its_child(self) -> None:
        """The deepest block of the chain is used first, as may happen after a restart."""
        assert self.grown([("add", 2), ("add", 1), ("use", 2)]).victims(1) == [2]
        assert self.grown([("add", 4), ("add", 2), ("add", 1), ("use", 2), ("use", 4)]).victims(1000) == [4, 2, 1]

    def test_weighing_a_block_keeps_it_resident_and_in_order(self) -> None:
        grown = self.grown([("chain", 4)])
        grown.policy.weigh(key_of(4), 0.25)
        grown.policy.check()
        assert grown.victims(1000) == [4, 2, 1]

    def test_a_resized_block_frees_its_new_size(self) -> None:
        grown = self.grown([("chain", 4), ("shrink", 4)])
        assert grown.victims(8) == [4, 2], "block 4 has shrunk from 14 bytes to 7"

    @shared
    @given(STEPS)
    def test_counts_the_resident_blocks(self, steps) -> None:
        grown = self.grown(steps)
        assert len(grown.policy) == len(grown.resident)
        assert all((key_of(number) in grown.policy) == (number in grown.resident) for number in range(1, 41))

    @shared
    @given(STEPS, NUMBERS, NUMBERS, st.integers(0, 800))
    def test_victims_are_valid_whatever_was_asked_before(self, steps, protected, incoming, nbytes) -> None:
        grown = self.grown(steps)
        for _ in range(2):
            chosen = grown.victims(nbytes, protected, sorted(incoming - grown.resident.keys()))
            self.check_victims(grown, chosen, nbytes, protected)
            grown.policy.check()
        assert all((key_of(number) in grown.policy) == (number in grown.resident) for number in range(1, 41))

    def check_victims(self, grown: Grown, chosen: list[int], nbytes: int, protected: frozenset[int]) -> None:
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= grown.resident.keys() - protected
        assert sum(map(grown.nbytes, chosen[:-1])) < max(nbytes, 1), "the last victim was not needed"
        for at, number in enumerate(chosen):
            assert children_of(number, grown.resident) <= set(chosen[:at]), "a child must be chosen before its parent"
        if sum(map(grown.nbytes, chosen)) < nbytes:
            left = grown.resident.keys() - set(chosen)
            assert left == {number for number in left if number in protected or children_of(number, left)}, "more could be evicted"

    @shared
    @given(STEPS)
    def test_the_same_history_gives_the_same_victims(self, steps) -> None:
        assert self.grown(steps).victims(10_000) == self.grown(steps).victims(10_000)


class PureAnswerContract(PolicyContract):
    """The contract of policies whose answer does not change when `victims` is called again (all but those with a hand)."""

    @shared
    @given(STEPS, NUMBERS, st.integers(0, 800))
    def test_asking_changes_nothing(self, steps, protected, nbytes) -> None:
        grown = self.grown(steps)
        first, everything = grown.victims(nbytes, protected), grown.victims(10_000)
        assert grown.victims(nbytes, protected) == first
        assert grown.victims(10_000) == everything
