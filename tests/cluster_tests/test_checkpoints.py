"""Checkpoints of a real cluster from the command line: restored on one to three nodes, and interrupted in several ways."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
import torch

import tiered_kv
from tiered_kv.checkpoint.manifest import Manifest
from tiered_kv.checkpoint.repository import open_repository
from tiered_kv.client.connect import client_of
from tiered_kv.cluster import raylocal, start, state
from tiered_kv.cluster.attach import join
from tiered_kv.tiers.objects.packs import read_footer

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LAYOUT = tiered_kv.KVLayout(layers=8, kv_heads=4, head_dim=64, dtype="float32", block_tokens=16)
"""Blocks of 256 KiB."""
NAMESPACE = tiered_kv.Namespace(weights="checkpointed")
PROMPTS = {"node-0": range(40), "node-1": range(30, 70)}
"""Prompts of five blocks that are stored on each node; ten of them on both."""
BLOCKS = 5
RATE = "2MiB"
"""At this rate each node writes its second pack many seconds after its first."""
WORK = 60
"""Blocks that a worker stores while a checkpoint is taken."""
PATIENCE_S = 60.0
QUESTION = "The mill at the river has three stones. The first one grinds wheat, the second rye, and the third oats. " * 5


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tiered_kv.cluster.commands.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=180, check=False)


def good(*arguments: object) -> subprocess.CompletedProcess:
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def until(condition, what: str) -> None:
    """Wait until a condition that another process brings about is true. Fails after PATIENCE_S."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)


def prompt(seed: int, blocks: int = BLOCKS) -> tuple[list[int], torch.Tensor]:
    tokens = blocks * LAYOUT.block_tokens
    kv = torch.randn(LAYOUT.kv_shape(tokens), generator=torch.Generator().manual_seed(seed))
    return list(range(seed * 1000, seed * 1000 + tokens)), kv


@contextmanager
def joined(name: str) -> Iterator[None]:
    """Join another cluster with this process as a driver, until the end of the with block."""
    raylocal.leave_ray()
    try:
        join(name)
        yield
    finally:
        raylocal.leave_ray()


@contextmanager
def clients(name: str, namespace: tiered_kv.Namespace = NAMESPACE) -> Iterator[dict[str, tiered_kv.Client]]:
    """Yields a client of each node. All nodes are on this machine."""
    with ExitStack() as stack:
        nodes = start.describe(name)["nodes"]
        yield {node["node"]: stack.enter_context(client_of(node, LAYOUT, namespace)) for node in nodes}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the files of the tests, with `TIERED_KV_STATE` in it. Asserts at the end that no cluster is left."""
    if ray.is_initialized():
        raylocal.leave_ray()
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERED_KV_STATE", str(folder / "state"))
        for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patch.delenv(variable, raising=False)
        yield folder
        assert [name for name in ("kept", "one", "two", "three") if state.find(name)] == []


@contextmanager
def up(name: str, *how: object) -> Iterator[subprocess.CompletedProcess]:
    """Start a cluster with a command, and stop it at the end. Yields the finished command."""
    started = run(*how, "--name", name)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield started
    finally:
        raylocal.leave_ray()
        found = state.find(name)
        if found:
            good("down", "--name", name)
            assert not list(Path("/dev/shm").glob(f"tkv-{found.cluster_id}-*"))


@pytest.fixture(scope="module")
def model():
    """The demo's model in float32 on one thread, and its tokenizer."""
    from tiered_kv.tools.demo.model import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(None, torch.float32)
    torch.set_num_threads(threads)


def answered(model, name: str) -> tuple[list[int], dict[str, int]]:
    """Returns the model's output for a long question with this cluster's cache, and the number of reused tokens by tier."""
    from tiered_kv.integrations.transformers import CachedModel

    inputs = model[1](QUESTION, return_tensors="pt")
    with tiered_kv.attach(*model, cluster=name) as client:
        cached = CachedModel(model[0], client)
        output = cached.generate(**inputs, max_new_tokens=8, do_sample=False)
        return output[0].tolist(), cached.last_report.reused_tokens_by_tier


@pytest.fixture(scope="module")
def main(home: Path, model) -> Iterator[str]:
    """A cluster of two nodes with host memory and disk, which has stored all prompts and the model's question.

    This process is a driver of it.
    """
    with up("kept", "up", "--nodes", 2, "--host", "16MiB", "--disk", "128MiB", "--block-tokens", 16):
        join("kept")
        until(lambda: len(start.describe("kept")["nodes"]) == 2, "both nodes have reported")
        answered(model, "kept")
        with clients("kept") as each:
            for node, seeds in PROMPTS.items():
                for seed in seeds:
                    stored = each[node].store(*prompt(seed))
                    assert stored.refused == 0
        yield "kept"


