"""Compares the speed of same-node look-up, fetch and store of this checkout with that of another commit, in one run.

Each commit has a node and a worker process of its own. The workers take turns of a few operations, so that a change of the
machine's load meets both. Every fetched byte is compared with the stored one.

    python -m benchmarks.against ed2fb5d
    python -m benchmarks.against ed2fb5d --rounds 100 --output benchmarks/results/against-ed2fb5d.json
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
SIZES = (64 << 10, 1 << 20, 3 << 20)
CHAINS = (1, 8)
OPERATIONS = ("store", "look-up", "fetch")
TURN = 8
KEPT = 16  # this many chains of the largest case fit in the node's memory, and each turn fetches other ones


def main() -> None:
    """Compare, print a table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=40, help=f"turns of {TURN} operations for each case and commit (default: 40)")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=SIZES, metavar="BYTES", help="bytes of a block")
    parser.add_argument("--output", type=Path, help="where to write the report as JSON")
    given = parser.parse_args()
    with _checkout(given.commit) as other, _worker(other) as before, _worker(ROOT) as now:
        lines = [line for size in given.sizes for chain in CHAINS for line in _compare(before, now, size, chain, given.rounds)]
    report = {"commit": given.commit, "rounds": given.rounds, "turn": TURN, "load_1min": os.getloadavg()[0], "results": lines}
    if given.output:
        given.output.write_text(json.dumps(report, indent=1) + "\n")


def _compare(before: subprocess.Popen, now: subprocess.Popen, size: int, chain: int, rounds: int) -> list[dict]:
    """Measure one case on both commits. Returns one line per operation."""
    seconds: dict[str, tuple[list[float], list[float]]] = {operation: ([], []) for operation in OPERATIONS}
    for turn in range(rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        for which in order:
            for operation, measured in _ask((before, now)[which], {"size": size, "chain": chain, "turn": turn}).items():
                seconds[operation][which].extend(measured)
    lines = []
    for operation, (old, new) in seconds.items():
        line = {"operation": operation, "block_bytes": size, "chain": chain}
        for name, measured in (("before", old), ("now", new)):
            line |= {f"{name}_us_per_block": _us(median(measured), chain), f"{name}_us_p10": _us(_p10(measured), chain)}
        line |= {"ratio": round(median(new) / median(old), 3), "ratio_p10": round(_p10(new) / _p10(old), 3)}
        line |= {"ratio_min": round(min(new) / min(old), 3)}
        case = f"{operation:8} {size >> 10:5} KiB x {chain}: {line['before_us_per_block']:9.2f} -> {line['now_us_per_block']:9.2f} us/block"
        print(f"{case}, ratio {line['ratio']:.3f}, of p10 {line['ratio_p10']:.3f}, of minima {line['ratio_min']:.3f}", flush=True)
        lines.append(line)
    return lines


def _us(seconds: float, chain: int) -> float:
    return round(seconds * 1e6 / chain, 2)


def _p10(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 10]


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    """A checkout of the commit in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tkv-against-") as folder:
        subprocess.run(["git", "worktree", "add", "--detach", "--force", folder, commit], cwd=ROOT, check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


@contextlib.contextmanager
def _worker(checkout: Path) -> Iterator[subprocess.Popen]:
    """A process that measures the code of the checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with subprocess.Popen(command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        yield worker
        worker.stdin.close()


def _ask(worker: subprocess.Popen, case: dict) -> dict:
    worker.stdin.write(json.dumps(case) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def _serve() -> None:
    """Measure the cases that standard input names, one turn each."""
    if Path("tiered_kv/tools").is_dir():
        from tiered_kv.client.connect import client_of
        from tiered_kv.tools.bench import fetch

        node = fetch.subprocess_node({"host": "1GiB"})
    else:  # commits before the present layout of folders
        from tiered_kv.bench import fetch
        from tiered_kv.service.attachment import client_of

        node = fetch.subprocess_node("1GiB")
    buffers, case, client = fetch.Buffers(), None, None
    with node as info:
        for line in sys.stdin:
            asked = json.loads(line)
            wanted = fetch.Case(fetch.LAYOUTS[asked["size"]], asked["chain"])
            if wanted != case:
                if client is not None:
                    client.close()
                case, client = wanted, client_of(info, wanted.layout, fetch.NAMESPACE)
            print(json.dumps(_turn(fetch, client, case, buffers, asked["turn"])), flush=True)
        if client is not None:
            client.close()


def _turn(fetch, client, case, buffers, turn: int) -> dict[str, list[float]]:
    """Store new chains; look up and fetch some of those stored before. Returns the seconds of each operation."""
    kept = KEPT * TURN if case.nbytes <= 4 << 20 else KEPT
    numbers = range(turn * TURN, (turn + 1) * TURN)
    seconds: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    for number in numbers:
        ids, kv = fetch.token_ids(case, number), buffers.source(case, number)
        stored = fetch._timed(lambda ids=ids, kv=kv: client.store(ids, kv), seconds["store"])
        fetch._check(stored.new == case.chain, case)
    for number in numbers:
        chain = max(0, number - kept // 2)
        ids, out = fetch.token_ids(case, chain), buffers.target(case)
        keys = fetch.NAMESPACE.chain(case.layout).keys(fetch.as_token_ids(ids))
        fetch._timed(lambda keys=keys: client._source.find(keys), seconds["look-up"])
        had = fetch._timed(lambda ids=ids, out=out: client.fetch(ids, out), seconds["fetch"])
        fetch._check(had.tokens == case.tokens and fetch._same(out, buffers.source(case, chain)), case)
    return seconds


if __name__ == "__main__":
    _serve() if sys.argv[1:] == ["--serve"] else main()
