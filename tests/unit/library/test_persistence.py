"""Checkpoints of a cache: loading gives the saved bits, and loads nothing from a damaged checkpoint or one of another model."""

import os
import pickle

import pytest
import torch
from tiny_models import prompt_of, tiny

from tiered_kv import BaseKVCache, CachePersistence, KVCacheConfig, KVLayout, Namespace, TransformersKVCache
from tiered_kv.checkpoint.manifest import Manifest
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.persistence import load_cache_checkpoint, save_cache_checkpoint
from tiered_kv.tiers.objects.folder_store import FolderStore

BLOCK = 8
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32", block_tokens=BLOCK)
CONFIG = KVCacheConfig(max_tokens=32 * BLOCK, block_tokens=BLOCK, cache_strategy="lru")


def kv_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(LAYOUT.kv_shape(tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make(checked):
    return lambda config=CONFIG, **options: checked(BaseKVCache(config, **options))


@pytest.fixture
def filled(make):
    """A cache with three chains, two of which share a prefix, and two positions."""
    cache = make()
    cache.store(range(40), kv_of(40))
    cache.store([*range(16), *range(100, 120)], torch.cat([kv_of(16), kv_of(20, 1)], 3) * 1.0)
    cache.store(range(500, 524), kv_of(24, 2))
    for at in (3, 9):
        cache.put(at, torch.full((1, 2, 4, 8), float(at)), torch.full((1, 2, 4, 8), -float(at)))
    return cache


def assert_same(one: BaseKVCache, other: BaseKVCache) -> None:
    for ids in (range(40), [*range(16), *range(100, 120)], range(500, 524)):
        a, b = one.fetch(ids), other.fetch(ids)
        assert a.tokens == b.tokens > 0
        assert torch.equal(a.kv, b.kv)
    for at in (3, 9):
        assert all(torch.equal(a, b) for a, b in zip(one.get(at), other.get(at), strict=True))


def test_loading_restores_what_was_saved(filled, make, tmp_path) -> None:
    persistence = CachePersistence(tmp_path / "cache_checkpoints")
    saved = persistence.save_cache(filled, "cache_state.pkl")
    assert (saved.blocks, saved.packs, saved.new_packs) == (5 + 2 + 3 + 2, 1, 1)
    fresh = make()
    assert persistence.load_cache(fresh, "cache_state.pkl") == (12, 0)
    assert_same(filled, fresh)
    fresh.put(3, *filled.get(9))
    assert torch.equal(fresh.get(9)[0], filled.get(9)[0])
    assert torch.equal(fresh.get(3)[0], filled.get(9)[0])
    assert not (tmp_path / "cache_checkpoints" / "cache_state.pkl").read_bytes().startswith(b"\x80")


def test_saving_again_writes_only_new_blocks(filled, tmp_path) -> None:
    persistence = CachePersistence(tmp_path)
    persistence.save_cache(filled, "one")
    assert persistence.save_cache(filled, "other").new_packs == 0
    filled.store(range(900, 908), kv_of(8, 5))
    assert persistence.save_cache(filled, "one").new_packs == 1


def test_checkpoints_by_step(filled, make, tmp_path) -> None:
    save_cache_checkpoint(filled, tmp_path, step=1000)
    filled.store(range(700, 716), kv_of(16, 4))
    save_cache_checkpoint(filled, tmp_path, step=2000)
    for step, loaded, more in [(1000, 1000, 0), (None, 2000, 16), (2000, 2000, 16)]:
        fresh = make()
        assert load_cache_checkpoint(fresh, tmp_path, step=step) == loaded
        assert_same(filled, fresh)
        assert fresh.match(range(700, 716)).tokens == more
    with pytest.raises(TieredKVError, match=r"no checkpoint of step 5 .*its steps: 1000, 2000"):
        load_cache_checkpoint(make(), tmp_path, step=5)
    with pytest.raises(TieredKVError, match="there is no folder"):
        load_cache_checkpoint(make(), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TieredKVError, match=r"any step .*its steps: none"):
        load_cache_checkpoint(make(), tmp_path / "empty")
    for step in (-1, 1.5, True):
        with pytest.raises(TieredKVError, match="step must be"):
            save_cache_checkpoint(filled, tmp_path, step=step)


def test_compressed_blocks_stay_compressed(make, tmp_path) -> None:
    layout = KVLayout(4, 2, 32, "float32", 16)
    config = KVCacheConfig(max_tokens=8192, use_quantization=True, cache_strategy="lru")
    cache, fresh = make(config), make(config)
    for number in range(40):
        kv = torch.randn(layout.kv_shape(256), generator=torch.Generator().manual_seed(number))
        cache.store(range(1000 * number, 1000 * number + 256), kv)
    cache.engine(layout).settle()
    CachePersistence(tmp_path).save_cache(cache, "coded")
    assert CachePersistence(tmp_path).load_cache(fresh, "coded").blocks > 0
    fresh.engine(layout).settle()
    prompts = [range(1000 * number, 1000 * number + 256) for number in range(40)]
    both = [(cache.fetch(ids), fresh.fetch(ids)) for ids in prompts]
    assert sum(b.tokens for _, b in both) > 0
    assert fresh.get_stats()["num_entries"] > 0
    for a, b in both:
        tokens = min(a.tokens, b.tokens)
        assert torch.allclose(a.kv[..., :tokens, :], b.kv[..., :tokens, :], atol=0.1)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, (os.environ["HARM"],))


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_rejected_without_being_opened(protocol, make, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("opened"))
    (tmp_path / "cache_state.pkl").write_bytes(pickle.dumps(Harmful(), protocol))
    cache = make()
    with pytest.raises(TieredKVError, match="pickle, which is not opened" if protocol else "not a checkpoint of tiered_kv") as caught:
        CachePersistence(tmp_path).load_cache(cache, "cache_state.pkl")
    assert caught.value.kind is Kind.CORRUPT
    assert not (tmp_path / "harm").exists()
    assert cache.get_stats()["num_entries"] == 0


def flip(path, at) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["manifest", "cut manifest", "frame", "last frame", "footer", "cut pack", "missing pack"])
def test_damage_is_detected_before_anything_is_loaded(what, filled, make, tmp_path) -> None:
    CachePersistence(tmp_path).save_cache(filled, "state")
    manifest, (pack,) = tmp_path / "state", tmp_path.glob("*.pack")
    frames_end = pack.stat().st_size - 12 * 120 - 64
    {
        "manifest": lambda: flip(manifest, 40),
        "cut manifest": lambda: manifest.write_bytes(manifest.read_bytes()[:-7]),
        "frame": lambda: flip(pack, 300),
        "last frame": lambda: flip(pack, frames_end - 20),
        "footer": lambda: flip(pack, -80),
        "cut pack": lambda: pack.write_bytes(pack.read_bytes()[:-9]),
        "missing pack": pack.unlink,
    }[what]()
    cache = make()
    cache.store(range(8), kv_of(8, 9))
    with pytest.raises(TieredKVError) as caught:
        CachePersistence(tmp_path).load_cache(cache, "state")
    assert caught.value.kind is Kind.CORRUPT
    assert cache.get_stats()["num_entries"] == 1
    assert cache.get(3) is None


