"""Compare two summaries: which figures of pydeq changed by more than the noise.

A time changed if the quartiles of the two runs do not overlap, and the medians differ by more than ``FLOOR``. Counts of
evaluations and products are exact, so any difference is a change.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.results import Entry, Results, Status, number

BASELINE = "pydeq"
FLOOR = 1.1
# Figures without quartiles are single measurements.
FLOOR_ALONE = 1.25
EXACT = 1.0
MEMORY_FLOOR = 1.01
TIMES = ("s", "ms", "ms/iteration")
NOISY = (*TIMES, "GB/s", "ratio")
COUNTS = ("calls", "products")
SIZES = ("MiB", "state vectors")
SHOWN = 30
# Counts of small models that each run trains again, and differences of two medians: a change of these means nothing.
UNJUDGED = re.compile(r"digits\..*\.calls|adjoints\.digits_.*|.*\.added")

# From best to worst; the states of one group are equal.
STATUSES: tuple[tuple[Status, ...], ...] = (
    ("solved", "said so"),
    ("refused",),
    ("unsolved", "silent"),
    ("crashed",),
    ("lied", "fooled"),
)

Verdict = Literal["worse", "better", "same", "not judged"]


@dataclass(frozen=True)
class Measured:
    """A number that can be compared.

    Args:
        name: Of the figure.
        value: The median; for a status its rank.
        low, high: Quartiles, if there are any.
        unit: The unit.
        lower: Whether a lower value is better; None if neither is.
        floor: The factor between two values that is within the noise.
        text: How to show it.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    unit: str
    lower: bool | None
    floor: float
    text: str


@dataclass(frozen=True)
class Change:
    """A figure in both runs."""

    before: Measured
    after: Measured

    @property
    def factor(self) -> float | None:
        """After over before."""
        return self.after.value / self.before.value if self.before.value else None

    @property
    def verdict(self) -> Verdict:
        before, after = self.before, self.after
        if before.lower is None:
            return "not judged"
        if before.value == after.value:
            return "same"
        grew = after.value > before.value
        small, large = (before, after) if grew else (after, before)
        if large.value <= before.floor * small.value:
            return "same"
        if before.unit in NOISY:
            if small.high is None or large.low is None:
                if large.value <= FLOOR_ALONE * small.value:
                    return "same"
            elif large.low <= small.high:
                return "same"
        return "worse" if grew == before.lower else "better"


@dataclass(frozen=True)
class Comparison:
    """What changed from one run to another.

    Args:
        changes: Figures in both.
        appeared, disappeared: Names of figures in only one.
        warnings: Why the comparison may mislead.
        failures: What failed in the second run and not in the first one: suites, figures without a value, and pydeq's
            figures that are missing although the run should have them.
    """

    changes: tuple[Change, ...]
    appeared: tuple[str, ...]
    disappeared: tuple[str, ...]
    warnings: tuple[str, ...]
    failures: tuple[str, ...] = ()

    def those(self, verdict: Verdict) -> list[Change]:
        """The changes with this verdict, the largest first."""

        def size(change: Change) -> float:
            factor = change.factor
            return max(factor, 1 / factor) if factor else float("inf")

        return sorted((each for each in self.changes if each.verdict == verdict), key=size, reverse=True)


def compare(before: Results, after: Results) -> Comparison:
    """Compare two runs.

    Raises:
        ValueError: If they ran on different devices or with different profiles.
    """
    for name in ("device", "profile"):
        old, new = before.facts.get(name), after.facts.get(name)
        if old != new:
            raise ValueError(f"{name} must be the same in both files, got {old!r} and {new!r}")
    old, new = (each.facts.get("profile_sizes") for each in (before, after))
    if old and new and old != new:
        different = sorted(name for name in old if old[name] != new.get(name))
        raise ValueError(f"the profile must have the same sizes in both files; different are {', '.join(different)}")
    warnings = []
    machine = [name for name in ("cpu", "gpu", "cores", "threads") if before.facts.get(name) != after.facts.get(name)]
    if machine:
        warnings.append(f"The machines differ ({', '.join(machine)}), so times are not compared.")
    if before.facts.get("versions", {}).get("torch") != after.facts.get("versions", {}).get("torch"):
        warnings.append("The versions of torch differ.")
    names = {*_peers(before), *_peers(after), "loop", "torch"} - {BASELINE}
    old, new = ({each.name: each for each in _measured(results, names)} for results in (before, after))
    if machine:
        old, new = ({name: each for name, each in found.items() if each.unit not in NOISY} for found in (old, new))
    disappeared = tuple(name for name in old if name not in new)
    expected = _expected(before, after)
    missing = [name for name in disappeared if old[name].lower is not None and name in expected]
    return Comparison(
        tuple(Change(old[name], new[name]) for name in old if name in new),
        tuple(name for name in new if name not in old),
        disappeared,
        tuple(warnings),
        (*_failures(before, after), *([f"Missing: {_some(missing)}"] if missing else [])),
    )


def _expected(before: Results, after: Results) -> set[str]:
    """Names of the first run that the second one should have, too: if it ran the same suites with the same libraries,
    all figures, and of each problem that it solved the status of each solver."""
    problems = {entry.problem for entry in after.entries}
    names = {f"{_contest_name(entry)}.status" for entry in before.entries if entry.problem in problems}
    if before.seconds.keys() <= after.seconds.keys() and _peers(before) <= _peers(after):
        there = {figure.name for figure in after.figures}  # some without a value, which are failures of their own
        names |= {figure.name for figure in before.figures} - there
    return names


