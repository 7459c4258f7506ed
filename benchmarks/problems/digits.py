"""Handwritten digits, 1797 gray images of 8x8 from scikit-learn's wheel, and a convolutional DEQ for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.problems.convolution import ConvCell

TRAIN = 1280


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N], for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, size: int, epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches of the training set in an order that depends only on the seed and the epoch."""
        generator = torch.Generator().manual_seed(1_000 * seed + epoch)
        order = torch.randperm(len(self.images), generator=generator)
        for rows in order.split(size):
            if len(rows) == size:
                yield self.images[rows], self.labels[rows]


def load_digits() -> Digits:
    """The data, split at random, always in the same way."""
    from sklearn.datasets import load_digits as load  # slow to import, and only this suite needs it

    pixels, targets = load(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0
    labels = torch.tensor(targets)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]
    return Digits(images[train], labels[train], images[test], labels[test])


class Classifier(nn.Module):
    """Stem, equilibrium of a convolutional cell, head.

    Args:
        channels: Of the state, [B, channels, 8, 8].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(4, channels))
        self.cell = ConvCell(channels)
        self.head = nn.Linear(4 * channels, 10)

    def inject(self, images: Tensor) -> Tensor:
        """x of z = cell(z, x), [B, channels, 8, 8]."""
        return self.stem(images)

    def classify(self, z: Tensor) -> Tensor:
        """Logits [B, 10]."""
        return self.head(functional.adaptive_avg_pool2d(z, 2).flatten(1))

    def forward(self, images: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the state and the injection; ``solve`` takes (z0, x)."""
        x = self.inject(images)
        z = solve(torch.zeros_like(x), x)
        return self.classify(z), z, x
