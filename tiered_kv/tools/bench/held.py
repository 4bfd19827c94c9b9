"""`bench held`: the hit ratio of a workload with a codec, in host memory that is too small for the workload.

The workload is the demo's questions about long documents, with the model's own KV. Each prompt is fetched, and its missing blocks
are stored. There are two orders. `demo` asks all questions about a document one after the other, as the demo does. `turn` asks
one question about each document in turn: a document is asked about again only after all others, which is the worst case for a
cache that cannot hold all of them. The hit ratio is tokens fetched divided by tokens requested, from a cold start. W is the host
memory that is just enough for all blocks without a codec.
"""

import time
from collections.abc import Callable, Sequence
from itertools import product, takewhile
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import tiered_kv
from tiered_kv.config import format_size
from tiered_kv.integrations.prefix import prefix_kv
from tiered_kv.integrations.rope import rope_of_model
from tiered_kv.integrations.transformers import cache_from_kv, kv_from_cache
from tiered_kv.layout import KVLayout
from tiered_kv.tools.bench.fetch import machine
from tiered_kv.tools.bench.subject import Subject
from tiered_kv.tools.demo.workload import own_questions, prompt_ids

LogLine = Callable[[str], None]
SHARES, SHARES_QUICK = (0.25, 0.3, 0.4, 0.5, 0.55, 0.6, 0.8, 1.0, 2.0), (0.25, 0.5, 1.0)
ORDERS = ("demo", "turn")
QUALITIES = ("exact", "near_exact")
QUESTIONS, QUESTIONS_QUICK = 5, 2
AMPLE_BYTES = 2 << 30
LOOK_S, SETTLE_S_MAX = 0.02, 5.0


class DocumentPrompt(NamedTuple):
    """A prompt about a document, and its KV (L, 2, H, T, D) in the dtype of the cache."""

    title: str
    ids: list[int]
    kv: torch.Tensor


class WorkloadResult(NamedTuple):
    """The figures of one run of the workload. `codecs`: the node's counts of blocks by codec in host memory."""

    asked_tokens: int
    hit_tokens: int
    used_bytes: int
    capacity_bytes: int
    codecs: dict[str, Any]


def run_held_bench(model: str = "default", quick: bool = False, log: LogLine = print) -> dict:
    """Measure the hit ratios. Returns the report.

    Takes two minutes, most of it for computing the KV. Raises what `Subject.load` raises if the model cannot be loaded.
    """
    subject = Subject.load(model)
    in_turn = requests_of(subject, QUESTIONS_QUICK if quick else QUESTIONS, log)
    requests = sorted(in_turn, key=lambda request: request.title)
    layout = KVLayout(requests[0].kv.shape[0], requests[0].kv.shape[2], requests[0].kv.shape[4], "bfloat16")
    namespace = tiered_kv.Namespace.of(subject.model, subject.tokenizer)
    cache = {"layout": layout, "namespace": namespace, "rope": rope_of_model(subject.model)}
    ample = held({"host": AMPLE_BYTES}, requests, cache)
    enough_bytes = _whole_mib(ample.used_bytes * AMPLE_BYTES / ample.capacity_bytes)
    log(f"{len(requests)} requests, {ample.asked_tokens:,} tokens; W (holds all blocks without a codec): {format_size(enough_bytes)}")
    results = []
    for order, quality, share in product(ORDERS, QUALITIES, SHARES_QUICK if quick else SHARES):
        host = _whole_mib(share * enough_bytes)
        found = held({"host": host, "quality": quality}, requests if order == "demo" else in_turn, cache)
        ratio = found.hit_tokens / found.asked_tokens
        log(f"order {order}, {quality} in {share:g} W, {format_size(host)}: hit ratio {ratio:.4f}")
        facts = {"order": order, "quality": quality, "share": share, "host_bytes": host, "hit_ratio": ratio}
        results.append(facts | found._asdict())
    return {"machine": machine(), "model": model, "requests": len(requests), "enough_bytes": enough_bytes, "results": results}


