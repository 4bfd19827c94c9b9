"""A hostile run: workers store and fetch at full speed while their node is killed, stopped, and its files deleted.

    make hostile MINUTES=20
    python -m tests.hostile.run --minutes 20 --seed 7

Four workers, two of them forked from another after it had used its client, share one node whose host memory and disk are far too
small for what they store: host memory is coded, and everything is evicted all the time. The driver kills the node every 0.2 to 4 s
and starts it again, sometimes with another quality; now and then it hangs it for a second; twice in a run it deletes the node's
folder in shared memory under it. The driver prints JSON: wrong blocks and exceptions must be 0, and after each restart that kept
files and quality nearly all blocks that the index had shown must be shown again. Each worker writes its history, and a store must
explain every fetched block (`tests/history`). Exit status 1 if not.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.history.history import HistoryFiles, wrong_blocks
from tests.hostile.board import Board
from tests.hostile.node import NodeProcess
from tests.hostile.nursery import Nursery
from tiered_kv.blocks import Tier
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.memory import words

DOCUMENTS = 120
SETTINGS = {
    "codec": "host=lossless,disk=lossless",
    "host": "24MiB",
    "disk": "48MiB",
    "disk_segment": "4MiB",
    "block_tokens": 16,
    "store_wait_ms": 100,
    "fetch_deadline_ms": 1000,
}
QUALITIES = ("exact", "near_exact")
CHANGES_QUALITY, HANGS = 0.1, 0.1
"""Shares of the restarts that change the quality, and that come after the node hung."""
KEPT_MIN = 0.999
REMOVALS = 2
MUST_HAPPEN = ("recorded", "checked_blocks", "stored_blocks", "restarts", "shown_on_disk", "shown_coded_in_host")


def shown(directory: Path) -> dict[BlockKey, tuple[int, int]]:
    """Returns the blocks that a node's index shows, read from its file: by key the numbers of tier and codec. Whole slots only."""
    data = memoryview((directory / "index").read_bytes())
    slots = data[: words.HEADER_BYTES].cast("Q")[words.SLOTS]
    table = data[words.HEADER_BYTES : words.ticks_offset(slots)]
    found = {}
    for at in range(0, len(table), words.SLOT_BYTES):
        key, kind, _, _ = words.FIELDS.unpack_from(table, at + words.KEY_OFFSET)
        if kind & 0xFF and not int.from_bytes(table[at : at + 8], sys.byteorder) & 1:
            found[bytes(key[:KEY_BYTES])] = (kind & 0xFF, kind >> 8 & 0xFF)
    return found


class Run:
    """One hostile run: the node, its workers, and what is done to them."""

    def __init__(self, nursery: Nursery, scratch: Path, board: Board, seed: int) -> None:
        self._draw = random.Random(seed)
        self._board = board
        self._quality = QUALITIES[0]
        self.counts: Counter[str] = Counter()
        folder = scratch / "disk"
        folder.mkdir()
        self._node = NodeProcess(nursery, scratch, uuid.uuid4().hex[:8], disk_path=str(folder), **SETTINGS)
        self._node.start()
        self._history = scratch / "history"
        self._history.mkdir()
        shared = {
            "board": str(scratch / "board"),
            "history": str(self._history),
            "cluster": self._node.ids["cluster_id"],
            "documents": DOCUMENTS,
        }
        self._workers = [
            nursery.start("worker", **shared, workers=numbers, seed=self._draw.randrange(1 << 30)) for numbers in ([0, 1, 2], [3])
        ]

    def go(self, seconds: float) -> None:
        """Kill and restart the node until the time is over."""
        begun_s = time.monotonic()
        removals = [seconds * (at + 1) / (REMOVALS + 1) for at in range(REMOVALS)]
        while (past_s := time.monotonic() - begun_s) < seconds:
            time.sleep(self._draw.uniform(0.2, 4.0))
            if removals and past_s >= removals[0]:
                removals.pop(0)
                self._remove_folder()
            else:
                self._kill_and_restart()
        self._board["stop"] = 1
        for worker in self._workers:
            worker.wait(30)

    def _kill_and_restart(self) -> None:
        if self._draw.random() < HANGS:
            self._node.freeze()
            time.sleep(1.0)
            self._node.thaw()
            self.counts["hangs"] += 1
        self._node.kill()
        changes = self._draw.random() < CHANGES_QUALITY
        if changes:
            self._quality = QUALITIES[self._quality == QUALITIES[0]]
            self.counts["quality_changes"] += 1
        if self._quality != QUALITIES[0]:
            self._board["lossy"] = 1
        self._board["pauses"] += 1
        self._pause(signal.SIGSTOP)
        before = shown(self._node.directory)
        self._start()
        after = shown(self._node.directory)
        if self._quality == QUALITIES[0]:
            self._board["lossy"] = 0
        self._pause(signal.SIGCONT)
        self.counts["restarts"] += 1
        self.counts["shown_on_disk"] += sum(tier == Tier.DISK for tier, _ in after.values())
        self.counts["shown_coded_in_host"] += sum(tier == Tier.HOST and codec > 0 for tier, codec in after.values())
        if not changes:
            self.counts["shown_before"] += len(before)
            self.counts["shown_after"] += len(before.keys() & after.keys())

    def _remove_folder(self) -> None:
        shutil.rmtree(self._node.directory)
        self.counts["folders_removed"] += 1
        self._node.child.wait(30)  # a node whose files are gone ends by itself
        self._start()

    def _start(self) -> None:
        exact = self._quality == QUALITIES[0]
        self._node.start(quality=self._quality, codec=SETTINGS["codec"] if exact else None)

    def _pause(self, number: int) -> None:
        """Stops or continues all workers, so that what the index shows can be compared."""
        for worker in self._workers:
            worker.signal(number)

    def result(self) -> dict[str, Any]:
        """Returns the counts of the run, ready for JSON."""
        before, after = self.counts["shown_before"], self.counts["shown_after"]
        history = HistoryFiles(self._history)
        self.counts["recorded"] = sum(1 for _ in history)
        for wrong in wrong_blocks(history):
            self.counts["unexplained_blocks"] += 1
            print(wrong, flush=True)
        return self._board.totals() | dict(self.counts) | {"kept": after / before if before else None}


def hostile_run(seconds: float, seed: int) -> dict[str, Any]:
    """Makes one run and returns its counts."""
    with ExitStack() as ending:
        scratch = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="tkv-hostile-")))
        board = ending.enter_context(Board(scratch / "board"))
        nursery = ending.enter_context(Nursery())
        run = Run(nursery, scratch, board, seed)
        ending.callback(lambda: shutil.rmtree(run._node.directory, ignore_errors=True))
        run.go(seconds)
        return {"seconds": seconds, "seed": seed} | run.result()


def faults_of(result: dict[str, Any]) -> list[str]:
    """Returns a text for each way in which a result is wrong."""
    faults = [f"{name} is {result[name]}, must be 0" for name in ("wrong_blocks", "unexplained_blocks", "exceptions") if result.get(name)]
    if result["kept"] is not None and result["kept"] < KEPT_MIN:
        faults.append(f"only {result['kept']:.4%} of the shown blocks were shown after a restart, must be {KEPT_MIN:.1%}")
    return faults + [f"{name} is 0: the run tested nothing" for name in MUST_HAPPEN if not result.get(name)]


def main() -> int:
    """Returns 0 if nothing went wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of all that is drawn")
    given = options.parse_args()
    result = hostile_run(given.minutes * 60, given.seed)
    print(json.dumps(result, indent=1))
    faults = faults_of(result)
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
