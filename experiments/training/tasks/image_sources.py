"""Sources of batches of images: memory, or folders of files."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments import data
from experiments.data.images import NAMES
from experiments.training.configuration import TrainingConfig
from experiments.training.distribution import Distribution
from experiments.training.seeds import Purpose, generator_of
from experiments.training.synthetic import synthetic_images

FOLDERS = ("imagenet", "image_folder")
"""Names for folders of files, which :func:`experiments.data.image_folder` reads."""


class Samples(NamedTuple):
    """Images (n, channels, height, width), uint8, and labels (n,)."""

    images: Tensor
    labels: Tensor


class ImageSource(ABC):
    """A source of this rank's share of batches.

    The samples of a step, and their augmentation, do not depend on the number of ranks.

    Attributes:
        count: Number of training samples.
        classes: Number of classes.
        statistics: Mean and standard deviation of each channel.
        validates_on_test: Whether validation and test data are the same.
    """

    count: int
    classes: int
    statistics: data.Statistics
    validates_on_test: bool

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        self.config, self.distribution = config, distribution

    @abstractmethod
    def training(self, step: int, epoch: int, position: int) -> Samples:
        """Return this rank's share of a step, batch ``position`` of its epoch; called for one step after the other."""

    @abstractmethod
    def evaluation(self, split: str, batch: int, samples: int | None = None) -> Iterator[Samples]:
        """Yield the shares of a split, equally many on all ranks.

        Args:
            split: "validation" or "test".
            batch: Samples at a time, of all ranks together.
            samples: Use only the first n samples; None for all.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Compute a digest of all samples, or of their files' names."""


class MemoryImages(ImageSource):
    """Images that are all in memory."""

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        super().__init__(config, distribution)
        settings = config.data
        train = _first(self._load("train"), settings.train_samples)
        self.test = validation = _first(self._load("test"), settings.test_samples)
        if settings.holdout:
            if settings.holdout >= len(train.labels):
                raise ValueError(f"data.holdout must be below the {len(train.labels)} samples, got {settings.holdout}")
            order = torch.randperm(
                len(train.labels), generator=generator_of(config.seed, Purpose.HOLDOUT), device="cpu"
            )
            held, rest = order[: settings.holdout].sort()[0], order[settings.holdout :].sort()[0]
            validation = Samples(train.images[held], train.labels[held])
            train = Samples(train.images[rest], train.labels[rest])
        self.train, self.known = train, (train, validation, self.test)
        self.validation = _first(validation, config.evaluation.samples)
        self.validates_on_test = not settings.holdout and len(self.validation.labels) == len(self.test.labels)
        self.count = len(train.labels)
        labels = [part.labels for part in (train, self.validation, self.test) if len(part.labels)]
        self.classes = int(torch.cat(labels).max()) + 1
        self._epoch: tuple[int, data.Batches] | None = None

    def _load(self, split: str) -> data.Images:
        settings = self.config.data
        if settings.name == "synthetic_images":
            found = synthetic_images(split)
            if split == "train":
                self.statistics = data.statistics(found)
            return found
        if settings.name not in NAMES:
            known = ", ".join((*NAMES, *FOLDERS, "synthetic_images"))
            raise ValueError(f"data.name must be one of {known} for this model, got {settings.name!r}")
        self.statistics = data.statistics(settings.name)
        return data.load_images(settings.name, split, settings.root)

    def training(self, step: int, epoch: int, position: int) -> Samples:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, data.batches(self.count, self.config.batch, self.config.seed, epoch, drop_last=True)
        indices = self._epoch[1][position]
        # The whole batch is augmented before it is shared, so that the draws are the same for any number of ranks.
        images = self._augmented(self.train.images[indices], step)
        share = len(indices) // self.distribution.world
        mine = slice(self.distribution.rank * share, (self.distribution.rank + 1) * share)
        return Samples(images[mine], self.train.labels[indices][mine])

    def _augmented(self, images: Tensor, step: int) -> Tensor:
        name = self.config.data.augmentation
        generator = generator_of(self.config.seed, Purpose.AUGMENTATION, step)
        if "crop" in name:
            images = data.random_crop(images, self.config.data.padding, generator=generator)
        if "flip" in name:
            images = data.random_flip(images, generator=generator)
        return images

    def evaluation(self, split: str, batch: int, samples: int | None = None) -> Iterator[Samples]:
        found = _first(self.test if split == "test" else self.validation, samples)
        for indices in _shares(len(found.labels), batch, self.distribution):
            yield Samples(found.images[indices], found.labels[indices])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for samples in self.known:  # all samples: a resumed training may evaluate on fewer
            digest.update(str(tuple(samples.images.shape)).encode())
            digest.update(samples.images.contiguous().numpy().data)
            digest.update(samples.labels.contiguous().numpy().data)
        return digest.hexdigest()


