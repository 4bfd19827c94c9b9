"""What one tenant, or another user of the machine, can learn of a tenant's blocks: nothing, not even from times."""

import itertools
import os
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv.config import Config
from tiered_kv.embedded import InProcessCluster
from tiered_kv.protocol.node_record import NodeRecord, write_record
from tiered_kv.protocol.unix_socket import SessionServer

TRIES = 10_000
ROUNDS = 3
"""Measured again if the times differ: of three rounds with equal times, one in 8,000 has p below 0.05 each time."""
P_LEAST = 0.05
PERMUTATIONS = 2000
NOBODY = 65534


def p_of_equal_times(times_ns: np.ndarray, are_present: np.ndarray, seed: int) -> float:
    """Returns how often mean ranks differ as much as those of the measured times, when `are_present` is dealt out at random.

    `times_ns`: by round and prompt. Times are ranked within each round, so that a drift of the machine does not matter. A prompt is dealt
    out as a whole, because each has times of its own: from its place in memory, and from the slots of the index where its keys would be
    (Fisher's randomization test, on ranks).
    """
    ranks = times_ns.argsort(1, kind="stable").argsort(1, kind="stable").mean(0)
    generator = np.random.default_rng(seed)

    def difference(are_present: np.ndarray) -> float:
        return abs(float(ranks[are_present].mean() - ranks[~are_present].mean()))

    chance = np.array([difference(generator.permutation(are_present)) for _ in range(PERMUTATIONS)])
    return float((1 + np.count_nonzero(chance >= difference(are_present))) / (1 + PERMUTATIONS))


def measured(call, prompts: list[np.ndarray], seed: int) -> tuple[np.ndarray, set[int]]:
    """Measure `call` of each prompt once a round, in random order, TRIES times in all. Returns the times by round, and all answers."""
    times_ns, answers = np.empty((TRIES // len(prompts), len(prompts)), np.int64), set()
    generator = np.random.default_rng(seed)
    for each_round in times_ns:
        for which in generator.permutation(len(prompts)).tolist():
            begun_ns = time.perf_counter_ns()
            answer = call(prompts[which])
            each_round[which] = time.perf_counter_ns() - begun_ns
            answers.add(answer)
    return times_ns, answers


@pytest.fixture
def clients(checked):
    cluster = checked(InProcessCluster(Config.of({"host": "8MiB", "heartbeat_s": 1000.0}), 2, secret=b"a secret of the cluster, 32 byte"))
    namespaces = (replace(NAMESPACE, tenant="spy"), replace(NAMESPACE, tenant="victim"))
    spy, victim = (checked(cluster.client("n0", LAYOUT, namespace)) for namespace in namespaces)
    return spy, victim


def test_a_tenant_can_neither_hit_nor_time_anothers_blocks(clients) -> None:
    """By construction the keys differ, so a look-up of a present block and of an absent one are the same steps. Times must agree."""
    spy, victim = clients
    paths = [tuple(1 + (turn * 7 + at) % 90 for at in range(8)) for turn in range(80)]
    are_present = np.random.default_rng(11).permutation(len(paths)) < len(paths) // 2
    for path, is_present in zip(paths, are_present, strict=True):
        assert not is_present or victim.store(tokens_of(path), kv_of(path)).new
    prompts = [np.array(tokens_of(path), np.uint32) for path in paths]
    present = prompts[int(are_present.argmax())]
    calls = {"match": lambda prompt: spy.match(prompt).tokens, "fetch": lambda prompt: spy.fetch(prompt, deadline_ms=0).tokens}
    assert victim.match(present).tokens == 8 * LAYOUT.block_tokens
    for name, call in calls.items():
        smallest = []
        for seed in range(ROUNDS):
            times_ns, answers = measured(call, prompts, seed)
            assert answers == {0}, name
            smallest.append(p_of_equal_times(times_ns, are_present, seed))
            if smallest[-1] > P_LEAST:
                break
        assert max(smallest) > P_LEAST, f"{name}: the times of present and absent blocks of another tenant differ, p = {smallest}"
    assert all(each.why == "never_stored" for each in spy.explain(present))


def test_the_test_of_times_finds_a_difference() -> None:
    """It is not blind: 2 % more time for half of the prompts are found, and none are not, though each prompt has a time of its own."""
    generator = np.random.default_rng(5)
    rounds, prompts = TRIES // 80, 80
    are_present = generator.permutation(prompts) < prompts // 2
    drift, own = np.linspace(50_000, 90_000, rounds)[:, None], generator.normal(1, 0.01, prompts)
    times_ns = drift * own + generator.gamma(2, 4000, (rounds, prompts))
    assert p_of_equal_times(times_ns, are_present, 1) > P_LEAST
    assert p_of_equal_times(times_ns * np.where(are_present, 1.02, 1), are_present, 1) < 0.01


# Other users of the machine


@pytest.fixture
def node(node_factory, tmp_path):
    shared = Path("/dev/shm") / f"tkv-test-{os.getpid()}"
    shared.mkdir(mode=0o755)
    node = node_factory(shm_path=str(shared), disk="4MiB", disk_path=str(tmp_path / "disk"))
    server = SessionServer(f"{node.directory}/sock", node.open_session)
    write_record(NodeRecord("default", "c", "n0", node.info()))
    yield node
    server.close()
    node.close()
    shared.rmdir()


def test_files_and_sockets_are_the_owners_alone(node) -> None:
    found = list(itertools.chain(Path(node.directory).rglob("*"), Path(node.storage.disk.folder).rglob("*")))
    assert {path.name for path in found} >= {"index", "arena", "sock", "node.json"}
    for path in [Path(node.directory), Path(node.storage.disk.folder)]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert not mode & 0o077, f"{path} has mode {mode:o}"


AS_ANOTHER = """
import os, socket, sys
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
def tried(call):
    try:
        call()
    except (PermissionError, FileNotFoundError) as error:
        return "refused"
    return "allowed"
folder = {folder!r}
print(tried(lambda: os.listdir(folder)))
for name in ("index", "arena", "node.json", "lock"):
    print(tried(lambda: open(f"{{folder}}/{{name}}", "rb").read(1)))
print(tried(lambda: socket.socket(socket.AF_UNIX).connect(f"{{folder}}/sock")))
print(tried(lambda: os.rename(folder, folder + "x")))
print(tried(lambda: open({disk!r} + "/owner").read()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_read_neither_memory_nor_socket_nor_disk(node) -> None:
    program = AS_ANOTHER.format(uid=NOBODY, folder=str(node.directory), disk=str(node.storage.disk.folder))
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == ["refused"] * 8
    with socket.socket(socket.AF_UNIX) as worker:
        worker.connect(f"{node.directory}/sock")
