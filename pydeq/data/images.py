"""Labelled images in memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Args:
        images: uint8, (N, C, H, W).
        labels: int64, (N,), in [0, number of classes).
        classes: The classes' names.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def load_images(name: str, split: str, root: str | os.PathLike[str] | None = None) -> Images:
    """Labelled images of one split, "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        part = slice(None, 1437) if split == "train" else slice(1437, None)
        images = torch.from_numpy(pixels[part]).to(torch.uint8).mul_(15).reshape(-1, 1, 8, 8)
        return Images(images, torch.from_numpy(labels[part]).to(torch.int64), tuple("0123456789"))
    raise ValueError(f"name must be one of digits, fashion_mnist, cifar10, got {name!r}")
