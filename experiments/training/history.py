"""The record of a training: rows of numbers, and the result."""

from __future__ import annotations

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
        learning_rate, strength: Values of the last step; the strength is the penalty's gamma.
        nfe: Evaluations of f in a solve, or the layers of a shallow step.
        residual: Relative residual ||f(z) - z|| / ||f(z)||, mean over samples.
        backward_nfe, backward_residual: The same for the adjoint's solves; None if there were none.
        gradient_norm: Norm of the gradient before clipping; None without clipping.
        loss_scale: Scale of the loss for fp16; None otherwise.
        seconds: Training time, without pauses.
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


@dataclass
class Evaluation:
    """Measurements on validation or test data.

    Args:
        loss: Loss of the task, mean over samples, tokens or nodes.
        metric: Accuracy in [0, 1], or perplexity.
        nfe: Evaluations of f, mean over batches.
        residual: Relative residual, mean over samples.
        radius, radius_max: Mean and largest spectral radius of the Jacobian at the equilibrium, over some samples.
        stops: The metric at hard stops, by the number of evaluations.
        stop_residuals: The relative residual at the same hard stops.
    """

    loss: float
    metric: float
    nfe: float
    residual: float
    radius: float | None = None
    radius_max: float | None = None
    stops: dict[int, float] = field(default_factory=dict)
    stop_residuals: dict[int, float] = field(default_factory=dict)


@dataclass
class EvaluationRow(Evaluation):
    """An evaluation on validation data, with means over the training steps since the previous one.

    Args:
        step: Number of steps done.
        epoch: Number of epochs done, rounded down.
        seconds: See :class:`StepRow`.
        train_loss, train_penalty, train_nfe, train_residual, train_backward_nfe, train_backward_residual: The
            means; see :class:`StepRow`.
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

    def flat(self) -> dict[str, Any]:
        """Return a mapping with one number per key: ``stops`` becomes ``metric@1``, ``residual@1`` and so on."""
        row = asdict(self)
        metrics, residuals = row.pop("stops"), row.pop("stop_residuals")
        first = {name: row.pop(name) for name in ("step", "epoch", "seconds")}
        stops = {f"metric@{stop}": value for stop, value in metrics.items()}
        return first | row | stops | {f"residual@{stop}": value for stop, value in residuals.items()}


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


@dataclass
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
