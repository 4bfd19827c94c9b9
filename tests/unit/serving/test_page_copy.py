"""Copies between an engine's pages and memory: the system call, its fallback and torch's way give the same bytes."""

import itertools
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.client import page_copy
from tiered_kv.client.page_copy import DevicePages, HostPages, Pages, copy_pieces, pages_of
from tiered_kv.errors import Kind, TieredKVError


def arrays(sizes: list[int], count: int, seed: int = 0) -> list[torch.Tensor]:
    """Arrays of pages with a gap after each page, so that the distance of two pages is not their size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (count, size + 16), dtype=torch.uint8, generator=generator)[:, :size] for size in sizes]


def way(name: str, held: list[torch.Tensor]) -> Pages:
    return DevicePages(held) if name == "torch" else HostPages(held)


def use(patch: pytest.MonkeyPatch, name: str) -> None:
    """Have all pieces copied in one call, one by one because the call is refused, or as it is usual."""
    patch.setattr(page_copy, "_is_refused", name == "one by one")
    if name == "call":
        patch.setattr(page_copy, "_copied_alone", lambda *_: 0)


@pytest.fixture(params=["usual", "call", "one by one", "torch"])
def name(request, monkeypatch) -> str:
    use(monkeypatch, request.param)
    return request.param


def test_a_block_is_its_pages_one_after_the_other(name):
    held = arrays([64, 32, 128], 5)
    memory = torch.zeros(1000, dtype=torch.uint8)
    way(name, held).gather(memory, [300, 10], [4, 0])
    assert torch.equal(memory[300:524], torch.cat([array[4] for array in held]))
    assert torch.equal(memory[10:234], torch.cat([array[0] for array in held]))
    assert not memory[:10].any()
    assert not memory[234:300].any()
    assert not memory[524:].any()


def test_scatter_is_the_inverse_and_leaves_other_pages_alone(name):
    held, copy = arrays([64, 32, 128], 5), arrays([64, 32, 128], 5)
    memory = torch.zeros(1000, dtype=torch.uint8)
    pages = way(name, held)
    pages.gather(memory, [0, 224, 448], [1, 3, 2])
    for array in held:
        array[[1, 2, 3]] = 0
    pages.scatter(memory, [0, 224, 448], [1, 3, 2])
    assert all(torch.equal(array, before) for array, before in zip(held, copy, strict=True))


def test_nothing_to_copy_is_fine(name):
    way(name, arrays([64], 2)).gather(torch.zeros(64, dtype=torch.uint8), [], [])


@given(st.data())
def test_the_three_ways_give_equal_bytes(data):
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=40))
    count = data.draw(st.integers(1, 50))
    blocks = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
    held, nbytes = arrays(sizes, count), sum(sizes)
    offsets = [nbytes * place for place in random.Random(0).sample(range(2 * len(blocks)), len(blocks))]
    memories = []
    for each in ("call", "one by one", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            use(patch, each)
            memory = torch.zeros(2 * len(blocks) * nbytes, dtype=torch.uint8)
            way(each, held).gather(memory, offsets, blocks)
            back = [torch.zeros_like(array) for array in held]
            way(each, back).scatter(memory, offsets, blocks)
            assert all(torch.equal(array[blocks], right[blocks]) for array, right in zip(back, held, strict=True))
            memories.append(memory)
    assert torch.equal(memories[0], memories[1])
    assert torch.equal(memories[0], memories[2])


def test_more_pieces_than_one_call_takes(monkeypatch):
    use(monkeypatch, "call")
    held = arrays([16] * 7, 500)
    memory = torch.zeros(500 * 112, dtype=torch.uint8)
    blocks = list(range(499, -1, -1))
    HostPages(held).gather(memory, [112 * place for place in range(500)], blocks)  # 3,500 pieces
    assert torch.equal(memory.view(500, 112), torch.cat(held, 1)[blocks])


def test_more_bytes_than_one_call_may_copy(monkeypatch):
    use(monkeypatch, "call")
    monkeypatch.setattr(page_copy, "BYTES_MAX", 100)  # pieces of 64 and of 128 bytes
    held = arrays([64, 128], 3)
    memory = torch.zeros(576, dtype=torch.uint8)
    HostPages(held).gather(memory, [0, 192, 384], [0, 1, 2])
    assert torch.equal(memory.view(3, 192), torch.cat(held, 1))


def test_a_refused_call_is_logged_once_and_replaced(monkeypatch, caplog):
    use(monkeypatch, "call")

    def refused(*_: object) -> int:
        page_copy.ctypes.set_errno(page_copy.errno.EPERM)
        return -1

    monkeypatch.setattr(page_copy, "_readv", refused)
    held = arrays([64], 2)
    for _ in range(2):
        memory = torch.zeros(64, dtype=torch.uint8)
        HostPages(held).gather(memory, [0], [1])
        assert torch.equal(memory, held[0][1])
    assert caplog.text.count("process_vm_readv is refused (Operation not permitted)") == 1


def test_memory_that_has_gone_is_an_error_and_no_crash(monkeypatch):
    """In the call: `memmove` would end the process."""
    use(monkeypatch, "call")
    target = np.zeros(64, np.uint8)
    with pytest.raises(TieredKVError, match="only 0 of 64 bytes") as caught:
        copy_pieces(np.array([target.ctypes.data], np.uint64), np.array([4096], np.uint64), np.array([64], np.uint64))
    assert caught.value.kind is Kind.MEMORY
    assert not page_copy._is_refused


def test_the_rest_is_one_call_once_copies_one_by_one_take_too_long(monkeypatch):
    calls: list[int] = []
    copied = page_copy._copied
    monkeypatch.setattr(page_copy, "_is_refused", False)
    monkeypatch.setattr(page_copy, "_copied", lambda *pieces: calls.append(len(pieces[0])) or copied(*pieces))
    clock = itertools.count()
    monkeypatch.setattr(page_copy.time, "perf_counter", lambda: next(clock) * page_copy.PATIENCE_S / 2)
    held, memory = arrays([64] * 10, 3), torch.zeros(1920, dtype=torch.uint8)
    HostPages(held).gather(memory, [0, 640, 1280], [0, 1, 2])
    assert calls == [27]  # 3 of 30 pieces took as long as they may
    assert torch.equal(memory.view(3, 640), torch.cat(held, 1))


@pytest.mark.parametrize(
    ("offsets", "blocks", "words"),
    [
        ([0], [0, 1], "as many offsets"),
        ([0], [2], "block numbers must be from 0 to 1"),
        ([0], [-1], "block numbers"),
        ([1], [0], "offsets must be from 0 to 0"),
        ([-1], [0], "offsets"),
    ],
)
def test_numbers_out_of_bounds_are_refused(name, offsets, blocks, words):
    pages, memory = way(name, arrays([64], 2)), torch.zeros(64, dtype=torch.uint8)
    for copy in (pages.gather, pages.scatter):
        with pytest.raises(ValueError, match=words):
            copy(memory, offsets, blocks)


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [torch.zeros(2, 64)],
        [torch.zeros(2, 4, 4, dtype=torch.uint8)],
        [torch.zeros(2, 128, dtype=torch.uint8)[:, ::2]],
        [torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(3, 64, dtype=torch.uint8)],
        [torch.zeros(0, 64, dtype=torch.uint8)],
    ],
)
def test_arrays_of_another_form_are_refused(bad):
    with pytest.raises(TieredKVError, match="pages") as caught:
        pages_of(bad)
    assert caught.value.kind is Kind.LAYOUT


def test_copies_leave_the_interpreters_lock_to_other_threads():
    """A thread that counts meanwhile must go on: the copy of 64 MiB does not hold the lock all the time."""
    held = [torch.zeros(8, 1 << 20, dtype=torch.uint8) for _ in range(8)]
    memory = torch.zeros(64 << 20, dtype=torch.uint8)
    counted, stop, ready = [0], threading.Event(), threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            ready.set()

    thread = threading.Thread(target=count)
    thread.start()
    try:
        ready.wait()
        before = counted[0]
        pages = HostPages(held)
        for _ in range(4):
            pages.gather(memory, [block << 23 for block in range(8)], list(range(8)))
        assert counted[0] > before
    finally:
        stop.set()
        thread.join()
