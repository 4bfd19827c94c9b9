"""Paged sequences compared with plain lists: forks, copy on write, pages shared by content, and a full slab."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv import KVCacheConfig, Namespace, PagedKVCache
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import as_token_ids

T = 4


def kv_of(ids) -> torch.Tensor:
    """Returns KV (2, 2, 1, N, 8). Each token's KV depends on that token and all before it, as a model's does."""
    sums = torch.tensor(list(ids), dtype=torch.float32).cumsum(0) if len(ids) else torch.zeros(0)
    return sums[None, None, None, :, None] + torch.arange(32.0).view(2, 2, 1, 1, 8)


def grow(cache: PagedKVCache, sequence: int, ids) -> None:
    before = cache.tokens(sequence)
    cache.append(sequence, ids, kv_of([*before, *ids])[..., len(before) :, :])


@pytest.fixture
def cache(checked) -> PagedKVCache:
    return checked(PagedKVCache(KVCacheConfig(max_tokens=16 * T, block_tokens=T)))


def test_forks_share_pages_until_one_writes(cache) -> None:
    first = cache.create()
    grow(cache, first, [1, 2, 3, 4, 5, 6])
    second = cache.fork(first)
    assert cache.block_table(first) == cache.block_table(second)
    assert [page.shared_by for page in cache.block_table(first)] == [2, 2]
    grow(cache, second, [7])
    ours, theirs = cache.block_table(first), cache.block_table(second)
    assert ours[0] == theirs[0]
    assert ours[1].offset != theirs[1].offset
    assert (ours[1].tokens, theirs[1].tokens) == (2, 3)
    assert torch.equal(cache.gather(first), kv_of([1, 2, 3, 4, 5, 6]))
    assert torch.equal(cache.gather(second), kv_of([1, 2, 3, 4, 5, 6, 7]))
    offset = ours[1].offset
    grow(cache, first, [9])
    assert cache.block_table(first)[1].offset == offset, "the last user of a page writes in place"


def test_equal_tokens_share_pages_without_a_fork(cache) -> None:
    sequences = [cache.create(), cache.create()]
    for sequence in sequences:
        grow(cache, sequence, range(10))
    one, other = map(cache.block_table, sequences)
    assert [page.offset for page in one[:2]] == [page.offset for page in other[:2]]
    assert one[2].offset != other[2].offset
    assert len({page.offset for page in [*one, *other]}) == 4


def test_a_new_sequence_finds_the_pages_of_a_freed_one(cache) -> None:
    sequence = cache.create()
    grow(cache, sequence, range(11))
    cache.free(sequence)
    again = cache.create([*range(9), 50])
    assert cache.tokens(again) == list(range(8))
    assert torch.equal(cache.gather(again), kv_of(range(8)))
    assert cache.match(range(11)).tokens == 8


def test_pages_have_the_keys_of_their_rank(checked) -> None:
    namespace = Namespace(weights="w", rank=1, world=2)
    cache = checked(PagedKVCache(KVCacheConfig(max_tokens=16 * T, block_tokens=T), namespace=namespace))
    sequence = cache.create()
    for first, last in ((0, 6), (6, 7), (7, 11)):
        grow(cache, sequence, range(first, last))
    keys = namespace.chain(cache.layout).keys(as_token_ids(range(11)))
    assert [record.key for record in cache.client().explain(range(11))] == [key.hex() for key in keys]
    assert cache.match(range(11)).tokens == 8
    assert torch.equal(cache.gather(sequence), kv_of(range(11)))
    assert cache.tokens(cache.create([*range(9), 50])) == list(range(8))


def test_an_append_to_a_full_slab_raises_and_changes_nothing(cache) -> None:
    sequence = cache.create()
    grow(cache, sequence, range(14 * T + 1))
    with pytest.raises(TieredKVError, match="no room for 8 tokens") as caught:
        grow(cache, sequence, range(500, 500 + 2 * T))
    assert caught.value.kind is Kind.MEMORY
    assert torch.equal(cache.gather(sequence), kv_of(range(14 * T + 1)))
    other = cache.create()
    grow(cache, other, [1])
    cache.free(sequence)
    grow(cache, other, range(12 * T))
    assert cache.length(other) == 12 * T + 1


def test_invalid_sequences_and_shapes_are_rejected(cache) -> None:
    with pytest.raises(TieredKVError, match="there is no sequence 5"):
        cache.gather(5)
    sequence = cache.create()
    with pytest.raises(TieredKVError, match="nothing was appended"):
        cache.gather(sequence)
    grow(cache, sequence, [1])
    with pytest.raises(TieredKVError, match="shape"):
        cache.append(sequence, [1, 2], kv_of([1]))
    assert cache.tokens(sequence) == [1]
    cache.clear()
    with pytest.raises(TieredKVError, match="no sequence"):
        cache.length(sequence)
    assert cache.create() != sequence


STEPS = st.lists(
    st.tuples(st.sampled_from(["create", "append", "fork", "free"]), st.integers(0, 9), st.lists(st.integers(0, 2), max_size=7)),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_any_history_equals_that_of_plain_lists(steps) -> None:
    with PagedKVCache(KVCacheConfig(max_tokens=12 * T, block_tokens=T)) as cache:
        plain: dict[int, list[int]] = {}
        for what, which, ids in steps:
            of = sorted(plain)[which % len(plain)] if plain else None
            if what == "create":
                number = cache.create(ids)
                plain[number] = cache.tokens(number)
                assert plain[number] == ids[: len(plain[number])]
            elif of is not None and what == "append":
                with suppress(TieredKVError):  # a full slab; the comparison with `plain` then shows that nothing changed
                    grow(cache, of, ids)
                    plain[of] = plain[of] + ids
            elif of is not None and what == "fork":
                plain[cache.fork(of)] = list(plain[of])
            elif of is not None:
                cache.free(of)
                del plain[of]
        for number, ids in plain.items():
            assert cache.tokens(number) == ids
            assert sum(page.tokens for page in cache.block_table(number)) == len(ids)
            if ids:
                assert torch.equal(cache.gather(number), kv_of(ids))
        cache.check()


def test_pages_are_never_compressed() -> None:
    """Sequences write to pages in place, and read them without a codec."""
    config = KVCacheConfig(max_tokens=64 * T, block_tokens=T, use_quantization=True, use_compression=True)
    with PagedKVCache(config) as cache:
        for begin in range(0, 48 * T, 12 * T):
            sequence = cache.create()
            grow(cache, sequence, range(begin, begin + 12 * T))
            cache.free(sequence)
        again = cache.create(range(12 * T))
        assert cache.length(again) == 12 * T
        assert torch.equal(cache.gather(again), kv_of(range(12 * T)))
        assert not cache.get_stats()["codecs"]
