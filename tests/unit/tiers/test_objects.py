"""The objects tier on stores that fail on demand: caps, packs, restarts, and losses when the store does not answer."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.contracts.tier import TierContract
from tests.unit.tiers.records import ROOT, assert_holds, key_of, put, record_of
from tiered_kv import blocks
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.footer import ROW_BYTES, TRAILER_BYTES
from tiered_kv.tiers.log import Refusal
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.store import MemoryStore
from tiered_kv.tiers.objects.tier import ObjectsTier

CAP = 64 << 10
FRAME = 4096 - ROW_BYTES  # two of them and a trailer do not fit a pack of 8 KiB, three of half the size do


class FaultyStore(MemoryStore):
    """A store whose calls named in `down` fail. With `arrives`, a failing put still stores its object."""

    def __init__(self) -> None:
        super().__init__()
        self.down: set[str] = set()
        self.arrives = False
        self.errno: int | None = None
        self.before_put: Callable[[], None] = lambda: None

    def _may(self, call: str) -> None:
        if call in self.down:
            raise self.failed(call, "503 SlowDown", errno=self.errno)

    def put(self, name, buffers) -> None:
        self.before_put()
        if "put" not in self.down or self.arrives:
            super().put(name, buffers)
        self._may("put")

    def get_range(self, name, offset, nbytes):
        self._may("get")
        return super().get_range(name, offset, nbytes)

    def sizes(self):
        self._may("list")
        return super().sizes()

    def delete(self, names) -> None:
        self._may("delete")
        super().delete(names)


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


@pytest.fixture
def tier(store, checked) -> ObjectsTier:
    tier = checked(ObjectsTier(store, CAP), before=lambda: store.down.clear())
    assert tier.recovered() == []
    return tier


def error_of(call, *arguments) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    return caught.value


def refusals(tier, numbers, frame_size=FRAME) -> list[Refusal | None]:
    return [answer.refused for answer in tier.append([record_of(number, frame_size) for number in numbers])]


def make_room(tier, nbytes: int) -> list[bytes]:
    """Make room as the engine does before it appends. Returns the keys of the lost blocks."""
    lost = []
    while (segment := tier.needs_reclaim(nbytes)) is not None:
        lost += tier.keys_in(segment)
        tier.reclaim(segment)
    return lost


class ObjectsContract(TierContract):
    def put(self, tier: ObjectsTier, number: int, nbytes: int):
        return put(tier, [number], nbytes).get(number)

    def take_away(self, tier: ObjectsTier, block) -> None:
        assert tier.forget(block)


class TestInMemory(ObjectsContract):
    def make(self, folder: Path) -> ObjectsTier:
        return ObjectsTier(MemoryStore(), CAP)


class TestInAFolder(ObjectsContract):
    def make(self, folder: Path) -> ObjectsTier:
        return ObjectsTier(FolderStore(folder / "objects"), CAP)

    def test_a_block_is_recovered_after_a_restart(self, tmp_path, checked):
        first = ObjectsTier(FolderStore(tmp_path), CAP)
        location = put(first, [1], FRAME)[1]
        first.close(remove=False)
        again = checked(ObjectsTier(FolderStore(tmp_path), CAP))
        assert [found.location for found in again.recovered()] == [location]
        assert_holds(again, 1, location)


def test_a_batch_becomes_packs_of_the_given_size(tier, store):
    assert tier.segment_bytes == CAP // 8
    placed = put(tier, range(7), 2600)
    assert [location.segment for location in placed.values()] == [1, 1, 2, 2, 3, 3, 4]
    assert max(store.sizes().values()) <= tier.segment_bytes
    assert tier.used_bytes == sum(store.sizes().values()) == 7 * (2600 + ROW_BYTES) + 4 * TRAILER_BYTES
    for number, location in placed.items():
        assert location.tier is blocks.Tier.OBJECTS
        assert_holds(tier, number, location)


def test_a_frame_larger_than_a_pack_gets_its_own_pack(tier):
    placed = put(tier, [0], 2000) | put(tier, [1], tier.segment_bytes * 2) | put(tier, [2], 2000)
    assert [location.segment for location in placed.values()] == [1, 2, 3]
    assert_holds(tier, 1, placed[1])


def test_the_largest_frame_fits_exactly(tier):
    assert refusals(tier, [1], tier.max_frame_bytes + 1) == [Refusal.TOO_LARGE]
    assert refusals(tier, [1], tier.max_frame_bytes) == [None]
    assert tier.used_bytes == tier.capacity_bytes == CAP
    assert refusals(tier, [2], 200) == [Refusal.FULL]


def test_the_cap_is_used_to_its_last_byte_and_not_exceeded(tier):
    put(tier, [1], 20_000)
    left = tier.capacity_bytes - tier.used_bytes - ROW_BYTES - TRAILER_BYTES
    assert refusals(tier, [2], left + 1) == [Refusal.FULL]
    assert refusals(tier, [2], left) == [None]
    assert tier.used_bytes == tier.capacity_bytes


def test_a_batch_larger_than_the_cap_keeps_what_fits(tier):
    answers = refusals(tier, range(20))
    assert answers[:15] == [None] * 15
    assert set(answers[15:]) == {Refusal.FULL}


def test_the_cap_counts_a_pack_before_it_is_uploaded(tier, store):
    seen = []
    store.before_put = lambda: seen.append(tier.used_bytes)
    put(tier, range(12), FRAME)
    assert len(seen) == 12
    assert all(12 * (FRAME + ROW_BYTES) < used <= CAP for used in seen), "the whole batch is counted when its first pack goes"


def test_a_read_does_not_wait_for_an_append(tier, store):
    location = put(tier, [1], FRAME)[1]
    held = []

    def read_elsewhere() -> None:
        reader = Thread(target=lambda: held.append(tier.read(location, key_of(1), ROOT).key), daemon=True)
        reader.start()
        reader.join(10)

    store.before_put = read_elsewhere
    put(tier, [2], FRAME)
    assert held == [key_of(1)]


def test_the_error_for_a_too_small_cap_names_the_setting(store):
    error = error_of(ObjectsTier, store, 1000)
    assert (error.kind, error.context["setting"]) == (Kind.CONFIG, "objects")


def test_reclaiming_makes_room_oldest_first(tier, store):
    put(tier, range(14), FRAME)
    oldest = tier.oldest_sealed()
    assert tier.keys_in(oldest) == [key_of(0)]
    assert make_room(tier, 2 * FRAME)[:1] == [key_of(0)]
    assert refusals(tier, [20, 21]) == [None, None]
    assert tier.keys_in(oldest) == []
    assert tier.reclaim(oldest) == 0


def test_a_batch_that_can_never_fit_empties_the_tier_and_ends(tier):
    put(tier, range(14), FRAME)
    assert len(make_room(tier, CAP)) == 14
    assert tier.used_bytes == 0


def test_reading_a_reclaimed_block_is_a_miss(tier):
    location = put(tier, [1], FRAME)[1]
    assert tier.reclaim(location.segment) == FRAME + ROW_BYTES + TRAILER_BYTES
    error = error_of(tier.read, location, key_of(1), ROOT)
    assert error.kind is Kind.STORAGE
    assert error.context["missing"]


def test_removing_blocks_makes_no_request_until_the_next_append_deletes_the_pack(tier, store):
    placed = put(tier, [1, 2], 2000)
    store.down = {"delete", "put", "list", "get"}
    assert tier.forget(placed[1])
    assert not tier.forget(placed[1])
    assert tier.forget(placed[2])
    used = tier.used_bytes
    assert used
    assert tier.oldest_sealed() is None
    store.down.clear()
    put(tier, [3], 2000)
    assert len(store.sizes()) == 1
    assert tier.used_bytes < used


def test_a_location_that_describes_another_frame_is_rejected(tier):
    location = put(tier, [1], FRAME)[1]
    for wrong in (
        location._replace(raw_bytes=7),
        location._replace(codec=9),
        location._replace(offset=8),
        location._replace(stored_bytes=99),
    ):
        assert error_of(tier.read, wrong, key_of(1), ROOT).kind is Kind.CORRUPT
    assert error_of(tier.read, location, key_of(2), ROOT).kind is Kind.CORRUPT


def test_a_store_that_is_down_refuses_appends_and_loses_nothing(tier, store, caplog):
    location = put(tier, [1], FRAME)[1]
    store.down = {"delete", "put", "list", "get"}
    assert refusals(tier, [2, 3]) == [Refusal.IO_ERROR] * 2
    assert "503 SlowDown" in caplog.text
    assert error_of(tier.read, location, key_of(1), ROOT).kind is Kind.STORAGE
    assert tier.needs_reclaim(CAP) is None, "an engine does not give blocks up for a store that deletes nothing"
    store.down.clear()
    assert refusals(tier, [2, 3]) == [None, None]
    assert_holds(tier, 1, location)


def test_a_failed_put_that_arrived_counts_until_it_is_deleted(tier, store):
    store.down, store.arrives = {"put", "delete"}, True
    assert refusals(tier, [1]) == [Refusal.IO_ERROR]
    assert tier.used_bytes == sum(store.sizes().values()) > 0
    assert refusals(tier, [1]) == [Refusal.IO_ERROR]
    assert len(store.sizes()) == 1, "nothing more is uploaded before that is gone"
    store.down.clear()
    assert refusals(tier, [1]) == [None]
    assert tier.used_bytes == sum(store.sizes().values())


def test_a_failed_put_frees_its_room_at_once_if_the_store_deletes_it(tier, store):
    store.down, store.arrives = {"put"}, True
    assert refusals(tier, range(15)) == [Refusal.IO_ERROR] * 15
    assert (tier.used_bytes, store.sizes()) == (0, {})


def test_a_full_file_system_is_a_separate_error(tier, store):
    store.down, store.errno = {"put"}, 28
    assert refusals(tier, [1]) == [Refusal.NO_SPACE]


def test_a_pack_that_cannot_be_deleted_still_counts(tier, store):
    location = put(tier, [1], FRAME)[1]
    store.down = {"delete"}
    assert tier.reclaim(location.segment) == 0
    assert tier.used_bytes == sum(store.sizes().values()) > 0
    store.down.clear()
    put(tier, [2], FRAME)
    assert len(store.sizes()) == 1


def test_a_restart_finds_every_block_in_order(store, checked):
    first = checked(ObjectsTier(store, CAP))
    placed = put(first, range(5), 2600) | put(first, [9], 2600)
    first.forget(placed[4])  # pack 3, of its own
    first.close(remove=False)
    again = checked(ObjectsTier(store, CAP))
    found = again.recovered()
    assert [block.key for block in found] == [key_of(number) for number in (0, 1, 2, 3, 4, 9)]
    assert [block.location for block in found] == list(placed.values())
    assert [block.info.parent for block in found] == [record_of(number, 2600).info.parent for number in (0, 1, 2, 3, 4, 9)]
    assert {block.info.root for block in found} == {ROOT}
    assert again.recovered() == []
    assert again.used_bytes == sum(store.sizes().values())
    assert put(again, [10], 2600)[10].segment == placed[9].segment + 1
    for number, location in placed.items():
        assert_holds(again, number, location)


def test_a_restart_with_a_lower_cap_keeps_the_newest(store, checked):
    first = checked(ObjectsTier(store, 2 * CAP))
    placed = put(first, range(12), CAP // 8)  # with its footer a pack of which eight are just too many
    first.close(remove=False)
    again = checked(ObjectsTier(store, CAP))
    kept = [block.location for block in again.recovered()]
    assert len(kept) == 7
    assert kept == list(placed.values())[-len(kept) :]
    assert again.used_bytes == sum(store.sizes().values()) <= CAP


def test_a_restart_that_cannot_shrink_to_its_cap_raises(store, checked):
    first = checked(ObjectsTier(store, 2 * CAP))
    put(first, range(20), FRAME)
    first.close(remove=False)
    again = ObjectsTier(store, CAP)
    store.down = {"delete"}
    error = error_of(again.recovered)
    assert (error.kind, error.context["setting"]) == (Kind.STORAGE, "objects")
    store.down.clear()
    assert again.recovered()
    again.check()


def test_a_restart_deletes_packs_with_a_damaged_footer_and_keeps_the_rest(store, checked, caplog):
    first = checked(ObjectsTier(store, CAP))
    placed = put(first, range(3), FRAME)
    first.close(remove=False)
    name = min(store.objects)
    store.objects[name] = store.objects[name][:-1]
    again = checked(ObjectsTier(store, CAP))
    assert [block.location for block in again.recovered()] == list(placed.values())[1:]
    assert name not in store.objects
    assert name in caplog.text


def test_objects_of_others_are_left_unchanged(store, checked):
    store.put("notes.txt", [b"mine"])
    store.put("9999999999-" + "0" * 64 + ".pack", [b"no number of ours"])
    tier = checked(ObjectsTier(store, CAP))
    assert tier.recovered() == []
    put(tier, [1], FRAME)
    tier.close()
    assert len(store.objects) == 2


def test_of_two_packs_with_one_number_one_is_kept(store, checked):
    """A put of a previous owner may arrive after its successor has used the number."""
    for number in (1, 2):
        other = ObjectsTier(MemoryStore(), CAP)
        put(other, [number], FRAME)
        store.objects |= other._store.objects
    tier = checked(ObjectsTier(store, CAP))
    found = tier.recovered()
    assert len(found) == len(store.objects) == 1
    assert tier.used_bytes == sum(store.sizes().values())


@pytest.mark.parametrize("call", ["list", "get"])
def test_a_store_that_is_down_at_the_start_raises_and_may_be_retried(store, checked, call):
    first = checked(ObjectsTier(store, CAP))
    placed = put(first, range(3), FRAME)
    first.close(remove=False)
    again = checked(ObjectsTier(store, CAP))
    store.down = {call}
    error = error_of(again.recovered)
    assert (error.kind, error.context["setting"]) == (Kind.STORAGE, "objects")
    assert refusals(again, [5]) == [Refusal.IO_ERROR]
    store.down.clear()
    assert [block.location for block in again.recovered()] == list(placed.values())


def test_recovered_blocks_that_no_owner_claims_are_reclaimed(store, checked):
    first = checked(ObjectsTier(store, CAP))
    put(first, range(14), FRAME)
    first.close(remove=False)
    again = checked(ObjectsTier(store, CAP))
    assert refusals(again, range(14)) == [None] * 14
    assert again.recovered() == []


def test_a_closed_tier_raises(tier, store):
    location = put(tier, [1], FRAME)[1]
    tier.close()
    assert store.sizes() == {}
    for call, *arguments in ((tier.append, [record_of(1, FRAME)]), (tier.read, location, key_of(1)), (tier.recovered,)):
        assert error_of(call, *arguments).kind is Kind.CLOSED


class ObjectsModel(RuleBasedStateMachine):
    """The tier compared with a dict, on a store that sometimes fails: no wrong block, never above the cap, and no block lost."""

    @initialize()
    def start(self) -> None:
        self.store = FaultyStore()
        self.tier = ObjectsTier(self.store, CAP)
        self.known: dict[int, blocks.Location] = {}
        self.next = 0

    @rule(
        sizes=st.lists(st.integers(200, 6000), min_size=1, max_size=6), down=st.sets(st.sampled_from(["put", "delete"])), room=st.booleans()
    )
    def append(self, sizes, down, room) -> None:
        if room:
            lost = set(make_room(self.tier, sum(sizes)))
            self.known = {number: location for number, location in self.known.items() if key_of(number) not in lost}
        self.store.down, self.store.arrives = down, True
        numbers = range(self.next, self.next + len(sizes))
        self.next += len(sizes)
        answers = self.tier.append([record_of(number, size) for number, size in zip(numbers, sizes, strict=True)])
        self.store.down = set()
        self.known |= {number: answer.location for number, answer in zip(numbers, answers, strict=True) if answer.location}

    @rule(data=st.data())
    def forget(self, data) -> None:
        if self.known:
            assert self.tier.forget(self.known.pop(data.draw(st.sampled_from(sorted(self.known)))))

    @rule()
    def restart(self) -> None:
        self.tier.close(remove=False)
        self.tier = ObjectsTier(self.store, CAP)
        found = {block.location: block.key for block in self.tier.recovered()}
        for number, location in self.known.items():
            assert found.pop(location) == key_of(number)
        for location in found:  # what the dead owner had forgotten
            self.tier.forget(location)

    @invariant()
    def holds(self) -> None:
        self.tier.check()
        assert sum(self.store.sizes().values()) <= CAP
        for number, location in self.known.items():
            assert_holds(self.tier, number, location)

    def teardown(self) -> None:
        self.tier.close()


TestObjectsModel = ObjectsModel.TestCase
TestObjectsModel.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
