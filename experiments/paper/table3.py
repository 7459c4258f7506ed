"""Table 3: accuracy by the penalty's strength and the hard stop."""

from __future__ import annotations

import math
from typing import ClassVar

from experiments.paper.experiment import Experiment, Measurements, Trainings, metric, over_stops, radius, seeded
from experiments.paper.published import TABLE3
from experiments.paper.recipes import Recipes, published_penalty
from experiments.paper.report import Entry, Panel, Report, ReportTable, Row, claim

STOPS = (1, 2, 3, 4, 5, 6)
"""The paper's."""


MARGIN = 0.7
"""Points of accuracy: more than the error of a test with 10 000 images."""


class Table3(Experiment):
    """The best strength of the penalty at a hard stop."""

    name: ClassVar[str] = "table3"
    title: ClassVar[str] = "the penalty's strength against the hard stop"

    def trainings(self, recipes: Recipes, seeds: int) -> Trainings:
        images = recipes.images
        main = published_penalty(images.penalized).strength
        trainings = {_label(0.0): seeded(images.training(strength=0.0), seeds)}
        for strength in images.strengths:
            trainings[_label(strength)] = seeded(images.training(strength=strength), seeds if strength == main else 1)
        return trainings

    def report(self, recipes: Recipes, found: Measurements) -> Report:
        images = recipes.images
        stops = [stop for stop in STOPS if stop in images.stops]
        rows = []
        for strength in (0.0, *images.strengths):
            group = found[_label(strength)]
            paper = TABLE3.get(strength, {})
            entries = [metric(group, stop, paper.get(stop)) for stop in stops]
            rows.append(Row(_label(strength), (*entries, metric(group, None), radius(group))))
        for strength, paper in TABLE3.items():
            if strength not in images.strengths or recipes.name != "paper":
                entries = [Entry((), paper=paper[stop]) for stop in stops]
                rows.append(Row(f"the paper's {strength:g}", (*entries, Entry(()), Entry(()))))
        columns = ("strength", *(f"stop {stop}" for stop in stops), "own cap", "spectral radius")
        table = ReportTable("Test accuracy, %, at hard stops (in parentheses the paper's)", columns, tuple(rows))
        means = {strength: metric(found[_label(strength)], images.stop).number for strength in images.strengths}
        best = max(means, key=lambda strength: -math.inf if math.isnan(means[strength]) else means[strength])
        ends = (images.strengths[0], images.strengths[-1])
        middle = best not in ends and all(means[best] >= means[end] + MARGIN for end in ends)
        accuracies = {f"accuracy at {strength:g}": value for strength, value in means.items()}
        optimum = claim(
            "table3.optimum",
            f"at a hard stop of {images.stop} the best strength is neither the weakest nor the strongest, by at least"
            f" {MARGIN} points",
            {"best strength": best} | accuracies, middle,
        )  # fmt: skip
        panel = Panel("Test accuracy by strength", "evaluations of f allowed", "%", tuple(
            over_stops(label, group, images.stops, "o-", i) for i, (label, group) in enumerate(found.items())
        ))  # fmt: skip
        return Report([table], [optimum], [panel])


def _label(strength: float) -> str:
    return f"strength {strength:g}"
