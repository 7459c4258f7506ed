"""Seeds as functions of (training's seed, purpose, step): checkpoints need not save any random state for them.

All ranks get the same seeds.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """The uses of random numbers, each with its own seeds. Never change a value: results would change."""

    PARAMETERS = 0
    AUGMENTATION = 1
    CAP = 2
    PENALTY = 3
    EVALUATION = 4
    HOLDOUT = 5
    RANK = 6


def seed_of(seed: int, purpose: Purpose, index: int = 0) -> int:
    """Compute a seed for torch, in [0, 2**63)."""
    words = np.random.SeedSequence([seed, int(purpose), index]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def generator_of(seed: int, purpose: Purpose, index: int = 0) -> torch.Generator:
    """Make a CPU generator with the seed of :func:`seed_of`."""
    return torch.Generator("cpu").manual_seed(seed_of(seed, purpose, index))
