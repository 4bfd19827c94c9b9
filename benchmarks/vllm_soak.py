"""Many requests through one vLLM engine over a host tier that is too small: memory, files and threads must stay flat.

    tiered-kv up --name soak --host 32MiB
    .venv-vllm/bin/python -m benchmarks.vllm_soak --cluster soak --requests 10000 --output benchmarks/results/vllm-soak.json

Prompts share prefixes, and most of these are evicted before they are asked for again. The exit status is 1 if any figure of the engine's
process or the node's process in the last quarter is more than 5 % above that of the third quarter. Every answer is
compared with the first answer to the same prompt.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.vllm_first_token import ENVIRONMENT, machine, ours

GROWTH_MAX = 0.05
BATCH = 32


def figures(pid: int) -> dict[str, float]:
    """Returns the resident memory that is not shared in MiB, the open files and the threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.count(":") and len(line.split()) > 1}
    return {"rss_mib": int(fields["RssAnon"]) / 1024, "files": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(fields["Threads"])}


def grown(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the figures whose median in the last quarter is more than GROWTH_MAX above that in the quarter before, with the growth."""
    quarter = len(samples) // 4
    third, last = samples[-2 * quarter : -quarter], samples[-quarter:]
    found = {}
    for process in ("engine", "node"):
        for name in samples[0][process]:
            before, after = (statistics.median(each[process][name] for each in part) for part in (third, last))
            if after > before * (1 + GROWTH_MAX):
                found[f"{process} {name}"] = after / before - 1
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path.home() / ".cache/tiered_kv/models/smollm2-135m-instruct"))
    parser.add_argument("--cluster", default="soak")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> int:
    given = parsed()
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    from tiered_kv.protocol.node_record import records_below

    node = next(record.pid for record in records_below("/dev/shm") if record.cluster == given.cluster)
    llm = LLM(
        given.model,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        disable_log_stats=False,
        kv_transfer_config=ours(given.cluster),
        num_gpu_blocks_override=64,
    )
    random_source, one = random.Random(7), SamplingParams(temperature=0, max_tokens=2)
    prefixes = [[random_source.randrange(100, 40000) for _ in range(384)] for _ in range(200)]
    first: dict[tuple[int, int], list[int]] = {}
    samples, cached, wrong, begun = list[dict[str, Any]](), 0, 0, time.monotonic()
    for number in range(0, given.requests, BATCH):
        places = [(random_source.randrange(200), random_source.randrange(4)) for _ in range(BATCH)]
        prompts = [{"prompt_token_ids": [*prefixes[prefix], *range(1000 + ending, 1020 + ending)]} for prefix, ending in places]
        for place, output in zip(places, llm.generate(prompts, one, use_tqdm=False), strict=True):
            answer = list(output.outputs[0].token_ids)
            wrong += first.setdefault(place, answer) != answer
            cached += output.num_cached_tokens or 0
        if number // BATCH % 5 == 0:
            samples.append({"requests": number, "engine": figures(os.getpid()), "node": figures(node)})
            if number // BATCH % 50 == 0:
                print(
                    f"{number} requests in {time.monotonic() - begun:.0f} s, {cached} tokens cached, {wrong} other answers",
                    samples[-1],
                    flush=True,
                )
    growth = grown(samples)
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics() if "tiered_kv" in metric.name}
    result = {"machine": machine(), "requests": given.requests, "seconds": time.monotonic() - begun, "load": os.getloadavg()}
    result |= {"cached_tokens": cached, "other_answers": wrong, "growth_above_5_percent": growth, "metrics": metrics}
    print(json.dumps(result, indent=1))
    if given.output:
        given.output.write_text(json.dumps(result | {"samples": samples[:: max(len(samples) // 40, 1)]}, indent=1) + "\n")
    return 1 if growth or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
