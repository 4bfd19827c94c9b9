"""Manifests: they are read as written, invalid ones are refused, any damage is found, and old versions stay readable."""

import pickle
import struct
from dataclasses import asdict
from hashlib import blake2b

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.checkpoints import generate
from tests.unit.checkpoint.checkpoints import LAYOUT, MODELS, NOW_S, chained, flipped, manifest, pack, row
from tests.unit.tiers.records import ROOT, key_of
from tiered_kv.checkpoint.manifest import Manifest, Model, created_of, new_name
from tiered_kv.checkpoint.manifest_rows import HITS_MAX
from tiered_kv.checkpoint.repository import Repository
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import OpaqueLayout
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.store import MemoryStore

NAME = "any.tkv"
OPAQUE = OpaqueLayout(4096, 16, "pages of a test", 2)
PLAIN = asdict(OPAQUE)
U32 = st.integers(1, (1 << 32) - 1)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def small(store) -> Manifest:
    """Blocks 0 to 2 and 10 in two existing packs."""
    return manifest([pack(store, [0, 1, 2]), pack(store, [10])])


def refusal(store, name=NAME) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        Manifest.read(store, name)
    return caught.value


@st.composite
def manifests(draw) -> Manifest:
    sizes = draw(st.lists(st.integers(1 << 33, 1 << 40), min_size=1, max_size=3))
    packs = tuple((f"{number:064x}.pack", nbytes) for number, nbytes in enumerate(sizes))
    layouts = draw(st.lists(st.sampled_from([None, LAYOUT, OPAQUE]), min_size=1, max_size=3))
    fields = st.none() | st.dictionaries(st.text(), st.text() | st.integers(-5, 5), max_size=3)
    models = tuple(Model(key_of(1000 + number), layout, draw(st.text()), draw(fields)) for number, layout in enumerate(layouts))
    rows = []
    for number in range(draw(st.integers(0, 12))):
        parent = draw(st.none() | st.sampled_from(rows)) if rows else None
        root = parent.root if parent else draw(st.sampled_from(models)).root
        at, stored = draw(st.integers(0, len(packs) - 1)), draw(U32)
        offset = draw(st.integers(0, packs[at][1] - stored))
        depth, codec, tier = parent.depth + 1 if parent else 0, draw(st.integers(0, 65535)), draw(st.integers(1, 255))
        rows.append(row(number, at, offset)._replace(parent=parent and parent.key, root=root, depth=depth))
        rows[-1] = rows[-1]._replace(stored_bytes=stored, raw_bytes=draw(U32), codec=codec, tier=tier, hits=draw(U32))
    extra = draw(st.dictionaries(st.text(), st.lists(st.integers(0, 9)), max_size=3))
    return Manifest(packs, models, tuple(rows), draw(st.floats(0, 1e12)), draw(st.text()), extra)


@given(manifests())
@settings(max_examples=100, deadline=None)
def test_a_manifest_is_read_as_written(one):
    store = MemoryStore()
    one.write(store, NAME)
    assert Manifest.read(store, NAME) == one


def test_a_manifest_in_a_folder_is_read_as_written(small, tmp_path):
    small.write(FolderStore(tmp_path), NAME)
    assert Manifest.read(FolderStore(tmp_path), NAME) == small
    assert Manifest.read(FolderStore(tmp_path), NAME).rows[0].tier == small.rows[0].tier


def test_hits_are_limited_to_the_range_of_their_column(store, small):
    small._replace(rows=tuple(each._replace(hits=1 << 40) for each in small.rows)).write(store, NAME)
    assert {each.hits for each in Manifest.read(store, NAME).rows} == {HITS_MAX}


def with_row(small, at, **changes):
    rows = list(small.rows)
    rows[at] = rows[at]._replace(**changes)
    return small._replace(rows=tuple(rows))


