"""Two OpenAI servers of vLLM on one cluster: they share what they computed, and no fault of the cluster fails or changes an answer.

The servers keep only a few blocks themselves, so most prompts need the cluster again. All answers are greedy and in float32, and are
compared with a cold answer. The servers run through all tests; the cluster is killed under them, piece by piece.
"""

import itertools
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import Held, leaks_since
from tiered_kv.cluster import state
from tiered_kv.cluster.localnodes import LocalNodes
from tiered_kv.tools.demo.vllm_server import VllmServer, stop, transfer_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAME = "servers"
BLOCK = 32
PROMPT_BLOCKS = 5
OWN_BLOCKS = 24
"""The blocks of a server's own KV cache. The prompts of the traffic have more, so a server has dropped a prompt when it comes again."""
TRAFFIC_PROMPTS = 8
NEW_TOKENS = 4
HIT_WITHIN_S = 10.0
HIT_WITHIN_PROMPTS = 3
"""At least as many prompts are tried, where the machine is so busy that they take longer than HIT_WITHIN_S."""
PATIENCE_S = 120.0
UP = ("up", "--name", NAME, "--host", "256MiB")


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "tiered_kv.cluster.commands.cli", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def prompt_of(seed: int) -> list[int]:
    """Returns the token ids of a prompt that shares no block with another seed's: PROMPT_BLOCKS blocks and a bit."""
    return random.Random(seed).choices(range(1000, 40000), k=PROMPT_BLOCKS * BLOCK + 7)


class Pair:
    """Two servers, and the cold answer of each prompt that they were asked."""

    def __init__(self, servers: list[VllmServer]) -> None:
        self.servers = servers
        self._cold: dict[int, list[int]] = {}
        self._fresh = itertools.count(1000)

    def fresh(self) -> int:
        """Returns the seed of a prompt that no server has seen."""
        return next(self._fresh)

    def cold(self, seed: int) -> list[int]:
        """Returns the answer to a prompt that is computed with a cache salt of its own, so that nothing is reused."""
        if seed not in self._cold:
            self._cold[seed] = self.servers[0].ask(prompt_of(seed), NEW_TOKENS, salt=secrets.token_hex(16)).token_ids
        return self._cold[seed]

    def ask(self, number: int, seed: int) -> list[int]:
        """Ask a server. Returns its answer. Fails if the request fails."""
        return self.servers[number].ask(prompt_of(seed), NEW_TOKENS).token_ids

    def ask_and_count(self, number: int, seed: int) -> int:
        """Ask a server, and compare its answer with the cold one. Returns how many tokens it has loaded from the cluster."""
        before = loaded(self.servers[number])
        answer = self.ask(number, seed)
        count = loaded(self.servers[number]) - before
        assert answer == self.cold(seed)
        return count

    def hits_again(self) -> None:
        """Ask fresh prompts until one server loads what the other has computed. Fails if that takes longer than HIT_WITHIN_S."""
        begun_s, answers = time.monotonic(), list[tuple[int, list[int]]]()
        try:
            while time.monotonic() < begun_s + HIT_WITHIN_S or len(answers) < 2 * HIT_WITHIN_PROMPTS:
                seed = self.fresh()
                before = loaded(self.servers[1])
                answers += [(seed, self.ask(0, seed)), (seed, self.ask(1, seed))]
                if loaded(self.servers[1]) - before == PROMPT_BLOCKS * BLOCK:
                    return
            pytest.fail(f"no hit within {HIT_WITHIN_S} s; {self.servers[1].log_end()}")
        finally:
            for seed, answer in answers:
                assert answer == self.cold(seed)


def loaded(server: VllmServer) -> int:
    return int(server.metrics().get("vllm:external_prefix_cache_hits", 0))


