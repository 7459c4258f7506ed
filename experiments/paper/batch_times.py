"""The time of inference and of a training step, with and without the penalty, alternately on one thread."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from benchmarks.timing import Spread, alternate, spread, threads
from experiments.training import TrainingConfig
from experiments.training.distribution import Distribution
from experiments.training.evaluation import autocast
from experiments.training.tasks import task_of
from pydeq.models import EquilibriumModel
from pydeq.solution import ConvergenceWarning

REPEATS = 15


def batch_times(
    models: Mapping[str, EquilibriumModel], configs: Mapping[str, TrainingConfig], stop: int
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Time the first batch of the training data, in milliseconds.

    Inference is in float32; a training step has the precision of the training, its penalty if it has one in some steps,
    and no update of the parameters.

    Args:
        models: Trained models by label.
        configs: Their trainings, of the same data and the same size of a batch.
        stop: The hard stop.

    Returns:
        Inference at the models' own caps and at the stop, and training steps.
    """
    config = next(iter(configs.values()))
    distribution = Distribution("none", "cpu")
    try:
        task = task_of(config)(config, distribution)
        part = task.parts(0)[0]
    finally:
        distribution.close()

    def classify(label: str, max_steps: int | None) -> Callable[[], float]:
        options = {} if max_steps is None else {"max_steps": max_steps}

        def run() -> float:
            models[label].eval()
            begin = time.perf_counter()
            with torch.no_grad():
                task.loss(models[label], part, **options)
            return 1e3 * (time.perf_counter() - begin)

        return run

    def step(label: str) -> Callable[[], float]:
        settings = configs[label].jacobian_penalty()
        penalty = None if settings is None else replace(settings, frequency=1.0, stop_epoch=None).build()

        def run() -> float:
            models[label].train()
            begin = time.perf_counter()
            with autocast(config.amp, torch.device("cpu")):
                loss, solution = task.loss(models[label], part, penalty=penalty)
            (loss if solution.penalty is None else loss + solution.penalty).backward()
            took = 1e3 * (time.perf_counter() - begin)
            models[label].zero_grad()
            return took

        return run

    solves: dict[str, Callable[[], float]] = {}
    for label in models:
        solves[f"inference, {label}"] = classify(label, None)
        solves[f"inference, {label}, stopped at {stop}"] = classify(label, stop)
    steps = {f"training step, {label}": step(label) for label in models}
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caps are set on purpose
        solved, stepped = (alternate(sides, REPEATS) for sides in (solves, steps))
    return {name: spread(times) for name, times in solved.items()}, {name: spread(t) for name, t in stepped.items()}
