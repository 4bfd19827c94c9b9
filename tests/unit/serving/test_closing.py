"""Closing, and exiting the interpreter, while a disk hangs: neither waits for the disk."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.transport import PATIENCE_S
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tests.unit.serving.test_failures import LARGE, filled_disk, served
from tiered_kv.blocks import Tier
from tiered_kv.client.connect import client_of
from tiered_kv.config import Config
from tiered_kv.embedded import Embedded
from tiered_kv.node.node import Node
from tiered_kv.tiers.disk.segments import Files
from tiered_kv.tiers.faulty import EVERY, FaultPlan, Faulty, waits

IN_TIME_S = 1.5
"""A limit for calls that take at most 0.2 s, on a busy machine. A call that waits for the disk takes much longer."""


class Hanging:
    """Faults that hang until the test's end. `entered` is set once a call hangs."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()

    def files(self, *calls: str) -> Faulty:
        return Faulty(Files(), FaultPlan(**{call: {EVERY: waits(self.entered, self.gate)} for call in calls}))


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    faults = Hanging()
    yield faults
    faults.gate.set()


def seconds(call) -> float:
    begun_s = time.monotonic()
    call()
    return time.monotonic() - begun_s


def on_disk(client) -> list[int]:
    return [turn for turn in range(40) if client.match(tokens_of((turn,), LARGE)).tokens_by_tier == {"disk": 64}]


@pytest.mark.parametrize("call", ["preadv", "open"])
def test_a_client_closes_while_its_disk_hangs(node_factory, tmp_path, hanging: Hanging, call: str) -> None:
    _, client = filled_disk(node_factory, tmp_path)
    segments = client._source._disk._segments
    segments._files = hanging.files(call)
    assert client.fetch(tokens_of((on_disk(client)[0],), LARGE), deadline_ms=20).tokens == 0
    assert hanging.entered.wait(PATIENCE_S)
    assert seconds(client.close) < IN_TIME_S
    if call == "preadv":
        assert not segments._open, "no file is kept open for later reads"


def test_closing_a_reader_leaves_a_file_open_until_its_read_ends(node_factory, tmp_path, hanging: Hanging) -> None:
    """Otherwise its descriptor could be reused for another file, and the read would return that file's bytes."""
    _, client = filled_disk(node_factory, tmp_path)
    segments = client._source._disk._segments
    segments._files = hanging.files("preadv")
    turn = on_disk(client)[0]
    client.fetch(tokens_of((turn,), LARGE), deadline_ms=20)
    assert hanging.entered.wait(PATIENCE_S)
    [file] = segments._open.values()
    client.close()
    with open(f"/proc/self/fd/{file.fd}", "rb"):
        assert file.readers == 1
    reader = next(thread for thread in threading.enumerate() if thread.name.startswith("tkv-read"))
    hanging.gate.set()
    reader.join(PATIENCE_S)
    assert file.readers == 0


WORKER = """
import sys, threading
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.client.connect import client_of

info, tokens = eval(sys.stdin.read())
layout = KVLayout(2, 2, 16, "float32", 64)
client = client_of(info, layout, Namespace(weights="made up for the tests of the service"))
entered = threading.Event()
class Files(type(client._source._disk._segments._files)):
    @staticmethod
    def preadv(*arguments):
        entered.set()
        threading.Event().wait()
client._source._disk._segments._files = Files()
assert client.match(tokens).tokens_by_tier == {"disk": 64}
assert client.fetch(tokens, deadline_ms=20).tokens == 0
assert entered.wait(30)
print("done")
"""


def test_a_worker_exits_while_its_disk_hangs_forever(node_factory, tmp_path) -> None:
    node, client = filled_disk(node_factory, tmp_path)
    with client, served(node):
        given = repr((node.info(), tokens_of((on_disk(client)[0],), LARGE)))
        ran = subprocess.run([sys.executable, "-c", WORKER], input=given, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


def fill(client) -> None:
    for turn in range(40):
        client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))


