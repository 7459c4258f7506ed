"""The interface between training and tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from experiments.data import Vocabulary
from experiments.training.configuration import TrainingConfig
from experiments.training.distribution import Distribution
from pydeq.solution import Solution


class Score(NamedTuple):
    """Sums over the samples of a batch.

    Args:
        loss: Sum of the losses, 0-d.
        hits: Sum of the quantity that the metric counts, 0-d.
        count: Number of samples, tokens or nodes.
    """

    loss: Tensor
    hits: Tensor
    count: int


class Task(ABC):
    """A task: data in batches, a loss and a metric.

    Args:
        config: Configuration of the training.
        distribution: The ranks that share each batch.
    """

    metric: ClassVar[str]
    """Name of the metric."""

    steps_per_epoch: int
    vocabulary: Vocabulary | None = None
    """The vocabulary of a text, to be kept with the model."""
    validates_on_test: bool = False
    """Whether all test data serve as validation data, because there are no other data."""

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        self.config, self.distribution = config, distribution
        self.device = distribution.device

    @abstractmethod
    def parts(self, step: int) -> Sequence[Any]:
        """Return this rank's parts of training step ``step``, counted from the beginning of the training."""

    @abstractmethod
    def loss(self, model: nn.Module, part: Any, **options: Any) -> tuple[Tensor, Solution]:
        """Compute the mean loss of a part, and the solution.

        Args:
            model: The model, wrapped for all ranks.
            part: One of :meth:`parts`.
            options: Options of the model's call.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str, **options: Any) -> Iterator[tuple[Score, Solution]]:
        """Score this rank's share of the split "validation" or "test"; all ranks have the same number of batches."""

    @abstractmethod
    def probe(self, model: nn.Module, samples: int) -> None:
        """Call the model on ``samples`` validation samples, or as many as this rank has, so that it can be watched."""

    @abstractmethod
    def measure(self, hits: float, loss: float, count: int) -> float:
        """Compute the metric from sums over all samples."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Compute a digest of the data; a resumed training must have the same."""

    def state(self) -> dict[str, Tensor]:
        """Return the state that this rank keeps from step to step: tensors of the same shapes on all ranks."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a :meth:`state` that is not empty."""
        raise NotImplementedError(f"{type(self).__name__} carries nothing from step to step")

    def share(self, batch: int, what: str) -> int:
        """Return the size of this rank's share of ``batch``.

        Raises:
            ValueError: If the batch cannot be divided equally.
        """
        world = self.distribution.world
        pieces = world * self.config.accumulation
        if batch % pieces:
            raise ValueError(
                f"batch must be a multiple of {pieces}, {world} processes times accumulation"
                f" {self.config.accumulation}, got {batch} {what}"
            )
        return batch // world


def floating(device: torch.device) -> dict[str, Any]:
    """Return the options of tensors with the dtype of new parameters."""
    return {"dtype": torch.get_default_dtype(), "device": device}
