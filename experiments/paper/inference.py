"""Trained image classifiers at hard stops: accuracy by Broyden's and by Anderson's method, and the time of a batch."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from benchmarks.timing import Spread, threads
from experiments.paper.batch_times import batch_times
from experiments.paper.experiment import Experiment, Measurements, Trainings, metric, plain_and_penalized, residual
from experiments.paper.measurement import ANDERSON_FILE, FORMAT, Measurement, Training, evaluation_of
from experiments.paper.recipes import PENALIZED, PLAIN, Recipes
from experiments.paper.report import Claim, Curve, Entry, Panel, Report, ReportTable, Row, claim
from experiments.paper.worker import tested
from experiments.training import Evaluation, load
from experiments.training.atomic_files import write_whole
from pydeq.models import build
from pydeq.solution import ConvergenceWarning

NEAR = 0.7
"""Points of accuracy between the methods."""

FASTER = 2.0
"""The limit of this experiment: the paper has no times of its image classifiers."""


class Inference(Experiment):
    """Accuracy and time at a hard stop, with two solvers; the paper stops Broyden's method only."""

    name: ClassVar[str] = "inference"
    title: ClassVar[str] = "trained models at a hard stop: the solver, and the time"

    def trainings(self, recipes: Recipes, seeds: int) -> Trainings:
        return plain_and_penalized(recipes.images, seeds)

    def report(self, recipes: Recipes, found: Measurements) -> Report:
        images, stop = recipes.images, recipes.images.stop
        trainings = self.trainings(recipes, max(map(len, found.values())))
        by_anderson = {
            label: [_by_anderson(measured, trainings[label][i]) for i, measured in enumerate(group)]
            for label, group in found.items()
        }
        rows, curves = [], []
        for i, (label, group) in enumerate(found.items()):
            tests = by_anderson[label]
            broyden = [metric(group, each) for each in images.stops]
            anderson = [Entry(tuple(_at(test, each) for test in tests)) for each in images.stops]
            behind = Entry(tuple(None if test is None else test.stop_residuals[stop] for test in tests), "residual")
            rows += [
                Row(f"{label}, Broyden", (*broyden, residual(group, stop))),
                Row(f"{label}, Anderson", (*anderson, behind)),
            ]
            x = [float(each) for each in images.stops]
            for name, entries, style in (("Broyden", broyden, "o-"), ("Anderson", anderson, "s--")):
                bars = [entry.range for entry in entries] if len(group) > 1 else None
                curves.append(Curve(f"{label}, {name}", x, [entry.mean for entry in entries], style, i, bars))
        columns = ("model and method", *(f"stop {each}" for each in images.stops), f"relative residual at {stop}")
        spreads = _times(found, recipes)
        times = ReportTable(
            "Milliseconds, medians with quartiles",
            ("what", "lower", "median", "upper", "times faster than unpenalized"),
            tuple(
                Row(name, tuple(Entry((number,), "number") for number in (
                    times.low, times.median, times.high, next(iter(group.values())).median / times.median,
                )))
                for group in spreads for name, times in group.items()
            ),
        )  # fmt: skip
        panel = Panel("Test accuracy at a hard stop", "evaluations of f allowed", "%", tuple(curves))
        tables = [ReportTable("Test accuracy, %, at hard stops", columns, tuple(rows)), times]
        return Report(tables, self._claims(recipes, found, by_anderson, spreads), [panel])

    def _claims(
        self, recipes: Recipes, found: Measurements, by_anderson: dict[str, list[Evaluation | None]],
        spreads: Sequence[dict[str, Spread]],
    ) -> list[Claim]:  # fmt: skip
        stop = recipes.images.stop
        broyden = metric(found[PENALIZED], stop).number
        anderson = Entry(tuple(_at(test, stop) for test in by_anderson[PENALIZED])).number
        solves, steps = ([each.median for each in group.values()] or [math.nan] for group in spreads)
        return [
            claim(
                "inference.anderson",
                f"at a hard stop of {stop}, Anderson's method is within {NEAR} points of Broyden's on the penalized"
                " model",
                {"Anderson": anderson, "Broyden": broyden, "difference": anderson - broyden},
                abs(anderson - broyden) <= NEAR,
            ),
            claim(
                "inference.time",
                f"the penalized model, stopped there, classifies at least {FASTER} times faster than the unpenalized"
                " one at its own cap",
                {"unpenalized, ms": solves[0], "penalized, ms": solves[-1], "ratio": solves[0] / solves[-1]},
                solves[0] >= FASTER * solves[-1],
            ),
            claim(
                "inference.training_time",
                "a training step with the penalty and its small caps is faster than one without it and with its"
                " generous caps",
                {"unpenalized, ms": steps[0], "penalized, ms": steps[-1], "ratio": steps[0] / steps[-1]},
                steps[0] > steps[-1],
            ),
        ]  # fmt: skip


def _at(test: Evaluation | None, stop: int) -> float | None:
    return None if test is None else 100.0 * test.stops[stop]


def _by_anderson(measured: Measurement, training: Training) -> Evaluation | None:
    """Test a trained model with Anderson's method; the result is kept in the training's folder."""
    if measured.test is None or measured.folder is None:
        return None
    path = measured.folder / ANDERSON_FILE
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] == FORMAT and content["key"] == training.key:
                return evaluation_of(content["test"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}; remove it to test again") from error
    config = training.config.with_values({"model.solver.forward": "anderson"})
    model = build(config.model)
    model.load_state_dict(load(measured.folder).state_dict())
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the stops are set on purpose
        found = tested(training, model)
    content = {"format": FORMAT, "key": training.key, "test": asdict(found)}
    write_whole(path, json.dumps(content) + "\n")
    return found


def _times(found: Measurements, recipes: Recipes) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Time the models of the first seed; nothing if one of them diverged."""
    first = [group[0] for group in found.values()]
    if any(each.test is None for each in first):
        return {}, {}
    models = {label: load(_folder(each)) for label, each in zip(found, first, strict=True)}
    configs = {PLAIN: recipes.images.plain, PENALIZED: recipes.images.penalized}
    return batch_times(models, configs, recipes.images.stop)


def _folder(measured: Measurement) -> Path:
    if measured.folder is None:
        raise ValueError("the measurements must be read from the folders of their trainings")
    return measured.folder
