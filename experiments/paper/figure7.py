"""Figure 7: the mean spectral radius during trainings, with and without the penalty, at two caps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from experiments.paper.experiment import Experiment, Measurements, Trainings, over_training, residual, seeded
from experiments.paper.measurement import Measurement
from experiments.paper.published import FIGURE7
from experiments.paper.recipes import PENALIZED_GENEROUS, PENALIZED_SMALL, PLAIN_GENEROUS, PLAIN_SMALL, Recipes
from experiments.paper.report import Entry, Panel, Report, ReportTable, Row, claim

GROWTH = 0.05
"""A growth of the mean spectral radius that is more than scatter."""


class Figure7(Experiment):
    """The spectral radius with and without the penalty."""

    name: ClassVar[str] = "figure7"
    title: ClassVar[str] = "the spectral radius in the course of training"

    def trainings(self, recipes: Recipes, seeds: int) -> Trainings:
        several = 1 if recipes.needs_gpu else seeds
        return {
            label: seeded(training, 1 if label == PENALIZED_GENEROUS else several)
            for label, training in recipes.figure7.items()
        }

    def report(self, recipes: Recipes, found: Measurements) -> Report:
        quarters = {label: _quarters(group) for label, group in found.items()}
        rows = tuple(
            Row(label, (
                *(Entry(values, "number") for values in quarters[label]), residual(group, None),
                Entry((), paper=FIGURE7.get(label)),
            ))
            for label, group in found.items()
        )  # fmt: skip
        columns = (
            "training", "first quarter", "last quarter", "largest mean", "relative residual", "(the paper's words)",
        )  # fmt: skip
        table = ReportTable("Mean spectral radius on validation data", columns, rows)
        small, generous, bounded = (
            [Entry(values).number for values in quarters[label]]
            for label in (PLAIN_SMALL, PLAIN_GENEROUS, PENALIZED_SMALL)
        )
        claims = [
            claim(
                "figure7.bounded",
                "with the penalty the mean spectral radius stays below 1 in the last quarter of the training",
                {"last quarter": bounded[1], "largest": bounded[2]}, bounded[1] < 1.0,
            ),
            claim(
                "figure7.growing",
                f"without it, at the small cap, it grows by at least {GROWTH} from the first quarter to the last",
                {"first quarter": small[0], "last quarter": small[1]}, small[1] >= small[0] + GROWTH,
            ),
            claim(
                "figure7.beyond",
                "and ends beyond 1",
                {"last quarter": small[1]}, small[1] > 1.0,
            ),
            claim(
                "figure7.generous",
                "a generous cap keeps it smaller than the small cap does",
                {"generous": generous[1], "small": small[1]}, generous[1] < small[1],
            ),
        ]  # fmt: skip
        styles = {
            PLAIN_SMALL: ("-", 0),
            PLAIN_GENEROUS: ("--", 0),
            PENALIZED_SMALL: ("-", 1),
            PENALIZED_GENEROUS: ("--", 1),
        }
        curves = [over_training(label, group, "radius", *styles[label]) for label, group in found.items()]
        largest = [over_training(label, group, "radius_max", *styles[label]) for label, group in found.items()]
        panels = [
            Panel("Mean spectral radius", "step", "on validation data", tuple(curves)),
            Panel("Largest spectral radius", "step", "on validation data", tuple(largest)),
        ]
        return Report([table], claims, panels)


def _quarters(group: Sequence[Measurement]) -> tuple[tuple[float | None, ...], ...]:
    """The mean radius in the first and in the last quarter of the evaluations after pre-training, and the largest mean.

    Returns:
        For each of the three, the values of the seeds; None where nothing was evaluated.
    """
    return tuple(zip(*map(_quarters_of, group), strict=True))


def _quarters_of(measured: Measurement) -> tuple[float | None, float | None, float | None]:
    begin = measured.config["pretraining"]["steps"]
    steps, radii = measured.curve("radius")
    found = [radius for step, radius in zip(steps, radii, strict=True) if step > begin and radius is not None]
    if not found:
        return None, None, None
    count = max(1, len(found) // 4)
    return sum(found[:count]) / count, sum(found[-count:]) / count, max(found)
