"""Reports of experiments: tables with the paper's numbers next to the measured ones, claims, and their JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from experiments.paper.measurement import Measurement

SCHEMA = 1

Unit = Literal["percent", "points", "perplexity", "number", "residual"]


@dataclass(frozen=True)
class Entry:
    """An entry of a table.

    Args:
        values: The measured values, one for each seed; None where a training diverged.
        unit: The unit, which selects the format. Percentages are given in percent. Points are differences of them
            between trainings of the same seed: the mean has its standard error, other units have half the range.
        paper: The paper's number or words.
    """

    values: tuple[float | None, ...]
    unit: Unit = "percent"
    paper: float | str | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None if there are no values, or one diverged."""
        if not self.values or any(value is None for value in self.values):
            return None
        return sum(value for value in self.values if value is not None) / len(self.values)

    @property
    def number(self) -> float:
        """The mean, or NaN if there is none. No comparison with NaN is true."""
        return math.nan if self.mean is None else self.mean

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest of the values that there are; NaN if there are none."""
        numbers = [value for value in self.values if value is not None]
        return min(numbers, default=math.nan), max(numbers, default=math.nan)

    @property
    def error(self) -> float:
        """The standard error of the mean over the seeds; NaN if there is none."""
        if self.mean is None or len(self.values) < 2:
            return math.nan
        return statistics.stdev(value for value in self.values if value is not None) / math.sqrt(len(self.values))

    def __str__(self) -> str:
        numbers = [value for value in self.values if value is not None]
        if not self.values:
            own = "-"
        elif self.mean is None:
            diverged = len(self.values) - len(numbers)
            own = "diverged" if not numbers else f"{diverged} of {len(self.values)} diverged"
        else:
            own = show(self.mean, self.unit)
            if len(numbers) > 1:
                least, most = self.range
                spread = self.error if self.unit == "points" else (most - least) / 2
                own += f" ± {show(spread, self.unit).removeprefix('+')}"
        if self.paper is None:
            return own
        return f"{own} ({self.paper if isinstance(self.paper, str) else show(self.paper, self.unit)})"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        label: Label of the training.
        entries: Entries, one for each column except the first.
    """

    label: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Args:
        title: Title.
        columns: Headings; the first one is that of the labels.
        rows: Rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.entries) != len(self.columns) - 1:
                raise ValueError(f"row {row.label!r} must have {len(self.columns) - 1} entries, got {len(row.entries)}")

    def cells(self) -> list[list[str]]:
        """Return headings and rows as text."""
        return [list(self.columns), *([row.label, *map(str, row.entries)] for row in self.rows)]

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        lines = ["  ".join([line[0].ljust(widths[0]), *(map(str.rjust, line[1:], widths[1:]))]) for line in cells]
        return "\n".join([self.title, lines[0], "-" * len(lines[0]), *lines[1:]])

    def markdown(self) -> str:
        """Return the table in Markdown."""
        first, *rest = ("| " + " | ".join(line) + " |" for line in self.cells())
        return "\n".join([first, "|" + "---|" * len(self.columns), *rest])


@dataclass(frozen=True)
class Claim:
    """A claim, and whether these trainings show it.

    Args:
        name: Unique dotted name.
        statement: The claim in words, with its limit.
        measured: The numbers that decide; None for a missing one.
        shown: Whether it is shown; None if a number is missing, for example after a divergence.
    """

    name: str
    statement: str
    measured: Mapping[str, float | None]
    shown: bool | None

    def __str__(self) -> str:
        verdict = {True: "shown", False: "not shown", None: "not measured"}[self.shown]
        numbers = ", ".join(f"{name} {brief(value)}" for name, value in self.measured.items())
        return f"{verdict.upper()}: {self.statement}: {numbers}"


def claim(name: str, statement: str, measured: Mapping[str, float], shown: bool) -> Claim:
    """Make a claim, which is decided only if none of its numbers is NaN."""
    there = {key: None if math.isnan(value) else value for key, value in measured.items()}
    return Claim(name, statement, there, None if None in there.values() else shown)


@dataclass(frozen=True)
class Curve:
    """A line of a plot.

    Args:
        label: Label.
        x, y: Its points; None for a missing one.
        style: Matplotlib's style.
        group: Lines of one group have the same color.
        bars: The smallest and the largest value over the seeds at each point; None for no bars.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str = "o-"
    group: int = 0
    bars: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Panel:
    """A part of the experiment's picture.

    Args:
        title, x, y: Titles of the panel and its axes.
        curves: Its curves.
        log: Whether the y axis is logarithmic.
    """

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    log: bool = False


@dataclass
class Report:
    """The report of an experiment.

    Args:
        tables, claims, panels: Its parts.
        notes: Remarks for the reader.
    """

    tables: list[ReportTable] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [str(table) for table in self.tables]
        if self.notes:
            parts.append("\n".join(self.notes))
        if self.claims:
            parts.append("\n".join(map(str, self.claims)))
        return "\n\n".join(parts)


def report_mapping(
    report: Report, facts: Mapping[str, Any], trained: Mapping[str, Sequence[Measurement]]
) -> dict[str, Any]:
    """Return a report as JSON holds it; numbers that are not finite become null.

    Args:
        report: The report.
        facts: Facts of the run: experiment, profile, machine.
        trained: Measurements of all its trainings, by label.
    """
    return _finite({
        "schema": SCHEMA,
        **facts,
        "claims": [asdict(each) for each in report.claims],
        "tables": [asdict(table) | {"rows": [_row(row) for row in table.rows]} for table in report.tables],
        "notes": report.notes,
        "trainings": [
            {"label": label} | measurement.brief() for label, group in trained.items() for measurement in group
        ],
    })  # fmt: skip


def _row(row: Row) -> dict[str, Any]:
    return {"label": row.label, "entries": [asdict(entry) | {"mean": entry.mean} for entry in row.entries]}


def show(value: float, unit: Unit) -> str:
    """Format a number for a table."""
    if not math.isfinite(value):
        return str(value)
    return {"percent": f"{value:.1f}", "points": f"{value:+.1f}", "perplexity": f"{value:.2f}",
            "number": f"{value:.2f}", "residual": f"{value:.1e}"}[unit]  # fmt: skip


def brief(value: float | None) -> str:
    """Format a number for a sentence."""
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content
