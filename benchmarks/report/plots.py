"""The plots: performance profiles, work and precision, overhead, kernel bandwidth, accuracy against NFE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # there may be no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from benchmarks.contest.standings import time_of, work_of
from benchmarks.report import growth
from benchmarks.report.contest import OWN, Step, all_problems, common_problems, costs, profile_curves
from benchmarks.results import IN_TIME, Curve, Entry, Results, number

# Colors that color-blind readers can tell apart (Okabe and Ito 2008). In bars each library has a color; in plots where
# colors mark solvers, each library has a line style.
LIBRARY_COLORS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9")
SERIES_COLORS = ("#009E73", "#D55E00", "#0072B2", "#CC79A7")
LINE_STYLES = ("-", "--", ":", "-.")
# Many solvers: pydeq's lines are strong and solid; each other library has a muted color, each of its solvers a dash.
OWN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#5B3FA0")
MUTED_COLORS = (
    "#6F7B83",
    "#B8862B",
    "#5C8FCB",
    "#B0688A",
    "#5E9E74",
    "#8F72BD",
    "#B5764E",
    "#3F9A9A",
    "#8C8C33",
    "#3F464C",
)
DASHES: tuple[Any, ...] = (
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (1, 1)),
    (0, (9, 3, 2, 3, 2, 3)),
    (0, (4, 4)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "benchmarks",  # the same figure gives the same file
}
SPREAD: dict[str, Any] = {"fmt": "none", "ecolor": "#333333", "elinewidth": 0.9, "capsize": 1.5}
SOLVERS = ("picard", "anderson", "broyden")

# panel -> labels of its axes, and whether the second one is logarithmic; the default is for panels named by a problem
AXES = {
    "Test accuracy at a hard stop": ("evaluations of the cell allowed", "test accuracy, %", False),
    "Spectral radius of the cell": ("epoch", "mean spectral radius at the equilibrium", False),
}
RESIDUAL_AXES = ("evaluations of f", "largest relative residual in the batch", True)
SHOWN = "conv cell"
"""README shows the panel of the plot "residual" whose title begins like this."""


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw the plots that the run has data for, each as PNG and as SVG.

    Returns:
        For each plot drawn its PNG; the SVG lies next to it.
    """
    plots: dict[str, Callable[[Results], Figure | None]] = {
        "profile": lambda results: _profiles(results, lambda entry: entry.library),
        "solvers": lambda results: _profiles(results, lambda entry: entry.contender),
        "precision": _precision,
        "growth": lambda results: growth.draw(results.entries, _looks),
        "overhead": _overhead,
        "kernels": _kernels,
        "residual": lambda results: _lines(results, "residual"),
        "evaluations": _evaluations,
        "accuracy": lambda results: _lines(results, "accuracy"),
    }
    drawn = {}
    with mpl.rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot(results)
            if figure is not None:
                drawn[name] = folder / f"{name}.png"
                figure.savefig(drawn[name], bbox_inches="tight")
                svg = drawn[name].with_suffix(".svg")
                figure.savefig(svg, bbox_inches="tight", transparent=True, metadata={"Date": None})
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


