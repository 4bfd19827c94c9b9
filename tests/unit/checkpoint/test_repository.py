"""A repository: the latest checkpoint, known blocks, and reusable packs, also with wrong listings and a wrong LATEST."""

import pytest

from tests.unit.checkpoint.checkpoints import FRAME_BYTES, NOW_S, checkpoint, flipped, manifest, pack
from tests.unit.checkpoint.checkpoints import repository as opened
from tests.unit.tiers.records import ROOT, key_of
from tiered_kv.checkpoint.manifest import Manifest, created_of
from tiered_kv.checkpoint.repository import LATEST, KnownPacks, PackEntry, Repository, reusable
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.footer import footer_bytes
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.store import MemoryStore


class Lagging(MemoryStore):
    """A store whose listings lack the objects in `hidden`, and still show the deleted ones in `ghosts`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: set[str] = set()
        self.ghosts: dict[str, int] = {}

    def sizes(self) -> dict[str, int]:
        listed = super().sizes() | self.ghosts
        return {name: listed[name] for name in sorted(listed) if name not in self.hidden}


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else FolderStore(tmp_path)


@pytest.fixture
def repository(store) -> Repository:
    return opened(store)


def later(repository: Repository, seconds: float = 1.0) -> Repository:
    repository.now_s.sleep(seconds)
    return repository


def refusal(call, *arguments) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    return caught.value


def blocks(*numbers) -> list:
    return [(key_of(number), ROOT) for number in numbers]


class TestLatest:
    def test_an_empty_store_has_no_checkpoint(self, repository):
        error = refusal(repository.latest)
        assert error.kind is Kind.STORAGE
        assert "there is no checkpoint in" in str(error)
        assert refusal(repository.read).kind is Kind.STORAGE
        assert repository.names() == []
        assert repository.overview() == []
        assert repository.verify() == []

    def test_the_newest_of_all_is_the_latest(self, repository):
        first = checkpoint(repository, [0, 1])
        second = checkpoint(later(repository), [0, 1, 2])
        assert repository.names() == [first, second]
        assert repository.latest() == second
        assert len(repository.read().rows) == 3
        assert len(repository.read(first).rows) == 2
        assert created_of(second) == NOW_S + 1

    def test_a_checkpoint_with_a_chosen_name_is_the_latest_if_latest_names_it(self, repository):
        first = checkpoint(repository, [0])
        checkpoint(later(repository), [0, 1], "mine.pkl")
        assert repository.names() == ["mine.pkl", first]
        assert repository.latest() == "mine.pkl"
        third = checkpoint(later(repository), [0])
        assert repository.latest() == third
        repository.point("mine.pkl")
        assert repository.latest() == third

    def test_without_latest_the_listing_is_used(self, repository):
        checkpoint(repository, [0])
        second = checkpoint(later(repository), [1 - 1, 1])
        repository.store.delete([LATEST])
        assert repository.latest() == second

    def test_an_outdated_latest_is_ignored(self, repository):
        first = checkpoint(repository, [0])
        second = checkpoint(later(repository), [0, 1])
        repository.point(first)
        assert repository.latest() == second

    def test_every_flip_in_latest_is_found_and_the_listing_is_used(self, caplog):
        repository = opened()
        name = checkpoint(repository, [0])
        whole = repository.store.objects[LATEST]
        for at in range(len(whole)):
            for bit in range(8):
                repository.store.objects[LATEST] = flipped(whole, at, bit)
                assert refusal(repository.pointed).kind is Kind.CORRUPT
        assert repository.latest() == name
        assert "LATEST in memory:// is damaged" in caplog.text
        assert [each.object for each in repository.verify()] == [LATEST]
        for content in (b"", whole[:-1], whole + b"\n", b"TKVLATEST 2" + whole[11:], b"\xff" * 90):
            repository.store.objects[LATEST] = content
            assert repository.latest() == name

    def test_a_deleted_checkpoint_is_skipped_for_the_next_older_one(self, repository, caplog):
        first = checkpoint(repository, [0])
        second = checkpoint(later(repository), [0, 1])
        repository.store.delete([second])
        assert repository.latest() == first
        assert f"checkpoint {second} was deleted" in caplog.text
        assert [each.object for each in repository.verify()] == [LATEST]

    def test_listings_may_lack_new_objects_and_show_deleted_ones(self):
        repository = opened(Lagging())
        first = checkpoint(repository, [0])
        second = checkpoint(later(repository), [0, 1])
        repository.store.hidden = {second}
        assert repository.names() == [first]
        assert repository.latest() == second
        repository.store.hidden = set()
        repository.store.ghosts = {"ckpt-20270101T000000.000000Z-00000009.tkv": 10}
        assert repository.latest() == second
        assert [each.name for each in repository.overview()] == [first, second]

    def test_a_name_of_another_kind_of_object_is_refused(self, repository):
        for name in (
            "",
            LATEST,
            "a/b",
            ".hidden",
            "x.part",
            "lease-checkpoint-0123456789abcdef-5",
            "gc-0123456789abcdef-5",
            "x\ny",
            "0" * 64 + ".pack",
        ):
            assert refusal(repository.publish, manifest([]), name).kind is Kind.CONFIG
        assert repository.store.sizes() == {}

    def test_unknown_objects_are_not_changed(self, repository):
        name = checkpoint(repository, [0])
        for other in ("README", ".hidden", "0000000007-" + "0" * 64 + ".pack"):
            repository.store.put(other, [b"something else"])
        assert repository.names() == ["README", name]
        assert [each.name for each in repository.overview()] == [name]
        assert repository.verify() == []
        assert repository.collect(keep=1).skipped == ""
        assert len(repository.store.sizes()) == 3 + 3
        assert [each.object for each in repository.verify(["README"])] == ["README"]


class TestKnown:
    def test_blocks_of_all_checkpoints_and_of_a_crash_are_known(self, repository):
        checkpoint(repository, [0, 1])
        lost = pack(repository.store, [10, 11])
        known = repository.known()
        assert set(known.entries) == set(blocks(0, 1, 10, 11))
        assert known.entries[blocks(11)[0]] == PackEntry(
            lost.name, FRAME_BYTES, FRAME_BYTES, lost.entries[1].raw_bytes, lost.entries[1].codec
        )
        assert known.packs == {name: size for name, size in repository.store.sizes().items() if name.endswith(".pack")}

    def test_only_packs_listed_in_full_size_are_known(self):
        repository = opened(Lagging())
        checkpoint(repository, [0, 1])
        (name,) = repository.known().packs
        for content in (None, repository.store.objects[name][:-1]):
            repository.store.delete([name])
            if content:
                repository.store.objects[name] = content
            assert repository.known().entries == {}
        repository.store.ghosts = {"f" * 64 + ".pack": 1000}
        assert repository.known().entries == {}

    def test_damaged_objects_are_logged_and_left_out(self, caplog):
        repository = opened()
        name = checkpoint(repository, [0, 1])
        objects = repository.store.objects
        (lost,) = repository.known().packs
        objects[name] = flipped(objects[name], 50)
        assert set(repository.known().entries) == set(blocks(0, 1)), "from the footer of a pack that no manifest names now"
        assert f"left out: checkpoint {name}: it is damaged" in caplog.text
        objects[lost] = flipped(objects[lost], len(objects[lost]) - 1)
        assert repository.known().entries == {}
        assert f"left out: pack {lost}" in caplog.text

    def test_of_two_places_the_newest_is_used(self, repository):
        checkpoint(repository, list(range(9)))
        checkpoint(later(repository), [0])
        places = repository.known().entries
        assert places[blocks(0)[0]].pack != places[blocks(1)[0]].pack

    def test_a_second_checkpoint_writes_only_new_blocks(self, repository):
        checkpoint(repository, list(range(5)))
        before = set(repository.store.sizes())
        checkpoint(later(repository), [*range(5), 10])
        (new,) = [name for name in set(repository.store.sizes()) - before if name.endswith(".pack")]
        assert repository.store.sizes()[new] == FRAME_BYTES + footer_bytes(1)
        assert repository.verify() == []


class TestReusable:
    def known(self, *wanted_of, bytes_each=1000) -> KnownPacks:
        """Returns packs with the given numbers of blocks."""
        places, packs = {}, {}
        for pack_number, count in enumerate(wanted_of):
            packs[f"p{pack_number}"] = count * bytes_each + footer_bytes(count)
            for number in range(count):
                places[(b"%d" % pack_number, b"%d" % number)] = PackEntry(f"p{pack_number}", number * bytes_each, bytes_each, bytes_each, 0)
        return KnownPacks(places, packs)

    @pytest.mark.parametrize("bytes_each", [145, 1000, 1 << 20])
    def test_a_pack_is_reused_if_half_of_it_is_wanted(self, bytes_each):
        known = self.known(10, 10, bytes_each=bytes_each)
        wanted = [(b"0", b"%d" % number) for number in range(5)] + [(b"1", b"%d" % number) for number in range(4)]
        kept = reusable(known, wanted)
        assert set(kept) == set(wanted[:5])
        assert all(kept[block] == known.entries[block] for block in kept)

    def test_a_pack_of_one_small_frame_is_reused(self):
        known = self.known(1, bytes_each=145)
        assert reusable(known, known.entries) == known.entries

    def test_unknown_blocks_have_no_place(self):
        assert reusable(self.known(2), [(b"7", b"7")]) == {}
        assert reusable(KnownPacks({}, {}), []) == {}

    def test_a_block_that_is_wanted_twice_is_counted_once(self):
        assert reusable(self.known(10), [(b"0", b"0")] * 9) == {}


class TestConfirm:
    def test_existing_packs_are_confirmed(self, repository):
        checkpoint(repository, [0, 1])
        assert repository.confirm(repository.known().packs.items()) is None
        assert repository.confirm([]) is None

    def test_the_first_missing_pack_is_named(self):
        repository = opened(Lagging())
        infos = [pack(repository.store, [number]) for number in range(3)]
        packs = [(info.name, info.nbytes) for info in infos]
        objects = repository.store.objects
        whole = objects[infos[1].name]
        for content in (None, whole[:-1], whole[:-64], b"", bytes(len(whole)), whole[1:] + b"\0"):
            objects.pop(infos[1].name, None)
            if content is not None:
                objects[infos[1].name] = content
            error = refusal(repository.confirm, packs)
            assert error.kind is Kind.STORAGE
            assert infos[1].name in str(error)
        assert refusal(repository.confirm, [(infos[0].name, 10)]).kind is Kind.STORAGE


class TestOverview:
    def test_sizes_and_shared_bytes(self, repository):
        first = checkpoint(repository, [0, 1])
        second = checkpoint(later(repository), [0, 1, 2])
        one, other = repository.overview()
        two_blocks, one_block = (count * FRAME_BYTES + footer_bytes(count) for count in (2, 1))
        assert (one.name, one.blocks, one.bytes, one.pack_bytes, one.shared_bytes) == (first, 2, 600, two_blocks, two_blocks)
        assert (other.name, other.blocks, other.bytes, other.pack_bytes) == (second, 3, 900, two_blocks + one_block)
        assert (other.shared_bytes, other.created_s, other.error) == (two_blocks, NOW_S + 1, None)
        assert other.models == repository.read().models

    def test_damaged_checkpoints_are_listed_with_the_error(self):
        repository = opened()
        name = checkpoint(repository, [0, 1])
        whole = repository.store.objects[name]
        repository.store.objects["mine"] = flipped(whole, 0)
        repository.store.objects[name] = flipped(whole, 99)
        mine, other = repository.overview()
        assert (mine.name, mine.created_s, mine.blocks) == ("mine", 0.0, 0)
        assert "not a checkpoint of tiered_kv" in mine.error
        assert (other.name, other.created_s) == (name, NOW_S)
        assert "damaged" in other.error


def test_an_invalid_manifest_is_not_published(repository):
    info = pack(repository.store, [0])
    with pytest.raises(ValueError, match="pack: must be below the number of packs, 0"):
        repository.publish(Manifest((), manifest([info]).models, manifest([info]).rows, NOW_S, "", {}))
    assert list(repository.store.sizes()) == [info.name]