def test_a_checkpoint_of_another_model_is_rejected(filled, make, tmp_path) -> None:
    persistence = CachePersistence(tmp_path)
    persistence.save_cache(filled, "state")
    for cache, words in [
        (make(namespace=Namespace(weights="other")), "weights, tokenizer, adapter, tenant or forward hooks differ"),
        (make(CONFIG.with_(block_tokens=4), layout=KVLayout(2, 2, 8, "float32", 4)), "its blocks are L2 H2 D8 float32 T8"),
    ]:
        with pytest.raises(TieredKVError, match=words) as caught:
            persistence.load_cache(cache, "state")
        assert caught.value.kind is Kind.MODEL
        assert cache.get_stats()["num_entries"] == 0


def test_saving_and_loading_attached_caches(tmp_path) -> None:
    greedy, ids = dict(do_sample=False, max_new_tokens=4), prompt_of(20)
    with TransformersKVCache(CONFIG, model=tiny()) as cache:
        plain = cache.model.generate(ids, **greedy)
        save_cache_checkpoint(cache, tmp_path, step=1)
    with TransformersKVCache(CONFIG, model=tiny()) as again:
        load_cache_checkpoint(again, tmp_path)
        assert torch.equal(again.model.generate(ids, **greedy), plain)
        assert again.last_report.reused_tokens == 2 * BLOCK
    with TransformersKVCache(CONFIG, model=tiny(seed=1)) as other, pytest.raises(TieredKVError, match="of another model"):
        load_cache_checkpoint(other, tmp_path)


