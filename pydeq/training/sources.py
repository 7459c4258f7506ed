"""Data sets by the names that configurations use."""

from __future__ import annotations

from typing import Any

from pydeq import data
from pydeq.training.configuration import DataConfig
from pydeq.training.synthetic import synthetic_images


def load_images(config: DataConfig, split: str) -> Any:
    """Images of a split, "train" or "test", with attributes ``images``, uint8, and ``labels``, int64."""
    if config.name == "synthetic_images":
        return synthetic_images(split)
    return data.load_images(config.name, split, config.root)
