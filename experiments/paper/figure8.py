"""Figure 8: weight decay against the penalty."""

from __future__ import annotations

import math
from typing import ClassVar

from experiments.paper.experiment import (
    Experiment,
    Measurements,
    Trainings,
    metric,
    over_training,
    radius,
    residual,
    seeded,
)
from experiments.paper.published import FIGURE8
from experiments.paper.recipes import DECAY, PENALIZED, PLAIN, Recipes
from experiments.paper.report import Entry, Panel, Report, ReportTable, Row, claim

FACTOR = 2.0
"""The penalized model's residual must be smaller by this factor."""


class Figure8(Experiment):
    """Weight decay instead of the penalty."""

    name: ClassVar[str] = "figure8"
    title: ClassVar[str] = "weight decay against the penalty"

    def trainings(self, recipes: Recipes, seeds: int) -> Trainings:
        several = 1 if recipes.needs_gpu else seeds
        return {
            label: seeded(training, 1 if label.startswith(DECAY) else several)
            for label, training in recipes.figure8.items()
        }

    def report(self, recipes: Recipes, found: Measurements) -> Report:
        stop = recipes.figure8_stop
        rows = tuple(
            Row(label, (
                metric(group, stop), metric(group, None), residual(group, stop), residual(group, None), radius(group),
                Entry((), paper=FIGURE8.get(DECAY if label.startswith(DECAY) else label)),
            ))
            for label, group in found.items()
        )  # fmt: skip
        name = next(iter(found.values()))[0].metric
        columns = (
            "training", f"{name} at {stop}", f"{name}, own cap", f"residual at {stop}", "residual, own cap",
            "spectral radius", "(the paper's words)",
        )  # fmt: skip
        table = ReportTable(
            f"Test {name} and relative residual at a hard stop of {stop} and at the training's cap", columns, rows
        )
        sign = 1.0 if name == "accuracy" else -1.0
        values = {label: metric(group, stop).number for label, group in found.items()}
        residuals = {label: residual(group, stop).number for label, group in found.items()}
        decays = [label for label in found if label.startswith(DECAY) and not math.isnan(values[label])]
        # All trainings diverged: take the first one, which has no numbers.
        best = max(
            decays, key=lambda label: sign * values[label], default=next(k for k in found if k.startswith(DECAY))
        )
        compared = (PENALIZED, best, PLAIN)
        claims = [
            claim(
                "figure8.metric",
                f"at a hard stop of {stop} no weight decay comes up to the penalty",
                {label: values[label] for label in compared}, sign * values[PENALIZED] > sign * values[best],
            ),
            claim(
                "figure8.residual",
                f"there the best weight decay's relative residual is at least {FACTOR:g} times that of the penalty",
                {label: residuals[label] for label in compared}, residuals[best] >= FACTOR * residuals[PENALIZED],
            ),
        ]  # fmt: skip
        panels = [
            Panel("Relative residual in training", "step", "at the training's cap", tuple(
                over_training(label, group, "train_residual", "-", i) for i, (label, group) in enumerate(found.items())
            ), log=True),
            Panel("Mean spectral radius", "step", "on validation data", tuple(
                over_training(label, group, "radius", "-", i) for i, (label, group) in enumerate(found.items())
            )),
        ]  # fmt: skip
        return Report([table], claims, panels)
