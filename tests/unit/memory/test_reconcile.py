"""Repairing an index with damaged slots, so that it shows exactly the node's blocks."""

import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.blocks import Location, Tier
from tiered_kv.memory import words as w
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.shared import NodeFiles
from tiered_kv.memory.view import NodeView

BLOCKS = 24
words = st.sampled_from([0, 1, 2, 7, 1 << 63, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1)
damage = st.lists(st.tuples(st.integers(0, w.SLOTS_MIN - 1), st.integers(0, w.SLOT_WORDS - 1), words), max_size=40)
moves = st.lists(st.tuples(st.integers(0, w.SLOTS_MIN - 1), st.integers(0, w.SLOTS_MIN - 1)), max_size=3)


@given(homes=st.lists(st.sampled_from([0, 1, 5, 62, 63]), min_size=BLOCKS, max_size=BLOCKS), damaged=damage, copied=moves)
@settings(deadline=None)
def test_reconcile_repairs_any_content_of_the_slots(key, homes, damaged, copied) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = NodeFiles.create(folder, "c", "n", 1 << 17)
        index, view = IndexWriter(files), NodeView.open(files.directory)
        try:
            truth = {key(at, homes[at]): Location(Tier.HOST, 0, 0, at * 512, 512, 512) for at in range(BLOCKS)}
            for each, location in truth.items():
                index.put(each, location)
            for slot, word, value in damaged:
                index._words[slot * w.SLOT_WORDS + word] = value
            for source, target in copied:
                begin, end = source * w.SLOT_BYTES, target * w.SLOT_BYTES
                index._views.slot_bytes[end : end + w.SLOT_BYTES] = bytes(index._views.slot_bytes[begin : begin + w.SLOT_BYTES])
            view.lookup_leading(list(truth), 512)
            index.harvest()
            index.reconcile(truth)
            index.check()
            assert dict(index.items()) == truth
            assert [view.lookup(each).offset for each in truth] == [location.offset for location in truth.values()]
            assert index.reconcile(truth) == 0
        finally:
            view.close()
            index.close()
            files.close()
