"""Time to first token in vLLM: cold, vLLM's own prefix cache, and a reload after vLLM's cache was emptied and its pages zeroed.

    tiered-kv up --name bench --host 1GiB
    .venv-vllm/bin/python -m benchmarks.vllm_first_token --rounds 8 --output benchmarks/results/vllm-first-token.json

Needs the virtual environment of `make test-vllm`. Each connector has an engine in a process of its own. They take turns: in each round,
each of them gets one fresh prompt, four times (cold, repeat, reload, repeat). Only ratios and differences within a run count. A round of
an engine is quiet if other processes used less than 0.3 cores in each of its steps. Medians are of the quiet rounds, if there are three.
`--peers` adds the connectors of a JSON file such as benchmarks/vllm_peers.json; how to install them says benchmarks/results/README.md:
{"name": {"transfer": {…}, "env": {…}, "files": {"name": {…}}, "commands": [["…"]], "ready": port}}. The files are written and the commands
are started with the same `env`, before the engine. They are ready when the port accepts connections. In the file, {python} is this
interpreter, {peers} the folder of `--peers-packages`, and {tmp} a scratch folder, in shared memory if there is any.

A reload must take as many tokens from a cache as the repeat, and yield the same first token. What does not is reported as a fault.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
MARK = "first-token: "
QUIET_CORES = 0.3
"""A step counts as quiet if other processes used less than this meanwhile, in cores."""


def machine() -> dict[str, Any]:
    """Returns what the figures depend on."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}


def busy_s() -> tuple[float, float]:
    """Returns the processor seconds used by the whole machine, and by this process."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = os.sysconf("SC_CLK_TCK")
    used = sum(map(int, fields[:3])) + sum(map(int, fields[5:8]))
    return used / ticks, time.process_time()


class Bench:
    """One engine and its measurements."""

    def __init__(self, model: str, tokens: int, dtype: str, transfer: dict[str, Any] | None) -> None:
        from vllm import LLM, SamplingParams

        if transfer and transfer["kv_connector"].startswith("LMCache"):
            spare_llvmlite()
        options: dict[str, Any] = {"kv_transfer_config": transfer} if transfer else {}
        self.llm = LLM(model, dtype=dtype, max_model_len=2048, enforce_eager=True, disable_log_stats=True, seed=0, **options)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.one = SamplingParams(temperature=0, max_tokens=1)
        self.tokens = tokens

    def prompt(self, number: int) -> list[int]:
        return [(number * 7919 + position * 31 + position * position % 977) % 40000 + 100 for position in range(self.tokens)]

    def first_token(self, ids: list[int]) -> dict[str, float]:
        """Returns the seconds to the first token, the tokens that came from a cache, and what other processes used meanwhile in cores."""
        before, own = busy_s()
        begun = time.perf_counter()
        output = self.llm.generate([{"prompt_token_ids": ids}], self.one, use_tqdm=False)[0]
        seconds = time.perf_counter() - begun
        after, own_after = busy_s()
        others = max((after - before) - (own_after - own), 0.0) / seconds
        return {"seconds": seconds, "cached": output.num_cached_tokens, "others": others, "token": output.outputs[0].token_ids[0]}

    def forget(self) -> None:
        """Empty vLLM's own prefix cache, and zero its KV."""
        deadline_s = time.monotonic() + 10
        while not self.core.scheduler.reset_prefix_cache():
            assert time.monotonic() < deadline_s, "vLLM does not give up its prefix cache"
            self.core.step()
        for cache in self.runner.kv_caches:
            cache.zero_()
        # Zeroing 1 GiB leaves the processor's caches without the weights, which a repeat finds there.
        self.llm.generate([{"prompt_token_ids": [number % 997 + 50 for number in range(90)]}], self.one, use_tqdm=False)

    def round(self, number: int) -> dict[str, dict[str, float]]:
        ids = self.prompt(number)
        self.forget()
        steps = {"cold": self.first_token(ids), "repeat": self.first_token(ids)}
        self.forget()
        steps["reload"] = self.first_token(ids)
        steps["repeat again"] = self.first_token(ids)
        return steps


