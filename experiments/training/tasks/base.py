"""What training needs to know of a task, and nothing more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from experiments.training.configuration import TrainingConfig
from experiments.training.distribution import Distribution
from pydeq.solution import Solution


class Score(NamedTuple):
    """Sums over the samples of a batch, to be added up.

    Args:
        loss: Sum of the losses, 0-d.
        hits: Sum of what the metric counts, 0-d.
        count: Samples, tokens or nodes.
    """

    loss: Tensor
    hits: Tensor
    count: int


class Task(ABC):
    """What is learned: data in batches, the loss, the metric.

    Args:
        config: Of the training.
        distribution: The ranks that share each batch.
    """

    metric: ClassVar[str]
    """What the metric is called."""

    steps_per_epoch: int
    validates_on_test: bool = False
    """Whether validation data are all the test data, since there are no others."""

    def __init__(self, config: TrainingConfig, distribution: Distribution) -> None:
        self.config, self.distribution = config, distribution
        self.device = distribution.device

    @abstractmethod
    def parts(self, step: int) -> Sequence[Any]:
        """What this rank goes through in training step ``step``, counted from the beginning of the training."""

    @abstractmethod
    def loss(self, model: nn.Module, part: Any, **options: Any) -> tuple[Tensor, Solution]:
        """The mean loss of a part, and the solution.

        Args:
            model: As the ranks train it.
            part: One of :meth:`parts`.
            options: Of the model's call.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str, **options: Any) -> Iterator[tuple[Score, Solution]]:
        """Score this rank's share of a split, "validation" or "test", batch by batch; each rank as many batches."""

    @abstractmethod
    def probe(self, model: nn.Module, samples: int) -> None:
        """Call the model on so many samples of the validation data, or as many as this rank has: for watching it."""

    @abstractmethod
    def measure(self, hits: float, loss: float, count: int) -> float:
        """The metric of sums over all samples."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the data: what a resumed training must find again."""

    def state(self) -> dict[str, Tensor]:
        """What this rank carries from step to step; tensors of the same shapes on all ranks."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a :meth:`state` that is not empty."""
        raise NotImplementedError(f"{type(self).__name__} carries nothing from step to step")

    def share(self, batch: int, what: str) -> int:
        """This rank's part of ``batch``.

        Raises:
            ValueError: If it does not go up.
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
    """Options of tensors like a new model's parameters."""
    return {"dtype": torch.get_default_dtype(), "device": device}
