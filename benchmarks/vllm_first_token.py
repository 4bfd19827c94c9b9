"""Time to first token in vLLM: cold, vLLM's own prefix cache, and a reload from tiered_kv after vLLM's cache was emptied and zeroed.

    .venv-vllm/bin/python -m benchmarks.vllm_first_token --rounds 10 --output benchmarks/results/vllm-first-token.json

Needs the virtual environment of `make test-vllm`, and a running cluster (`tiered-kv up --name bench --host 1GiB`). The three are measured
in turn in each round, on one prompt a round, in one engine in this process. So only differences within a round count. Two engines: with
the connector, and without it for the price of storing. `--connector` names another connector with its settings, for a comparison.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
QUIET_CORES = 0.3
"""A step counts as quiet if other processes used less than this meanwhile, in cores."""


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

    def round(self, number: int) -> dict[str, dict[str, float]]:
        ids = self.prompt(number)
        self.forget()
        steps = {"cold": self.first_token(ids), "repeat": self.first_token(ids)}
        self.forget()
        steps["reload"] = self.first_token(ids)
        steps["repeat again"] = self.first_token(ids)
        return steps


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


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path.home() / ".cache/tiered_kv/models/smollm2-135m-instruct"))
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cluster", default="bench")
    parser.add_argument("--connector", help="another connector's --kv-transfer-config as JSON; 'none' for vLLM's own cache only")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> int:
    given = parsed()
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    ours = {
        "kv_connector": "TieredKV",
        "kv_connector_module_path": "tiered_kv.integrations.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cluster": given.cluster},
    }
    transfer = ours if not given.connector else None if given.connector == "none" else json.loads(given.connector)
    bench = Bench(given.model, given.tokens, given.dtype, transfer)
    bench.round(0)  # warm up
    hooks = timed_hooks()
    rounds = []
    seed = int(time.time())  # fresh prompts: a run before this one may have stored the same
    for number in range(given.rounds):
        rounds.append(bench.round(seed + number))
        print(
            number,
            {
                name: f"{step['seconds'] * 1e3:.0f} ms, {step['cached']} cached, others {step['others']:.2f}"
                for name, step in rounds[-1].items()
            },
        )
    found = {"connector": transfer and transfer["kv_connector"], "tokens": given.tokens, "dtype": given.dtype, "load": os.getloadavg()}
    found |= summary(rounds)
    found["hooks_ms"] = {name: {"median": statistics.median(taken), "max": max(taken)} for name, taken in hooks.items() if taken}
    print(json.dumps(found, indent=1))
    if given.output:
        given.output.write_text(json.dumps(found | {"all": rounds}, indent=1) + "\n")
    return 0


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
            if step.now or step.stores:
                taken.append((time.perf_counter() - begun) * 1e3)

        setattr(worker, name, timed)
    return times


if __name__ == "__main__":
    sys.exit(main())
