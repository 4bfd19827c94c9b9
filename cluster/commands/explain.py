"""The command `explain`: shows where the blocks of a prompt are, or why each would be a miss."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tiered_kv.cluster.commands.command import add_command
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import DEFAULT_TENANT, Namespace

if TYPE_CHECKING:
    from tiered_kv.blocks import Explained
    from tiered_kv.client.client import Client
    from tiered_kv.protocol.explanation import KnownNamespace

SHOWN = 12
"""The most characters of a namespace's field in a message."""
WAIT_S = 8.0
"""How long the command waits for the node on this machine, which may be busy."""
TEXT = (
    "Show for each block of a prompt in which tier of which node it is, or why it would be a miss: never stored, evicted (from where, "
    "when, why), stored under another namespace (and which field differs), damaged, removed, refused, or on a node that does not answer. "
    "Run it on a machine with a node of the cluster. See docs/explain.md."
)
EXAMPLES = (
    "tiered-kv explain --tokens prompt.json\n"
    '  tiered-kv explain "Why is the sky blue?" --model Qwen/Qwen3-0.6B --dtype bfloat16\n'
    "  tiered-kv explain --tokens - --namespace dtype=bfloat16 --tenant acme --json < prompt.json"
)


def add_explain(commands: Any, add_name: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `explain` to the parser's `commands`."""
    summary = "Show for each block of a prompt in which tier it is, or why it would be a miss."
    command = add_command(commands, "explain", TEXT, EXAMPLES, _explain, summary)
    command.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt as text; needs --model, whose tokenizer makes the tokens")
    command.add_argument(
        "--tokens", metavar="FILE", help="file with the prompt's token ids: a JSON list, or numbers between spaces; - for input"
    )
    command.add_argument(
        "--model", help="Hugging Face id or folder of the model (default: the namespace that workers of this machine's node use)"
    )
    command.add_argument("--dtype", default="auto", help="dtype in which the workers load the model (default: that of its files)")
    text = "which of the namespaces that the node knows, by the start of its fields' values, for example dtype=bfloat16,weights=3f2a"
    command.add_argument("--namespace", metavar="FIELD=START,…", help=text)
    command.add_argument("--tenant", default=DEFAULT_TENANT, help=f"the tenant of the workers (default: {DEFAULT_TENANT})")
    command.add_argument(
        "--also-tenant",
        metavar="TENANT",
        action="append",
        default=[],
        help="look also among this tenant's blocks; may be given several times",
    )
    add_name(command)
    command.add_argument("--json", action="store_true", help="print one record for each block as JSON")


def _explain(options: argparse.Namespace, console: Console) -> int:
    if (options.prompt is None) == (options.tokens is None):
        raise TieredKVError(Kind.CONFIG, "explain: must be given either a PROMPT or --tokens FILE, not both", setting="tokens")
    if options.prompt is not None and options.model is None:
        raise TieredKVError(Kind.CONFIG, "--model: must be given with a PROMPT, because its tokenizer makes the tokens", setting="model")
    if options.model is not None and options.namespace is not None:
        raise TieredKVError(Kind.CONFIG, "--namespace: not allowed with --model, which determines the namespace", setting="namespace")
    token_ids = None if options.tokens is None else read_tokens(options.tokens)
    client, token_ids = _of_model(options, token_ids) if options.model else (_of_node(options), token_ids)
    with client:
        records = client.explain(token_ids, also_tenants=options.also_tenant)
        report = report_of(records, client, len(token_ids))
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, console)
    return 0


def read_tokens(path: str) -> list[int]:
    """Returns the token ids in a file, or in standard input for `-`. Raises (kind `config`) unless it has whole numbers only."""
    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            with open(path) as file:
                text = file.read()
        found = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    except (OSError, ValueError) as error:  # ValueError includes invalid JSON and invalid UTF-8
        why = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise TieredKVError(
            Kind.CONFIG, f"--tokens: {path} must be a JSON list of token ids, or numbers between spaces ({why})", setting="tokens"
        ) from error
    if not found or not all(type(each) is int for each in found):
        got = "none" if not found else f"{next(each for each in found if type(each) is not int)!r:.60}"
        raise TieredKVError(Kind.CONFIG, f"--tokens: {path} must be a flat list of whole numbers, got {got}", setting="tokens")
    return found


def _of_model(options: argparse.Namespace, token_ids: list[int] | None) -> "tuple[Client, list[int]]":
    """Returns a client for the model that is named on the command line, and the prompt's token ids."""
    from tiered_kv.tools.demo.named_model import attach_model

    known = [Namespace(**each["namespace"]).plain() for each in _known(options)]  # raises if there is no node, before a model is loaded
    client, tokenizer = attach_model(options.name, options.model, options.dtype, options.tenant, known)
    return client, token_ids if token_ids is not None else list(tokenizer(options.prompt)["input_ids"])