@pytest.mark.parametrize("calls", [("pwritev",), ("fdatasync",)])
def test_an_embedded_cache_closes_while_its_disk_hangs(hanging: Hanging, monkeypatch, calls: tuple[str, ...]) -> None:
    """The disk hangs during a write, or when the last segment is sealed. Once it answers, the rest is closed and removed."""
    monkeypatch.setattr(Node.close, "__kwdefaults__", Node.close.__kwdefaults__ | {"within_s": 0.2})
    embedded = Embedded(Config.of({"host": "1MiB", "disk": "4MiB", "store_wait_ms": 0}))
    embedded.node.storage.disk._files = hanging.files(*calls)
    client = embedded.client(LARGE, NAMESPACE, on_close=embedded.close)
    fill(client)
    directory, scratch = embedded.node.directory, Path(embedded._scratch)
    with embedded.node.storage.disk._state:
        if (segment := embedded.node.storage.disk._open) is not None:
            segment.writer._files = embedded.node.storage.disk._files
    assert seconds(client.close) < IN_TIME_S
    assert hanging.entered.is_set()
    assert not directory.exists(), "readers and later nodes see that it is gone"
    closer = next(thread for thread in threading.enumerate() if thread.name.startswith("tkv-close"))
    hanging.gate.set()
    closer.join(PATIENCE_S)
    assert not scratch.exists()


FORGETFUL = """
import threading
from tests.unit.serving.prompts import NAMESPACE, kv_of, tokens_of
from tests.unit.serving.test_failures import LARGE
import tiered_kv
from tiered_kv.node import node
from tiered_kv.tiers.disk import tier as disk
from tiered_kv.tiers.disk.segments import Files

node.Node.close.__kwdefaults__["within_s"] = 0.5
entered = threading.Event()
class Hanging(Files):
    @staticmethod
    def pwritev(*arguments):
        entered.set()
        threading.Event().wait()
    fdatasync = pwritev
disk.Files = Hanging
client = tiered_kv.open({"host": "1MiB", "disk": "4MiB", "store_wait_ms": 0}, layout=LARGE, namespace=NAMESPACE)
for turn in range(40):
    client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))
assert entered.wait(30)
print(client._source._view.directory)
"""


def test_a_script_with_an_embedded_cache_exits_while_its_disk_hangs_forever() -> None:
    ran = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not Path(ran.stdout.strip()).exists()


def test_an_abandoned_node_marks_itself_closed_and_serves_no_one(node_factory, hanging: Hanging, tmp_path, caplog) -> None:
    node = node_factory(host="1MiB", disk="4MiB", disk_path=str(tmp_path / "disk"), store_wait_ms=0)
    node.storage.disk._files = hanging.files("pwritev")
    with client_of(node.info(), LARGE, NAMESPACE, connect=node.open_session) as client:
        fill(client)
        assert hanging.entered.wait(PATIENCE_S)
        node.close(within_s=0.1)
        assert "its disk or object store has not answered" in caplog.text
        assert client.fetch(tokens_of((39,), LARGE)).tokens == 0
        assert client.store(tokens_of((99,), LARGE), kv_of((99,), LARGE)).refused == 1
        hanging.gate.set()
        closer = next((thread for thread in threading.enumerate() if thread.name.startswith("tkv-close")), None)
        if closer is not None:
            closer.join(PATIENCE_S)
    assert Tier.DISK in node.storage.logs


def test_a_look_for_the_node_ends_in_order_if_the_client_is_closed_meanwhile(node_factory, client_factory, monkeypatch) -> None:
    client = client_factory(node_factory(), LAYOUT, NAMESPACE)
    holder, asked = client._holder, []
    is_lost = type(holder.present).is_lost

    def closing_at_the_second_question(access) -> bool:
        asked.append(access)
        if len(asked) == 2:
            client.close()
        return is_lost(access)

    monkeypatch.setattr(type(holder.present), "is_lost", closing_at_the_second_question)
    assert holder.look_once() is False
    assert len(asked) == 2
