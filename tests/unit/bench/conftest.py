"""One thread: on shared cores, several threads of a tiny model would wait for each other."""

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
