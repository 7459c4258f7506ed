"""A summary of the benchmark suite as sections of documents.

Their templates are ``measured.md``, ``rows.md``, ``contest.md`` and ``targets.md``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from benchmarks.profiles import BEYOND_CACHE
from benchmarks.report import contest
from benchmarks.report.rendering import render
from benchmarks.results import Entry, Results, Target, number
from benchmarks.suites.models import CASES as MODELS

SOLVERS = {"picard": "Picard", "anderson": "Anderson, memory 6", "broyden": "Broyden, 30 steps"}
PROBLEMS = (
    ("tanh.d128.rho0.95", "tanh(Wz + x), D 128, spectral radius 0.95", "1e-05"),
    ("tanh.d1024.rho0.95", "the same, D 1024", "1e-05"),
    ("conv", "convolutional cell", "1e-05"),
    ("symmetric", "symmetric linear map, D 50, 0.95", "1e-06"),
    ("tanh.unstable", "tanh(Wz + x), D 128, 1.5 (Anderson: memory 10)", "1e-06"),
)
CELLS = {
    "conv": "convolutional, (16, 32x16x16)",
    "transformer": "transformer, (8, 64x128)",
    "dense": "tanh(Wz + x), (32, 256)",
}
DIFFERENCES = re.compile(r"differences\.(.+\.float32|.+\.exact|digits)\.")
BEATEN = 15
STOPS = (1, 2, 3, 4, 6, 8, 12)


class _Summary:
    """The figures of one summary.json, and a record of the figures that were read."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.figures: dict[str, dict[str, Any]] = {figure["name"]: figure for figure in facts["figures"]}
        self.read: set[str] = set()

    def figure(self, name: str) -> dict[str, Any]:
        self.read.add(name)
        return self.figures[name]

    def has(self, name: str) -> bool:
        """Whether a figure was measured."""
        return name in self.figures

    def value(self, name: str) -> float:
        return self.figure(name)["value"]

    def text(self, name: str, scale: float = 1.0) -> str:
        return number(self.value(name) * scale)

    def ratio(self, name: str) -> str:
        """A ratio with its quartiles."""
        figure = self.figure(name)
        value, low, high = (f"{figure[key]:.1f}" for key in ("value", "low", "high"))
        return f"{value}x ({low} to {high})"

    def shapes(self, solver: str) -> Iterator[tuple[int, int]]:
        """Batch and state of each shape at which this solver's overhead was measured."""
        for name in self.figures:
            found = re.fullmatch(rf"overhead\.{solver}\.(\d+)x(\d+)\.t1\.pydeq", name)
            if found:
                yield int(found[1]), int(found[2])


def section(facts: Mapping[str, Any], link: str) -> str:
    """The text of a section.

    Args:
        facts: The content of a summary.json.
        link: Where it is.

    Raises:
        KeyError: If it lacks a figure.
    """
    return _render(_Summary(facts), facts, link)


def rows_section(facts: Mapping[str, Any]) -> str:
    """The few rows that README shows; ``facts`` are the content of a summary.json."""
    return render("rows.md", facts=facts, found=_Summary(facts), peer=_peer(facts), targets=_targets(facts))


def contest_section(facts: Mapping[str, Any]) -> str:
    """What solved what, and how fast; ``facts`` are the content of a summary.json."""
    results = Results.from_json(facts)
    return render(
        "contest.md",
        facts=facts,
        summary=contest.sentence(results),
        standings=contest.standings(results.entries),
        beaten=contest.beaten_by(results.entries),
        most=BEATEN,
    )


def targets_section(facts: Mapping[str, Any]) -> str:
    """The targets that were missed; ``facts`` are the content of a summary.json."""
    return render("targets.md", facts=facts, targets=_targets(facts))


def shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a summary.json that documents show; docs/penalty.md has the figures of differences."""
    found = _Summary(facts)
    _render(found, facts, link="")
    figures = [each for each in facts["figures"] if each["name"] in found.read or DIFFERENCES.match(each["name"])]
    return without_curves(facts) | {"figures": figures}


def without_curves(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A summary.json without curves and tables, with its entries in a short form."""
    kept = {name: value for name, value in facts.items() if name not in ("curves", "tables", "entries")}
    entries = [_short(Entry(**row)) for row in facts.get("entries", ())]
    return kept | ({"entries": entries} if entries else {})


def _short(entry: Entry) -> dict[str, Any]:
    """An entry without the fields that have their default, and times with four digits."""
    defaults = {each.name: each.default for each in fields(Entry)}
    row = {name: value for name, value in asdict(entry).items() if value != defaults[name]}
    return {name: float(f"{value:.4g}") if "seconds" in name else value for name, value in row.items()}


def _peer(facts: Mapping[str, Any]) -> str:
    return next(name for name in facts["peers"] if name != "pydeq")


def _targets(facts: Mapping[str, Any]) -> list[Target]:
    return list(map(_target, facts["targets"]))


def _target(entry: Mapping[str, Any]) -> Target:
    found = Target(**{field.name: entry[field.name] for field in fields(Target)})
    if found.measured is None and entry.get("met") is False:  # JSON has no infinite numbers
        found = replace(found, measured=math.inf if found.relation == "<=" else -math.inf)
    return found


def _render(found: _Summary, facts: Mapping[str, Any], link: str) -> str:
    return render(
        "measured.md",
        facts=facts,
        link=link,
        found=found,
        peer=_peer(facts),
        solvers=SOLVERS,
        problems=PROBLEMS,
        cells=CELLS,
        models=MODELS,
        stops=STOPS,
        beyond_cache=BEYOND_CACHE,
    )
