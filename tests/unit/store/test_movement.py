"""The events that the store machine passes to history and policies, and its moves of blocks through four tiers: one test each."""

import pytest

from tests.unit.store.story import DEVICE, DISK, HOST, OBJECTS, ROOT, Story
from tests.unit.store.world import FRAME_BYTES, HOST_BYTES, depth_of, key_of, parent_of
from tiered_kv.blocks import BlockInfo, Hint, Tier
from tiered_kv.policy import EvictionPolicy, History, LRUPolicy
from tiered_kv.store import events as ev
from tiered_kv.store import movement
from tiered_kv.store.machine import UNREPORTED_MAX, StoreMachine

# A run of a chain


class Heard(History):
    """A history that records its calls."""

    def __init__(self) -> None:
        self.said: list[tuple] = []

    def seen(self, keys, parent, now_s) -> None:
        self.said.append(("seen", list(keys), parent, now_s))

    def hint(self, last_block, now_s, **known) -> None:
        self.said.append(("hint", last_block, now_s, known))


class Watched(LRUPolicy):
    """An LRU policy that records its calls."""

    def __init__(self, said: list[tuple]) -> None:
        super().__init__()
        self._said = said

    def add(self, keys, parent, nbytes) -> None:
        self._said.append(("add", list(keys), parent, nbytes))
        super().add(keys, parent, nbytes)

    def use(self, keys) -> None:
        self._said.append(("use", list(keys)))
        super().use(keys)

    def victims(self, nbytes, protected, now_s, incoming=()) -> list:
        self._said.append(("victims", nbytes, now_s, list(incoming)))
        return super().victims(nbytes, protected, now_s, incoming)

    def weigh(self, key, factor) -> None:
        self._said.append(("weigh", key, factor))


def watched_story(*tiers: Tier) -> tuple[Story, list[tuple]]:
    story, history = Story(*tiers), Heard()
    policy: EvictionPolicy = Watched(history.said)
    story.machine = StoreMachine(dict.fromkeys(tiers, 10_000), {HOST: policy}, history)
    return story, history.said


def committed(story: Story, *numbers: int, now_s: float = 0.0) -> ev.Committed:
    keys = [key_of(number) for number in numbers]
    return ev.Committed(ROOT, parent_of(numbers[0]), keys, [story.world.place(HOST, key) for key in keys], now_s, depth_of(numbers[0]))


def test_history_and_policy_get_the_same_events_as_in_a_replay() -> None:
    story, said = watched_story(HOST)
    story.tell(committed(story, 1, 2, 4, now_s=1.0))
    story.use(1, 2, 4, now_s=2.0)
    story.need(HOST_BYTES, last_block=key_of(2), keys=[key_of(9)], now_s=3.0)
    story.tell(ev.Hinted(key_of(2), Hint(answer_tokens=7), 3.0))
    one, two, four = map(key_of, (1, 2, 4))
    assert said == [
        ("seen", [one, two, four], None, 1.0),
        ("add", [one, two, four], None, HOST_BYTES),
        ("seen", [one, two, four], None, 2.0),
        ("use", [one, two, four]),
        ("victims", HOST_BYTES, 3.0, [key_of(9)]),
        ("hint", two, 3.0, {"answer_tokens": 7, "reuse_within_s": None, "ended": False}),
    ]


def test_only_the_new_blocks_of_a_run_are_added() -> None:
    story, said = watched_story(HOST)
    story.tell(committed(story, 2))
    said.clear()
    story.tell(committed(story, 1, 2, 4, 8))
    assert [each[:3] for each in said if each[0] == "add"] == [("add", [key_of(1)], None), ("add", [key_of(4), key_of(8)], key_of(2))]
    assert story.machine.counts["duplicate"] == 1


def test_a_use_of_an_evicted_block_counts_for_the_other_blocks() -> None:
    story, said = watched_story(HOST)
    story.tell(committed(story, 1))
    said.clear()
    story.use(1, 2)
    story.use(7)
    assert said == [("seen", [key_of(1)], None, 0.0), ("use", [key_of(1)])]


