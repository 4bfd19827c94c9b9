"""Verifying: any flipped byte in any object is found, and only the damaged object is named."""

import random
from itertools import pairwise

import pytest

from tests.unit.checkpoint.checkpoints import FRAME_BYTES, checkpoint, flipped, pack
from tests.unit.checkpoint.checkpoints import repository as opened
from tests.unit.tiers.records import key_of
from tiered_kv.checkpoint import verify as verifying
from tiered_kv.checkpoint.repository import LATEST, Repository
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.store import MemoryStore


def filled(store=None) -> Repository:
    """Three checkpoints that share packs, and a pack that none of them uses."""
    repository = opened(store)
    checkpoint(repository, [0, 1])
    repository.now_s.sleep(1)
    checkpoint(repository, [0, 1, 2])
    checkpoint(repository, [0, 10, 11, 12], "mine.pkl")
    pack(repository.store, [20])
    return repository


def objects_named(problems) -> set[str]:
    return {each.object for each in problems}


@pytest.mark.parametrize("part", range(5))
def test_any_flip_in_any_object_is_found_and_named(part):
    """2,500 flips, distributed over the objects by their sizes."""
    repository, chosen = filled(), random.Random(part)
    objects = repository.store.objects
    assert repository.verify() == []
    names, sizes = list(objects), [len(content) for content in objects.values()]
    for name in chosen.choices(names, sizes, k=500):
        whole = objects[name]
        at, bit = chosen.randrange(len(whole)), chosen.randrange(8)
        objects[name] = flipped(whole, at, bit)
        problems = repository.verify()
        assert objects_named(problems) == {name}, f"byte {at} of {name}, bit {bit}: {problems}"
        objects[name] = whole
    assert repository.verify() == []


def test_flips_in_a_folder_are_found(tmp_path):
    repository = filled(FolderStore(tmp_path))
    assert repository.verify() == []
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        path.write_bytes(flipped(whole, len(whole) // 2))
        assert objects_named(repository.verify()) == {path.name}
        path.write_bytes(whole[:-1])
        assert path.name in objects_named(repository.verify())
        path.write_bytes(whole)
    assert repository.verify() == []


def test_a_damaged_frame_is_reported_with_its_offset_and_the_others_are_read():
    repository = filled()
    info = pack(MemoryStore(), [10, 11, 12])
    objects = repository.store.objects
    objects[info.name] = flipped(flipped(objects[info.name], 5), 2 * FRAME_BYTES + 250)
    problems = repository.verify()
    assert [each.object for each in problems] == [info.name] * 2
    assert [each.message.partition(":")[0] for each in problems] == ["at byte 0", f"at byte {2 * FRAME_BYTES}"]


class Strict(MemoryStore):
    """A store in which an empty range, or one after the end, is an error, as with real servers."""

    def get_range(self, name, offset, nbytes):
        if not nbytes or offset >= len(self.get(name)):
            raise self.failed(f"get {name} at byte {offset}", "InvalidRange")
        return super().get_range(name, offset, nbytes)


def test_every_cut_is_found():
    repository = filled(Strict())
    objects = repository.store.objects
    for name, whole in list(objects.items()):
        for nbytes in {0, 1, *range(0, len(whole), 41), len(whole) - 1}:
            objects[name] = whole[:nbytes]
            if name == "mine.pkl" and nbytes < 4:
                assert repository.verify() == [], "too few bytes are left to recognize a checkpoint"
                continue
            assert objects_named(repository.verify()) == {name}
            repository.known()
            repository.overview()
            assert repository.latest() in repository.names()
        objects[name] = whole
    assert repository.verify() == []


def test_missing_objects_are_reported():
    repository = filled()
    info = pack(MemoryStore(), [10, 11, 12])
    whole = repository.store.objects.pop(info.name)
    assert objects_named(repository.verify()) == {info.name}
    repository.store.objects[info.name] = whole + b"\0"
    assert objects_named(repository.verify()) == {info.name}
    repository.store.objects[info.name] = whole
    repository.point("gone.tkv")
    assert objects_named(repository.verify()) == {LATEST}


def test_frames_of_a_pack_without_footer_are_found_with_the_manifest():
    repository = filled()
    info = pack(MemoryStore(), [10, 11, 12])
    objects = repository.store.objects
    objects[info.name] = flipped(flipped(objects[info.name], info.nbytes - 1), 310)
    problems = repository.verify()
    assert any(f"at byte {FRAME_BYTES}" in each.message for each in problems)
    assert len(problems) == 2


def test_a_manifest_that_differs_from_its_pack_is_reported():
    repository = opened()
    name = checkpoint(repository, [0, 1])
    found = repository.read()
    found._replace(rows=(found.rows[0]._replace(offset=1), found.rows[1])).write(repository.store, name)
    assert [each.object for each in repository.verify()] == [name]
    assert key_of(0).hex() in repository.verify()[0].message


def test_only_the_named_checkpoints_are_read():
    repository = filled()
    first, second = repository.names()[1:]
    own = pack(MemoryStore(), [2]).name
    repository.store.objects[own] = flipped(repository.store.objects[own], 9)
    repository.store.objects[LATEST] = b"?"
    assert repository.verify([first]) == []
    assert objects_named(repository.verify([second])) == {own}
    assert objects_named(repository.verify()) == {own, LATEST}
    assert objects_named(repository.verify(["gone.tkv"])) == {"gone.tkv"}


def test_large_packs_are_read_in_ranges_with_progress(monkeypatch):
    monkeypatch.setattr(verifying, "RANGE_BYTES", 2 * FRAME_BYTES)
    repository, reported = filled(), []
    assert repository.verify(progress=lambda done, total: reported.append((done, total))) == []
    frames = len(repository.known().entries)
    assert frames == 7
    assert reported[0] == (0, frames * FRAME_BYTES)
    assert reported[-1] == (frames * FRAME_BYTES,) * 2
    assert max(b - a for (a, _), (b, _) in pairwise(reported)) == 2 * FRAME_BYTES
    monkeypatch.setattr(verifying, "RANGE_BYTES", 10)
    assert repository.verify() == []


@pytest.mark.parametrize("operation", ["sizes", "get", "get_range"])
def test_an_unreachable_store_is_an_error(operation, monkeypatch):
    repository = filled()

    def fails(*_):
        raise repository.store.failed(operation, "no answer")

    monkeypatch.setattr(repository.store, operation, fails)
    with pytest.raises(TieredKVError) as caught:
        repository.verify()
    assert caught.value.kind is Kind.STORAGE