@pytest.fixture(autouse=True)
def nothing_leaks() -> None:
    """A restarted cluster has other processes and files than before a test; `pair` looks for what is left at the end."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Pair]:
    """A cluster and two servers on it."""
    logs = tmp_path_factory.mktemp("logs")
    before = Held.now()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as ending:
        patch.setenv("TIERED_KV_STATE", str(tmp_path_factory.mktemp("state")))
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)  # as users run servers
        for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patch.delenv(variable, raising=False)
        servers: list[VllmServer] = []
        ending.callback(stop, servers)
        sizes = {"--block-size": BLOCK, "--num-gpu-blocks-override": OWN_BLOCKS, "--max-model-len": 256, "--max-num-seqs": 4}
        options = ["--dtype", "float32", *(str(each) for pair in sizes.items() for each in pair)]
        for name in "AB":
            servers.append(VllmServer(name, model, transfer_config(NAME, recompute_tokens_per_s=1.0), logs, options))
        ending.callback(lambda: state.find(NAME) and run("down", "--name", NAME))
        run(*UP)
        for server in servers:
            list(server.wait())
        yield Pair(servers)
    assert not (leaked := leaks_since(before, ("processes", "shared_memory"))), f"leaked: {leaked}"


@contextmanager
def traffic(pair: Pair) -> Iterator[list[int]]:
    """Ask both servers all the time, each on a thread of its own.

    Yields how many requests each server has answered so far. At the end, fails if any failed or was answered wrongly.
    """
    for seed in range(TRAFFIC_PROMPTS):
        pair.cold(seed)
    ended, answered = threading.Event(), [0, 0]

    def ask_on(number: int) -> None:
        for seed in itertools.cycle(range(TRAFFIC_PROMPTS)):
            if ended.is_set():
                return
            assert pair.ask(number, seed) == pair.cold(seed), f"server {number} gave a wrong answer to prompt {seed}"
            answered[number] += 1

    with ThreadPoolExecutor(2, "traffic") as pool:
        asking = [pool.submit(ask_on, number) for number in range(2)]
        try:
            yield answered
        finally:
            ended.set()
    for each in asking:
        each.result()
    assert min(answered) > 0


def answers_on(answered: list[int], more: int = 6) -> None:
    """Return when the servers have together answered `more` requests."""
    enough = sum(answered) + more
    wait_until(lambda: sum(answered) >= enough)


def wait_until(answered_enough: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not answered_enough():
        assert time.monotonic() < deadline_s, "the servers do not answer"
        time.sleep(0.05)


def pids_of(word: str) -> list[int]:
    """Returns the processes of the cluster's Ray whose command line contains a word."""
    leaders = {process.pid for process in state.load(NAME).processes}
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            command = Path(f"/proc/{name}/cmdline").read_text(errors="replace")
        except OSError:
            continue
        if int(fields[3]) in leaders and word in command:
            found.append(int(name))
    return found


def wait_for(word: str, before: list[int]) -> None:
    """Return when Ray has restarted the actor that was killed, and the node is alive."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (set(pids_of(word)) - set(before) and LocalNodes(NAME).find()):
        assert time.monotonic() < deadline_s, f"{word} was not restarted"
        time.sleep(0.05)


def test_what_one_server_has_computed_the_other_loads(pair: Pair) -> None:
    for first, second in ((0, 1), (1, 0)):
        seed = pair.fresh()
        assert pair.ask_and_count(first, seed) == 0
        before = pair.servers[second].metrics()
        assert pair.ask_and_count(second, seed) == PROMPT_BLOCKS * BLOCK
        after = pair.servers[second].metrics()
        for name, count in (("loaded_blocks", 5), ("loaded_blocks_by_tier:host", 5), ("promised_blocks", 5), ("failed_blocks", 0)):
            name = f"vllm:tiered_kv_{name}"
            assert after.get(name, 0) - before.get(name, 0) == count, name
        assert after["vllm:prompt_tokens_cached_by_source:host"] >= PROMPT_BLOCKS * BLOCK


def test_under_traffic_most_prompts_are_loaded(pair: Pair) -> None:
    before = [loaded(server) for server in pair.servers]
    with traffic(pair) as answered:  # each server on its own: two on two cores slow each other down for seconds
        wait_until(lambda: min(answered) >= 2 * TRAFFIC_PROMPTS)
    got = [loaded(server) - tokens for server, tokens in zip(pair.servers, before, strict=True)]
    assert min(got) > TRAFFIC_PROMPTS * PROMPT_BLOCKS * BLOCK // 2, f"the servers loaded {got} tokens"


@pytest.mark.parametrize("actor", ["NodeActor", "CoordinatorActor"])
def test_kill_9_of_an_actor(pair: Pair, actor: str) -> None:
    with traffic(pair) as answered:
        answers_on(answered)
        [pid] = pids_of(actor)
        os.kill(pid, signal.SIGKILL)
        answers_on(answered)
        wait_for(actor, [pid])
        answers_on(answered)
    pair.hits_again()


def test_down_and_up(pair: Pair) -> None:
    with traffic(pair) as answered:
        answers_on(answered)
        run("down", "--name", NAME)
        answers_on(answered)
        run(*UP)
    pair.hits_again()


def test_kill_9_of_all_of_ray(pair: Pair) -> None:
    with traffic(pair) as answered:
        answers_on(answered)
        for pid in pids_of(""):
            os.kill(pid, signal.SIGKILL)
        answers_on(answered, 2 * TRAFFIC_PROMPTS)  # from memory that outlived its node
        run(*UP)
    pair.hits_again()