def _failures(before: Results, after: Results) -> Iterator[str]:
    known = {notice.split(" failed:")[0] for notice in before.notices if " failed:" in notice}
    yield from (n for n in after.notices if " failed:" in n and n.split(" failed:")[0] not in known)
    had = {figure.name for figure in before.figures if figure.value is not None}
    yield from (f"{f.name} has no value any more" for f in after.figures if f.value is None and f.name in had)


def _peers(results: Results) -> set[str]:
    return {*results.facts.get("peers", ()), *(entry.library for entry in results.entries)}


def _is_ratio(name: str) -> bool:
    """Whether a figure is another library's number over pydeq's; not that of one of pydeq's modes."""
    return name.endswith(f"_over_{BASELINE}") and f"{BASELINE}_" not in name


def _measured(results: Results, others: set[str]) -> Iterator[Measured]:
    for figure in results.figures:
        if figure.value is None:
            continue
        parts = re.split(r"[._]", figure.name)
        lower, floor = _rule(figure.name, figure.unit)
        if not _is_ratio(figure.name) and others.intersection(parts):
            lower = None  # another library's
        if UNJUDGED.fullmatch(figure.name):
            lower = None
        text = f"{number(figure.value)}{'' if figure.unit == '1' else f' {figure.unit}'}"
        unit = "ratio" if _is_ratio(figure.name) else figure.unit
        yield Measured(figure.name, figure.value, figure.low, figure.high, unit, lower, floor, text)
    for entry in results.entries:
        yield from _of_entry(entry)


def _rule(name: str, unit: str) -> tuple[bool | None, float]:
    """Whether lower is better, and the factor that is within the noise."""
    if _is_ratio(name) or unit == "GB/s":
        return False, FLOOR
    if unit in TIMES:
        return True, FLOOR
    if unit in COUNTS:
        return True, EXACT
    if unit in SIZES:
        return True, MEMORY_FLOOR
    if name.startswith("converged.") or name.endswith(".converged"):
        return False, EXACT
    return None, EXACT


def _contest_name(entry: Entry) -> str:
    return f"contest.{entry.problem}.{entry.contender}"


def _of_entry(entry: Entry) -> Iterator[Measured]:
    name = _contest_name(entry)
    lower = True if entry.library == BASELINE else None
    rank = next(rank for rank, group in enumerate(STATUSES) if entry.status in group)
    yield Measured(f"{name}.status", rank, None, None, "", lower, EXACT, entry.status)
    if entry.status != "solved":
        return
    for unit, value in (("evaluations", entry.evaluations), ("products", entry.products)):
        if value is not None:
            text = f"{number(value)} {unit}"
            yield Measured(f"{name}.{unit}", value, None, None, "calls", lower, EXACT, text)
    if entry.seconds is not None:
        text = f"{number(entry.seconds * 1e3)} ms"
        low, high = entry.seconds_low, entry.seconds_high
        yield Measured(f"{name}.time", entry.seconds, low, high, "s", lower, FLOOR, text)


def show(console: Console, found: Comparison) -> None:
    """Print what changed, the largest changes first, and how many figures were compared."""
    for warning in found.warnings:
        console.print(Text(warning, style="yellow"))
    for failure in found.failures:
        console.print(Text(failure, style="red"))
    styles: dict[Verdict, str] = {"worse": "red", "better": "green"}
    for verdict, style in styles.items():
        changes = found.those(verdict)
        if not changes:
            continue
        table = Table(title=f"{verdict.capitalize()}", title_justify="left", title_style=f"bold {style}")
        table.add_column("figure", overflow="fold")
        for heading in ("before", "after", "after / before"):
            table.add_column(heading, justify="right")
        for change in changes[:SHOWN]:
            factor = None if change.before.name.endswith(".status") else change.factor
            table.add_row(change.before.name, change.before.text, change.after.text, number(factor))
        if len(changes) > SHOWN:
            table.caption, table.caption_justify = f"and {len(changes) - SHOWN} more", "left"
        console.print(table)
    for title, names in (("Appeared", found.appeared), ("Disappeared", found.disappeared)):
        if names:
            console.print(Text(f"{title}: {_some(names)}"))
    counts = Counter(change.verdict for change in found.changes)
    compared = len(found.changes) - counts["not judged"]
    console.print(
        Text(
            f"Compared {compared} figures of {BASELINE}: {counts['worse']} worse, {counts['better']} better,"
            f" {counts['same']} the same or within the noise. {len(found.appeared)} appeared,"
            f" {len(found.disappeared)} disappeared. {counts['not judged']} are of other libraries, or no value of them"
            " is better."
        )
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


def load(path: Path) -> Results:
    """The results in a file.

    Raises:
        ValueError: If the file is no summary of the suite.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        results = Results.from_json(content)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a summary of the suite: {type(error).__name__}: {error}") from None
    if not results.figures and not results.entries:
        raise ValueError(f"{path} has no figures")
    return results


def main(paths: Sequence[Path]) -> int:
    """Print the comparison of two files.

    Returns:
        1 if a figure got worse or is missing, or a suite failed, 2 if the files cannot be compared, else 0.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    try:
        runs = [load(path) for path in paths]
        found = compare(*runs)
    except ValueError as error:
        print(f"python -m benchmarks: --compare: {error}", file=sys.stderr)
        return 2
    for title, path, run in zip(("before", "after"), paths, runs, strict=True):
        commit, date = (run.facts.get(name) or "unknown" for name in ("commit", "date"))
        console.print(f"{title}: {path}, commit {commit[:10]}, {date}", highlight=False)
    show(console, found)
    return 1 if found.those("worse") or found.failures else 0
