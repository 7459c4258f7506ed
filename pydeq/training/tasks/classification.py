"""Images and their classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pydeq import data
from pydeq.models import ImplicitMLPConfig
from pydeq.solution import Solution
from pydeq.training.configuration import TrainingConfig
from pydeq.training.distribution import Distribution
from pydeq.training.draws import Purpose, generator_of
from pydeq.training.sources import load_images
from pydeq.training.tasks.base import Score, Task, floating


class Samples(NamedTuple):
    """Images (n, channels, height, width), uint8, and labels (n,)."""

    images: Tensor
    labels: Tensor


class Classification(Task):
    """Cross entropy of the classes of images; the metric is accuracy.

    The batch of a step is drawn, and augmented, before the ranks share it: what is learned does not depend on how many
    there are.
    """

    metric = "accuracy"
    higher_is_better = True

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        super().__init__(config, distribution)
        settings = config.data
        train = _first(load_images(settings, "train"), settings.train_samples)
        self.test = _first(load_images(settings, "test"), settings.test_samples)
        self.validation = self.test
        if settings.holdout:
            if settings.holdout >= len(train.labels):
                raise ValueError(f"data.holdout must be below the {len(train.labels)} samples, got {settings.holdout}")
            order = torch.randperm(len(train.labels), generator=generator_of(config.seed, Purpose.HOLDOUT))
            held, rest = order[: settings.holdout].sort()[0], order[settings.holdout :].sort()[0]
            self.validation = Samples(train.images[held], train.labels[held])
            train = Samples(train.images[rest], train.labels[rest])
        self.train = train
        self.validation = _first(self.validation, config.evaluation.samples)
        self.validates_on_test = len(self.validation.labels) == len(self.test.labels) and not settings.holdout
        classes = _classes_of(config.model)
        largest = int(max(part.labels.max() for part in (train, self.validation, self.test)))
        if largest >= classes:
            raise ValueError(f"model must tell {largest + 1} classes of {settings.name} apart, got {classes}")
        self.mean, self.std = _statistics(train.images)
        self.share(config.batch, "samples")
        self.steps_per_epoch = len(train.labels) // config.batch
        if not self.steps_per_epoch:
            raise ValueError(f"batch must be at most the {len(train.labels)} training samples, got {config.batch}")
        self._epoch: tuple[int, data.Batches] | None = None

    def parts(self, step: int) -> Sequence[Samples]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            n, batch = len(self.train.labels), self.config.batch
            self._epoch = epoch, data.batches(n, batch, self.config.seed, epoch, drop_last=True)
        indices = self._epoch[1][position]
        images = self._augmented(self.train.images[indices], step)
        labels = self.train.labels[indices]
        share = self.share(len(indices), "samples")
        mine = slice(self.distribution.rank * share, (self.distribution.rank + 1) * share)
        size = share // self.config.accumulation
        return [Samples(*pair) for pair in zip(images[mine].split(size), labels[mine].split(size), strict=True)]

    def _augmented(self, images: Tensor, step: int) -> Tensor:
        name = self.config.data.augmentation
        generator = generator_of(self.config.seed, Purpose.AUGMENTATION, step)
        if "crop" in name:
            images = data.random_crop(images, self.config.data.padding, generator=generator)
        if "flip" in name:
            images = data.random_flip(images, generator=generator)
        return images

    def _inputs(self, images: Tensor) -> Tensor:
        """What the model takes."""
        x = images.to(self.device, non_blocking=True).to(**floating(self.device))
        x = (x - self.mean.to(x)) / self.std.to(x)
        return x.flatten(1) if isinstance(self.config.model, ImplicitMLPConfig) else x

    def loss(self, model: nn.Module, part: Samples, **options: Any) -> tuple[Tensor, Solution]:
        logits, solution = model(self._inputs(part.images), return_solution=True, **options)
        labels = part.labels.to(self.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return functional.cross_entropy(logits.to(wide), labels), solution

    def evaluate(self, model: nn.Module, split: str, **options: Any) -> Iterator[tuple[Score, Solution]]:
        samples = self.test if split == "test" else self.validation
        batch = self.config.evaluation.batch or self.config.batch
        for indices in data.batches(
            len(samples.labels), max(batch, self.distribution.world), rank=self.distribution.rank,
            world=self.distribution.world, shuffle=False,
        ):  # fmt: skip
            logits, solution = model(self._inputs(samples.images[indices]), return_solution=True, **options)
            labels = samples.labels[indices].to(self.device)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            yield Score(loss, (logits.argmax(1) == labels).sum(), len(labels)), solution

    def probe(self, model: nn.Module, samples: int) -> None:
        world, rank = self.distribution.world, self.distribution.rank
        indices = data.batches(min(samples, len(self.validation.labels)), max(samples, world), rank=rank, world=world,
                               shuffle=False)[0]  # fmt: skip
        model(self._inputs(self.validation.images[indices]))

    def measure(self, hits: float, loss: float, count: int) -> float:
        return hits / max(1, count)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for samples in (self.train, self.validation, self.test):
            digest.update(str(tuple(samples.images.shape)).encode())
            digest.update(samples.images.contiguous().numpy().data)
            digest.update(samples.labels.contiguous().numpy().data)
        return digest.hexdigest()


def _first(samples: Any, count: int | None) -> Samples:
    return Samples(samples.images[:count], samples.labels[:count])


def _classes_of(model: Any) -> int:
    if isinstance(model, ImplicitMLPConfig):
        return model.outputs
    head = getattr(model, "classification", None)
    return model.classes if head is None else head.classes


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (channels, 1, 1), float64; exact sums, whatever the order of the samples."""
    channels = images.transpose(0, 1).flatten(1)
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double()
    mean = (counts @ values) / counts.sum(1)
    variance = (counts * (values - mean[:, None]).square()).sum(1) / counts.sum(1)
    return mean.view(-1, 1, 1), variance.sqrt().clamp(min=1e-3).view(-1, 1, 1)