def _measured(results: Results, name: str) -> tuple[float, tuple[tuple[float], tuple[float]]] | None:
    """The value of a figure, and how far its quartiles are below and above; None if it was not measured."""
    figure = next((figure for figure in results.figures if figure.name == name), None)
    if figure is None or figure.value is None:
        return None
    value = figure.value
    low, high = (value if bound is None else bound for bound in (figure.low, figure.high))
    return value, ((max(value - low, 0.0),), (max(high - value, 0.0),))


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
                    measured = _measured(results, case)
                    if measured is None:
                        continue
                    place = at - 0.42 + width * (len(libraries) * i + j + 0.5)
                    label = f"{library}, {_threads(count)}" if at == 0 else None
                    alpha = 0.55 if count < counts[-1] else 1.0
                    value, spread = measured
                    panel.bar(place, value, 0.9 * width, color=LIBRARY_COLORS[j], alpha=alpha, label=label)
                    panel.errorbar(place, value, spread, **SPREAD)
                    ratio = results.value(f"{case}_over_{libraries[0]}")
                    if ratio is not None:
                        text = f"{number(ratio, 2)}x"
                        panel.text(place, 1.1 * (value + spread[1][0]), text, ha="center", va="bottom", fontsize=8)
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
                measured = _measured(results, f"kernels.{operation}.{shape}.t{count}.{implementation}.bandwidth")
                if measured is None:
                    continue
                place = at - 0.42 + width * (i + 0.5)
                value, spread = measured
                panel.bar(place, value, 0.9 * width, color=colors[i], label=operation if at == 0 else None)
                panel.errorbar(place, value, spread, **SPREAD)
                panel.text(place, value + spread[1][0], number(value, 2), ha="center", va="bottom", fontsize=7)
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
        _draw_lines(panel, title, lines, series, libraries)
    handles = _line_handles(series, libraries)
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(handles))
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _evaluations(results: Results) -> Figure | None:
    """The residuals of one problem, for README."""
    lines = [curve for curve in results.curves if curve.plot == "residual" and curve.panel.startswith(SHOWN)]
    if not lines:
        return None
    libraries, series = results.facts["peers"], list(dict.fromkeys(curve.series for curve in lines))
    figure, panel = plt.subplots(figsize=(6.4, 3.4))
    _draw_lines(panel, lines[0].panel, lines, series, libraries)
    _legend_at_right(figure, _line_handles(series, libraries))
    figure.tight_layout()
    return figure


def _draw_lines(panel: Axes, title: str, lines: Sequence[Curve], series: list[str], libraries: list[str]) -> None:
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
        if line.low and line.high:
            panel.fill_between(line.x, line.low, line.high, color=SERIES_COLORS[i], alpha=0.12, linewidth=0)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    if logarithmic:
        panel.set_yscale("log")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _line_handles(series: list[str], libraries: list[str]) -> list[Line2D]:
    """The legend's lines: a color for each series, a style for each library."""
    handles = [Line2D([], [], color=SERIES_COLORS[i], linewidth=3, label=name) for i, name in enumerate(series)]
    for j, name in enumerate(libraries):
        width, alpha = (1.5, 1.0) if j == 0 else (3.0, 0.5)
        handles.append(
            Line2D([], [], color="#444444", linestyle=LINE_STYLES[j], linewidth=width, alpha=alpha, label=name)
        )
    return handles


@dataclass(frozen=True)
class _Look:
    """The line of a solver or a library among many."""

    color: str
    dash: Any
    marker: str
    own: bool

    @property
    def options(self) -> dict[str, Any]:
        return {
            "color": self.color,
            "linestyle": self.dash,
            "linewidth": 2.2 if self.own else 1.3,
            "zorder": 3 if self.own else 2,
        }


def _looks(sides: Sequence[tuple[str, str]]) -> dict[str, _Look]:
    """A line for each (name, library): the color shows the library, dash and marker its solvers; pydeq's are solid."""
    looks: dict[str, _Look] = {}
    libraries = list(dict.fromkeys(library for _, library in sides if library != OWN))
    counts: dict[str, int] = {}
    for name, library in sides:
        i = counts[library] = counts.get(library, -1) + 1
        marker = MARKERS[i % len(MARKERS)]
        if library == OWN:
            looks[name] = _Look(OWN_COLORS[i % len(OWN_COLORS)], "-", marker, True)
        else:
            j = libraries.index(library)
            dash = DASHES[(i + j) % len(DASHES)]
            looks[name] = _Look(MUTED_COLORS[j % len(MUTED_COLORS)], dash, marker, False)
    return looks