def test_the_policy_knows_the_nearest_other_copy_of_a_block() -> None:
    story, said = watched_story(HOST, DISK, OBJECTS)
    story.commit(1)
    assert not [each for each in said if each[0] == "weigh"], "without another copy nothing is said"
    story.demote(1)
    story.use(1)
    story.finish(1, HOST)
    story.tell(ev.Aging(DISK, story.segment(1), [key_of(1)]))
    assert not story.world.copies, "what is in memory as well is not copied down"
    story.lose(1)
    factors = [each[2] for each in said if each[0] == "weigh"]
    near = movement.RESTORE_FACTOR[DISK]
    assert factors == [near, near, 1.0], "when it is written, when it comes back, when the disk loses it"


# Device


def hot(story: Story, number: int) -> None:
    """Promote a block from host memory to the device."""
    story.use(number)
    story.finish(number, DEVICE)


def test_a_block_used_again_is_promoted_to_the_device_and_stays_in_memory() -> None:
    story = Story(DEVICE, HOST)
    story.commit(1)
    hot(story, 1)
    assert story.tiers(1) == {DEVICE, HOST}
    assert story.world.shown[key_of(1)].tier is DEVICE
    story.need(tier=DEVICE)
    assert story.tiers(1) == {HOST}
    assert not story.world.copies
    assert story.machine.counts["device_freed"] == 1


def test_a_block_only_on_the_device_is_demoted_to_memory_on_eviction() -> None:
    story = Story(DEVICE, HOST)
    story.commit(1)
    hot(story, 1)
    story.need()
    assert story.tiers(1) == {DEVICE}, "its host copy was free to go"
    assert (story.machine.counts["host_freed"], story.machine.counts["dropped"]) == (1, 0)
    story.need(tier=DEVICE)
    story.finish(1, HOST)
    assert story.tiers(1) == {HOST}


def test_a_block_only_on_the_device_is_dropped_if_memory_has_no_room() -> None:
    story = Story(DEVICE, HOST)
    story.commit(1)
    hot(story, 1)
    story.need()
    story.need(tier=DEVICE)
    story.tell(ev.CopyFailed(story.world.copies.pop().key, HOST))
    assert story.tiers(1) == {DEVICE}
    story.need(tier=DEVICE)
    assert story.tiers(1) == set()


def test_a_worker_without_access_to_the_device_gets_the_block_in_memory() -> None:
    story = Story(DEVICE, HOST)
    story.commit(1, 2)
    hot(story, 1)
    hot(story, 2)
    story.need()  # 2 is on the device alone now
    story.tell(ev.BringRequested([key_of(1), key_of(2), key_of(3)]))
    story.finish(2, HOST)
    assert story.tiers(1) == story.tiers(2) == {HOST}


# Which way down


def test_a_full_disk_admits_blocks_that_were_used_or_stored_again() -> None:
    story = Story(HOST, DISK, disk=1)
    story.commit(1)
    story.demote(1)
    story.commit(3)
    story.need()
    assert story.tiers(3) == set()
    assert story.machine.counts["not_admitted"] == 1
    story.commit(5)
    story.use(5)
    story.need()
    assert story.world.copies.pop().key == key_of(5)
    story.tell(ev.CopyFailed(key_of(5), DISK))
    story.commit(3)
    story.need(2 * HOST_BYTES)
    assert [copy.key for copy in story.world.copies] == [key_of(3)], "it was turned away once, and somebody stored it again"


def test_uses_before_the_block_was_known_to_the_machine_count_for_admission() -> None:
    story = Story(HOST, DISK, disk=1)
    story.machine._movement._history.uses = lambda key: 2
    story.commit(1)
    story.demote(1)
    story.commit(3)
    story.need()
    assert [copy.key for copy in story.world.copies] == [key_of(3)]


