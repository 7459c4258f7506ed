"""The base of experiments: trainings, and a report on their measurements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from experiments.paper.measurement import Measurement, Training
from experiments.paper.recipes import PENALIZED, PLAIN, ImageRecipes, Recipes
from experiments.paper.report import Curve, Entry, Report, Unit

Trainings = Mapping[str, Sequence[Training]]
"""Trainings by label, one for each seed."""

Measurements = Mapping[str, Sequence[Measurement]]
"""Measurements of the trainings, by the same labels."""


class Experiment(ABC):
    """One table or figure of the paper."""

    name: ClassVar[str]
    """Its name on the command line."""

    title: ClassVar[str]
    """Its subject."""

    @abstractmethod
    def trainings(self, recipes: Recipes, seeds: int) -> Trainings:
        """Return the trainings that the experiment needs.

        Args:
            recipes: Recipes of a profile.
            seeds: Number of seeds of the main rows.
        """

    @abstractmethod
    def report(self, recipes: Recipes, found: Measurements) -> Report:
        """Make the report.

        Args:
            recipes: The recipes of the trainings.
            found: Measurements of all trainings.
        """


def seeded(training: Training, seeds: int) -> list[Training]:
    """Return the training with the seeds 0, ..., ``seeds`` - 1."""
    return [training.with_seed(seed) for seed in range(seeds)]


def plain_and_penalized(images: ImageRecipes, seeds: int) -> dict[str, list[Training]]:
    """Return the main trainings of images: unpenalized at the generous cap, penalized at the small one."""
    return {
        PLAIN: seeded(images.training(cap="generous", strength=0.0), seeds),
        PENALIZED: seeded(images.training(), seeds),
    }


def metric(group: Sequence[Measurement], stop: int | None, paper: float | str | None = None) -> Entry:
    """Entry of the test metric at a hard stop; None for the model's own cap."""
    unit: Unit = "percent" if group and group[0].metric == "accuracy" else "perplexity"
    return Entry(tuple(each.at(stop) for each in group), unit, paper)


def evaluations(group: Sequence[Measurement], stop: int | None, paper: float | str | None = None) -> Entry:
    """Entry of the evaluations of f at a hard stop; None for the model's own cap."""
    if stop is not None:
        return Entry((float(stop),), "number", paper)
    return Entry(tuple(None if each.test is None else each.test.nfe for each in group), "number", paper)


def residual(group: Sequence[Measurement], stop: int | None) -> Entry:
    """Entry of the relative residual on test data."""
    values = (
        None if each.test is None else each.test.residual if stop is None else each.test.stop_residuals[stop]
        for each in group
    )  # fmt: skip
    return Entry(tuple(values), "residual")


def radius(group: Sequence[Measurement]) -> Entry:
    """Entry of the mean spectral radius at the end of training."""
    return Entry(tuple(None if each.test is None else each.test.radius for each in group), "number")


def seconds(group: Sequence[Measurement]) -> Entry:
    """Entry of the seconds of training."""
    return Entry(tuple(each.seconds for each in group), "number")


def to_reach(group: Sequence[Measurement], stops: Sequence[int], target: float) -> float:
    """Find the fewest evaluations, of the hard stops and the full solve, with a mean accuracy of at least ``target``.

    Returns:
        Infinity if no number is enough; NaN if something was not measured.
    """
    full, most = metric(group, None).number, evaluations(group, None).number
    if math.isnan(target + full + most):
        return math.nan
    reached = [float(stop) for stop in stops if metric(group, stop).number >= target]
    return min([*reached, most if full >= target else math.inf])


def least_to_reach(group: Sequence[Measurement], stops: Sequence[int], target: float) -> float:
    """A lower bound of :func:`to_reach` over all numbers of evaluations: one more than the last tested one below it."""
    reached = to_reach(group, stops, target)
    if not math.isfinite(reached):
        return reached
    return 1.0 + max((float(stop) for stop in stops if stop < reached), default=0.0)


def paired(a: Sequence[Measurement], b: Sequence[Measurement], stop: int | None) -> Entry:
    """The metric of ``a`` minus that of ``b``, of each seed that both have."""
    pairs = zip(a, b, strict=False)
    return Entry(tuple(difference(x.at(stop), y.at(stop)) for x, y in pairs), "points")


def difference(a: float | None, b: float | None) -> float | None:
    """a - b; None if one of them is."""
    return None if a is None or b is None else a - b


def over_training(label: str, group: Sequence[Measurement], column: str, style: str, color: int) -> Curve:
    """Curve of a column of the evaluations on validation data, mean over the seeds, against the steps."""
    curves = [each.curve(column) for each in group]
    longest = max((curve[0] for curve in curves), key=len)
    values = [Entry(tuple(curve[1][i] for curve in curves if i < len(curve[1]))).mean for i in range(len(longest))]
    return Curve(label, longest, values, style, color)


def over_stops(label: str, group: Sequence[Measurement], stops: Sequence[int], style: str, color: int) -> Curve:
    """Curve of the test metric, mean over the seeds, against the hard stop, with bars if there are several seeds."""
    entries = [metric(group, stop) for stop in stops]
    curve = Curve(label, [float(stop) for stop in stops], [entry.mean for entry in entries], style, color)
    return curve if len(group) < 2 else replace(curve, bars=[entry.range for entry in entries])
