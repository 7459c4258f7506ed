"""Evaluation of a model: loss and metric at its own cap and at hard stops, residuals, spectral radii."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from experiments.training.configuration import EvaluationConfig
from experiments.training.distribution import Distribution
from experiments.training.history import Evaluation
from experiments.training.seeds import Purpose, generator_of, seed_of
from experiments.training.tasks import Task
from pydeq.cell.torch_compile import uncompiled
from pydeq.jacobian import spectral_radius
from pydeq.models import EquilibriumModel


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """Make the autocast context of bf16, fp16 or none."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether convolutions in bfloat16 have kernels here.

    oneDNN has them on CPUs with AVX-512. Elsewhere torch falls back to a loop that takes ten times as long as float32.
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class ModelEvaluator:
    """Evaluates a model during its training, without any effect on the training.

    Args:
        task: The task of the training.
        model: The model.
        wrapped: The model wrapped for all ranks.
        config: The measurements to make.
        amp: The training's mixed precision.
        distribution: The ranks that train.
        seed: The training's seed.
    """

    def __init__(
        self, task: Task, model: EquilibriumModel, wrapped: nn.Module, config: EvaluationConfig, amp: str,
        distribution: Distribution, seed: int,
    ) -> None:  # fmt: skip
        self.task, self.model, self.wrapped, self.config = task, model, wrapped, config
        self.amp, self.distribution, self.seed = amp, distribution, seed

    def __call__(self, split: str = "validation") -> Evaluation:
        """Measure everything that the configuration asks for, on the split "validation" or "test"."""
        with self._looking():
            loss, metric, nfe, residual, converged = self._run(split, None)
            found = Evaluation(loss, metric, nfe, residual, converged=converged)
            solver: Any = self.model.config.solver  # pyright: ignore[reportAttributeAccessIssue]
            own = solver.eval_max_steps or solver.max_steps
            for stop in self.config.stops:
                if stop == own:  # the same solves
                    found.stops[stop], found.stop_residuals[stop] = metric, residual
                else:
                    _, found.stops[stop], _, found.stop_residuals[stop], _ = self._run(split, stop)
            if self.config.radius_samples:
                found.radius, found.radius_max = self._radius()
        return found

    @contextmanager
    def _looking(self) -> Iterator[None]:
        device = self.distribution.device
        devices = [device] if device.type == "cuda" else []
        training = self.wrapped.training
        with torch.random.fork_rng(devices), torch.no_grad(), autocast(self.amp, device):
            torch.manual_seed(seed_of(self.seed, Purpose.EVALUATION))
            self.wrapped.eval()
            try:
                yield
            finally:
                self.wrapped.train(training)
                if hasattr(self.wrapped, "reshard"):
                    self.wrapped.reshard()  # pyright: ignore[reportCallIssue]

    def _run(self, split: str, stop: int | None) -> tuple[float, float, float, float, float]:
        """Compute loss, metric, nfe, residual and converged share at a hard stop; None for the model's own cap."""
        options = {} if stop is None else {"max_steps": stop}
        sums = torch.zeros(8, dtype=torch.float64, device=self.distribution.device)
        for score, solution in self.task.evaluate(self.wrapped, split, **options):
            residual, samples = solution.relative_residual, len(solution.relative_residual)
            sums += torch.stack(
                [score.loss.double(), score.hits.double(), sums.new_tensor(score.count), residual.double().sum(),
                 solution.converged.double().sum(), sums.new_tensor(samples),
                 sums.new_tensor(solution.nfe * (samples > 0)), sums.new_tensor(samples > 0)]
            )  # fmt: skip
        loss, hits, count, residual, converged, samples, nfe, batches = self.distribution.sum(sums).tolist()
        metric = self.task.measure(hits, loss, round(count))
        samples = max(1.0, samples)
        return loss / max(1.0, count), metric, nfe / max(1.0, batches), residual / samples, converged / samples

    def _radius(self) -> tuple[float | None, float | None]:
        """Compute the mean and the largest spectral radius."""
        with captured(self.model) as calls:
            self.task.probe(self.wrapped, self.config.radius_samples)
        (context, z), *_ = calls
        radii = spectral_radius(
            uncompiled(self.model.deq.cell), z, *context, steps=self.config.radius_steps, rtol=1e-2,
            method=self.config.radius_method, generator=generator_of(self.seed, Purpose.EVALUATION),
        ).double()  # fmt: skip
        sums = self.distribution.sum(torch.stack([radii.sum(), radii.new_tensor(len(radii))])).tolist()
        most = self.distribution.max(radii.amax() if len(radii) else radii.new_tensor(-1.0))
        return (sums[0] / sums[1], float(most)) if sums[1] else (None, None)


@contextmanager
def captured(model: EquilibriumModel) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """Record the calls of the model's layer: pairs of the context and the equilibrium."""
    calls: list[tuple[tuple[Any, ...], Any]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((args[1:], output[0]))  # models always ask for the solution

    handle = model.deq.register_forward_hook(watch)
    try:
        yield calls
    finally:
        handle.remove()