def spare_llvmlite() -> None:
    """Let vLLM 0.32 on CPUs start beside LMCache, which imports numba.

    vLLM looks for a kernel in the `__dict__` of all that any module holds. llvmlite's library takes that for the name of a C function.
    """
    from llvmlite.binding import ffi

    ffi.lib._fntab["__dict__"] = {}


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Returns medians in ms of the quiet rounds, or of all rounds if fewer than three are quiet."""
    quiet = [each for each in rounds if all(step["others"] < QUIET_CORES for step in each.values())]
    kept = quiet if len(quiet) >= 3 else rounds
    found: dict[str, Any] = {"rounds": len(rounds), "quiet_rounds": len(quiet)}
    for name in kept[0]:
        values = [each[name]["seconds"] * 1e3 for each in kept]
        found[name] = {"ms": statistics.median(values), "min": min(values), "max": max(values), "cached": kept[0][name]["cached"]}
    found["reload_minus_repeat_ms"] = statistics.median(
        (each["reload"]["seconds"] - min(each["repeat"]["seconds"], each["repeat again"]["seconds"])) * 1e3 for each in kept
    )
    found["reload_minus_mean_repeat_ms"] = statistics.median(
        (each["reload"]["seconds"] - (each["repeat"]["seconds"] + each["repeat again"]["seconds"]) / 2) * 1e3 for each in kept
    )
    found["reload_of_cold"] = statistics.median(each["reload"]["seconds"] / each["cold"]["seconds"] for each in kept)
    return found


def faults(steps: dict[str, dict[str, float]], reloads: bool) -> list[str]:
    """Returns why these steps were not what they are called. An engine without a connector reloads nothing."""
    cold, repeat, reload = steps["cold"], steps["repeat"], steps["reload"]
    found = [f"{cold['cached']} tokens of the cold prompt came from a cache"] if cold["cached"] else []
    expected = repeat["cached"] if reloads else 0
    if reload["cached"] != expected:
        found.append(f"{reload['cached']} tokens were reloaded, expected {expected}")
    if reloads and reload["token"] != repeat["token"]:
        found.append(f"the first token after the reload was {reload['token']}, expected {repeat['token']}")
    return found


def log_of(name: str) -> TextIO:
    log = open(Path(tempfile.gettempdir()) / f"vllm-first-token-{name}.log", "w")  # noqa: SIM115 - as long as the process
    print(f"{name}: starting, log in {log.name}", flush=True)
    return log


class Turn:
    """An engine in a process of its own, which measures a round whenever it is told to."""

    def __init__(self, name: str, transfer: dict[str, Any] | None, env: dict[str, str], given: argparse.Namespace) -> None:
        self.name, self.rounds = name, list[dict[str, dict[str, float]]]()
        how = ["--worker", json.dumps(transfer), "--tokens", str(given.tokens), "--dtype", given.dtype, "--model", given.model]
        command = [sys.executable, "-m", "benchmarks.vllm_first_token", *how]
        env = {**os.environ, **ENVIRONMENT, **env}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log_of(name), text=True, env=env)

    def answer(self) -> Any:
        """Returns the next answer of the engine, and prints nothing of its chatter."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"{self.name}: the engine ended; see its log")

    def ask(self, number: int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        end(self.process)


def end(process: "subprocess.Popen[Any]") -> None:
    """Wait for the process, and kill it if it takes too long."""
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Servers:
    """The processes that the connectors need beside the engine."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, needs: dict[str, Any], scratch: Path) -> None:
        """Write the files that a connector needs, start its commands, and wait until they accept connections."""
        for file, content in needs.get("files", {}).items():
            (scratch / file).write_text(json.dumps(content))
        port, commands = needs.get("ready"), needs.get("commands", ())
        if port is not None and self.accepts(port):
            raise SystemExit(f"{name}: another process listens on port {port}")
        env = {**os.environ, **needs.get("env", {})}
        started = [subprocess.Popen(command, stdout=log_of(f"{name}-server"), stderr=subprocess.STDOUT, env=env) for command in commands]
        self.processes += started
        deadline_s = time.monotonic() + 120
        while port is not None and not self.accepts(port):
            if any(each.poll() is not None for each in started) or time.monotonic() > deadline_s:
                raise SystemExit(f"{name}: no server on port {port}; see its log")
            time.sleep(0.2)

    @staticmethod
    def accepts(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            end(process)


def serve(given: argparse.Namespace) -> int:
    """Measure a round for each number read, and write it as a line of JSON. The engine stays on one core, so that others disturb less."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    bench = Bench(given.model, given.tokens, given.dtype, json.loads(given.worker))
    bench.round(0)  # warm up
    hooks = timed_hooks()
    print(f"{MARK}{json.dumps('ready')}", flush=True)
    for line in sys.stdin:
        for taken in hooks.values():
            taken.clear()
        steps = bench.round(int(line))
        print(f"{MARK}{json.dumps({'steps': steps, 'hooks_ms': hooks})}", flush=True)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path.home() / ".cache/tiered_kv/models/smollm2-135m-instruct"))
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cluster", default="bench", help="the cluster of tiered_kv")
    parser.add_argument("--peers", type=Path, help="a JSON file with other connectors")
    parser.add_argument("--peers-packages", type=Path, default=Path("build/peers"), help="the folder with the peers' packages")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="compare these alone")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def peers(given: argparse.Namespace, scratch: Path) -> Any:
    """Returns the connectors of the file of peers, with the placeholders filled in."""
    text = given.peers.read_text()
    for name, value in (("python", sys.executable), ("peers", given.peers_packages.resolve()), ("tmp", scratch)):
        text = text.replace("{" + name + "}", json.dumps(str(value))[1:-1])
    return json.loads(text)


