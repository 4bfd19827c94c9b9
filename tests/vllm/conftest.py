"""The environment of vLLM's tests, the model, and the nodes that engines attach to. Nodes are processes of their own, without Ray."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

os.environ.update(  # before vLLM is imported
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    PYTHONHASHSEED=os.environ.get("PYTHONHASHSEED", "0"),  # vLLM 0.29 seeds its block hashes with it
)

import pytest

from tests.conftest import Held, leaks_since
from tests.unit.serving.processes import NodeProcess
from tests.vllm.engine import Engine
from tiered_kv.tools.demo.model import ensure_default_model


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """After each test: processes and shared memory are those of before. An engine starts threads and opens files when it needs them.

    `make_engine` looks for the connector's threads and files when the engine has ended.
    """
    before = Held.now()
    yield
    assert not (leaked := leaks_since(before, ("processes", "shared_memory"))), f"leaked: {leaked}"


@pytest.fixture(scope="session")
def model() -> str:
    """The folder of the demo's model, which is made at its first use."""
    return str(ensure_default_model())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, nursery: object) -> Iterator[str]:
    """A unique name for a cluster, which does not run yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERED_KV_STATE", str(tmp_path_factory.mktemp("state")))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield f"vllm-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def make_engine(model: str, cluster: str) -> Iterator[Callable[..., Engine]]:
    """`make_engine(extra={}, **options)` is an engine in this process, attached to `cluster`. One at a time."""
    with ExitStack() as ending:

        def make(**options: object) -> Engine:
            ending.close()
            return ending.enter_context(Engine(model, cluster, **options))

        yield make


@pytest.fixture(scope="module")
def node(cluster: str) -> Iterator[NodeProcess]:
    """A node of `cluster` in a process of its own."""
    with NodeProcess(cluster, host="256MiB") as node:
        yield node
