"""Draws the results as curves of the chosen metric over the capacity, with one panel for each trace."""

from collections.abc import Sequence
from typing import Any

from tiered_kv import picture
from tiered_kv.tools.simulate.replay import Result
from tiered_kv.tools.simulate.report import TITLES, curves, percent


def draw(results: Sequence[Result], metric: str, path: str) -> None:
    """Draw `results` and write the picture to `path`. The extension of `path` decides the format."""
    traces = list(dict.fromkeys(result.trace for result in results))
    columns = min(3, len(traces))
    rows = -(-len(traces) // columns)
    figure = picture.figure((1 + 5 * columns, 4 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, trace in zip(panels, traces, strict=False):
        _draw_panel(panel, trace, curves([result for result in results if result.trace == trace], metric))
    for panel in panels[len(traces) :]:
        panel.set_axis_off()
    panels[0].set_ylabel(TITLES[metric])
    panels[0].legend(fontsize="small")
    figure.tight_layout()
    picture.write(figure, path)


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
