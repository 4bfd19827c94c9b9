"""Measures the speed of a second `generate` with the same long prefix, and the cost of `enable_profiling`, as ratios in one run.

    python benchmarks/library.py [--repeats 7] [--json FILE]

`generate`: the default model in float32, a document of 704 tokens, and a short question that differs each time. The cache is empty
at first. `profiling`: store, match and fetch of a chain of 44 small blocks, of a model of two layers, so that copying does not hide
the difference. It runs with `enable_profiling` on, with it off (in two caches, to see how much equal caches differ), and without the
function that starts profiling. The variants alternate, so that other load on the machine affects all alike.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from tiered_kv import BaseKVCache, KVCacheConfig, TransformersKVCache
from tiered_kv.client.client import Client
from tiered_kv.layout import KVLayout
from tiered_kv.tools import demo
from tiered_kv.tools.bench.fetch import machine
from tiered_kv.tools.demo.model import load_model

PREFIX_TOKENS, QUESTION_TOKENS, BLOCK_TOKENS = 704, 12, 16
NEW_TOKENS = (1, 16)
CALLS, ROUNDS = 20, 60
LAYOUT = KVLayout(2, 3, 64, "float32", BLOCK_TOKENS)
CONFIG = KVCacheConfig(max_tokens=2048, block_tokens=BLOCK_TOKENS)


def seconds(function: Callable, *arguments: object, **options: object) -> float:
    """Returns the seconds of one call."""
    begun_s = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - begun_s


def generate(repeats: int) -> list[dict]:
    """Measure the first and second request for a prefix, and the second without a cache.

    Returns one record per number of generated tokens.
    """
    model, tokenizer = load_model(dtype="float32")
    document = (Path(demo.__file__).parent / "documents" / "longitude.md").read_text()
    text = tokenizer(document, return_tensors="pt")["input_ids"][0]
    prompts = [torch.cat([text[:PREFIX_TOKENS], text[-QUESTION_TOKENS - n :][:QUESTION_TOKENS]])[None] for n in range(2)]
    results = []
    for new_tokens in NEW_TOKENS:
        options = dict(do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        times: dict[str, list[float]] = {"plain": [], "first": [], "second": []}
        model.generate(prompts[0], **options)
        for _ in range(repeats):
            times["plain"].append(seconds(model.generate, prompts[1], **options))
            with TransformersKVCache(CONFIG, model=model, tokenizer=tokenizer) as cache:
                cache.warmup(num_samples=1, seq_len=BLOCK_TOKENS)
                times["first"].append(seconds(model.generate, prompts[0], **options))
                times["second"].append(seconds(model.generate, prompts[1], **options))
                reused = cache.last_report.reused_tokens
        ratios = {f"{a}_over_{b}": _spread(times[a], times[b]) for a, b in (("second", "first"), ("second", "plain"), ("first", "plain"))}
        medians = {f"{name}_s": statistics.median(each) for name, each in times.items()}
        results.append({"new_tokens": new_tokens, "prompt_tokens": prompts[0].shape[1], "reused_tokens": reused, **medians, **ratios})
    return results


def profiling() -> list[dict]:
    """Measure each operation with profiling on and off, relative to a cache without profiling code.

    Returns one record for each.
    """
    kv, ids = torch.randn(LAYOUT.kv_shape(PREFIX_TOKENS)), range(PREFIX_TOKENS)
    out = torch.empty_like(kv)
    with ExitStack() as caches:
        on = caches.enter_context(BaseKVCache(CONFIG.with_(enable_profiling=True), layout=LAYOUT))
        off = caches.enter_context(BaseKVCache(CONFIG, layout=LAYOUT))
        again = caches.enter_context(BaseKVCache(CONFIG, layout=LAYOUT))
        with mock.patch.object(Client, "measure", None):
            without = caches.enter_context(BaseKVCache(CONFIG, layout=LAYOUT))
            without.store(ids, kv)
        named = {"on": on, "off": off, "off again": again, "without": without}
        for cache in named.values():
            cache.store(ids, kv)
        operations = {
            "match": lambda cache: cache.match(ids),
            "fetch": lambda cache: cache.fetch(ids, out),
            "store": lambda cache: cache.store(ids, kv),
        }
        return [_profiled(name, operation, named) for name, operation in operations.items()]


def _profiled(name: str, operation: Callable, caches: dict[str, BaseKVCache]) -> dict:
    times: dict[str, list[float]] = {which: [] for which in caches}
    for turn in range(ROUNDS):
        for which in list(caches)[turn % len(caches) :] + list(caches)[: turn % len(caches)]:
            took = [seconds(operation, caches[which]) for _ in range(CALLS)]
            times[which].append(statistics.median(took))
    ratios = {which: _spread(times[which], times["without"]) for which in caches if which != "without"}
    return {"operation": name, "without_us": statistics.median(times["without"]) * 1e6, "over_without": ratios}


def _spread(above: list[float], below: list[float]) -> dict[str, float]:
    """Returns the median and the quartiles of the ratios between measurements of the same turn."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def main() -> None:
    """Measure, print the figures as JSON, and write them to the file named with --json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {"machine": machine(), "generate": generate(options.repeats), "profiling": profiling()}
    text = json.dumps(report, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
