"""The training loop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydeq.models import build
from pydeq.solution import ConvergenceWarning
from pydeq.training.configuration import TrainingConfig
from pydeq.training.distribution import Distribution, whole
from pydeq.training.draws import Purpose, seed_of
from pydeq.training.evaluation import Evaluator
from pydeq.training.history import EvaluationRow, History, Result, StepRow
from pydeq.training.logs import Log
from pydeq.training.means import Means
from pydeq.training.optimizers import build_optimizer, set_learning_rate
from pydeq.training.penalties import PenaltySchedule, cap
from pydeq.training.precision import Precision
from pydeq.training.schedules import learning_rate
from pydeq.training.tasks import task_of


class Trainer:
    """One training, from its configuration to its result.

    Args:
        config: What to do.
        distribution: The ranks that do it.
        log: Who is told.
    """

    def __init__(self, config: TrainingConfig, distribution: Distribution, log: Log) -> None:
        self.config, self.distribution, self.log = config, distribution, log
        self.task = task_of(config)(config, distribution)
        per_epoch = self.task.steps_per_epoch
        self.steps = config.steps if config.steps is not None else (config.epochs or 0) * per_epoch
        torch.manual_seed(seed_of(config.seed, Purpose.PARAMETERS))
        self.model = build(config.model).to(distribution.device)
        self.wrapped = distribution.wrap(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config.optimizer, self.parameters)
        self.precision = Precision(config.amp, distribution.device)
        self.penalties = PenaltySchedule(config.jacobian_penalty(), config.pretraining.steps, config.seed)
        self.evaluate = Evaluator(
            self.task, self.model, self.wrapped, config.evaluation, self.precision, distribution, config.seed
        )
        every = config.evaluation
        self.evaluation_steps = every.every_steps or (every.every_epochs or 1) * per_epoch
        self.history = History()
        self.step = 0
        self.means, self.means_of_evaluation = Means(distribution.device), Means(distribution.device)
        self._before, self._began = 0.0, time.monotonic()
        # Dropout and probes differ from rank to rank.
        torch.manual_seed(seed_of(config.seed, Purpose.RANK, distribution.rank))

    @property
    def seconds(self) -> float:
        """How long it has trained, pauses left out."""
        return self._before + time.monotonic() - self._began

    def run(self) -> Result:
        """Train to the end."""
        self.wrapped.train()
        status = "finished"
        with self._quiet():
            while self.step < self.steps and status == "finished":
                self._update(self.step)
                self.step += 1
                if not self._report():
                    status = "diverged"
            test = self.evaluate("test") if status == "finished" else None
        if test is not None:
            self.log.tested(test)
        return Result(status, self.task.metric, self.history, test, self.step, self.model, self.log.out)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            # Capped adjoint solves are part of the method, and their residuals are in every row.
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield

    def _update(self, step: int) -> None:
        """One step: all parts forward and backward, and the parameters' update."""
        config, epoch = self.config, step // self.task.steps_per_epoch
        shallow = step < config.pretraining.steps
        options: dict[str, Any] = {"layers": config.pretraining.layers} if shallow else {"max_steps": cap(config, step)}
        options["penalty"] = self.penalties.penalty(step, epoch)
        set_learning_rate(self.optimizer, learning_rate(config.schedule, config.optimizer.lr, step, self.steps))
        parts = self.task.parts(step)
        for i, part in enumerate(parts):
            with self.distribution.accumulating(self.wrapped, last=i == len(parts) - 1):
                with self.precision.autocast():
                    loss, solution = self.task.loss(self.wrapped, part, **options)
                penalty = loss.new_zeros(()) if solution.penalty is None else solution.penalty
                self.precision.scaled((loss + penalty) / len(parts)).backward()
            seen: dict[str, Tensor | float] = {
                "loss": loss, "penalty": penalty, "residual": solution.relative_residual.mean(),
                "nfe": config.pretraining.layers if shallow else solution.nfe,
            }  # fmt: skip
            if solution.backward is not None:
                seen["backward_nfe"] = solution.backward.nfe
                seen["backward_residual"] = solution.backward.relative_residual.mean()
            self._observe(**seen)
        if config.optimizer.clip is not None:
            self.precision.unscale(self.optimizer)
            norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip))
            if bool(norm.isfinite()) or config.amp != "fp16":
                self._observe(gradient_norm=norm)
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad()

    def _observe(self, **values: Tensor | float) -> None:
        self.means.add(**values)
        self.means_of_evaluation.add(**values)

    def _report(self) -> bool:
        """Rows and evaluations that are due; False where the loss is not finite any more."""
        last = self.step == self.steps
        evaluating = last or self.step % self.evaluation_steps == 0
        logging = evaluating or self.step % self.config.logging.every_steps == 0
        if not logging:
            return True
        if not self.means.finite(self.distribution):
            self._row()
            return False
        self._row()
        if evaluating:
            self._evaluate()
        return True

    def _row(self) -> None:
        done = self.step - 1
        epoch = done // self.task.steps_per_epoch
        means = self.means.take(self.distribution)
        row = StepRow(
            step=self.step, epoch=epoch, loss=_number(means["loss"]), penalty=_number(means["penalty"]),
            learning_rate=self.optimizer.param_groups[0]["lr"], strength=self.penalties.strength(done, epoch),
            nfe=_number(means["nfe"]), residual=_number(means["residual"]), backward_nfe=means["backward_nfe"],
            backward_residual=means["backward_residual"], gradient_norm=means["gradient_norm"],
            loss_scale=self.precision.scale(), seconds=self.seconds,
        )  # fmt: skip
        self.history.steps.append(row)
        self.log.stepped(row)

    def _evaluate(self) -> None:
        found, means = self.evaluate(), self.means_of_evaluation.take(self.distribution)
        row = EvaluationRow(
            **vars(found), step=self.step, epoch=self.step // self.task.steps_per_epoch, seconds=self.seconds,
            train_loss=means["loss"], train_penalty=means["penalty"], train_nfe=means["nfe"],
            train_residual=means["residual"], train_backward_nfe=means["backward_nfe"],
            train_backward_residual=means["backward_residual"],
        )  # fmt: skip
        self.history.evaluations.append(row)
        self.log.evaluated(row)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def train(
    config: TrainingConfig | str | Path, *, out: str | Path | None = None, resume: bool = False, quiet: bool = True
) -> Result:
    """Train a model.

        result = pydeq.training.train("conv_digits", out="runs/conv_digits")
        print(result.test.metric, result.history.column("metric@3"))

    Args:
        config: A configuration, or the name or path of one.
        out: Folder for checkpoints, logs and the trained parameters; nothing is written without one.
        resume: Go on from the newest checkpoint in ``out``, if there is one.
        quiet: Say nothing.

    Returns:
        The model, its history, and what was measured on test data. Torch's generators are left as they were.

    Raises:
        TypeError, ValueError: If the configuration does not fit, or is not that of the training to be resumed.
    """
    from pydeq.training.configuration import load_training_config

    found = config if isinstance(config, TrainingConfig) else load_training_config(config)
    distribution = Distribution(found.strategy, found.device)
    devices = [distribution.device] if distribution.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            log = Log(None if out is None else Path(out))
            return Trainer(found, distribution, log).run()
        finally:
            distribution.close()