def requests_of(subject: Subject, per_document: int, log: LogLine) -> list[DocumentPrompt]:
    """Returns requests with their KV: one question about each document in turn, `per_document` times.

    The KV of each document is computed only once.
    """
    asked = own_questions(per_document)
    in_turn = [question for number in range(per_document) for question in asked[number::per_document]]
    first: dict[str, DocumentPrompt] = {}
    requests = []
    for number, question in enumerate(in_turn, 1):
        ids = prompt_ids(subject.tokenizer, question)
        requests.append(DocumentPrompt(question.title, ids, _computed(subject.model, ids, first.get(question.title))))
        first.setdefault(question.title, requests[-1])
        log(f"computed the KV of prompt {number} of {len(in_turn)}: {len(ids)} tokens")
    return requests


@torch.inference_mode()
def _computed(model: Any, ids: list[int], before: DocumentPrompt | None) -> torch.Tensor:
    """Returns the KV of a prompt in bf16. The KV of the prefix that the prompt shares with `before` is copied from `before`."""
    tokens = torch.tensor([ids])
    if before is None:
        return prefix_kv(model, tokens, torch.bfloat16)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], before.ids, strict=False)))
    head = before.kv[..., :common, :]
    cache = cache_from_kv(head.to(model.dtype), model.config)
    cache = model(tokens[:, common:], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return torch.cat([head, kv_from_cache(cache, common, len(ids)).bfloat16()], 3)


def held(config: dict[str, Any], requests: Sequence[DocumentPrompt], cache: dict[str, Any]) -> WorkloadResult:
    """Run the workload once from a cold start, in a cache with the settings `config`. Returns its figures.

    `cache`: the arguments of `tiered_kv.open` that describe the model. Waits after each request until the node's background work
    is done: in real use there is time for it while the model computes.
    """
    asked = hit = 0
    with tiered_kv.open(config, **cache) as client:
        for request in requests:
            found = client.fetch(request.ids).tokens
            client.store(request.ids, request.kv[..., found:, :], start=found)
            asked, hit = asked + len(request.ids), hit + found
            node = _settled(client)
    host = node["tiers"]["host"]
    return WorkloadResult(asked, hit, host["used_bytes"], host["capacity_bytes"], node["codecs"]["coded"].get("host", {}))


def _settled(client: tiered_kv.Client) -> dict[str, Any]:
    """Wait until the node's statistics no longer change, at most `SETTLE_S_MAX` seconds. Returns the last statistics."""
    end_s = time.monotonic() + SETTLE_S_MAX
    before, node = None, client.stats()["node"]
    while (node["tiers"], node["codecs"]["coded"]) != before and time.monotonic() < end_s:
        before = node["tiers"], node["codecs"]["coded"]
        time.sleep(LOOK_S)
        node = client.stats()["node"]
    return node


def _whole_mib(nbytes: float) -> int:
    return -(-int(nbytes) // (1 << 20)) << 20


def show(report: dict, console: Console) -> None:
    """Print the report as a table, and compare near_exact with exact in twice the memory."""
    shares = sorted({each["share"] for each in report["results"]})
    table = Table(title=f"tiered-kv bench held: hit ratio of the demo's workload, W = {format_size(report['enough_bytes'])} of host memory")
    table.add_column("order")
    table.add_column("quality")
    for share in shares:
        table.add_column(f"{share:g} W", justify="right")
    ratios = {(each["order"], each["quality"], each["share"]): each["hit_ratio"] for each in report["results"]}
    for order, quality in product(ORDERS, QUALITIES):
        table.add_row(order, quality, *(f"{ratios[order, quality, share]:.4f}" for share in shares))
    console.print(table)
    for order in ORDERS:
        gained = {share: ratios[order, "near_exact", share] - ratios[order, "exact", 2 * share] for share in shares if 2 * share in shares}
        words = ", ".join(f"{100 * points:+.1f} points at {share:g} W" for share, points in gained.items())
        console.print(f"order {order}: near_exact compared with exact in twice the memory: {words}", highlight=False, soft_wrap=True)
