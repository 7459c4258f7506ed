"""The picture of a report."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from experiments.paper.report import Report

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colors that color-blind readers can tell apart (Okabe and Ito 2008)."""


def draw(report: Report, title: str, path: Path) -> None:
    """Draw the panels of a report side by side, as a PNG.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.4 * len(report.panels), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    places: Any = figure.subplots(1, len(report.panels), squeeze=False)[0]
    for place, panel in zip(places, report.panels, strict=True):
        positive = False
        for curve in panel.curves:
            bars = curve.bars or [(math.nan, math.nan)] * len(curve.x)
            points = [(x, y, y - low, high - y)
                      for x, y, (low, high) in zip(curve.x, curve.y, bars, strict=True) if y is not None]  # fmt: skip
            if points:
                x, y, below, above = zip(*points, strict=True)
                place.errorbar(
                    x, y, (below, above), fmt=curve.style, label=curve.label, color=COLORS[curve.group % len(COLORS)],
                    markersize=3, capsize=2, elinewidth=0.8,
                )  # fmt: skip
                positive = positive or any(value > 0.0 for value in y)
        if panel.log and positive:
            place.set_yscale("log")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))  # steps and evaluations are counted
        place.set_title(panel.title, fontsize="medium")
        place.set_xlabel(panel.x)
        place.set_ylabel(panel.y)
        place.grid(alpha=0.3)
        if place.lines:
            place.legend(fontsize="small")
    figure.suptitle("\n".join(textwrap.wrap(title, 56 * len(report.panels))))
    figure.savefig(path, dpi=90, metadata={"Software": None})
