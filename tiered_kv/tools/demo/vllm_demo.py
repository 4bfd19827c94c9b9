"""Runs the demo with vLLM: OpenAI servers share the prefixes of long documents, and their outputs are compared with cold runs."""

import itertools
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tiered_kv.cluster import start, status
from tiered_kv.cluster.stop import down
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.demo import report, workload
from tiered_kv.tools.demo.model import ensure_default_model
from tiered_kv.tools.demo.vllm_server import VllmServer, check_installed, stop, transfer_config

if TYPE_CHECKING:
    from tiered_kv.tools.demo.run import DemoOptions

OWN = "vllm"
"""The name under which the tiers of a request list vLLM's own prefix cache."""
SAY_EVERY_S = 10
REFERENCES = {
    "float32": "a cold run of the same prompt on the same server, with a cache salt that no request has used",
    "bfloat16": "the same prompt twice with a cache salt of its own: the second run, from vLLM's own prefix cache",
}


def run_vllm_demo(options: "DemoOptions", config: Config, console: Console) -> dict:
    """Run the demo with vLLM and print its tables.

    Returns the results as data for JSON, with the fields of the demo with transformers. At the end everything that it started is
    stopped, also after an error, Ctrl-C or SIGTERM.
    """
    from tiered_kv.tools.demo.run import prompts_of

    check_installed()
    asked = workload.questions_from(options.prompts) if options.prompts else workload.own_questions(options.questions)
    model = options.model or str(ensure_default_model(console.print))
    prompts, tokenizer = prompts_of(model, asked, options.new_tokens)
    name = f"demo-vllm-{os.getpid()}"
    with ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tkv-demo-"))
        stack.enter_context(_own_state(folder))
        start.up(config, name=name, nodes=options.nodes, log=console.print)
        stack.callback(down, name)
        nodes = [node["node"] for node in start.describe(name)["nodes"]]
        longest = max(map(len, prompts)) + options.new_tokens
        servers = _started(stack, options, model, (name, nodes), Path(folder), longest)
        _wait(servers, console)
        about = _about(servers[0])
        requests = _ask(options, servers, asked, prompts, console)
        cluster = status.summarize(start.describe(name))
        console.print("stopping the servers and the cluster", highlight=False)
    for request in requests:
        request |= {name: tokenizer.decode(request[f"{name.removesuffix('text')}ids"]) for name in ("output_text", "reference_text")}
    result = {"engine": "vllm", **report.summarize(options, about, requests, cluster, config), "reference": REFERENCES[options.dtype]}
    show(result, console)
    return result


# Servers


def _started(
    stack: ExitStack, options: "DemoOptions", model: str, cluster: tuple[str, list[str]], logs: Path, longest_tokens: int
) -> list[VllmServer]:
    """Start the servers, each on the next node of the cluster in turn."""
    name, nodes = cluster
    servers: list[VllmServer] = []
    stack.callback(stop, servers)
    for number in range(options.replicas):
        transfer = transfer_config(name, node=nodes[number % len(nodes)])
        more = ["--dtype", options.dtype, "--max-model-len", str(longest_tokens)]
        server = VllmServer(chr(ord("A") + number % 26), model, transfer, logs, more, options.replicas)
        servers.append(server)
    return servers


def _wait(servers: Sequence[VllmServer], console: Console) -> None:
    """Wait until all servers can answer. Prints a line every SAY_EVERY_S seconds."""
    names = ", ".join(f"{server.name} (port {server.port})" for server in servers)
    console.print(f"starting {len(servers)} OpenAI servers of vLLM: {names}", highlight=False)
    waited_s = 0
    for server in servers:
        for _ in server.wait():
            waited_s += 1
            if not waited_s % SAY_EVERY_S:
                console.print(f"  {waited_s} s: waiting for {server.name}; vLLM says: {_last_said(server)}", highlight=False, markup=False)
        console.print(f"  {server.name} is ready", highlight=False)


