"""The Jacobian penalty and the cap of each step."""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments.training.configuration import TrainingConfig
from experiments.training.seeds import Purpose, generator_of
from pydeq.jacobian import JacobianPenalty
from pydeq.models.equilibrium import PenaltyConfig


class PenaltySchedule:
    """The penalized steps and their strengths; the same on all ranks, and for all parts of an accumulated step.

    Shallow steps have their own strength. As in the published recipes, increments count steps from the end of
    pre-training, and the last epoch is counted from the beginning of the training.

    Args:
        config: The penalty; None for none.
        pretraining_steps: Number of shallow steps.
        seed: Seed of the training.
    """

    def __init__(self, config: PenaltyConfig | None, pretraining_steps: int, seed: int) -> None:
        self.pretraining_steps, self.seed = pretraining_steps, seed
        self.stop_epoch = None if config is None else config.stop_epoch
        self.deep = self.shallow = None
        if config is not None:
            self.deep = replace(config, stop_epoch=None).build()
            self.shallow = replace(self.deep, strength=config.pretraining_strength, increment=0.0, every=None)

    def strength(self, step: int, epoch: int) -> float:
        """Return gamma of this step."""
        penalty = self._of(step, epoch)
        return 0.0 if penalty is None else penalty.strength

    def penalty(self, step: int, epoch: int) -> JacobianPenalty | None:
        """Return the penalty to compute in this step; None for none."""
        penalty = self._of(step, epoch)
        if penalty is None or not penalty.active(0, generator_of(self.seed, Purpose.PENALTY, step)):
            return None
        return replace(penalty, frequency=1.0)

    def _of(self, step: int, epoch: int) -> JacobianPenalty | None:
        if self.deep is None or self.shallow is None or (self.stop_epoch is not None and epoch >= self.stop_epoch):
            return None
        if step < self.pretraining_steps:
            return self.shallow
        return self.deep.at(step - self.pretraining_steps)


def cap(config: TrainingConfig, step: int) -> int:
    """Return max_steps of this step: the model's plus the jitter."""
    low, high = config.jitter
    if low == high:
        return config.max_steps + low
    generator = generator_of(config.seed, Purpose.CAP, step)
    return config.max_steps + int(torch.randint(low, high + 1, (), generator=generator, device="cpu"))
