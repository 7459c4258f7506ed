"""One training of a grid, from its configuration to its measurement, in its own process or in this one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from experiments.paper.environment import environment
from experiments.paper.measurement import ANDERSON_FILE, Measurement, Training
from experiments.training import Evaluation, EvaluationRow, History, Result, TrainingConfig, train
from experiments.training.distribution import Distribution
from experiments.training.evaluation import ModelEvaluator
from experiments.training.observers import Observer
from experiments.training.run_folder import CONFIG
from experiments.training.tasks import task_of

if TYPE_CHECKING:
    from multiprocessing.queues import Queue


class Message(NamedTuple):
    """A message from a worker.

    Args:
        key: Key of the training.
        kind: "began" (step, steps, metric), "advanced" (step), "evaluated" (row), "noticed" (text), "testing" (),
            "failed" (text) or "done" ().
        content: As above.
    """

    key: str
    kind: str
    content: tuple[Any, ...] = ()


Tell = Callable[[Message], None]

ADVANCE_SECONDS = 0.5


class Teller(Observer):
    """Sends messages about a training.

    Args:
        key: Key of the training.
        tell: Receiver of the messages.
    """

    def __init__(self, key: str, tell: Tell) -> None:
        self.key, self.tell = key, tell
        self.told = 0.0

    def began(self, config: TrainingConfig, history: History, step: int, steps: int, metric: str) -> None:
        self.tell(Message(self.key, "began", (step, steps, metric)))

    def advanced(self, step: int) -> None:
        now = time.monotonic()
        if now - self.told >= ADVANCE_SECONDS:
            self.told = now
            self.tell(Message(self.key, "advanced", (step,)))

    def evaluated(self, row: EvaluationRow) -> None:
        self.tell(Message(self.key, "evaluated", (row,)))

    def noticed(self, text: str) -> None:
        self.tell(Message(self.key, "noticed", (text,)))

    def ended(self, status: str, test: Evaluation | None) -> None:
        self.tell(Message(self.key, "testing"))


def measure(training: Training, folder: Path, threads: int, tell: Tell) -> Measurement:
    """Train, or resume an interrupted training in ``folder``, and test at all hard stops.

    Args:
        training: The training.
        folder: Folder of only this training.
        threads: Torch's threads.
        tell: Receiver of the messages.

    Raises:
        See :func:`experiments.training.train`.
    """
    key, config = training.key, training.config
    with _threads(threads):
        begun = (folder / CONFIG).is_file()
        result = train(config, out=folder, resume=begun, observers=[Teller(key, tell)])
        begin = time.monotonic()
        test = tested(training, result.model) if result.status == "finished" else None
        rows = result.history.evaluations
        steps = result.history.steps
        parameters = sum(each.numel() for each in result.model.parameters() if each.requires_grad)
        measurement = Measurement(
            key=key, config=config.mapping(), status=result.status, metric=result.metric, steps=result.steps,
            parameters=parameters, seconds=max([0.0, *(row.seconds for row in (*rows[-1:], *steps[-1:]))]),
            test_seconds=time.monotonic() - begin, evaluations=rows, test=test,
            environment=environment(_device(result)),
        )  # fmt: skip
    (folder / ANDERSON_FILE).unlink(missing_ok=True)  # of an earlier training
    measurement.save(folder)
    tell(Message(key, "done"))
    return measurement


def work(training: Training, folder: Path, threads: int, queue: Queue[Message]) -> None:
    """Run :func:`measure` in a process that ends with its parent; the exit status is 1 if it fails."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        measure(training, folder, threads, queue.put)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        queue.put(Message(training.key, "failed", (f"{type(error).__name__}: {error}",)))
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def tested(training: Training, model: nn.Module) -> Evaluation:
    """Evaluate a trained model on test data, at its own cap and at each hard stop, without mixed precision.

    Residuals and radii would otherwise end at bfloat16's rounding.
    """
    config = training.config
    evaluation = replace(config.evaluation, stops=training.stops, batch=training.test_batch)
    config = replace(config, evaluation=evaluation)
    distribution = Distribution("none", config.device)
    try:
        task = task_of(config)(config, distribution)
        model = model.to(distribution.device)
        evaluator = ModelEvaluator(task, model, model, evaluation, "none", distribution, config.seed)  # pyright: ignore[reportArgumentType]
        return evaluator("test")
    finally:
        distribution.close()


def _device(result: Result) -> str:
    return next(iter(result.model.parameters())).device.type


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