def _known(options: argparse.Namespace) -> "list[KnownNamespace]":
    """Returns the namespaces of the tenant that the node on this machine knows. Raises (kind `cluster`) if there is no node."""
    from tiered_kv.protocol.unix_socket import SocketSession

    session = SocketSession(f"{_node(options)['directory']}/sock", WAIT_S)
    try:
        return session.namespaces(options.tenant)
    finally:
        session.close()


def _node(options: argparse.Namespace) -> Any:
    from tiered_kv.cluster import attach
    from tiered_kv.cluster.localnodes import LocalNodes

    attach.reach(options.name)
    info = LocalNodes(options.name).find()
    if info is None:
        message = f"no node of cluster {options.name!r} answers on this machine; run this command on a machine with a cache node"
        raise TieredKVError(Kind.CLUSTER, message, name=options.name)
    return info


def _of_node(options: argparse.Namespace) -> "Client":
    """Returns a client for the namespace that the node's workers use, and that the options name."""
    from tiered_kv.client.connect import client_of
    from tiered_kv.cluster.localnodes import LocalNodes
    from tiered_kv.layout import layout_of

    chosen = choose(_known(options), options.namespace, options.tenant)
    described = {"rope": chosen["rope"], "rope_halves": chosen["rope_halves"]}  # as the workers described it, so that nothing changes
    namespace = Namespace(**chosen["namespace"]).plain()
    nodes = LocalNodes(options.name)
    return client_of(_node(options), layout_of(chosen["layout"]), namespace, find=nodes.find, must_answer=True, **described)


def choose(known: "Sequence[KnownNamespace]", wanted: str | None, tenant: str) -> "KnownNamespace":
    """Returns the only known namespace whose fields start with the wanted values. Namespaces that differ in their epoch count as one.

    Raises (kind `config`) if `wanted` is malformed, or fits no namespace or several.
    """
    starts = _starts(wanted)
    fitting = {}
    for each in known:
        values = each["namespace"]
        if all(_fits(str(values.get(name, "")), start) for name, start in starts.items()):
            plain = Namespace(**each["namespace"]).plain()
            fitting.setdefault((plain, json.dumps(each["layout"], sort_keys=True)), each)  # the newest is first
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if not known:
        message = f"--tenant: no worker of tenant {tenant!r} has attached to this machine's node since it started; give --model"
        raise TieredKVError(Kind.CONFIG, message, setting="tenant")
    among = "; ".join(_described(each) for each in (fitting.values() or known))
    problem = "fits none of these namespaces" if not fitting else "must fit one of these namespaces"
    raise TieredKVError(Kind.CONFIG, f"--namespace: {wanted or ''!r} {problem}: {among}", setting="namespace")


def _fits(value: str, start: str) -> bool:
    """Returns whether a field's value begins with `start`. An empty `start` fits an empty value only."""
    return value.startswith(start) if start else not value


def _starts(wanted: str | None) -> dict[str, str]:
    names = [field.name for field in fields(Namespace)]
    pairs = [part.partition("=") for part in wanted.split(",")] if wanted else []
    for name, equals, _ in pairs:
        if not equals or name.strip() not in names:
            message = f"--namespace: must be FIELD=START,… with FIELD one of {', '.join(names)}, got {wanted!r:.200}"
            raise TieredKVError(Kind.CONFIG, message, setting="namespace")
    return {name.strip(): start for name, _, start in pairs}


def _described(known: "KnownNamespace") -> str:
    """Returns a namespace's fields as text, without those that have no value."""
    values = {
        name: value for name, value in known["namespace"].items() if value and name not in ("salt", "tenant", "world", "weight_epoch")
    }
    layout = known["layout"]
    return ", ".join([*(f"{name}={value!s:.{SHOWN}}" for name, value in values.items()), f"{layout['block_tokens']} tokens a block"])


def report_of(records: "Sequence[Explained]", client: "Client", tokens: int) -> dict[str, Any]:
    """Returns what the command prints as JSON: the namespace, the number of blocks by reason, and a record of each block."""
    namespace = {name: value for name, value in asdict(client.namespace).items() if name != "salt"}
    counts = Counter(str(record.why) for record in records)
    step = client.layout.block_tokens
    return {
        "namespace": namespace,
        "block_tokens": step,
        "tokens": tokens,
        "hit_tokens": next((each.block for each in records if each.tier is None), len(records)) * step,
        "whys": dict(counts),
        "blocks": [asdict(record) for record in records],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print one line for each run of blocks with the same outcome."""
    step, blocks = report["block_tokens"], report["blocks"]
    if not blocks:
        console.print(f"the prompt of {report['tokens']} tokens has no whole block of {step} tokens, so nothing of it is stored")
        return
    table = Table("blocks", "tokens", "tier", "why")
    for (tier, _, reason), run in groupby(blocks, lambda each: (each["tier"], each["why"], each["reason"])):
        together = list(run)
        first, last = together[0]["block"], together[-1]["block"]
        table.add_row(_span(first, last), _span(first * step, (last + 1) * step - 1), tier or "–", reason)
    console.print(table)
    console.print(f"a fetch would return {report['hit_tokens']:,} of {report['tokens']:,} tokens", highlight=False)


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"
