"""The fast look-up of a chain returns the same as `lookup` for each of its keys."""

import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.blocks import Location, Tier
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.shared import NodeFiles
from tiered_kv.memory.view import NodeView

RAW_BYTES = 512
homes = st.lists(st.sampled_from([0, 1, 5, 62, 63]), min_size=24, max_size=24)


def plain(view: NodeView, keys: list[bytes], raw_bytes: int) -> list:
    found = []
    for key in keys:
        slot = view.lookup(key)
        if slot is None or slot.raw_bytes != raw_bytes:
            break
        found.append(slot)
    return found


@given(
    homes=homes,
    stored=st.lists(st.integers(0, 23), unique=True),
    removed=st.lists(st.integers(0, 23)),
    odd_sized=st.integers(0, 60),
    asked=st.lists(st.integers(0, 23), max_size=24),
    torn=st.none() | st.integers(0, 23),
)
@settings(deadline=None)
def test_lookup_leading_equals_lookup_for_each_key(key, homes, stored, removed, odd_sized, asked, torn):
    with tempfile.TemporaryDirectory() as folder:
        files = NodeFiles.create(folder, "c", "n", 1 << 17)
        index, view = IndexWriter(files), NodeView.open(files.directory)
        try:
            for number in stored:
                raw_bytes = RAW_BYTES if number != odd_sized else RAW_BYTES // 2
                index.put(key(number, homes[number]), Location(Tier.HOST, 0, 0, number * 512, raw_bytes, raw_bytes))
            for number in removed:
                index.remove(key(number, homes[number]))
            if torn is not None and (slot := view.lookup(key(torn, homes[torn]))):
                view._words[slot.index * 8] |= 1  # as a writer leaves it while it changes the slot
            keys = [key(number, homes[number]) for number in asked]
            before = view.lookups
            expected = plain(view, keys, RAW_BYTES)
            counted = view.lookups - before
            assert view.lookup_leading(keys, RAW_BYTES) == expected
            assert view.lookups - before == 2 * counted
            if torn is not None and slot:
                view._words[slot.index * 8] &= ~1
        finally:
            view.close()
            index.close()
            files.close()
