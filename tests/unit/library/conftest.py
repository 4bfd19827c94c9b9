"""Imports the tiny models of the integrations' tests, and silences transformers' log."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integrations")]


@pytest.fixture(autouse=True)
def quiet():
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture
def attached(request):
    """`attached(model)` returns a cache attached to the model. At the end it is checked and closed."""

    def make(model, config=None, **options):
        from library_config import CONFIG

        from tiered_kv import TransformersKVCache

        config = config or CONFIG
        cache = TransformersKVCache(config, model=model, **options)
        request.addfinalizer(cache.close)
        request.addfinalizer(cache.cache.check)
        return cache

    return make