def _last_said(server: VllmServer) -> str:
    """Returns the message in the last line of a server's log, at most 80 characters, without vLLM's prefix of process, level and time."""
    line = server.log_end(1).splitlines()[-1:] or [""]
    return line[0].rpartition("] ")[2].strip()[:80]


@contextmanager
def _own_state(folder: str) -> Iterator[None]:
    """Keep the cluster's state files below `folder` until the end of the with block, also for processes started in it."""
    before = os.environ.get("TIERED_KV_STATE")
    os.environ["TIERED_KV_STATE"] = str(Path(folder) / "state")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIERED_KV_STATE"]
        else:
            os.environ["TIERED_KV_STATE"] = before


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C until the end of the with block, so that everything that was started is stopped."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# Questions


def _ask(
    options: "DemoOptions", servers: Sequence[VllmServer], asked: list[workload.Question], prompts: list[list[int]], console: Console
) -> list[dict]:
    """Ask each question to the next server in turn. Returns one record for each question.

    The same server then answers the question twice more, with a cache salt that no other request has used: first cold, then from
    vLLM's own prefix cache.
    """
    requests = []
    for number, (question, ids) in enumerate(zip(asked, prompts, strict=True)):
        server = servers[number % len(servers)]
        before = server.metrics()
        answer = server.ask(ids, options.new_tokens)
        counts = _counts(before, server.metrics())
        salt = secrets.token_hex(16)
        cold, repeat = server.ask(ids, options.new_tokens, salt), server.ask(ids, options.new_tokens, salt)
        record = _record(server.name, ids, answer, counts)
        reference = cold if options.dtype == "float32" or not record["reused_tokens"] else repeat
        record |= {
            "in_process_ttft_s": repeat.ttft_s,
            "plain_ttft_s": cold.ttft_s,
            "reference_ids": reference.token_ids,
            "equal": answer.token_ids == reference.token_ids,
        }
        requests.append({"document": question.title, "question": question.question, "prompt_ids": ids, **record})
        by_tier = ", ".join(f"{tokens} from {tier}" for tier, tokens in record["reused_tokens_by_tier"].items()) or "nothing reused"
        if record["unanswered_lookups"]:
            by_tier += " (the other nodes did not answer within ask_nodes_ms)"
        line = f"question {number + 1} of {len(asked)} ({question.title}) to {server.name}: {by_tier}"
        console.print(f"{line}, first token after {answer.ttft_s:.2f} s (cold {cold.ttft_s:.2f} s)", highlight=False)
    return requests


def _counts(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("vllm:"): value - before.get(name, 0.0) for name, value in after.items()}


