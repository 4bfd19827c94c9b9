"""Packs: frames are read as written, all damage is detected, equal content has an equal name, and old versions stay readable."""

from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sources import ROOT as PROJECT
from tests.unit.tiers.records import ROOT, content_of, key_of, record_of
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.footer import footer_bytes
from tiered_kv.tiers.objects import packs
from tiered_kv.tiers.objects.packs import PackInfo, PackWriter, grown_bytes, pack_prefix, read_footer, read_frame
from tiered_kv.tiers.objects.store import MemoryStore

DATA = PROJECT / "tests" / "data" / "packs"
SIZES = [300, 4096, 301]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def written(store, sizes=SIZES, prefix="", first=0) -> PackInfo:
    writer = PackWriter(store, prefix)
    for number, nbytes in enumerate(sizes, first):
        writer.add(record_of(number, nbytes))
    return writer.finish()


def error_of(call, *arguments) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    return caught.value


def assert_has_blocks(store, info: PackInfo, numbers) -> None:
    for number, entry in zip(numbers, info.entries, strict=True):
        assert entry.key == key_of(number)
        frame = read_frame(store, info.name, entry.offset, entry.stored_bytes, key_of(number), ROOT)
        assert bytes(frame.payload) == content_of(number, frame.raw_bytes).numpy().tobytes()


def test_a_pack_describes_its_own_content(store):
    info = written(store)
    assert store.sizes() == {info.name: info.nbytes}
    assert info.nbytes == sum(SIZES) + footer_bytes(len(SIZES))
    assert read_footer(store, info.name, info.nbytes) == info
    assert [(entry.parent, entry.root) for entry in info.entries] == [(None, ROOT), (key_of(0), ROOT), (key_of(1), ROOT)]
    assert_has_blocks(store, info, range(3))


def test_the_writer_knows_the_packs_size_before_writing(store):
    writer = PackWriter(store)
    for number, nbytes in enumerate(SIZES):
        before = writer.nbytes
        writer.add(record_of(number, nbytes))
        assert writer.nbytes == before + grown_bytes(nbytes)
    sealed = writer.seal()
    assert store.sizes() == {}
    assert writer.finish() == sealed
    assert store.sizes() == {sealed.name: sealed.nbytes}


def test_a_name_is_the_prefix_and_the_digest_of_the_footer(store):
    info = written(store, prefix="0000000007-")
    footer = store.objects[info.name][-footer_bytes(len(SIZES)) :]
    assert info.name == f"0000000007-{blake2b(footer, digest_size=32).hexdigest()}.pack"
    assert pack_prefix(info.name) == "0000000007-"
    assert pack_prefix("LATEST") is None


def test_names_are_equal_exactly_for_equal_content(store):
    assert written(store).name == written(store).name
    names = {written(store).name, written(store, first=1).name, written(store, SIZES[::-1]).name, written(store, SIZES[:2]).name}
    assert len(names) == 4


def test_the_same_key_with_other_bytes_has_another_name(store):
    """Another codec may store a block under the same key in the same number of bytes."""
    other = record_of(0, 300)._replace(buffers=record_of(1, 300).buffers)
    writers = PackWriter(store), PackWriter(store)
    for writer, record in zip(writers, (record_of(0, 300), other), strict=True):
        writer.add(record)
    one, two = (writer.finish() for writer in writers)
    assert one.entries == two.entries
    assert one.name != two.name


def test_a_footer_larger_than_the_first_read_is_read_whole(store, monkeypatch):
    monkeypatch.setattr(packs, "_TAIL_BYTES", 200)
    info = written(store, [200] * 9)
    assert read_footer(store, info.name, info.nbytes) == info


def test_an_empty_pack_and_an_empty_frame_are_no_packs(store):
    with pytest.raises(ValueError, match="without frames"):
        PackWriter(store).finish()
    with pytest.raises(ValueError, match="a frame of 0 bytes"):
        PackWriter(store).add(record_of(0, 300)._replace(buffers=()))
    assert store.sizes() == {}


@given(st.lists(st.integers(160, 2000), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_any_frames_are_read_as_written(sizes):
    store = MemoryStore()
    info = written(store, sizes)
    assert read_footer(store, info.name, info.nbytes) == info
    assert_has_blocks(store, info, range(len(sizes)))


def test_every_flipped_byte_is_detected(store):
    """A flip in the footer rejects the pack. A flip in a frame rejects that frame only."""
    info = written(store, [200, 200])
    whole = store.objects[info.name]
    for at in range(len(whole)):
        store.objects[info.name] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        broken = at // 200
        if broken > 1:
            assert error_of(read_footer, store, info.name, info.nbytes).kind is Kind.CORRUPT
            continue
        assert read_footer(store, info.name, info.nbytes) == info
        for number, entry in enumerate(info.entries):
            reading = store, info.name, entry.offset, entry.stored_bytes, entry.key, ROOT
            if number == broken:
                assert error_of(read_frame, *reading).kind is Kind.CORRUPT
            else:
                assert read_frame(*reading).key == entry.key


def test_every_truncation_is_detected(store):
    info = written(store, [200, 200])
    whole = store.objects[info.name]
    for nbytes in range(len(whole)):
        store.objects[info.name] = whole[:nbytes]
        assert error_of(read_footer, store, info.name, nbytes).kind is Kind.CORRUPT
        assert error_of(read_footer, store, info.name, info.nbytes).kind is Kind.CORRUPT


def test_a_footer_with_gaps_is_rejected(store):
    writer = PackWriter(store)
    for number in (0, 1):
        writer.add(record_of(number, 300))
    writer._entries[1] = writer._entries[1]._replace(offset=301)
    info = writer.finish()
    assert error_of(read_footer, store, info.name, info.nbytes).kind is Kind.CORRUPT


def test_a_pack_under_the_name_of_another_is_rejected(store):
    one, two = written(store, SIZES), written(store, SIZES, first=5)
    store.put(one.name, [store.get(two.name)])
    assert error_of(read_footer, store, one.name, one.nbytes).kind is Kind.CORRUPT
    store.put("any.pack", [store.get(two.name)])
    assert error_of(read_footer, store, "any.pack", two.nbytes).kind is Kind.CORRUPT


def test_a_frame_is_returned_only_for_its_key_and_namespace(store):
    info = written(store)
    at = info.entries[0].offset, info.entries[0].stored_bytes
    assert error_of(read_frame, store, info.name, *at, key_of(1), ROOT).kind is Kind.CORRUPT
    assert error_of(read_frame, store, info.name, *at, key_of(0), bytes(32)).kind is Kind.CORRUPT
    assert error_of(read_frame, store, "gone.pack", *at, key_of(0), ROOT).kind is Kind.STORAGE


@pytest.mark.parametrize("path", sorted(DATA.glob("*.pack")), ids=lambda path: path.name[:10])
def test_packs_of_every_version_are_read(store, path: Path):
    store.put(path.name, [path.read_bytes()])
    info = read_footer(store, path.name, path.stat().st_size)
    assert [entry.stored_bytes for entry in info.entries] == SIZES
    assert_has_blocks(store, info, range(3))


def test_version_1_is_written_with_the_same_bytes_as_ever(store):
    """This code writes exactly the committed bytes. A change of the format needs a new version and a new file."""
    assert (DATA / written(store).name).read_bytes() == bytes(store.get(written(store).name))
