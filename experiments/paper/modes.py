"""The penalty by differences of fn, and by vector-Jacobian products: accuracy at hard stops."""

from __future__ import annotations

from typing import ClassVar

from experiments.paper.experiment import (
    Experiment,
    Measurements,
    Trainings,
    metric,
    over_stops,
    radius,
    seconds,
    seeded,
)
from experiments.paper.recipes import Recipes
from experiments.paper.report import Panel, Report, ReportTable, Row, claim

SEEDS = 3
"""The smallest number of seeds: trainings from the same seed drift apart."""

NEAR = 1.0
"""Points of accuracy that the cheaper penalty may cost."""

VJP, DIFFERENCE = "penalized, vjp", "penalized, difference"


class Modes(Experiment):
    """The loss of accuracy with the cheaper penalty. The paper has only vector-Jacobian products."""

    name: ClassVar[str] = "modes"
    title: ClassVar[str] = "the penalty by differences, against vector-Jacobian products"

    def trainings(self, recipes: Recipes, seeds: int) -> Trainings:
        images, seeds = recipes.images, max(SEEDS, seeds)
        return {
            VJP: seeded(images.training(), seeds),
            DIFFERENCE: seeded(images.training(mode="difference"), seeds),
        }

    def report(self, recipes: Recipes, found: Measurements) -> Report:
        images = recipes.images
        rows = []
        for label, group in found.items():
            stopped = [metric(group, stop) for stop in images.stops]
            rows.append(Row(label, (*stopped, metric(group, None), radius(group), seconds(group))))
        columns = ("penalty", *(f"stop {stop}" for stop in images.stops), "own cap", "spectral radius", "seconds")
        table = ReportTable("Test accuracy, %, at hard stops", columns, tuple(rows))
        vjp, difference = (metric(found[label], images.stop).number for label in (VJP, DIFFERENCE))
        near = claim(
            "modes.near",
            f"at a hard stop of {images.stop} the model penalized by differences is at most {NEAR} points worse than"
            " the one penalized by vector-Jacobian products",
            {"difference": difference, "vjp": vjp, "margin": difference - vjp}, difference >= vjp - NEAR,
        )  # fmt: skip
        panel = Panel("Test accuracy at a hard stop", "evaluations of f allowed", "%", tuple(
            over_stops(label, group, images.stops, "o-", i) for i, (label, group) in enumerate(found.items())
        ))  # fmt: skip
        return Report([table], [near], [panel])
