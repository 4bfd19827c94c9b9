"""The curves as a picture: ratio over capacity, one panel a trace."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.sim.replay import Result
from tiered_kv.sim.report import TITLES, curves, percent


def check_target(path: str) -> None:
    """Refuse, before any work, a picture that could not be drawn or written."""
    endings = set(_figure((1, 1)).canvas.get_supported_filetypes())
    if Path(path).suffix.lstrip(".") not in endings:
        raise TieredKVError(Kind.CONFIG, f"--plot: {path} has none of the endings {', '.join(sorted(endings))}", setting="plot")
    if not Path(path).absolute().parent.is_dir():
        raise TieredKVError(Kind.CONFIG, f"--plot: {path} is in no folder that exists", setting="plot")


def draw(results: Sequence[Result], metric: str, path: str) -> None:
    """Write the picture of `results` to `path`; its ending says the format."""
    traces = list(dict.fromkeys(result.trace for result in results))
    columns = min(3, len(traces))
    rows = -(-len(traces) // columns)
    figure = _figure((1 + 5 * columns, 4 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, trace in zip(panels, traces, strict=False):
        _draw_panel(panel, trace, curves([result for result in results if result.trace == trace], metric))
    for panel in panels[len(traces) :]:
        panel.set_axis_off()
    panels[0].set_ylabel(TITLES[metric])
    panels[0].legend(fontsize="small")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise TieredKVError(Kind.CONFIG, f"--plot: cannot write {path} ({error.strerror})", setting="plot") from error


def _draw_panel(panel: Any, trace: str, by_policy: dict[str, dict[float, float]]) -> None:
    panel.set_title(trace, fontsize="medium")
    for policy, curve in by_policy.items():
        style = {"adaptive": {"linewidth": 2.5}, "belady": {"color": "black", "linestyle": "--"}}.get(policy, {"linewidth": 1})
        panel.plot(list(curve), [100 * ratio for ratio in curve.values()], marker="o", markersize=3, label=policy, **style)
    panel.set_xscale("log")
    ticks = sorted({capacity for curve in by_policy.values() for capacity in curve})
    panel.set_xticks(ticks, [percent(tick) for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("capacity, of the trace's unique blocks")
    panel.grid(alpha=0.3)


def _figure(size_inches: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        said = "--plot: needs matplotlib, which is not installed: pip install 'tiered-kv[plot]'"
        raise TieredKVError(Kind.CONFIG, said, setting="plot") from error
    return Figure(size_inches)
