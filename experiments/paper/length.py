"""The effect of the penalty against the length of training: digits, many seeds, differences of the same seed."""

from __future__ import annotations

from typing import ClassVar

from experiments.paper.experiment import (
    Experiment,
    Measurements,
    Trainings,
    difference,
    metric,
    over_stops,
    paired,
    radius,
    seeded,
)
from experiments.paper.recipes import Recipes
from experiments.paper.report import Entry, Panel, Report, ReportTable, Row, claim

SEEDS = 8
"""The smallest number of seeds: at early stops, trainings scatter by 5 to 20 points."""

STRENGTHS = (0.5, 2.0)

STOP = 4
"""The hard stop that the claims are about."""

SURE = 2.0
"""Standard errors by which a mean difference must exceed 0."""


class Length(Experiment):
    """How long a training must be for its penalty to show at a hard stop; not in the paper."""

    name: ClassVar[str] = "length"
    title: ClassVar[str] = "the effect of the penalty against the length of training"

    def trainings(self, recipes: Recipes, seeds: int) -> Trainings:
        seeds = max(SEEDS, seeds) if recipes.name != "smoke" else max(2, seeds)
        return {
            _label(epochs, strength): seeded(recipes.lengths[epochs].with_strength(strength), seeds)
            for epochs in sorted(recipes.lengths)
            for strength in (0.0, *STRENGTHS)
        }

    def report(self, recipes: Recipes, found: Measurements) -> Report:
        lengths = sorted(recipes.lengths)
        stops = recipes.lengths[lengths[0]].stops
        rows = tuple(
            Row(label, (*(metric(group, stop) for stop in stops), radius(group))) for label, group in found.items()
        )
        columns = ("training", *(f"stop {stop}" for stop in stops))
        gains = {
            (epochs, strength): [_gains(found, epochs, strength, stop) for stop in stops]
            for epochs in lengths
            for strength in STRENGTHS
        }
        differences = tuple(Row(_label(*key), tuple(entries)) for key, entries in gains.items())
        tables = [
            ReportTable("Test accuracy, %, at hard stops", (*columns, "spectral radius"), rows),
            ReportTable(
                "Points that the penalty adds to the accuracy of the same seed, mean ± standard error", columns,
                differences,
            ),
        ]  # fmt: skip
        at = stops.index(STOP)
        short, long = lengths[0], lengths[-1]
        claims = []
        for strength in STRENGTHS:
            first, last = gains[short, strength][at], gains[long, strength][at]
            more = Entry(tuple(map(difference, last.values, first.values)), "points")
            claims.append(claim(
                f"length.shown_{strength:g}",
                f"after {long} epochs the penalty of strength {strength:g} gains accuracy at a hard stop of {STOP}, by"
                f" more than {SURE:g} standard errors",
                {"points": last.number, "standard error": last.error}, last.number > SURE * last.error,
            ))  # fmt: skip
            claims.append(claim(
                f"length.longer_{strength:g}",
                f"and more than after {short} epochs, by more than {SURE:g} standard errors of the difference",
                {f"after {long}": last.number, f"after {short}": first.number, "standard error": more.error},
                more.number > SURE * more.error,
            ))  # fmt: skip
        panels = [
            Panel(f"{epochs} epochs", "evaluations of f allowed", "test accuracy, %", tuple(
                over_stops(f"strength {strength:g}", found[_label(epochs, strength)], stops, "o-", i)
                for i, strength in enumerate((0.0, *STRENGTHS))
            ))
            for epochs in lengths
        ]  # fmt: skip
        return Report(tables, claims, panels)


def _gains(found: Measurements, epochs: int, strength: float, stop: int) -> Entry:
    """Accuracy with the penalty minus accuracy without it, of each seed."""
    return paired(found[_label(epochs, strength)], found[_label(epochs, 0.0)], stop)


def _label(epochs: int, strength: float) -> str:
    return f"{epochs} epochs, " + (f"strength {strength:g}" if strength else "no penalty")