def _record(replica: str, ids: Sequence[int], answer: Any, counts: dict[str, float]) -> dict:
    """Returns the record of a request. `counts`: by name, how much each metric of the server has grown during the request."""
    own, loaded = int(counts.get("prefix_cache_hits", 0)), int(counts.get("external_prefix_cache_hits", 0))
    blocks = {
        name.rpartition(":")[2]: int(count)
        for name, count in counts.items()
        if name.startswith("tiered_kv_loaded_blocks_by_tier:") and count
    }
    total = sum(blocks.values())
    by_tier = {tier: loaded * count // total for tier, count in blocks.items()} if total else {}
    if own:
        by_tier = {OWN: own, **by_tier}
    new = int(counts.get("tiered_kv_stored_blocks", 0))
    return {
        "replica": replica,
        "prompt_tokens": len(ids),
        "reused_tokens": own + loaded,
        "reused_tokens_by_tier": by_tier,
        "computed_prompt_tokens": len(ids) - own - loaded,
        "ttft_s": answer.ttft_s,
        "fetch_s": counts.get("tiered_kv_load_seconds", 0.0),
        "store_s": counts.get("tiered_kv_store_seconds", 0.0),
        "stored_blocks": {"new": new, "refused": int(counts.get("tiered_kv_refused_blocks", 0))},
        "unanswered_lookups": int(counts.get("tiered_kv_unanswered_lookups", 0)),
        "failed_blocks": int(counts.get("tiered_kv_failed_blocks", 0)),
        "output_ids": answer.token_ids,
    }


def _about(server: VllmServer) -> dict:
    """Returns how many tokens and bytes a block of vLLM has, and the bytes per token.

    Raises (kind `model`) if the server does not use tiered_kv.
    """
    block = server.block()
    if block is None:
        raise TieredKVError(Kind.MODEL, f"vLLM server {server.name} does not use tiered_kv; its log ends:\n{server.log_end()}")
    tokens, nbytes = block
    return {"block_tokens": tokens, "block_bytes": nbytes, "token_bytes": nbytes // tokens}


# Tables


def show(result: dict, console: Console) -> None:
    """Print the requests, the replicas, and the verdict."""
    console.print(_requests_table(result))
    console.print(_replicas_table(result))
    for line in _lines(result):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(result: dict) -> Iterator[str]:
    loads = [request for request in result["requests"] if _loaded(request) * 2 >= request["prompt_tokens"]]
    if loads:
        first, cold, repeat = (
            report.median([request[name] for request in loads]) for name in ("ttft_s", "plain_ttft_s", "in_process_ttft_s")
        )
        yield (
            f"time to first token of the {len(loads)} prompts that tiered_kv has loaded: {first:.2f} s; cold {cold:.2f} s"
            f" ({cold / first:.1f} × longer); from vLLM's own prefix cache {repeat:.2f} s"
        )
    yield (
        f"tokens reused: {result['reused_tokens']} of {result['prompt_tokens']} prompt tokens ({result['token_hit_ratio']:.1%}),"
        f" {sum(map(_loaded, result['requests']))} of them from tiered_kv"
    )
    for request in result["requests"]:
        if not request["equal"]:
            yield f"{request['document']}: {report.difference(request)}"
    color = "green" if result["all_equal"] else "yellow" if result["passed"] else "bold red"
    count, total = result["equal"], len(result["requests"])
    yield f"outputs: {count} of {total} are token for token [{color}]equal[/] to the reference ({result['dtype']}: {result['reference']})"


def _loaded(request: dict) -> int:
    """Returns how many tokens tiered_kv has loaded for a request."""
    return sum(tokens for tier, tokens in request["reused_tokens_by_tier"].items() if tier != OWN)


def _tiers(by_tier: dict[str, int]) -> str:
    return ", ".join(f"{tier} {tokens}" for tier, tokens in by_tier.items() if tier != OWN) or "–"


def _requests_table(result: dict) -> Table:
    table = Table(title="every request")
    table.add_column("document")
    table.add_column("replica")
    for column in ("prompt", "vLLM's cache", "tiered_kv", "first token", "vLLM's repeat", "cold", "equal"):
        table.add_column(column, justify="right")
    for request in result["requests"]:
        by_tier = request["reused_tokens_by_tier"]
        times = (f"{request[name]:.2f} s" for name in ("ttft_s", "in_process_ttft_s", "plain_ttft_s"))
        cells = [str(request["prompt_tokens"]), str(by_tier.get(OWN, 0)), _tiers(by_tier), *times, "yes" if request["equal"] else "NO"]
        table.add_row(request["document"], request["replica"], *cells)
    return table


def _replicas_table(result: dict) -> Table:
    table = Table(title="by replica")
    table.add_column("replica")
    for column in ("requests", "prompt tokens", "vLLM's cache", "tiered_kv", "blocks stored"):
        table.add_column(column, justify="right")
    for replica, group in itertools.groupby(
        sorted(result["requests"], key=lambda request: request["replica"]), lambda request: request["replica"]
    ):
        own = list(group)
        [summary] = [each for each in result["replicas"] if each["replica"] == replica]
        by_tier = summary["reused_tokens_by_tier"]
        stored = sum(request["stored_blocks"]["new"] for request in own)
        table.add_row(replica, str(len(own)), str(summary["prompt_tokens"]), str(by_tier.get(OWN, 0)), _tiers(by_tier), str(stored))
    return table
