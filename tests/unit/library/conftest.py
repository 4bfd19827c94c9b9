"""The tiny models of the integrations' tests, and transformers' log out of the way, one thread."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))


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