def _legend_at_right(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend next to the panels, outside of them."""
    figure.legend(handles=list(handles), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, handlelength=3.2)


def _profiles(results: Results, key: Callable[[Entry], str]) -> Figure | None:
    """Performance profiles by time, and by evaluations and products; ``key`` groups the entries into lines.

    The first two panels compare all libraries on the problems that each of them can be given, the last one those
    libraries that can be given every problem.
    """
    common, every = common_problems(results.entries), all_problems(results.entries)
    entries = [entry for rows in (*common, *every) for entry in rows]
    looks = _looks(list(dict.fromkeys((key(entry), entry.library) for entry in entries)))
    kinds = [("Time", common, time_of), ("Evaluations and products", common, work_of)]
    if len(every) > len(common):
        kinds.append(("Time", every, time_of))
    drawn = []
    for title, problems, cost in kinds:
        measured = costs(problems, key, cost)
        if len(measured) > 1 and any(math.isfinite(value) for each in measured.values() for value in each):
            drawn.append((f"{title}, {len(problems)} problems", measured))
    if not drawn:
        return None
    figure, panels = _panels(len(drawn), 4.2, share_y=True)
    for panel, (title, measured) in zip(panels, drawn, strict=True):
        curves = profile_curves(measured)
        most = max((ratio for step in curves.values() for ratio in step.ratio if math.isfinite(ratio)), default=1.0)
        end = 2.0 ** max(1, math.ceil(math.log2(most) + 0.01))
        for name, step in curves.items():
            _draw_step(panel, step, end, looks[name].options)
        panel.set_title(title)
        panel.set_xscale("log", base=2)
        panel.set_xlim(1, end)
        powers = range(round(math.log2(end)) + 1)
        panel.xaxis.set_major_locator(FixedLocator([2.0**n for n in powers if n % math.ceil(len(powers) / 8) == 0]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        panel.set_xlabel("at most this many times the best one's")
        panel.set_ylim(-0.02, 1.02)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylabel("share of problems solved")
    titles = {key(entry): f"{entry.library} {entry.title}" if entry.title else entry.contender for entry in entries}
    by_library = all(key(entry) == entry.library for entry in entries)
    order = sorted(looks, key=lambda name: not looks[name].own)  # pydeq first
    _legend_at_right(
        figure, [Line2D([], [], label=name if by_library else titles[name], **looks[name].options) for name in order]
    )
    figure.tight_layout()
    return figure


def _draw_step(panel: Axes, step: Step, end: float, options: dict[str, Any]) -> None:
    """A step function up to the right edge of the panel."""
    points = [(ratio, share) for ratio, share in zip(step.ratio, step.share, strict=True) if ratio <= end]
    points.append((end, points[-1][1]))
    panel.step([x for x, _ in points], [y for _, y in points], where="post", **options)


def _precision(results: Results) -> Figure | None:
    """Residual against evaluations and against time, a row of panels for each problem."""
    curves = [curve for curve in results.curves if curve.plot == "precision"]
    if not curves:
        return None
    titles = list(dict.fromkeys(curve.panel for curve in curves))
    looks = _looks(list(dict.fromkeys((curve.series, curve.side) for curve in curves)))
    across = min(2, len(titles))
    rows = math.ceil(len(titles) / across)
    figure, axes = plt.subplots(rows, across, figsize=(4.4 * across, 3.7 * rows), squeeze=False)
    for panel, title in zip(axes.flat, titles, strict=False):
        for curve in curves:
            if curve.panel != title:
                continue
            look = looks[curve.series]
            every = math.ceil(len(curve.x) / 8)
            panel.plot(curve.x, curve.y, marker=look.marker, markersize=4, markevery=every, **look.options)
            if curve.low and curve.high:
                panel.fill_between(curve.x, curve.low, curve.high, color=look.color, alpha=0.15, linewidth=0)
        panel.set_title(title, fontsize=10)
        panel.set_yscale("log")
        in_time = title.endswith(IN_TIME)
        panel.set_xlabel("seconds" if in_time else "evaluations of f, without products")
        if in_time:
            panel.set_xscale("log")
        else:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for panel in axes.flat[len(titles) :]:
        panel.set_axis_off()
    for row in axes:
        row[0].set_ylabel("relative residual")
    order = sorted(looks, key=lambda name: not looks[name].own)
    _legend_at_right(
        figure,
        [Line2D([], [], label=name, marker=looks[name].marker, markersize=4, **looks[name].options) for name in order],
    )
    figure.tight_layout()
    return figure
