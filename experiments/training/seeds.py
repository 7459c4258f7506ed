"""Random numbers that belong to a step: functions of (seed, purpose, step), so that nothing of them need be saved.

Every rank draws the same.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What is drawn; each has numbers of its own. Values are part of what a seed means: never change one."""

    PARAMETERS = 0
    AUGMENTATION = 1
    CAP = 2
    PENALTY = 3
    EVALUATION = 4
    HOLDOUT = 5
    RANK = 6


def seed_of(seed: int, purpose: Purpose, index: int = 0) -> int:
    """A seed for torch, in [0, 2**63)."""
    words = np.random.SeedSequence([seed, int(purpose), index]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def generator_of(seed: int, purpose: Purpose, index: int = 0) -> torch.Generator:
    """A generator of the CPU with that seed."""
    return torch.Generator("cpu").manual_seed(seed_of(seed, purpose, index))