@pytest.mark.parametrize(("chance", "taken"), [(movement.CHANCE_FOR_FULL_TIER, [key_of(3)]), (movement.CHANCE_FOR_FULL_TIER / 2, [])])
def test_a_full_disk_admits_blocks_likely_to_be_used_while_stored_there(chance, taken) -> None:
    story, asked = Story(HOST, DISK, disk=1), []
    story.machine._movement._history.chance = lambda key, ahead: asked.append(ahead) or chance
    story.commit(1)
    story.demote(1)
    story.commit(3)
    story.need()
    assert [copy.key for copy in story.world.copies] == taken
    caps = story.machine._movement._capacities
    assert set(asked) == {caps[DISK] / caps[HOST]}, "as long as the disk keeps blocks, by what memory does"


def test_blocks_that_a_slow_disk_cannot_accept_are_dropped_and_counted() -> None:
    story = Story(HOST, DISK)
    story.commit(4, 6, 10)
    story.need(3 * HOST_BYTES, queue_bytes=HOST_BYTES)
    assert [copy.key for copy in story.world.copies] == [key_of(4)]
    assert story.tiers(6) == story.tiers(10) == set()
    assert story.machine.counts["dropped_under_pressure"] == 2


def test_a_slow_disk_does_not_make_a_growing_chain_evict_itself() -> None:
    story = Story(HOST, DISK)
    story.commit(1, 2)
    story.need(2 * HOST_BYTES, last_block=key_of(2), queue_bytes=HOST_BYTES)
    assert story.tiers(1) == story.tiers(2) == {HOST}
    assert len(story.world.copies) == 1


def test_without_a_disk_blocks_are_demoted_to_objects_and_promoted_on_request() -> None:
    story = Story(HOST, OBJECTS)
    story.commit(1)
    story.demote(1, OBJECTS)
    story.tell(ev.BringRequested([key_of(1)]))
    story.tell(ev.BringRequested([key_of(1)]))
    story.finish(1, HOST)
    assert not story.world.copies
    assert story.tiers(1) == {HOST, OBJECTS}


# Segments that go


def test_blocks_of_an_old_segment_are_demoted_in_time() -> None:
    story = Story(HOST, DISK, OBJECTS)
    story.commit(1)
    story.demote(1)
    segment = story.segment(1)
    story.tell(ev.Aging(DISK, segment, [key_of(1)]), ev.Aging(DISK, segment, [key_of(1)]))
    story.finish(1, OBJECTS)
    assert not story.world.copies
    assert story.tiers(1) == {DISK, OBJECTS}
    story.tell(ev.Emptied(DISK, segment, [key_of(1)]))
    assert story.tiers(1) == {OBJECTS}
    assert story.machine.counts["lost"] == 0


def test_a_segment_reclaimed_before_its_blocks_were_demoted_is_counted() -> None:
    story = Story(HOST, DISK, OBJECTS)
    story.commit(1)
    story.demote(1)
    story.tell(ev.Aging(DISK, story.segment(1), [key_of(1)]), ev.Emptied(DISK, story.segment(1), [key_of(1)]))
    assert story.tiers(1) == set()
    assert (story.machine.counts["lost"], story.machine.counts["dropped_under_pressure"]) == (1, 1)
    assert [type(each) for each in story.finish(1, OBJECTS)] == [ev.Free]