class Content(NamedTuple):
    """The content of a checkpoint store: its newest manifest, and the number of copies of each block in its packs."""

    manifest: Manifest
    copies: list[int]


def content(folder: Path) -> Content:
    with open_repository(str(folder)) as repository:
        assert repository.verify() == []
        entries = [
            (entry.key, entry.root)
            for name, nbytes in repository.store.sizes().items()
            if name.endswith(".pack")
            for entry in read_footer(repository.store, name, nbytes).entries
        ]
        return Content(repository.read(), [entries.count(each) for each in set(entries)])


def packs(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns inode and modification time of each complete pack."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.pack")}


def leases(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(("lease-", "gc-"))]


def seeds() -> set[int]:
    return set(PROMPTS["node-0"]) | set(PROMPTS["node-1"])


@pytest.fixture(scope="module")
def place(main: str, home: Path) -> Path:
    """A folder with a checkpoint of the cluster that was taken while a worker stored and fetched."""
    folder = home / "place"
    ended = threading.Event()
    counts = {"fetched": 0}

    def work(client: tiered_kv.Client) -> None:
        seed = 1000
        while not ended.is_set():
            if seed < 1000 + WORK:
                assert client.store(*prompt(seed, 1)).refused == 0
            known, known_kv = prompt(seed % 40)
            fetched = client.fetch(known)
            assert torch.equal(fetched.kv, known_kv[..., : fetched.tokens, :])
            counts["fetched"] += fetched.tokens
            seed += 1

    with clients(main) as each:
        worker = threading.Thread(target=work, args=(each["node-0"],))
        worker.start()
        try:
            until(lambda: counts["fetched"] > 0, "the worker works")
            taken = json.loads(good("checkpoint", "--name", main, "--json", folder).stdout)
        finally:
            ended.set()
            worker.join()
    assert counts["fetched"] > 100
    assert taken["left"] == 0
    manifest, copies = content(folder)
    assert taken["blocks"] == len(manifest.rows)
    written = {row.key.hex() for row in manifest.rows}
    with clients(main) as each:
        for seed in seeds():
            assert {block.key for block in each["node-0"].explain(prompt(seed)[0])} <= written
    assert set(copies) == {1}, "a block that is on both nodes is written once"
    assert {row.tier for row in manifest.rows} >= {2, 3}, "from host memory and from disk"
    assert leases(folder) == []
    return folder


def assert_all_hit(name: str, tiers: set[str]) -> None:
    """Assert that each node serves all prompts bit for bit, and that some blocks were in each of `tiers` before they were read.

    Every node is asked for every prompt, because a prompt is in the packs or the memory of one node and is pulled by the others; which
    one depends on how often blocks were used. The tiers are those of a look-up before the first fetch, because an attempt that ends
    early may move blocks already. A short miss is allowed while blocks move between tiers. A lost block is not.
    """
    found: set[str] = set()
    with clients(name) as each:
        for seed in sorted(seeds()):
            ids, kv = prompt(seed)
            found.update(*(client.match(ids).tokens_by_tier for client in each.values()))
            for node, client in each.items():

                def is_whole() -> bool:
                    fetched = client.fetch(ids, deadline_ms=20_000)  # noqa: B023 - called at once
                    assert torch.equal(fetched.kv, kv[..., : fetched.tokens, :])  # noqa: B023
                    return fetched.tokens == len(ids)  # noqa: B023

                until(is_whole, f"prompt {seed} of {name}'s {node}")
    assert tiers <= found


