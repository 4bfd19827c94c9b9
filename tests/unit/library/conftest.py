"""The tiny models of the integrations' tests, and transformers' log out of the way, one thread."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integrations")]


@pytest.fixture(autouse=True)
def quiet():
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models on cores that others use as well: threads would wait for each other
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(before)


@pytest.fixture
def attached(request):
    """`attached(model)` is a cache of it; closed at the end, its books checked."""

    def make(model, config=None, **options):
        from library_config import CONFIG

        from tiered_kv import TransformersKVCache

        config = config or CONFIG
        cache = TransformersKVCache(config, model=model, **options)
        request.addfinalizer(cache.close)
        request.addfinalizer(cache.cache.check)
        return cache

    return make