def test_a_smaller_cache_loads_what_fits(filled, make, tmp_path) -> None:
    CachePersistence(tmp_path).save_cache(filled, "state")
    small = make(CONFIG.with_(max_tokens=4 * BLOCK))
    loaded = CachePersistence(tmp_path).load_cache(small, "state")
    assert loaded.blocks + loaded.refused == 12
    assert small.get_stats()["num_entries"] <= 5
    found = small.fetch(range(40))
    assert torch.equal(found.kv, kv_of(40)[..., : found.tokens, :])


def test_invalid_names_caches_and_folders_are_rejected(filled, make, tmp_path) -> None:
    persistence = CachePersistence(tmp_path)
    for name in ("", "a/b", "../x", ".hidden", "x.pack", 5):
        with pytest.raises(TieredKVError, match="name must be"):
            persistence.save_cache(filled, name)
    with pytest.raises(TieredKVError, match=r"there is no checkpoint 'nothing' .*its checkpoints: none"):
        persistence.load_cache(make(), "nothing")
    with pytest.raises(TieredKVError, match="nothing to save"):
        persistence.save_cache(make(), "state")
    with pytest.raises(TieredKVError, match="cache must be"):
        persistence.save_cache({}, "state")
    (tmp_path / "file").write_text("")
    with pytest.raises(TieredKVError, match="cannot be used for checkpoints") as caught:
        CachePersistence(tmp_path / "file")
    assert caught.value.kind is Kind.STORAGE


def test_a_read_only_folder_is_rejected_and_the_old_checkpoint_stays(filled, make, tmp_path, monkeypatch) -> None:
    persistence = CachePersistence(tmp_path)
    persistence.save_cache(filled, "state")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    filled.store(range(800, 808), kv_of(8))
    monkeypatch.setattr(persistence._store, "_write", refuse)  # file modes do not stop root, which may run this test
    with pytest.raises(TieredKVError, match="Permission denied") as caught:
        persistence.save_cache(filled, "state")
    assert caught.value.kind is Kind.STORAGE
    assert persistence.load_cache(make(), "state").blocks == 12
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(TieredKVError, match="not writable"):
        CachePersistence(tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_loading_a_checkpoint_of_several_models_leaves_other_models_out(filled, make, tmp_path, caplog) -> None:
    """A checkpoint of a cluster has several models."""
    persistence = CachePersistence(tmp_path)
    saved = persistence.save_cache(filled, "state")
    manifest = Manifest.read(FolderStore(tmp_path), "state")
    models = sorted(manifest.models, key=lambda model: model.name != "prefixes")
    known = models[0]
    stranger = known._replace(root=bytes(32), name="")
    rows = tuple(row._replace(key=bytes([1]) + row.key[1:], parent=None, root=bytes(32), depth=0) for row in manifest.rows[:1])
    more = manifest._replace(models=(known._replace(name=""), *models[1:], stranger), rows=(*manifest.rows, *rows))
    more.write(FolderStore(tmp_path), "more")
    node = make()
    with pytest.raises(TieredKVError):  # all frames are verified first, and the stranger's frame does not match its key
        persistence.load_cache(node, "more")
    more = more._replace(rows=manifest.rows, models=(*more.models[:-1], stranger))
    more.write(FolderStore(tmp_path), "more")
    loaded = persistence.load_cache(node, "more")
    assert loaded.blocks == saved.blocks
    assert "are left out" in caplog.text


def test_pairs_of_another_cache_with_the_same_serials_are_rejected(make, tmp_path) -> None:
    one, other = make(), make()
    key = torch.ones(1, 2, 8, 8)
    for cache, factor in ((one, 1), (other, 2)):
        cache._serial = 7
        cache.put(3, key * factor, key * factor)
    persistence = CachePersistence(tmp_path)
    persistence.save_cache(one, "one")
    with pytest.raises(TieredKVError, match="use the same numbers for different pairs"):
        persistence.load_cache(other, "one")
    assert torch.equal(other.get(3)[0], key * 2)
    persistence.load_cache(one, "one")
    fresh = make()
    fresh._serial = 6
    fresh.put(9, key * 5, key * 5)
    persistence.load_cache(fresh, "one")
    fresh.put(4, key * 6, key * 6)
    assert [float(fresh.get(at)[0].max()) for at in (9, 3, 4)] == [5, 1, 6]
