"""Classification of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments import data
from experiments.training.configuration import TrainingConfig
from experiments.training.distribution import Distribution
from experiments.training.tasks.base import Score, Task
from experiments.training.tasks.image_sources import Samples, image_source
from pydeq.models import ImplicitMLPConfig
from pydeq.solution import Solution


class Classification(Task):
    """Classification of images by cross entropy; the metric is accuracy."""

    metric = "accuracy"

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        super().__init__(config, distribution)
        self.share(config.batch, "samples")
        self.source = image_source(config, distribution)
        self.validates_on_test = self.source.validates_on_test
        classes = _classes_of(config.model)
        if self.source.classes > classes:
            raise ValueError(f"model must have {self.source.classes} classes for {config.data.name}, got {classes}")
        self.steps_per_epoch = self.source.count // config.batch
        if not self.steps_per_epoch:
            raise ValueError(f"batch must be at most the {self.source.count} training samples, got {config.batch}")

    def parts(self, step: int) -> Sequence[Samples]:
        samples = self.source.training(step, *divmod(step, self.steps_per_epoch))
        size = len(samples.labels) // self.config.accumulation
        return [Samples(*pair) for pair in zip(samples.images.split(size), samples.labels.split(size), strict=True)]

    def loss(self, model: nn.Module, part: Samples, **options: Any) -> tuple[Tensor, Solution]:
        logits, solution = model(self._inputs(part.images), return_solution=True, **options)
        return functional.cross_entropy(_wide(logits), part.labels.to(self.device)), solution

    def evaluate(self, model: nn.Module, split: str, **options: Any) -> Iterator[tuple[Score, Solution]]:
        for samples in self.source.evaluation(split, self.config.evaluation.batch or self.config.batch):
            logits, solution = model(self._inputs(samples.images), return_solution=True, **options)
            labels = samples.labels.to(self.device)
            loss = functional.cross_entropy(_wide(logits), labels, reduction="sum")
            yield Score(loss, (logits.argmax(1) == labels).sum(), len(labels)), solution

    def probe(self, model: nn.Module, samples: int) -> None:
        found = next(iter(self.source.evaluation("validation", samples, samples)))
        model(self._inputs(found.images))

    def measure(self, hits: float, loss: float, count: int) -> float:
        return hits / max(1, count)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def _inputs(self, images: Tensor) -> Tensor:
        """Normalize images, and flatten them if the model needs that."""
        x = data.normalize(images.to(self.device, non_blocking=True), *_channels(self.source.statistics))
        x = x.to(torch.get_default_dtype())
        return x.flatten(1) if isinstance(self.config.model, ImplicitMLPConfig) else x


def _channels(statistics: data.Statistics) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return statistics.mean, statistics.std


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _classes_of(model: Any) -> int:
    if isinstance(model, ImplicitMLPConfig):
        return model.outputs
    head = getattr(model, "classification", None)
    return model.classes if head is None else head.classes