class FolderImages(ImageSource):
    """Images in files, which other processes read ahead of time."""

    validates_on_test = True

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        super().__init__(config, distribution)
        settings = config.data
        for name in ("train_samples", "test_samples", "holdout"):
            if getattr(settings, name):
                raise ValueError(f"data.{name} must be left out for folders of images, got {getattr(settings, name)}")
        if settings.augmentation not in ("none", "random_resized"):
            raise ValueError(f"data.augmentation must be random_resized or none, got {settings.augmentation!r}")
        if settings.root is None:
            raise ValueError("data.root must be the folder with the splits' folders, got None")
        augment = settings.augmentation == "random_resized"
        self.train = data.image_folder(settings.root, "train", settings.size, augment, seed=config.seed)
        self.test = data.image_folder(settings.root, "valid", settings.size)
        if self.train.classes != self.test.classes:
            raise ValueError(f"{self.train.folder} and {self.test.folder} must have folders for the same classes")
        self.validates_on_test = config.evaluation.samples is None
        self.count, self.classes = len(self.train), len(self.train.classes)
        self.statistics = data.statistics("imagenet")
        self._reading: tuple[int, int, Iterator[list[Tensor]]] | None = None  # epoch, next batch, batches

    def training(self, step: int, epoch: int, position: int) -> Samples:
        if self._reading is None or self._reading[:2] != (epoch, position):
            self.train.set_epoch(epoch)
            order = data.batches(
                self.count, self.config.batch, self.config.seed, epoch, self.distribution.rank, self.distribution.world,
                start=position, drop_last=True,
            )  # fmt: skip
            self._reading = epoch, position, iter(self._loader(self.train, list(order)))
        images, labels = next(self._reading[2])
        self._reading = epoch, position + 1, self._reading[2]
        return Samples(images, labels)

    def evaluation(self, split: str, batch: int, samples: int | None = None) -> Iterator[Samples]:
        limits = [limit for limit in (samples, self.config.evaluation.samples if split != "test" else None) if limit]
        order = list(_shares(min([len(self.test), *limits]), batch, self.distribution))
        full = [indices for indices in order if len(indices)]
        for images, labels in self._loader(self.test, full):
            yield Samples(images, labels)
        size = self.config.data.size
        for _ in range(len(order) - len(full)):  # ranks without samples take part, too
            yield Samples(
                torch.empty(0, 3, size, size, dtype=torch.uint8, device="cpu"),
                torch.empty(0, dtype=torch.int64, device="cpu"),
            )

    def _loader(self, images: data.ImageFolder, order: list[Tensor]) -> DataLoader[Any]:
        # Its own generator: training's random numbers must not depend on how files are read.
        return DataLoader(
            images, batch_sampler=[indices.tolist() for indices in order], num_workers=self.config.data.workers,
            generator=torch.Generator("cpu"), pin_memory=self.distribution.device.type == "cuda",
        )  # fmt: skip

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for images in (self.train, self.test):
            for path, label in images.files:
                digest.update(f"{path.removeprefix(str(images.folder))} {label}\n".encode())
        return digest.hexdigest()


def image_source(config: TrainingConfig, distribution: Distribution) -> ImageSource:
    """Make the source that a configuration names."""
    return (FolderImages if config.data.name in FOLDERS else MemoryImages)(config, distribution)


def _first(samples: data.Images | Samples, count: int | None) -> Samples:
    return Samples(samples.images[:count], samples.labels[:count])


def _shares(n: int, batch: int, distribution: Distribution) -> data.Batches:
    """This rank's shares of n samples in order, equally many on all ranks; some may be empty."""
    return data.batches(
        n, max(batch, distribution.world), rank=distribution.rank, world=distribution.world, shuffle=False
    )