def ours(cluster: str) -> dict[str, Any]:
    """Returns vLLM's `kv_transfer_config` for our connector."""
    return {
        "kv_connector": "TieredKV",
        "kv_connector_module_path": "tiered_kv.integrations.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cluster": cluster},
    }


def connectors(given: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Returns what is compared, by name."""
    found = {"vllm alone": {"transfer": None}, "tiered_kv": {"transfer": ours(given.cluster)}} | (
        peers(given, scratch) if given.peers else {}
    )
    if unknown := set(given.only or ()) - set(found):
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}; known are {', '.join(found)}")
    return {name: found[name] for name in given.only or found}


def main() -> int:
    given = parsed()
    if given.worker:
        return serve(given)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="vllm-first-token-", dir=memory) as scratch:
        result, rounds = compare(connectors(given, Path(scratch)), given, Path(scratch))
    print(json.dumps(result, indent=1))
    if given.output:
        given.output.write_text(json.dumps(result | {"rounds": rounds}, indent=1) + "\n")
    return 1 if result["faults"] else 0


def compare(compared: dict[str, dict[str, Any]], given: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Start what is compared, and return the figures and the rounds behind them."""
    servers, turns = Servers(), list[Turn]()
    hooks: dict[str, dict[str, list[float]]] = {}
    found: dict[str, list[str]] = {}
    try:
        for name, each in compared.items():
            servers.start(name, each, scratch)
            turns.append(Turn(name, each["transfer"], each.get("env", {}), given))
            turns[-1].answer()
        seed = int(time.time())  # fresh prompts: an earlier run may have stored the same
        for number in range(given.rounds):
            for turn in turns:
                answer = turn.ask(seed + number)
                turn.rounds.append(answer["steps"])
                for hook, taken in answer["hooks_ms"].items():
                    hooks.setdefault(turn.name, {}).setdefault(hook, []).extend(taken)
                shown = {step: f"{taken['seconds'] * 1e3:.0f} ms" for step, taken in answer["steps"].items()}
                others = max(taken["others"] for taken in answer["steps"].values())
                print(number, turn.name, shown, f"others {others:.1f} cores", flush=True)
                for fault in faults(answer["steps"], compared[turn.name]["transfer"] is not None):
                    found.setdefault(turn.name, []).append(f"round {number}: {fault}")
                    print(f"{number} {turn.name} FAULT: {fault}", flush=True)
    finally:
        for turn in turns:
            turn.close()
        servers.close()
    result = {"machine": machine(), "tokens": given.tokens, "dtype": given.dtype, "load": os.getloadavg(), "faults": found}
    result["results"] = {turn.name: summary(turn.rounds) for turn in turns}
    result["hooks_ms"] = {
        name: {hook: {"median": statistics.median(taken), "max": max(taken)} for hook, taken in each.items() if taken}
        for name, each in hooks.items()
    }
    return result, {turn.name: turn.rounds for turn in turns}


def timed_hooks() -> dict[str, list[float]]:
    """Returns lists to which each later load and store of our connector adds its ms; empty for another connector."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    worker = getattr(get_kv_transfer_group(), "_worker", None) if has_kv_transfer_group() else None
    times: dict[str, list[float]] = {}
    for name in ("load", "store") if worker is not None else ():
        hook, taken = getattr(worker, name), times.setdefault(name, [])

        def timed(step: Any, hook: Any = hook, taken: list[float] = taken, name: str = name) -> None:
            begun = time.perf_counter()
            hook(step)
            if step.now if name == "load" else step.stores:
                taken.append((time.perf_counter() - begun) * 1e3)

        setattr(worker, name, timed)
    return times


if __name__ == "__main__":
    sys.exit(main())
