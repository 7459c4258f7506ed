"""The plots: overhead, kernel bandwidth, residual against NFE, accuracy against NFE."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # there may be no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.results import Curve, Results, number

# Colors that color-blind readers can tell apart (Okabe and Ito 2008). In bars each library has a color; in plots where
# colors mark solvers, each library has a line style.
LIBRARY_COLORS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9")
SERIES_COLORS = ("#009E73", "#D55E00", "#0072B2", "#CC79A7")
LINE_STYLES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
SOLVERS = ("picard", "anderson", "broyden")

# panel -> labels of its axes, and whether the second one is logarithmic; the default is for panels named by a problem
AXES = {
    "Test accuracy at a hard stop": ("evaluations of the cell allowed", "test accuracy, %", False),
    "Spectral radius of the cell": ("epoch", "mean spectral radius at the equilibrium", False),
}
RESIDUAL_AXES = ("evaluations of f", "largest relative residual in the batch", True)


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw the plots that the run has data for.

    Returns:
        For each plot drawn its file.
    """
    plots: dict[str, Callable[[Results], Figure | None]] = {
        "overhead": _overhead,
        "kernels": _kernels,
        "residual": lambda results: _lines(results, "residual"),
        "accuracy": lambda results: _lines(results, "accuracy"),
    }
    drawn = {}
    with mpl.rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot(results)
            if figure is not None:
                drawn[name] = folder / f"{name}.png"
                figure.savefig(drawn[name], bbox_inches="tight")
                plt.close(figure)
    return drawn


def _panels(count: int, height: float, share_y: bool) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(4.6 * count, height), sharey=share_y, squeeze=False)
    return figure, list(axes[0])


def _shapes(results: Results, prefix: str) -> list[str]:
    """The shapes, like 32x512, in the third part of the names that start with ``prefix``, smallest first."""
    found = {figure.name.split(".")[2] for figure in results.figures if figure.name.startswith(prefix)}
    shapes = [shape for shape in found if shape.replace("x", "").isdigit()]
    return sorted(shapes, key=lambda shape: math.prod(int(part) for part in shape.split("x")))


def _shape_ticks(panel: Axes, shapes: list[str]) -> None:
    panel.set_xticks(range(len(shapes)), [f"({shape.replace('x', ', ')})" for shape in shapes])
    panel.set_xlabel("(batch, state)")
    panel.grid(axis="x", visible=False)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _legend(figure: Figure, panel: Axes) -> None:
    """One legend for all panels, below them."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(labels))


def _overhead(results: Results) -> Figure | None:
    """Milliseconds for each solver, shape, library and thread count, the ratio above the bars."""
    solvers = [solver for solver in SOLVERS if _shapes(results, f"overhead.{solver}.")]
    if not solvers:
        return None
    libraries, counts = results.facts["peers"], results.facts["threads"]
    figure, panels = _panels(len(solvers), 3.9, share_y=True)
    width = 0.84 / (len(libraries) * len(counts))
    for panel, solver in zip(panels, solvers, strict=True):
        shapes = _shapes(results, f"overhead.{solver}.")
        for at, shape in enumerate(shapes):
            for i, count in enumerate(counts):
                for j, library in enumerate(libraries):
                    case = f"overhead.{solver}.{shape}.t{count}.{library}"
                    value = results.value(case)
                    if value is None:
                        continue
                    place = at - 0.42 + width * (len(libraries) * i + j + 0.5)
                    label = f"{library}, {_threads(count)}" if at == 0 else None
                    alpha = 0.55 if count < counts[-1] else 1.0
                    panel.bar(place, value, 0.9 * width, color=LIBRARY_COLORS[j], alpha=alpha, label=label)
                    ratio = results.value(f"{case}_over_{libraries[0]}")
                    if ratio is not None:
                        text = f"{number(ratio, 2)}x"
                        panel.text(place, 1.1 * value, text, ha="center", va="bottom", fontsize=8)
        panel.set_title(solver.capitalize())
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _shape_ticks(panel, shapes)
    bottom, top = panels[0].get_ylim()
    panels[0].set_ylim(bottom, 1.6 * top)  # room for the text
    panels[0].set_ylabel("overhead per iteration, ms")
    _legend(figure, panels[0])
    figure.suptitle(f"Time between two calls of f; above the bars: how many times {libraries[0]}'s")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _kernels(results: Results) -> Figure | None:
    """GB/s of each kernel and of the copy, one panel for each thread count."""
    operations = [
        (operation, "torch" if operation == "copy" else "kernel")
        for operation in ("copy", *(f"{solver}_step" for solver in SOLVERS))
    ]
    shapes = _shapes(results, "kernels.")
    counts = [count for count in results.facts["threads"] if shapes]
    if not counts:
        return None
    figure, panels = _panels(len(counts), 3.7, share_y=True)
    colors = ("#999999", *SERIES_COLORS)
    width = 0.84 / len(operations)
    for panel, count in zip(panels, counts, strict=True):
        for at, shape in enumerate(shapes):
            for i, (operation, implementation) in enumerate(operations):
                value = results.value(f"kernels.{operation}.{shape}.t{count}.{implementation}.bandwidth")
                if value is None:
                    continue
                place = at - 0.42 + width * (i + 0.5)
                panel.bar(place, value, 0.9 * width, color=colors[i], label=operation if at == 0 else None)
                panel.text(place, value, number(value, 2), ha="center", va="bottom", fontsize=7)
        panel.set_title(_threads(count))
        panel.tick_params(axis="x", labelsize=8)
        _shape_ticks(panel, shapes)
    panels[0].set_ylabel("GB/s")
    _legend(figure, panels[0])
    figure.suptitle("Bytes that one step moves, over its time, next to those of a copy")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _lines(results: Results, plot: str) -> Figure | None:
    """The curves of one plot: color for the series, line style for the library."""
    curves: dict[str, list[Curve]] = {}
    for curve in results.curves:
        if curve.plot == plot:
            curves.setdefault(curve.panel, []).append(curve)
    if not curves:
        return None
    libraries = results.facts["peers"]
    series = list(dict.fromkeys(curve.series for panel in curves.values() for curve in panel))
    figure, panels = _panels(len(curves), 3.9, share_y=False)
    for panel, (title, lines) in zip(panels, curves.items(), strict=True):
        x_label, y_label, logarithmic = AXES.get(title, RESIDUAL_AXES)
        for line in lines:
            i, j = series.index(line.series), libraries.index(line.side)
            # The other libraries' lines are below the first library's, thicker and paler, so that equal lines are both
            # visible.
            width, alpha = (1.5, 1.0) if j == 0 else (3.0, 0.5)
            panel.plot(
                line.x, line.y, LINE_STYLES[j], color=SERIES_COLORS[i], marker=None if logarithmic else "o",
                markersize=4, linewidth=width, alpha=alpha, zorder=3 if j == 0 else 2,
            )  # fmt: skip
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(x_label)
        panel.set_ylabel(y_label)
        if logarithmic:
            panel.set_yscale("log")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    handles = [Line2D([], [], color=SERIES_COLORS[i], linewidth=3, label=name) for i, name in enumerate(series)]
    for j, name in enumerate(libraries):
        width, alpha = (1.5, 1.0) if j == 0 else (3.0, 0.5)
        handles.append(
            Line2D([], [], color="#444444", linestyle=LINE_STYLES[j], linewidth=width, alpha=alpha, label=name)
        )
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(handles))
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure
