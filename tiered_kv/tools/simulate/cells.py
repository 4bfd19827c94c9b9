"""Runs many replays. Each trace × policy × capacity (or set of tiers) is a cell. Cells run in separate processes."""

import difflib
import math
import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from typing import Any

from tiered_kv.blocks import Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.policy import POLICY_NAMES
from tiered_kv.tools.simulate.replay import Progress, replay
from tiered_kv.tools.simulate.tiers import replay_tiers
from tiered_kv.tools.simulate.trace import Trace

ALL_NAMES = (*POLICY_NAMES, "belady")
POLL_S = 0.2

Room = float | dict[Tier, float]
"""A capacity as a share of the trace's unique blocks, or a share for each tier."""

Cell = tuple[int, str, Room, float]
"""The index of the trace, the policy, the room, and the cost weight of one replay."""


def policies_of(text: str) -> list[str]:
    """Parse `all` or names separated by commas. Returns the names in the given order. Raises (kind `config`) for an unknown name."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name != "all" and name not in ALL_NAMES:
            near = difflib.get_close_matches(name, ALL_NAMES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are all, {', '.join(ALL_NAMES)}"
            raise TieredKVError(Kind.CONFIG, f"--policy: unknown policy {name!r}; {hint}", setting="policy")
    return list(ALL_NAMES) if "all" in names else names


def capacities_of(text: str) -> list[float]:
    """Parse shares separated by commas. Returns them sorted. Raises (kind `config`) unless each is above 0 and at most 1."""
    found = set()
    for part in text.split(","):
        try:
            capacity = float(part)
        except ValueError:
            capacity = math.nan
        if not 0 < capacity <= 1:
            said = f"--capacity: {part.strip()!r} is invalid; expected a share of the trace's unique blocks, above 0 and at most 1"
            raise TieredKVError(Kind.CONFIG, said, setting="capacity")
        found.add(capacity)
    return sorted(found)


def run_cells(
    traces: Sequence[Trace], policies: Sequence[str], rooms: Sequence[Room], *, cost_weight: float, jobs: int, advance: Progress
) -> list[Any]:
    """Run all cells. Returns their results (`Result` or `TiersResult`), ordered by trace, then policy, then room.

    `advance` is called with the number of requests replayed since its last call. With one job, the cells run in this process.
    With more jobs, they run in other processes, each of which has all traces in memory.
    """
    cells = list(product(range(len(traces)), policies, rooms, [cost_weight]))
    if jobs == 1 or len(cells) == 1:
        return [_replayed(traces, cell, advance) for cell in cells]
    return _run_in_processes(traces, cells, min(jobs, len(cells)), advance)


def _run_in_processes(traces: Sequence[Trace], cells: list[Cell], jobs: int, advance: Progress) -> list[Any]:
    context = multiprocessing.get_context("spawn")  # the new processes need nothing of this one, and must not inherit its threads
    done = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, context, _start, (traces, done)) as pool:
        futures = [pool.submit(_run, cell) for cell in cells]
        shown, waiting = 0, set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, POLL_S, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                now = done.value
                advance(now - shown)
                shown = now
        except BrokenProcessPool as error:
            said = "a simulation process died, perhaps because memory ran out: try fewer --jobs"
            raise TieredKVError(Kind.MEMORY, said, setting="jobs") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


_here: dict[str, Any] = {}  # in a worker process: the arguments of `_start`


def _start(traces: Sequence[Trace], done: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends the process at once, without a traceback
    _here.update(traces=traces, done=done)


def _run(cell: Cell) -> Any:
    return _replayed(_here["traces"], cell, _count)


def _replayed(traces: Sequence[Trace], cell: Cell, progress: Progress) -> Any:
    at, policy, room, cost_weight = cell
    if isinstance(room, dict):
        return replay_tiers(traces[at], policy, room, cost_weight=cost_weight, progress=progress)
    return replay(traces[at], policy, room, cost_weight=cost_weight, progress=progress)


def _count(requests: int) -> None:
    with _here["done"].get_lock():
        _here["done"].value += requests
