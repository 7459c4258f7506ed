"""The record of a training: rows of numbers, and the result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn


@dataclass
class StepRow:
    """Means over the training steps since the previous row.

    Args:
        step: Number of steps done.
        epoch: Epoch of the last step, from 0.
        loss: Loss of the task, without the penalty.
        penalty: The Jacobian penalty that was added to the loss; 0 in steps without one.
        learning_rate: Learning rate of the last step.
        strength: The penalty's gamma in the last step.
        nfe: Evaluations of f in a solve, or the layers of a shallow step.
        residual: Relative residual ||f(z) - z|| / ||f(z)||, mean over samples.
        backward_nfe: Products with the Jacobian in an adjoint's solve; None if there were no such solves.
        backward_residual: Relative residual of the adjoint's solves, mean over samples; None if there were none.
        gradient_norm: Norm of the gradient before clipping; None without clipping.
        loss_scale: Scale of the loss for fp16; None otherwise.
        seconds: Training time, without pauses.
        converged: Share of samples whose solve converged, in [0, 1]; None if all steps were shallow.
        backward_converged: Share of samples whose adjoint's solve converged, in [0, 1]; None if there were none.
    """

    step: int
    epoch: int
    loss: float
    penalty: float
    learning_rate: float
    strength: float
    nfe: float
    residual: float
    backward_nfe: float | None
    backward_residual: float | None
    gradient_norm: float | None
    loss_scale: float | None
    seconds: float
    converged: float | None = None
    backward_converged: float | None = None


@dataclass
class Evaluation:
    """Measurements on validation or test data.

    Args:
        loss: Loss of the task, mean over samples, tokens or nodes.
        metric: Accuracy in [0, 1], or perplexity.
        nfe: Evaluations of f, mean over batches.
        residual: Relative residual, mean over samples.
        radius: Spectral radius of the Jacobian at the equilibrium, mean over some samples; None if not measured.
        radius_max: The largest spectral radius of the same samples.
        stops: The metric at hard stops, by the number of evaluations.
        stop_residuals: The relative residual at the same hard stops.
        converged: Share of samples whose solve converged, in [0, 1].
    """

    loss: float
    metric: float
    nfe: float
    residual: float
    radius: float | None = None
    radius_max: float | None = None
    stops: dict[int, float] = field(default_factory=dict)
    stop_residuals: dict[int, float] = field(default_factory=dict)
    converged: float | None = None

    def flat(self) -> dict[str, Any]:
        """Return a mapping with one number per key: ``stops`` becomes ``metric@1``, ``residual@1`` and so on."""
        row = asdict(self)
        metrics, residuals = row.pop("stops"), row.pop("stop_residuals")
        first = {name: row.pop(name) for name in ("step", "epoch", "seconds") if name in row}
        stops = {f"metric@{stop}": value for stop, value in metrics.items()}
        return first | row | stops | {f"residual@{stop}": value for stop, value in residuals.items()}


@dataclass
class EvaluationRow(Evaluation):
    """An evaluation on validation data, with means over the training steps since the previous one.

    The fields ``train_...`` are these means; see :class:`StepRow`.

    Args:
        step: Number of steps done.
        epoch: Number of epochs done, rounded down.
        seconds: Training time, without pauses.
        train_loss: Loss of the task.
        train_penalty: The penalty.
        train_nfe: Evaluations of f in a solve.
        train_residual: Relative residual.
        train_backward_nfe: Products with the Jacobian in an adjoint's solve.
        train_backward_residual: Relative residual of the adjoint's solves.
        train_converged: Share of samples whose solve converged.
        train_backward_converged: Share of samples whose adjoint's solve converged.
    """

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    train_penalty: float | None = None
    train_nfe: float | None = None
    train_residual: float | None = None
    train_backward_nfe: float | None = None
    train_backward_residual: float | None = None
    train_converged: float | None = None
    train_backward_converged: float | None = None


@dataclass
class History:
    """The rows of a training, in order."""

    steps: list[StepRow] = field(default_factory=list)
    evaluations: list[EvaluationRow] = field(default_factory=list)

    def column(self, name: str) -> list[Any]:
        """Return one number of each evaluation, by a field's name or as ``metric@3``; None where it was not measured.

        Raises:
            KeyError: If no evaluation has such a number.
        """
        rows = [row.flat() for row in self.evaluations]
        if rows and not any(name in row for row in rows):
            raise KeyError(f"name must be one of {', '.join(rows[-1])}, got {name!r}")
        return [row.get(name) for row in rows]

    def best(self, metric: str) -> EvaluationRow | None:
        """Return the evaluation with the highest accuracy or the lowest perplexity, the first of equal ones.

        Args:
            metric: "accuracy" or "perplexity".
        """
        sign = 1.0 if metric == "accuracy" else -1.0
        rows = [row for row in self.evaluations if math.isfinite(row.metric)]
        return max(rows, key=lambda row: sign * row.metric, default=None)

    def mapping(self) -> dict[str, Any]:
        """Return the history as JSON holds it."""
        return {"steps": [asdict(row) for row in self.steps], "evaluations": [asdict(row) for row in self.evaluations]}

    @staticmethod
    def of(mapping: dict[str, Any]) -> History:
        """Make a history from a :meth:`mapping` that went through JSON."""
        evaluations = []
        for row in mapping["evaluations"]:
            stops = {name: {int(key): value for key, value in row[name].items()} for name in STOPS}
            evaluations.append(EvaluationRow(**(row | stops)))
        return History([StepRow(**row) for row in mapping["steps"]], evaluations)


STOPS = ("stops", "stop_residuals")
STEP_COLUMNS = [each.name for each in fields(StepRow)]


@dataclass(repr=False)
class Result:
    """The result of :func:`experiments.training.train`.

    Args:
        status: "finished", or "diverged" if the loss or parameters became infinite or NaN, which ends a training.
        metric: Name of the metric: "accuracy" or "perplexity".
        history: The rows.
        test: The evaluation on test data after the last step; None if the training diverged.
        steps: Number of steps done.
        model: The trained model; under fsdp2 its parameters are still sharded.
        out: The folder; None if there was none.
    """

    status: str
    metric: str
    history: History
    test: Evaluation | None
    steps: int
    model: nn.Module
    out: Path | None = None

    def __repr__(self) -> str:
        test = "" if self.test is None else f", test {self.metric} {metric_text(self.metric, self.test.metric)}"
        place = "" if self.out is None else f", in {self.out}"
        return f"Result({self.status} after {self.steps} steps{test}{place})"


def metric_text(metric: str, value: float) -> str:
    """Write a metric's value: 97.50% for an accuracy, 7.39 for a perplexity."""
    return f"{value:.2%}" if metric == "accuracy" else f"{value:.2f}"