@contextmanager
def writing_slowly(name: str, folder: Path, *more: object) -> Iterator[subprocess.Popen]:
    """Yields a running checkpoint command that has written some of its packs and not all."""
    process = subprocess.Popen(
        command("checkpoint", "--name", name, "--max-rate", RATE, *more, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            until(lambda: packs(folder) or process.poll() is not None, "the first pack")
            assert process.poll() is None, process.communicate()
            assert not list(folder.glob("*.tkv"))
            yield process
        finally:
            process.kill()


class Killed(NamedTuple):
    """A folder in which a checkpoint's command was killed, its lease and packs, and the next command, which is running."""

    folder: Path
    lease: str
    packs: dict[str, tuple[int, int]]
    following: subprocess.Popen


@pytest.fixture(scope="module")
def killed(main: str, home: Path) -> Iterator[Killed]:
    """A killed checkpoint and the next one, which waits half a minute. So tests that use other clusters run in the meantime."""
    folder = home / "killed"
    with writing_slowly(main, folder) as process:
        process.kill()
    [lease] = leases(folder)
    before = packs(folder)
    assert json.loads(good("checkpoints", "--json", folder).stdout) == []
    following = command("checkpoint", "--name", main, "--keep", 1, folder)
    with subprocess.Popen(following, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Killed(folder, lease, before, process)
        finally:
            process.kill()


def test_one_node_starts_warm_and_the_models_output_equals_that_without_a_cache(place: Path, model, main: str) -> None:
    inputs = model[1](QUESTION, return_tensors="pt")
    plain = model[0].generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    raylocal.leave_ray()
    try:
        how = ["up", "--host", "32MiB", "--disk", "256MiB", "--block-tokens", 16, "--restore", place]
        with up("one", *how) as started, joined("one"):
            assert "blocks are hits from now on (node-0 " in started.stdout
            output, reused = answered(model, "one")
            assert output == plain
            assert sum(reused.values()) >= inputs["input_ids"].shape[1] // 16 * 16 - 16
            assert set(reused) <= {"host", "disk", "checkpoint"}
            assert_all_hit("one", set())
            until(lambda: '"is_done": true' in run("status", "--name", "one", "--json").stdout, "filling has ended")
            told = good("status", "--name", "one").stdout
            assert "blocks brought to memory or disk, done" in told
            assert_all_hit("one", {"disk"})
    finally:
        join(main)


@pytest.mark.usefixtures("killed")
def test_two_nodes_without_disk_serve_the_blocks_that_do_not_fit_from_packs(place: Path, main: str) -> None:
    raylocal.leave_ray()
    try:
        how = ["restore", place, "--nodes", 2, "--host", "16MiB", "--block-tokens", 16, "--json"]
        with up("two", *how) as started, joined("two"):
            figures = json.loads(started.stdout)
            assert figures["mounted"] == len(content(place).manifest.rows)
            assert 0 < figures["host"] < figures["mounted"]
            assert (figures["disk"], figures["damaged"], figures["no_room"], figures["skipped"]) == (0, 0, 0, [])

            def some_are_only_in_packs() -> bool:
                filling = [node["stats"]["filling"] for node in start.describe("two")["nodes"]]
                return all(each and 0 < each["nearer"] < each["blocks"] for each in filling)

            until(some_are_only_in_packs, "each node has reported blocks in its memory, and others that are only in packs")
            assert_all_hit("two", {"checkpoint"})
    finally:
        join(main)


def test_three_nodes_share_the_blocks(place: Path, main: str) -> None:
    raylocal.leave_ray()
    try:
        how = ["up", "--nodes", 3, "--host", "16MiB", "--disk", "64MiB", "--block-tokens", 16, "--restore", place]
        with up("three", *how), joined("three"):
            until(lambda: len(start.describe("three")["nodes"]) == 3, "all nodes have reported")
            held = [node["stats"]["filling"]["blocks"] for node in start.describe("three")["nodes"] if node["stats"]["filling"]]
            assert len(held) == 3
            assert sum(held) == len(content(place).manifest.rows)
            assert max(held) < 0.6 * sum(held)
            assert_all_hit("three", {"peer"})
    finally:
        join(main)


def test_the_checkpoint_after_a_killed_one_continues_from_it(killed: Killed) -> None:
    """Nodes notice by themselves that the killed command has gone. Until then the next command waits."""
    said, error = killed.following.communicate(timeout=PATIENCE_S)
    assert killed.following.returncode == 0, said + error
    assert "waiting: node-0: another checkpoint is being written by this node" in said
    assert f"no checkpoints were deleted this time: another process is working on this store: {killed.lease}" in said
    assert packs(killed.folder) | killed.packs == packs(killed.folder), "no pack was changed"
    assert set(content(killed.folder).copies) == {1}
    assert len(content(killed.folder).manifest.rows) >= len(seeds()) * BLOCKS


def assert_next_is_complete(name: str, folder: Path) -> None:
    """Assert that an interrupted checkpoint is not listed, and that the next one is complete and writes no block twice."""
    assert json.loads(good("checkpoints", "--json", folder).stdout) == []
    before = packs(folder)
    assert before
    taken = json.loads(good("checkpoint", "--name", name, "--json", folder).stdout)
    assert taken["blocks"] >= len(seeds()) * BLOCKS
    assert 0 < taken["new_blocks"] < taken["blocks"]
    assert packs(folder) | before == packs(folder), "no pack was changed"
    assert set(content(folder).copies) == {1}, "no block was written twice"


def test_ctrl_c_stops_a_checkpoint_within_seconds_and_the_next_continues(main: str, tmp_path: Path) -> None:
    with writing_slowly(main, tmp_path / "place") as process:
        assert len(leases(tmp_path / "place")) == 1
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, out + err
    assert "the checkpoint was stopped; the next one continues from what was written" in out
    assert "Traceback" not in err
    assert leases(tmp_path / "place") == []
    assert_next_is_complete(main, tmp_path / "place")


def test_a_node_that_dies_during_a_checkpoint_is_named_and_the_next_is_complete(main: str, tmp_path: Path) -> None:
    ids, kv = prompt(3)
    with clients(main) as each:
        view = each["node-1"]._source._view
        with writing_slowly(main, tmp_path / "place") as process:
            generation = view.generation
            os.kill(view._head(10), signal.SIGKILL)
            out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1, out + err
        assert "node-1: " in out
        assert "Traceback" not in err
        assert torch.equal(each["node-0"].fetch(ids).kv, kv)
        until(lambda: view.generation > generation, "Ray has restarted the node")
        until(lambda: each["node-1"].store(*prompt(2000)).refused == 0, "stores work again")
    assert leases(tmp_path / "place") == []
    assert_next_is_complete(main, tmp_path / "place")


def test_repeated_checkpoints_keep_the_newest_ones(main: str, tmp_path: Path) -> None:
    folder = tmp_path / "place"
    given = ["checkpoint", "--name", main, "--every", "1s", "--keep", 2, "--namespace", "checkpointed", "--json", folder]
    with subprocess.Popen(command(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        taken = [json.loads(process.stdout.readline()) for _ in range(4)]
        process.send_signal(signal.SIGTERM)
        more, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    taken += map(json.loads, more.splitlines())
    assert [each["new_packs"] > 0 for each in taken] == [True] + [False] * (len(taken) - 1)
    assert [each["collected"]["manifests_deleted"] for each in taken[:4]] == [0, 0, 1, 1]
    listed = json.loads(good("checkpoints", "--json", folder).stdout)
    assert [each["name"] for each in listed] == [each["name"] for each in taken[-2:]]
    assert "2 checkpoints" in good("verify", folder).stdout
    assert leases(folder) == []
    last = json.loads(good("status", "--name", main, "--json").stdout)["last_checkpoint"]
    assert last["url"] == f"file://{folder}"


def test_a_restore_into_a_running_cluster_loads_only_missing_blocks(main: str, place: Path) -> None:
    done = good("restore", "--name", main, place)
    assert "blocks are hits from now on" in done.stdout
    assert_all_hit(main, set())


def test_invalid_commands_are_refused_and_change_nothing(main: str, place: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    for given, status, words in (
        (["restore", "--name", main, "--nodes", 1, place], 2, "--nodes: only allowed if no cluster is up, but 'kept' is"),
        (["restore", "--name", main, "--namespace", "nope", place], 1, "this namespace was not requested"),
        (["restore", "--name", main, "--world", 5, place], 2, "no block of the checkpoint can be restored for 5 ranks"),
        (["restore", "--name", main, tmp_path / "nowhere"], 1, "there is no such folder on this machine"),
        (["checkpoint", "--name", main, "--namespace", "nope", tmp_path / "none"], 1, "there is nothing to write"),
        (["checkpoint", "--name", main, "/proc/nope"], 1, "file:///proc/nope cannot be used"),
        (["checkpoint", "--name", main, "s4://bucket"], 2, "'s4://bucket' is not the URL of an object store"),
        (["up", "--name", main, "--policy", "lru", "--block-tokens", 16, "--restore", place], 2, "is up with other settings: policy"),
        (["up", "--name", "sizes", "--restore", place], 1, "--block-tokens 16 would fit"),
    ):
        done = run(*given)
        assert done.returncode == status, done.stdout + done.stderr
        assert words in done.stdout
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in place.iterdir()) == before
    assert not (tmp_path / "nowhere").exists()
    assert list((tmp_path / "none").iterdir()) == []
    assert state.find("sizes") is None
