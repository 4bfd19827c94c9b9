"""Plots the rate-quality curve: KL against bytes per token, with one point per codec."""

from collections.abc import Sequence
from typing import Any

from tiered_kv import picture

BF16_KL = 1.0e-3
"""The KL of the default model from computing in bf16 instead of float32 on the same KV (docs/design/013)."""


def draw(records: Sequence[dict[str, Any]], title: str, path: str) -> None:
    """Write a plot of the records of `codec-eval` to `path`. Codecs with a KL of 0 are drawn at the plot's lower edge."""
    figure = picture.figure((9, 6))
    panel = figure.subplots()
    lossy = [each["kl"] for each in records if each["kl"] > 0]
    lowest = min([*lossy, BF16_KL]) / 4
    families: dict[str, list[dict[str, Any]]] = {}
    for each in records:
        families.setdefault(each["codec"].partition(":")[0], []).append(each)
    for family in families.values():
        _draw_family(panel, sorted(family, key=lambda each: each["bytes_per_token"]), lowest)
    panel.axhline(BF16_KL, color="grey", linestyle="--", linewidth=1)
    panel.annotate("arithmetic in bf16", (0.01, BF16_KL), xycoords=("axes fraction", "data"), va="bottom", color="grey", fontsize="small")
    panel.set_yscale("log")
    panel.set_xscale("log", base=2)
    panel.set_ylim(lowest / 1.5, 3 * max([*lossy, BF16_KL]))
    panel.margins(x=0.18)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set_xlabel("bytes per token, including all side information")
    panel.set_ylabel("mean KL from exact KV, nats per token")
    panel.set_title(title, fontsize="medium")
    panel.grid(alpha=0.3)
    figure.tight_layout()
    picture.write(figure, path)


def _draw_family(panel: Any, family: list[dict[str, Any]], lowest: float) -> None:
    places = [(each["bytes_per_token"], max(each["kl"], lowest)) for each in family]
    [line] = panel.plot(*zip(*places, strict=True), marker="o", markersize=5, linewidth=1)
    for each, place in zip(family, places, strict=True):
        text = f"{each['codec']}\n{each['ratio']:.1f} ×" + ("" if each["kl"] else ", KL 0")
        panel.annotate(text, place, xytext=(6, 4), textcoords="offset points", fontsize="small", color=line.get_color())
