"""The command `tiered-kv simulate` without its argument parser: takes settings as text, prints tables, returns results."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tiered_kv import picture
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.simulate import cells, plot, report
from tiered_kv.tools.simulate.tiers import tiers_of
from tiered_kv.tools.simulate.trace import Trace, read_trace


@dataclass(frozen=True)
class SimulateOptions:
    """The options of the command line, with texts as the user gave them."""

    traces: Sequence[str]
    policy: str = "all"
    capacity: str = "0.01,0.02,0.05,0.1,0.2,0.4"
    tiers: str | None = None
    metric: str = "tokens"
    cost_weight: float = 0.0
    block_tokens: int | None = None
    rekey: bool = False
    plot: str | None = None
    jobs: int | None = None


def run_simulate(options: SimulateOptions, console: Console) -> dict[str, Any]:
    """Replay the traces, print tables to `console`, and draw a plot if asked to. Progress is shown on standard error.

    Returns the object that `--json` prints.
    """
    policies, rooms = _policies_and_rooms(options)
    jobs = (os.cpu_count() or 1) if options.jobs is None else options.jobs
    if jobs < 1:
        raise TieredKVError(Kind.CONFIG, f"--jobs: must be at least 1, got {jobs}", setting="jobs")
    if not 0 <= options.cost_weight <= 1:
        raise TieredKVError(Kind.CONFIG, f"--cost-weight: must be from 0 to 1, got {options.cost_weight}", setting="cost_weight")
    if options.plot:
        picture.check_target(options.plot)
    _refuse_equal_names(options.traces)
    traces = [read_trace(path, block_tokens=options.block_tokens, rekey=options.rekey) for path in options.traces]
    for note in (note for trace in traces for note in trace.notes):
        console.print(f"[yellow]note[/]: {note}", highlight=False, soft_wrap=True)
    results = _replayed(traces, policies, rooms, options.cost_weight, jobs)
    if options.tiers:
        report.show_tiers(results, options.metric, console)
    else:
        report.show(results, options.metric, console)
    if options.plot:
        plot.draw(results, options.metric, options.plot)
        console.print(f"plot written to {options.plot}", highlight=False, soft_wrap=True)
    return {"results": [asdict(result) for result in results]}


def _policies_and_rooms(options: SimulateOptions) -> tuple[list[str], list[cells.Room]]:
    policies = cells.policies_of(options.policy)
    if options.tiers is None:
        return policies, list(cells.capacities_of(options.capacity))
    if options.plot:
        raise TieredKVError(Kind.CONFIG, "--plot: draws hits by --capacity, so it cannot be used with --tiers", setting="plot")
    if policies == ["belady"]:
        raise TieredKVError(Kind.CONFIG, "--policy: belady supports one tier only, so it cannot be used with --tiers", setting="policy")
    return [name for name in policies if name != "belady"], [tiers_of(options.tiers)]


def _refuse_equal_names(paths: Sequence[str]) -> None:
    names = [Path(path).name for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        message = f"TRACE: two files are named {twice}; results are reported by file name, so names must differ"
        raise TieredKVError(Kind.CONFIG, message, setting="traces")


def _replayed(traces: list[Trace], policies: list[str], rooms: list[cells.Room], cost_weight: float, jobs: int) -> list[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = sum(map(len, traces)) * len(policies) * len(rooms)
        task = progress.add_task("requests", total=total)
        advance = partial(progress.advance, task)
        return cells.run_cells(traces, policies, rooms, cost_weight=cost_weight, jobs=jobs, advance=advance)
