"""The results of a run: figures, targets, tables and curves, and their JSON.

Names of figures are stable: dotted, from the suite to the side, like ``overhead.anderson.32x512.t1.torchdeq``. Later
runs are compared by them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.timing import Spread

SCHEMA = 1
# Panels of the plot "precision" whose titles end like this have seconds on their axis, the other panels evaluations.
IN_TIME = ", time"


@dataclass(frozen=True)
class Figure:
    """One number.

    Args:
        name: Dotted and unique.
        value: The median if there are several samples. None if it could not be measured.
        unit: The unit; "1" for ratios and shares.
        low, high: Quartiles, or the smallest and largest value if the suite says so.
        samples: Number of measurements.
    """

    name: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Target:
    """A number that the package should reach, and the measured one.

    Args:
        name: Dotted and unique.
        statement: The target in words.
        relation: Whether ``measured`` must be at least or at most ``limit``.
        limit: The number to reach.
        measured: None if this run did not measure it.
        unit: Of both.
    """

    name: str
    statement: str
    relation: Literal[">=", "<="]
    limit: float
    measured: float | None
    unit: str

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.relation == ">=" else self.measured <= self.limit


@dataclass(frozen=True)
class Table:
    """Rows for the terminal and the page.

    Args:
        suite: The suite it belongs to.
        title: A caption.
        columns: Headings, with units.
        rows: Text cells, one for each heading. Rows of one kind are neighbours.
        note: What a reader must know about it.
    """

    suite: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def display(self) -> Iterator[tuple[bool, tuple[str, ...]]]:
        """For each row: whether it starts a group, and its cells, which are blank if they repeat the row above."""
        above: tuple[str, ...] = ()
        for row in self.rows:
            shared = 0
            while shared < 2 and above and row[: shared + 1] == above[: shared + 1]:
                shared += 1
            yield bool(above) and shared == 0, ("",) * shared + row[shared:]
            above = row


@dataclass(frozen=True)
class Curve:
    """A line of a plot.

    Args:
        plot: The plot it belongs to.
        panel: The panel in it, by its title.
        side: The library; it determines the style of the line.
        series: What the line shows; it determines the color.
        x, y: Its points.
        low, high: If each point has a spread: its quartiles.
    """

    plot: str
    panel: str
    side: str
    series: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


Status = Literal["solved", "unsolved", "lied", "crashed", "refused", "said so", "silent", "fooled"]


@dataclass(frozen=True)
class Entry:
    """What one contender did with one problem.

    Args:
        problem, family: Keys of the problem and of the set that it belongs to.
        contender, library: Key of the contender, and its library.
        status: "solved": the returned value solves the problem, measured from outside in float64. "unsolved": it does
            not. "lied": it does not, but the library says that it converged. "crashed": an exception. "refused": the
            contender cannot be given this problem. For a problem without a fixed point, "said so": the library says
            that it did not converge. "silent": it says nothing. "fooled": the tolerance is met where no fixed point is.
        evaluations, products: Calls of the map, and products with its Jacobian, of one solve. None if nothing was
            counted.
        seconds, seconds_low, seconds_high: Median and quartiles of the timed solves. None if nothing was timed.
        samples: Number of timed solves.
        tighten: The factor on the library's own tolerance with which this was reached, at most 1.
        after_others_seconds: The median of the first solves after those of all other solvers. If a solve is short,
            ``seconds`` are those of further ones.
        first_seconds: The first call, which may compile; with the compilation of the map if that is done before.
            Solvers of a problem share a compiled map, so only the first of them compiles it.
        overhead_seconds: Time of a solve per call of the map, minus that of a call in a loop without a solver; None for
            solvers that use products or evaluate several points in a call, and for maps that are compiled or not in
            torch.
        peak_bytes: The most memory that a solve holds at once, of what it allocates itself. Measured for large states
            of solvers in torch.
        solvable: Whether the problem has a fixed point.
        false_claim: Whether, with its own tolerance unchanged, it says that a sample converged that is far from it.
        title: The contender, for readers.
        problem_title: The problem, for readers.
        note: The error or the reason for a refusal.
    """

    problem: str
    family: str
    contender: str
    library: str
    status: Status
    evaluations: float | None = None
    products: float | None = None
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    samples: int | None = None
    after_others_seconds: float | None = None
    tighten: float = 1.0
    first_seconds: float | None = None
    overhead_seconds: float | None = None
    peak_bytes: int | None = None
    solvable: bool = True
    false_claim: bool = False
    title: str = ""
    problem_title: str = ""
    note: str = ""


# The lists of Results, in the order of the file.
_ROWS = ("targets", "figures", "curves", "entries", "tables")


@dataclass
class Results:
    """Collects the results of the suites.

    Args:
        facts: Device, versions, commit and date, see :mod:`benchmarks.environment`.
    """

    facts: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Results:
        """Results from what :meth:`to_json` or :meth:`contents` gave, or from a file in ``benchmarks/results``.

        Raises:
            KeyError, TypeError: If ``content`` is something else.
        """

        def rows(name: str) -> list[dict[str, Any]]:
            return [dict(row) for row in content.get(name, ())]

        lists = {*_ROWS, "seconds", "notices", "schema"}
        results = cls({name: value for name, value in content.items() if name not in lists})
        results.seconds, results.notices = dict(content["seconds"]), list(content["notices"])
        results.figures = [Figure(**row) for row in rows("figures")]
        results.entries = [Entry(**row) for row in rows("entries")]
        for row in rows("targets"):
            row.pop("met", None)
            results.targets.append(Target(**row))
        for row in rows("curves"):
            points: dict[str, Any] = {name: tuple(row.get(name, ())) for name in ("x", "y", "low", "high")}
            results.curves.append(Curve(**row | points))
        for row in rows("tables"):
            cells: dict[str, Any] = {"columns": tuple(row["columns"]), "rows": tuple(map(tuple, row["rows"]))}
            results.tables.append(Table(**row | cells))
        return results

    def add(self, part: Results) -> None:
        """Add the results of a suite.

        Raises:
            ValueError: If a figure's name is taken.
        """
        taken = {figure.name for figure in self.figures} & {figure.name for figure in part.figures}
        if taken:
            raise ValueError(f"names of figures must be new, got {min(taken)!r} a second time")
        for name in (*_ROWS, "notices"):
            getattr(self, name).extend(getattr(part, name))
        self.seconds.update(part.seconds)

    def figure(self, name: str, value: float | Spread | None, unit: str) -> None:
        """Add one figure.

        Raises:
            ValueError: If the name is taken.
        """
        if any(figure.name == name for figure in self.figures):
            raise ValueError(f"name must be new, got {name!r} a second time")
        if isinstance(value, Spread):
            self.figures.append(Figure(name, value.median, unit, value.low, value.high, value.samples))
        else:
            self.figures.append(Figure(name, value, unit))

    def value(self, name: str) -> float | None:
        """The value of a figure; None if there is none of this name."""
        return next((figure.value for figure in self.figures if figure.name == name), None)

    def target(
        self,
        name: str,
        statement: str,
        relation: Literal[">=", "<="],
        limit: float,
        measured: float | None,
        unit: str,
    ) -> None:
        self.targets.append(Target(name, statement, relation, limit, measured, unit))

    def curve(
        self,
        plot: str,
        panel: str,
        side: str,
        series: str,
        x: tuple[float, ...],
        y: tuple[float, ...],
        low: tuple[float, ...] = (),
        high: tuple[float, ...] = (),
    ) -> None:
        self.curves.append(Curve(plot, panel, side, series, x, y, low, high))

    def table(
        self, suite: str, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], note: str = ""
    ) -> None:
        self.tables.append(Table(suite, title, columns, tuple(rows), note))

    def contents(self) -> dict[str, Any]:
        """Everything, in dictionaries and lists."""
        content = {"schema": SCHEMA, **self.facts, "seconds": self.seconds, "notices": self.notices}
        content |= {name: [asdict(row) for row in getattr(self, name)] for name in _ROWS}
        for row, target in zip(content["targets"], self.targets, strict=True):
            row["met"] = target.met
        return content

    def to_json(self) -> dict[str, Any]:
        """Everything, in the types of JSON. Values that are not finite become null."""
        return _finite(self.contents())

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


def row_by_row(content: Mapping[str, Any]) -> str:
    """JSON for files in the repository: each entry on its own line, and so is each row of an entry that is a list."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
            parts.append(f'"{name}": [\n  {rows}\n ]')
        else:
            parts.append(f'"{name}": {json.dumps(value, allow_nan=False)}')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table: ``digits`` significant digits, no exponent between 1e-3 and 1e6."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == round(value) and abs(value) < 1e6:
        return str(round(value))
    exponent = math.floor(math.log10(abs(value)))
    if not -3 <= exponent < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def times(value: float | None) -> str:
    """A ratio for a table."""
    return "-" if value is None else f"{number(value)}x"