def test_blocks_used_since_their_write_are_reinserted_most_used_first() -> None:
    story = Story(HOST, DISK)
    story.machine.blocks.clear()
    locations = {}
    for number in (1, 2, 3):
        locations[number] = story.world.place(DISK, key_of(number))._replace(segment=9)
        story.world.content[locations[number]] = story.world.content.pop(locations[number]._replace(segment=(number) // 2))
        story.tell(ev.Recovered(BlockInfo(key_of(number), None, None), locations[number]))
    keys = [key_of(number) for number in (1, 2, 3)]
    for number in (1, 3, 3):
        story.use(number)
        story.world.copies.clear()
        story.tell(ev.CopyFailed(key_of(number), HOST))
    assert story.machine.wanted_in(DISK, 9, keys, 10_000) == [key_of(3), key_of(1)]
    assert story.machine.wanted_in(DISK, 9, keys, FRAME_BYTES) == [key_of(3)]
    assert story.machine.wanted_in(DISK, 8, keys, 10_000) == []
    moved = story.world.place(DISK, key_of(3))
    said = story.tell(ev.Moved(key_of(3), 9, moved))
    assert [type(each) for each in said] == [ev.Show]
    del story.world.content[locations[3]]
    story.tell(ev.Emptied(DISK, 9, keys))
    assert [story.tiers(number) for number in (1, 2, 3)] == [set(), set(), {DISK}]
    assert story.machine.wanted_in(DISK, moved.segment, keys, 10_000) == [], "once for each use"


def test_a_block_dropped_during_its_reinsertion_is_freed() -> None:
    story = Story(HOST, DISK)
    story.commit(1)
    story.demote(1)
    segment = story.segment(1)
    story.lose(1)
    assert [type(each) for each in story.tell(ev.Moved(key_of(1), segment, story.world.place(DISK, key_of(1))))] == [ev.Free]


# Hints


def test_a_pinned_chain_stays_until_the_pin_expires() -> None:
    story = Story(HOST)
    story.commit(1, 2, 3)
    story.tell(ev.Hinted(key_of(2), Hint(pinned_s=10), 0.0))
    story.need(3 * HOST_BYTES, now_s=9.0)
    assert [bool(story.tiers(number)) for number in (1, 2, 3)] == [True, True, False]
    story.need(3 * HOST_BYTES, now_s=10.0)
    assert not story.machine.blocks


def test_pins_beyond_half_of_memory_are_ignored_and_counted() -> None:
    story = Story(HOST, host=4)
    story.commit(1, 2, 4)
    story.tell(ev.Hinted(key_of(4), Hint(pinned_s=10), 0.0))
    assert story.machine.counts["pins_refused"] == 1
    story.tell(ev.Hinted(key_of(2), Hint(pinned_s=10), 0.0), ev.Hinted(key_of(2), Hint(pinned_s=20), 0.0))
    story.need(3 * HOST_BYTES, now_s=15.0)
    assert [bool(story.tiers(number)) for number in (1, 2, 4)] == [True, True, False]


def test_a_session_that_ended_unpins_what_it_did_not_share() -> None:
    story = Story(HOST)
    story.commit(1, 2)
    story.use(1)
    story.tell(ev.Hinted(key_of(2), Hint(pinned_s=10), 0.0), ev.Hinted(key_of(2), Hint(ended=True), 1.0))
    story.need(2 * HOST_BYTES, now_s=2.0)
    assert [bool(story.tiers(number)) for number in (1, 2)] == [True, False]


def test_a_hint_for_an_unknown_chain_pins_nothing() -> None:
    story = Story(HOST)
    story.tell(ev.Hinted(key_of(9), Hint(pinned_s=10, ended=True), 0.0))
    assert not story.machine.held(key_of(9))


def test_the_blocks_of_the_growing_chain_are_evicted_last() -> None:
    story = Story(HOST, DISK)
    story.commit(1, 2, 4, 3, 6)
    story.need(3 * HOST_BYTES, last_block=key_of(4), keys=[key_of(8)])
    assert [copy.key for copy in story.world.copies] == [key_of(6), key_of(3), key_of(4)], "though it was used longest ago"


def test_a_commit_does_not_wait_for_the_policy_but_later_events_do() -> None:
    story, said = watched_story(HOST)
    story.machine.handle(committed(story, 1, 2))
    assert said == [], "the blocks are visible, and nobody waited for more"
    assert story.tiers(2) == {HOST}
    story.machine.handle(ev.Used([key_of(1)], 1.0))
    assert [each[0] for each in said] == ["seen", "add", "seen", "use"]


def test_unreported_commits_are_reported_once_there_are_many_of_them() -> None:
    story, said = watched_story(HOST)
    for number in range(1, UNREPORTED_MAX):
        story.machine.handle(committed(story, number))
    assert not story.machine.has_many_unreported_commits
    story.machine.handle(committed(story, UNREPORTED_MAX))
    assert story.machine.has_many_unreported_commits
    story.machine.report_commits()
    assert [each[0] for each in said] == ["seen", "add"] * UNREPORTED_MAX
    assert not story.machine.has_many_unreported_commits
