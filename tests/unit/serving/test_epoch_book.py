"""The book of weight epochs, its table in shared memory, and its file."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.serving.prompts import LAYOUT, NAMESPACE
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory import words
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.shared import NodeFiles
from tiered_kv.memory.view import NodeView
from tiered_kv.node.admission.roots import ROOTS_MAX, RootBook, RootInfo
from tiered_kv.protocol.epochs import EPOCH_MAX, EVERY, FAMILIES_MAX, Epoch, EpochBook

FAMILIES = [bytes([number]) * 32 for number in range(1, 4)]
RAISES = st.lists(st.tuples(st.sampled_from([*FAMILIES, EVERY]), st.booleans(), st.integers(0, 50)), max_size=12)


def book_of(raises):
    book = EpochBook()
    for family, keep, now_ms in raises:
        before = {each: (book.number(each), book.floor(each)) for each in FAMILIES}
        (raised,) = book.raised([family], now_ms, keep=keep)
        assert raised.number >= now_ms
        for each in FAMILIES:
            number, floor = book.number(each), book.floor(each)
            concerned = family in (each, EVERY)
            assert number == raised.number if concerned else number == before[each][0]
            assert not concerned or number > before[each][0]
            assert floor == (number if concerned and not keep else before[each][1])
    return book


@given(RAISES)
def test_a_raise_is_above_all_former_numbers_and_concerns_its_family_only(raises):
    book_of(raises)


@given(st.lists(RAISES, min_size=3, max_size=3))
def test_books_merge_to_the_same_in_any_order(three):
    books = [book_of(raises) for raises in three]
    merged = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        book = EpochBook()
        for number in order:
            book.adopt(books[number].everything())
        merged.append([(book.number(family), book.floor(family)) for family in FAMILIES])
        assert not book.adopt(book.everything())
    assert merged[0] == merged[1] == merged[2]
    assert merged[0] == [tuple(max(getattr(book, what)(family) for book in books) for what in ("number", "floor")) for family in FAMILIES]


def test_a_book_is_bounded_and_no_family_ever_goes_back():
    book = EpochBook()
    families = [number.to_bytes(32) for number in range(1, 3 * FAMILIES_MAX)]
    numbers = {}
    for at, family in enumerate(families):
        (raised,) = book.raised([family], 1000 + at, keep=False)
        numbers[family] = raised.number
        assert len(book.everything()) <= FAMILIES_MAX + 1 <= words.EPOCHS_MAX
    assert all(book.number(family) >= number for family, number in numbers.items())
    assert all(book.floor(family) >= number for family, number in numbers.items())
    assert book.number(families[-1]) == numbers[families[-1]]


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        [b"x" * 31, 1, 0],
        [b"x" * 32, 1, 2],
        [b"x" * 32, EPOCH_MAX + 1, 0],
        [b"x" * 32, True, 0],
        [b"x" * 32, 1, -1],
        ["x" * 32, 1, 0],
    ],
)
def test_invalid_epochs_are_rejected(message):
    with pytest.raises(TieredKVError, match="expected a") as caught:
        Epoch.of_message(message)
    assert caught.value.kind is Kind.TRANSPORT


def test_a_root_is_that_of_earlier_versions_until_its_epoch_is_raised():
    assert NAMESPACE.digest.hex() == NAMESPACE.plain().digest.hex()
    assert "weight_epoch" not in NAMESPACE.as_fields()
    raised = type(NAMESPACE)(**NAMESPACE.as_fields(), weight_epoch=5)
    assert raised.root(LAYOUT) != NAMESPACE.root(LAYOUT)
    assert raised.family == NAMESPACE.family
    assert raised.plain() == NAMESPACE


@pytest.fixture
def files(tmp_path):
    files = NodeFiles.create(tmp_path, "cluster", "node", 1 << 20)
    yield files
    files.remove()


def test_readers_never_see_a_mixture_of_two_tables(files):
    writer, view = IndexWriter(files), NodeView.open(files.directory)
    stop = threading.Event()

    def change():
        number = 0
        while not stop.is_set():
            number += 1
            writer.set_epochs([(family, number) for family in FAMILIES[: 1 + number % 3]])

    thread = threading.Thread(target=change)
    thread.start()
    seen, marks = set(), []
    try:
        while len(seen) < 200:
            found = view.weight_epoch(FAMILIES[0])
            if found is not None:
                seen.add(found[1])
                marks.append(found)
    finally:
        stop.set()
        thread.join()
    assert all(mark[1] % 2 == 0 for mark, _ in marks)
    assert all(number == mark[1] // 2 for mark, number in marks), "the number is the one that was written at that mark"
    writer.set_epochs([(EVERY, 1000), (FAMILIES[1], 7)])
    assert [view.weight_epoch(family)[1] for family in FAMILIES] == [1000] * 3
    header = files.index.map
    with memoryview(header) as whole, whole.cast("Q") as each:
        each[words.EPOCHS] |= 1
    assert view.weight_epoch(FAMILIES[0]) is None, "a writer that died while it wrote"
    writer.set_epochs([])
    assert view.weight_epoch(FAMILIES[0])[1] == 0
    view.close()
    writer.close()


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"\x93\x01\x02", b"\x82\xa6epochs\x91\x01\xa5roots\x90"])
def test_a_damaged_file_is_read_as_far_as_it_is_valid(tmp_path, damage):
    book = RootBook([tmp_path])
    root = NAMESPACE.root(LAYOUT)
    book.learn(root, RootInfo.of(NAMESPACE))
    book.epochs.raised([NAMESPACE.family], 7, keep=False)
    book.save()
    again = RootBook([tmp_path])
    assert again.ended() == [root]
    assert again.everything() == book.everything()
    (tmp_path / "roots").write_bytes(damage)
    assert RootBook([tmp_path]).everything() == {}
    assert (tmp_path / "roots").stat().st_mode & 0o777 == 0o600


def test_a_book_of_roots_is_bounded(tmp_path):
    book = RootBook([tmp_path])
    for number in range(ROOTS_MAX + 3):
        book.learn(number.to_bytes(32), RootInfo(bytes(32), 0, "t", "w"))
    assert len(book.everything()) == ROOTS_MAX