IMPOSSIBLE = {
    "a parent that is missing": lambda it: it._replace(rows=it.rows[1:]),
    "a parent behind its child": lambda it: it._replace(rows=(it.rows[1], it.rows[0], *it.rows[2:])),
    "a parent of another model": lambda it: with_row(it, 1, root=bytes(32))._replace(models=(*it.models, Model(bytes(32)))),
    "an unknown root": lambda it: it._replace(models=()),
    "a wrong depth": lambda it: with_row(it, 2, depth=7),
    "a first block that is none": lambda it: with_row(it, 0, depth=1),
    "a block twice": lambda it: it._replace(rows=(*it.rows, it.rows[0])),
    "an unknown pack": lambda it: with_row(it, 0, pack=2),
    "bytes behind the pack's": lambda it: with_row(it, 0, offset=it.packs[0][1] - 299),
    "more bytes than the pack's": lambda it: with_row(it, 0, stored_bytes=1 << 31),
    "an offset beyond all": lambda it: with_row(it, 0, offset=(1 << 64) - 1),
    "a frame without bytes": lambda it: with_row(it, 0, stored_bytes=0),
    "a block without bytes": lambda it: with_row(it, 0, raw_bytes=0),
    "no tier": lambda it: with_row(it, 0, tier=0),
    "a number too large": lambda it: with_row(it, 0, codec=1 << 16),
    "a number below zero": lambda it: with_row(it, 0, hits=-1),
    "a short key": lambda it: with_row(it, 3, key=b"short"),
    "a pack in another folder": lambda it: it._replace(packs=((f"../{it.packs[0][0]}", it.packs[0][1]), it.packs[1])),
    "a pack that is none": lambda it: it._replace(packs=(("LATEST", it.packs[0][1]), it.packs[1])),
    "a pack twice": lambda it: it._replace(packs=(it.packs[1], it.packs[1])),
    "a pack without a size": lambda it: it._replace(packs=((it.packs[0][0], 1.5), it.packs[1])),
    "a root twice": lambda it: it._replace(models=it.models * 2),
    "a short root": lambda it: it._replace(models=(*it.models, Model(b"short"))),
    "a layout that is none": lambda it: it._replace(models=(it.models[0]._replace(layout=PLAIN),)),
    "a model without a text": lambda it: it._replace(models=(it.models[0]._replace(name=5),)),
    "a time that is none": lambda it: it._replace(created_s=float("nan")),
    "an origin that is none": lambda it: it._replace(origin=None),
    "an extra that is none": lambda it: it._replace(extra=[]),
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_invalid_manifests_are_not_written(change, store, small):
    before = dict(store.objects)
    with pytest.raises(ValueError):  # noqa: PT011
        change(small).write(store, NAME)
    assert store.objects == before


def forged(store, small, change, version=2) -> None:
    """Write a manifest whose body was changed and whose digest is right."""
    small.write(store, NAME)
    facts = msgpack.unpackb(store.objects[NAME][20:-32])
    changed = change(facts)
    body = changed if isinstance(changed, bytes) else msgpack.packb(facts)
    whole = b"TKVMANIF" + struct.pack("<IQ", version, len(body)) + body
    store.put(NAME, [whole, blake2b(whole, digest_size=32).digest()])


def u32s(*numbers) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def opaque(facts, plain) -> None:
    """Give the first model this opaque layout."""
    facts["models"][0][1] = None
    facts["opaque_layouts"] = {ROOT: plain}


FORGED = {
    "no msgpack": lambda facts: b"\xc1",
    "a list": lambda facts: msgpack.packb([1, 2]),
    "a number": lambda facts: msgpack.packb(5),
    "more behind it": lambda facts: msgpack.packb(facts) + b"\0",
    "no rows": lambda facts: facts.pop("rows"),
    "a million rows": lambda facts: facts.update(rows=1_000_000),
    "rows below zero": lambda facts: facts.update(rows=-1),
    "rows that are no number": lambda facts: facts.update(rows="4"),
    "no columns": lambda facts: facts.pop("columns"),
    "a column less": lambda facts: facts["columns"].pop("tier"),
    "a short column": lambda facts: facts["columns"].update(hits=b"123"),
    "a parent behind its child": lambda facts: facts["columns"].update(parent=u32s(2, 0, 1, 0xFFFFFFFF)),
    "its own parent": lambda facts: facts["columns"].update(parent=u32s(0, 0, 1, 0xFFFFFFFF)),
    "a parent beyond all": lambda facts: facts["columns"].update(parent=u32s(9, 0, 1, 0xFFFFFFFF)),
    "an unknown model": lambda facts: facts["columns"].update(root=b"\1\0" * 4),
    "an unknown pack": lambda facts: facts["columns"].update(pack=u32s(0, 0, 0, 2)),
    "a block twice": lambda facts: facts["columns"].update(keys=facts["columns"]["keys"][:32] * 4),
    "a layout that cannot be": lambda facts: facts["models"][0].__setitem__(1, [0, 1, 8, "bfloat16", 20]),
    "a layout that is none": lambda facts: facts["models"][0].__setitem__(1, [1]),
    "a layout of nothing": lambda facts: facts["models"][0].__setitem__(1, []),
    "an opaque layout of a model that has another": lambda facts: facts.update(opaque_layouts={ROOT: PLAIN}),
    "an opaque layout of an unknown model": lambda facts: facts.update(opaque_layouts={key_of(5): PLAIN}),
    "opaque layouts in a list": lambda facts: facts.update(opaque_layouts=[PLAIN]),
    "opaque layouts that are nothing": lambda facts: facts.update(opaque_layouts=None),
    "an opaque layout without its fields": lambda facts: opaque(facts, {}),
    "an opaque layout that is a list": lambda facts: opaque(facts, [4096, 16, "pages of a test", 2]),
    "an opaque layout with a field more": lambda facts: opaque(facts, PLAIN | {"layers": 2}),
    "an opaque layout with a field less": lambda facts: opaque(facts, {"block_bytes": 4096, "block_tokens": 16, "description": "d"}),
    "an opaque layout that is not opaque": lambda facts: opaque(facts, asdict(LAYOUT)),
    "an opaque layout that cannot be": lambda facts: opaque(facts, PLAIN | {"item_bytes": 3}),
    "an opaque layout of two lines": lambda facts: opaque(facts, PLAIN | {"description": "two\nlines"}),
    "a pack in another folder": lambda facts: facts["packs"][0].__setitem__(0, f"../{facts['packs'][0][0]}"),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_invalid_manifests_with_a_right_digest_are_not_read(change, store, small):
    forged(store, small, change)
    error = refusal(store)
    assert error.kind is Kind.CORRUPT
    assert NAME in str(error)
    assert "its content is invalid: " in str(error)


def test_an_opaque_layout_is_a_field_that_other_manifests_do_not_have(store, small):
    small.write(store, NAME)
    without = store.objects[NAME]
    assert b"opaque" not in without
    forged(store, small, lambda facts: opaque(facts, PLAIN))
    assert Manifest.read(store, NAME).models == (MODELS[0]._replace(layout=OPAQUE),)
    small._replace(models=Manifest.read(store, NAME).models).write(store, NAME)
    facts = msgpack.unpackb(store.objects[NAME][20:-32])
    assert facts["models"] == [[ROOT, None, "tiny", MODELS[0].namespace]], "a reader that does not know the field has an unknown layout"
    assert facts["opaque_layouts"] == {ROOT: PLAIN}


def test_unknown_fields_are_ignored(store, small):
    forged(store, small, lambda facts: facts.update(more=1) or facts["columns"].update(more=b""))
    assert Manifest.read(store, NAME) == small


def test_other_objects_are_refused_by_name(store, small):
    for content, words in [
        (pickle.dumps({"a": 1}), "a pickle, which is not opened"),
        (b"", "not a checkpoint of tiered_kv"),
        (b"TKVMANIF", "is cut off within its header"),
        (b"TKVMANIF" + bytes([2, 0, 0, 0]) + bytes(20), "is cut off within its header"),
    ]:
        store.put(NAME, [content])
        error = refusal(store)
        assert error.kind is Kind.CORRUPT
        assert words in str(error)
        assert error.context["object"] == NAME
    forged(store, small, lambda facts: None, version=3)
    assert "its version must be at most 2, got 3" in str(refusal(store))
    assert refusal(store, "gone").kind is Kind.STORAGE


def test_every_flipped_bit_and_every_truncation_is_found(store, small):
    small.write(store, NAME)
    whole = store.objects[NAME]
    for at in range(len(whole)):
        for bit in range(8):
            store.objects[NAME] = flipped(whole, at, bit)
            assert refusal(store).kind is Kind.CORRUPT
        store.objects[NAME] = whole[:at]
        assert refusal(store).kind is Kind.CORRUPT
    store.objects[NAME] = whole + b"\0"
    assert refusal(store).kind is Kind.CORRUPT


@given(st.floats(0, 2e11), st.floats(0, 2e11))
def test_generated_names_sort_by_time(one_s, other_s):
    one, other = new_name(one_s), new_name(other_s)
    assert abs(created_of(one) - one_s) < 1e-4
    if created_of(one) != created_of(other):
        assert (one < other) == (created_of(one) < created_of(other))
    assert new_name(one_s) != one


def test_chosen_names_have_no_time():
    assert new_name(NOW_S).startswith("ckpt-20260101T000000.000000Z-")
    for name in ("LATEST", "cache_state.pkl", "ckpt-20261328T000000.000000Z-00000001.tkv", new_name(NOW_S) + "x"):
        assert created_of(name) is None


class TestExamples:
    """The committed bytes, which every later version must read."""

    @pytest.fixture
    def examples(self) -> MemoryStore:
        store = MemoryStore()
        for path in generate.HERE.iterdir():
            if path.is_file() and path.suffix != ".py":
                store.put(path.name, [path.read_bytes()])
        return store

    def test_version_2_is_read(self, examples):
        assert Repository(examples).latest() == generate.VERSION_2
        assert Repository(examples).read() == generate.expected()

    def test_an_opaque_layout_is_read(self, examples):
        assert Manifest.read(examples, generate.WITH_OPAQUE_LAYOUT) == generate.expected_with_opaque_layout()
        assert generate.expected_with_opaque_layout().models[1].layout == generate.OPAQUE.layout

    def test_version_1_is_read_with_rows_from_its_packs(self, examples):
        assert Manifest.read(examples, generate.VERSION_1) == generate.expected_of_version_1()

    def test_all_verify_without_problems(self, examples):
        assert Repository(examples).verify() == []
        assert [each.blocks for each in Repository(examples).overview()] == [5, 2, 5]

    def test_the_bytes_of_the_format_do_not_change(self, examples):
        """A change of the format needs a new version number and new files."""
        written = MemoryStore()
        generate.write_all(written)
        assert written.objects == examples.objects


def test_version_1_is_refused_without_its_packs(store):
    generate.write_all(store)
    name = generate.expected().packs[1][0]
    whole = store.objects.pop(name)
    error = refusal(store, generate.VERSION_1)
    assert error.kind is Kind.CORRUPT
    assert generate.VERSION_1 in str(error)
    assert name in str(error)
    store.put(name, [flipped(whole, len(whole) - 1)])
    assert refusal(store, generate.VERSION_1).kind is Kind.CORRUPT


def test_version_1_leaves_out_blocks_without_their_parent(store, caplog):
    """The parent was evicted while its children were being written."""
    packs = [pack(store, [0, 2, 10])]
    name = packs[0].name
    body = msgpack.packb({"packs": [[name, packs[0].nbytes]], "models": [[ROOT, [2, 1, 8, "bfloat16", 20], ""]], "extra": {}})
    whole = b"TKVMANIF" + struct.pack("<II", 1, len(body)) + body
    store.put(NAME, [whole, blake2b(whole, digest_size=32).digest()])
    assert [each.key for each in Manifest.read(store, NAME).rows] == [key_of(0), key_of(10)]
    assert "1 of 3 blocks are left out, because it does not contain their parents" in caplog.text


def test_a_block_knows_its_parent():
    assert chained(11).info.parent == key_of(10)
    assert MODELS[0].root == ROOT
