"""Draw the figures as bar charts in one SVG; measures nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from tests.bench.figures import format_value

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.bench.figures import Figure

_OURS, _OTHERS, _TARGET = "#1b7f5c", "#b8bec6", "#c0392b"


class Panel(NamedTuple):
    """The figures that one chart compares."""

    section: str
    unit: str
    title: str
    axis_min: float | None = None  # start of the axis; makes it logarithmic
    prefix: str = ""  # only figures whose name contains this; the labels omit it


def draw(path: Path, figures: Sequence[Figure], panels: Sequence[Panel]) -> None:
    """Write the SVG if a panel has figures. The same figures produce the same file."""
    chosen = [(panel, _select(panel, figures)) for panel in panels]
    chosen = [(panel, found) for panel, found in chosen if found]
    if not chosen:
        return
    heights = [len(found) + 1.6 for _, found in chosen]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "artifactapi", "font.size": 9}):
        canvas = Canvas(figsize=(9, 0.27 * sum(heights)), layout="constrained")
        grid = canvas.subplots(len(chosen), 1, height_ratios=heights, squeeze=False)
        for axes, (panel, found) in zip(grid[:, 0], chosen, strict=True):
            _draw_panel(axes, panel, found)
        canvas.savefig(path, format="svg", metadata={"Date": None})


def _select(panel: Panel, figures: Sequence[Figure]) -> list[Figure]:
    found = [
        f
        for f in figures
        if f.section == panel.section and f.unit == panel.unit and panel.prefix in f.name
    ]
    lower_is_better = "/s" not in panel.unit
    return sorted(found, key=lambda f: f.median, reverse=lower_is_better)  # the best on top


def _draw_panel(axes: mpl.axes.Axes, panel: Panel, figures: Sequence[Figure]) -> None:
    names = [f.name.removeprefix(panel.prefix) for f in figures]
    axis_min = panel.axis_min or 0.0
    medians = [max(f.median, axis_min) for f in figures]
    errors = [
        [max(0.0, m - max(f.spread[0], axis_min)) for f, m in zip(figures, medians, strict=True)],
        [max(0.0, f.spread[1] - m) for f, m in zip(figures, medians, strict=True)],
    ]
    colors = [_OURS if "artifactapi" in name else _OTHERS for name in names]
    axes.barh(names, medians, xerr=errors, color=colors, error_kw={"elinewidth": 0.8}, height=0.7)
    if panel.axis_min:
        axes.set_xscale("log")
        axes.set_xlim(left=panel.axis_min)
    for row, figure in enumerate(figures):
        axes.annotate(
            f" {format_value(figure.median)}",
            (max(medians[row], figure.spread[1]), row),
            va="center",
            xytext=(2, 0),
            textcoords="offset points",
        )
        if figure.target:
            axes.plot([figure.target.limit] * 2, [row - 0.42, row + 0.42], color=_TARGET)
    axes.margins(x=0.12)
    axes.set_title(f"{panel.title} ({panel.unit})", loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
